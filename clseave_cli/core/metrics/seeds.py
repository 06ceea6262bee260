"""One figure over several training seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SeedSummary:
    """A figure over several seeds; `std` is the sample deviation (n − 1), 0 for one seed."""

    num_seeds: int
    mean: float
    std: float
    min: float
    max: float


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
