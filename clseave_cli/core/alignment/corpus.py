"""The parallel text a student learns from: read, joined by `pairID`, taken in as token rows.

Legend: N parallel rows · U distinct sentence pairs · D embedding width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.config import AlignConfig
from clseave_cli.core.data.records import (
    ENGLISH,
    Parallel,
    Split,
    check_leak,
    distinct,
    join,
    read_split,
    split_path,
)
from clseave_cli.core.features import Features, Sentences, sentence_embeddings, tokenize_sentences
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.progress import Progress
from clseave_cli.core.training.precision import Autocast
from clseave_cli.errors import DataError


class ParallelReader:
    """Reads the parallel text of one language after another; the English side once for all."""

    def __init__(self, folder: Path, config: AlignConfig, progress: Progress) -> None:
        """Reads nothing yet.

        Args:
            folder: the data folder.
            config: names of the splits, what to do with bad rows.
            progress: told what was left out.
        """
        self._folder = folder
        self._config = config
        self._progress = progress
        self._english = functools.cache(functools.partial(self._split, ENGLISH))

    def read(self, lang: str) -> tuple[Parallel, Parallel]:
        """The parallel training and dev text of a language.

        Raises:
            DataError: a file is missing, bad, or shares images with another split.
        """
        config = self._config
        training = self._joined(lang, config.train_split)
        if split_path(self._folder, config.dev_split, lang) is not None:
            dev = self._joined(lang, config.dev_split)
            if not config.allow_leak and config.dev_split != config.train_split:
                check_leak(training.target, dev.target)
            return training, dev
        self._progress.note(
            f"{self._folder}: no {config.dev_split} file for {lang}; holding out "
            f"{config.dev_fraction:.0%} of the {config.train_split} sentences instead."
        )
        return hold_out(training, config.dev_fraction, config.seed)

    def _joined(self, lang: str, split: str) -> Parallel:
        english = self._english(split) if split_path(self._folder, split, ENGLISH) else None
        parallel = join(self._split(lang, split), english)
        if parallel.num_unmatched_target or parallel.num_unmatched_source:
            self._progress.note(
                f"{parallel.target.path}: {parallel.num_unmatched_target} rows have no English row "
                f"and {parallel.num_unmatched_source} English rows no {lang} row (such as "
                f"{', '.join(parallel.unmatched_examples)}); left out."
            )
        return parallel

    def _split(self, lang: str, split: str) -> Split:
        """A split in one language: sentences count, labels and images only where they are."""
        return read_split(
            self._folder,
            split,
            lang,
            labelled=False,
            with_images=False,
            skip_bad=self._config.skip_bad,
            progress=self._progress,
        )


def hold_out(parallel: Parallel, fraction: float, seed: int) -> tuple[Parallel, Parallel]:
    """Splits by English sentence, so that no held-out sentence is trained on in other words.

    Raises:
        DataError: there are too few sentences.
    """
    sentences, index = distinct(parallel.sources)
    num_held = max(1, round(fraction * len(sentences)))
    if num_held >= len(sentences):
        raise DataError(
            f"{parallel.target.path}: {len(sentences)} distinct sentences are too few to hold out "
            f"{fraction:.0%} of them; give a dev file or a smaller --dev-fraction."
        )
    held = np.zeros(len(sentences), dtype=bool)
    held[np.random.default_rng(seed).permutation(len(sentences))[:num_held]] = True
    return parallel.take(np.flatnonzero(~held[index])), parallel.take(np.flatnonzero(held[index]))


class Corpus:
    """The parallel text to train on, taken in language by language.

    Ten languages of SNLI-VE are five million rows: what stays of a row is its tokens and a few
    numbers, not its strings.
    """

    def __init__(self, student: SentenceEncoder) -> None:
        self._student = student
        self._sources: dict[str, int] = {}
        self._tokens: list[TokenTable] = []
        self._pairs: list[npt.NDArray[np.intp]] = []
        self._counts: list[npt.NDArray[np.intp]] = []

    def add(self, text: Parallel, progress: Progress) -> None:
        """Takes in the text of a language."""
        target, known = text.target, self._sources
        sentences = tokenize_sentences(self._student, target.hypotheses, target.where, progress)
        sources = np.array([known.setdefault(s, len(known)) for s in text.sources], dtype=np.intp)
        pair_ids, counts = np.unique(sentences.index * len(known) + sources, return_counts=True)
        of_pair = np.stack(np.divmod(pair_ids, len(known)))  # sentence, source
        of_pair[0] += sum(len(tokens) for tokens in self._tokens)
        self._tokens.append(sentences.tokens)
        self._pairs.append(of_pair)
        self._counts.append(counts)

    def pairs(self, teacher: ClipVE, with_autocast: Autocast, progress: Progress) -> TrainingPairs:
        """Everything taken in, with the teacher's embeddings."""
        target_of_pair, source_of_pair = np.concatenate(self._pairs, axis=1)
        counts = np.concatenate(self._counts)
        vectors = sentence_embeddings(
            teacher.text,
            list(self._sources),
            autocast=with_autocast,
            description="teacher embeddings",
            progress=progress,
        )
        return TrainingPairs(
            Sentences(TokenTable.concatenate(self._tokens), target_of_pair),
            Features(vectors, source_of_pair),
            torch.from_numpy(counts / counts.mean()).float(),
        )


@dataclass(frozen=True, eq=False)
class TrainingPairs:
    """U distinct (target sentence, source sentence) pairs of all languages.

    Translations repeat as hypotheses do. A pair that stands n times in the data is trained on once
    an epoch with weight n, which is the same expected gradient for less work.

    Attributes:
        sentences: of the targets, tokenised for the student.
        teacher: (U, D) the teacher's embeddings of the sources.
        weights: (U,) how often each stands in the data, over the mean.
    """

    sentences: Sentences
    teacher: Features
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)
