"""Hand-written grammars that word a hypothesis in six languages.

Each language has three paraphrases per form, and they correspond: number 2 in German translates
number 2 in English. So an English sentence has exactly one translation. The paraphrase is chosen
independently of the label, so it gives nothing away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from clseave_cli.core.data.mini_ve.world import (
    COLORS,
    FORMS,
    SHAPES,
    Conjunction,
    Count,
    Description,
    Hypothesis,
    Item,
)

#: Paraphrases per form and language.
NUM_TEMPLATES = 3


@dataclass(frozen=True)
class _Grammar:
    """One language."""

    #: Nouns for `SHAPES` in order, then for any shape; after a slash, what `phrases` needs (gender,
    #: article or measure word).
    shapes: str
    colors: str  # adjectives for `COLORS` in order
    #: The phrases that templates use, from an adjective (or "") and a noun.
    phrases: Callable[[str, str], dict[str, str]]
    numerals: str  # 1, 2, and so on
    #: `NUM_TEMPLATES` lines for each of `FORMS` in order. `0` is the (first) thing, `1` the second.
    templates: str
    #: Other words in templates, for one shape.
    singular: dict[str, str] = field(default_factory=dict)
    plural: dict[str, str] = field(default_factory=dict)  # the same for several shapes


def _english(color: str, noun: str) -> dict[str, str]:
    words = f"{color} {noun}".strip()
    return {"bare": words, "no": words, "a": f"a {words}"}


def _german(color: str, noun: str) -> dict[str, str]:
    """Gender, case, and the adjective endings of the mixed declension, after *ein* and *kein*."""
    noun, gender = noun.split("/")
    article, adjective = {"m": ("en", "en"), "f": ("e", "e"), "n": ("", "es")}[gender]
    accusative = f"{article} {color}{adjective} {noun}" if color else f"{article} {noun}"
    article, adjective = ("", "er") if gender == "m" else (article, adjective)
    nominative = f"{article} {color}{adjective} {noun}" if color else f"{article} {noun}"
    return {
        "bare": nominative.partition(" ")[2],
        "ein": f"ein{accusative}",
        "kein": f"kein{accusative}",
        "subject": f"ein{nominative}",
    }


def _dutch(color: str, noun: str) -> dict[str, str]:
    """After *een* and *geen*, an adjective takes *-e* except before a *het* noun."""
    noun, article = noun.split("/")
    if color:
        plain, inflected = color.split("/")
        noun = f"{plain if article == 'het' else inflected} {noun}"
    return {"bare": noun, "een": f"een {noun}", "geen": f"geen {noun}"}


def _japanese(color: str, noun: str) -> dict[str, str]:
    return {"bare": color + noun, "it": color + noun}


def _chinese(color: str, noun: str) -> dict[str, str]:
    """A measure word stands between numeral and noun."""
    noun, measure = noun.split("/")
    return {"bare": color + noun, "no": color + noun, "a": f"一{measure}{color}{noun}"}


def _korean(color: str, noun: str) -> dict[str, str]:
    """The form of a particle depends on the final consonant."""
    words = f"{color} {noun}".strip()
    # Hangul syllables come in blocks of 28, by final consonant; the first of a block has none.
    has_final = (ord(words[-1]) - ord("가")) % 28 != 0
    subject, conjunction = ("이", "과") if has_final else ("가", "와")
    return {"bare": words, "it": words, "subject": words + subject, "and": words + conjunction}


_GRAMMARS = {
    "en": _Grammar(
        shapes="circle square triangle star heart shape",
        colors="red blue green yellow black",
        phrases=_english,
        numerals="one two three four five",
        singular={"be": "is", "shapes": "shape"},
        plural={"be": "are", "shapes": "shapes"},
        templates="""
            There is {0[a]}.
            The scene contains {0[a]}.
            Somewhere in the scene there is {0[a]}.

            There is no {0[no]}.
            The scene contains no {0[no]}.
            Nowhere in the scene is there {0[a]}.

            There {be} exactly {number} {shapes}.
            The scene contains exactly {number} {shapes}.
            In total there {be} exactly {number} {shapes}.

            There is {0[a]} and {1[a]}.
            The scene contains {0[a]} and {1[a]}.
            The scene contains both {0[a]} and {1[a]}.
        """,
    ),
    "de": _Grammar(
        shapes="Kreis/m Quadrat/n Dreieck/n Stern/m Herz/n Form/f",
        colors="rot blau grün gelb schwarz",
        phrases=_german,
        numerals="eine zwei drei vier fünf",
        singular={"shapes": "Form"},
        plural={"shapes": "Formen"},
        templates="""
            Es gibt {0[ein]}.
            Die Szene enthält {0[ein]}.
            Irgendwo in der Szene befindet sich {0[subject]}.

            Es gibt {0[kein]}.
            Die Szene enthält {0[kein]}.
            Nirgendwo in der Szene befindet sich {0[subject]}.

            Es gibt genau {number} {shapes}.
            Die Szene enthält genau {number} {shapes}.
            Insgesamt gibt es genau {number} {shapes}.

            Es gibt {0[ein]} und {1[ein]}.
            Die Szene enthält {0[ein]} und {1[ein]}.
            Die Szene enthält sowohl {0[ein]} als auch {1[ein]}.
        """,
    ),
    "nl": _Grammar(
        shapes="cirkel/de vierkant/het driehoek/de ster/de hart/het vorm/de",
        colors="rood/rode blauw/blauwe groen/groene geel/gele zwart/zwarte",
        phrases=_dutch,
        numerals="één twee drie vier vijf",
        singular={"be": "is", "shapes": "vorm"},
        plural={"be": "zijn", "shapes": "vormen"},
        templates="""
            Er is {0[een]}.
            De scène bevat {0[een]}.
            Ergens in de scène bevindt zich {0[een]}.

            Er is {0[geen]}.
            De scène bevat {0[geen]}.
            Nergens in de scène bevindt zich {0[een]}.

            Er {be} precies {number} {shapes}.
            De scène bevat precies {number} {shapes}.
            In totaal {be} er precies {number} {shapes}.

            Er is {0[een]} en er is {1[een]}.
            De scène bevat {0[een]} en {1[een]}.
            De scène bevat zowel {0[een]} als {1[een]}.
        """,
    ),
    "ja": _Grammar(
        shapes="円 正方形 三角形 星 ハート 図形",
        colors="赤い 青い 緑の 黄色い 黒い",
        phrases=_japanese,
        numerals="一つ 二つ 三つ 四つ 五つ",
        templates="""
            {0[it]}があります。
            この場面には{0[it]}が含まれています。
            場面のどこかに{0[it]}があります。

            {0[it]}はありません。
            この場面に{0[it]}は含まれていません。
            場面のどこにも{0[it]}はありません。

            図形がちょうど{number}あります。
            この場面にはちょうど{number}の図形が含まれています。
            図形は全部でちょうど{number}あります。

            {0[it]}と{1[it]}があります。
            この場面には{0[it]}と{1[it]}が含まれています。
            この場面には{0[it]}も{1[it]}も含まれています。
        """,
    ),
    "zh": _Grammar(
        shapes="圆形/个 正方形/个 三角形/个 星星/颗 爱心/颗 图形/个",
        colors="红色的 蓝色的 绿色的 黄色的 黑色的",
        phrases=_chinese,
        numerals="一 两 三 四 五",
        templates="""
            有{0[a]}。
            这个场景包含{0[a]}。
            场景中的某处有{0[a]}。

            没有{0[no]}。
            这个场景不包含{0[no]}。
            场景中任何地方都没有{0[no]}。

            恰好有{number}个图形。
            这个场景恰好包含{number}个图形。
            一共恰好有{number}个图形。

            有{0[a]}和{1[a]}。
            这个场景包含{0[a]}和{1[a]}。
            这个场景里既有{0[a]}，也有{1[a]}。
        """,
    ),
    "ko": _Grammar(
        shapes="원 정사각형 삼각형 별 하트 도형",
        colors="빨간 파란 초록색 노란 검은",
        phrases=_korean,
        numerals="한 두 세 네 다섯",
        templates="""
            {0[subject]} 있습니다.
            이 장면에는 {0[subject]} 포함되어 있습니다.
            장면 어딘가에 {0[subject]} 있습니다.

            {0[subject]} 없습니다.
            이 장면에는 {0[subject]} 포함되어 있지 않습니다.
            장면 어디에도 {0[subject]} 없습니다.

            도형이 정확히 {number} 개 있습니다.
            이 장면에는 정확히 {number} 개의 도형이 포함되어 있습니다.
            도형이 모두 합쳐 정확히 {number} 개 있습니다.

            {0[and]} {1[subject]} 있습니다.
            이 장면에는 {0[and]} {1[subject]} 포함되어 있습니다.
            이 장면에는 {0[it]}도 있고 {1[it]}도 있습니다.
        """,
    ),
}

#: The languages of the built-in world, English first.
LANGUAGES = tuple(_GRAMMARS)


# There are a few thousand sentences, each used many times.
@cache
def say(hypothesis: Hypothesis, template: int, language: str) -> str:
    """A hypothesis as a sentence, in paraphrase `template` (0, 1 or 2)."""
    forms = _GRAMMARS[language].templates.strip().split("\n\n")
    text = forms[FORMS.index(hypothesis.form)].strip().split("\n")[template].strip()
    match hypothesis:
        case Count(number):
            return text.format(**numbered(number, language))
        case Conjunction(first, second):
            return text.format(phrases(first, language), phrases(second, language))
        case _:
            return text.format(phrases(hypothesis.what, language))


def numbered(number: int, language: str) -> dict[str, str]:
    """The words for a number of shapes: the numeral, and what agrees with it."""
    grammar = _GRAMMARS[language]
    others = grammar.singular if number == 1 else grammar.plural
    return {"number": grammar.numerals.split()[number - 1], **others}


@cache
def phrases(what: Description | Item, language: str) -> dict[str, str]:
    """The phrases for a thing; `bare` has no article: `red circle`."""
    grammar = _GRAMMARS[language]
    color = grammar.colors.split()[COLORS.index(what.color)] if what.color else ""
    shape = SHAPES.index(what.shape) if what.shape else -1
    return grammar.phrases(color, grammar.shapes.split()[shape])
