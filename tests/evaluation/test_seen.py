"""The photos and pairs that models saw in training: recorded, refused, left out, or told."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_world import (
    QUICK,
    Notes,
    edit_row,
    killed_at_step,
    read_jsonl,
    write_captions,
    write_jsonl,
)  # fmt: skip

from clseave_cli.core import finetuning
from clseave_cli.core.config import EvaluateConfig, FinetuneConfig, PretrainConfig
from clseave_cli.core.data.seen import SEEN_FILE, SeenRows
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.pretraining import pretrain
from clseave_cli.errors import DataError, ExtraMissing, ModelError
from clseave_cli.progress import SILENT


def _evaluate(data, runs, progress=SILENT, **options):
    defaults = {"resamples": 20, "device": "cpu", "precision": "fp32"}
    return evaluate(EvaluateConfig(data=str(data), runs=(runs,), **(defaults | options)), progress)


def _other_folder(data, split="test"):
    """A data folder of another name with the photos and one split, as its test split."""
    other = data.parent / "other"
    shutil.copytree(data / "images", other / "images")
    shutil.copy(data / f"snli_ve_{split}.jsonl", other / "snli_ve_test.jsonl")
    return other


def _renamed(data, num_pairs=0):
    """The test rows; the first two photos are training photos under other names."""
    folder = _other_folder(data)
    for number in range(2):
        shutil.copy(data / f"images/train{number}.png", folder / f"images/test{number}.png")
    for line, row in enumerate(read_jsonl(data / "snli_ve_train.jsonl")[:num_pairs], 1):
        edit_row(folder / "snli_ve_test.jsonl", line, sentence2=row["sentence2"])
    return folder


@pytest.mark.parametrize(
    ("case", "options", "num_photos"),
    [
        (lambda data: _other_folder(data, "train"), {}, 8),
        (_renamed, {}, 2),
        (lambda data: data, {"split": "dev", "lang": ("en",)}, 4),
    ],
    ids=["training file", "renamed photos", "dev"],
)
def test_seen_photos_are_refused_before_a_model_runs(
    data, trained, monkeypatch, case, options, num_photos
):
    monkeypatch.setattr(ClipVE, "from_folder", None)
    message = rf"{num_photos} of its [48] images are also in .*--exclude-seen .*--allow-leak"
    with pytest.raises(DataError, match=message):
        _evaluate(case(data), trained, **options)


def test_a_leak_that_is_allowed_is_told_everywhere(data, trained, tmp_path):
    report, notes = tmp_path / "report", Notes()
    folder = _renamed(data, num_pairs=3)
    document = _evaluate(folder, trained, notes, allow_leak=True, report=report)
    (english,) = document.results
    seen = english.seen
    rows = read_jsonl(report / "predictions.en.jsonl")
    right = np.array([row["predicted"] == row["label"] for row in rows])
    is_seen = np.array([row["image"] in ("test0.png", "test1.png") for row in rows])
    assert (seen.num_images, seen.num_examples, seen.share) == (2, 6, 0.5)
    assert seen.num_pairs >= 3 and seen.accuracy_pairs is not None
    assert seen.accuracy == right[is_seen].mean()
    assert seen.accuracy_unseen == right[~is_seen].mean()
    assert document.signature.seen == {"snli_ve_test.jsonl": 2}
    assert "2 photos seen in training" in str(document.signature)
    for text in (notes.text, (report / "report.html").read_text()):
        assert "(2 of 4 photos, 50.0 % of the rows)" in text


def test_excluding_seen_photos_is_evaluating_the_others(data, trained):
    folder, notes = _renamed(data), Notes()
    document = _evaluate(folder, trained, notes, exclude_seen=True)
    assert "6 of 12 rows left out" in notes.text
    assert document.signature.excluded == {"snli_ve_test.jsonl": 6}
    assert "6 rows of seen photos left out" in str(document.signature)
    path = folder / "snli_ve_test.jsonl"
    write_jsonl(path, read_jsonl(path)[6:])
    rest = _evaluate(folder, trained, quiet := Notes())
    assert document.results == rest.results and rest.results[0].seen is None
    assert quiet.text == "" and rest.signature.excluded == {}
    shutil.copy(data / "snli_ve_train.jsonl", path)
    with pytest.raises(DataError, match="24 of 24 rows left out; a model saw all photos"):
        _evaluate(folder, trained, exclude_seen=True)


def test_a_student_knows_the_rows_it_read(data, trained, runs):
    teacher, student = (SeenRows.read(trained / name) for name in ("clip-ve", "align-de"))
    # Of train and dev; the student read only dev's photos, and German sentences.
    names, contents = student.photos.T
    assert len(teacher.photos) == 12 and set(names) == set(teacher.photos[:, 0])
    assert teacher.photos.all() and (contents > 0).sum() == 4
    assert set(contents) - {0} < set(teacher.photos[:, 1])
    assert len(student.pairs) == 36 and not set(student.pairs) & set(teacher.pairs)
    # Where only the student saw a photo, its rows are refused.
    (runs / "clip-ve" / SEEN_FILE).unlink()
    with pytest.raises(DataError, match="4 of its 4 images"):
        _evaluate(data, runs, split="dev", lang=("de",))


def test_a_folder_of_an_earlier_version_is_evaluated_as_before(world, trained, runs):
    for name in ("clip-ve", "align-nl"):
        (runs / name / SEEN_FILE).unlink()
    notes = Notes()
    assert _evaluate(world, runs, progress=notes).results == _evaluate(world, trained).results
    assert notes.text.count("no record of the photos seen in training") == 1
    with pytest.raises(ModelError, match=r"clip-ve and .*nl: no record .*--exclude-seen needs one"):
        _evaluate(world, runs, exclude_seen=True)
    (runs / "align-de" / SEEN_FILE).write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"seen\.safetensors: damaged"):
        _evaluate(world, runs)


def test_a_resumed_run_has_the_record_and_can_be_replaced(world, trained, tmp_path, clip):
    config = {"data": str(world), "runs": tmp_path, "clip": str(clip), "epochs": 1, **QUICK}
    with killed_at_step(1):
        finetuning.finetune(FinetuneConfig(**config))
    for options in ({"resume": True}, {}):
        finetuning.finetune(FinetuneConfig(**config, **options))
        record = (tmp_path / "clip-ve" / SEEN_FILE).read_bytes()
        assert record == (trained / "clip-ve" / SEEN_FILE).read_bytes()


def test_a_photo_that_was_scaled_and_saved_again_is_noticed_if_asked(
    data, trained, refused, monkeypatch
):
    pytest.importorskip("imagehash")
    folder = _other_folder(data)
    again = Image.open(data / "images/train1.png").resize((80, 80))
    again.save(folder / "images/test0.png")
    assert _evaluate(folder, trained).results[0].seen is None  # another name, other bytes
    options = {"near_duplicates": 4}
    command = ("evaluate", "--data", folder, "--runs", trained, "--near-duplicates", 4)
    assert "1 of its 4 images are also in" in refused(*command)
    (english,) = _evaluate(folder, trained, **options, allow_leak=True).results
    assert (english.seen.num_images, english.seen.num_pairs) == (1, 0)
    document = _evaluate(folder, trained, **options, exclude_seen=True)
    assert document.signature.excluded == {"snli_ve_test.jsonl": 3}
    for photo in [*(folder / "images").glob("train*"), *(folder / "images").glob("dev*")]:
        photo.unlink()
    assert "cannot compare with them" in refused(*command)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ExtraMissing, match=r"imagehash; run: pip install -e '\.\[duplicates\]'"):
        _evaluate(data, trained, near_duplicates=0)


def test_what_a_clip_was_trained_on_was_seen_too(data, trained, tmp_path, clip):
    """The photos of `pretrain` are in its folder, and in that of a CLIP-VE that starts from it."""
    captions = write_captions(data, tmp_path / "captions")
    rows = read_jsonl(data / "snli_ve_test.jsonl")[:3]
    lines = [{"image": row["Flickr30K_ID"], "caption": row["sentence2"]} for row in rows]
    write_jsonl(captions / "captions_train.jsonl", lines)
    shared = {"epochs": 1, "runs": tmp_path, **QUICK}
    pretrain(PretrainConfig(data=captions, images=data / "images", clip=str(clip), **shared))
    seen = SeenRows.read(tmp_path / "clip")
    assert len(seen.photos) == 5 and seen.photos.all() and not len(seen.pairs)
    pretrained = str(tmp_path / "clip")
    finetuning.finetune(FinetuneConfig(data=str(data), clip=pretrained, head="pooled", **shared))
    with pytest.raises(DataError, match="1 of its 4 images are also in"):
        _evaluate(data, tmp_path, lang=("en",))
