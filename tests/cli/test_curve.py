"""`clseave curve`: its points are ordinary students, kept once measured, and told in three ways."""

import json
import re

import pytest
from PIL import Image
from tiny_world import read_jsonl, write_jsonl

from clseave_cli.core.config import AlignConfig, EvaluateConfig
from clseave_cli.core.evaluation.curve import DataCurves, DataPoint
from clseave_cli.core.evaluation.run import evaluate


@pytest.fixture
def arguments(world, runs, encoder):
    return [
        "curve", "--data", world, "--runs", runs, "--student", encoder, "--limit", 2,
        "--epochs", 2, "--batch-size", 4, "--learning-rate", "2e-3", "--device", "cpu",
        "--precision", "fp32", "--resamples", 20,
    ]  # fmt: skip


def test_points_are_those_of_align_and_evaluate(world, runs, encoder, arguments, clseave, tmp_path):
    both = [*arguments, "--lang", "de", "--lang", "nl", "--together", "--limit", 99]
    code, out, err = clseave(*both, "--json", "--keep-models")
    assert code == 0, err
    document = json.loads(out)
    points = {(p["lang"], "+".join(p["languages"]), p["num_sentences"]): p
              for p in document["points"]}  # fmt: skip
    assert set(points) == {
        (lang, languages, number)
        for lang in ("de", "nl")
        for languages in (lang, "de+nl")
        for number in (2, 5)
    }
    assert re.search(
        r"clseave \S+ · teacher \w{8} · snli_ve_train.jsonl \w{8} · .*snli_ve_test.nl.jsonl \w{8}"
        r" · fp32 on cpu · seed 0 · 20 resamples by photo$", document["signature"],
    )  # fmt: skip
    with Image.open(runs / "curve" / "curve.png") as figure:
        assert figure.info["Description"] == document["signature"]
    # The same by hand.
    from clseave_cli.core.alignment import align

    students = tmp_path / "by hand"
    align(
        AlignConfig(
            data=str(world), runs=runs, lang=("de", "nl"), student=str(encoder), epochs=2,
            batch_size=4, learning_rate=2e-3, device="cpu", precision="fp32", limit=2,
            out=students / "x",
        )
    )  # fmt: skip
    found = evaluate(
        EvaluateConfig(
            data=str(world), runs=(runs,), students=students, lang=("nl",), resamples=20,
            device="cpu", precision="fp32",
        )
    )  # fmt: skip
    own = points["nl", "de+nl", 2]
    assert own["accuracy"] == found.results[0].accuracy
    assert (own["accuracy_low"], own["accuracy_high"]) == (
        found.results[0].accuracy_low, found.results[0].accuracy_high,
    )  # fmt: skip
    model = runs / "curve" / "de+nl-2" / "align-de+nl"
    assert (model / "projection.safetensors").read_bytes() == (
        students / "x" / "projection.safetensors"
    ).read_bytes()
    assert own["dev"]["mse"] != points["de", "de+nl", 2]["dev"]["mse"]

    # What is there is kept, also by a call that asks for more.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("point.json")}
    code, text, err = clseave(*both, "--limit", 3)
    assert code == 0 and err.count("already measured") == 6
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("point.json")}
    assert before.items() <= after.items() and len(after) == 9
    assert "de of de+nl" in text and "sentences" in text
    assert (runs / "curve" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "| 3 |" in (runs / "curve" / "curve.md").read_text()
    # The three students of the first call are kept, those of the last one are not.
    assert not (runs / "curve" / "de-3" / "align-de").exists() and model.exists()


def test_other_options_or_data_are_refused(data, arguments, clseave, refused, runs):
    arguments = [*arguments, "--lang", "de", "--data", data]
    assert clseave(*arguments)[0] == 0
    error = refused(*arguments, "--epochs", 3, code=2)
    assert "was run with epochs = 2, not 3" in error
    rows = read_jsonl(data / "snli_ve_test.de.jsonl")
    write_jsonl(data / "snli_ve_test.de.jsonl", rows[1:])
    assert "snli_ve_test.de.jsonl" in refused(*arguments, code=2)


def test_text_alone_has_dev_figures(data, arguments, clseave):
    (data / "images").rename(data / "elsewhere")
    code, out, err = clseave(*arguments, "--lang", "nl", "--data", data, "--json")
    assert code == 0 and "no test rows with images; dev figures alone" in err
    document = json.loads(out)
    assert document["english"] is None
    assert [p["accuracy"] for p in document["points"]] == [None, None]
    assert all("recall_at_10" in p["dev"] for p in document["points"])


def test_what_cannot_be_drawn_is_told(arguments, refused, tmp_path):
    assert "--lang is missing" in refused(*arguments, code=2)
    assert "--limit 0: expected at least 1" in refused(
        *arguments, "--lang", "de", "--limit", 0, code=2
    )
    assert "evaluate finds it as clip-ve only" in refused(
        *arguments, "--lang", "de", "--teacher", tmp_path, code=2
    )


def test_the_table_is_of_the_figure_every_point_has():
    def point(number, test, *languages, **dev):
        figures = {"recall_at_10": 0.25, **dev}
        return DataPoint("de", languages or ("de",), number, figures, 1.0, test)

    curves = DataCurves(
        (point(100, 0.5), point(20, 0.4), point(100, 0.6, "de", "nl")), "test", 0.9, "s"
    )
    assert curves.series == ["de", "de of de+nl"]
    assert curves.rows() == [["20", "40.0", "–"], ["100", "50.0", "60.0"]]
    partly = DataCurves((point(100, 0.5), point(20, None)), "test", None, "s")
    assert partly.rows() == [["20", "25.0"], ["100", "25.0"]]
    on_dev = DataCurves((point(100, None, accuracy=0.7),), "test", None, "s")
    assert on_dev.rows() == [["100", "70.0"]]
