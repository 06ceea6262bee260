"""German sentences: gender, case, and the adjective endings after *ein* and *kein*."""

from __future__ import annotations

from typing import NamedTuple

from clseave_cli.core.data.mini_ve.world import (
    Absence,
    Conjunction,
    Count,
    Description,
    Hypothesis,
    Item,
    Presence,
)


class _Noun(NamedTuple):
    word: str
    gender: str


_SHAPES = {
    "circle": _Noun("Kreis", "m"),
    "square": _Noun("Quadrat", "n"),
    "triangle": _Noun("Dreieck", "n"),
    "star": _Noun("Stern", "m"),
    "heart": _Noun("Herz", "n"),
}
_SHAPE = _Noun("Form", "f")
_COLORS = {"red": "rot", "blue": "blau", "green": "grün", "yellow": "gelb", "black": "schwarz"}
_NUMERALS = {1: "eine", 2: "zwei", 3: "drei", 4: "vier"}

# By gender: the ending of the article and that of the adjective (mixed declension).
_NOMINATIVE = {"m": ("", "er"), "f": ("e", "e"), "n": ("", "es")}
_ACCUSATIVE = {"m": ("en", "en"), "f": ("e", "e"), "n": ("", "es")}


def _phrase(
    article: str, what: Description | Item, endings: dict[str, tuple[str, str]] = _ACCUSATIVE
) -> str:
    noun = _SHAPES[what.shape] if what.shape else _SHAPE
    article_ending, adjective_ending = endings[noun.gender]
    adjective = f"{_COLORS[what.color]}{adjective_ending} " if what.color else ""
    return f"{article}{article_ending} {adjective}{noun.word}"


def sentence(hypothesis: Hypothesis, template: int) -> str:
    """`hypothesis` in German, in one of the three paraphrases."""
    match hypothesis:
        case Presence(what):
            return (
                f"Es gibt {_phrase('ein', what)}.",
                f"Die Szene enthält {_phrase('ein', what)}.",
                f"Irgendwo in der Szene befindet sich {_phrase('ein', what, _NOMINATIVE)}.",
            )[template]
        case Absence(what):
            return (
                f"Es gibt {_phrase('kein', what)}.",
                f"Die Szene enthält {_phrase('kein', what)}.",
                f"Nirgendwo in der Szene befindet sich {_phrase('ein', what, _NOMINATIVE)}.",
            )[template]
        case Count(number):
            shapes = f"{_NUMERALS[number]} {'Form' if number == 1 else 'Formen'}"
            return (
                f"Es gibt genau {shapes}.",
                f"Die Szene enthält genau {shapes}.",
                f"Insgesamt gibt es genau {shapes}.",
            )[template]
        case Conjunction(first, second):
            one, other = _phrase("ein", first), _phrase("ein", second)
            return (
                f"Es gibt {one} und {other}.",
                f"Die Szene enthält {one} und {other}.",
                f"Die Szene enthält sowohl {one} als auch {other}.",
            )[template]
