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
    Notes,
    edit_row,
    enlarge_weights,
    interrupted_at,
    labelled_pairs,
    quick_align,
    quick_finetune,
    read_jsonl,
    record,
    tree,
    weights,
    write_jsonl,
)

from clseave_cli import VisualEntailment
from clseave_cli.core import alignment, finetuning
from clseave_cli.core.alignment import corpus
from clseave_cli.core.alignment.dev import CollapseWatch
from clseave_cli.core.config import AlignConfig, EvaluateConfig
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.models import encoders
from clseave_cli.core.models.calibration import read_calibrations
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.student import load_student
from clseave_cli.core.prediction import predictor as prediction
from clseave_cli.core.prediction.torch_model import TorchModel
from clseave_cli.errors import DataError, ModelError, TrainingError, UsageError
from clseave_cli.labels import LABELS


def _finetune(data, runs, clip, **options):
    return quick_finetune(data, runs, clip, **({"epochs": 1} | options))


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


def test_the_image_tower_is_in_eval_mode_and_stays_as_it_is(world, tmp_path, clip, monkeypatch):
    def modes_of(model, *_):
        return model.training, model.image.training or model.image.backbone.training

    modes = record(monkeypatch, ClipVE, "forward", modes_of)
    before = ClipVE.from_clip(clip)
    after = ClipVE.from_folder(_finetune(world, tmp_path, clip, epochs=2).folder)
    assert set(modes) == {(True, False), (False, False)}
    assert module_digest(after.image) == module_digest(before.image)
    assert after.image.digest() == before.image.digest()
    assert module_digest(after.text) != module_digest(before.text)
    for old, new in zip(before.text.parameters(), after.text.parameters(), strict=True):
        if old.ndim > 1 and len(old) != len(before.text.tokenizer):
            assert not torch.equal(old, new)


def test_only_the_head_learns_while_the_text_tower_is_frozen(world, tmp_path, clip):
    models = []
    for epochs, frozen in ((1, 2.0), (2, 2.0), (2, 1.0)):
        options = {"epochs": epochs, "freeze_epochs": frozen, "keep": "last"}
        result = _finetune(world, tmp_path / f"{epochs}-{frozen}", clip, **options)
        models.append(ClipVE.from_folder(result.folder))
    one, two, thawed = (module_digest(model.text) for model in models)
    assert one == two == module_digest(ClipVE.from_clip(clip).text) != thawed
    assert module_digest(models[0].head) != module_digest(models[1].head)


def test_model_cards_name_no_local_path(trained):
    for text in (card.read_text() for card in trained.glob("*/README.md")):
        assert str(trained.parent) not in text and "/tmp" not in text
        assert "base_model: " in text and "--runs runs" in text


def test_dev_metrics_and_predictions_are_those_of_the_saved_model_in_transformers(world, trained):
    summary = json.loads((trained / "clip-ve" / "training" / "summary.json").read_text())
    logits, labels = _english_logits(world, trained, "dev")
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert summary["dev"]["loss"] == pytest.approx(loss, rel=1e-4)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert summary["dev"]["accuracy"] == pytest.approx(accuracy)

    pairs, _ = labelled_pairs(world)
    answer = VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")(*pairs[4])
    logits, _ = _english_logits(world, trained, "test")
    calibrated = logits[4] / read_calibrations(trained / "clip-ve")["en"].temperature
    expected = calibrated.softmax(0).tolist()
    assert list(answer.probabilities.values()) == pytest.approx(expected, rel=1e-3)
    assert list(answer.probabilities) == list(LABELS) and not answer.truncated
    assert answer.label == max(answer.probabilities, key=answer.probabilities.get)
    assert answer.model == str(trained / "clip-ve")


def _english_logits(world, runs, split):
    """Row by row, with transformers' own forward for the text and the image."""
    import transformers

    folder = runs / "clip-ve"
    head = ClipVE.from_folder(folder).head
    text = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text")
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "image").eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder / "image")
    logits = []
    pairs, labels = labelled_pairs(world, split=split)
    with torch.no_grad():
        for image, sentence in pairs:
            h = text(**tokenizer(sentence, return_tensors="pt")).text_embeds
            picture = Image.open(image).convert("RGB")
            p = vision(**processor(images=picture, return_tensors="pt")).image_embeds
            logits.append(head(h, p)[0])
    return torch.stack(logits), torch.tensor([LABELS.index(label) for label in labels])


def test_captions_never_reach_a_tokenizer(world, tmp_path, clip, aligned, monkeypatch):
    batches = record(monkeypatch, encoders, "tokenize", lambda _, sentences, **more: [*sentences])
    assert CAPTION in (world / "snli_ve_train.jsonl").read_text()
    _finetune(world, tmp_path, clip)
    aligned(world, tmp_path, teacher=tmp_path / "clip-ve")
    evaluate(EvaluateConfig(data=str(world), runs=(tmp_path,), resamples=10))
    read = [sentence for batch in batches for sentence in batch]
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


