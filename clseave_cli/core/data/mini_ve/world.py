"""Scenes of the built-in world, and hypotheses about them with their labels.

A scene is a grid of cells, each empty or with one coloured shape; a curtain may hide a rectangle of
cells. A hypothesis is judged over every possible content of the hidden cells (each empty or any
coloured shape): true in all is entailment, false in all is contradiction, otherwise neutral.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import ClassVar, NamedTuple

from clseave_cli.labels import Label

#: Cells along one side of a scene.
GRID = 4

#: Each word needs an entry in the drawing and in every grammar.
COLORS = ("red", "blue", "green", "yellow", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart")

#: The numbers in count hypotheses.
COUNTS = (1, 2, 3, 4)


class Item(NamedTuple):
    """One coloured shape."""

    color: str
    shape: str


ITEMS = tuple(Item(color, shape) for color, shape in product(COLORS, SHAPES))

#: Every unordered pair of different coloured shapes.
ITEM_PAIRS = list(combinations(ITEMS, 2))


class Description(NamedTuple):
    """A shape of any colour or a colour of any shape (None), or both given."""

    color: str | None
    shape: str | None

    def fits(self, item: Item) -> bool:
        """Whether `item` matches the description."""
        return self.color in (None, item.color) and self.shape in (None, item.shape)


#: The subjects of presence and absence: coloured shapes, colours, shapes.
DESCRIPTIONS = [
    *(Description(*item) for item in ITEMS),
    *(Description(color, None) for color in COLORS),
    *(Description(None, shape) for shape in SHAPES),
]


class Curtain(NamedTuple):
    """The rectangle of cells that a curtain hides."""

    column: int
    row: int
    columns: int
    rows: int

    def cells(self) -> tuple[int, ...]:
        """The hidden cells, numbered row by row."""
        return tuple(
            (self.row + down) * GRID + self.column + right
            for down in range(self.rows)
            for right in range(self.columns)
        )


@dataclass(frozen=True)
class Scene:
    """The content of a picture: coloured shapes by cell, in order, and perhaps a curtain.

    What is behind the curtain is unknown, so it is not part of the scene.
    """

    shown: tuple[tuple[int, Item], ...]
    curtain: Curtain | None = None

    @property
    def items(self) -> tuple[Item, ...]:
        """The coloured shapes in view, in cell order."""
        return tuple(item for _, item in self.shown)

    @property
    def num_hidden(self) -> int:
        """The number of hidden cells."""
        return self.curtain.columns * self.curtain.rows if self.curtain else 0

    def count(self, what: Description) -> int:
        """The number of shapes in view that fit `what`."""
        return sum(what.fits(item) for _, item in self.shown)


def _label(*, certain: bool, possible: bool) -> Label:
    """The label, given that all (`certain`) or some contents of the hidden cells make it true."""
    if certain:
        return "entailment"
    return "neutral" if possible else "contradiction"


@dataclass(frozen=True)
class Presence:
    """There is such a thing."""

    form: ClassVar[str] = "presence"
    what: Description

    def judge(self, scene: Scene) -> Label:
        shown = scene.count(self.what)
        return _label(certain=shown > 0, possible=shown + scene.num_hidden > 0)


@dataclass(frozen=True)
class Absence:
    """There is no such thing."""

    form: ClassVar[str] = "absence"
    what: Description

    def judge(self, scene: Scene) -> Label:
        shown = scene.count(self.what)
        return _label(certain=shown + scene.num_hidden == 0, possible=shown == 0)


@dataclass(frozen=True)
class Count:
    """There are exactly `number` shapes."""

    form: ClassVar[str] = "count"
    number: int

    def judge(self, scene: Scene) -> Label:
        shown, hidden = len(scene.shown), scene.num_hidden
        return _label(
            certain=shown == self.number and hidden == 0,
            possible=shown <= self.number <= shown + hidden,
        )


@dataclass(frozen=True)
class Conjunction:
    """There are two different coloured shapes."""

    form: ClassVar[str] = "conjunction"
    first: Item
    second: Item

    def judge(self, scene: Scene) -> Label:
        missing = len({self.first, self.second} - set(scene.items))
        # Each missing shape needs a hidden cell.
        return _label(certain=missing == 0, possible=missing <= scene.num_hidden)


Hypothesis = Presence | Absence | Count | Conjunction

#: The sentence forms, in the order of reports.
FORMS = tuple(form.form for form in (Presence, Absence, Count, Conjunction))
