"""Exceptions: everything the program refuses is a `ClseaveError`.

`main` prints the message on one line of stderr and exits with `exit_code`. A message says what is
wrong, where (file and line), what was expected, and what to do.
"""

from __future__ import annotations

import re
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class ClseaveError(Exception):
    """Anything clseave refuses, with a one-line message for the user."""

    exit_code = 1

    def __str__(self) -> str:
        """The message, with control characters (from file names, say) escaped."""
        return _CONTROL.sub(lambda match: repr(match[0])[1:-1], super().__str__())


class UsageError(ClseaveError):
    """The command line or configuration asks for something invalid."""

    exit_code = 2


class DataError(ClseaveError):
    """An input file, row or image is missing, damaged or inconsistent."""

    @classmethod
    def at(cls, path: Path | str, line: int, message: str) -> DataError:
        """An error in one line of a file: `file:line: message`."""
        return cls(f"{path}:{line}: {message}")


class ExtraMissing(ClseaveError):
    """An optional package is needed and not installed."""


class ModelError(ClseaveError):
    """A model folder is missing, damaged, or does not fit the other models."""


class TrainingError(ClseaveError):
    """Training cannot go on: the loss is not finite, or the embeddings collapsed."""


class TranslationError(ClseaveError):
    """A translation engine fails, or rows are left untranslated."""


class Interrupted(ClseaveError):
    """The user stopped the run; everything finished so far is on disk."""

    exit_code = 130
