"""English captions, from which the contrastive stage learns what a picture shows.

Most are short: each word costs training time. Lists of what is in view, the curtain included, hold
all that a hypothesis may ask about. Others name a single thing of the scene, or how many there are;
those are shared by many pictures, and so make the model tell things apart where a list already
tells the pictures apart. A few are whole sentences, so that the words of the hypotheses are in the
vocabulary.
"""

from __future__ import annotations

from random import Random

from clseave_cli.core.data.mini_ve.grammar import a, numeral, phrase
from clseave_cli.core.data.mini_ve.world import COLORS, SHAPES, Description, Scene

#: How often the last caption of a scene is a whole sentence.
_SENTENCE_PROBABILITY = 0.15

_COVERED = (
    "a curtain hides a part of it",
    "a part of it is hidden behind a curtain",
    "something may be behind the curtain",
)
_OPEN = (
    "nothing is hidden",
    "there is no curtain",
    "the whole of it is in view",
)


def captions(scene: Scene, number: int, rng: Random) -> list[str]:
    """`number` captions of `scene`: lists and single things in turn, now and then a sentence."""
    told = [_thing(scene, rng) if turn % 2 else _list(scene, rng) for turn in range(number)]
    if rng.random() < _SENTENCE_PROBABILITY:
        told[-1:] = [_sentence(scene, rng)] if told else []
    return told


def _things(scene: Scene) -> list[str]:
    shown = [phrase(item) for item in scene.items]
    return [*shown, "curtain"] if scene.curtain else shown


def _list(scene: Scene, rng: Random) -> str:
    things = _things(scene)
    return ", ".join(rng.sample(things, len(things)))


def _thing(scene: Scene, rng: Random) -> str:
    count = len(scene.items)
    return rng.choice([*_things(scene), f"{numeral(count)} {'shape' if count == 1 else 'shapes'}"])


def _sentence(scene: Scene, rng: Random) -> str:
    listed = enumeration([a(item) for item in rng.sample(scene.items, len(scene.items))])
    count = numeral(len(scene.items))
    be, shapes = ("is", "shape") if len(scene.items) == 1 else ("are", "shapes")
    both = "both " if len(scene.items) == 2 else ""
    cover = rng.choice(_COVERED if scene.curtain else _OPEN)
    forms = [
        f"There {be} exactly {count} {shapes} in view in the scene: {listed}; {cover}.",
        f"The scene contains {both}{listed}, in total {count} {shapes} in view; {cover}.",
    ]
    absent = [
        *(Description(c, None) for c in COLORS if all(item.color != c for item in scene.items)),
        *(Description(None, s) for s in SHAPES if all(item.shape != s for item in scene.items)),
    ]
    # Five shapes in view can have all colours and all shapes between them.
    if absent:
        missing = rng.choice(absent)
        forms += [
            f"Somewhere in the scene there is {listed}, but no {phrase(missing)} in view; {cover}.",
            f"Nowhere in view is there {a(missing)}; the scene contains {listed}; {cover}.",
        ]
    return rng.choice(forms)


def enumeration(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = parts
    return f"{', '.join(rest)} and {last}" if rest else last
