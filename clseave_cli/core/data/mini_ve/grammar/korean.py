"""Korean sentences: particles whose form depends on the final consonant, the counter *gae*."""

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
    "circle": "원",
    "square": "정사각형",
    "triangle": "삼각형",
    "star": "별",
    "heart": "하트",
}
_SHAPE = "도형"
_COLORS = {
    "red": "빨간",
    "blue": "파란",
    "green": "초록색",
    "yellow": "노란",
    "black": "검은",
}
_NUMERALS = {1: "한", 2: "두", 3: "세", 4: "네"}

# Hangul syllables are laid out in blocks of 28 by their final consonant; the first has none.
_FIRST_SYLLABLE, _NUM_FINALS = ord("가"), 28


def _has_final(word: str) -> bool:
    return (ord(word[-1]) - _FIRST_SYLLABLE) % _NUM_FINALS != 0


def _phrase(what: Description | Item) -> str:
    color = f"{_COLORS[what.color]} " if what.color else ""
    return color + (_SHAPES[what.shape] if what.shape else _SHAPE)


def _subject(words: str) -> str:
    return words + ("이" if _has_final(words) else "가")


def _and(words: str) -> str:
    return words + ("과" if _has_final(words) else "와")


def sentence(hypothesis: Hypothesis, template: int) -> str:
    """`hypothesis` in Korean, in one of the three paraphrases."""
    match hypothesis:
        case Presence(what):
            subject = _subject(_phrase(what))
            return (
                f"{subject} 있습니다.",
                f"이 장면에는 {subject} 포함되어 있습니다.",
                f"장면 어딘가에 {subject} 있습니다.",
            )[template]
        case Absence(what):
            subject = _subject(_phrase(what))
            return (
                f"{subject} 없습니다.",
                f"이 장면에는 {subject} 포함되어 있지 않습니다.",
                f"장면 어디에도 {subject} 없습니다.",
            )[template]
        case Count(number):
            return (
                f"도형이 정확히 {_NUMERALS[number]} 개 있습니다.",
                f"이 장면에는 정확히 {_NUMERALS[number]} 개의 도형이 포함되어 있습니다.",
                f"도형이 모두 합쳐 정확히 {_NUMERALS[number]} 개 있습니다.",
            )[template]
        case Conjunction(first, second):
            one, other = _phrase(first), _phrase(second)
            return (
                f"{_and(one)} {_subject(other)} 있습니다.",
                f"이 장면에는 {_and(one)} {_subject(other)} 포함되어 있습니다.",
                f"이 장면에는 {one}도 있고 {other}도 있습니다.",
            )[template]
