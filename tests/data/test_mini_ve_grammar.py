"""The six grammars, against sentences written by hand."""

import re

import pytest

from clseave_cli.core.data.mini_ve.grammar import LANGUAGES, NUM_TEMPLATES, say
from clseave_cli.core.data.mini_ve.world import (
    COUNTS,
    Absence,
    Conjunction,
    Count,
    Description,
    Hypothesis,
    Item,
    Presence,
    descriptions,
    item_pairs,
)


def presence(color: str | None, shape: str | None) -> Presence:
    return Presence(Description(color, shape))


def absence(color: str | None, shape: str | None) -> Absence:
    return Absence(Description(color, shape))


def both(first: tuple[str, str], second: tuple[str, str]) -> Conjunction:
    return Conjunction(Item(*first), Item(*second))


# Hypothesis, paraphrase, and its sentence in en, de, nl, ja, zh, ko.
BY_HAND: list[tuple[Hypothesis, int, str, str, str, str, str, str]] = [
    (
        presence("red", "circle"),
        0,
        "There is a red circle.",
        "Es gibt einen roten Kreis.",
        "Er is een rode cirkel.",
        "赤い円があります。",
        "有一个红色的圆形。",
        "빨간 원이 있습니다.",
    ),
    (
        presence("red", "square"),
        1,
        "The scene contains a red square.",
        "Die Szene enthält ein rotes Quadrat.",
        "De scène bevat een rood vierkant.",
        "この場面には赤い正方形が含まれています。",
        "这个场景包含一个红色的正方形。",
        "이 장면에는 빨간 정사각형이 포함되어 있습니다.",
    ),
    (
        presence("yellow", "star"),
        2,
        "Somewhere in the scene there is a yellow star.",
        "Irgendwo in der Szene befindet sich ein gelber Stern.",
        "Ergens in de scène bevindt zich een gele ster.",
        "場面のどこかに黄色い星があります。",
        "场景中的某处有一颗黄色的星星。",
        "장면 어딘가에 노란 별이 있습니다.",
    ),
    (
        presence("black", "heart"),
        2,
        "Somewhere in the scene there is a black heart.",
        "Irgendwo in der Szene befindet sich ein schwarzes Herz.",
        "Ergens in de scène bevindt zich een zwart hart.",
        "場面のどこかに黒いハートがあります。",
        "场景中的某处有一颗黑色的爱心。",
        "장면 어딘가에 검은 하트가 있습니다.",
    ),
    (
        presence("green", None),
        0,
        "There is a green shape.",
        "Es gibt eine grüne Form.",
        "Er is een groene vorm.",
        "緑の図形があります。",
        "有一个绿色的图形。",
        "초록색 도형이 있습니다.",
    ),
    (
        presence(None, "circle"),
        1,
        "The scene contains a circle.",
        "Die Szene enthält einen Kreis.",
        "De scène bevat een cirkel.",
        "この場面には円が含まれています。",
        "这个场景包含一个圆形。",
        "이 장면에는 원이 포함되어 있습니다.",
    ),
    (
        absence("blue", "star"),
        0,
        "There is no blue star.",
        "Es gibt keinen blauen Stern.",
        "Er is geen blauwe ster.",
        "青い星はありません。",
        "没有蓝色的星星。",
        "파란 별이 없습니다.",
    ),
    (
        absence("blue", "triangle"),
        1,
        "The scene contains no blue triangle.",
        "Die Szene enthält kein blaues Dreieck.",
        "De scène bevat geen blauwe driehoek.",
        "この場面に青い三角形は含まれていません。",
        "这个场景不包含蓝色的三角形。",
        "이 장면에는 파란 삼각형이 포함되어 있지 않습니다.",
    ),
    (
        absence("green", "heart"),
        0,
        "There is no green heart.",
        "Es gibt kein grünes Herz.",
        "Er is geen groen hart.",
        "緑のハートはありません。",
        "没有绿色的爱心。",
        "초록색 하트가 없습니다.",
    ),
    (
        absence("yellow", None),
        2,
        "Nowhere in the scene is there a yellow shape.",
        "Nirgendwo in der Szene befindet sich eine gelbe Form.",
        "Nergens in de scène bevindt zich een gele vorm.",
        "場面のどこにも黄色い図形はありません。",
        "场景中任何地方都没有黄色的图形。",
        "장면 어디에도 노란 도형이 없습니다.",
    ),
    (
        absence("black", None),
        0,
        "There is no black shape.",
        "Es gibt keine schwarze Form.",
        "Er is geen zwarte vorm.",
        "黒い図形はありません。",
        "没有黑色的图形。",
        "검은 도형이 없습니다.",
    ),
    (
        absence(None, "square"),
        2,
        "Nowhere in the scene is there a square.",
        "Nirgendwo in der Szene befindet sich ein Quadrat.",
        "Nergens in de scène bevindt zich een vierkant.",
        "場面のどこにも正方形はありません。",
        "场景中任何地方都没有正方形。",
        "장면 어디에도 정사각형이 없습니다.",
    ),
    (
        Count(1),
        0,
        "There is exactly one shape.",
        "Es gibt genau eine Form.",
        "Er is precies één vorm.",
        "図形がちょうど一つあります。",
        "恰好有一个图形。",
        "도형이 정확히 한 개 있습니다.",
    ),
    (
        Count(2),
        0,
        "There are exactly two shapes.",
        "Es gibt genau zwei Formen.",
        "Er zijn precies twee vormen.",
        "図形がちょうど二つあります。",
        "恰好有两个图形。",
        "도형이 정확히 두 개 있습니다.",
    ),
    (
        Count(3),
        1,
        "The scene contains exactly three shapes.",
        "Die Szene enthält genau drei Formen.",
        "De scène bevat precies drie vormen.",
        "この場面にはちょうど三つの図形が含まれています。",
        "这个场景恰好包含三个图形。",
        "이 장면에는 정확히 세 개의 도형이 포함되어 있습니다.",
    ),
    (
        Count(1),
        2,
        "In total there is exactly one shape.",
        "Insgesamt gibt es genau eine Form.",
        "In totaal is er precies één vorm.",
        "図形は全部でちょうど一つあります。",
        "一共恰好有一个图形。",
        "도형이 모두 합쳐 정확히 한 개 있습니다.",
    ),
    (
        Count(4),
        2,
        "In total there are exactly four shapes.",
        "Insgesamt gibt es genau vier Formen.",
        "In totaal zijn er precies vier vormen.",
        "図形は全部でちょうど四つあります。",
        "一共恰好有四个图形。",
        "도형이 모두 합쳐 정확히 네 개 있습니다.",
    ),
    (
        both(("green", "square"), ("yellow", "star")),
        0,
        "There is a green square and a yellow star.",
        "Es gibt ein grünes Quadrat und einen gelben Stern.",
        "Er is een groen vierkant en er is een gele ster.",
        "緑の正方形と黄色い星があります。",
        "有一个绿色的正方形和一颗黄色的星星。",
        "초록색 정사각형과 노란 별이 있습니다.",
    ),
    (
        both(("black", "heart"), ("red", "circle")),
        1,
        "The scene contains a black heart and a red circle.",
        "Die Szene enthält ein schwarzes Herz und einen roten Kreis.",
        "De scène bevat een zwart hart en een rode cirkel.",
        "この場面には黒いハートと赤い円が含まれています。",
        "这个场景包含一颗黑色的爱心和一个红色的圆形。",
        "이 장면에는 검은 하트와 빨간 원이 포함되어 있습니다.",
    ),
    (
        both(("blue", "triangle"), ("green", "heart")),
        2,
        "The scene contains both a blue triangle and a green heart.",
        "Die Szene enthält sowohl ein blaues Dreieck als auch ein grünes Herz.",
        "De scène bevat zowel een blauwe driehoek als een groen hart.",
        "この場面には青い三角形も緑のハートも含まれています。",
        "这个场景里既有一个蓝色的三角形，也有一颗绿色的爱心。",
        "이 장면에는 파란 삼각형도 있고 초록색 하트도 있습니다.",
    ),
]


