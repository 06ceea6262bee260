"""Intervals and paired tests by bootstrap, resampling photos rather than rows.

About 18 hypotheses of SNLI-VE share a photo, so rows are not independent; photos are. A resample
draws G photos with replacement and takes all rows of each. Since every statistic here is a function
of sums over rows, a resample is a vector of G counts, and all resamples are one matrix product.

N rows · G photos (clusters) · R resamples · S summed quantities
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Share of the resamples an interval leaves out, both ends together.
ALPHA = 0.05

# Quotients that are equal but for their last bits.
_ROUNDING = 1e-12

# Weights held at once: 4 million counts are 32 MB, whatever the number of photos.
_WEIGHTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % interval (None: photos or resamples are too few to tell one)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """How two sets of predictions for the same rows differ in accuracy (first minus second).

    Attributes:
        value: the difference of the accuracies, a fraction.
        low: lower end of its 95 % interval (paired, clustered by photo). None: too few photos or
            resamples to tell one.
        high: upper end.
        p: two-sided p of the same test: below 0.05 where the interval leaves out zero.
        mcnemar_p: exact McNemar p, which takes rows for independent: too small where they are not.
        only_first: rows that only the first predictions get right.
        only_second: rows that only the second predictions get right.
        num_examples: rows compared.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    mcnemar_p: float
    only_first: int
    only_second: int
    num_examples: int

    @property
    def is_tie(self) -> bool:
        """Whether the rows cannot tell the two apart: the interval holds zero, or there is none."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high


def cluster_sums(quantities: npt.ArrayLike, images: npt.ArrayLike) -> Floats:
    """Sums each quantity over the rows of each photo.

    Args:
        quantities: (N, S) numbers.
        images: (N,) photo of each row: numbers or strings.

    Returns:
        (G, S) sums, photos in sorted order, so that the same photos in two languages get the same
        resamples from the same seed.
    """
    values = np.asarray(quantities, dtype=np.float64)
    _, cluster = np.unique(np.asarray(images), return_inverse=True)
    num_clusters = int(cluster.max()) + 1 if len(cluster) else 0
    return np.stack(
        [np.bincount(cluster, weights=column, minlength=num_clusters) for column in values.T],
        axis=1,
    )


def resampled_sums(sums: Floats, resamples: int, seed: int) -> Floats:
    """The totals of `sums` in every resample of the photos.

    Args:
        sums: (G, S) sums per photo.
        resamples: R.
        seed: seed of numpy's default generator.

    Returns:
        (R, S): row r is w_r @ sums with w_r ~ Multinomial(G; 1/G, …, 1/G).
    """
    num_clusters = len(sums)
    return np.concatenate(
        [
            weights.astype(np.float64) @ sums
            for weights in _weights(num_clusters, resamples, np.random.default_rng(seed))
        ]
    )


def _weights(num_clusters: int, resamples: int, generator: np.random.Generator) -> Iterator[Ints]:
    chunk = max(1, _WEIGHTS_AT_ONCE // num_clusters)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn = generator.integers(num_clusters, size=(count, num_clusters))
        drawn += np.arange(count)[:, None] * num_clusters
        yield np.bincount(drawn.ravel(), minlength=count * num_clusters).reshape(count, -1)


def interval(
    sums: Floats, statistic: Callable[[Floats], Floats], *, resamples: int, seed: int
) -> Interval:
    """A statistic with its 95 % bootstrap interval, clustered by photo.

    The ends are percentiles of the resampled statistic, widened for few photos as in Hesterberg,
    "What Teachers Should Know About the Bootstrap" (The American Statistician, 2015, section 5.2):
    the plain 2.5 % becomes Φ(√(G/(G−1)) · t₀.₀₂₅,G₋₁), which is 2.5 % again for many photos.

    Args:
        sums: (G, S) sums per photo.
        statistic: maps (…, S) totals to (…) values.
        resamples: number of resamples.
        seed: seed of the resampling.

    Returns:
        The value, without an interval where there is a single photo, where the resamples do not
        reach the interval's tail, or where all of them agree: the bootstrap would claim certainty
        there.
    """
    value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
    if len(sums) < 2:
        return Interval(value, None, None)
    resampled = statistic(resampled_sums(sums, resamples, seed))
    if np.ptp(resampled) < _ROUNDING:
        return Interval(value, None, None)
    low, high = _percentiles(resampled, len(sums))
    return Interval(value, low, high)


def _rank(resamples: int, num_clusters: int) -> int:
    """Which resample, counted from either end, ends a 95 % interval; 0: there are too few."""
    widened = np.sqrt(num_clusters / (num_clusters - 1)) * stats.t.ppf(ALPHA / 2, num_clusters - 1)
    return int((resamples + 1) * stats.norm.cdf(widened))


def _percentiles(resampled: Floats, num_clusters: int) -> tuple[float, float] | tuple[None, None]:
    rank = _rank(len(resampled), num_clusters)
    if not rank:
        return None, None
    # Resamples themselves, nothing between them: zero is then outside exactly where p is small.
    ordered = np.sort(resampled)
    return float(ordered[rank - 1]), float(ordered[-rank])


def _smallest_share(num_clusters: int) -> float:
    """The share of all photos that is at least of a kind, where all G seen are: the exact bound."""
    return float((ALPHA / 2) ** (1 / num_clusters))


def _two_sided_p(resampled: Floats, num_clusters: int) -> float:
    """The largest level at which the interval of `_percentiles` still holds zero."""
    size = len(resampled) + 1
    tail = min((np.sum(resampled <= 0) + 1) / size, (np.sum(resampled >= 0) + 1) / size, 0.5)
    narrowed = stats.norm.ppf(tail) / np.sqrt(num_clusters / (num_clusters - 1))
    return float(2 * stats.t.cdf(narrowed, num_clusters - 1))


def mean_interval(
    values: npt.ArrayLike, images: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """A mean over rows with its 95 % interval.

    Args:
        values: (N,) numbers.
        images: (N,) photo of each row.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    return interval(_counted(values, images), _mean, resamples=resamples, seed=seed)


