"""Which training pairs an epoch meets, and which of them share a batch.

Legend: U distinct training pairs · N pairs met in an epoch · L languages.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from clseave_cli.core.alignment.corpus import TrainingPairs
from clseave_cli.core.config import StudentConfig
from clseave_cli.core.training.loop import Rows, batches
from clseave_cli.errors import UsageError

#: τ of self-paced sampling, as in its source.
_SELF_PACED_TEMPERATURE = 0.1


def require_possible(config: StudentConfig) -> None:
    """Refuses options that exclude each other.

    Raises:
        UsageError: they do.
    """
    if config.parallel_batches and config.sampling != "proportional":
        raise UsageError(
            f"--parallel-batches: takes every language of a sentence, so --sampling "
            f"{config.sampling} has nothing to choose; leave one of them out."
        )


class Sampler:
    """The batches of each epoch, from its number and the last dev figures alone.

    - `proportional`: every pair once.
    - `uniform`: every language equally often.
    - `temperature`: as often as its pairs to the power of 1/T (Arivazhagan et al. 2019, §4.2).
    - `self-paced`: language i with the share softmax(−r_i / 0.1), where r_i is its dev recall among
      the nearest ten after the epoch before; in the first epoch, equally often (visually grounded
      cross-lingual transfer, "Multilingual as Multitask", a).

    A language's pairs are gone through in round after round, each in an order of its own, and an
    epoch goes on where the one before stopped: none is met twice before all were met once. Not so
    if self-paced, where no epoch knows how far the others came: each begins its rounds anew.
    Parallel batches are put together from source sentences, each with all its translations, and go
    through those; what is trained on in parts (`TrainingPairs`) comes part by part.
    """

    def __init__(self, pairs: TrainingPairs, config: StudentConfig) -> None:
        """Looks at what there is."""
        self._config = config
        self._languages = pairs.languages
        self._sizes = np.bincount(pairs.language, minlength=len(pairs.languages))
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.num_examples = config.epoch_pairs or len(pairs)
        if config.parallel_batches:
            # The first part of each pair of source sentence 0, then the second parts, then those
            # of sentence 1, and so on: all parts in one batch would be one huge step after all.
            part = np.arange(len(pairs)) - np.searchsorted(pairs.distinct, pairs.distinct)
            group = pairs.teacher.index * (part.max() + 1) + part
            self._by_source = np.argsort(group, kind="stable")
            _, counts = np.unique(group, return_counts=True)
            self._source_ends = np.cumsum(counts)
            self._source_starts = self._source_ends - counts

    def batches(self, epoch: int, dev: dict[str, float]) -> list[Rows]:
        """The batches of an epoch.

        Args:
            epoch: its number, from 0.
            dev: the figures after the epoch before; empty before the first.
        """
        config = self._config
        plain = config.sampling == "proportional" and not config.parallel_batches
        if plain and self.num_examples == self._sizes.sum():
            return batches(self.num_examples, config.batch_size, seed=config.seed, epoch=epoch)
        num_batches = math.ceil(self.num_examples / config.batch_size)
        if config.parallel_batches:
            return self._parallel(num_batches, epoch)
        random = np.random.default_rng([config.seed, epoch])
        counts = whole_parts(self.shares(dev), self.num_examples)
        drawn = [
            first + self._drawn(language, count, epoch, random)
            for language, (first, count) in enumerate(
                zip(self._firsts, counts.tolist(), strict=True)
            )
        ]
        return np.array_split(random.permutation(np.concatenate(drawn)), num_batches)

    def _drawn(self, language: int, count: int, epoch: int, random: np.random.Generator) -> Rows:
        """What an epoch meets of a language, by number within it."""
        size = int(self._sizes[language])
        if self._config.sampling == "self-paced":
            return _stretch(size, 0, count, lambda _: random)
        # From 1: a 0 at the end is nothing to numpy, and the epoch's own generator has none.
        return _stretch(
            size,
            epoch * count,
            count,
            lambda number: np.random.default_rng([self._config.seed, number, language + 1]),
        )

    def shares(self, dev: dict[str, float]) -> npt.NDArray[np.float64]:
        """(L,) the languages' shares of an epoch, given the dev figures of the one before."""
        sampling = self._config.sampling
        if sampling == "self-paced":
            # All alike where nothing is known yet.
            recall = np.array([dev.get(f"recall_at_10/{lang}", 0.0) for lang in self._languages])
            weights = np.exp(-(recall - recall.min()) / _SELF_PACED_TEMPERATURE)
        else:
            power = {
                "proportional": 1.0,
                "uniform": 0.0,
                "temperature": 1 / self._config.sampling_temperature,
            }[sampling]
            weights = self._sizes.astype(np.float64) ** power
        shares: npt.NDArray[np.float64] = weights / weights.sum()
        return shares

    def _parallel(self, num_batches: int, epoch: int) -> list[Rows]:
        """Batches of about equally many source sentences, each with all its translations."""
        num_sources = len(self._source_ends)
        wanted = max(num_batches, round(num_sources * self.num_examples / self._sizes.sum()))
        sources = _stretch(
            num_sources,
            epoch * wanted,
            wanted,
            lambda number: np.random.default_rng([self._config.seed, number]),
        )
        return [
            np.concatenate(
                [
                    self._by_source[start:end]
                    for start, end in zip(
                        self._source_starts[some], self._source_ends[some], strict=True
                    )
                ]
            )
            for some in np.array_split(sources, num_batches)
        ]


def whole_parts(shares: npt.NDArray[np.float64], total: int) -> Rows:
    """Whole numbers in the ratio of the shares that sum to `total` (largest remainders)."""
    exact = shares * total
    parts = np.floor(exact).astype(np.intp)
    short = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:short]] += 1
    return parts


def _stretch(
    size: int, start: int, count: int, generator: Callable[[int], np.random.Generator]
) -> Rows:
    """A part of an endless row of permutations of `size` items.

    Args:
        size: how many items there are.
        start: where the part begins.
        count: how long it is.
        generator: gives what draws the permutation of a round, from the round's number.
    """
    first, skipped = divmod(start, size)
    rounds = range(first, first + math.ceil((skipped + count) / size))
    drawn = [generator(number).permutation(size) for number in rounds]
    return np.concatenate([np.empty(0, dtype=np.intp), *drawn])[skipped : skipped + count]
