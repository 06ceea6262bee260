"""What an epoch of `align` meets: shares by language, repeats, limits, what is held out."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world import (
    Notes,
    killed_at_step,
    metrics_of,
    quick_align,
    read_jsonl,
    stage_command,
    start_team,
    weights,
    write_jsonl,
)

from clseave_cli import VisualEntailment
from clseave_cli.core import alignment
from clseave_cli.core.alignment import corpus
from clseave_cli.core.alignment.sampling import Sampler, whole_parts
from clseave_cli.core.config import AlignConfig, EvaluateConfig
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.features import Features, Vectors
from clseave_cli.core.models.student import new_student
from clseave_cli.core.training.sampling import epochs_to_95
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT


def _sampler(sizes, **options):
    """Of languages a, b, …, with so many pairs each."""
    sources = np.concatenate([np.arange(size) for size in sizes])
    pairs = corpus.TrainingPairs(
        None,
        Features(Vectors(max(sizes), 1), sources),
        torch.ones(len(sources)),
        tuple("abcdef"[: len(sizes)]),
        np.repeat(np.arange(len(sizes)), sizes),
        np.arange(len(sources)),
    )
    return Sampler(pairs, AlignConfig(**({"batch_size": 4} | options)))


# --- shares ---


def test_shares_by_hand():
    sizes = [80, 20]
    assert _sampler(sizes, sampling="uniform").shares({}).tolist() == [0.5, 0.5]
    assert _sampler(sizes).shares({}).tolist() == [0.8, 0.2]
    half = _sampler(sizes, sampling="temperature", sampling_temperature=2.0).shares({})
    assert half.tolist() == pytest.approx([2 / 3, 1 / 3])
    paced = _sampler(sizes, sampling="self-paced")
    assert paced.shares({}).tolist() == [0.5, 0.5]
    recall = {"recall_at_10": 0.8, "recall_at_10/a": 0.9, "recall_at_10/b": 0.7}
    a, b = math.exp(-9), math.exp(-7)
    assert paced.shares(recall).tolist() == pytest.approx([a / (a + b), b / (a + b)])


@pytest.mark.parametrize("sampling", ["uniform", "temperature", "self-paced"])
def test_an_epoch_is_as_long_as_ever_and_repeats_evenly(sampling):
    """A fixed sampling may begin within a round, so that counts differ by two."""
    sizes = [50, 7, 3]
    sampler = _sampler(sizes, sampling=sampling)
    dev = {"recall_at_10/a": 0.5, "recall_at_10/b": 0.6, "recall_at_10/c": 0.55}
    batches = sampler.batches(3, dev)
    drawn = np.concatenate(batches)
    assert len(batches) == 15 and len(drawn) == sampler.num_examples == 60
    parts = np.split(np.bincount(drawn, minlength=60), np.cumsum(sizes)[:-1])
    shares = [part.sum() / 60 for part in parts]
    np.testing.assert_allclose(shares, sampler.shares(dev), atol=1 / 60)
    assert max(map(np.ptp, parts)) <= (1 if sampling == "self-paced" else 2)
    again = _sampler(sizes, sampling=sampling).batches(3, dev)
    assert all(map(np.array_equal, batches, again))
    assert not np.array_equal(np.concatenate(sampler.batches(4, dev)), drawn)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    epoch_pairs=st.none() | st.integers(1, 150),
    sampling=st.sampled_from(["proportional", "uniform", "temperature"]),
    seed=st.integers(0, 5),
)
def test_no_pair_is_met_twice_before_all_were_met_once(sizes, epoch_pairs, sampling, seed):
    sampler = _sampler(sizes, sampling=sampling, epoch_pairs=epoch_pairs, seed=seed)
    assert sampler.num_examples == (epoch_pairs or sum(sizes))
    counts = np.zeros(sum(sizes), dtype=int)
    for epoch in range(8):
        batches = sampler.batches(epoch, {})
        assert len(batches) == math.ceil(sampler.num_examples / 4)
        counts += np.bincount(np.concatenate(batches), minlength=len(counts))
        assert counts.sum() == (epoch + 1) * sampler.num_examples
        assert max(map(np.ptp, np.split(counts, np.cumsum(sizes)[:-1]))) <= 1


def test_short_epochs_meet_everything_in_turn():
    sampler = _sampler([1000], epoch_pairs=100, batch_size=10)
    epochs = [np.concatenate(sampler.batches(epoch, {})) for epoch in range(20)]
    for round_ in (epochs[:10], epochs[10:]):
        assert sorted(np.concatenate(round_).tolist()) == list(range(1000))
    assert set(epochs[0]) != set(epochs[10])
    # A resumed run meets the same.
    again = _sampler([1000], epoch_pairs=100, batch_size=10).batches(13, {})
    assert np.array_equal(np.concatenate(again), epochs[13])
    # Languages of one size are not met in step.
    drawn = np.concatenate(_sampler([100, 100], epoch_pairs=100).batches(0, {}))
    assert set(drawn[drawn < 100]) != set(drawn[drawn >= 100] - 100)


def test_whole_epochs_keep_their_order():
    """That of the versions before `--epoch-pairs` went on from epoch to epoch."""
    for epoch in range(3):
        order = np.random.default_rng([5, epoch])
        plain = _sampler([30, 30], seed=5).batches(epoch, {})
        assert np.array_equal(np.concatenate(plain), order.permutation(60))
        order = np.random.default_rng([5, epoch])
        paced = _sampler([30, 10], seed=5, sampling="self-paced").batches(epoch, {})
        first = order.permutation(30)[:20]
        second = [order.permutation(10) for _ in range(2)]
        drawn = np.concatenate([first, *(30 + part for part in second)])
        assert np.array_equal(np.concatenate(paced), order.permutation(drawn))


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda w: sum(w) > 0),
    total=st.integers(0, 10_000),
)
def test_parts_are_whole_and_sum_up(weights, total):
    shares = np.array(weights) / sum(weights)
    parts = whole_parts(shares, total)
    assert parts.sum() == total and (parts >= 0).all()
    assert np.abs(parts - shares * total).max() < 1 + 1e-6


# --- through the command ---


def test_dev_figures_are_told_by_language(world, tmp_path, trained, encoder):
    result = quick_align(world, tmp_path, trained, encoder, "de", "nl", epochs=2)
    dev = json.loads((result.folder / "training" / "summary.json").read_text())["dev"]
    assert {name.partition("/")[2] for name in dev} == {"", "de", "nl"}
    for name in ("mse", "accuracy", "recall_at_10", "cosine"):
        assert dev[name] == pytest.approx((dev[f"{name}/de"] + dev[f"{name}/nl"]) / 2)
    assert "accuracy/de" not in (result.folder / "README.md").read_text()
    single = quick_align(world, tmp_path / "one", trained, encoder, "de")
    assert not any("/" in name for name in single.training.dev)


def test_self_paced_sampling_resumes_to_the_bit(world, tmp_path, trained, encoder):
    def run(name, **options):
        return quick_align(
            world, tmp_path / name, trained, encoder, "de", "nl", sampling="self-paced",
            select="recall_at_10", epochs=4, batch_size=2, **options,
        )  # fmt: skip

    whole = run("whole")
    with killed_at_step(whole.training.steps // 2 + 3):  # in the middle of the third epoch
        run("parts", checkpoint_minutes=0)
    parts = run("parts", resume=True)
    assert metrics_of(parts.folder / "training") == metrics_of(whole.folder / "training")
    assert weights(parts.folder) == weights(whole.folder)


def test_contrastive_batches_span_processes(world, tmp_path, trained, encoder, clseave):
    command = stage_command(
        "align", world, trained, encoder, "--objective", "contrastive", "--include-english",
        "--pooling", "mean", "--epochs", 1, "--batch-size", 6, "--learning-rate", 1e-3,
    )  # fmt: skip
    assert clseave(*command, "--out", tmp_path / "alone")[0] == 0
    team = start_team(*command, "--out", str(tmp_path / "team"), folder=tmp_path / "said")
    assert [process.wait() for process in team] == [0, 0], team[0].stderr
    both, single = (metrics_of(tmp_path / name / "training") for name in ("team", "alone"))
    for two, one in zip(both, single, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two.get("dev", {}) == pytest.approx(one.get("dev", {}), rel=1e-3, abs=1e-4)


def test_english_is_its_own_translation(world, tmp_path, runs, encoder):
    result = quick_align(
        world, runs, runs, encoder, "de", "nl", include_english=True, epochs=60,
        learning_rate=2e-3, weight_decay=0.0, out=runs / "many", select="mse",
    )  # fmt: skip
    assert result.languages == ("de", "nl", "en")
    languages = json.loads((runs / "many" / "config.json").read_text())["languages"]
    assert languages == ["de", "nl", "en"]
    dev = result.training.dev
    assert dev["cosine/en"] > 0.8
    assert dev["mse"] == pytest.approx(np.mean([dev[f"mse/{lang}"] for lang in ("de", "nl", "en")]))
    # The teacher goes on reading English: for predict, and for evaluate.
    model = VisualEntailment.from_pretrained(runs, "en")
    answer = model(world / "images" / "test0.png", "The square is red.")
    assert answer.model == str(runs / "clip-ve")
    document = evaluate(EvaluateConfig(data=str(world), runs=(runs,), resamples=10))
    assert [r.lang for r in document.results] == ["en", "de", "nl"]
    assert "many" not in document.signature.checkpoints


def _reader(data, progress=SILENT, **options):
    return corpus.ParallelReader(data, AlignConfig(data=str(data), **options), progress)


def test_the_english_pairs_are_those_of_every_language(world, encoder):
    taken, reader = corpus.Corpus(new_student(encoder, 16), SILENT), _reader(world)
    for lang in ("de", "nl"):
        taken.add(reader.read(lang)[0])
    taken.add_source("en")
    *_, english = taken._parts
    rows = read_split(world, "train", "en").hypotheses
    counts = {s: rows.count(s) for s in rows}
    assert dict(zip(taken._sources, english.counts // 2, strict=True)) == counts
    assert english.portions()[1].sum() == pytest.approx(len(counts))


def test_an_auxiliary_language_is_trained_along_and_does_not_count(
    world, tmp_path, trained, encoder
):
    result = quick_align(
        world, tmp_path, trained, encoder, "de", auxiliary=("nl",), auxiliary_weight=0.25
    )
    assert result.languages == ("de",) and result.folder.name == "align-de"
    assert json.loads((result.folder / "config.json").read_text())["languages"] == ["de"]
    dev = result.training.dev
    assert dev["accuracy"] == dev["accuracy/de"] and "accuracy/nl" in dev
    assert result.training.pairs == 10
    taken, reader = corpus.Corpus(new_student(encoder, 16), SILENT), _reader(world)
    taken.add(reader.read("de")[0])
    taken.add(reader.read("nl")[0], 0.25)
    assert [part.portions()[1].mean() for part in taken._parts] == pytest.approx([1, 0.25])


@pytest.mark.parametrize(
    ("lang", "message"),
    [
        ("de", "is a --lang already"),
        ("en", "use --include-english instead"),
        ("../x", "not a language code"),
    ],
)
def test_auxiliary_languages_that_are_none(world, tmp_path, trained, encoder, lang, message):
    with pytest.raises(UsageError, match=f"--auxiliary {lang}: {message}"):
        quick_align(world, tmp_path, trained, encoder, "de", auxiliary=(lang,))


# --- low resource ---


def test_a_smaller_limit_is_a_part_of_a_larger_one_and_languages_share_it(world):
    texts = {lang: _reader(world).read(lang)[0] for lang in ("de", "nl")}

    def sources(lang, limit, seed=0):
        return set(corpus.limited(texts[lang], limit, seed, SILENT).sources)

    before = set()
    for limit in range(1, 6):
        chosen = sources("de", limit)
        assert len(chosen) == limit and before < chosen and chosen == sources("nl", limit)
        before = chosen
    assert len({tuple(sorted(sources("de", 2, seed))) for seed in range(8)}) > 1
    part = corpus.limited(texts["de"], 2, 0, SILENT)
    # Every row of a chosen sentence is there.
    assert len(part.sources) == sum(s in set(part.sources) for s in texts["de"].sources)


def test_the_student_learns_from_so_many_sentences(world, tmp_path, trained, encoder):
    result = quick_align(world, tmp_path, trained, encoder, "de", "nl", limit=2)
    assert result.training.pairs == 4
    notes = Notes()
    result = quick_align(world, tmp_path / "b", trained, encoder, "de", limit=99, progress=notes)
    assert result.training.pairs == 5
    assert "5 distinct sentences, fewer than --limit 99; all are used." in notes.text


def test_a_language_with_no_rows_is_told(data, tmp_path, trained, encoder, refused):
    path = data / "snli_ve_train.nl.jsonl"
    path.write_text("")
    command = stage_command("align", data, trained, encoder, "--runs", tmp_path)
    assert "snli_ve_train.nl.jsonl: no usable rows" in refused(*command)
    assert not list(tmp_path.glob("align*"))
    rows = read_jsonl(data / "snli_ve_train.de.jsonl")
    write_jsonl(path, [row | {"pairID": row["pairID"] + "x"} for row in rows])
    assert "none of its pairIDs occurs in" in refused(*command)


def _texts(data, progress=SILENT, lang=("de", "nl"), **options):
    """The training and the dev texts of a run, by language."""
    reader = _reader(data, progress, lang=lang, dev_fraction=0.4, **options)
    return {lang: reader.read(lang) for lang in (*lang, *options.get("auxiliary", ()))}


def _keep_sentences(path, kept):
    """Leaves the rows of the English file's given sentences alone."""
    english = {r["pairID"]: r["sentence2"] for r in read_jsonl(path.parent / "snli_ve_train.jsonl")}
    write_jsonl(path, [row for row in read_jsonl(path) if english[row["pairID"]] in kept])


