from dataclasses import replace

import numpy as np
import pytest

from clseave_cli.core.metrics.bootstrap import compare_predictions
from clseave_cli.core.reporting.sections import build_sections, headline, highlights, verdict
from clseave_cli.core.results import across_seeds


def difference(first, second):
    return compare_predictions(first, second, np.arange(len(first)), resamples=300, seed=0)


def test_a_tie_is_called_a_tie():
    right = np.arange(200) % 4 > 0
    other = np.roll(right, 1)
    assert verdict(difference(right, other)) == "tie"
    assert verdict(difference(right, np.zeros(200))) == "higher"
    assert verdict(difference(np.zeros(200), right)) == "lower"
    assert verdict(None) == "–"


def test_the_headline_names_ties_and_the_lowest(results):
    tie = results.results[1].difference_to_english
    level = replace(results.results[2], difference_to_english=tie)
    found = headline(replace(results, results=(*results.results[:2], level, results.results[5])))
    assert "German and Dutch are level with it" in found
    assert "Korean is lowest" in found
    assert headline(replace(results, results=())) == "Nothing was evaluated."
    alone = headline(replace(results, results=results.results[3:5]))
    assert alone.startswith("Japanese is highest")


def test_highlights(results):
    shown = {highlight.label: highlight.value for highlight in highlights(results)}
    assert shown["English"] == f"{100 * results.results[0].accuracy:.1f} %"
    assert shown["Without looking"] == "41.2 %"
    assert shown["Level with English"].endswith(" of 5")


def test_sections_show_what_was_measured(results, curves):
    several = replace(results, seeds=across_seeds([results, results]))
    sections = build_sections(several, tuple(curves), ["curves-align", "distances"])
    assert [section.title for section in sections] == [
        "Accuracy by language",
        "Against English",
        "Did it look?",
        "By label",
        "Calibration",
        "Transfer",
        "Linguistic distance",
        "Over seeds",
        "Learning curves",
    ]
    assert [figure.name for figure in sections[-1].figures] == ["curves-align"]
    for section in sections:
        for table in section.tables:
            assert {len(row) for row in table.rows} == {len(table.columns)}


def test_gain_over_the_best_baseline_worked_by_hand(results):
    german = replace(results.results[1], accuracy=0.7319)
    (row,) = build_sections(replace(results, results=(german,)), (), [])[2].tables[0].rows
    # 73.19 − 41.2 = 31.99.
    assert row[:6] == ("German", "73.2", "33.4", "41.2", "37.1", "+32.0")


def test_minus_signs_are_minus_signs(results):
    (table,) = build_sections(results, (), [])[1].tables
    assert any(row[3].startswith("−") for row in table.rows)
    assert not any("-" in row[3] for row in table.rows)


def test_modes_are_told_apart(results):
    german = results.results[1]
    both = replace(results, results=(german, replace(german, mode="translate-test")))
    rows = build_sections(both, (), [])[0].tables[0].rows
    assert [row[0] for row in rows] == ["German (zero-shot)", "German (translate-test)"]


@pytest.mark.parametrize("num_languages", [1, 3])
def test_few_languages(results, num_languages):
    few = replace(results, results=results.results[:num_languages])
    assert build_sections(few, (), [])
