"""Writes the translated file, the lists of failed and suspect rows, and a sample to review."""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.rows import json_line, packing, split_name
from clseave_cli.core.data.text_files import Row, TextFile
from clseave_cli.core.files import atomic_file, sweep
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.errors import DataError

#: What `write_file` counts, besides rows marked by each check, and the lists it writes.
COUNTS = ("rows", "unchanged", "failed", "dropped", "suspect")
LISTS = ("failed", "rejected", "suspect")


class Outputs:
    """Replaces only files that `translate` wrote and nobody changed, unless `overwrite`."""

    def __init__(self, memory: Memory, overwrite: bool) -> None:
        self._memory = memory
        self._overwrite = overwrite

    def check(self, target: Path) -> None:
        """Raises a DataError if `target` must not be replaced."""
        if not self._overwrite and target.exists() and not self._memory.has_written(target):
            raise DataError(
                f"{target}: exists already, and `translate` did not write it or it was changed "
                "since; move it away, or replace it with --overwrite."
            )

    @contextmanager
    def replacing(self, target: Path) -> Iterator[BinaryIO]:
        """`atomic_file` for files that may be replaced."""
        with atomic_file(target) as stream:
            yield stream
            stream.flush()
            self.check(target)
            # Recorded before the rename, so that after a kill it does not pass for the user's.
            self._memory.record_output(target, Path(stream.name))

    def remove(self, target: Path) -> None:
        """Removes what an earlier run wrote; leaves other files alone."""
        if target.exists() and self._memory.has_written(target):
            target.unlink()


class _NothingTranslated(Exception):
    """Keeps the existing file."""


def review_path(target: Path) -> Path:
    """The path of a translated file's sample."""
    return target.with_name(f"{split_name(target)[0]}.review.md")


def write_file(
    file: TextFile,
    target: Path,
    config: TranslateConfig,
    outputs: Outputs,
    rows: Iterable[tuple[Row, Entry | str]],
) -> tuple[Counter[str], dict[str, Path]]:
    """Writes a translated file, its lists and its sample.

    An existing target is kept if no row is translated. `rows` are rows with their translations, or
    with the reasons why they have none.

    Returns:
        The numbers of all, translated, unchanged, failed, dropped and suspect rows, and of rows
        marked by each check; and the files written: `output`, `review`, and any of `LISTS`.

    Raises:
        DataError: a target is not ours to replace.
    """
    stem, _ = split_name(target)
    # The lock on the target covers its lists, too.
    sweep(target.parent, rf"{re.escape(stem)}\.(failed|rejected|suspect|review)\.\w+")
    sample = Sample(config.review, config.seed, file.path.name)
    counts: Counter[str] = Counter()
    paths: dict[str, Path] = {}
    with (
        ExitStack() as lists,
        suppress(_NothingTranslated),
        outputs.replacing(target) as stream,
        packing(target, stream) as packed,
        file.writer(packed) as write,
    ):
        streams: dict[str, BinaryIO] = {}

        def set_aside(name: str, row: Row, reason: str, **more: str) -> None:
            """Adds a row to a list."""
            if name not in streams:
                paths[name] = target.with_name(f"{stem}.{name}.jsonl")
                streams[name] = lists.enter_context(outputs.replacing(paths[name]))
            values = {"line": row.line, "pairID": row.pair_id, "text": row.text, **more}
            values = {key: value for key, value in values.items() if value is not None}
            streams[name].write(json_line({**values, "reason": reason}))

        for row, entry in rows:
            kept = None if isinstance(entry, str) else entry
            if isinstance(entry, str):
                counts["failed"] += 1
                set_aside("failed", row, entry)
            elif suspicions := entry.suspicions:
                counts.update(("suspect", *suspicions))
                drops = config.on_suspect == "drop"
                counts["dropped"] += drops
                if drops or not file.marks_rows:
                    name, reason = "rejected" if drops else "suspect", ", ".join(suspicions)
                    set_aside(name, row, f"suspect: {reason}", translation=entry.translation)
                kept = None if drops else entry
            if kept is not None:
                counts["translated" if kept.attempts else "unchanged"] += 1
                write(row, kept.translation, kept.suspicions)
                if config.review:
                    sample.offer(row, kept)
            elif not file.marks_rows:
                write(row, "", ())  # keeps the other lines in their places
        num_skipped = counts["failed"] + counts["dropped"]
        counts["rows"] = counts["translated"] + counts["unchanged"] + num_skipped
        if not counts["translated"] and (num_skipped or (not counts["rows"] and target.exists())):
            raise _NothingTranslated
        paths["output"] = target
    for name in set(LISTS) - paths.keys():
        outputs.remove(target.with_name(f"{stem}.{name}.jsonl"))  # an earlier run's
    if config.review and "output" in paths:
        paths["review"] = review_path(target)
        with outputs.replacing(paths["review"]) as stream:
            stream.write(sample.markdown().encode("utf-8", "replace"))
    return counts, paths


class Sample:
    """Rows drawn at random while they are written, half of them suspect, if there are enough."""

    def __init__(self, size: int, seed: int, title: str) -> None:
        self._size = size
        self._title = title
        self._random = random.Random(seed)
        # Heaps of suspect and other rows drawn: lot, line, row of the table.
        self._picks: dict[bool, list[tuple[float, int, str]]] = {True: [], False: []}
        self._seen = {True: 0, False: 0}

    def offer(self, row: Row, entry: Entry) -> None:
        """Draws a lot for a row and keeps the row while the lot is among the highest."""
        is_suspect = bool(entry.suspicions)
        picks, lot = self._picks[is_suspect], self._random.random()
        self._seen[is_suspect] += 1
        if len(picks) == self._size and lot < picks[0][0]:
            return
        name = row.pair_id or f"line {row.line}"
        cells = (name, row.text, entry.translation, ", ".join(entry.suspicions), "")
        heapq.heappush(picks, (lot, row.line, "| " + " | ".join(map(_cell, cells)) + " |"))
        if len(picks) > self._size:
            heapq.heappop(picks)

    def markdown(self) -> str:
        """The sample as a Markdown table."""
        suspect, others = self._picks[True], self._picks[False]
        suspect = heapq.nlargest(max(self._size // 2, self._size - len(others)), suspect)
        others = heapq.nlargest(self._size - len(suspect), others)
        parts = (sorted(part, key=lambda pick: pick[1]) for part in (suspect, others))
        rows = [row for part in parts for _, _, row in part]
        table = "\n".join(rows)
        return f"""# {self._title}: translations to review

{len(rows)} of {sum(self._seen.values())} rows, drawn at random; the first {len(suspect)} are from \
the {self._seen[True]} that a check marked.
Put an x into the last column where a translation is wrong.

| row | source | translation | marked by | wrong |
|---|---|---|---|---|
{table}
"""


def _cell(text: str) -> str:
    for character in "\\|<`*_[":
        text = text.replace(character, "\\" + character)
    return " ".join("<br>".join(text.splitlines()).replace("\0", " ").split())