def test_training_data_without_batch_statistics_or_of_one_label_is_refused(data, tmp_path, clip):
    with pytest.raises(UsageError, match=r"24 rows with --batch-size 1 .*Raise --batch-size"):
        _finetune(data, tmp_path / "runs", clip, batch_size=1)
    with pytest.raises(UsageError, match="--accumulation 4 leave parts of one example"):
        _finetune(data, tmp_path / "runs", clip, batch_size=4, accumulation=4)
    _finetune(data, tmp_path / "runs", clip, batch_size=4, accumulation=2)
    path = data / "snli_ve_train.jsonl"
    write_jsonl(path, [row | {"gold_label": "neutral"} for row in read_jsonl(path)])
    with pytest.raises(DataError, match=r"snli_ve_train.jsonl: every row is 'neutral'; expected"):
        _finetune(data, tmp_path / "runs", clip)


# --- align ---


def test_a_student_learns_its_teacher_by_heart(world, tmp_path, trained, aligned):
    result = aligned(world, tmp_path, epochs=120, weight_decay=0.0, select="mse")
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    errors = [record["dev"]["mse"] for record in records if "dev" in record]
    assert min(errors) == result.training.dev["mse"] < 0.2 * errors[0]
    model, student = ClipVE.from_folder(trained / "clip-ve"), load_student(result.folder)
    rows = {r["pairID"]: r["sentence2"] for r in read_jsonl(world / "snli_ve_test.jsonl")}
    german = read_jsonl(world / "snli_ve_test.de.jsonl")
    with torch.no_grad():
        tokens_of_student = student.tokenize([r["sentence2"] for r in german])
        embeddings = torch.cat(list(student.embed(tokens_of_student)))
        tokens_of_teacher = model.text.tokenize([rows[r["pairID"]] for r in german])
        expected = torch.cat(list(model.text.embed(tokens_of_teacher)))
    # A constant answer would have an error of the variance.
    assert (embeddings - expected).square().mean() < 0.6 * expected.var(dim=0).mean()


def test_the_teacher_is_left_as_it_is(world, tmp_path, runs, aligned, monkeypatch):
    before = tree(runs / "clip-ve")
    records = record(
        monkeypatch, alignment, "evaluate_student",
        lambda _, teacher, *rest: (teacher, any(m.training for m in teacher.modules())),
    )  # fmt: skip
    aligned(world, tmp_path, teacher=runs / "clip-ve", epochs=2)
    assert tree(runs / "clip-ve") == before
    (teacher, *others), modes = zip(*records, strict=True)
    assert others == [teacher]
    assert modes == (False, False) and not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert module_digest(teacher) == module_digest(ClipVE.from_folder(runs / "clip-ve"))


def test_dev_accuracy_chooses_where_there_are_images(data, tmp_path, trained, aligned):
    auto = aligned(data, tmp_path / "a")
    names = "mse mae cosine recall_at_10 variance_ratio accuracy temperature"
    assert set(auto.training.dev) == set(names.split())
    # Recomputed with the saved student, on the dev rows.
    model = VisualEntailment(TorchModel(trained, ["de"], "cpu", "fp32", auto.folder), "de")
    pairs, labels = labelled_pairs(data, "de", "dev")
    is_right = [a.label == label for a, label in zip(model.predict(pairs), labels, strict=True)]
    assert auto.training.dev["accuracy"] == pytest.approx(np.mean(is_right))
    by_mse = aligned(data, tmp_path / "b", select="mse")
    assert "accuracy" not in by_mse.training.dev


def test_text_alone_is_enough(data, tmp_path, aligned):
    """No images, no labels, English only beside the translation: SICK's and OPUS's shape."""
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "dev"):
        english = {r["pairID"]: r["sentence2"] for r in read_jsonl(data / f"snli_ve_{split}.jsonl")}
        rows = read_jsonl(data / f"snli_ve_{split}.de.jsonl")
        kept_columns = [{key: row[key] for key in ("pairID", "sentence2")} for row in rows]
        for row in kept_columns:
            row["sentence2_en"] = english[row["pairID"]]
        write_jsonl(text / f"{split}.de.jsonl", kept_columns)
    from_text = aligned(text, tmp_path / "a", select="mse")
    from_ve = aligned(data, tmp_path / "b", select="mse")
    for name in ("projection.safetensors", "encoder/model.safetensors"):
        assert weights(from_text.folder)[name] == weights(from_ve.folder)[name]
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
    pair_ids = [row["pairID"] for row in read_jsonl(data / "snli_ve_train.de.jsonl")]
    assert sorted(training.target.pair_ids + dev.target.pair_ids) == sorted(pair_ids)
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
    assert weights(once.folder) == weights(twice.folder)
    assert once.training.pairs == twice.training.pairs == 3 * 5