@pytest.fixture
def plain(data):
    """Its translations are plain text, which names no photos; Dutch has no dev file."""
    for lang in ("de", "nl"):
        _forget_photos(data / f"snli_ve_train.{lang}.jsonl")
    (data / "snli_ve_dev.nl.jsonl").unlink()
    return data


def _forget_photos(path, *more):
    rows = [*read_jsonl(path), *more]
    write_jsonl(path, [{k: v for k, v in row.items() if k != "Flickr30K_ID"} for row in rows])


def test_photos_are_held_out_with_all_their_rows_in_every_language(
    data, tmp_path, trained, encoder
):
    (data / "snli_ve_dev.nl.jsonl").unlink()
    whole = len(read_jsonl(data / "snli_ve_train.de.jsonl"))
    (german, _), (dutch, dutch_dev) = _texts(data).values()
    held = set(dutch_dev.target.image_names)
    assert len(held) == 3
    assert held.isdisjoint({*german.target.image_names, *dutch.target.image_names})
    assert len(german.target) == len(dutch.target) == whole - len(dutch_dev.target)
    (data / "snli_ve_dev.de.jsonl").unlink()
    assert [set(dev.target.image_names) for _, dev in _texts(data).values()] == [held, held]
    # The default chooses the checkpoint by accuracy on photos that were not trained beside.
    notes = Notes()
    dev = quick_align(data, tmp_path, trained, encoder, "de", progress=notes).training.dev
    assert "accuracy" in dev and "holding out 5% of the train photos instead" in notes.text
    # A language of plain text spares the sentences beside the photos of another.
    shutil.copy(data / "snli_ve_dev.jsonl", data / "snli_ve_dev.nl.jsonl")
    cat = {"pairID": "c", "sentence2": "A cat.", "sentence2_en": "A cat.", "gold_label": "neutral"}
    _forget_photos(data / "snli_ve_train.nl.jsonl", cat)
    write_jsonl(
        data / "snli_ve_train.jsonl",
        [*read_jsonl(data / "snli_ve_train.jsonl"), {**cat, "Flickr30K_ID": "train0.png"}],
    )
    (_, german_dev), (dutch, _) = _texts(data).values()
    assert "A cat." in dutch.sources and not {*german_dev.sources} & {*dutch.sources}


