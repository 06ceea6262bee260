"""Draws the training pairs of each epoch and divides them into batches.

Legend: L languages.
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
    """The batches of each epoch, a function of its number and the last dev metrics only.

    - `proportional`: every pair once.
    - `uniform`: every language equally often.
    - `temperature`: as often as its pairs to the power of 1/T (Arivazhagan et al. 2019, §4.2).
    - `self-paced`: more often where dev recall lags (`self_paced_shares`).

    The pairs of a language are visited in rounds, each in a new order, and an epoch continues where
    the last one stopped, so no pair is seen twice before all are seen once. Self-paced epochs start
    new rounds instead, because their position would depend on all earlier metrics.
    """

    def __init__(self, pairs: TrainingPairs, config: StudentConfig) -> None:
        self._config = config
        self._languages = pairs.languages
        self._sizes = np.bincount(pairs.language, minlength=len(pairs.languages))
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.num_examples = config.epoch_pairs or len(pairs)

    def batches(self, epoch: int, dev: dict[str, float]) -> list[Rows]:
        """The batches of epoch `epoch`, from 0, given the dev metrics of the one before, if any."""
        config = self._config
        if config.sampling == "proportional" and self.num_examples == self._sizes.sum():
            return batches(self.num_examples, config.batch_size, seed=config.seed, epoch=epoch)
        num_batches = math.ceil(self.num_examples / config.batch_size)
        random = np.random.default_rng([config.seed, epoch])
        counts = whole_parts(self.shares(dev), self.num_examples)
        drawn = [
            self._draw(language, count, epoch, random)
            for language, count in enumerate(counts.tolist())
        ]
        return np.array_split(random.permutation(np.concatenate(drawn)), num_batches)

    def _draw(self, language: int, count: int, epoch: int, random: np.random.Generator) -> Rows:
        size, self_paced = int(self._sizes[language]), self._config.sampling == "self-paced"
        first, skipped = divmod(0 if self_paced else epoch * count, size)
        rounds = [np.empty(0, dtype=np.intp)]
        for number in range(first, first + math.ceil((skipped + count) / size)):
            if not self_paced:
                # + 1, because numpy ignores a final 0: the seed would be that of an epoch.
                random = np.random.default_rng([self._config.seed, number, language + 1])
            rounds.append(random.permutation(size))
        return np.concatenate(rounds)[skipped : skipped + count] + int(self._firsts[language])

    def shares(self, dev: dict[str, float]) -> npt.NDArray[np.float64]:
        """(L,) the languages' shares of an epoch, given the dev metrics of the one before."""
        sampling = self._config.sampling
        if sampling == "self-paced":
            return self_paced_shares(self._languages, dev)
        temperature = self._config.sampling_temperature
        power = {"proportional": 1.0, "uniform": 0.0, "temperature": 1 / temperature}[sampling]
        weights = self._sizes.astype(np.float64) ** power
        shares: npt.NDArray[np.float64] = weights / weights.sum()
        return shares
