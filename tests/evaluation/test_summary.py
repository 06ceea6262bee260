from dataclasses import replace

import numpy as np

from clseave_cli.core.evaluation.metrics import compare_predictions
from clseave_cli.core.evaluation.results import Baselines, means
from clseave_cli.core.evaluation.summary import headline, highlights, notes, verdict


def test_a_tie_is_called_a_tie():
    right, wrong = np.arange(200) % 4 > 0, np.zeros(200)
    pairs = {"tie": (right, np.roll(right, 1)), "higher": (right, wrong), "lower": (wrong, right)}
    for word, (first, second) in pairs.items():
        difference = compare_predictions(first, second, np.arange(200), resamples=300, seed=0)
        assert verdict(difference) == word
    assert verdict(None) == "–"


def measured(result, value, low, high, **changes):
    """A result with that paired difference to English."""
    difference = replace(result.difference_to_english, value=value, low=low, high=high)
    agreement = {"agreement_with_english": 0.958, "kappa_with_english": 0.937}
    return replace(result, difference_to_english=difference, **agreement | changes)


def test_the_headline_ranks_no_ties(results):
    english = replace(results.results[0], accuracy=0.7317, accuracy_low=0.7252)
    german, dutch, japanese, chinese, korean = results.results[1:]
    tied = measured(german, -0.001, -0.004, 0.002), measured(japanese, 0.003, -0.001, 0.006)
    worse = measured(dutch, -0.018, -0.02, -0.01), measured(chinese, -0.032, -0.04, -0.02)
    better = measured(korean, 0.011, 0.002, 0.02)

    def line(*others):
        return headline(replace(results, results=(english, *others)))

    assert line(*tied) == (
        "English reaches 73.2 %. German and Japanese are tied with it (same label on 95.8 % of the "
        "rows, κ 0.94)."
    )
    assert line(tied[0], *worse, better) == (
        "English reaches 73.2 %. German is tied with it (same label on 95.8 % of the "
        "rows, κ 0.94). Dutch and Chinese are lower, by 1.8 and 3.2 "
        "points. Korean is higher, by 1.1 points."
    )
    many = [replace(tied[0], lang=f"x{number}") for number in range(9)]
    assert "9 of 10 others are tied with it (same" in line(*many, worse[0])
    assert headline(replace(results, results=())) == "Nothing was evaluated."


def test_the_headline_without_english(results):
    german, dutch = results.results[1:3]
    german = measured(german, 0, -0.1, 0.1, accuracy=0.7, accuracy_low=0.68)
    dutch = measured(dutch, -0.02, -0.03, -0.01, accuracy=0.71, accuracy_low=0.69)
    assert headline(replace(results, results=(german, dutch))) == (
        "German and Dutch reach 70.0 % and 71.0 %. German is tied with English "
        "(same label on 95.8 % of the rows, κ 0.94). Dutch is lower, by 2.0 points."
    )
    several = [replace(r, accuracy=0.7, accuracy_low=0.6) for r in results.results[2:]]
    line = headline(replace(results, results=(dutch, *several)))
    assert line.startswith("5 results lie between 70.0 and 71.0 %. ")
    # Both modes: what of the two is better is what was asked.
    modes = tuple(
        replace(
            each, mode="translate-test",
            difference_to_zero_shot=replace(
                each.difference_to_english, value=value, low=low, high=high
            ),
        )
        for each, value, low, high in (
            (german, 0.01, -0.01, 0.03), (dutch, -0.021, -0.03, -0.01),
        )
    )  # fmt: skip
    baselines = results.baselines | {each.key: results.baselines["de"] for each in modes}
    both = replace(results, results=(german, dutch, *modes), baselines=baselines)
    assert headline(both) == (
        "4 results lie between 70.0 and 71.0 %. Translate-test against zero-shot: German is tied "
        "(same label on 95.8 % of the rows, κ 0.94). Dutch is lower, by 2.1 points."
    )


def test_the_headline_says_where_looking_did_not_help(results):
    def line(accuracy, low, **baselines):
        english = replace(results.results[0], accuracy=accuracy, accuracy_low=low)
        baselines = {"en": Baselines(**baselines)}
        return headline(replace(results, results=(english,), baselines=baselines))

    def paired(value, low, high):
        german = results.results[1].difference_to_english
        return replace(german, value=value, low=low, high=high)

    # NLVR: of two labels one is the more frequent.
    assert line(0.442, 0.411, majority=0.562, hypothesis_only=0.561, shuffled_image=0.429) == (
        "English reaches 44.2 %. English is no better than a baseline without the right "
        "photo: 56.2 % (majority label)."
    )
    worse, above = paired(-0.032, -0.048, -0.017), paired(0.012, 0.004, 0.021)
    lower = line(0.555, 0.54, hypothesis_only=0.587, difference_to_hypothesis_only=worse,
                 shuffled_image=0.543, difference_to_shuffled_image=above)  # fmt: skip
    assert lower.endswith(
        "English is worse than a baseline without the right photo: 58.7 % (hypothesis only; −3.2 "
        "points, −4.8 to −1.7)."
    )
    level = paired(-0.001, -0.01, 0.008)
    tied = line(0.586, 0.57, hypothesis_only=0.587, difference_to_hypothesis_only=level)
    assert "is no better than" in tied and "(hypothesis only; −0.1 points, −1.0 to +0.8)" in tied
    assert "English is not reliably better than" in line(0.58, 0.55, majority=0.562)
    assert line(0.5, None, majority=0.562).endswith("56.2 % (majority label).")
    for fine in ((0.6, 0.57, 0.562), (0.6, None, 0.562), (0.1, 0.05, None)):
        assert "better" not in line(*fine[:2], majority=fine[2])


def test_several_trainings_are_shown_by_their_means(trainings):
    assert headline(trainings) == (
        "English reaches 80.0 %, the mean of 3 trainings (± 10.0). German is lower, by 2.0 points."
    )
    tiles = {tile.label: (tile.value, tile.note) for tile in highlights(trainings)}
    assert tiles["English"] == ("80.0 %", "± 10.0, mean of 3 trainings; 95 % interval 77.0 – 83.0")
    assert tiles["Other languages"] == ("78.0 %", "de; mean of 3 trainings")
    assert tiles["Tied with English"][0] == "0 of 1"
    (note,) = notes(trainings)
    assert note.startswith("There are 3 trainings.") and "those of the first training" in note
    # A language that not all trainings have.
    partly = replace(trainings, seeds={"en": trainings.seeds["en"]})
    assert notes(partly)[1] == "Not every training has German: shown from the first throughout."
    assert means(partly).results[1] == trainings.results[1]


def test_one_training_is_its_own_mean(results):
    assert means(results) == results and notes(results) == ()
    tiles = {tile.label: tile.value for tile in highlights(results)}
    assert tiles["English"] == f"{100 * results.results[0].accuracy:.1f} %"
    assert tiles["Best baseline"] == "41.2 %"
    assert tiles["Tied with English"].endswith(" of 5")
