"""Answers, one JSON object a line: a run that was killed goes on after its last whole line."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clseave_cli.core.files import atomic_file, fsync_folder, locked_target, sweep, writing
from clseave_cli.errors import DataError, UsageError

#: What an answer says beside image and hypothesis.
ANSWER_KEYS = ("lang", "label", "probabilities", "model", "truncated", "error")


class AnswerFile:
    """Collects answers in `TARGET.partial`, which takes the target's name when all are there.

    A context manager: in its block no other process writes these answers.

    Args:
        target: the file that will hold the answers; an older one stays until then.
        resume: go on with what an interrupted run left, or after what a finished one wrote.

    Attributes:
        finished: the earlier answers are those of a run that ended, in the target.

    Raises:
        UsageError: an interrupted run left answers, and `resume` is not set; or the target is a
            file of something else.
        ClseaveError: another process is writing there, or the folder cannot be written.
    """

    def __init__(self, target: Path, resume: bool) -> None:
        self.target, self._resume = target, resume
        self.partial = target.with_name(target.name + ".partial")
        self.finished = False
        self._lock = ExitStack()

    def __enter__(self) -> AnswerFile:
        with ExitStack() as lock:
            lock.enter_context(locked_target(self.target))
            there = self.partial.exists()
            if there and not self._resume:
                raise UsageError(
                    f"{self.partial}: an unfinished run lies there; --resume continues it, "
                    "deleting that file forgets it."
                )
            self.finished = self._resume and self.target.exists() and not there
            if not self.finished and self.target.exists():
                self._require_answers()
            sweep(self.target.parent, re.escape(self.partial.name))
            self._lock = lock.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _require_answers(self) -> None:
        with writing(self.target), self.target.open("rb") as stream:
            first = stream.readline()
        answer = _whole_answer(first) or {}
        if first and not answer.keys() & {"label", "error"}:
            raise UsageError(
                f"{self.target}: is there already and holds no answers; choose another --output."
            )

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The answers to go on after; at the end, what an interruption tore is cut off the file.

        Raises:
            DataError: a finished file is damaged; nothing is cut off it.
        """
        path = self.target if self.finished else self.partial
        if not path.exists():
            return
        with writing(path), path.open("rb" if self.finished else "r+b") as stream:
            whole = 0
            for number, line in enumerate(stream, start=1):
                answer = _whole_answer(line)
                if answer is None and self.finished:
                    raise DataError.at(
                        path,
                        number,
                        "damaged, not a whole answer; choose another --output, or leave out "
                        "--resume to replace that file.",
                    )
                if answer is None:
                    break
                whole += len(line)
                yield answer
            if not self.finished:
                stream.truncate(whole)

    def reopen(self) -> None:
        """Takes a finished file's answers over, to write further ones after them."""
        # A copy: the finished file stays whole until there is a longer one.
        with self.target.open("rb") as answers, atomic_file(self.partial) as stream:
            shutil.copyfileobj(answers, stream)
        self.finished = False

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Where to write further answers; once the block ends well, the target is complete."""
        with writing(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.partial.open("ab") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
            except BaseException:
                if self.partial.exists() and not self.partial.stat().st_size:
                    self.partial.unlink()
                raise
            self.partial.replace(self.target)
            fsync_folder(self.target.parent)


def _whole_answer(line: bytes) -> dict[str, Any] | None:
    # After a power cut, a line may be there in length only.
    try:
        answer = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
