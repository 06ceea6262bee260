from dataclasses import replace

import numpy as np
import pytest

from clseave_cli.core.evaluation.metrics import compare_predictions
from clseave_cli.core.evaluation.results import Baselines, means
from clseave_cli.core.evaluation.summary import headline, highlights, notes, verdict


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
        agreement_with_english=0.958,
        kappa_with_english=0.937,
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
        "English reaches 73.2 %. German and Japanese are tied with it (same label on 95.8 % of the "
        "rows, κ 0.94)."
    )
    others = measured(dutch, -0.018, -0.02, -0.01), measured(chinese, -0.032, -0.04, -0.02)
    better = measured(figures.results[5], 0.011, 0.002, 0.02)
    found = headline(replace(figures, results=(english, level[0], *others, better)))
    assert found == (
        "English reaches 73.2 %. German is tied with it (same label on 95.8 % of the "
        "rows, κ 0.94). Dutch and Chinese are lower, by 1.8 and 3.2 "
        "points. Korean is higher, by 1.1 points."
    )
    many = [replace(level[0], lang=f"x{number}") for number in range(9)]
    found = headline(replace(figures, results=(english, *many, others[0])))
    assert "9 of 10 others are tied with it (same" in found
    assert headline(replace(figures, results=())) == "Nothing was evaluated."


def test_the_headline_without_english(figures):
    german, dutch = figures.results[1:3]
    german = replace(measured(german, 0, -0.1, 0.1), accuracy=0.7, accuracy_low=0.68)
    dutch = replace(measured(dutch, -0.02, -0.03, -0.01), accuracy=0.71, accuracy_low=0.69)
    found = headline(replace(figures, results=(german, dutch)))
    assert found == (
        "German and Dutch reach 70.0 % and 71.0 %. German is tied with English "
        "(same label on 95.8 % of the rows, κ 0.94). Dutch is lower, by 2.0 points."
    )
    several = [replace(r, accuracy=0.7, accuracy_low=0.6) for r in figures.results[2:]]
    found = headline(replace(figures, results=(dutch, *several)))
    assert found.startswith("5 results lie between 70.0 and 71.0 %. ")
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
        "4 results lie between 70.0 and 71.0 %. Translate-test against zero-shot: German is tied "
        "(same label on 95.8 % of the rows, κ 0.94). Dutch is lower, by 2.1 points."
    )


def test_the_headline_says_where_looking_did_not_help(figures):
    def told(accuracy, low, **baselines):
        own = replace(figures.results[0], accuracy=accuracy, accuracy_low=low)
        return headline(replace(figures, results=(own,), baselines={"en": Baselines(**baselines)}))

    # NLVR: of two labels one is the more frequent.
    assert told(0.442, 0.411, majority=0.562, hypothesis_only=0.561, shuffled_image=0.429) == (
        "English reaches 44.2 %. English is no better than a baseline without the right "
        "photo: 56.2 % (majority label)."
    )

    def paired(value, low, high):
        return replace(german.difference_to_english, value=value, low=low, high=high)

    german = figures.results[1]
    worse, above = paired(-0.032, -0.048, -0.017), paired(0.012, 0.004, 0.021)
    said = told(0.555, 0.54, hypothesis_only=0.587, difference_to_hypothesis_only=worse,
                shuffled_image=0.543, difference_to_shuffled_image=above)  # fmt: skip
    assert said.endswith(
        "English is worse than a baseline without the right photo: 58.7 % (hypothesis only; −3.2 "
        "points, −4.8 to −1.7)."
    )
    level = paired(-0.001, -0.01, 0.008)
    said = told(0.586, 0.57, hypothesis_only=0.587, difference_to_hypothesis_only=level)
    assert "is no better than" in said and "(hypothesis only; −0.1 points, −1.0 to +0.8)" in said
    close = told(0.58, 0.55, majority=0.562)
    assert "English is not reliably better than" in close
    assert told(0.5, None, majority=0.562).endswith("56.2 % (majority label).")
    sure, unmeasured = told(0.6, 0.57, majority=0.562), told(0.6, None, majority=0.562)
    for fine in (sure, unmeasured, told(0.1, 0.05)):
        assert "better" not in fine


def test_several_trainings_are_shown_by_their_means(trainings):
    assert headline(trainings) == (
        "English reaches 80.0 %, the mean of 3 trainings (± 10.0). German is lower, by 2.0 points."
    )
    tiles = {tile.label: (tile.value, tile.note) for tile in highlights(trainings)}
    assert tiles["English"] == (
        "80.0 %", "± 10.0, mean of 3 trainings; 95 % interval 77.0 – 83.0",
    )  # fmt: skip
    assert tiles["Other languages"] == ("78.0 %", "de; mean of 3 trainings")
    assert tiles["Tied with English"][0] == "0 of 1"
    (note,) = notes(trainings)
    assert note.startswith("There are 3 trainings.") and "those of the first training" in note


def test_a_language_that_not_all_trainings_have_is_told(trainings):
    seeds = {key: figures for key, figures in trainings.seeds.items() if key == "en"}
    partly = replace(trainings, seeds=seeds)
    assert notes(partly)[1] == "Not every training has German: shown from the first throughout."
    assert means(partly).results[1] == trainings.results[1]


def test_one_training_is_its_own_mean(results):
    assert means(results) == results and notes(results) == ()


def test_highlights(results):
    shown = {highlight.label: highlight.value for highlight in highlights(results)}
    assert shown["English"] == f"{100 * results.results[0].accuracy:.1f} %"
    assert shown["Best baseline"] == "41.2 %"
    assert shown["Tied with English"].endswith(" of 5")
