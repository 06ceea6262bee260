"""finetune-ve, align, evaluate and predict on a tiny world, against independent numbers."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_world import (
    CAPTION,
    QUICK,
    Notes,
    edit_row,
    enlarge_weights,
    quick_align,
    read_jsonl,
    tree,
    write_jsonl,
)

from clseave_cli import VisualEntailment
from clseave_cli.core import alignment, finetuning
from clseave_cli.core.alignment import corpus
from clseave_cli.core.alignment.dev import CollapseWatch
from clseave_cli.core.config import AlignConfig, EvaluateConfig, FinetuneConfig
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models import tokens
from clseave_cli.core.models.calibration import read_calibrations
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.student import load_student
from clseave_cli.core.prediction import predictor as prediction
from clseave_cli.core.prediction.torch_model import TorchModel
from clseave_cli.errors import DataError, ModelError, TrainingError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT


def _finetune(data, runs, clip, progress=SILENT, **options):
    defaults = {"epochs": 1, **QUICK}
    config = FinetuneConfig(data=str(data), runs=runs, clip=str(clip), **(defaults | options))
    return finetune(config, progress)


@pytest.fixture
def aligned(trained, encoder):
    """`align`, against the trained teacher and, unless other languages are given, to German."""

    def run(data, runs, *languages, **options):
        return quick_align(data, runs, trained, encoder, *(languages or ("de",)), **options)

    return run


# --- finetune-ve ---


def test_fine_tuning_learns_a_tiny_world_by_heart(data, tmp_path, clip):
    # The dev rows are the training rows. Whoever does not look gets two thirds of them at most.
    for lang in ("", ".de", ".nl"):
        train, dev = (data / f"snli_ve_{split}{lang}.jsonl" for split in ("train", "dev"))
        dev.write_text(train.read_text())
    result = _finetune(
        data, tmp_path / "runs", clip, epochs=60, batch_size=24, learning_rate=1e-3,
        allow_leak=True, patience=None, select="accuracy",
    )  # fmt: skip
    assert result.training.dev["accuracy"] > 0.85


def test_the_image_tower_is_the_one_it_started_from(world, tmp_path, clip):
    before = ClipVE.from_clip(clip)
    folder = _finetune(world, tmp_path, clip, epochs=2).folder
    after = ClipVE.from_folder(folder)
    assert module_digest(after.image) == module_digest(before.image)
    assert after.image.digest() == before.image.digest()
    assert module_digest(after.text) != module_digest(before.text)
    for parameter_before, parameter_after in zip(
        before.text.parameters(), after.text.parameters(), strict=True
    ):
        if parameter_before.ndim > 1 and len(parameter_before) != len(before.text.tokenizer):
            assert not torch.equal(parameter_before, parameter_after)


def test_only_the_head_learns_while_the_text_tower_is_frozen(world, tmp_path, clip):
    digests = [
        [
            module_digest(part)
            for model in [
                ClipVE.from_folder(_finetune(world, tmp_path / name, clip, **more).folder)
            ]
            for part in (model.text, model.head)
        ]
        for name, more in (
            ("one", {"epochs": 1, "freeze_epochs": 2.0}),
            ("two", {"epochs": 2, "freeze_epochs": 2.0, "keep": "last"}),
            ("thawed", {"epochs": 2, "freeze_epochs": 1.0, "keep": "last"}),
        )
    ]
    (one, one_head), (two, two_head), (thawed, _) = digests
    assert one == two == module_digest(ClipVE.from_clip(clip).text) != thawed
    assert one_head != two_head


def test_model_cards_name_no_local_path(trained):
    for card in trained.glob("*/README.md"):
        text = card.read_text()
        assert str(trained.parent) not in text and "/tmp" not in text
        assert "base_model: " in text and "--runs runs" in text


def test_the_image_tower_stays_in_eval_mode_throughout(world, tmp_path, clip, monkeypatch):
    modes = []
    forward = ClipVE.forward

    def watch(model, hypothesis, premise):
        modes.append((model.training, model.image.training, model.image.backbone.training))
        return forward(model, hypothesis, premise)

    monkeypatch.setattr(ClipVE, "forward", watch)
    _finetune(world, tmp_path, clip, epochs=2)
    assert {mode[0] for mode in modes} == {True, False}
    assert not any(mode[1] or mode[2] for mode in modes)


def test_the_dev_figures_are_those_of_the_saved_model(world, trained):
    summary = json.loads((trained / "clip-ve" / "training" / "summary.json").read_text())
    logits, labels = _english_logits(world, trained, "dev")
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert summary["dev"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert summary["dev"]["accuracy"] == pytest.approx(
        (logits.argmax(1) == labels).float().mean().item()
    )


def _english_logits(world, runs, split):
    """Row by row, with transformers' own forward for the text and the image."""
    from PIL import Image
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
    )

    folder = runs / "clip-ve"
    head = ClipVE.from_folder(folder).head
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image").eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder / "image")
    rows = read_jsonl(world / f"snli_ve_{split}.jsonl")
    logits = []
    with torch.no_grad():
        for row in rows:
            h = text(**tokenizer(row["sentence2"], return_tensors="pt")).text_embeds
            picture = Image.open(world / "images" / row["Flickr30K_ID"]).convert("RGB")
            p = vision(**processor(images=picture, return_tensors="pt")).image_embeds
            logits.append(head(h, p)[0])
    labels = torch.tensor([LABELS.index(row["gold_label"]) for row in rows])
    return torch.stack(logits), labels


