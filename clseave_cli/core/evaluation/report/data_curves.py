"""How good a student gets from how many sentences: the points, as JSON, Markdown and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clseave_cli.core.evaluation.report.figures import draw_data_curves
from clseave_cli.core.evaluation.report.numbers import DASH, decimal, percent
from clseave_cli.core.files import Kind, atomic_file, write_json

JSON_FILE, MARKDOWN_FILE, FIGURE_FILE = "curve.json", "curve.md", "curve.png"

#: The folder of `curve`, finished or not.
DATA_CURVE = Kind(
    "a data curve",
    rf"{JSON_FILE}|{MARKDOWN_FILE}|{FIGURE_FILE}|[\w+-]+-(\d+|all)/.+|\..+\.clseave-[0-9a-f]{{8}}",
)


@dataclass(frozen=True)
class DataPoint:
    """One student in one of its languages.

    Attributes:
        lang: the language measured.
        languages: those the student was trained on.
        num_sentences: distinct source sentences of each it learnt from.
        dev: dev figures of the weights that were kept, in this language.
        seconds: its training took.
        accuracy: on the test split, a fraction; None where there is no such split.
        accuracy_low: lower end of its 95 % interval.
        accuracy_high: upper end.
    """

    lang: str
    languages: tuple[str, ...]
    num_sentences: int
    dev: dict[str, float]
    seconds: float
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DataPoint:
        """From what `DataCurves.to_json` makes of it."""
        return cls(**{**value, "languages": tuple(value["languages"])})

    @property
    def series(self) -> str:
        """Which curve it is on: `de`, or `de of de+nl`."""
        together = "+".join(self.languages)
        return self.lang if len(self.languages) == 1 else f"{self.lang} of {together}"


@dataclass(frozen=True)
class DataCurves:
    """The points of all curves.

    Attributes:
        points: by number of sentences.
        split: that accuracy was measured on.
        english: accuracy of the teacher there, in its own language.
        signature: version, fingerprints of data and teacher, seed and resamples, in one line.
    """

    points: tuple[DataPoint, ...]
    split: str
    english: float | None
    signature: str

    @property
    def series(self) -> list[str]:
        """The curves, in order."""
        return sorted(
            {point.series for point in self.points}, key=lambda name: (" of " in name, name)
        )

    @property
    def figure(self) -> tuple[str, str]:
        """The figure that every point has, most telling first: its key, and its name."""
        if all(point.accuracy is not None for point in self.points):
            return "accuracy", f"accuracy on {self.split}, %"
        if all("accuracy" in point.dev for point in self.points):
            return "dev accuracy", "accuracy on dev, %"
        return "recall_at_10", "retrieval among the nearest ten on dev, %"

    def value(self, point: DataPoint) -> float:
        """That figure of a point, a fraction."""
        name, _ = self.figure
        if name == "accuracy":
            assert point.accuracy is not None
            return point.accuracy
        return point.dev[name.removeprefix("dev ")]

    def rows(self) -> list[list[str]]:
        """A table of that figure, in per cent: a row for each number of sentences."""
        numbers = sorted({point.num_sentences for point in self.points})
        known = {(p.num_sentences, p.series): percent(self.value(p)) for p in self.points}
        return [
            [f"{number:,}", *(known.get((number, name), DASH) for name in self.series)]
            for number in numbers
        ]

    def to_json(self) -> dict[str, Any]:
        """The document `curve --json` prints."""
        points = [dataclasses.asdict(point) for point in self.points]
        return {
            "split": self.split,
            "english": self.english,
            "points": points,
            "signature": self.signature,
        }

    def write(self, folder: Path) -> None:
        """Writes JSON, Markdown and the figure.

        Raises:
            ClseaveError: the disk is full or read-only.
        """
        write_json(folder / JSON_FILE, self.to_json())
        with atomic_file(folder / FIGURE_FILE) as stream:
            stream.write(draw_data_curves(self))
        with atomic_file(folder / MARKDOWN_FILE) as stream:
            stream.write(self._markdown().encode())

    def _markdown(self) -> str:
        lines = [["sentences", *self.series]]
        lines += [["---:"] * len(lines[0]), *self.rows()]
        english = "" if self.english is None else f" The teacher itself: {percent(self.english)}."
        details = [["student", "lang", "sentences", "dev MSE", "dev cosine", "seconds"]]
        details += [["---", "---", *["---:"] * 4]]
        details += [
            [
                "+".join(point.languages),
                point.lang,
                f"{point.num_sentences:,}",
                decimal(point.dev.get("mse"), 4),
                decimal(point.dev.get("cosine")),
                decimal(point.seconds, 0),
            ]
            for point in self.points
        ]
        return (
            "\n\n".join(
                [
                    "# Students by number of sentences",
                    f"In the table: {self.figure[1]}.{english}",
                    _table(lines),
                    f"![{self.figure[1]}]({FIGURE_FILE})",
                    _table(details),
                    self.signature,
                ]
            )
            + "\n"
        )


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
