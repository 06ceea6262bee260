"""Retrieval by cosine: how many wrong answers come before the first right one.

Legend: Q queries · C candidates · D embedding width · I images · T texts · P pairs of the two
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]

#: Similarities held at once, as float32: 64 MB.
_SIMILARITIES_AT_ONCE = 16_000_000
#: Float32 products of equal vectors differ in their last bits with the place in the matrix; two
#: cosines this close are taken for equal.
_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where the nearest right answer of each of Q queries stands.

    Answers that are equally near stand in random order, and all numbers are the expected ones:
    embeddings that are all alike score chance.

    Attributes:
        ahead: (Q,) wrong answers that are nearer than it.
        right: (Q,) right answers that are as near as it, itself included.
        wrong: (Q,) wrong answers that are as near as it.
    """

    ahead: Ints
    right: Ints
    wrong: Ints

    @property
    def mean(self) -> Floats:
        """(Q,) ranks from 1, averaged over the orders of equally near answers."""
        ranks: Floats = 1 + self.ahead + self.wrong / (self.right + 1)
        return ranks

    def within(self, count: int) -> Floats:
        """(Q,) how likely a right answer is among the first `count`: 0 or 1 without ties."""
        missed = np.ones(len(self.ahead))
        for place in range(count):  # one equally near answer after the other
            left = np.maximum(self.wrong - place, 0)
            missed *= np.where(place < count - self.ahead, left / (left + self.right), 1.0)
        return 1 - missed

    def take(self, rows: Rows) -> Ranks:
        """The ranks of some queries."""
        return Ranks(self.ahead[rows], self.right[rows], self.wrong[rows])


def rank(
    queries: npt.ArrayLike,
    candidates: npt.ArrayLike,
    right: Callable[[slice], npt.NDArray[np.bool_]],
) -> Ranks:
    """Ranks all candidates for each query, by cosine.

    Args:
        queries: (Q, D) embeddings; one of length 0 has cosine 0 to everything.
        candidates: (C, D) embeddings.
        right: for some of the queries, (q, C), which answers are right; at least one for each.
    """
    units, others = _unit(queries), _unit(candidates)
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(others))
    counts = []
    for start in range(0, len(units), chunk):
        rows = slice(start, min(start + chunk, len(units)))
        similarity, is_right = units[rows] @ others.T, right(rows)  # (q, C)
        best = np.where(is_right, similarity, -np.inf).max(axis=1, keepdims=True)
        nearer = similarity > best + _TIE
        equal = (similarity >= best - _TIE) & ~nearer
        counts.append([part.sum(axis=1) for part in (nearer, equal & is_right, equal & ~is_right)])
    return Ranks(*np.concatenate(counts, axis=1))


def _unit(vectors: npt.ArrayLike) -> Vectors:
    """(N, D) vectors of length 1, or 0."""
    rows = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: Vectors = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return units


def rank_captions(images: npt.ArrayLike, texts: npt.ArrayLike, pairs: Rows) -> tuple[Ranks, Ranks]:
    """Ranks images for texts, and texts for images.

    Args:
        images: (I, D) embeddings.
        texts: (T, D) embeddings of distinct texts.
        pairs: (2, P) texts, and the images that they are captions of.

    Returns:
        The T ranks of images, and the I ranks of texts.
    """

    def right(queries: Rows, answers: Rows) -> Callable[[slice], npt.NDArray[np.bool_]]:
        def of(rows: slice) -> npt.NDArray[np.bool_]:
            inside = (queries >= rows.start) & (queries < rows.stop)
            mask = np.zeros((rows.stop - rows.start, answers.max() + 1), dtype=np.bool_)
            mask[queries[inside] - rows.start, answers[inside]] = True
            return mask

        return of

    return rank(texts, images, right(*pairs)), rank(images, texts, right(*pairs[::-1]))