def _counted(values: npt.ArrayLike, images: npt.ArrayLike) -> Floats:
    """(G, 2) sum of the values of each photo's rows, and how many they are."""
    column = np.asarray(values, dtype=np.float64)
    return cluster_sums(np.stack([column, np.ones_like(column)], axis=1), images)


def _mean(sums: Floats) -> Floats:
    """(…, 2) sums and counts to (…) means."""
    mean: Floats = sums[..., 0] / sums[..., 1]
    return mean


def accuracy_interval(
    correct: npt.ArrayLike, images: npt.ArrayLike, *, resamples: int, seed: int
) -> Interval:
    """Accuracy with its 95 % interval.

    Where the photos are all alike (every row right, say), all resamples agree and the bootstrap
    would claim certainty. There the exact binomial interval (Clopper and Pearson, 1934) is given,
    with photos for trials: how many of all photos could be of another kind, at worst all wrong or
    all right.

    Args:
        correct: (N,) bool, or the share of several trainings that get the row right.
        images: (N,) photo of each row.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    sums = _counted(correct, images)
    if len(sums) < 2 or np.ptp(_mean(sums)) > _ROUNDING:
        return interval(sums, _mean, resamples=resamples, seed=seed)
    value, alike = float(_mean(sums.sum(axis=0))), _smallest_share(len(sums))
    return Interval(value, alike * value, 1 - alike * (1 - value))


def compare_predictions(
    correct_first: npt.ArrayLike,
    correct_second: npt.ArrayLike,
    images: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """The paired difference in accuracy of two models on the same rows.

    Both models are scored on the same resamples of photos, so what a hard photo takes from both
    cancels out. Interval and p agree where resamples cannot tell them: if one model gets every row
    right and the other none, both are those of the sign test over photos, which is exact. If the
    resamples are too few for the interval's tail (very few photos need one far out), there is no
    interval.

    Args:
        correct_first: (N,) bool.
        correct_second: (N,) bool, same rows in the same order.
        images: (N,) photo of each row.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    first = np.asarray(correct_first, dtype=bool)
    second = np.asarray(correct_second, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"need two equal, non-empty rows, not {first.shape} and {second.shape}")
    gain = first.astype(np.float64) - second
    found, p = gain_interval(gain, images, resamples=resamples, seed=seed)
    only_first, only_second = int(np.sum(gain > 0)), int(np.sum(gain < 0))
    return Difference(
        value=found.value,
        low=found.low,
        high=found.high,
        p=p,
        mcnemar_p=mcnemar(only_first, only_second),
        only_first=only_first,
        only_second=only_second,
        num_examples=len(gain),
    )


def gain_interval(
    gain: Floats, images: npt.ArrayLike, *, resamples: int, seed: int
) -> tuple[Interval, float | None]:
    """The mean of a paired difference with its 95 % interval and p, as in `compare_predictions`.

    Args:
        gain: (N,) right or not (1 or 0) by the first model minus that by the second; or its mean
            over several trainings.
        images: (N,) photo of each row.
        resamples: number of resamples.
        seed: seed of the resampling.
    """
    sums = _counted(gain, images)
    value = float(gain.mean())
    if len(sums) < 2:
        return Interval(value, None, None), None
    if abs(gain.sum()) == len(gain):
        # A photo that was not seen could at worst be the other model's alone.
        worst = 2 * _smallest_share(len(sums)) - 1
        low, high = (worst, 1.0) if gain[0] > 0 else (-1.0, -worst)
        return Interval(value, low, high), mcnemar(len(sums), 0)
    resampled = _mean(resampled_sums(sums, resamples, seed))
    return (
        Interval(value, *_percentiles(resampled, len(sums))),
        _two_sided_p(resampled, len(sums)),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test, exact: two-sided binomial p of the discordant rows being split evenly.

    Exact at every size, so that no threshold decides between two formulas.

    Args:
        only_first: rows that only the first model gets right.
        only_second: rows that only the second model gets right.
    """
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
