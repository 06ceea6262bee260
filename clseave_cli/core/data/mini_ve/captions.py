"""English captions, from which the contrastive stage learns what a picture shows.

Most are short lists of what is in view, the curtain included: each word costs training time, and a
list holds all that a hypothesis may ask about. The last of several is a whole sentence, so that the
words of the hypotheses are in the vocabulary and in context.
"""

from __future__ import annotations

from random import Random

from clseave_cli.core.data.mini_ve.grammar.english import NUMERALS, a, phrase
from clseave_cli.core.data.mini_ve.world import COLORS, SHAPES, Description, Scene

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
    """`number` captions of `scene`, in varied order and words."""
    lists = [_list(scene, rng) for _ in range(max(1, number - 1))]
    return [*lists, *(_sentence(scene, rng) for _ in range(number - len(lists)))]


def _list(scene: Scene, rng: Random) -> str:
    shown = [phrase(item) for item in rng.sample(scene.items, len(scene.items))]
    return ", ".join([*shown, "curtain"] if scene.curtain else shown)


def _sentence(scene: Scene, rng: Random) -> str:
    listed = enumeration([a(item) for item in rng.sample(scene.items, len(scene.items))])
    count = NUMERALS[len(scene.items)]
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
