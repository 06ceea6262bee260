from dataclasses import replace

import numpy as np
import pytest

from clseave_cli.core.evaluation.metrics import Interval, compare_predictions
from clseave_cli.core.evaluation.metrics import ClassScores
from clseave_cli.core.evaluation.summary import (
    build_sections,
    headline,
    highlights,
    notes,
    verdict,
)
from clseave_cli.core.evaluation.report.trainings import means
from clseave_cli.core.evaluation.results import TRAINING_ROWS, Baselines, across_seeds


def difference(first, second):
    return compare_predictions(first, second, np.arange(len(first)), resamples=300, seed=0)


def test_a_tie_is_called_a_tie():
    right = np.arange(200) % 4 > 0
    other = np.roll(right, 1)
    assert verdict(difference(right, other)) == "tie"
    assert verdict(difference(right, np.zeros(200))) == "higher"
    assert verdict(difference(np.zeros(200), right)) == "lower"
    assert verdict(None) == "–"


def measured(result, value, low, high):
    """A result with that paired difference to English."""
    return replace(
        result,
        difference_to_english=replace(
            result.difference_to_english, value=value, low=low, high=high
        ),
    )


@pytest.fixture
def figures(results):
    """English at 73.2 %, and five languages to give differences to."""
    english = replace(results.results[0], accuracy=0.7317, accuracy_low=0.7252)
    return replace(results, results=(english, *results.results[1:]))


def test_the_headline_ranks_no_ties(figures):
    english, german, dutch, japanese, chinese, _ = figures.results
    level = measured(german, -0.001, -0.004, 0.002), measured(japanese, 0.003, -0.001, 0.006)
    found = headline(replace(figures, results=(english, *level)))
    assert found == (
        "English reaches 73.2 %. German and Japanese are level with it, within the uncertainty."
    )
    others = measured(dutch, -0.018, -0.02, -0.01), measured(chinese, -0.032, -0.04, -0.02)
    better = measured(figures.results[5], 0.011, 0.002, 0.02)
    found = headline(replace(figures, results=(english, level[0], *others, better)))
    assert found == (
        "English reaches 73.2 %. German is level with it, within the uncertainty. "
        "Dutch and Chinese are lower, by 1.8 and 3.2 points. Korean is higher, by 1.1 points."
    )
    many = [replace(level[0], lang=f"x{number}") for number in range(9)]
    found = headline(replace(figures, results=(english, *many, others[0])))
    assert "9 of 10 others are level with it, within the uncertainty. Dutch is lower" in found
    assert headline(replace(figures, results=())) == "Nothing was evaluated."


def test_the_headline_without_english(figures):
    german, dutch = figures.results[1:3]
    german = replace(german, accuracy=0.7, accuracy_low=0.68)
    dutch = replace(dutch, accuracy=0.71, accuracy_low=0.69)
    found = headline(replace(figures, results=(german, dutch)))
    assert found == "German and Dutch reach 70.0 % and 71.0 %."
    several = [replace(r, accuracy=0.7, accuracy_low=0.6) for r in figures.results[2:]]
    found = headline(replace(figures, results=(dutch, *several)))
    assert found == "5 results lie between 70.0 and 71.0 %."
    # Both modes: what of the two is better is what was asked.
    tie, worse = (
        replace(german.difference_to_english, value=value, low=low, high=high)
        for value, low, high in ((0.01, -0.01, 0.03), (-0.021, -0.03, -0.01))
    )
    modes = {
        "de.translate-test": replace(german, mode="translate-test", difference_to_zero_shot=tie),
        "nl.translate-test": replace(dutch, mode="translate-test", difference_to_zero_shot=worse),
    }
    baselines = figures.baselines | {key: figures.baselines["de"] for key in modes}
    both = replace(figures, results=(german, dutch, *modes.values()), baselines=baselines)
    assert headline(both) == (
        "4 results lie between 70.0 and 71.0 %. Translate-test against zero-shot: German is level, "
        "within the uncertainty. Dutch is lower, by 2.1 points."
    )


def test_the_headline_says_where_looking_did_not_help(figures):
    def told(accuracy, low, **baselines):
        own = replace(figures.results[0], accuracy=accuracy, accuracy_low=low)
        return headline(replace(figures, results=(own,), baselines={"en": Baselines(**baselines)}))

    # NLVR: of two labels one is the more frequent.
    assert told(0.442, 0.411, majority=0.562, hypothesis_only=0.561, shuffled_image=0.429) == (
        "English reaches 44.2 %. English is no better than what is reached without looking at the "
        "photo: 56.2 % (majority label)."
    )
    close = told(0.58, 0.55, majority=0.562)
    assert "English is, within the uncertainty, no better than" in close
    assert told(0.5, None, majority=0.562).endswith("56.2 % (majority label).")
    sure, unmeasured = told(0.6, 0.57, majority=0.562), told(0.6, None, majority=0.562)
    for fine in (sure, unmeasured, told(0.1, 0.05)):
        assert "looking" not in fine


