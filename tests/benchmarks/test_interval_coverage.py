"""How often 95 % intervals hold the truth, over numbers of photos and how alike their rows are.

Prints a table for `docs/experiments.md`; run with `pytest -m benchmark -s`.
"""

import sys

import numpy as np
import pytest

from clseave_cli.core.evaluation.metrics import (
    accuracy_interval,
    cluster_sums,
    compare_predictions,
    interval,
    macro_f1,
)

NUM_SIMULATIONS = 2000
RESAMPLES = 1000


@pytest.mark.benchmark
@pytest.mark.parametrize("num_images", [20, 50, 200])
@pytest.mark.parametrize("spread", [2.0, 20.0])
def test_coverage(num_images, spread, capsys):
    generator = np.random.default_rng([num_images, int(spread)])
    accuracy = f1 = difference = 0
    for seed in range(NUM_SIMULATIONS):
        images = np.repeat(np.arange(num_images), generator.poisson(8, size=num_images) + 1)
        easy = generator.beta(0.7 * spread, 0.3 * spread, size=(2, num_images))
        first, second = generator.random((2, len(images))) < easy[:, images]
        found = accuracy_interval(first, images, resamples=RESAMPLES, seed=seed)
        accuracy += found.low <= 0.7 <= found.high
        # Labels uniform and errors symmetric: macro-F1 is the accuracy, 0.7.
        labels = generator.integers(3, size=len(images))
        wrong = generator.integers(1, 3, size=len(images))
        cells = np.eye(9)[labels * 3 + np.where(first, labels, (labels + wrong) % 3)]
        found = interval(cluster_sums(cells, images), macro_f1, resamples=RESAMPLES, seed=seed)
        f1 += found.low <= 0.7 <= found.high
        paired = compare_predictions(first, second, images, resamples=RESAMPLES, seed=seed)
        difference += paired.low <= 0 <= paired.high
    with capsys.disabled():
        sys.stdout.write(
            f"\nphotos {num_images} · spread {spread:g} · accuracy "
            f"{accuracy / NUM_SIMULATIONS:.3f} · macro-F1 {f1 / NUM_SIMULATIONS:.3f} · "
            f"difference {difference / NUM_SIMULATIONS:.3f}"
        )
    assert 0.93 <= accuracy / NUM_SIMULATIONS <= 0.97
    assert 0.93 <= f1 / NUM_SIMULATIONS <= 0.97
    assert 0.93 <= difference / NUM_SIMULATIONS <= 0.97