def test_held_out_sentences_are_held_out_in_every_language(plain):
    (plain / "snli_ve_dev.de.jsonl").unlink()
    notes = Notes()
    texts = _texts(plain, notes)
    held = {lang: set(dev.sources) for lang, (_, dev) in texts.items()}
    assert held["de"] == held["nl"] and len(held["de"]) == 2
    # As if each were alone: nothing more is taken from any, and nothing said twice.
    for lang, (training, _) in texts.items():
        ((alone, _),) = _texts(plain, lang=(lang,)).values()
        assert alone.target.pair_ids == training.target.pair_ids
        assert notes.text.count(f"no dev file for {lang}") == 1
    assert "held out for other languages" not in notes.text


def test_held_out_translations_are_kept_for_the_vocabulary_and_may_not_be_all(plain):
    reader = _reader(plain, lang=("de", "nl"), dev_fraction=0.4)
    german, held = reader.read("de")[0], set(reader.read("nl")[1].sources)
    english = {row["pairID"]: row["sentence2"] for row in read_jsonl(plain / "snli_ve_train.jsonl")}
    rows = read_jsonl(plain / "snli_ve_train.de.jsonl")
    expected = [row["sentence2"] for row in rows if english[row["pairID"]] in held]
    left_out = reader.left_out["de"].target.hypotheses
    assert sorted(left_out) == sorted(expected) and "nl" not in reader.left_out
    assert len(expected) + len(german.target) == len(rows)
    _keep_sentences(plain / "snli_ve_train.de.jsonl", held)
    with pytest.raises(DataError, match=r"train\.de\.jsonl: nothing is left to train on"):
        _texts(plain, allow_leak=True)


