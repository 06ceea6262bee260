"""Chinese sentences: a measure word between numeral and noun, *liǎng* for two things."""

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
    measure: str


_SHAPES = {
    "circle": _Noun("圆形", "个"),
    "square": _Noun("正方形", "个"),
    "triangle": _Noun("三角形", "个"),
    "star": _Noun("星星", "颗"),
    "heart": _Noun("爱心", "颗"),
}
_SHAPE = _Noun("图形", "个")
_COLORS = {
    "red": "红色",
    "blue": "蓝色",
    "green": "绿色",
    "yellow": "黄色",
    "black": "黑色",
}
_NUMERALS = {1: "一", 2: "两", 3: "三", 4: "四"}


def _phrase(what: Description | Item) -> str:
    color = f"{_COLORS[what.color]}的" if what.color else ""
    return color + (_SHAPES[what.shape] if what.shape else _SHAPE).word


def _one(what: Description | Item) -> str:
    noun = _SHAPES[what.shape] if what.shape else _SHAPE
    return f"一{noun.measure}{_phrase(what)}"


def sentence(hypothesis: Hypothesis, template: int) -> str:
    """`hypothesis` in Chinese, in one of the three paraphrases."""
    match hypothesis:
        case Presence(what):
            return (
                f"有{_one(what)}。",
                f"这个场景包含{_one(what)}。",
                f"场景中的某处有{_one(what)}。",
            )[template]
        case Absence(what):
            return (
                f"没有{_phrase(what)}。",
                f"这个场景不包含{_phrase(what)}。",
                f"场景中任何地方都没有{_phrase(what)}。",
            )[template]
        case Count(number):
            shapes = f"{_NUMERALS[number]}{_SHAPE.measure}{_SHAPE.word}"
            return (
                f"恰好有{shapes}。",
                f"这个场景恰好包含{shapes}。",
                f"一共恰好有{shapes}。",
            )[template]
        case Conjunction(first, second):
            return (
                f"有{_one(first)}和{_one(second)}。",
                f"这个场景包含{_one(first)}和{_one(second)}。",
                f"这个场景里既有{_one(first)}，也有{_one(second)}。",
            )[template]
