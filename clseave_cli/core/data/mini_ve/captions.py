"""Captions in six languages, from which the contrastive stage learns what a picture shows.

Most are short, because each word costs training time. Lists of everything in view, including the
curtain, contain all that a hypothesis may ask about. Others name a single thing of the scene, or
the number of shapes. Many pictures share those, so the model must tell things apart, while a list
identifies its picture. A few are whole sentences, so that the words of the hypotheses are in the
vocabulary.

The content is drawn once, then worded in every language.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from clseave_cli.core.data.mini_ve.grammar import LANGUAGES, numbered, phrases
from clseave_cli.core.data.mini_ve.world import COLORS, SHAPES, Description, Item, Scene

#: Probability that the last caption of a scene is a whole sentence.
_SENTENCE_PROBABILITY = 0.15

#: Something in view: a coloured shape, the curtain (None), or a number of shapes.
_Thing = Item | None | int


@dataclass(frozen=True)
class _Wording:
    """Captions in one language."""

    curtain: str  # the noun
    #: What joins the things of a sentence: between them, and before the last one.
    joints: tuple[str, str]
    covers: str  # three clauses about a curtain, then three for a scene without one; a line each
    #: Sentences, a line each; the third replaces the second if there are two things. `all` and
    #: `missing` are phrases by their names in the grammar.
    forms: str
    several: str = "{number} {shapes}"  # the number of shapes, without a verb
    comma: str = ", "  # between the things of a list
    ending: str = "; {cover}."  # end of a sentence
    #: Name of the phrase for every thing but the last, if it differs from the last one's.
    inner: str | None = None


_WORDINGS = {
    "en": _Wording(
        curtain="curtain",
        joints=(", ", " and "),
        covers="""
            a curtain hides a part of it
            a part of it is hidden behind a curtain
            something may be behind the curtain
            nothing is hidden
            there is no curtain
            the whole of it is in view
        """,
        forms="""
            There {be} exactly {number} {shapes} in view in the scene: {all[a]}
            The scene contains {all[a]}, in total {number} {shapes} in view
            The scene contains both {all[a]}, in total {number} {shapes} in view
            Somewhere in the scene there is {all[a]}, but no {missing[no]} in view
            Nowhere in view is there {missing[a]}; the scene contains {all[a]}
        """,
    ),
    "de": _Wording(
        curtain="Vorhang",
        joints=(", ", " und "),
        covers="""
            ein Vorhang verdeckt einen Teil davon
            ein Teil davon ist hinter einem Vorhang verborgen
            hinter dem Vorhang könnte etwas sein
            nichts ist verborgen
            es gibt keinen Vorhang
            alles ist zu sehen
        """,
        forms="""
            Es gibt in der Szene genau {number} {shapes} zu sehen: {all[ein]}
            Die Szene enthält {all[ein]}, insgesamt {number} {shapes}
            Die Szene enthält sowohl {0[ein]} als auch {1[ein]}, insgesamt {number} {shapes}
            Irgendwo in der Szene befindet sich {all[subject]}, aber man sieht {missing[kein]}
            Nirgendwo ist {missing[subject]} zu sehen; die Szene enthält {all[ein]}
        """,
    ),
    "nl": _Wording(
        curtain="gordijn",
        joints=(", ", " en "),
        covers="""
            een gordijn verbergt een deel ervan
            een deel ervan is verborgen achter een gordijn
            achter het gordijn kan iets zijn
            er is niets verborgen
            er is geen gordijn
            alles is te zien
        """,
        forms="""
            Er {be} in de scène precies {number} {shapes} te zien: {all[een]}
            De scène bevat {all[een]}, in totaal {number} {shapes}
            De scène bevat zowel {0[een]} als {1[een]}, in totaal {number} {shapes}
            Ergens in de scène bevindt zich {all[een]}, maar er is {missing[geen]} te zien
            Nergens is {missing[een]} te zien; de scène bevat {all[een]}
        """,
    ),
    "ja": _Wording(
        curtain="カーテン",
        several="{number}の図形",
        comma="、",
        joints=("と", "と"),
        ending="。{cover}。",
        covers="""
            一部がカーテンで隠れています
            その一部はカーテンの後ろに隠れています
            カーテンの後ろに何かあるかもしれません
            何も隠れていません
            カーテンはありません
            全体が見えています
        """,
        forms="""
            場面には図形がちょうど{number}見えます。{all[it]}です
            この場面には{all[it]}が含まれ、図形は全部で{number}見えます
            この場面には{0[it]}も{1[it]}も含まれ、図形は全部で{number}見えます
            場面のどこかに{all[it]}がありますが、見えるところに{missing[it]}はありません
            見える範囲のどこにも{missing[it]}はありません。この場面には{all[it]}が含まれています
        """,
    ),
    "zh": _Wording(
        curtain="帘子",
        several="{number}个图形",
        comma="、",
        joints=("、", "和"),
        ending="；{cover}。",
        covers="""
            帘子遮住了一部分
            有一部分藏在帘子后面
            帘子后面可能有东西
            没有任何东西被遮住
            没有帘子
            整个场景都看得见
        """,
        forms="""
            场景中恰好能看到{number}个图形：{all[a]}
            这个场景包含{all[a]}，一共能看到{number}个图形
            这个场景里既有{0[a]}，也有{1[a]}，一共能看到{number}个图形
            场景中的某处有{all[a]}，但是视野里没有{missing[no]}
            视野里任何地方都没有{missing[no]}；这个场景包含{all[a]}
        """,
    ),
    "ko": _Wording(
        curtain="커튼",
        several="도형 {number} 개",
        joints=(" ", " "),
        covers="""
            커튼이 일부를 가리고 있습니다
            일부가 커튼 뒤에 숨겨져 있습니다
            커튼 뒤에 무언가 있을 수 있습니다
            숨겨진 것이 없습니다
            커튼이 없습니다
            전체가 보입니다
        """,
        forms="""
            장면에 도형이 정확히 {number} 개 보입니다: {all[it]}
            이 장면에는 {all[subject]} 포함되어 있고, 도형이 모두 합쳐 {number} 개 보입니다
            이 장면에는 {0[it]}도 있고 {1[it]}도 있으며, 도형이 모두 합쳐 {number} 개 보입니다
            장면 어딘가에 {all[subject]} 있지만, 보이는 곳에 {missing[subject]} 없습니다
            보이는 곳 어디에도 {missing[subject]} 없습니다; 장면에 {all[subject]} 포함되어 있습니다
        """,
        inner="and",
    ),
}


def captions(scene: Scene, number: int, rng: Random) -> list[dict[str, str]]:
    """`number` captions of `scene` by language: lists and single things in turn, and, with a small
    probability, a sentence at the end."""
    things: list[_Thing] = [*scene.items, None] if scene.curtain else [*scene.items]
    result = []
    for turn in range(number):
        if turn % 2:
            named = [rng.choice([*things, len(scene.items)])]
        else:
            named = rng.sample(things, len(things))
        result.append(
            {
                lang: wording.comma.join(_name(thing, lang) for thing in named)
                for lang, wording in _WORDINGS.items()
            }
        )
    if rng.random() < _SENTENCE_PROBABILITY:
        result[-1:] = [_sentence(scene, rng)] if result else []
    return result


@cache
def _name(thing: _Thing, lang: str) -> str:
    """A thing without an article, for a list."""
    wording = _WORDINGS[lang]
    if thing is None:
        return wording.curtain
    if isinstance(thing, int):
        return wording.several.format(**numbered(thing, lang))
    return phrases(thing, lang)["bare"]


def _sentence(scene: Scene, rng: Random) -> dict[str, str]:
    items = rng.sample(scene.items, len(scene.items))
    cover = rng.randrange(3) + (0 if scene.curtain else 3)
    absent = [
        *(Description(c, None) for c in COLORS if all(item.color != c for item in scene.items)),
        *(Description(None, s) for s in SHAPES if all(item.shape != s for item in scene.items)),
    ]
    # Five shapes can have all colours and all shapes between them.
    missing = rng.choice(absent) if absent else None
    forms = [0, 2 if len(items) == 2 else 1]
    form = rng.choice([*forms, 3, 4] if missing else forms)
    return {lang: _say(lang, form, items, missing, cover) for lang in LANGUAGES}


def _say(lang: str, form: int, items: list[Item], missing: Description | None, cover: int) -> str:
    wording = _WORDINGS[lang]
    named = [phrases(item, lang) for item in items]
    comma, last = wording.joints
    joined = {}
    for case, end in named[-1].items():
        *rest, _ = (words[wording.inner or case] for words in named)
        joined[case] = f"{comma.join(rest)}{last}{end}" if rest else end
    return (_line(wording.forms, form) + wording.ending).format(
        *named,
        all=joined,
        missing=phrases(missing, lang) if missing else {},
        cover=_line(wording.covers, cover),
        **numbered(len(items), lang),
    )


def _line(text: str, number: int) -> str:
    return text.strip().split("\n")[number].strip()
