"""Draws a scene as a small picture: flat shapes on pale paper, with a striped grey curtain."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

from clseave_cli.core.data.mini_ve.world import GRID, Curtain, Scene

#: Side of a cell in pixels: one patch of a vision transformer with patches of 16.
CELL = 16

#: Pictures are drawn this many times larger, then averaged, for smooth edges.
SUPERSAMPLING = 4

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

_PAINT: dict[str, RGB] = {
    "red": (218, 38, 44),
    "blue": (36, 84, 214),
    "green": (32, 158, 66),
    "yellow": (246, 200, 20),
    "black": (28, 28, 32),
}
_PAPER: RGB = (243, 241, 236)
_CLOTH: RGB = (168, 168, 174)
_FOLD: RGB = (128, 128, 136)
_HEM: RGB = (88, 88, 98)

_TURNS = [2 * math.pi * step / 40 for step in range(40)]


def _heart(t: float) -> tuple[float, float]:
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5
    return 16 * math.sin(t) ** 3 / 15.5, -y / 15.5


# Around (0, 0), with y downwards, and scaled to look about equally large.
_OUTLINES: dict[str, Points] = {
    "circle": [(math.cos(t), math.sin(t)) for t in _TURNS],
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.05), (1.1, 0.9), (-1.1, 0.9)],
    "star": [
        (radius * math.sin(math.pi * corner / 5), radius * -math.cos(math.pi * corner / 5))
        for corner, radius in enumerate((1.12, 1.12 * 0.45) * 5)
    ],
    "heart": [_heart(t) for t in _TURNS],
}


def draw(scene: Scene, rng: Random) -> Image.Image:
    """An RGB picture of `GRID * CELL` pixels a side.

    `rng` varies positions, sizes and colours slightly, so that no two pictures are identical.
    """
    image = Image.new("RGB", (GRID * CELL * SUPERSAMPLING,) * 2, _tinted(_PAPER, 8, rng))
    pen = ImageDraw.Draw(image)
    for cell, item in scene.shown:
        row, column = divmod(cell, GRID)
        # Radius plus shift is less than half a cell, so that shapes never touch.
        radius = rng.uniform(5.2, 6.1)
        x = (column + 0.5) * CELL + rng.uniform(-1.0, 1.0)
        y = (row + 0.5) * CELL + rng.uniform(-1.0, 1.0)
        outline = [
            ((x + radius * dx) * SUPERSAMPLING, (y + radius * dy) * SUPERSAMPLING)
            for dx, dy in _OUTLINES[item.shape]
        ]
        pen.polygon(outline, fill=_tinted(_PAINT[item.color], 10, rng))
    if scene.curtain:
        _draw_curtain(pen, scene.curtain, rng)
    return image.reduce(SUPERSAMPLING)


def _draw_curtain(pen: ImageDraw.ImageDraw, curtain: Curtain, rng: Random) -> None:
    unit = CELL * SUPERSAMPLING
    left, top = curtain.column * unit, curtain.row * unit
    right, bottom = left + curtain.columns * unit - 1, top + curtain.rows * unit - 1
    pen.rectangle((left, top, right, bottom), fill=_tinted(_CLOTH, 8, rng))
    fold = _tinted(_FOLD, 8, rng)
    pitch = 4 * SUPERSAMPLING
    start = left + rng.randrange(pitch // 2)
    for x in range(start, right, pitch):
        pen.rectangle((x, top, min(x + pitch // 2 - 1, right), bottom), fill=fold)
    # Rod and hem mark the border to the next cells clearly.
    edge = SUPERSAMPLING
    pen.rectangle((left, top, right, top + 2 * edge - 1), fill=_HEM)
    pen.rectangle((left, bottom - edge + 1, right, bottom), fill=_HEM)


def _tinted(color: RGB, spread: int, rng: Random) -> RGB:
    red, green, blue = (
        max(0, min(255, channel + rng.randint(-spread, spread))) for channel in color
    )
    return red, green, blue