def test_a_sentence_held_out_for_one_language_is_trained_on_in_none(plain):
    every = set(read_split(plain, "train").hypotheses)
    # Dutch has fewer sentences, so the two it holds out need not be those German would.
    for missing in every:
        shutil.copy(plain / "snli_ve_train.nl.jsonl", plain / "whole.jsonl")
        _keep_sentences(plain / "snli_ve_train.nl.jsonl", every - {missing})
        notes = Notes()
        (german, german_dev), (dutch, dutch_dev) = _texts(plain, notes).values()
        held = set(dutch_dev.sources)
        assert len(held) == 2 and not held & {*german.sources, *dutch.sources}
        assert set(german.sources) == every - held
        num_skipped = f"snli_ve_train.de.jsonl: {24 - len(german.sources)} pairs skipped, because"
        assert f"{num_skipped} their photos or en sentences are held out for" in notes.text
        # The file German has stays whole, though its sentences are in the training file as well.
        assert len(german_dev.sources) == len(read_jsonl(plain / "snli_ve_dev.de.jsonl"))
        as_auxiliary = _texts(plain, lang=("de",), auxiliary=("nl",))
        assert as_auxiliary["de"][0].target.pair_ids == german.target.pair_ids
        (plain / "whole.jsonl").rename(plain / "snli_ve_train.nl.jsonl")


