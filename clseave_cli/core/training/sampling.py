"""What each of several languages gets of an epoch, and when the slowest of them has learnt.

Legend: L languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]
#: (L,)
Shares = npt.NDArray[np.float64]

#: The dev metric that self-paced sampling goes by; of a language, `recall_at_10/de`.
RECALL = "recall_at_10"

#: τ of self-paced sampling, as in its source.
_SELF_PACED_TEMPERATURE = 0.1
#: The share of its last recall with which a language counts as learnt.
_LEARNT = 0.95


def self_paced_shares(languages: Sequence[str], dev: Mapping[str, float]) -> Shares:
    """(L,) shares of an epoch: softmax(−r/0.1), r the dev recall after the epoch before.

    All alike before the first evaluation. From visually grounded cross-lingual transfer,
    "Multilingual as Multitask", a.
    """
    recall = np.array([dev.get(f"{RECALL}/{lang}", 0.0) for lang in languages])
    weights = np.exp(-(recall - recall.min()) / _SELF_PACED_TEMPERATURE)
    shares: Shares = weights / weights.sum()
    return shares


def whole_parts(shares: Shares, total: int) -> Rows:
    """Whole numbers in the ratio of the shares that sum to `total` (largest remainders)."""
    exact = shares * total
    parts = np.floor(exact).astype(np.intp)
    short = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:short]] += 1
    return parts


def epochs_to_95(epochs: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """When each language first had 95 % of the recall it ended with.

    Args:
        epochs: the dev metrics after each epoch.

    Returns:
        By language, the epoch, counted from 1; where no metric names one, empty.
    """
    last = epochs[-1] if epochs else {}
    return {
        name.removeprefix(f"{RECALL}/"): next(
            number for number, dev in enumerate(epochs, 1) if dev.get(name, 0.0) >= _LEARNT * recall
        )
        for name, recall in last.items()
        if name.startswith(f"{RECALL}/")
    }
