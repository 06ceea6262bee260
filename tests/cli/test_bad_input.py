"""What bad input gets: one clear line, the right exit code, and nothing lost."""

import errno
import json
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file
from tiny_world import edit_row, flip_byte, read_jsonl, reseal, tree, write_jsonl

from clseave_cli.core import files
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
def test_a_missing_split_or_data_folder(commands, refused, data, command):
    (data / FILES[command]).unlink()
    error = refused(*commands[command])
    assert f"{data}: no {FILES[command]} (languages of the split" in error
    shutil.rmtree(data)
    error = refused(*commands[command])
    assert f"{data}: no such data folder; expected one with snli_ve_" in error
    assert "choose the folder with --data DIR" in error


@pytest.mark.parametrize("command", ["finetune-ve", "evaluate"])
def test_a_missing_image_folder(commands, refused, data, command):
    shutil.rmtree(data / "images")
    error = refused(*commands[command])
    assert f"{data}: no image folder in it" in error and "choose it with --images DIR" in error
    error = refused(*commands[command], "--images", data / "photos")
    assert f"{data / 'photos'}: no such image folder" in error


@pytest.mark.parametrize("command", ["finetune-ve", "evaluate"])
def test_a_missing_image(commands, refused, data, command):
    row = read_jsonl(data / FILES[command])[4]
    (data / "images" / row["Flickr30K_ID"]).unlink()
    error = refused(*commands[command])
    # The image's first row is the fourth line.
    assert f"{FILES[command]}:4: image {row['Flickr30K_ID']!r} is not in {data / 'images'}" in error


@pytest.mark.parametrize("command", ["finetune-ve", "evaluate"])
@pytest.mark.parametrize("damage", ["truncated", "rubbish", "empty"])
def test_a_damaged_image(commands, refused, data, command, damage):
    from PIL import Image

    row = read_jsonl(data / FILES[command])[0]
    path = data / "images" / row["Flickr30K_ID"]
    Image.open(path).resize((90, 90)).save(path.with_suffix(".jpg"))
    path.unlink()
    path = path.with_suffix(".jpg")
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "rubbish": b"GIF89a...", "empty": b""}[damage]
    )
    error = refused(*commands[command])
    assert f"{FILES[command]}:1: {path}: damaged or not an image" in error


