"""Scores of one set of logits: accuracy, loss, per-class figures, calibration.

N rows · C = 3 labels, in the order of `clseave_cli.labels.LABELS`
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from clseave_cli.core.evaluation.metrics.bootstrap import (
    Floats,
    Interval,
    Ints,
    accuracy_interval,
    cluster_sums,
    interval,
    mean_interval,
)
from clseave_cli.labels import LABELS

#: Bins of equal width in which calibration is measured.
NUM_BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of one label; 0 where nothing is predicted or nothing there."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ReliabilityPoint:
    """One bin of the reliability curve: how sure the model was there, and how often right."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Scores:
    """Everything said about one set of predictions; accuracies are fractions.

    Attributes:
        num_examples: N.
        num_images: photos the rows share.
        accuracy: share of rows whose largest logit is the gold label's, with its 95 % interval.
        macro_f1: unweighted mean of the three F1, with its 95 % interval.
        loss: mean cross-entropy in nats, with its 95 % interval.
        confusion: (C, C) counts; row: gold label, column: predicted.
        per_class: by label name.
        ece: expected calibration error, a fraction.
        reliability: the non-empty bins behind `ece`, from unsure to sure.
    """

    num_examples: int
    num_images: int
    accuracy: Interval
    macro_f1: Interval
    loss: Interval
    confusion: tuple[tuple[int, ...], ...]
    per_class: dict[str, ClassScores]
    ece: float
    reliability: tuple[ReliabilityPoint, ...]


def probabilities(logits: npt.ArrayLike) -> Floats:
    """Softmax over the labels, in double precision.

    Args:
        logits: (N, C) raw scores of the head.
    """
    result: Floats = np.exp(log_softmax(np.asarray(logits, dtype=np.float64), axis=1))
    return result


def score(
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    images: npt.ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Scores:
    """Scores one set of predictions.

    Args:
        labels: (N,) int gold label ids, all of them labelled.
        logits: (N, C) raw scores; logarithms of probabilities do as well.
        images: (N,) photo of each row (numbers or strings): the unit of the bootstrap.
        resamples: bootstrap resamples behind the intervals.
        seed: seed of the resampling.

    Raises:
        ValueError: no rows, shapes that do not match, a row without label, logits not finite.
    """
    gold, log_p = _checked(labels, logits, images)
    predicted = log_p.argmax(axis=1)
    num_labels = len(LABELS)
    confusion = confusion_matrix(gold, predicted, labels=range(num_labels))
    precision, recall, f1, support = precision_recall_fscore_support(
        gold, predicted, labels=range(num_labels), zero_division=0.0
    )
    cells = np.zeros((len(gold), num_labels**2))
    cells[np.arange(len(gold)), gold * num_labels + predicted] = 1.0
    sums = cluster_sums(cells, images)
    ece, reliability = calibration(gold, np.exp(log_p))
    return Scores(
        num_examples=len(gold),
        num_images=len(sums),
        accuracy=accuracy_interval(gold == predicted, images, resamples=resamples, seed=seed),
        macro_f1=interval(sums, macro_f1, resamples=resamples, seed=seed),
        loss=mean_interval(
            -log_p[np.arange(len(gold)), gold], images, resamples=resamples, seed=seed
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class={
            name: ClassScores(
                float(precision[index]), float(recall[index]), float(f1[index]), int(support[index])
            )
            for index, name in enumerate(LABELS)
        },
        ece=ece,
        reliability=reliability,
    )


def _checked(
    labels: npt.ArrayLike, logits: npt.ArrayLike, images: npt.ArrayLike
) -> tuple[Ints, Floats]:
    gold = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(logits, dtype=np.float64)
    if gold.ndim != 1 or not len(gold):
        raise ValueError(f"labels must be a non-empty vector, not of shape {gold.shape}")
    if scores.shape != (len(gold), len(LABELS)) or np.shape(images) != gold.shape:
        raise ValueError(
            f"{len(gold)} labels need logits of shape {(len(gold), len(LABELS))} and as many "
            f"images, not {scores.shape} and {np.shape(images)}"
        )
    if gold.min() < 0 or gold.max() >= len(LABELS):
        raise ValueError("every row needs a label; leave unlabelled rows out")
    if not np.isfinite(scores).all():
        raise ValueError("logits are not finite")
    return gold, log_softmax(scores, axis=1)


def macro_f1(cells: Floats) -> Floats:
    """Macro-F1 of flattened confusion matrices.

    Args:
        cells: (…, C·C) counts, gold label first.

    Returns:
        (…) mean over the labels of 2·tp / (gold + predicted), 0 for a label that has neither.
    """
    num_labels = len(LABELS)
    matrix = cells.reshape(*cells.shape[:-1], num_labels, num_labels)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    totals = matrix.sum(axis=-1) + matrix.sum(axis=-2)
    f1 = np.divide(2 * hits, totals, out=np.zeros_like(hits), where=totals > 0)
    result: Floats = f1.mean(axis=-1)
    return result


def calibration(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_bins: int = NUM_BINS
) -> tuple[float, tuple[ReliabilityPoint, ...]]:
    """Expected calibration error and the reliability curve.

    ECE = Σ_b (n_b / N) · |accuracy_b − confidence_b| over bins ((b−1)/B, b/B] of the largest
    probability (Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3).

    Args:
        labels: (N,) int gold label ids.
        probabilities: (N, C) in [0, 1].
        num_bins: B.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    confidence = p.max(axis=1)
    right = p.argmax(axis=1) == np.asarray(labels)
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    sizes = np.bincount(bins, minlength=num_bins)
    points = tuple(
        ReliabilityPoint(float(total_p / size), float(total_right / size), int(size))
        for total_p, total_right, size in zip(
            np.bincount(bins, weights=confidence, minlength=num_bins),
            np.bincount(bins, weights=right, minlength=num_bins),
            sizes,
            strict=True,
        )
        if size
    )
    ece = sum(point.count * abs(point.accuracy - point.confidence) for point in points) / len(p)
    return ece, points


def agreement(logits_first: npt.ArrayLike, logits_second: npt.ArrayLike) -> float:
    """Share of rows that two models give the same label, right or wrong.

    Args:
        logits_first: (N, C).
        logits_second: (N, C), same rows in the same order.
    """
    first, second = np.asarray(logits_first), np.asarray(logits_second)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"need equal, non-empty logits, not {first.shape} and {second.shape}")
    return float(np.mean(first.argmax(axis=1) == second.argmax(axis=1)))