def test_languages_without_dev_files_spare_what_the_others_hold_out(plain):
    (plain / "snli_ve_dev.de.jsonl").unlink()
    every = set(read_split(plain, "train").hypotheses)
    (held,) = ({*dev.sources} for _, dev in _texts(plain, lang=("de",)).values())
    # Dutch lacks one of the two sentences that German holds out, and holds out another.
    _keep_sentences(plain / "snli_ve_train.nl.jsonl", every - {min(held)})
    (german, german_dev), (dutch, dutch_dev) = _texts(plain).values()
    both = {*german_dev.sources, *dutch_dev.sources}
    assert set(german_dev.sources) == held and len(both) == 3
    assert set(german.sources) == every - both == set(dutch.sources)


def test_held_out_sentences_are_not_trained_on_as_english(
    plain, tmp_path, trained, encoder, monkeypatch
):
    taken, add = [], corpus.Corpus.add_source
    monkeypatch.setattr(
        corpus.Corpus, "add_source", lambda *a: taken.append(set(a[0].sources)) or add(*a)
    )
    result = quick_align(
        plain, tmp_path, trained, encoder, "de", "nl", include_english=True, dev_fraction=0.4,
        limit=3,
    )  # fmt: skip
    held = set(_texts(plain)["nl"][1].sources)
    assert taken == [set(read_split(plain, "train").hypotheses) - held]
    assert result.training.pairs == 9  # the limit counts what is left
    config = AlignConfig(
        data=str(plain), lang=("de", "nl"), dev_fraction=0.4, teacher=trained / "clip-ve"
    )
    assert alignment.count_sentences(config) == {"de": 3, "nl": 3}
    assert alignment.count_sentences(dataclasses.replace(config, lang=("de",))) == {"de": 5}


def test_too_little_text_to_hold_out(plain, tmp_path, trained, encoder):
    (plain / "snli_ve_dev.de.jsonl").unlink()
    for path in (plain / "snli_ve_train.de.jsonl", plain / "snli_ve_train.jsonl"):
        write_jsonl(path, [row | {"sentence2": "Same."} for row in read_jsonl(path)])
    with pytest.raises(DataError, match="too few to hold out"):
        quick_align(plain, tmp_path, trained, encoder, "de")


def test_the_epoch_in_which_each_language_has_nearly_its_last_recall():
    history = [(0.1, 0.5), (0.94, 0.6), (0.96, 0.2), (1.0, 0.4)]
    names = ("recall_at_10", "recall_at_10/de", "recall_at_10/ja")
    epochs = [dict(zip(names, (0.0, *recalls), strict=True)) for recalls in history]
    assert epochs_to_95(epochs) == {"de": 3, "ja": 1}
    assert epochs_to_95([{"recall_at_10": 0.5, "mse": 0.1}]) == {}
