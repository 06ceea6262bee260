"""How the learning rate moves over a run."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int,
    *,
    total: int,
    warmup: int,
    schedule: Literal["constant", "linear", "cosine"],
) -> float:
    """The share of the peak learning rate used in a step.

    Args:
        step: 0-based optimiser step.
        total: optimiser steps of the whole run.
        warmup: steps over which the rate rises linearly; the first already moves.
        schedule: the fall afterwards, to zero just after the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
