"""What the rows give away without looking, kept: half a million of them take long to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn

from clseave_cli.core.evaluation.metrics.bootstrap import Ints
from clseave_cli.core.files import cache_root, file_digest, json_digest, read_json, write_json
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

#: Raised when `baselines.predict_from_hypotheses` changes: older guesses are then made again.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Guesses:
    """Labels guessed without a photo.

    Attributes:
        majority: the training rows' most frequent label id.
        labels: (M,) int label ids by the hypothesis-only classifier.
    """

    majority: int
    labels: Ints


def kept_guesses(
    training: Path, asked: list[Any], count: int, make: Callable[[], Guesses]
) -> Guesses:
    """`make()`, or what it gave when the same was asked of the same training file before.

    Args:
        training: file of the training rows, known by its digest.
        asked: everything else that decides the guesses or whether they may be made, as JSON.
        count: M, the number of guesses.
        make: learns and guesses.
    """
    key = json_digest([_VERSION, sklearn.__version__, file_digest(training), asked])
    path = cache_root() / "hypothesis-only" / f"{key}.json"
    known = _read(path, count)
    if known is not None:
        return known
    made = make()
    write_json(path, {"majority": made.majority, "labels": made.labels.tolist()})
    return made


def _read(path: Path, count: int) -> Guesses | None:
    """What a file of guesses holds; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        stored: Any = read_json(path)
        majority, labels = stored["majority"], stored["labels"]
        whole = len(labels) == count
    except (ModelError, TypeError, KeyError):
        return None
    if not whole or not all(label in range(len(LABELS)) for label in [majority, *labels]):
        return None
    return Guesses(majority, np.array(labels, dtype=np.int64))