def test_captions_never_reach_a_tokenizer(world, tmp_path, clip, aligned, monkeypatch):
    read = []
    tokenize = tokens.tokenize

    def spy(tokenizer, sentences, **more):
        read.extend(sentences)
        return tokenize(tokenizer, sentences, **more)

    monkeypatch.setattr("clseave_cli.core.models.encoders.tokenize", spy)
    assert CAPTION in (world / "snli_ve_train.jsonl").read_text()
    _finetune(world, tmp_path, clip)
    aligned(world, tmp_path, teacher=tmp_path / "clip-ve")
    evaluate(EvaluateConfig(data=str(world), runs=(tmp_path,), resamples=10))
    assert "The square is red." in read and "Das Quadrat ist rot." in read
    assert not [sentence for sentence in read if CAPTION in sentence]


def test_a_finished_stage_is_not_run_again_on_resume(world, trained, clip):
    before = tree(trained / "clip-ve")
    result = _finetune(world, trained, clip, resume=True, epochs=7)
    assert result.training is None and tree(trained / "clip-ve") == before


def test_an_image_in_train_and_dev_is_refused(data, tmp_path, clip, aligned):
    edit_row(data / "snli_ve_dev.jsonl", 1, Flickr30K_ID="train0")
    edit_row(data / "snli_ve_dev.de.jsonl", 1, Flickr30K_ID="train0")
    with pytest.raises(DataError, match=r"1 of its images are also in .*--allow-leak"):
        _finetune(data, tmp_path / "runs", clip)
    assert not (tmp_path / "runs").exists()
    _finetune(data, tmp_path / "runs", clip, allow_leak=True)
    with pytest.raises(DataError, match=r"1 of its images are also in"):
        aligned(data, tmp_path / "runs")


def test_too_few_examples_for_batch_statistics(data, tmp_path, clip):
    with pytest.raises(UsageError, match=r"24 rows with --batch-size 1 .*Raise --batch-size"):
        _finetune(data, tmp_path / "runs", clip, batch_size=1)
    with pytest.raises(UsageError, match="--accumulation 4 leave parts of one example"):
        _finetune(data, tmp_path / "runs", clip, batch_size=4, accumulation=4)
    _finetune(data, tmp_path / "runs", clip, batch_size=4, accumulation=2)


