"""What bad input gets: one clear line, the right exit code, and nothing lost."""

import json
import os
import shutil
import signal

import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_world import edit_row, flip_byte, full_disk, read_jsonl, reseal, tree, write_jsonl

from clseave_cli.core.files import cache_root
from clseave_cli.core.models.encoders import ImageEncoder


@pytest.fixture
def commands(data, runs, clip, encoder, tmp_path):
    """The commands that read data and models, by name, with everything in order."""
    quick = ["--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    return {
        "finetune-ve": ["finetune-ve", "--clip", clip, "--data", data, "--runs", tmp_path / "new",
                        *quick],
        "align": ["align", "--lang", "de", "--student", encoder, "--data", data,
                  "--teacher", runs / "clip-ve", "--runs", tmp_path / "new", *quick],
        "evaluate": ["evaluate", "--data", data, "--runs", runs, "--resamples", "10"],
        "predict": ["predict", data / "images" / "test0.png", "The square is red.",
                    "--runs", runs],
    }  # fmt: skip


READERS = ("finetune-ve", "align", "evaluate")

#: The file whose rows each command reads first.
FILES = {
    "finetune-ve": "snli_ve_train.jsonl",
    "align": "snli_ve_train.de.jsonl",
    "evaluate": "snli_ve_test.jsonl",
}


@pytest.fixture
def refused(refused, runs):
    """As everywhere; and whatever is refused, the models stay as they were."""

    def run(*arguments, code=1):
        before = tree(runs)
        error = refused(*arguments, code=code)
        assert tree(runs) == before
        return error

    return run


@pytest.mark.parametrize("command", READERS)
def test_missing_files_and_folders_are_named(commands, refused, data, command):
    path, images = data / FILES[command], data / "images"
    if command != "align":  # which reads text alone
        image = read_jsonl(path)[4]["Flickr30K_ID"]
        (images / image).unlink()
        error = refused(*commands[command])
        # The image's first row is the fourth line.
        assert f"{path.name}:4: image {image!r} is not in {images}" in error
        error = refused(*commands[command], "--images", data / "photos")
        assert f"{data / 'photos'}: no such image folder" in error
        shutil.rmtree(images)
        error = refused(*commands[command])
        assert f"{data}: no image folder in it" in error and "choose it with --images DIR" in error
    path.unlink()
    error = refused(*commands[command])
    assert f"{data}: no {path.name} (languages of the split" in error
    shutil.rmtree(data)
    error = refused(*commands[command])
    assert f"{data}: no such data folder; expected one with snli_ve_" in error
    assert "choose the folder with --data DIR" in error


@pytest.mark.parametrize("command", ["finetune-ve", "evaluate"])
def test_a_damaged_image(commands, refused, data, command):
    row = read_jsonl(data / FILES[command])[0]
    path = (data / "images" / row["Flickr30K_ID"]).with_suffix(".jpg")
    Image.open(path.with_suffix(".png")).resize((90, 90)).save(path)
    path.with_suffix(".png").unlink()
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"GIF89a...", b""):
        path.write_bytes(damaged)
        error = refused(*commands[command])
        assert f"{FILES[command]}:1: {path}: damaged or not an image" in error
        shutil.rmtree(data.parent / "new", ignore_errors=True)  # an unfinished run


BAD_ROWS = [
    ({"pairID": None}, "no pairID"),
    ({"sentence2": None}, "no sentence2"),
    ({"sentence2": " "}, "sentence2 is empty"),
    ({"gold_label": None}, "no gold_label"),
    ({"gold_label": "entailed"}, "gold_label is 'entailed'; expected one of"),
    ({"Flickr30K_ID": None}, "no Flickr30K_ID"),
]


@pytest.mark.parametrize("command", READERS)
def test_bad_rows_are_refused_and_set_aside_when_asked(commands, refused, clseave, data, command):
    """G9: `align` needs text alone, neither labels nor images."""
    path = data / FILES[command]
    original, rows = path.read_text(), read_jsonl(path)
    lines = original.splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-9], *lines[3:]]))
    error = refused(*commands[command])
    assert f"{path}:3: not valid JSON" in error and "--skip-bad" in error
    path.write_text(original)
    edit_row(path, 5, pairID=rows[1]["pairID"])
    error = refused(*commands[command])
    assert f"{path}:5: pairID {rows[1]['pairID']!r} is also in line 2" in error
    for changes, reason in BAD_ROWS:
        path.write_text(original)
        edit_row(path, 2, **changes)
        if command == "align" and reason in ("no gold_label", "no Flickr30K_ID"):
            code, _, err = clseave(*commands[command])
            assert code == 0, err
            shutil.rmtree(data.parent / "new")
        else:
            error = refused(*commands[command])
            assert f"{path}:2: {reason}" in error and "--skip-bad" in error
    path.write_text(original)
    edit_row(path, 2, sentence2="")
    before = path.read_bytes()
    code, _, err = clseave(*commands[command], "--skip-bad")
    assert code == 0, err
    assert f"{path}: 1 bad rows set aside in" in err.replace("\n", " ")
    (rejected,) = read_jsonl(data / path.name.replace(".jsonl", ".rejected.jsonl"))
    assert rejected["line"] == 2 and "sentence2 is empty" in rejected["reason"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["align", "evaluate", "predict"])
