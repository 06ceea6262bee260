"""Japanese sentences: *i*-adjectives and *no*-nouns for colours, the counter *-tsu*."""

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

_SHAPES = {
    "circle": "円",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星",
    "heart": "ハート",
}
_SHAPE = "図形"
_COLORS = {
    "red": "赤い",
    "blue": "青い",
    "green": "緑の",
    "yellow": "黄色い",
    "black": "黒い",
}
_NUMERALS = {1: "一つ", 2: "二つ", 3: "三つ", 4: "四つ"}


def _phrase(what: Description | Item) -> str:
    color = _COLORS[what.color] if what.color else ""
    return color + (_SHAPES[what.shape] if what.shape else _SHAPE)


def sentence(hypothesis: Hypothesis, template: int) -> str:
    """`hypothesis` in Japanese, in one of the three paraphrases."""
    match hypothesis:
        case Presence(what):
            return (
                f"{_phrase(what)}があります。",
                f"この場面には{_phrase(what)}が含まれています。",
                f"場面のどこかに{_phrase(what)}があります。",
            )[template]
        case Absence(what):
            return (
                f"{_phrase(what)}はありません。",
                f"この場面に{_phrase(what)}は含まれていません。",
                f"場面のどこにも{_phrase(what)}はありません。",
            )[template]
        case Count(number):
            return (
                f"図形がちょうど{_NUMERALS[number]}あります。",
                f"この場面にはちょうど{_NUMERALS[number]}の図形が含まれています。",
                f"図形は全部でちょうど{_NUMERALS[number]}あります。",
            )[template]
        case Conjunction(first, second):
            one, other = _phrase(first), _phrase(second)
            return (
                f"{one}と{other}があります。",
                f"この場面には{one}と{other}が含まれています。",
                f"この場面には{one}も{other}も含まれています。",
            )[template]