def test_rows_of_one_label_are_no_training_data(data, tmp_path, clip):
    path = data / "snli_ve_train.jsonl"
    rows = [{**row, "gold_label": "neutral"} for row in read_jsonl(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"snli_ve_train.jsonl: every row is 'neutral'; expected"):
        _finetune(data, tmp_path / "runs", clip)


# --- align ---


def test_a_student_learns_its_teacher_by_heart(world, tmp_path, trained, aligned):
    result = aligned(
        world, tmp_path, epochs=120,
        learning_rate=2e-3, weight_decay=0.0, select="mse",
    )  # fmt: skip
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    errors = [record["dev"]["mse"] for record in records if "dev" in record]
    assert min(errors) == result.training.dev["mse"] < 0.2 * errors[0]
    model, student = ClipVE.from_folder(trained / "clip-ve"), load_student(result.folder)
    rows = {r["pairID"]: r["sentence2"] for r in read_jsonl(world / "snli_ve_test.jsonl")}
    german = read_jsonl(world / "snli_ve_test.de.jsonl")
    with torch.no_grad():
        student_embeddings = torch.cat(
            list(student.embed(student.tokenize([r["sentence2"] for r in german])))
        )
        wanted = model.text.tokenize([rows[r["pairID"]] for r in german])
        teacher_embeddings = torch.cat(list(model.text.embed(wanted)))
    # A constant answer would have an error of the variance.
    assert (student_embeddings - teacher_embeddings).square().mean() < 0.6 * teacher_embeddings.var(
        dim=0
    ).mean()


def test_the_teacher_is_left_as_it_is(world, tmp_path, runs, aligned, monkeypatch):
    before = tree(runs / "clip-ve")
    teachers = []
    load = ClipVE.from_folder.__func__

    def keep(cls, folder):
        teachers.append(load(cls, folder))
        return teachers[-1]

    monkeypatch.setattr(ClipVE, "from_folder", classmethod(keep))
    modes = []
    evaluate_dev = alignment.evaluate_student

    def watch(student, teacher, dev_sets, **more):
        modes.append(any(m.training for m in teacher.modules()))
        return evaluate_dev(student, teacher, dev_sets, **more)

    monkeypatch.setattr(alignment, "evaluate_student", watch)
    aligned(world, tmp_path, teacher=runs / "clip-ve", epochs=2)
    assert tree(runs / "clip-ve") == before
    (teacher,) = teachers
    assert modes == [False, False] and not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    monkeypatch.undo()
    assert module_digest(teacher) == module_digest(ClipVE.from_folder(runs / "clip-ve"))


def test_dev_accuracy_chooses_where_there_are_images(data, tmp_path, trained, aligned):
    auto = aligned(data, tmp_path / "a")
    assert set(auto.training.dev) == {
        "mse", "mae", "cosine", "recall_at_10", "variance_ratio", "accuracy",
        "temperature",
    }  # fmt: skip
    # Recomputed with the saved student, on the dev rows.
    model = VisualEntailment(TorchModel(trained, ["de"], "cpu", "fp32", auto.folder), "de")
    rows = read_jsonl(data / "snli_ve_dev.de.jsonl")
    answers = model.predict([(data / "images" / r["Flickr30K_ID"], r["sentence2"]) for r in rows])
    right = [a.label == r["gold_label"] for a, r in zip(answers, rows, strict=True)]
    assert auto.training.dev["accuracy"] == pytest.approx(np.mean(right))
    by_mse = aligned(data, tmp_path / "b", select="mse")
    assert "accuracy" not in by_mse.training.dev


def test_text_alone_is_enough(data, tmp_path, aligned):
    """No images, no labels, English only beside the translation: SICK's and OPUS's shape."""
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "dev"):
        english = {r["pairID"]: r["sentence2"] for r in read_jsonl(data / f"snli_ve_{split}.jsonl")}
        rows = [
            {
                "pairID": r["pairID"],
                "sentence2": r["sentence2"],
                "sentence2_en": english[r["pairID"]],
            }
            for r in read_jsonl(data / f"snli_ve_{split}.de.jsonl")
        ]
        write_jsonl(text / f"{split}.de.jsonl", rows)
    from_text = aligned(text, tmp_path / "a", select="mse")
    from_ve = aligned(data, tmp_path / "b", select="mse")
    for name in ("projection.safetensors", "encoder/model.safetensors"):
        assert (from_text.folder / name).read_bytes() == (from_ve.folder / name).read_bytes()
    auto = aligned(text, tmp_path / "c")
    assert "accuracy" not in auto.training.dev
    with pytest.raises(DataError, match=r"--select accuracy needs dev rows with labels and images"):
        aligned(text, tmp_path / "d", select="accuracy")