@pytest.mark.parametrize("row", BY_HAND, ids=lambda row: row[2])
def test_sentences_written_by_hand(
    row: tuple[Hypothesis, int, str, str, str, str, str, str],
) -> None:
    hypothesis, template, *expected = row
    assert [say(hypothesis, template, language) for language in LANGUAGES] == expected


def every_hypothesis() -> list[Hypothesis]:
    return [
        *(Presence(what) for what in descriptions()),
        *(Absence(what) for what in descriptions()),
        *(Count(number) for number in COUNTS),
        *(Conjunction(*pair) for pair in item_pairs()),
        *(Conjunction(*reversed(pair)) for pair in item_pairs()),
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_hypotheses_share_a_sentence(language: str) -> None:
    """So a translation back and forth returns the same row, and a label can be looked up."""
    hypotheses = every_hypothesis()
    sentences = {
        say(hypothesis, template, language)
        for hypothesis in hypotheses
        for template in range(NUM_TEMPLATES)
    }
    assert len(sentences) == len(hypotheses) * NUM_TEMPLATES


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_well_formed(language: str) -> None:
    letters = (
        r"a-zA-ZäöüÄÖÜßèé" if language in ("en", "de", "nl") else r"\u3040-\u9fff\uac00-\ud7a3"
    )
    space = "" if language in ("ja", "zh") else " "
    stop = "。" if language in ("ja", "zh") else "."
    pattern = re.compile(rf"[{letters}]+(?:[{space}，][{letters}]+)*{re.escape(stop)}")
    for hypothesis in every_hypothesis():
        for template in range(NUM_TEMPLATES):
            sentence = say(hypothesis, template, language)
            assert pattern.fullmatch(sentence), sentence
