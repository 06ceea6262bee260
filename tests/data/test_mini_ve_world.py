"""Three-valued judgement, against a table worked by hand and against every filling."""

from itertools import combinations, product
from random import Random

import pytest

from clseave_cli.core.data.mini_ve.world import (
    COLORS,
    COUNTS,
    DESCRIPTIONS,
    GRID,
    ITEM_PAIRS,
    ITEMS,
    SHAPES,
    Absence,
    Conjunction,
    Count,
    Curtain,
    Description,
    Item,
    Presence,
    Scene,
)

RED_CIRCLE = Item("red", "circle")
BLUE_STAR = Item("blue", "star")
GREEN_SQUARE = Item("green", "square")

SHOWN = ((0, RED_CIRCLE), (5, BLUE_STAR))


@pytest.mark.parametrize(
    ("hypothesis", "open_label", "covered_label"),
    [
        (Presence(Description("red", "circle")), "entailment", "entailment"),
        (Presence(Description("red", None)), "entailment", "entailment"),
        (Presence(Description(None, "star")), "entailment", "entailment"),
        (Presence(Description("red", "star")), "contradiction", "neutral"),
        (Presence(Description(None, "heart")), "contradiction", "neutral"),
        (Absence(Description("red", "circle")), "contradiction", "contradiction"),
        (Absence(Description("red", "star")), "entailment", "neutral"),
        (Absence(Description("green", None)), "entailment", "neutral"),
        (Count(1), "contradiction", "contradiction"),
        (Count(2), "entailment", "neutral"),
        (Count(4), "contradiction", "neutral"),
        (Count(5), "contradiction", "contradiction"),
        (Conjunction(BLUE_STAR, RED_CIRCLE), "entailment", "entailment"),
        (Conjunction(RED_CIRCLE, GREEN_SQUARE), "contradiction", "neutral"),
        (Conjunction(Item("red", "star"), GREEN_SQUARE), "contradiction", "neutral"),
    ],
)
def test_labels_worked_by_hand(hypothesis, open_label, covered_label):
    assert hypothesis.judge(Scene(SHOWN)) == open_label
    assert hypothesis.judge(Scene(SHOWN, Curtain(2, 0, 2, 1))) == covered_label


def test_one_hidden_cell_cannot_make_up_for_two_missing_shapes():
    scene = Scene(SHOWN[:1], Curtain(3, 3, 1, 1))
    assert Conjunction(RED_CIRCLE, BLUE_STAR).judge(scene) == "neutral"
    assert Conjunction(GREEN_SQUARE, BLUE_STAR).judge(scene) == "contradiction"


def holds(hypothesis, items):
    """Whether a hypothesis is true when nothing is hidden, written without looking at `judge`."""

    def any_fits(what):
        return any(
            (what.color or item.color, what.shape or item.shape) == tuple(item) for item in items
        )

    match hypothesis:
        case Presence(what):
            return any_fits(what)
        case Absence(what):
            return not any_fits(what)
        case Count(number):
            return len(items) == number
        case Conjunction(first, second):
            return first in items and second in items


def label_by_filling(hypothesis, scene, vocabulary):
    truths = {
        holds(hypothesis, [*scene.items, *(item for item in filling if item)])
        for filling in product((None, *vocabulary), repeat=scene.num_hidden)
    }
    if len(truths) == 2:
        return "neutral"
    return "entailment" if truths.pop() else "contradiction"


def test_judge_agrees_with_every_filling_of_a_small_vocabulary():
    vocabulary = tuple(Item(*words) for words in product(("red", "blue"), ("circle", "star")))
    descriptions = product(("red", "blue", None), ("circle", "star", None))
    hypotheses = [
        *(form(Description(*words)) for words in descriptions for form in (Presence, Absence)),
        *(Count(number) for number in range(7)),
        *(Conjunction(*pair) for pair in combinations(vocabulary, 2)),
    ]
    rng = Random(0)
    labels = set()
    for columns, number in product(range(4), range(5)):
        shown = tuple((4 + cell, rng.choice(vocabulary)) for cell in range(number))
        scene = Scene(shown, Curtain(0, 0, columns, 1) if columns else None)
        for hypothesis in hypotheses:
            label = hypothesis.judge(scene)
            assert label == label_by_filling(hypothesis, scene, vocabulary), (hypothesis, scene)
            labels.add((hypothesis.form, label))
    assert len(labels) == 4 * 3


@pytest.mark.parametrize("columns", [1, 2])
def test_judge_agrees_with_every_filling_of_the_full_vocabulary(columns):
    rng = Random(columns)
    hypotheses = [
        *(form(what) for what in DESCRIPTIONS for form in (Presence, Absence)),
        *(Count(number) for number in COUNTS),
        *(Conjunction(*pair) for pair in rng.sample(ITEM_PAIRS, 20)),
    ]
    shown = tuple((8 + cell, item) for cell, item in enumerate(rng.sample(ITEMS, 3)))
    scene = Scene(shown, Curtain(1, 0, columns, 1))
    for hypothesis in hypotheses:
        expected = label_by_filling(hypothesis, scene, ITEMS)
        assert hypothesis.judge(scene) == expected, (hypothesis, scene)


def test_the_vocabulary_is_complete_and_curtain_cells_are_numbered_row_by_row():
    assert len(ITEMS) == len(set(ITEMS)) == len(COLORS) * len(SHAPES)
    assert len(set(DESCRIPTIONS)) == len(ITEMS) + len(COLORS) + len(SHAPES)
    assert len(ITEM_PAIRS) == len(ITEMS) * (len(ITEMS) - 1) // 2
    assert Curtain(column=1, row=2, columns=2, rows=2).cells() == (9, 10, 13, 14)
    assert Curtain(column=0, row=0, columns=GRID, rows=GRID).cells() == tuple(range(GRID * GRID))
