"""English captions, from which the contrastive stage learns what a picture shows.

They name every shape in view, say how many there are and whether a curtain hides something, now and
then also what is absent: all that a hypothesis may ask about.
"""

from __future__ import annotations

from random import Random

from clseave_cli.core.data.mini_ve.grammar.english import NUMERALS, a
from clseave_cli.core.data.mini_ve.world import COLORS, SHAPES, Scene

_COVERED = (
    "a curtain hides a part of the scene",
    "a part of the scene is hidden behind a curtain",
    "something may be behind the curtain",
    "the rest is covered by a curtain",
)
_OPEN = (
    "nothing is hidden",
    "there is no curtain",
    "nothing else is there",
    "the whole scene is in view",
)


def captions(scene: Scene, number: int, rng: Random) -> list[str]:
    """`number` captions of `scene`, in varied words.

    The first ones are complete; the last one of three or more tells only a part.
    """
    num_partial = 1 if number >= 3 else 0
    return [
        *(_complete(scene, rng) for _ in range(number - num_partial)),
        *(_partial(scene, rng) for _ in range(num_partial)),
    ]


def _complete(scene: Scene, rng: Random) -> str:
    shown = [a(item) for item in rng.sample(scene.items, len(scene.items))]
    listed = _enumeration(shown)
    number = NUMERALS[len(shown)]
    noun, be = ("shape", "is") if len(shown) == 1 else ("shapes", "are")
    cover = rng.choice(_COVERED if scene.curtain else _OPEN)
    return rng.choice(
        (
            f"{_capital(number)} {noun}: {listed}; {cover}.",
            f"{_capital(listed)}, {number} {noun} in view, and {cover}.",
            f"There {be} {number} {noun}, {listed}, and {cover}.",
            f"The scene contains {listed}; {cover}.",
            f"{_capital(listed)}; {cover}.",
        )
    )


def _partial(scene: Scene, rng: Random) -> str:
    cover = rng.choice(_COVERED if scene.curtain else _OPEN)
    number = NUMERALS[len(scene.items)]
    noun = "shape" if len(scene.items) == 1 else "shapes"
    one = a(rng.choice(scene.items))
    absent = [
        *(f"{color} shape" for color in COLORS if all(i.color != color for i in scene.items)),
        *(shape for shape in SHAPES if all(i.shape != shape for i in scene.items)),
    ]
    # Five shapes in view can have all colours and all shapes between them.
    if not absent or rng.random() < 0.5:
        return f"There is {one} among {number} {noun} in view, and {cover}."
    return f"There is {one} but no {rng.choice(absent)} in view, and {cover}."


def _enumeration(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = parts
    return f"{', '.join(rest)} and {last}" if rest else last


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
