"""Dutch sentences: after *een* and *geen* an adjective takes *-e* except before a *het* noun."""

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
    article: str


class _Adjective(NamedTuple):
    plain: str
    inflected: str


_SHAPES = {
    "circle": _Noun("cirkel", "de"),
    "square": _Noun("vierkant", "het"),
    "triangle": _Noun("driehoek", "de"),
    "star": _Noun("ster", "de"),
    "heart": _Noun("hart", "het"),
}
_SHAPE = _Noun("vorm", "de")
_COLORS = {
    "red": _Adjective("rood", "rode"),
    "blue": _Adjective("blauw", "blauwe"),
    "green": _Adjective("groen", "groene"),
    "yellow": _Adjective("geel", "gele"),
    "black": _Adjective("zwart", "zwarte"),
}
_NUMERALS = {1: "één", 2: "twee", 3: "drie", 4: "vier"}


def _phrase(article: str, what: Description | Item) -> str:
    noun = _SHAPES[what.shape] if what.shape else _SHAPE
    if what.color is None:
        return f"{article} {noun.word}"
    adjective = _COLORS[what.color]
    color = adjective.plain if noun.article == "het" else adjective.inflected
    return f"{article} {color} {noun.word}"


def sentence(hypothesis: Hypothesis, template: int) -> str:
    """`hypothesis` in Dutch, in one of the three paraphrases."""
    match hypothesis:
        case Presence(what):
            return (
                f"Er is {_phrase('een', what)}.",
                f"De scène bevat {_phrase('een', what)}.",
                f"Ergens in de scène bevindt zich {_phrase('een', what)}.",
            )[template]
        case Absence(what):
            return (
                f"Er is {_phrase('geen', what)}.",
                f"De scène bevat {_phrase('geen', what)}.",
                f"Nergens in de scène bevindt zich {_phrase('een', what)}.",
            )[template]
        case Count(number):
            shapes = f"{_NUMERALS[number]} {'vorm' if number == 1 else 'vormen'}"
            be = "is" if number == 1 else "zijn"
            return (
                f"Er {be} precies {shapes}.",
                f"De scène bevat precies {shapes}.",
                f"In totaal {be} er precies {shapes}.",
            )[template]
        case Conjunction(first, second):
            one, other = _phrase("een", first), _phrase("een", second)
            return (
                f"Er is {one} en er is {other}.",
                f"De scène bevat {one} en {other}.",
                f"De scène bevat zowel {one} als {other}.",
            )[template]
