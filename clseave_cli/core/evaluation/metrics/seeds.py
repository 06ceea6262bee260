"""One figure over several training seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clseave_cli.core.evaluation.metrics.bootstrap import Interval, accuracy_interval, gain_interval


@dataclass(frozen=True)
class SeedSummary:
    """A figure over several seeds.

    Attributes:
        num_seeds: trainings.
        mean: of the figure.
        std: sample deviation (n − 1), 0 for one seed: the luck of the training.
        min: the smallest.
        max: the largest.
        low: lower end of the mean's 95 % interval by bootstrap over photos, the trainings as they
            are: the choice of the photos. None where not measured.
        high: upper end.
    """

    num_seeds: int
    mean: float
    std: float
    min: float
    max: float
    low: float | None = None
    high: float | None = None


def summarise_seeds(values: Sequence[float]) -> SeedSummary:
    """Mean, sample standard deviation, smallest and largest of one figure, one value a seed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("nothing to summarise")
    return SeedSummary(
        num_seeds=len(values),
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        min=float(min(values)),
        max=float(max(values)),
    )


def mean_accuracy_interval(
    correct: Sequence[npt.ArrayLike], images: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """The mean accuracy of several trainings on the same rows, with its 95 % interval.

    All trainings are scored on the same resamples of photos.

    Args:
        correct: (N,) bool a training, the same rows in the same order.
        images: (N,) photo of each row.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    share = np.mean([np.asarray(right, dtype=bool) for right in correct], axis=0)
    return accuracy_interval(share, images, resamples=resamples, seed=seed)


def mean_difference_interval(
    first: Sequence[npt.ArrayLike],
    second: Sequence[npt.ArrayLike],
    images: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """The mean over trainings of a paired difference in accuracy, with its 95 % interval.

    Args:
        first: (N,) bool a training.
        second: (N,) bool a training, the same rows in the same order.
        images: (N,) photo of each row.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    gains = [
        np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
        for ours, theirs in zip(first, second, strict=True)
    ]
    mean = np.mean(gains, axis=0)
    return gain_interval(mean, images, resamples=resamples, seed=seed)[0]
