"""The parallel text a student learns from: read, joined by `pairID`, taken in as token rows.

Legend: N parallel rows · U distinct sentence pairs · S distinct source sentences · D embedding
width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.config import StudentConfig
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import (
    ENGLISH,
    Parallel,
    Split,
    are_first,
    check_leak,
    distinct,
    image_stem,
    join,
    read_split,
    split_path,
)
from clseave_cli.core.features import (
    Features,
    Photos,
    Sentences,
    Vectors,
    first_rows,
    image_vectors,
    sentence_embeddings,
    tokenize_sentences,
)
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.training.loop import Rows
from clseave_cli.core.training.precision import Autocast
from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT, Progress

#: Largest weight of a pair in a step, in multiples of the mean.
_HEAVIEST = 5.0


class ParallelReader:
    """Reads the parallel text of one language after another; the source side once for all."""

    def __init__(
        self,
        folder: Path,
        config: StudentConfig,
        progress: Progress,
        source_lang: str = ENGLISH,
    ) -> None:
        """Reads nothing yet.

        Args:
            folder: the data folder.
            config: the languages of the run, names of the splits, what to do with bad rows.
            progress: told what was left out.
            source_lang: the teacher's language.
        """
        self._folder = folder
        self._source_lang = source_lang
        self._config = config
        self._progress = progress
        self._source = functools.cache(
            functools.partial(self._split, source_lang, progress=progress)
        )
        self._held_out: dict[str, set[str]] = {}
        #: By language, the translations left out because others hold their sources out.
        self.left_out: dict[str, list[str]] = {}

    def read(self, lang: str) -> tuple[Parallel, Parallel]:
        """The parallel training and dev text of a language.

        Sentences that are held out for any language of the run are in none of its training texts.

        Raises:
            DataError: a file is missing, bad, or shares images with another split, or there is too
                little text to hold some of it out.
        """
        config = self._config
        training = self._joined(lang, config.train_split, self._progress)
        if self._has_dev_file(lang):
            dev = self._joined(lang, config.dev_split, self._progress)
            if not config.allow_leak and config.dev_split != config.train_split:
                check_leak(training.target, dev.target)
        else:
            self._progress.note(
                f"{self._folder}: no {config.dev_split} file for {lang}; holding out "
                f"{config.dev_fraction:.0%} of the {config.train_split} sentences instead."
            )
            self._held_out[lang] = held_out(training, config.dev_fraction, config.seed)
            training, dev = _divided(training, self._held_out[lang])
        return self._without_those_of_others(training), dev

    def _without_those_of_others(self, training: Parallel) -> Parallel:
        """Leaves out what is held out for the other languages of the run."""
        config, lang, path = self._config, training.target.lang, training.target.path
        sentences: set[str] = set()
        for other in (*config.lang, *config.auxiliary):
            if other == lang or self._has_dev_file(other):
                continue
            if other not in self._held_out:
                # Kept are its sentences alone: `read` reads it once more, and tells about it.
                whole = self._joined(other, config.train_split, SILENT)
                self._held_out[other] = held_out(whole, config.dev_fraction, config.seed)
            sentences |= self._held_out[other]
        if sentences.isdisjoint(training.sources):
            return training
        kept, left_out = _divided(training, sentences)
        if not len(kept.target):
            raise DataError(
                f"{path}: nothing is left to train on; all its sentences are held out for other "
                "languages. Give them a dev file, or a smaller --dev-fraction."
            )
        self.left_out[lang] = left_out.target.hypotheses
        self._progress.note(
            f"{path}: {len(left_out.target)} pairs left out; their {self._source_lang} sentences "
            "are held out for other languages."
        )
        return kept

    def _has_dev_file(self, lang: str) -> bool:
        return split_path(self._folder, self._config.dev_split, lang) is not None

    def _joined(self, lang: str, split: str, progress: Progress) -> Parallel:
        source_lang = self._source_lang
        source = self._source(split) if split_path(self._folder, split, source_lang) else None
        parallel = join(self._split(lang, split, progress=progress), source, source_lang)
        if parallel.num_unmatched_target or parallel.num_unmatched_source:
            progress.note(
                f"{parallel.target.path}: {parallel.num_unmatched_target} rows have no "
                f"{source_lang} row and {parallel.num_unmatched_source} {source_lang} rows no "
                f"{lang} row (such as "
                f"{', '.join(parallel.unmatched_examples)}); left out."
            )
        return parallel

    def _split(self, lang: str, split: str, *, progress: Progress) -> Split:
        """A split in one language: sentences count, labels and images only where they are."""
        return read_split(
            self._folder,
            split,
            lang,
            labelled=False,
            with_images=False,
            source_lang=self._source_lang,
            skip_bad=self._config.skip_bad,
            skip_suspect=self._config.skip_suspect,
            progress=progress,
        )


def held_out(parallel: Parallel, fraction: float, seed: int) -> set[str]:
    """The source sentences that stand in for a dev file; of the same sentences, the same ones.

    Raises:
        DataError: there are too few sentences.
    """
    sentences, _ = distinct(parallel.sources)
    num_held = max(1, round(fraction * len(sentences)))
    if num_held >= len(sentences):
        raise DataError(
            f"{parallel.target.path}: {len(sentences)} distinct sentences are too few to hold out "
            f"{fraction:.0%} of them; give a dev file or a smaller --dev-fraction."
        )
    first = np.flatnonzero(are_first(sentences, num_held, seed))
    return {sentences[i] for i in first}


def _divided(parallel: Parallel, sentences: set[str]) -> tuple[Parallel, Parallel]:
    """The rows whose source sentence is not one of some, and those where it is."""
    among = np.array([source in sentences for source in parallel.sources])
    return parallel.take(np.flatnonzero(~among)), parallel.take(np.flatnonzero(among))


def limited(parallel: Parallel, limit: int | None, seed: int, progress: Progress) -> Parallel:
    """The rows of the first distinct source sentences, in a random order.

    The order depends on the sentences and the seed alone: a smaller limit takes a part of what a
    larger one takes, and every language the translations of the same sentences.

    Args:
        parallel: the training text of a language.
        limit: how many sentences; None: all.
        seed: of the order.
        progress: told where there are fewer.
    """
    if limit is None:
        return parallel
    sentences, index = distinct(parallel.sources)
    if limit >= len(sentences):
        if limit > len(sentences):
            progress.note(
                f"{parallel.target.path}: {len(sentences)} distinct sentences, fewer than "
                f"--limit {limit}; all of them are used."
            )
        return parallel
    return parallel.take(np.flatnonzero(are_first(sentences, limit, seed)[index]))


def as_source(parallel: Parallel, source_lang: str) -> Parallel:
    """The source side of some rows as their own translation."""
    target = dataclasses.replace(parallel.target, lang=source_lang, hypotheses=parallel.sources)
    return dataclasses.replace(parallel, target=target)


@dataclass(frozen=True, eq=False)
class LanguagePairs:
    """What a language brings: its sentences, and its distinct pairs with source ones."""

    lang: str
    tokens: TokenTable
    sentence_of_pair: Rows
    source_of_pair: Rows
    counts: Rows
    weight: float = 1.0

    def portions(self) -> tuple[Rows, npt.NDArray[np.float64]]:
        """The pairs to train on in an epoch, some of them several times, and their weights.

        A pair's weights add up to how often it stands in the data, on average to `weight`.
        """
        weights = self.counts / self.counts.mean()
        times = np.ceil(weights / _HEAVIEST).astype(np.intp)
        pairs = np.repeat(np.arange(len(self.counts)), times)
        return pairs, (self.weight * weights / times)[pairs]


class Corpus:
    """The parallel text to train on, taken in language by language.

    Ten languages of SNLI-VE are five million rows: what stays of a row is its tokens and a few
    numbers, not its strings.
    """

    def __init__(
        self, student: SentenceEncoder, progress: Progress, *, with_images: bool = False
    ) -> None:
        """An empty one.

        Args:
            student: whose tokens the sentences become.
            progress: told about sentences that are cut.
            with_images: note which images stand beside each source sentence.
        """
        self._student = student
        self._progress = progress
        self._sources: dict[str, int] = {}
        self._parts: list[LanguagePairs] = []
        self._paired = _PairedNames() if with_images else None
        self._kept = np.empty(0, dtype=np.int32)

    @property
    def sources(self) -> list[str]:
        """The distinct source sentences so far."""
        return list(self._sources)

    def add(self, text: Parallel, weight: float = 1.0) -> LanguagePairs:
        """Takes in the text of a language, and returns what it made of it.

        Args:
            text: its rows.
            weight: of its pairs in the loss, on average.
        """
        target, known = text.target, self._sources
        sentences = tokenize_sentences(
            self._student, target.hypotheses, target.where, self._progress
        )
        sources = np.array([known.setdefault(s, len(known)) for s in text.sources], dtype=np.intp)
        pair_ids, counts = np.unique(sentences.index * len(known) + sources, return_counts=True)
        of_pair = np.divmod(pair_ids, len(known))
        part = LanguagePairs(target.lang, sentences.tokens, *of_pair, counts, weight)
        self._parts.append(part)
        if self._paired is not None:
            self._paired.add(target, sources)
        return part

    def add_source(self, source_lang: str) -> LanguagePairs:
        """Takes in every source sentence so far as its own translation."""
        everyone = np.arange(len(self._sources))
        standing = np.concatenate([np.repeat(p.source_of_pair, p.counts) for p in self._parts])
        sentences = tokenize_sentences(
            self._student,
            self.sources,
            lambda _: f"the {source_lang} sentences",
            self._progress,
        )
        counts = np.bincount(standing, minlength=len(everyone))
        part = LanguagePairs(source_lang, sentences.tokens, everyone, everyone, counts)
        self._parts.append(part)
        return part

    def photos(self, images: ImageFolder) -> Photos:
        """The images noted, for an objective that looks at them.

        Raises:
            DataError: no row names one, or one is missing.
        """
        assert self._paired is not None
        if not len(self._paired):
            raise DataError(
                "--objective head-aware: no training row names an image; "
                "--objective mse needs only text."
            )
        return self._paired.photos(images)

    def keep_tokens(self, sentences: Sequence[str]) -> None:
        """Counts the tokens of sentences among those that occur, though nothing trains on them."""
        tokens = self._student.tokenize(list(dict.fromkeys(sentences)))
        self._kept = np.union1d(self._kept, tokens.ids)

    def token_ids(self) -> npt.NDArray[np.int32]:
        """The ids that occur, in order."""
        return np.unique(np.concatenate([self._kept, *(part.tokens.ids for part in self._parts)]))

    def renumber_tokens(self, places: npt.NDArray[np.intp]) -> None:
        """Gives tokens new ids: `places` of the old ones."""
        self._parts = [
            dataclasses.replace(
                part,
                tokens=dataclasses.replace(
                    part.tokens, ids=places[part.tokens.ids].astype(np.int32)
                ),
            )
            for part in self._parts
        ]

    def pairs(
        self,
        teacher: ClipVE,
        photos: Photos | None,
        with_autocast: Autocast,
        progress: Progress,
    ) -> TrainingPairs:
        """Everything taken in, with the teacher's embeddings, and those of the photos, if any.

        Raises:
            DataError: an image is damaged.
        """
        vectors = sentence_embeddings(
            teacher.text,
            self.sources,
            autocast=with_autocast,
            description="teacher embeddings",
            progress=progress,
        )
        paired = None
        if self._paired is not None and photos is not None:
            paired = self._paired.look_up(
                len(self._sources), teacher, photos, with_autocast, progress
            )
        starts = np.cumsum([0, *(len(part.tokens) for part in self._parts)])
        sentences, sources, weights, distinct_pairs = [], [], [], []
        num_distinct = 0
        for part, start in zip(self._parts, starts, strict=False):
            pairs, weights_of_pairs = part.portions()
            distinct_pairs.append(num_distinct + pairs)
            num_distinct += len(part.counts)
            sentences.append(part.sentence_of_pair[pairs] + start)
            sources.append(part.source_of_pair[pairs])
            weights.append(weights_of_pairs)
        return TrainingPairs(
            Sentences(
                TokenTable.concatenate([part.tokens for part in self._parts]),
                np.concatenate(sentences),
            ),
            Features(vectors, np.concatenate(sources)),
            torch.from_numpy(np.concatenate(weights)).float(),
            tuple(part.lang for part in self._parts),
            np.repeat(np.arange(len(self._parts)), [len(some) for some in sources]),
            np.concatenate(distinct_pairs),
            paired,
        )


@dataclass(frozen=True, eq=False)
class TrainingPairs:
    """U (target sentence, source sentence) pairs of all languages, one language after another.

    Translations repeat as hypotheses do. A pair that stands n times in the data is trained on once
    an epoch with weight n, which is the same expected gradient for less work. Only very frequent
    pairs are trained on several times an epoch, in parts: rare steps with a huge gradient throw
    Adam off, and what those sentences differ in was then never learnt (docs/experiments.md,
    2026-11-21).

    Attributes:
        sentences: of the targets, tokenised for the student.
        teacher: (U, D) the teacher's embeddings of the source sentences.
        weights: (U,) how often each stands in the data, over its language's mean; those of an
            auxiliary language are lowered.
        languages: their codes.
        language: (U,) which of them each pair is of.
        distinct: (U,) which of the different pairs each is, in the order they were taken in.
        images: what stands beside the source sentences, where the objective looks at images.
    """

    sentences: Sentences
    teacher: Features
    weights: Tensor
    languages: tuple[str, ...]
    language: Rows
    distinct: Rows
    images: PairedImages | None = None

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def num_distinct(self) -> int:
        """How many different pairs there are."""
        return int(self.distinct[-1]) + 1


@dataclass(frozen=True, eq=False)
class PairedImages:
    """The images that stand beside each source sentence in the training data.

    Attributes:
        vectors: (U, D) embeddings of the distinct images.
        items: the images of sentence 0, then those of sentence 1, and so on.
        offsets: (S + 1,) where those of each sentence begin; some have none.
    """

    vectors: Vectors
    items: Rows
    offsets: Rows

    def draw(self, sources: Rows, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One image for each of B source sentences.

        Returns:
            (B, D) embeddings, and (B,) bool: whether there is one; the others are of any image.
        """
        starts, counts = self.offsets[sources], np.diff(self.offsets)[sources]
        drawn = starts + random.integers(np.maximum(counts, 1))
        # A sentence without images at the very end points one past the last.
        items = self.items[np.minimum(drawn, len(self.items) - 1)]
        return self.vectors.rows(items), torch.from_numpy(counts > 0)


