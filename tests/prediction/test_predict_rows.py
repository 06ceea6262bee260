"""`predict` on many rows: resuming, changing pictures, languages."""

import csv
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fake_model import FakeModel
from PIL import Image
from tiny_world import (
    CommandProcess,
    flip_byte,
    interrupted_at,
    read_jsonl,
    record,
    reseal,
    tree,
    write_jsonl,
)

from clseave_cli import VisualEntailment
from clseave_cli.commands import predict
from clseave_cli.core.config import PredictConfig
from clseave_cli.core.data.pairs import AnswerTable
from clseave_cli.core.files import writing
from clseave_cli.core.models.listing import find_students
from clseave_cli.core.prediction import torch_model
from clseave_cli.core.prediction.predictor import predict_file
from clseave_cli.errors import ClseaveError, DataError, ExtraMissing, UsageError
from clseave_cli.labels import LABELS

_REPOSITORY = Path(__file__).parents[2]
needs_lingua = pytest.mark.skipif(
    importlib.util.find_spec("lingua") is None, reason="needs the langid extra"
)


def _write_source(folder, world):
    rows = []
    for number in range(40):
        words = ("rot", "blau", "grün", "weiß")[number // 4 % 4]
        image = world / "images" / f"test{number % 4}.png"
        rows.append({"image": str(image), "hypothesis": f"Das Quadrat ist {words}."})
    rows[7]["image"] = "nowhere.png"
    rows[11] = {"nothing": 1}
    rows[13]["hypothesis"] = "halb \ud83d"
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def source(tmp_path, world):
    """Forty German rows on four pictures, a few of them bad."""
    return _write_source(tmp_path, world)


@pytest.fixture(scope="module")
def answered(tmp_path_factory, world, trained):
    """Such rows, the file an uninterrupted run wrote, and its result; read-only."""
    source = _write_source(tmp_path_factory.mktemp("answered"), world)
    whole = source.with_name("whole.jsonl")
    return source, whole, predict_file(_config(trained), source, whole)


def _config(trained, **options):
    defaults = {"lang": "de", "device": "cpu", "precision": "fp32", "batch_size": 3}
    return PredictConfig(runs=trained, **(defaults | options))


def _same(first, second):
    for answer, other in zip(read_jsonl(first), read_jsonl(second), strict=True):
        expected = pytest.approx(other.pop("probabilities", {}), rel=1e-4)
        assert answer.pop("probabilities", {}) == expected and answer == other


# --- resuming ---


@pytest.mark.parametrize("left", [0, 1, 5, 12, 14, 40, "power cut"])
def test_a_resumed_run_continues_exactly_where_it_stopped(answered, trained, tmp_path, left):
    source, whole, done = answered
    assert (done.num_predicted, done.num_errors) == (37, 3)
    lines = whole.read_bytes().splitlines(keepends=True)
    if left == "power cut":
        earlier, torn = b"".join(lines[:4]), b"\0" * (len(lines[4]) - 1) + b"\n"
        torn += b"".join(lines[5:9])
    else:
        earlier, torn = b"".join(lines[:left]), b"".join(lines[left : left + 1])[:-5] or b"{"
    target, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    partial.write_bytes(earlier + torn)
    target.write_text('{"error": "older"}\n')
    with pytest.raises(UsageError, match=r"partial: an unfinished run left it; --resume"):
        predict_file(_config(trained), source, target)
    assert predict_file(_config(trained, resume=True), source, target) == done
    assert not partial.exists() and target.read_bytes().startswith(earlier)
    _same(target, whole)


def test_a_finished_file_gets_only_what_was_added(source, trained, tmp_path, monkeypatch):
    whole, target = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    done = predict_file(_config(trained), source, whole)
    rows = source.read_text()
    source.write_text("".join(rows.splitlines(keepends=True)[:13]))
    resume = _config(trained, resume=True)
    part = predict_file(resume, source, target)  # nothing to resume: begins
    before = target.read_bytes()
    with monkeypatch.context() as patch:  # no row to add: loads no model
        patch.setattr(VisualEntailment, "from_pretrained", None)
        assert predict_file(resume, source, target) == part
    source.write_text(rows)
    with interrupted_at(VisualEntailment, "predict", 1):
        predict_file(resume, source, target)
    assert target.read_bytes() == before
    assert predict_file(resume, source, target) == done
    assert target.read_bytes().startswith(before)
    assert not (tmp_path / "answers.jsonl.partial").exists()
    _same(target, whole)


@pytest.mark.parametrize(
    "line", [b"{", b"[1]\n", b"\0\0\n", b"\xff\n", b'{"a": 1}', b"[" * 100_000 + b"\n", None]
)
def test_a_damaged_finished_file_is_refused_and_left_alone(answered, trained, tmp_path, line):
    """Also one whose rows have no answer (None)."""
    source, whole, _ = answered
    target = tmp_path / "answers.jsonl"
    message = r"answers\.jsonl:6: damaged, not a complete answer"
    if line is None:
        write_jsonl(target, [row | {"lang": "de"} for row in read_jsonl(source)[:5]])
        message = r"answers\.jsonl:1: does not answer this row"
    else:
        lines = whole.read_bytes().splitlines(keepends=True)
        target.write_bytes(b"".join([*lines[:5], line]))
    damaged = target.read_bytes()
    with pytest.raises(DataError, match=message):
        predict_file(_config(trained, resume=True), source, target)
    assert target.read_bytes() == damaged
    assert not (tmp_path / "answers.jsonl.partial").exists()


@pytest.mark.parametrize("is_finished", [False, True])
def test_the_answers_of_another_run_are_refused_and_left_alone(
    answered, source, trained, tmp_path, clseave, is_finished
):
    """In another language, with rows gone at the end, and with one gone in the middle."""
    target, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    answers, left = answered[1].read_bytes(), target if is_finished else partial

    def refused(number, lang="de"):
        left.write_bytes(answers)
        code, _, err = clseave(
            "predict", "--input", source, "--output", target, "--runs", trained,
            "--lang", lang, "--resume",
        )  # fmt: skip
        assert code == (1 if is_finished else 2)
        assert f"{left.name}:{number}: does not answer this row" in err
        assert left.read_bytes() == answers and partial.exists() == (not is_finished)

    refused(1, lang="nl")
    rows = source.read_text().splitlines(keepends=True)
    source.write_text("".join(rows[:30]))
    refused(31)
    source.write_text("".join(rows[:3] + rows[4:]))
    refused(4)


def test_after_a_kill_no_line_is_torn_and_none_is_lost(source, trained, tmp_path, cache, clseave):
    """G7."""
    whole, target = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    arguments = ["predict", "--input", source, "--runs", trained, "--lang", "de",
                 "--batch-size", "1", "--device", "cpu", "--precision", "fp32"]  # fmt: skip
    assert clseave(*arguments, "--output", whole)[0] == 0
    partial = tmp_path / "answers.jsonl.partial"
    for number, num_lines in enumerate((3, 9, 20)):
        more = ["--resume"] if number else []
        running = CommandProcess(
            *map(str, [*arguments, "--output", target, *more]),
            folder=tmp_path / f"run{number}", before=_slow_answers,
        )  # fmt: skip
        running.wait_until(
            lambda n=num_lines: partial.exists() and partial.read_bytes().count(b"\n") >= n
        )
        running.signal(signal.SIGKILL if number < 2 else signal.SIGINT)
        assert running.wait() == (-signal.SIGKILL if number < 2 else 130), running.stderr
        assert not target.exists()
    assert "interrupted; everything finished so far is on disk" in running.stderr
    code, _, err = clseave(*arguments, "--output", target, "--resume")
    assert code == 0, err
    _same(target, whole)


def _slow_answers():
    record(pytest.MonkeyPatch(), VisualEntailment, "predict", lambda *_: time.sleep(0.03))


# --- where answers go ---


def test_input_and_output_are_not_the_same_file(source, trained, tmp_path):
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for target in (source, tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match="is both input and output"):
            predict_file(_config(trained), source, target)
    with pytest.raises(UsageError, match="is a folder; expected a file"):
        predict_file(_config(trained), source, tmp_path)
    assert source.read_bytes() == before


def test_a_pipe_is_written_to_and_stays(source, trained, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(fifo.read_bytes)
        predict_file(_config(trained), source, fifo)
        assert fifo.is_fifo() and answers.result(20).count(b"\n") == 40
    with pytest.raises(UsageError, match="--resume needs a file"):
        predict_file(_config(trained, resume=True), source, fifo)


def test_stdin_to_stdout(clseave, source, trained, monkeypatch, tmp_path):
    arguments = ["predict", "--runs", trained, "--lang", "de", "--input", "-", "--output"]
    with source.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        code, out, err = clseave(*arguments, "-")
    assert code == 0 and "stdout: 37 predicted, 3 with an error" in err
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 40 and answers[11]["error"].startswith("stdin:12: expected an object")
    assert answers[0]["label"] in LABELS
    code, out, err = clseave(*arguments, "-", "--json")
    assert code == 2 and out == "" and "--json and the answers both go to stdout" in err
    code, out, err = clseave(*arguments, tmp_path / "file" / "a", "--input", tmp_path / "no")
    assert code == 1 and f"{tmp_path / 'no'}: cannot be read" in err


# --- tables ---


def _write_table(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as stream:
            delimiter = "\t" if path.suffix == ".tsv" else ";"
            writer = csv.DictWriter(stream, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)


def _read_table(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(newline="") as stream:
        delimiter = {".tsv": "\t", ".csv": ","}[path.suffix]
        rows = list(csv.DictReader(stream, delimiter=delimiter))
    return [{k: float(v) if k in LABELS and v else v or None for k, v in r.items()} for r in rows]


def test_a_full_disk_is_not_blamed_on_the_input(tmp_path):
    _write_table(tmp_path / "in.parquet", [{"image": "a.png", "hypothesis": "A cat."}] * 3)
    table, answers = AnswerTable(source=tmp_path / "in.parquet"), iter([{"label": "neutral"}] * 3)
    with (
        pytest.raises(ClseaveError, match=r"out\.parquet: the disk is full"),
        writing(tmp_path / "out.parquet"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        table.write(answers, full)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_answers_to_a_table_are_a_table(trained, world, tmp_path, ending):
    """Every column stays as it is, and the answer's come behind; also after an interruption."""
    names = [*(str(world / "images" / f"test{n}.png") for n in range(4)), "nowhere.png"]
    rows = [
        {"id": f"{n:03}", "pic": names[n % 5], "sentence": f'Das "{n}";\n rot.', "label": "maybe"}
        for n in range(12)
    ]
    source, whole, target = (tmp_path / f"{name}{ending}" for name in ("pairs", "whole", "answers"))
    _write_table(source, rows)
    config = _config(trained, image_column="pic", text_column="sentence")
    done = predict_file(config, source, whole)
    assert (done.num_predicted, done.num_errors) == (10, 2)
    answers = _read_table(whole)
    columns = ["lang", "label", *LABELS, "model", "truncated", "warning", "error"]
    assert list(answers[0]) == ["id", "pic", "sentence", "gold_label", *columns]
    for row, answer in zip(rows, answers, strict=True):
        kept = {key: answer[key] for key in ("id", "pic", "sentence")}
        assert kept | {"label": answer["gold_label"]} == row
        scores = [answer[label] for label in LABELS]
        if row["pic"] == "nowhere.png":
            assert "no such image" in answer["error"] and answer["label"] is scores[0] is None
        else:
            assert sum(scores) == pytest.approx(1) and answer["label"] in LABELS

    _write_table(source, rows[:8])
    with interrupted_at(VisualEntailment, "predict", 3):
        predict_file(config, source, target)
    assert len(read_jsonl(tmp_path / f"answers{ending}.partial")) == 6 and not target.exists()
    resumed = replace(config, resume=True)
    predict_file(resumed, source, target)
    assert len(_read_table(target)) == 8
    _write_table(source, rows)
    assert predict_file(resumed, source, target) == done  # a finished table is made again
    for row, answer in zip(_read_table(target), answers, strict=True):
        scores = [[each.pop(label) or 0 for label in LABELS] for each in (row, answer)]
        assert row == answer and scores[0] == pytest.approx(scores[1], rel=1e-4)
    _write_table(target, rows)
    with pytest.raises(UsageError, match="already exists and holds no answers"):
        predict_file(config, source, target)
    with pytest.raises(UsageError, match=r"pairs\.\w+ is not a table of this kind; name"):
        predict_file(config, source, tmp_path / ("a.csv" if ending == ".parquet" else "a.parquet"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_the_input_alone_prints_to_stdout(clseave, trained, world, tmp_path, name):
    row = {"id": "007", "image": str(world / "images" / "test0.png"), "hypothesis": "Rot."}
    table = ",".join(row) + "\n" + ",".join(row.values())
    (tmp_path / name).write_text(table if name == "a.csv" else json.dumps(row))
    code, out, err = clseave("predict", "--input", tmp_path / name, "--runs", trained)
    assert code == 0 and "stdout: 1 predicted" in err
    answer = next(csv.DictReader(out.splitlines())) if name == "a.csv" else json.loads(out)
    assert answer["id"] == "007" and answer["label"] in LABELS


# --- several pictures and sentences ---


def test_several_pictures_and_sentences(clseave, refused, trained, world, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        shutil.copy(world / "images" / "test0.png", folder / name)
    (folder / "c.jpg").write_bytes(b"none")
    (folder / "notes.txt").touch()
    pictures, first = sorted(map(str, folder.glob("*.*g"))), str(folder / "a.png")
    models = ["--runs", trained]
    for arguments in ([folder, "Red."], [f"{folder}/?.*g", "Red."], [*pictures, "Red."]):
        code, out, err = clseave("predict", *arguments, *models, "--json")
        assert code == 0, err
        answers = json.loads(out)
        assert [answer["image"] for answer in answers] == pictures
        assert "error" in answers[2] and answers[0]["label"] == answers[1]["label"]
    code, out, _ = clseave("predict", first, "Red.", "Blue [b].", *models)
    assert [line.split(" %  ")[1] for line in out.splitlines()] == ["Red.", "Blue [b]."]
    code, out, _ = clseave("predict", folder, "Red.", *models)
    assert out.splitlines()[0].endswith(f" %  {first}") and "c.jpg: damaged" in out

    content = io.TextIOWrapper(io.BytesIO((folder / "a.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", content)
    answer = json.loads(clseave("predict", "-", "Red.", *models, "--json")[1])
    assert answer["label"] == answers[0]["label"] and answer["image"] == "the image"

    code, out, err = clseave("predict", folder / "c.jpg", "a", "b", *models)
    assert code == 1 and "no pair has a prediction" in err and out.count("c.jpg: damaged") == 2
    assert "no pictures" in refused("predict", f"{folder}/x*.png", "a", *models)
    assert "too long" in refused("predict", "x" * 300, "a", *models)
    assert ": no such image" in refused("predict", "", "a", *models)  # not the working directory


def test_a_student_that_is_named_reads_the_sentence(clseave, refused, trained, world):
    image, models = world / "images" / "test0.png", ["--runs", trained, "--json"]
    answers = [
        json.loads(clseave("predict", image, "Das ist rot.", *models, *more)[1])
        for more in (["--lang", "nl"], ["--student", trained / "align-nl"])
    ]
    assert answers[0] == answers[1]
    command = ("predict", image, "x", *models, "--student", trained / "align-nl")
    assert "no model for de; available: nl" in refused(*command, "--lang", "de")


def test_a_stream_of_pairs_is_judged_as_it_comes():
    model, taken = VisualEntailment(FakeModel(), None), []

    def pairs():
        for number in range(5):
            taken.append(number)
            yield (None if number == 1 else _RED), f"It is {number}."

    answers = model.batch(pairs(), iter(["en", "de", "en", "de", "en"]), batch_size=2)
    assert next(answers).lang == "en" and taken == [0, 1]
    rest = list(answers)
    assert isinstance(rest[0], DataError) and [each.lang for each in rest[1:]] == ["en", "de", "en"]


# --- pictures ---


def test_a_picture_that_changed_is_looked_at_again(trained, world, tmp_path):
    model = VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")
    path, sentence = tmp_path / "now.png", "The square is red."
    assert "no such image" in str(model.predict([(path, sentence)])[0])
    scores = []
    for number, image in enumerate(world / "images" / f"test{n}.png" for n in (0, 1)):
        shutil.copy(image, path)
        os.utime(path, ns=(number, number))
        scores.append(model(path, sentence).probabilities)
        assert scores[-1] == pytest.approx(model(image, sentence).probabilities, rel=1e-4)
    assert scores[0] != pytest.approx(scores[1], rel=1e-4)


def test_what_is_no_file_is_not_waited_for(trained, tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    model = VisualEntailment.from_pretrained(trained, device="cpu", precision="fp32")
    for name, reason in (
        ("fifo.png", "not a regular file"),
        (".", "not a regular file"),
        ("a.eps", "damaged or not an image"),
        ("no\0where", "null byte"),
        ("x" * 5000, "too long"),
        ("\ud83d", "surrogates not allowed"),
    ):
        assert reason in str(model.predict([(tmp_path / name, "The square is red.")])[0])


_RED = np.full((6, 5, 3), (250, 20, 20), dtype=np.uint8)


def _png(image=None):
    content = io.BytesIO()
    (image or Image.fromarray(_RED)).save(content, "PNG")
    return content.getvalue()


def test_pictures_need_not_be_paths(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(_png())
    with path.open("rb") as file:
        sources = [path, str(path), file, _png(), io.BytesIO(_png()), Image.fromarray(_RED), _RED]
        answers = [VisualEntailment(FakeModel(), "en")(source, "It is red.") for source in sources]
    for answer in answers:
        assert answer.probabilities == pytest.approx(answers[0].probabilities)
    assert [answer.image for answer in answers] == [str(path)] * 3 + ["the image"] * 4


class _Numbered(io.BytesIO):
    """As `os.fdopen` opens a file."""

    name = 7


@pytest.mark.parametrize(
    "source",
    [b"\x89PNG" + bytes(5000), io.StringIO("text"), None, 3, np.zeros((2, 2)), _png()[:40],
     Image.new("RGB", (2001, 20)), io.BytesIO(b"text"), _Numbered(b"text")],
    ids=["bytes", "text file", "none", "number", "floats", "cut", "long", "stream", "descriptor"],
)  # fmt: skip
def test_an_error_does_not_print_the_picture(source):
    error = VisualEntailment(FakeModel(), "en").predict([(source, "It is red.")])[0]
    assert isinstance(error, DataError) and len(str(error)) < 300
    assert str(error).startswith("the image: ") and "\\x89" not in str(error)
    assert "object at 0x" not in str(error)


def test_each_pair_may_have_its_language():
    model = VisualEntailment(FakeModel(), None)
    answers = model.predict([(_RED, "It is red."), (_RED, "Das ist rot.")], lang=["en", "de"])
    assert [answer.lang for answer in answers] == ["en", "de"]
    assert model(_RED, "Das ist rot.", lang="de").model == "runs/align-de"
    for lang, message in [(None, "lang None: expected a loaded language"), ("fr", "lang 'fr'"),
                          (["en", "de"], "2 languages for 1 pairs")]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            model.predict([(_RED, "It is red.")], lang)


def test_a_long_thin_picture_costs_its_row_only(trained, tmp_path, world, data, refused):
    """Scaled up to CLIP's shortest side of 224, it would have a thousand million pixels."""
    (tmp_path / "long.png").write_bytes(_png(Image.new("L", (20_000, 1))))
    good = str(world / "images" / "test0.png")
    rows = [{"image": image, "hypothesis": "Das ist rot."} for image in ("long.png", good)]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = predict_file(_config(trained), source, tmp_path / "answers.jsonl")
    assert (done.num_predicted, done.num_errors) == (1, 1)
    message = "20000 × 1 pixels; expected a picture whose long side is at most 100 times"
    assert f"long.png: {message}" in done.first_error
    shutil.copy(tmp_path / "long.png", data / "images" / "test0.png")
    assert message in refused("evaluate", "--data", data, "--runs", trained)


# --- models and sentences that do not fit ---


def test_what_is_no_number_is_no_answer(runs, world, tmp_path, refused):
    """Weights that are finite, and overflow when they are multiplied."""
    from safetensors.torch import load_file, save_file

    path = runs / "clip-ve" / "head.safetensors"
    weights = load_file(path)
    for name in ("layers.0.weight", "layers.2.weight"):
        weights[name] *= 1e30
    save_file(weights, path)
    reseal(runs / "clip-ve", "clip-ve")
    image = world / "images" / "test0.png"
    message = "probabilities are not finite"
    assert message in refused("predict", image, "The square is red.", "--runs", runs, "--json")
    write_jsonl(tmp_path / "pairs.jsonl", [{"image": str(image), "hypothesis": "Red."}])
    target = tmp_path / "answers.jsonl"
    with pytest.raises(DataError, match=message):
        predict.run(_config(runs, lang=None), source=tmp_path / "pairs.jsonl", target=target)
    assert message in read_jsonl(target)[0]["error"]


def test_a_sentence_in_another_script_gets_a_warning(trained, world, tmp_path, clseave):
    image, sentence = world / "images" / "test0.png", "赤い円があります。"
    expected = "the sentence is not in the script of en; check the language."
    code, out, err = clseave("predict", image, sentence, "--runs", trained, "--json")
    assert code == 0 and json.loads(out)["warning"] == expected
    assert [line for line in err.splitlines() if "warning" in line] == [f"warning: {expected}"]
    with pytest.warns(UserWarning, match=expected):
        VisualEntailment.from_pretrained(trained)(image, sentence)
    write_jsonl(tmp_path / "pairs.jsonl", [{"image": str(image), "hypothesis": sentence}])
    target = tmp_path / "answers.jsonl"
    code, _, err = clseave("predict", "--input", tmp_path / "pairs.jsonl", "--output", target,
                           "--runs", trained)  # fmt: skip
    assert f"1 answers with a `warning`: {expected}" in err
    assert read_jsonl(target)[0]["warning"] == expected


@needs_lingua
def test_a_sentence_in_another_language_gets_a_warning():
    model = VisualEntailment(FakeModel(), "en")
    with pytest.warns(UserWarning, match="seems to be in fr, not in en"):
        model(_RED, "Un chien attend dehors sous la pluie.")
    for sentence in ("A dog waits outside.", "The square is red.", "Bill plays chess.", "1, 2!"):
        assert model(_RED, sentence).warning is None


# --- streams ---


def test_streams_that_lack_letters_a_reader_or_are_closed(trained, world, runs, tmp_path):
    """Through real processes: the shell's redirections are what is tested."""
    other = tmp_path / "modèle-日本"
    runs.rename(other)
    image = world / "images" / "test0.png"
    rows = [{"image": str(image), "hypothesis": "Das Quadrat ist rot. 赤"}] * 3
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    clseave = f"{sys.executable} -m clseave_cli predict --lang de --runs {other}"
    for tail, code, message in [
        (f"{image} 'Das Quadrat ist rot.'", 0, b""),
        (f"--input {tmp_path}/pairs.jsonl --output - | head -1", 0, b""),
        ("--input - --output x <&-", 2, b"--input -: the stream is closed"),
        (f"--input {tmp_path}/pairs.jsonl --output - >&-", 2, b"--output -: the stream is closed"),
    ]:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{clseave} {tail}"], capture_output=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(_REPOSITORY), "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert done.returncode == code and message in done.stderr, done.stderr
        assert b"Traceback" not in done.stderr and b"internal error" not in done.stderr


# --- languages and students ---


def test_a_student_is_known_by_its_config_not_its_folder(runs, world, refused):
    (runs / "align-de").rename(runs / "my-german")
    (runs / ".align-de.x1").symlink_to(runs / "my-german")
    for name, config in (("encoder", b'{"model_type": "bert"}'), ("rubbish", b"\xff{")):
        (runs / name).mkdir()
        (runs / name / "config.json").write_bytes(config)
    assert find_students(runs) == {"de": runs / "my-german", "nl": runs / "align-nl"}
    image = world / "images" / "test0.png"
    answer = VisualEntailment.from_pretrained(runs, "de")(image, "Das Quadrat ist rot.")
    assert answer.model == str(runs / "my-german")
    error = refused("predict", "a.png", "x", "--lang", "ja", "--runs", runs)
    assert "no model for ja; available: en, de, nl" in error
    (runs / "align-x").mkdir()
    (runs / "align-x" / "config.json").write_text("{}")
    assert find_students(runs)["de"] == runs / "my-german"
    (runs / "align-nl" / "config.json").write_text("no JSON")
    error = refused("predict", image, "x", "--lang", "nl", "--runs", runs)
    assert "align-nl/config.json: damaged" in error


def test_of_several_languages_a_damaged_calibration_holds_up_only_one(runs, world, refused):
    pair = world / "images" / "test0.png", "Das Quadrat ist rot."
    model = VisualEntailment.from_pretrained(runs, lang=["de", "nl"], device="cpu")
    answers = model.predict([pair] * 2, ["de", "nl"])
    assert [answer.lang for answer in answers] == ["de", "nl"]
    assert answers[0].probabilities != answers[1].probabilities
    (runs / "align-nl" / "calibration.json").write_text("{}")
    assert VisualEntailment.from_pretrained(runs, ["de", "nl"])(*pair, lang="de").lang == "de"
    message = refused("predict", *pair, "--lang", "nl", "--runs", runs)
    assert "align-nl/calibration.json: damaged" in message


def test_a_student_needs_no_english_text_tower(runs, world):
    flip_byte(runs / "clip-ve" / "text" / "model.safetensors")
    before = tree(runs)
    pair = (world / "images" / "test0.png", "Das Quadrat ist rot.")
    assert VisualEntailment.from_pretrained(runs, "de")(*pair).lang == "de"
    with pytest.raises(Exception, match=r"text/model\.safetensors: damaged"):
        VisualEntailment.from_pretrained(runs)
    assert tree(runs) == before


@needs_lingua
def test_the_language_is_identified_among_those_there_are(trained, world, tmp_path, monkeypatch):
    loaded = record(monkeypatch, torch_model, "load_student", lambda folder, *_: folder.name)
    model = VisualEntailment.from_pretrained(trained, "auto", "cpu", "fp32")
    assert (model.lang, loaded) == ("auto", [])
    image = world / "images" / "test0.png"
    sentences = ["A dog waits outside in the rain.", "Draußen wartet ein Hund auf die Kinder.",
                 "The square is not red.", "Das Viereck ist nicht sehr rot."]  # fmt: skip
    answers = model.predict([(image, sentence) for sentence in sentences])
    assert [answer.lang for answer in answers] == ["en", "de", "en", "de"]
    assert loaded == ["align-de"]
    for answer, sentence in zip(answers, sentences, strict=True):
        alone = VisualEntailment.from_pretrained(trained, answer.lang, "cpu", "fp32")
        assert alone(image, sentence).probabilities == pytest.approx(answer.probabilities, rel=1e-4)
    with pytest.warns(UserWarning, match="seems to be in fr, not in"):
        french = model(image, "Un chien attend dehors sous la pluie.")
    assert french.lang in ("en", "de", "nl")


def test_without_the_extra_auto_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(ExtraMissing, match=r"pip install -e '.\[langid\]'"):
        VisualEntailment.from_pretrained(trained, "auto")