def test_without_a_dev_file_sentences_are_held_out(data, tmp_path, aligned, monkeypatch):
    (data / "snli_ve_dev.de.jsonl").unlink()
    for line in range(1, 25):  # plain text; with photos, it is photos that are held out
        edit_row(data / "snli_ve_train.de.jsonl", line, Flickr30K_ID=None)
    notes, parts = Notes(), []
    read = corpus.ParallelReader.read

    def watch(self, lang):
        parts.append(read(self, lang))
        return parts[-1]

    monkeypatch.setattr(corpus.ParallelReader, "read", watch)
    aligned(data, tmp_path, select="mse", dev_fraction=0.6, progress=notes)
    assert "no dev file for de; holding out 60% of the train sentences instead" in notes.text
    ((training, dev),) = parts
    assert not set(training.sources) & set(dev.sources)
    assert len(set(dev.sources)) == 3  # of five
    rows = read_jsonl(data / "snli_ve_train.de.jsonl")
    assert sorted(training.target.pair_ids + dev.target.pair_ids) == sorted(
        row["pairID"] for row in rows
    )
    with pytest.raises(DataError, match="too few to hold out 100%"):
        aligned(data, tmp_path / "x", dev_fraction=1.0)


def test_a_pair_counts_as_often_as_it_stands_but_never_much_at_once():
    counts = np.array([1, 3, 600, 1, 95, 2, 1, 1])
    rows = np.arange(len(counts))
    part = corpus.LanguagePairs("de", None, rows, rows, counts, weight=0.5)
    pairs, weights = part.portions()
    assert set(pairs) == set(range(len(counts)))
    assert weights.mean() == pytest.approx(0.5)
    shares = np.bincount(pairs, weights) / weights.sum()
    np.testing.assert_allclose(shares, counts / counts.sum(), err_msg="same expected gradient")
    # One of the eight pairs is divided, in two.
    assert len(pairs) == 9 and weights.max() <= 0.5 * corpus._HEAVIEST * 9 / 8
    assert np.bincount(pairs)[[0, 1, 3, 5, 6, 7]].max() == 1  # ordinary pairs are not multiplied


def test_one_student_of_several_languages(world, tmp_path, runs, aligned):
    result = aligned(world, runs, "nl", "de", "nl", out=tmp_path / "runs" / "align-nl+de")
    assert result.languages == ("nl", "de")
    assert json.loads((result.folder / "config.json").read_text())["languages"] == ["nl", "de"]
    default = aligned(world, tmp_path / "r", "nl", "de")
    assert default.folder == tmp_path / "r" / "align-nl+de"
    (tmp_path / "r" / "clip-ve").symlink_to(runs / "clip-ve")
    for lang, sentence in (("de", "Das Quadrat ist rot."), ("nl", "Het vierkant is rood.")):
        model = VisualEntailment.from_pretrained(tmp_path / "r", lang)
        answer = model(world / "images" / "test0.png", sentence)
        assert answer.lang == lang and answer.model.endswith("align-nl+de")


def test_a_repeated_pair_is_weighed_not_repeated(data, tmp_path, aligned):
    """Twice the same rows under other ids: the same student, bit for bit."""
    options = {"epochs": 3, "select": "mse"}
    once = aligned(data, tmp_path / "once", **options)
    for lang in ("", ".de"):
        path = data / f"snli_ve_train{lang}.jsonl"
        rows = read_jsonl(path)
        write_jsonl(path, rows + [row | {"pairID": row["pairID"] + "'"} for row in rows])
    twice = aligned(data, tmp_path / "twice", **options)
    for name in ("projection.safetensors", "encoder/model.safetensors"):
        assert (once.folder / name).read_bytes() == (twice.folder / name).read_bytes()
    assert once.training.pairs == twice.training.pairs == 3 * 5


def test_rows_without_a_partner_are_counted_and_named(data, tmp_path, aligned):
    edit_row(data / "snli_ve_train.de.jsonl", 3, pairID="stray")
    notes = Notes()
    aligned(data, tmp_path, progress=notes)
    assert "1 rows have no en row and 1 en rows no de row (such as stray, " in notes.text


