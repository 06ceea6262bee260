"""English sentences."""

from __future__ import annotations

from clseave_cli.core.data.mini_ve.world import (
    Absence,
    Conjunction,
    Count,
    Description,
    Hypothesis,
    Item,
    Presence,
)

NUMERALS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


def phrase(what: Description | Item) -> str:
    """The words for a thing without an article: `red circle`, `circle`, `red shape`."""
    return f"{what.color} {what.shape or 'shape'}" if what.color else what.shape or "shape"


def a(what: Description | Item) -> str:
    """A thing with its indefinite article."""
    words = phrase(what)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(hypothesis: Hypothesis, template: int) -> str:
    """`hypothesis` in English, in one of the three paraphrases."""
    match hypothesis:
        case Presence(what):
            return (
                f"There is {a(what)}.",
                f"The scene contains {a(what)}.",
                f"Somewhere in the scene there is {a(what)}.",
            )[template]
        case Absence(what):
            return (
                f"There is no {phrase(what)}.",
                f"The scene contains no {phrase(what)}.",
                f"Nowhere in the scene is there {a(what)}.",
            )[template]
        case Count(number):
            shapes = f"{NUMERALS[number]} {'shape' if number == 1 else 'shapes'}"
            be = "is" if number == 1 else "are"
            return (
                f"There {be} exactly {shapes}.",
                f"The scene contains exactly {shapes}.",
                f"In total there {be} exactly {shapes}.",
            )[template]
        case Conjunction(first, second):
            return (
                f"There is {a(first)} and {a(second)}.",
                f"The scene contains {a(first)} and {a(second)}.",
                f"The scene contains both {a(first)} and {a(second)}.",
            )[template]