@pytest.fixture
def trainings(results):
    """Three trainings; English at 70, 80 and 90 %, German two points lower each time."""
    runs = []
    for accuracy in (0.7, 0.8, 0.9):
        english, german = (
            replace(result, accuracy=accuracy - lost)
            for result, lost in zip(results.results[:2], (0, 0.02), strict=True)
        )
        german = measured(german, -0.02, -0.03, 0.01)
        runs.append(replace(results, results=(english, german), distances=None))
    intervals = {
        "en": {"accuracy": Interval(0.8, 0.77, 0.83)},
        "de": {
            "accuracy": Interval(0.78, 0.75, 0.81),
            "difference_to_english": Interval(-0.02, -0.028, -0.012),
        },
    }
    return replace(runs[0], seeds=across_seeds(runs, intervals))


def test_several_trainings_are_shown_by_their_means(trainings):
    assert headline(trainings) == (
        "English reaches 80.0 %, the mean of 3 trainings (± 10.0). German is lower, by 2.0 points."
    )
    tiles = {tile.label: (tile.value, tile.note) for tile in highlights(trainings)}
    assert tiles["English"] == (
        "80.0 %", "± 10.0, mean of 3 trainings; 95 % interval 77.0 – 83.0",
    )  # fmt: skip
    assert tiles["Other languages"] == ("78.0 %", "de; mean of 3 trainings")
    assert tiles["Level with English"][0] == "0 of 1"
    (note,) = notes(trainings)
    assert note.startswith("Of 3 trainings") and "those of the first training" in note
    over, accuracy, *_ = build_sections(trainings, (), [])
    assert (over.title, accuracy.title) == (
        "Over seeds", "Accuracy by language, first training",
    )  # fmt: skip
    assert [figure.name for figure in over.figures] == ["languages"] and not accuracy.figures
    assert "mean of 3 trainings" in over.figures[0].caption
    assert over.tables[1].rows == (("German", "English", "−2.0 ± 0.0", "−2.8 to −1.2", "lower"),)
    # The tables of the first are those of the first.
    assert accuracy.tables[0].rows[0][3] == "70.0"


def test_a_language_that_not_all_trainings_have_is_told(trainings):
    seeds = {key: figures for key, figures in trainings.seeds.items() if key == "en"}
    partly = replace(trainings, seeds=seeds)
    assert notes(partly)[1] == "Not every training has German: figures of the first throughout."
    assert means(partly).results[1] == trainings.results[1]


def test_one_training_is_its_own_mean(results):
    assert means(results) == results and notes(results) == ()


def test_rows_of_training_are_told(results):
    signature = replace(results.signature, training=results.signature.data)
    assert notes(replace(results, signature=signature)) == (TRAINING_ROWS,)


def test_english_alone_is_not_compared_with_itself(results):
    alone = replace(results, results=results.results[:1], distances=None)
    assert alone.results[0].agreement_with_english == 1
    assert "Against English" not in [s.title for s in build_sections(alone, (), [])]


def test_a_label_that_no_row_has_is_told(results):
    english = results.results[0]
    per_class = english.per_class | {"neutral": ClassScores(0.0, 0.0, 0.0, 0)}
    two = replace(results, results=(replace(english, per_class=per_class),), distances=None)
    accuracy, _, labels, _ = build_sections(two, (), [])
    assert "No row has the gold label neutral: macro-F1 counts a 0 for it." in accuracy.text
    assert "No row has the gold label neutral: there is no recall" in labels.text
    assert labels.tables[0].rows[0][4:7] == ("0.0", "–", "0.0")
    for section in build_sections(results, (), []):
        assert "No row has" not in section.text


def test_grouped_heads_in_one_line(results):
    table = build_sections(results, (), [])[3].tables[0]
    assert table.full_columns[:4] == ("language", "entailment P", "entailment R", "entailment F1")
    assert sum(width for _, width in table.groups) == len(table.columns)


def test_highlights(results):
    shown = {highlight.label: highlight.value for highlight in highlights(results)}
    assert shown["English"] == f"{100 * results.results[0].accuracy:.1f} %"
    assert shown["Without looking"] == "41.2 %"
    assert shown["Level with English"].endswith(" of 5")


def test_sections_show_what_was_measured(results, curves):
    several = replace(results, seeds=across_seeds([results, results]))
    sections = build_sections(several, tuple(curves), ["curves-align", "distances"])
    assert [section.title for section in sections] == [
        "Over seeds",
        "Accuracy by language, first training",
        "Against English",
        "Did it look?",
        "By label",
        "Calibration",
        "Transfer",
        "Linguistic distance",
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