def test_a_dev_row_without_image_does_not_borrow_another(data, tmp_path, aligned):
    path = data / "snli_ve_dev.de.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, rows[1:])
    without = aligned(data, tmp_path / "a").training.dev
    # The same dev set, plus a row that no accuracy can be measured on.
    write_jsonl(path, rows)
    edit_row(path, 1, Flickr30K_ID=None)
    notes = Notes()
    nameless = aligned(data, tmp_path / "b", progress=notes).training.dev
    assert nameless == without
    assert f"{path}: dev metrics skip 1 rows without label or image." in notes.text


def test_a_student_that_says_the_same_to_all_is_refused(world, tmp_path, aligned, monkeypatch):
    new_student = alignment.new_student

    def collapsed(*arguments):
        student = new_student(*arguments)
        torch.nn.init.zeros_(student.projection.weight)
        return student

    monkeypatch.setattr(alignment, "new_student", collapsed)
    with pytest.raises(TrainingError, match=r"de: the student gives every sentence the same embe"):
        aligned(world, tmp_path, learning_rate=0.0)


def test_a_student_may_start_without_spread_but_not_lose_it():
    watch = CollapseWatch("de")
    watch.check({"mse": 2.0, "variance_ratio": 1e-5})
    watch.check({"mse": 1.0, "variance_ratio": 0.5})
    with pytest.raises(TrainingError, match=r"^de: the student gives every sentence the same"):
        watch.check({"mse": 2.0, "variance_ratio": 1e-5})
    watch = CollapseWatch("de+nl")
    several = {"variance_ratio": 0.3, "variance_ratio/de": 0.6, "variance_ratio/nl": 1e-5}
    watch.check(several)
    with pytest.raises(TrainingError, match=r"^nl: "):
        watch.check(several, at_the_end=True)
    for at_the_end in (False, True):
        with pytest.raises(TrainingError, match=r"^de: "):
            CollapseWatch("de").check({"variance_ratio": math.nan}, at_the_end=at_the_end)


def test_a_resumed_student_may_not_lose_its_spread_either(world, tmp_path, aligned, monkeypatch):
    def evaluated(*outcomes):
        """Figures of the epochs to come; None kills the run."""
        ratios = iter(outcomes)

        def evaluate_student(*_):
            if (ratio := next(ratios)) is None:
                raise KeyboardInterrupt
            return {"mse": 1 / ratio, "variance_ratio": ratio}

        monkeypatch.setattr(alignment, "evaluate_student", evaluate_student)

    options = {"select": "mse", "epochs": 2, "checkpoint_minutes": 0}
    evaluated(0.5, None)
    with pytest.raises(KeyboardInterrupt):
        aligned(world, tmp_path, **options)
    evaluated(1e-6)
    with pytest.raises(TrainingError, match=r"^de: the student gives every sentence the same"):
        aligned(world, tmp_path, resume=True, **options)


def test_one_dev_row_has_no_spread_that_could_be_lost(data, tmp_path, aligned):
    path = data / "snli_ve_dev.de.jsonl"
    write_jsonl(path, read_jsonl(path)[:1])
    result = aligned(data, tmp_path, epochs=1)
    assert result.training.dev["variance_ratio"] == 1


def _killed_in_training(module, stage, *arguments, **options):
    """Leaves an unfinished run behind."""

    def killed(*_arguments, **_more):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(*arguments, **options)


def test_an_alignment_resumes_with_the_same_english_photos_and_aligner_only(
    data, tmp_path, aligned, encoder
):
    aligner = shutil.copytree(encoder, tmp_path / "aligner")
    options = {"method": "token", "aligner": str(aligner)}
    _killed_in_training(alignment, aligned, data, tmp_path, **options)
    _repaint(data, "train0.png")  # a photo that is not looked at may change
    _killed_in_training(alignment, aligned, data, tmp_path, resume=True, **options)

    def refused(message):
        with pytest.raises(UsageError, match=message):
            aligned(data, tmp_path, resume=True, **options)

    english = data / "snli_ve_train.jsonl"
    rows = read_jsonl(english)
    edit_row(english, 1, sentence2="The square is black.")
    refused("resume with the same options and data")
    write_jsonl(english, rows)
    photo = data / "images" / "dev0.png"
    shown = photo.read_bytes()
    _repaint(data, "dev0.png")
    refused("was run with photos: dev of de = ")
    photo.write_bytes(shown)
    enlarge_weights(aligner, 2.0)
    refused("was run with aligner = ")


