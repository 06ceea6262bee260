"""How an epoch is shared among L languages, and how soon each is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]
Shares = npt.NDArray[np.float64]

#: The dev metric behind self-paced sampling; a language's is named `recall_at_10/de`.
RECALL = "recall_at_10"

#: τ of self-paced sampling, as in its source.
_SELF_PACED_TEMPERATURE = 0.1
#: The share of its last recall with which a language counts as learnt.
_LEARNT = 0.95


def self_paced_shares(languages: Sequence[str], dev: Mapping[str, float]) -> Shares:
    """(L,) shares of an epoch: softmax(−r/0.1), r the dev recall after the previous epoch.

    Equal before the first evaluation. From visually grounded cross-lingual transfer, "Multilingual
    as Multitask", a.
    """
    recall = np.array([dev.get(f"{RECALL}/{lang}", 0.0) for lang in languages])
    weights = np.exp(-(recall - recall.min()) / _SELF_PACED_TEMPERATURE)
    shares: Shares = weights / weights.sum()
    return shares


def whole_parts(shares: Shares, total: int) -> Rows:
    """Integers proportional to the shares that sum to `total` (largest remainders)."""
    exact = shares * total
    parts = np.floor(exact).astype(np.intp)
    missing = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
    return parts


def epochs_to_95(epochs: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """The first epoch, from 1, in which each language had 95 % of its final recall.

    `epochs` holds the dev metrics after each. Empty if they are not by language.
    """
    first: dict[str, int] = {}
    for name, recall in (epochs[-1] if epochs else {}).items():
        metric, _, lang = name.partition("/")
        if metric == RECALL and lang:
            is_learnt = [dev.get(name, 0.0) >= _LEARNT * recall for dev in epochs]
            first[lang] = 1 + is_learnt.index(True)
    return first
