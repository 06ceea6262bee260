"""How close a student's sentence embeddings come to its teacher's.

N sentences · D embedding width
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Matrix = npt.NDArray[np.float32]

# Similarities held at once, as float32: 64 MB.
_SIMILARITIES_AT_ONCE = 16_000_000

# Float32 products of equal vectors differ in their last bits with the place in the matrix; two
# cosines this close are taken for equal.
_TIE = 1e-6


@dataclass(frozen=True)
class Transfer:
    """Distances between student and teacher embeddings of the same sentences.

    Attributes:
        num_sentences: N.
        mse: mean squared error per sentence and dimension.
        mae: mean absolute error per sentence and dimension.
        mse_sum: squared error summed over dimensions, per sentence: `mse` · D. The thesis's
            validation figure (its Table A.2: 7.62 to 8.33 at D = 512, so 0.0149 to 0.0163).
        mae_sum: absolute error summed over dimensions, per sentence (the thesis: 46 to 48).
        cosine: mean cosine of the two embeddings of a sentence.
        retrieval_to_teacher: share of student embeddings whose nearest teacher embedding (by
            cosine) is of the same sentence.
        retrieval_to_student: the same from the teacher's side.
        variance_student: variance over sentences, mean over dimensions; near 0: collapsed.
        variance_teacher: the same for the teacher, for comparison.
    """

    num_sentences: int
    mse: float
    mae: float
    mse_sum: float
    mae_sum: float
    cosine: float
    retrieval_to_teacher: float
    retrieval_to_student: float
    variance_student: float
    variance_teacher: float


def measure_transfer(
    student: npt.ArrayLike, teacher: npt.ArrayLike, sentences: npt.ArrayLike
) -> Transfer:
    """Compares the embeddings of the same sentences.

    Args:
        student: (N, D) embeddings of the translations.
        teacher: (N, D) embeddings of the English originals, in the same order.
        sentences: (N,) identity of each sentence, e.g. its English text: rows that share one are
            the same sentence, and retrieving any of them is a hit.

    Raises:
        ValueError: no rows, or shapes that do not match.
    """
    ours = np.asarray(student, dtype=np.float32)
    target = np.asarray(teacher, dtype=np.float32)
    if ours.ndim != 2 or ours.shape != target.shape or not ours.size:
        raise ValueError(f"need equal (N, D) embeddings, not {ours.shape} and {target.shape}")
    _, groups = np.unique(np.asarray(sentences), return_inverse=True)
    if groups.shape != ours.shape[:1]:
        raise ValueError(f"{len(ours)} embeddings need as many sentences, not {groups.shape}")
    error = ours - target
    mse = float(np.mean(np.square(error), dtype=np.float64))
    mae = float(np.mean(np.abs(error), dtype=np.float64))
    ours_unit, target_unit = _unit(ours), _unit(target)
    return Transfer(
        num_sentences=len(ours),
        mse=mse,
        mae=mae,
        mse_sum=mse * ours.shape[1],
        mae_sum=mae * ours.shape[1],
        cosine=float(np.mean(np.sum(ours_unit * target_unit, axis=1), dtype=np.float64)),
        retrieval_to_teacher=_retrieval(ours_unit, target_unit, groups),
        retrieval_to_student=_retrieval(target_unit, ours_unit, groups),
        variance_student=_variance(ours),
        variance_teacher=_variance(target),
    )


def _unit(vectors: _Matrix) -> _Matrix:
    """Rows scaled to length 1; a zero row stays zero, with cosine 0 to everything."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: _Matrix = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return unit


def _variance(vectors: _Matrix) -> float:
    return float(np.var(vectors, axis=0, dtype=np.float64).mean())


def _retrieval(queries: _Matrix, candidates: _Matrix, groups: npt.NDArray[np.int64]) -> float:
    """Accuracy of nearest-neighbour retrieval; row i of both sides is sentence `groups[i]`.

    Where several candidates are equally near, the query counts the share of them that are hits:
    what picking one at random gives, so collapsed embeddings score chance, not 100 %.
    """
    hits = 0.0
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(candidates))
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ candidates.T  # (chunk, N)
        nearest = similarity >= similarity.max(axis=1, keepdims=True) - _TIE
        same = groups[start : start + chunk, None] == groups[None, :]
        hits += float(np.sum((nearest & same).sum(axis=1) / nearest.sum(axis=1)))
    return hits / len(queries)