def _repaint(data, name):
    Image.new("RGB", (32, 32), "purple").save(data / "images" / name)


def test_fine_tuning_resumes_with_the_same_towers_and_photos_only(data, tmp_path, clip):
    clip = shutil.copytree(clip, tmp_path / "clip")
    run = data, tmp_path / "runs", clip
    _killed_in_training(finetuning, _finetune, *run)
    weights = load_file(clip / "model.safetensors")
    changed = dict(weights)
    changed["visual_projection.weight"] = 2 * weights["visual_projection.weight"]
    save_file(changed, clip / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"was run with clip = .*; resume with the same"):
        _finetune(*run, resume=True)
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    for split in ("dev", "train"):
        _repaint(data, f"{split}0.png")
        with pytest.raises(UsageError, match=f"was run with photos: {split} = "):
            _finetune(*run, resume=True)


# --- evaluate and predict ---


def test_the_figures_of_evaluate_are_those_of_predict(world, trained):
    config = EvaluateConfig(
        data=str(world), runs=(trained,), resamples=50, device="cpu", precision="fp32"
    )
    document = evaluate(config)
    assert [result.lang for result in document.results] == ["en", "de", "nl"]
    right = {}
    for result in document.results:
        suffix = "" if result.lang == "en" else f".{result.lang}"
        rows = read_jsonl(world / f"snli_ve_test{suffix}.jsonl")
        model = VisualEntailment.from_pretrained(trained, result.lang, "cpu", "fp32")
        answers = model.predict(
            [(world / "images" / row["Flickr30K_ID"], row["sentence2"]) for row in rows]
        )
        confusion = np.zeros((3, 3), dtype=int)
        losses = []
        right[result.lang] = {}
        for row, answer in zip(rows, answers, strict=True):
            gold, guess = LABELS.index(row["gold_label"]), LABELS.index(answer.label)
            confusion[gold, guess] += 1
            losses.append(-math.log(answer.probabilities[row["gold_label"]]))
            right[result.lang][row["pairID"]] = (answer.label, gold == guess)
        assert result.num_examples == len(rows) == 12 and result.num_images == 4
        assert [list(row) for row in result.confusion] == confusion.tolist()
        assert result.accuracy == pytest.approx(confusion.trace() / len(rows))
        assert result.loss == pytest.approx(np.mean(losses), rel=1e-3)
        f1 = [
            2 * confusion[c, c] / max(1, confusion[c].sum() + confusion[:, c].sum())
            for c in range(3)
        ]
        assert result.macro_f1 == pytest.approx(np.mean(f1))
        same = [right["en"][p][0] == label for p, (label, _) in right[result.lang].items()]
        assert result.agreement_with_english == pytest.approx(np.mean(same))
        english = np.mean([hit for _, hit in right["en"].values()])
        if english:
            assert result.ratio_to_english == pytest.approx(result.accuracy / english)
        assert document.baselines[result.lang].majority == pytest.approx(1 / 3)


def test_the_results_can_be_traced(world, trained):
    document = evaluate(
        EvaluateConfig(data=str(world), runs=(trained,), lang=("de",), resamples=10)
    )
    signature = document.signature
    config = json.loads((trained / "align-de" / "config.json").read_text())
    assert signature.checkpoints["align-de"] == config["fingerprint"]
    assert signature.checkpoints["clip-ve"] == config["teacher"]
    split = read_split(world, "test", "de")
    assert signature.data["snli_ve_test.de.jsonl"] == split.digest
    assert (signature.seed, signature.num_examples) == (0, 12)