def test_an_unknown_language(commands, refused, command):
    arguments = [a for a in commands[command] if a not in ("--lang", "de")]
    advice = "clseave align --lang xx" if command == "predict" else "clseave translate --lang"
    for lang, code, message in (
        ("klingon", 2, "--lang klingon: not a language code; expected one such as de, ja or zh"),
        ("../de", 2, "--lang ../de: not a language code"),
        ("xx", 1, advice),
    ):
        assert message in refused(*arguments, "--lang", lang, code=code)


@pytest.mark.parametrize("command", ["finetune-ve", "align", "evaluate", "predict"])
def test_an_unknown_device_or_model_folder(commands, refused, tmp_path, command):
    arguments = [a for a in commands[command] if a not in ("--device", "cpu")]
    error = refused(*arguments, "--device", "tpu", code=2)
    assert "--device tpu: unknown; expected auto, cpu, cuda or cuda:N" in error
    error = refused(*arguments, "--device", "cuda:77")
    assert "--device cuda:77: torch sees" in error and "use --device cpu or auto" in error
    nowhere = tmp_path / "nowhere"
    for option, folder, message in {
        "finetune-ve": [
            ("--clip", nowhere, f"{nowhere}: no such model folder"),
            ("--clip", "no-such/model", "no-such/model: cannot be loaded"),
        ],
        "align": [
            ("--student", nowhere, f"{nowhere}: no such model folder"),
            ("--teacher", nowhere, "no such model folder; `clseave finetune-ve` creates it"),
        ],
        "evaluate": [("--runs", nowhere, f"{nowhere}")],
        "predict": [("--runs", nowhere, f"{nowhere / 'clip-ve'}: no such model folder")],
    }[command]:
        error = refused(*commands[command], option, folder)
        assert message in error and f"{folder}" in error


def test_a_hypothesis_of_ten_thousand_words(commands, clseave, data):
    arguments = commands["predict"]
    arguments[2] = "red " * 10_000
    code, out, err = clseave(*arguments, "--json")
    assert code == 0 and "too long and was truncated" in err.replace("\n", " ")
    assert json.loads(out)["label"]
    path = data / "snli_ve_test.jsonl"
    edit_row(path, 3, sentence2="red " * 10_000)
    code, _, err = clseave(*commands["evaluate"])
    assert code == 0
    assert f"{path}:3: one of 1 distinct sentences that are too long" in err.replace("\n", " ")


def test_a_pair_that_cannot_be_judged(commands, refused, data):
    path = data / "images" / "test0.png"
    content = path.read_bytes()
    path.unlink()
    assert f"{path}: no such image" in refused(*commands["predict"])
    path.mkdir()
    assert f"{path}: no pictures" in refused(*commands["predict"])
    path.rmdir()
    path.write_bytes(content[:80])
    assert f"{path}: damaged or not an image" in refused(*commands["predict"])
    commands["predict"][1:3] = [data / "images" / "test1.png", "   "]
    assert "the hypothesis is empty; expected a sentence" in refused(*commands["predict"])


def test_a_student_of_another_teacher(commands, refused, runs):
    reseal(runs / "align-de", "student", teacher="0" * 64)
    for arguments in ([*commands["predict"], "--lang", "de"], commands["evaluate"]):
        error = refused(*arguments)
        assert f"{runs / 'align-de'}: this student was trained against another CLIP-VE" in error
        assert "Align it again, or use the CLIP-VE it belongs to" in error


