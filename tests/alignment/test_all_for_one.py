"""`align --init-from`: starting from a student of another language, and the translator."""

import re

import numpy as np
import pytest
import torch
from tiny_world import (
    ENCODER_SHAPE,
    killed_at_step,
    metrics_of,
    quick_align,
    reseal,
    sentences,
    tree,
    weights,
)
from torch.nn import functional

from clseave_cli.core.alignment import transfer
from clseave_cli.core.alignment.links import Links
from clseave_cli.core.data.seen import SeenRows
from clseave_cli.core.models.clip_ve import fingerprint
from clseave_cli.core.models.scratch import new_encoder
from clseave_cli.core.models.student import init_student, load_student, new_student
from clseave_cli.errors import DataError, ModelError, UsageError


def _begun(world, tmp_path, trained, encoder, start="align-de", **options):
    options = {"epochs": 4, "batch_size": 2, "init_from": trained / start} | options
    return quick_align(world, tmp_path, trained, encoder, "nl", **options)


def _table(student):
    return student.backbone.get_input_embeddings().weight.detach()


def _body(student):
    """All weights but the word vectors."""
    words = student.backbone.get_input_embeddings().weight
    return {name: w.detach() for name, w in student.named_parameters() if w is not words}


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(w, b[name]) for name, w in a.items())


# --- all for one ---


@pytest.mark.parametrize("keep_words", [False, True])
def test_a_student_starts_from_the_weights_of_another(
    world, tmp_path, trained, encoder, keep_words
):
    options = {"teacher": fingerprint(trained / "clip-ve"), "keep_words": keep_words}
    student, vectors = init_student(trained / "align-de", encoder, **options)
    german, pretrained = load_student(trained / "align-de"), new_student(encoder, 16)
    assert _equal(_body(student), _body(german)) and torch.equal(vectors, _table(german))
    assert not torch.equal(_table(german), _table(pretrained))
    assert torch.equal(_table(student), _table(german if keep_words else pretrained))
    assert all(parameter.requires_grad for parameter in student.parameters())
    # Of a trimmed one the same: the rest of its vectors are the pretrained encoder's.
    short = quick_align(world, tmp_path, trained, encoder, "de", epochs=2, trim_vocabulary=True)
    assert len(_table(load_student(short.folder))) < len(vectors)
    again, its_vectors = init_student(short.folder, encoder, **options)
    assert again.digest() == student.digest() and torch.equal(its_vectors, vectors)


def test_all_of_it_is_trained(world, tmp_path, trained, encoder):
    result = _begun(world, tmp_path, trained, encoder, trim_vocabulary=True, keep="last")
    made, german = load_student(result.folder), load_student(trained / "align-de")
    assert result.languages == ("nl",) and made.trimmed is not None
    assert made.pretrained == german.pretrained != ""
    moved = [not torch.equal(w, _body(german)[name]) for name, w in _body(made).items()]
    assert np.mean(moved) > 0.9
    # Its photos and pairs are those of the student it starts from, too.
    before, seen = SeenRows.read(trained / "align-de"), SeenRows.read(result.folder)
    assert len(before.pairs) and np.isin(before.pairs, seen.pairs).all()


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "of an earlier version"])
def test_a_student_of_another_encoder_is_refused(tmp_path, world, runs, encoder, known):
    folder, shape = runs / "align-de", ENCODER_SHAPE if known else ENCODER_SHAPE | {"width": 16}
    new_encoder(tmp_path / "other", sentences(world), **shape, seed=5)
    if not known:
        reseal(folder, "student", without=("pretrained",))
        assert load_student(folder).pretrained == ""
    options = {"teacher": fingerprint(runs / "clip-ve"), "keep_words": False}
    init_student(folder, encoder, **options)
    with pytest.raises(ModelError, match=r"was trained from another encoder than .*other"):
        init_student(folder, tmp_path / "other", **options)
    with pytest.raises(ModelError, match="was trained against another CLIP-VE"):
        init_student(folder, encoder, teacher="0" * 64, keep_words=False)


# --- the translator ---


@pytest.mark.parametrize("translator", ["random", "lexicon"])
def test_the_translator_is_trained_alone_at_first_and_folded_in(
    world, tmp_path, trained, encoder, translator
):
    options = {"translator": translator, "translator_epochs": 2, "epochs": 2}
    result = _begun(world, tmp_path, trained, encoder, **options)
    made, german = load_student(result.folder), load_student(trained / "align-de")
    assert _equal(_body(made), _body(german))
    before, after = _table(new_student(encoder, 16)).double(), _table(made).double()
    matrix = torch.linalg.lstsq(before, after).solution
    torch.testing.assert_close(before @ matrix, after, rtol=0, atol=1e-5)
    assert not torch.allclose(matrix, torch.eye(len(matrix), dtype=torch.float64), atol=0.1)
    # The dev metrics are those of the student before the matrix was folded in.
    again = _begun(
        world, tmp_path / "again", tmp_path, encoder, start="align-nl", keep_embeddings=True,
        teacher=trained / "clip-ve", epochs=1, learning_rate=0.0,
    )  # fmt: skip
    assert again.training.dev == pytest.approx(result.training.dev, rel=1e-4)


def test_a_run_killed_with_its_translator_half_trained_resumes_to_the_bit(
    world, tmp_path, trained, encoder
):
    def run(name, **options):
        options |= {"translator": "lexicon", "translator_epochs": 2}
        return _begun(world, tmp_path / name, trained, encoder, **options)

    whole = run("whole")
    for step in (3, 9):  # in the second and the third epoch
        with killed_at_step(step):
            run(f"killed at {step}", checkpoint_minutes=0)
        parts = run(f"killed at {step}", resume=True)
        assert metrics_of(parts.folder / "training") == metrics_of(whole.folder / "training")
        assert weights(parts.folder) == weights(whole.folder)