def test_languages_without_a_student_are_told_not_dropped(data, trained):
    rows = read_jsonl(data / "snli_ve_test.jsonl")
    write_jsonl(data / "snli_ve_test.ja.jsonl", rows)
    notes = Notes()
    document = evaluate(EvaluateConfig(data=str(data), runs=(trained,), resamples=10), notes)
    assert [result.lang for result in document.results] == ["en", "de", "nl"]
    assert "no student for ja; `clseave align --lang ja` makes one" in notes.text
    with pytest.raises(ModelError, match=r"no student for ja \(there are models for en, de, nl\)"):
        evaluate(EvaluateConfig(data=str(data), runs=(trained,), lang=("ja",)))


def test_a_prediction_is_what_transformers_gives(world, trained):
    logits, _ = _english_logits(world, trained, "test")
    model = VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")
    row = read_jsonl(world / "snli_ve_test.jsonl")[4]
    answer = model(world / "images" / row["Flickr30K_ID"], row["sentence2"])
    calibrated = logits[4] / read_calibrations(trained / "clip-ve")["en"].temperature
    assert list(answer.probabilities.values()) == pytest.approx(
        calibrated.softmax(0).tolist(), rel=1e-3
    )
    assert list(answer.probabilities) == list(LABELS) and not answer.truncated
    assert answer.label == max(answer.probabilities, key=answer.probabilities.get)
    assert answer.model == str(trained / "clip-ve")


def test_many_predictions_keep_their_order_and_their_errors(world, trained):
    model = VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")
    images = world / "images"
    pairs = [
        (images / "test0.png", "The square is red."),
        (images / "nowhere.png", "The square is red."),
        (images / "test1.png", "  "),
        (images / "test1.png", "half \ud83d pair"),
        (images / "test0.png", "red " * 10_000),
        (str(images / "test1.png"), "A dog waits outside."),
    ]
    answers = model.predict(pairs)
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["Prediction", *["DataError"] * 3, "Prediction", "Prediction"]
    assert "nowhere.png: no such image" in str(answers[1])
    assert "hypothesis is empty" in str(answers[2]) and "not valid Unicode" in str(answers[3])
    assert [getattr(answer, "truncated", None) for answer in answers][-2:] == [True, False]
    for number in (0, 5):
        alone = model(*pairs[number])
        assert alone.probabilities == pytest.approx(answers[number].probabilities, rel=1e-4)
    with pytest.raises(DataError, match="hypothesis is empty"):
        model(images / "test0.png", "")


def test_an_image_used_often_is_encoded_once_and_few_are_kept(world, trained, monkeypatch):
    model = VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")
    opened = []
    open_image = prediction.open_image
    monkeypatch.setattr(
        prediction, "open_image", lambda path, name: opened.append(path.name) or open_image(path)
    )
    monkeypatch.setattr(prediction, "_KEPT_BYTES", 2 * 16 * 4)
    names = ["test0.png", "test1.png", "test0.png", "test2.png", "test0.png"]
    many = model.predict([(world / "images" / name, "The square is red.") for name in names])
    assert opened == ["test0.png", "test1.png", "test2.png"]
    one = model(world / "images" / "test2.png", "The square is red.")
    assert len(opened) == 3  # still known
    assert one.probabilities == pytest.approx(many[3].probabilities, rel=1e-5)
    model(world / "images" / "test0.png", "The square is red.")
    assert len(opened) == 4  # forgotten


def test_a_training_that_learns_nothing_says_what_to_try(world, tmp_path, clip):
    notes = Notes()
    _finetune(world, tmp_path, clip, learning_rate=0.0, progress=notes)
    assert "no better than always saying entailment (33.3%)" in notes.text
    assert "larger learning rate than 0: try --learning-rate 1e-4 or 1e-3" in notes.text


def test_options_from_python_may_be_paths_texts_and_lists(world, tmp_path):
    config = AlignConfig(data=world, runs=str(tmp_path), lang=["de", "nl"], student=tmp_path)
    assert (config.data, config.student) == (str(world), str(tmp_path))
    assert (config.runs, config.lang) == (tmp_path, ("de", "nl"))
    assert AlignConfig(lang="de").lang == ("de",)