BAD_ROWS = {
    "no pairID": {"pairID": None},
    "no sentence2": {"sentence2": None},
    "sentence2 is empty": {"sentence2": " "},
    "no gold_label": {"gold_label": None},
    "gold_label is 'entailed'; expected one of": {"gold_label": "entailed"},
    "no Flickr30K_ID": {"Flickr30K_ID": None},
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_missing_or_wrong_key(commands, refused, clseave, data, command, reason):
    path = data / FILES[command]
    edit_row(path, 2, **BAD_ROWS[reason])
    if command == "align" and reason in ("no gold_label", "no Flickr30K_ID"):
        code, _, err = clseave(*commands[command])  # text is all that align needs
        assert code == 0, err
        return
    error = refused(*commands[command])
    assert f"{path}:2: {reason}" in error and "--skip-bad" in error


@pytest.mark.parametrize("command", READERS)
def test_a_line_that_does_not_parse_and_two_rows_with_one_pair_id(commands, refused, data, command):
    path = data / FILES[command]
    whole, rows = path.read_text(), read_jsonl(path)
    lines = whole.splitlines()
    lines[2] = lines[2][:-9]
    path.write_text("\n".join(lines))
    error = refused(*commands[command])
    assert f"{path}:3: not valid JSON" in error and "--skip-bad" in error
    path.write_text(whole)
    edit_row(path, 5, pairID=rows[1]["pairID"])
    error = refused(*commands[command])
    assert f"{path}:5: pairID {rows[1]['pairID']!r} is also in line 2" in error


@pytest.mark.parametrize("command", READERS)
def test_bad_rows_are_set_aside_when_asked(commands, clseave, data, command):
    """G9."""
    path = data / FILES[command]
    edit_row(path, 2, sentence2="")
    before = path.read_bytes()
    code, _, err = clseave(*commands[command], "--skip-bad")
    assert code == 0, err
    assert f"{path}: 1 bad rows set aside in" in err.replace("\n", " ")
    (rejected,) = read_jsonl(data / path.name.replace(".jsonl", ".rejected.jsonl"))
    assert rejected["line"] == 2 and "sentence2 is empty" in rejected["reason"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("lang", "code", "message"),
    [
        ("klingon", 2, "--lang klingon: not a language code; expected one such as de, ja or zh"),
        ("../de", 2, "--lang ../de: not a language code"),
        ("xx", 1, "xx"),
    ],
)
@pytest.mark.parametrize("command", ["align", "evaluate", "predict"])
def test_an_unknown_language(commands, refused, command, lang, code, message):
    arguments = [a for a in commands[command] if a not in ("--lang", "de")]
    error = refused(*arguments, "--lang", lang, code=code)
    assert message in error
    if lang == "xx":
        advice = "clseave align --lang xx" if command == "predict" else "clseave translate --lang"
        assert advice in error


@pytest.mark.parametrize("command", ["finetune-ve", "align", "evaluate", "predict"])
def test_an_unknown_device(commands, refused, command):
    arguments = [a for a in commands[command] if a not in ("--device", "cpu")]
    error = refused(*arguments, "--device", "tpu", code=2)
    assert "--device tpu: unknown; expected auto, cpu, cuda or cuda:N" in error
    error = refused(*arguments, "--device", "cuda:77")
    assert "--device cuda:77: torch sees" in error and "use --device cpu or auto" in error


def test_an_unknown_model_folder(commands, refused, tmp_path):
    nowhere = tmp_path / "nowhere"
    for command, (more, message) in {
        "finetune-ve": (["--clip", nowhere], f"{nowhere}: no such model folder"),
        "align": (["--student", nowhere], f"{nowhere}: no such model folder"),
        "evaluate": (["--runs", nowhere], f"{nowhere}"),
        "predict": (["--runs", nowhere], f"{nowhere / 'clip-ve'}: no such model folder"),
    }.items():
        assert message in refused(*commands[command], *more)
    error = refused(*commands["align"], "--teacher", nowhere)
    assert f"{nowhere}: no such model folder; `clseave finetune-ve` creates it" in error
    error = refused(*commands["finetune-ve"], "--clip", "no-such/model-on-the-hub")
    assert "no-such/model-on-the-hub: cannot be loaded" in error


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


@pytest.mark.parametrize("damage", ["missing", "folder", "truncated"])
def test_a_pair_that_cannot_be_judged(commands, refused, data, damage):
    path = data / "images" / "test0.png"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "truncated":
        path.write_bytes(content[:80])
    error = refused(*commands["predict"])
    messages = {
        "missing": "no such image",
        "folder": "no pictures",
        "truncated": "damaged or not an image",
    }
    assert f"{path}: {messages[damage]}" in error
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
    ["config.json", "head.safetensors", "text/model.safetensors", "image/model.safetensors",
     "text/tokenizer.json"],
)  # fmt: skip
def test_a_checkpoint_with_a_flipped_byte(commands, refused, runs, file):
    flip_byte(runs / "clip-ve" / file)
    for command in ("predict", "evaluate", "align"):
        error = refused(*commands[command])
        assert f"{runs / 'clip-ve'}" in error and ("damaged" in error or "not a clip-ve" in error)


@pytest.mark.parametrize("file", ["config.json", "projection.safetensors", "encoder/config.json"])
def test_a_student_with_a_flipped_byte(commands, refused, runs, file):
    flip_byte(runs / "align-de" / file)
    predict = [*commands["predict"], "--lang", "de"]
    for arguments in (predict, commands["evaluate"]):
        assert f"{runs / 'align-de'}" in refused(*arguments)


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


def test_align_needs_a_language(refused, data):
    assert "--lang is missing; for example --lang de" in refused("align", "--data", data, code=2)


def test_predict_needs_a_pair_or_files(refused):
    for arguments in ([], ["image.jpg"], ["image.jpg", "x", "--input", "a", "--output", "b"]):
        error = refused("predict", *arguments, code=2)
        assert "give IMAGE and HYPOTHESIS, or --input FILE" in error


def test_an_input_file_that_is_not_there(refused, runs, tmp_path):
    target = tmp_path / "answers.jsonl"
    older = '{"error": "older"}\n'
    target.write_text(older)
    for source in (tmp_path / "nowhere.jsonl", tmp_path):
        error = refused("predict", "--input", source, "--output", target, "--runs", runs)
        assert f"{source}: cannot be read" in error
    assert target.read_text() == older


@pytest.fixture
def full_disk(monkeypatch):
    """Fills the disk from where it is called."""

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(files.os, "fsync", full)


def test_a_full_disk_under_predict_keeps_the_older_answers(
    refused, runs, data, tmp_path, full_disk
):
    target, source = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    older = '{"error": "older"}\n'
    target.write_text(older)
    write_jsonl(source, [{"image": "data/images/test0.png", "hypothesis": "The square is red."}])
    full_disk()
    error = refused("predict", "--input", source, "--output", target, "--runs", runs)
    assert f"{target}: the disk is full; existing files are untouched" in error
    assert target.read_text() == older
    assert not list(tmp_path.glob(".answers*"))


def test_a_full_disk_under_a_report(commands, clseave, refused, tmp_path, full_disk):
    report = tmp_path / "report"
    # The features are cached by now; what is left to write is the report.
    assert clseave(*commands["evaluate"])[0] == 0
    full_disk()
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
