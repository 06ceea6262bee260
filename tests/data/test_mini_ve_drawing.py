"""Pictures: what is drawn where."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from clseave_cli.core.data.mini_ve.drawing import CELL, draw
from clseave_cli.core.data.mini_ve.world import GRID, ITEMS, SHAPES, Curtain, Item, Scene


def pixels(scene, seed=0):
    return np.asarray(draw(scene, Random(seed))).astype(int)


def cell_of(picture, cell):
    row, column = divmod(cell, GRID)
    return picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def test_a_picture_is_rgb_and_depends_on_scene_and_generator_only():
    picture = draw(Scene(()), Random(0))
    assert (picture.size, picture.mode) == ((64, 64), "RGB")
    scene = Scene(tuple(enumerate(ITEMS[:3])), Curtain(0, 3, 4, 1))
    assert (pixels(scene, 1) == pixels(scene, 1)).all()
    assert (pixels(scene, 1) != pixels(scene, 2)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_inside_its_cell(shape):
    for seed in range(40):
        picture = pixels(Scene(((5, Item("blue", shape)),)), seed)
        inked = (picture != picture[-1, -1]).any(axis=2)
        assert cell_of(inked, 5).sum() == inked.sum() > 40


@pytest.mark.parametrize(
    ("color", "channels"),
    [
        ("red", (True, False, False)),
        ("green", (False, True, False)),
        ("blue", (False, False, True)),
        ("yellow", (True, True, False)),
        ("black", (False, False, False)),
    ],
)
def test_a_color_is_bright_in_its_own_channels(color, channels):
    for seed in range(10):
        red, green, blue = cell_of(pixels(Scene(((10, Item(color, "circle")),)), seed), 10)[8, 8]
        assert (red > 130, green > 130, blue > 130) == channels


def test_shapes_cover_different_pixels():
    masks = []
    for shape in SHAPES:
        scene = Scene(((0, Item("black", shape)),))
        dark = [cell_of(pixels(scene, seed), 0).sum(axis=2) < 400 for seed in range(20)]
        masks.append(np.mean(dark, axis=0))
    for one, other in combinations(masks, 2):
        assert np.abs(one - other).sum() > 15


def test_the_curtain_covers_its_cells_and_no_others():
    curtain = Curtain(1, 2, 2, 2)
    for seed in range(10):
        picture = pixels(Scene((), curtain), seed)
        dark, touched = picture.max(axis=2) < 200, (picture != picture[0, 0]).any(axis=2)
        cells = (GRID, CELL, GRID, CELL)
        assert tuple(np.flatnonzero(dark.reshape(cells).all(axis=(1, 3)))) == curtain.cells()
        assert tuple(np.flatnonzero(touched.reshape(cells).any(axis=(1, 3)))) == curtain.cells()