class _PairedNames:
    """Which images stand beside which source sentences, by name, over all languages."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._where: list[str] = []
        self._beside: list[npt.NDArray[np.int64]] = []

    def __len__(self) -> int:
        return len(self._names)

    def add(self, split: Split, sources: Rows) -> None:
        """Takes in the rows of a language; `sources` numbers their source sentences."""
        numbers = []
        for name, row in zip(split.image_names, first_rows(split), strict=True):
            stem = image_stem(name)
            if stem not in self._numbers:
                self._numbers[stem] = len(self._names)
                self._names.append(name)
                self._where.append(split.where(row))
            numbers.append(self._numbers[stem])
        rows = np.flatnonzero(split.image_index >= 0)
        images = np.array(numbers, dtype=np.int64)[split.image_index[rows]]
        self._beside.append(np.unique(sources[rows] << 32 | images))

    def photos(self, images: ImageFolder) -> Photos:
        """All these images."""
        return Photos.named(self._names, self._where, images)

    def look_up(
        self,
        num_sources: int,
        teacher: ClipVE,
        photos: Photos,
        with_autocast: Autocast,
        progress: Progress,
    ) -> PairedImages:
        """The embeddings of all these images, by source sentence."""
        features = image_vectors(
            teacher.image,
            photos,
            autocast=with_autocast,
            description="image features",
            progress=progress,
        )
        beside = np.unique(np.concatenate(self._beside))
        counts = np.bincount(beside >> 32, minlength=num_sources)
        return PairedImages(
            features.vectors,
            features.index[beside & 0xFFFFFFFF],
            np.concatenate([[0], np.cumsum(counts)]),
        )