def test_procrustes_finds_a_rotation():
    torch.manual_seed(0)
    x = torch.randn(40, 12, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    torch.testing.assert_close(transfer.procrustes(x, x @ rotation.T), rotation)


def test_rcsls_by_hand():
    """Joulin et al. 2018, equation 4, one term after another."""
    torch.manual_seed(1)
    x, y = (functional.normalize(torch.randn(15, 6, dtype=torch.float64), dim=1) for _ in range(2))
    matrix = torch.randn(6, 6, dtype=torch.float64)
    terms = []
    for i in range(15):
        of_x = sorted(((matrix @ x[i]) @ y[j] for j in range(15)), reverse=True)[:10]
        of_y = sorted(((matrix @ x[j]) @ y[i] for j in range(15)), reverse=True)[:10]
        terms.append(-2 * (matrix @ x[i]) @ y[i] + sum(of_x) / 10 + sum(of_y) / 10)
    loss = transfer.rcsls_loss(x, y, matrix)
    torch.testing.assert_close(loss, sum(terms) / 15)
    initial = transfer.procrustes(x, y)
    refined = transfer.rcsls(x, y, initial)
    assert transfer.rcsls_loss(x, y, refined) < transfer.rcsls_loss(x, y, initial) - 0.01
    assert torch.linalg.matrix_norm(refined, ord=2) <= 1 + 1e-9


class _WordForWord:
    """An aligner that links the n-th words of both sentences."""

    digest = "x"

    def align(self, source, target, pairs, **_):
        lengths = np.minimum(source.counts[pairs[0]], target.counts[pairs[1]])
        word = np.concatenate([np.arange(length) for length in lengths])
        pair = np.repeat(np.arange(pairs.shape[1]), lengths)
        return Links.of(pair, np.stack([word, word], axis=1), pairs.shape[1])


def test_a_lexicon_is_what_is_linked_most_often_and_moves_words_to_their_translations(
    world, tmp_path, trained, encoder, monkeypatch
):
    made, kept = [], transfer.Lexicon
    monkeypatch.setattr(transfer, "load_aligner", lambda *_: _WordForWord())
    monkeypatch.setattr(transfer, "Lexicon", lambda *a: made.append(kept(*a)) or made[-1])
    _begun(world, tmp_path, trained, encoder, translator="lexicon", epochs=1)
    (lexicon,) = made
    decode = lexicon.student.tokenizer.decode
    pairs = {tuple(map(decode, pair)) for pair in lexicon.pairs()}
    words = {("Quadrat", "vierkant"), ("rot.", "rood."), ("Hund.", "hond."), ("ein", "een")}
    assert words <= pairs
    assert ("[SEP]", "[SEP]") in pairs and len(pairs) == 13
    sources, targets = zip(*lexicon.pairs(), strict=True)
    lexicon.student = new_student(encoder, 16)  # as it was before training
    x = transfer._vectors(_table(lexicon.student), targets)
    y = transfer._vectors(lexicon.vectors, sources)
    moved = x @ lexicon.matrix().double().T
    assert ((moved @ y.T).argmax(dim=1) == torch.arange(len(y))).all()
    assert ((x @ y.T).argmax(dim=1) == torch.arange(len(y))).float().mean() < 0.5
    # A file of the same pairs gives the same words.
    file = tmp_path / "lexicon.tsv"
    file.write_text("Quadrat\tvierkant\nrot. rood.\nQuadrat het\n")
    read = kept(lexicon.student, lexicon.vectors, ("de",), lexicon.config, lexicon.progress)
    read.read(file)
    of_file = {tuple(map(decode, pair)) for pair in read.pairs()}
    assert of_file < pairs and len(of_file) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep-embeddings", "--keep-embeddings: needs --init-from DIR"),
        ("--translator random", "--translator: needs --init-from DIR"),
        ("--translator-epochs 1 --init-from", "--translator-epochs: needs --translator"),
        ("--lexicon x --translator random --init-from", "--lexicon: needs --trans"),
        ("--method token --init-from", "--init-from: needs --method sentence"),
        ("--keep-embeddings --trim-vocabulary --init-from", "--trim-vocabulary: the wo"),
        ("--translator random --translator-epochs 3 --epochs 2 --init-from",
         "--translator-epochs 3: more than --epochs 2"),
        ("--pooling mean --init-from", "--pooling mean: .* was trained with terminal"),
        ("--lang de --init-from", "--init-from"),  # would replace the student it starts from
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(world, trained, encoder, refused, options, message):
    before = tree(trained)
    start = [trained / "align-de"] if options.endswith("--init-from") else []
    lang = [] if "--lang" in options else ["--lang", "nl"]
    line = refused(
        "align", "--data", world, "--runs", trained, "--student", encoder, "--device", "cpu",
        *lang, *options.split(), *start, code=2,
    )  # fmt: skip
    assert re.search(message, line) and tree(trained) == before


@pytest.mark.parametrize(
    ("lexicon", "message"),
    [
        ("rot rood\nein een x\n", r"lexicon.txt:2: 'ein een x' is no word pair"),
        ("", "no words are linked"),
        (None, r"has no training text in de, which .* reads; add --lex"),
    ],
)
def test_lexicons_that_are_none(data, tmp_path, trained, encoder, lexicon, message):
    file = tmp_path / "lexicon.txt"
    file.write_text(lexicon or "")
    if lexicon is None:
        (data / "snli_ve_train.de.jsonl").unlink()
    options = {"translator": "lexicon", "lexicon": None if lexicon is None else file}
    with pytest.raises((DataError, UsageError), match=message):
        _begun(data, tmp_path / "runs", trained, encoder, **options)
