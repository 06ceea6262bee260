"""A sample of translations, side by side, for someone who speaks the language."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from clseave_cli.core.data.text_files import Row
from clseave_cli.core.files import atomic_file


class _Pick(NamedTuple):
    line: int
    name: str
    text: str
    translation: str
    suspicions: tuple[str, ...]


class Sample:
    """Rows drawn at random while they pass by, half of them from among the suspect ones.

    Args:
        size: how many rows.
        seed: of the draw.
        title: name of the file they come from.
    """

    def __init__(self, size: int, seed: int, title: str) -> None:
        self._size = size
        self._title = title
        self._random = random.Random(seed)
        self._picks: dict[bool, list[_Pick]] = {True: [], False: []}
        self._seen = {True: 0, False: 0}

    def offer(self, row: Row, translation: str, suspicions: tuple[str, ...]) -> None:
        """Takes a row into the sample, or does not (reservoir sampling, algorithm R)."""
        group = bool(suspicions)
        picks = self._picks[group]
        self._seen[group] += 1
        place = len(picks)
        if place == self._size:
            place = self._random.randrange(self._seen[group])
            if place >= self._size:
                return
            picks.pop(place)
        name = row.pair_id or f"line {row.line}"
        picks.insert(place, _Pick(row.line, name, row.text, translation, suspicions))

    def write(self, target: Path) -> None:
        """Writes the sample as Markdown."""
        num_suspect = min(
            len(self._picks[True]), max(self._size // 2, self._size - len(self._picks[False]))
        )
        suspect = sorted(self._picks[True][:num_suspect])
        others = sorted(self._picks[False][: self._size - num_suspect])
        lines = [
            f"# {self._title}: translations to look over",
            "",
            f"{len(suspect) + len(others)} of {sum(self._seen.values())} rows, drawn at random; "
            f"the first {len(suspect)} are from the {self._seen[True]} that a check found suspect.",
            "Put an x into the last column where a translation is wrong.",
            "",
            "| row | source | translation | found by checks | wrong |",
            "|---|---|---|---|---|",
        ]
        for pick in [*suspect, *others]:
            cells = (pick.name, pick.text, pick.translation, ", ".join(pick.suspicions), "")
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        with atomic_file(target) as stream:
            stream.write(("\n".join(lines) + "\n").encode("utf-8", "replace"))


def _cell(text: str) -> str:
    for character in "\\|<`*_[":
        text = text.replace(character, "\\" + character)
    return " ".join("<br>".join(text.splitlines()).replace("\0", " ").split())
