"""Which training pairs an epoch meets, and which of them share a batch.

Legend: U distinct training pairs · N pairs met in an epoch · L languages.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from clseave_cli.core.alignment.corpus import TrainingPairs
from clseave_cli.core.config import StudentConfig
from clseave_cli.core.training.loop import Rows, batches
from clseave_cli.core.training.sampling import self_paced_shares, whole_parts


class Sampler:
    """The batches of each epoch, from its number and the last dev metrics alone.

    - `proportional`: every pair once.
    - `uniform`: every language equally often.
    - `temperature`: as often as its pairs to the power of 1/T (Arivazhagan et al. 2019, §4.2).
    - `self-paced`: more often where dev recall lags (`self_paced_shares`).

    A language's pairs are gone through in round after round, each in another order, and an
    epoch goes on where the one before stopped: none is met twice before all were met once. Not so
    if self-paced, where no epoch knows how far the others came: each begins its rounds anew.
    """

    def __init__(self, pairs: TrainingPairs, config: StudentConfig) -> None:
        """Looks at what there is."""
        self._config = config
        self._languages = pairs.languages
        self._sizes = np.bincount(pairs.language, minlength=len(pairs.languages))
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.num_examples = config.epoch_pairs or len(pairs)

    def batches(self, epoch: int, dev: dict[str, float]) -> list[Rows]:
        """The batches of an epoch.

        Args:
            epoch: its number, from 0.
            dev: the dev metrics after the epoch before; empty before the first.
        """
        config = self._config
        if config.sampling == "proportional" and self.num_examples == self._sizes.sum():
            return batches(self.num_examples, config.batch_size, seed=config.seed, epoch=epoch)
        num_batches = math.ceil(self.num_examples / config.batch_size)
        random = np.random.default_rng([config.seed, epoch])
        counts = whole_parts(self.shares(dev), self.num_examples)
        drawn = [
            self._drawn(language, count, epoch, random)
            for language, count in enumerate(counts.tolist())
        ]
        return np.array_split(random.permutation(np.concatenate(drawn)), num_batches)

    def _drawn(self, language: int, count: int, epoch: int, random: np.random.Generator) -> Rows:
        """What an epoch meets of a language."""
        size, self_paced = int(self._sizes[language]), self._config.sampling == "self-paced"
        first, skipped = divmod(0 if self_paced else epoch * count, size)
        drawn = [np.empty(0, dtype=np.intp)]
        for number in range(first, first + math.ceil((skipped + count) / size)):
            if not self_paced:
                # From 1: a 0 at the end is nothing to numpy, and the epoch's generator has none.
                random = np.random.default_rng([self._config.seed, number, language + 1])
            drawn.append(random.permutation(size))
        return np.concatenate(drawn)[skipped : skipped + count] + int(self._firsts[language])

    def shares(self, dev: dict[str, float]) -> npt.NDArray[np.float64]:
        """(L,) the languages' shares of an epoch, given the dev metrics of the one before."""
        sampling = self._config.sampling
        if sampling == "self-paced":
            return self_paced_shares(self._languages, dev)
        power = {
            "proportional": 1.0,
            "uniform": 0.0,
            "temperature": 1 / self._config.sampling_temperature,
        }[sampling]
        weights = self._sizes.astype(np.float64) ** power
        shares: npt.NDArray[np.float64] = weights / weights.sum()
        return shares
