import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console
from tiny_world import read_jsonl, write_jsonl

from clseave_cli.commands.tables import comparison_table
from clseave_cli.core.evaluation.comparison import (
    PredictedRows,
    compare_reports,
    predicted_languages,
    read_predicted_rows,
)
from clseave_cli.errors import DataError

NUM_ROWS = 400


def rows(lang, accuracy, seed=0, start=0):
    """Simulated predictions: the labels are the same for every call, the errors are not."""
    labels = np.random.default_rng(99).integers(3, size=NUM_ROWS)
    generator = np.random.default_rng(seed)
    wrong = generator.random(NUM_ROWS) >= accuracy
    predicted = (labels + wrong * generator.integers(1, 3, size=NUM_ROWS)) % 3
    probabilities = generator.dirichlet([1, 1, 1], size=NUM_ROWS) * 0.4 + 0.6 * np.eye(3)[predicted]
    keep = slice(start, None)
    return PredictedRows(
        lang,
        [f"{index}#円" for index in range(NUM_ROWS)][keep],
        [f"{index // 4}.jpg" for index in range(NUM_ROWS)][keep],
        labels[keep],
        probabilities[keep],
    )


def test_write_and_read_back(tmp_path):
    written = rows("de", 0.7)
    path = written.write(tmp_path)
    assert path.name == "predictions.de.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["pairID", "image", "label", "predicted", "probabilities"]
    again = read_predicted_rows(tmp_path, "de")
    assert (again.lang, again.pair_ids, again.images) == ("de", written.pair_ids, written.images)
    for column in ("labels", "predicted", "probabilities"):
        assert np.array_equal(getattr(again, column), getattr(written, column))
    for lang in ("en", "ar"):
        rows(lang, 0.7).write(tmp_path)
    assert predicted_languages(tmp_path) == ["en", "ar", "de"]


@pytest.mark.parametrize(
    "changes",
    [
        {"label": None},
        {"label": "-"},
        {"probabilities": [0, 1]},
        {"probabilities": 1},
        {"probabilities": [float("nan"), 1, 0]},
        {"probabilities": [1, 0, 0]},  # of another label than predicted
        "{",
        "[]",
    ],
)
def test_a_damaged_line_is_named(tmp_path, changes):
    path = rows("de", 0.7).write(tmp_path)
    row = {"pairID": "x", "label": "neutral", "predicted": "neutral", "probabilities": [0, 1, 0]}
    line = changes if isinstance(changes, str) else json.dumps(row | changes)
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=rf"predictions\.de\.jsonl:{NUM_ROWS + 1}: expected pairID"):
        read_predicted_rows(tmp_path, "de")


def test_missing_or_repeated_predictions_are_named(tmp_path):
    with pytest.raises(DataError, match="write them with: clseave evaluate --report"):
        predicted_languages(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_predicted_rows(tmp_path, "de")
    path = rows("de", 0.7).write(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    with pytest.raises(DataError, match="'0#円' is there twice"):
        read_predicted_rows(tmp_path, "de")


@pytest.fixture
def reports(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    english, german, dutch = rows("en", 0.8), rows("de", 0.8, seed=1), rows("nl", 0.6, seed=1)
    first = (english, german, dutch, rows("ja", 0.7))
    german, dutch = rows("de", 0.5, seed=2, start=40), rows("nl", 0.9, seed=2)
    second = (english, german, dutch, rows("ko", 0.7))
    for folder, languages in zip(folders, (first, second), strict=True):
        for each in languages:
            each.write(folder)
    return folders


def test_compares_language_by_language_whatever_the_order_of_the_rows(reports):
    comparison = compare_reports(*reports, resamples=400)
    verdicts = {entry.lang: entry.verdict for entry in comparison.languages}
    assert verdicts == {"en": "tie", "de": "first", "nl": "second"}
    assert (comparison.missing_in_first, comparison.missing_in_second) == (["ko"], ["ja"])
    english, german, _ = comparison.languages
    assert (english.agreement, english.difference.value) == (1.0, 0.0)
    assert (german.num_examples, german.only_in_first, german.only_in_second) == (360, 40, 0)
    assert german.num_images == 90
    assert german.difference.value == pytest.approx(german.accuracy_first - german.accuracy_second)
    assert json.loads(json.dumps(asdict(comparison))) == asdict(comparison)
    path = reports[0] / "predictions.de.jsonl"
    write_jsonl(path, read_jsonl(path)[::-1])
    assert compare_reports(*reports, resamples=400) == comparison


def test_the_command_calls_a_tie_a_tie_and_names_what_only_one_of_them_has(reports, clseave):
    code, text, _ = clseave("compare", *reports, "--resamples", 400)
    assert code == 0 and "…" not in text
    by_language = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert by_language["en"].split()[-1] == "tie"
    assert by_language["de"].rstrip().endswith("A better")
    assert by_language["nl"].rstrip().endswith("B better")
    assert text.splitlines()[-2:] == ["only in A: ja", "only in B: ko"]


def test_both_signatures_are_told(reports, results):
    first, second = reports
    bare = compare_reports(first, second, resamples=10)
    assert (bare.signature_first, bare.signature_second) == (None, None)
    results.write(first)
    other = replace(results.signature, checkpoints={"[clip-ve]": "0123456789abcdef"})
    replace(results, signature=other).write(second)
    comparison = compare_reports(first, second, resamples=10)
    document = asdict(comparison)
    assert document["signature_first"] == results.to_json()["signature"]
    assert document["signature_second"]["checkpoints"] == {"[clip-ve]": "0123456789abcdef"}
    assert json.loads(json.dumps(document)) == document
    console = Console(width=400, file=io.StringIO())
    console.print(comparison_table(comparison, verbose=True))
    text = " ".join(console.file.getvalue().split())
    assert f"A: {results.signature} B: {other}" in text
    (second / "results.json").write_text('{"format": 0}')
    with pytest.raises(DataError, match=r"results\.json: not a results document"):
        compare_reports(first, second, resamples=10)


def test_refuses_what_cannot_be_compared(tmp_path):
    german = rows("de", 0.7)
    german.write(tmp_path / "a")
    rows("ja", 0.7).write(tmp_path / "b")
    for change, message in (
        ({"lang": "nl"}, "no language in common"),
        ({"pair_ids": [f"other-{pair_id}" for pair_id in german.pair_ids]}, "no pairID in common"),
        ({"images": ["else.jpg", *german.images[1:]]}, "'0#円' has another label or image"),
    ):
        replace(german, **change).write(tmp_path / "b")
        with pytest.raises(DataError, match=message):
            compare_reports(tmp_path / "a", tmp_path / "b")