@pytest.mark.parametrize(
    "file",
    ["clip-ve/config.json", "clip-ve/head.safetensors", "clip-ve/text/model.safetensors",
     "clip-ve/image/model.safetensors", "clip-ve/text/tokenizer.json", "align-de/config.json",
     "align-de/projection.safetensors", "align-de/encoder/config.json"],
)  # fmt: skip
def test_a_model_with_a_flipped_byte(commands, refused, runs, file):
    flip_byte(runs / file)
    folder = runs / file.partition("/")[0]
    if folder.name == "align-de":
        for arguments in ([*commands["predict"], "--lang", "de"], commands["evaluate"]):
            assert f"{folder}" in refused(*arguments)
    else:
        for command in ("predict", "evaluate", "align"):
            error = refused(*commands[command])
            assert f"{folder}" in error and ("damaged" in error or "not a clip-ve" in error)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("finetune-ve", ["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        ("finetune-ve", ["--epochs", "0"], "--epochs 0: expected at least 1"),
        ("finetune-ve", ["--accumulation", "0"], "--accumulation 0: expected at least 1"),
        ("finetune-ve", ["--learning-rate", "nan"], "--learning-rate nan: expected at least 0"),
        ("finetune-ve", ["--seed", "-1"], "--seed -1: expected at least 0"),
        ("finetune-ve", ["--batch-size", "1"], "the head's batch normalisation needs two"),
        ("align", ["--max-steps", "0"], "--max-steps 0: expected at least 1"),
        ("align", ["--lang", "en"], "--lang en: is the teacher's language"),
        ("align", ["--preset", "mine"], "--preset mine: unknown; there are: thesis, mini-ve"),
        ("evaluate", ["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        ("predict", ["--output", "pairs.jsonl"], "--output goes with --input"),
    ],
)
def test_options_that_make_no_sense(commands, refused, command, flags, message):
    assert message in refused(*commands[command], *flags, code=2)


def test_a_missing_input_or_a_full_disk_keeps_the_older_answers(
    refused, runs, data, tmp_path, monkeypatch
):
    target, source = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    older = '{"error": "older"}\n'
    target.write_text(older)
    write_jsonl(source, [{"image": "data/images/test0.png", "hypothesis": "The square is red."}])
    arguments = ["predict", "--runs", runs, "--output", target, "--input"]
    for unreadable in (tmp_path / "nowhere.jsonl", tmp_path):
        assert f"{unreadable}: cannot be read" in refused(*arguments, unreadable)
    assert target.read_text() == older
    monkeypatch.setattr(os, "fsync", full_disk)
    error = refused(*arguments, source)
    assert f"{target}: the disk is full; existing files are untouched" in error
    assert target.read_text() == older and not list(tmp_path.glob(".answers*"))


def test_a_full_disk_under_a_report(commands, clseave, refused, tmp_path, monkeypatch):
    report = tmp_path / "report"
    # The features are cached by now; what is left to write is the report.
    assert clseave(*commands["evaluate"])[0] == 0
    monkeypatch.setattr(os, "fsync", full_disk)
    error = refused(*commands["evaluate"], "--report", report)
    assert f"{report}: the disk is full" in error and list(tmp_path.glob(".report*")) == []


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("finetune-ve", "clseave_cli.core.finetuning.image_features"),
        ("align", "clseave_cli.core.alignment.corpus.sentence_embeddings"),
        ("evaluate", "clseave_cli.core.evaluation.outputs.image_features"),
        ("predict", "clseave_cli.core.prediction.predictor.open_image"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_outside_of_training(commands, refused, monkeypatch, command, place, number):
    def interrupt(*_arguments, **_more):
        # Outside of a command SIGTERM would end the whole test run.
        assert signal.getsignal(number) == signal.default_int_handler
        signal.raise_signal(number)

    monkeypatch.setattr(place, interrupt)
    before = signal.getsignal(signal.SIGTERM)
    error = refused(*commands[command], code=130)
    assert error == "clseave: interrupted; everything finished so far is on disk."
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_image_features_outlive_an_interruption(commands, refused, monkeypatch, number):
    monkeypatch.setattr("clseave_cli.core.features._IMAGE_BATCH", {"cpu": 1})
    monkeypatch.setattr("clseave_cli.core.features._DECODED_AT_ONCE", 1)
    forward, computed = ImageEncoder.forward, []

    def interrupted(encoder, pixels):
        if len(computed) == 3:
            assert signal.getsignal(number) == signal.default_int_handler
            signal.raise_signal(number)
        computed.append(len(pixels))
        return forward(encoder, pixels)

    monkeypatch.setattr(ImageEncoder, "forward", interrupted)
    refused(*commands["finetune-ve"], code=130)
    (shard,) = cache_root().rglob("*.safetensors")
    assert len(load_file(shard)["keys"]) == 3


def test_what_nobody_thought_of_is_one_line_too(commands, clseave, monkeypatch):
    def broken(*_arguments, **_more):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("clseave_cli.core.finetuning.read_split", broken)
    code, _, err = clseave(*commands["finetune-ve"])
    assert code == 1 and err.splitlines() == [
        "clseave: internal error: ZeroDivisionError: two lines (--debug shows where)"
    ]
    with pytest.raises(ZeroDivisionError):
        clseave("--debug", *commands["finetune-ve"])
