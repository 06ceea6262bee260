"""`clseave curve`: its points are ordinary students, kept once measured."""

import json
import re

import pytest
from PIL import Image
from tiny_world import read_jsonl, write_jsonl

from clseave_cli.core.config import AlignConfig, CurveConfig, EvaluateConfig
from clseave_cli.core.evaluation.curve import data_curves
from clseave_cli.core.evaluation.figures import DataCurves, DataPoint
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.errors import UsageError


@pytest.fixture
def arguments(world, runs, encoder, tmp_path):
    options = tmp_path / "align.toml"
    options.write_text(
        'epochs = 2\nbatch_size = 4\nlearning_rate = 2e-3\nprecision = "fp32"\nresamples = 20\n'
    )
    return [
        "curve", "--data", world, "--runs", runs, "--student", encoder, "--limit", 2,
        "--device", "cpu", "--config", options,
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
        r" · seed 0 · 20 resamples by photo$", document["signature"],
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
    english, dutch = evaluate(
        EvaluateConfig(
            data=str(world), runs=(runs,), students=students, lang=("en", "nl"), resamples=20,
            device="cpu", precision="fp32",
        )
    ).results  # fmt: skip
    point = points["nl", "de+nl", 2]
    assert document["english"] == english.accuracy
    for key in ("accuracy", "accuracy_low", "accuracy_high"):
        assert point[key] == getattr(dutch, key)
    (model,) = (runs / "curve").glob("de+nl-2-*/align-de+nl")
    assert (model / "projection.safetensors").read_bytes() == (
        students / "x" / "projection.safetensors"
    ).read_bytes()
    assert point["dev"]["mse"] != points["de", "de+nl", 2]["dev"]["mse"]

    # What is there is kept, also by a call that asks for more.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("point.json")}
    code, text, err = clseave(*both, "--limit", 3)
    assert code == 0 and err.count("already measured") == 6
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("point.json")}
    assert before.items() <= after.items() and len(after) == 9
    assert "de of de+nl" in text and "sentences" in text
    assert (runs / "curve" / "curve.png").read_bytes().startswith(b"\x89PNG")
    # The three students of the first call are kept, those of the last one are not.
    assert not list((runs / "curve").glob("de-3-*/align-de")) and model.exists()


def test_other_options_or_data_make_other_points(data, arguments, clseave, runs):
    arguments = [*arguments, "--lang", "de", "--data", data]
    assert clseave(*arguments)[0] == 0
    assert clseave(*arguments, "--device", "auto")[2].count("already measured") == 2
    code, _, err = clseave(*arguments, "--seed", 1)
    assert code == 0 and "already measured" not in err
    rows = read_jsonl(data / "snli_ve_test.de.jsonl")
    write_jsonl(data / "snli_ve_test.de.jsonl", rows[1:])
    assert "already measured" not in clseave(*arguments)[2]
    assert len(list((runs / "curve").glob("de-2-*"))) == 3
    options = arguments[arguments.index("--config") + 1]
    options.write_text(f'{options.read_text()}init_from = "{runs / "align-nl"}"\n')
    assert "already measured" not in clseave(*arguments)[2]
    (runs / "align-nl").rename(runs / "elsewhere")
    (runs / "align-de").rename(runs / "align-nl")  # another student in its place
    assert "already measured" not in clseave(*arguments)[2]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("images", "no image folder in it"), ("labels", "snli_ve_test.nl.jsonl:1")],
)
def test_rows_that_cannot_be_measured_are_noted_before_training(
    data, arguments, clseave, missing, reason
):
    """`align` takes text without images and labels."""
    if missing == "images":
        (data / "images").rename(data / "elsewhere")
    else:
        for path in data.glob("snli_ve_*.nl.jsonl"):
            for row in (rows := read_jsonl(path)):
                del row["gold_label"]
            write_jsonl(path, rows)
    code, out, err = clseave(*arguments, "--lang", "nl", "--data", data, "--json")
    assert code == 0, err
    assert reason in err.partition("align nl")[0] and "measured on dev alone" in err
    document = json.loads(out)
    assert document["english"] is None
    assert [p["accuracy"] for p in document["points"]] == [None, None]
    assert all("recall_at_10" in p["dev"] for p in document["points"])


def test_a_curve_that_cannot_be_drawn_is_refused(arguments, refused, tmp_path):
    assert "--lang is missing" in refused(*arguments, code=2)
    arguments += ["--lang", "de"]
    assert "--limit 0: expected at least 1" in refused(*arguments, "--limit", 0, code=2)
    error = refused(*arguments, "--epochs", 3, code=2)
    assert "--epochs was removed: put epochs into a --config FILE.toml." in error
    assert "--lang" not in CurveConfig.REMOVED
    with pytest.raises(UsageError, match="takes the clip-ve in --runs"):
        data_curves(CurveConfig(lang=("de",), runs=arguments[4], teacher=tmp_path))


def test_lines_are_of_the_metric_that_every_point_has():
    def point(number, test, *languages, **dev):
        metrics = {"recall_at_10": 0.25, **dev}
        return DataPoint("de", list(languages or ("de",)), number, metrics, 1.0, test, test, test)

    def shown(*points):
        lines = DataCurves("test", 0.9, list(points), "s").lines()
        return {name: [(n, pytest.approx(y)) for n, y, *_ in line] for name, line in lines.items()}

    points = point(100, 0.5), point(20, 0.4), point(100, 0.6, "de", "nl")
    assert shown(*points) == {"de": [(20, 40.0), (100, 50.0)], "de of de+nl": [(100, 60.0)]}
    assert shown(point(100, 0.5), point(20, None)) == {"de": [(20, 25.0), (100, 25.0)]}
    assert shown(point(100, None, accuracy=0.7)) == {"de": [(100, 70.0)]}
