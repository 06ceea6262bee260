"""Scenes of the built-in world, hypotheses about them, and three-valued judgement.

A scene is a grid of cells, each empty or holding one coloured shape; a curtain may hide a rectangle
of cells. A hypothesis is judged over every way the hidden cells could be filled (each empty or any
coloured shape): true in all is entailment, false in all is contradiction, otherwise neutral.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import ClassVar, NamedTuple

from clseave_cli.labels import Label

#: Cells along one side of a scene.
GRID = 4

#: What can be drawn. Every word here needs an entry in the drawing and in each grammar.
COLORS = ("red", "blue", "green", "yellow", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart")

#: The numbers that a count hypothesis may name.
COUNTS = (1, 2, 3, 4)


class Item(NamedTuple):
    """One coloured shape."""

    color: str
    shape: str


#: Every coloured shape there is.
ITEMS = tuple(Item(color, shape) for color, shape in product(COLORS, SHAPES))


class Description(NamedTuple):
    """A coloured shape of which the colour or the shape may be left open (None)."""

    color: str | None
    shape: str | None

    def fits(self, item: Item) -> bool:
        """Whether `item` is one of the things described."""
        return self.color in (None, item.color) and self.shape in (None, item.shape)


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
    """What a picture shows: coloured shapes by cell (in cell order), and perhaps a curtain.

    What is behind the curtain is not part of the scene, because nothing about it is known.
    """

    shown: tuple[tuple[int, Item], ...]
    curtain: Curtain | None = None

    @property
    def items(self) -> tuple[Item, ...]:
        """The coloured shapes in view, in cell order."""
        return tuple(item for _, item in self.shown)

    @property
    def num_hidden(self) -> int:
        """How many cells the curtain hides."""
        return self.curtain.columns * self.curtain.rows if self.curtain else 0

    def count(self, what: Description) -> int:
        """How many of the shapes in view fit `what`."""
        return len([None for _, item in self.shown if what.fits(item)])


def _verdict(*, certain: bool, possible: bool) -> Label:
    """The label of a sentence that every filling (`certain`) or some filling makes true."""
    if certain:
        return "entailment"
    return "neutral" if possible else "contradiction"


@dataclass(frozen=True)
class Presence:
    """There is such a thing."""

    form: ClassVar[str] = "presence"
    what: Description

    def judge(self, scene: Scene) -> Label:
        """The label for `scene`."""
        shown = scene.count(self.what)
        return _verdict(certain=shown > 0, possible=shown + scene.num_hidden > 0)


@dataclass(frozen=True)
class Absence:
    """There is no such thing."""

    form: ClassVar[str] = "absence"
    what: Description

    def judge(self, scene: Scene) -> Label:
        """The label for `scene`."""
        shown = scene.count(self.what)
        return _verdict(certain=shown + scene.num_hidden == 0, possible=shown == 0)


@dataclass(frozen=True)
class Count:
    """There are exactly so many shapes."""

    form: ClassVar[str] = "count"
    number: int

    def judge(self, scene: Scene) -> Label:
        """The label for `scene`."""
        shown, hidden = len(scene.shown), scene.num_hidden
        return _verdict(
            certain=shown == self.number and hidden == 0,
            possible=shown <= self.number <= shown + hidden,
        )


@dataclass(frozen=True)
class Conjunction:
    """There is a first coloured shape and a second, different one."""

    form: ClassVar[str] = "conjunction"
    first: Item
    second: Item

    def judge(self, scene: Scene) -> Label:
        """The label for `scene`."""
        missing = len({self.first, self.second} - set(scene.items))
        # Each missing one needs a hidden cell of its own, so one cell cannot make up for two.
        return _verdict(certain=missing == 0, possible=missing <= scene.num_hidden)


Hypothesis = Presence | Absence | Count | Conjunction

#: The sentence forms, in the order in which they are reported.
FORMS = tuple(form.form for form in (Presence, Absence, Count, Conjunction))


def descriptions() -> list[Description]:
    """Everything presence and absence can be about: coloured shapes, colours, shapes."""
    return [
        *(Description(*item) for item in ITEMS),
        *(Description(color, None) for color in COLORS),
        *(Description(None, shape) for shape in SHAPES),
    ]


def item_pairs() -> list[tuple[Item, Item]]:
    """Every unordered pair of different coloured shapes."""
    return list(combinations(ITEMS, 2))