def test_rows_without_a_partner_or_an_image_are_skipped_and_counted(data, tmp_path, aligned):
    edit_row(data / "snli_ve_train.de.jsonl", 3, pairID="stray")
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
    assert "1 rows have no en row and 1 en rows no de row (such as stray, " in notes.text
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
    with interrupted_at(module, "train", 1):
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
    path = clip / "model.safetensors"
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["visual_projection.weight"] *= 2
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UsageError, match=r"was run with clip = .*; resume with the same"):
        _finetune(*run, resume=True)
    path.write_bytes(original)
    for split in ("dev", "train"):
        _repaint(data, f"{split}0.png")
        with pytest.raises(UsageError, match=f"was run with photos: {split} = "):
            _finetune(*run, resume=True)


# --- evaluate and predict ---


def test_the_metrics_of_evaluate_are_those_of_predict_and_can_be_traced(world, trained):
    options = {"resamples": 50, "device": "cpu", "precision": "fp32"}
    document = evaluate(EvaluateConfig(data=str(world), runs=(trained,), **options))
    assert [result.lang for result in document.results] == ["en", "de", "nl"]
    english = None
    for result in document.results:
        pairs, labels = labelled_pairs(world, result.lang)
        if result.lang == "de":  # its file is in reverse order
            pairs, labels = pairs[::-1], labels[::-1]
        model = VisualEntailment.from_pretrained(trained, result.lang, "cpu", "fp32")
        answers = model.predict(pairs)
        guesses = [answer.label for answer in answers]
        losses = [-math.log(a.probabilities[gold]) for a, gold in zip(answers, labels, strict=True)]
        confusion = np.zeros((3, 3), dtype=int)
        for gold, guess in zip(labels, guesses, strict=True):
            confusion[LABELS.index(gold), LABELS.index(guess)] += 1
        assert result.num_examples == len(pairs) == 12 and result.num_images == 4
        assert [list(row) for row in result.confusion] == confusion.tolist()
        assert result.accuracy == pytest.approx(confusion.trace() / len(pairs))
        assert result.loss == pytest.approx(np.mean(losses), rel=1e-3)
        f1 = 2 * confusion.diagonal() / np.maximum(1, confusion.sum(0) + confusion.sum(1))
        assert result.macro_f1 == pytest.approx(np.mean(f1))
        english = english or (guesses, result.accuracy)
        agreement = np.mean(np.equal(guesses, english[0]))
        assert result.agreement_with_english == pytest.approx(agreement)
        if english[1]:
            assert result.ratio_to_english == pytest.approx(result.accuracy / english[1])
        assert document.baselines[result.lang].majority == pytest.approx(1 / 3)

    signature = document.signature
    config = json.loads((trained / "align-de" / "config.json").read_text())
    assert signature.checkpoints["align-de"] == config["fingerprint"]
    assert signature.checkpoints["clip-ve"] == config["teacher"]
    split = read_split(world, "test", "de")
    assert signature.data["snli_ve_test.de.jsonl"] == split.digest
    assert (signature.seed, signature.num_examples) == (0, 12)


def test_languages_without_a_student_are_noted_not_dropped(data, trained):
    rows = read_jsonl(data / "snli_ve_test.jsonl")
    write_jsonl(data / "snli_ve_test.ja.jsonl", rows)
    notes = Notes()
    document = evaluate(EvaluateConfig(data=str(data), runs=(trained,), resamples=10), notes)
    assert [result.lang for result in document.results] == ["en", "de", "nl"]
    assert "no student for ja; `clseave align --lang ja` makes one" in notes.text
    with pytest.raises(ModelError, match=r"no student for ja \(there are models for en, de, nl\)"):
        evaluate(EvaluateConfig(data=str(data), runs=(trained,), lang=("ja",)))


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
    opened = record(monkeypatch, prediction, "open_image", lambda path, name: path.name)
    monkeypatch.setattr(prediction, "_KEPT_BYTES", 2 * 16 * 4)
    names = ["test0.png", "test1.png", "test0.png", "test2.png", "test0.png"]
    pairs = [(world / "images" / name, "The square is red.") for name in names]
    answers = model.predict(pairs)
    assert opened == ["test0.png", "test1.png", "test2.png"]
    again = model(*pairs[3])
    assert len(opened) == 3  # still cached
    assert again.probabilities == pytest.approx(answers[3].probabilities, rel=1e-5)
    model(*pairs[0])
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
