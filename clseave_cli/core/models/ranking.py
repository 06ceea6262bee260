"""Retrieval by cosine: how many wrong answers rank above the best right one.

Legend: Q queries · C candidates · D embedding width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

#: Similarities held at once, as float32: 64 MB.
_SIMILARITIES_AT_ONCE = 16_000_000
#: Cosines this close count as equal: float32 products of equal vectors differ in their last bits,
#: depending on where they are in the matrix.
_TIE = 1e-6


class Ranks(NamedTuple):
    """Ranks of the nearest right answer to each of Q queries.

    Ties are broken at random and all numbers are expected values, so that identical embeddings
    score chance.
    """

    ahead: npt.NDArray[np.int64]  # (Q,) wrong answers that are nearer
    right: npt.NDArray[np.int64]  # (Q,) right answers that are as near, itself included
    wrong: npt.NDArray[np.int64]  # (Q,) wrong answers that are as near

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """(Q,) ranks, counted from 1."""
        ranks: npt.NDArray[np.float64] = 1 + self.ahead + self.wrong / (self.right + 1)
        return ranks

    def within(self, count: int) -> npt.NDArray[np.float64]:
        """(Q,) probability of a right answer among the first `count`: 0 or 1 without ties."""
        missed = np.ones(len(self.ahead))
        for place in range(count):  # one tied answer after another
            left = np.maximum(self.wrong - place, 0)
            missed *= np.where(place < count - self.ahead, left / (left + self.right), 1.0)
        return 1 - missed


def rank(queries: npt.ArrayLike, candidates: npt.ArrayLike, right: Callable[[slice], Any]) -> Ranks:
    """Ranks all candidates for each query, by cosine.

    Args:
        queries: (Q, D) embeddings; one of length 0 has cosine 0 to everything.
        candidates: (C, D) embeddings.
        right: maps a slice of the queries to their right answers, (q, C) bool, at least one each.
    """
    units, others = _unit(queries), _unit(candidates)
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(others))
    counts = []
    for start in range(0, len(units), chunk):
        rows = slice(start, start + chunk)
        similarity, is_right = units[rows] @ others.T, right(rows)  # (q, C)
        best = np.where(is_right, similarity, -np.inf).max(axis=1, keepdims=True)
        nearer = similarity > best + _TIE
        equal = (similarity >= best - _TIE) & ~nearer
        counts.append([part.sum(axis=1) for part in (nearer, equal & is_right, equal & ~is_right)])
    return Ranks(*np.concatenate(counts, axis=1))


def rank_pairs(
    queries: npt.ArrayLike, candidates: npt.ArrayLike, query: Any, candidate: Any
) -> Ranks:
    """Ranks (C, D) candidates for (Q, D) queries, given the row numbers of the right pairs."""
    shape = len(np.asarray(queries)), len(np.asarray(candidates))
    right = csr_array((np.ones(len(query), dtype=np.bool_), (query, candidate)), shape=shape)
    return rank(queries, candidates, lambda rows: right[rows].toarray())


def _unit(vectors: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """(N, D) vectors of length 1, or 0."""
    rows = np.asarray(vectors, dtype=np.float32)
    lengths: npt.NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return rows / lengths
