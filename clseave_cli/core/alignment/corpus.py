"""The parallel text a student learns from: read, joined by `pairID`, taken in as token rows.

Legend: N parallel rows · U distinct sentence pairs · S distinct source sentences · D embedding
width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.config import StudentConfig
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
    Sentences,
    sentence_embeddings,
    tokenize_sentences,
)
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.models.vocabulary import trim_vocabulary
from clseave_cli.core.training.device import Autocast
from clseave_cli.core.training.loop import Rows
from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT, Progress

#: Largest weight of a pair in a step, in multiples of the mean over pairs.
_HEAVIEST = 5.0


@dataclass(eq=False)
class ParallelReader:
    """Reads the parallel text of one language after another; the source side once for all.

    Attributes:
        folder: the data folder.
        config: the languages of the run, names of the splits, what to do with bad rows.
        progress: hears what was left out.
        source_lang: the teacher's language.
        left_out: by language, the translations left out because other languages hold them out.
    """

    folder: Path
    config: StudentConfig
    progress: Progress
    source_lang: str = ENGLISH
    left_out: dict[str, list[str]] = field(default_factory=dict, init=False)
    _held_out: dict[str, HeldOut] = field(default_factory=dict, init=False)
    _sources: dict[str, Split] = field(default_factory=dict, init=False)

    def read(self, lang: str) -> tuple[Parallel, Parallel]:
        """The parallel training and dev text of a language.

        What is held out for any language of the run, photos or sentences, is in none of its
        training texts.

        Raises:
            DataError: a file is missing, bad, or shares images with another split, or there is too
                little text to hold some of it out.
        """
        config = self.config
        training = self._joined(lang, config.train_split, self.progress)
        if self._has_dev_file(lang):
            dev = self._joined(lang, config.dev_split, self.progress)
            if not config.allow_leak and config.dev_split != config.train_split:
                check_leak(training.target, dev.target)
        else:
            held = held_out(training, config.dev_fraction, config.seed)
            self.progress.note(
                f"{self.folder}: no {config.dev_split} file for {lang}; holding out "
                f"{config.dev_fraction:.0%} of the {config.train_split} "
                f"{'photos' if held.photos else 'sentences'} instead."
            )
            self._held_out[lang] = held
            training, dev = held.divide(training)
        return self._without_those_of_others(training), dev

    def _without_those_of_others(self, training: Parallel) -> Parallel:
        """Leaves out what is held out for the other languages of the run."""
        config, lang, path = self.config, training.target.lang, training.target.path
        held = HeldOut()
        for other in (*config.lang, *config.auxiliary):
            if other == lang or self._has_dev_file(other):
                continue
            if other not in self._held_out:
                # Its rows are not kept: `read` reads them once more, and tells about them.
                whole = self._joined(other, config.train_split, SILENT)
                self._held_out[other] = held_out(whole, config.dev_fraction, config.seed)
            held |= self._held_out[other]
        kept, left_out = held.divide(training)
        if not len(left_out.target):
            return training
        if not len(kept.target):
            raise DataError(
                f"{path}: nothing is left to train on; all its rows are held out for other "
                "languages. Give them a dev file, or a smaller --dev-fraction."
            )
        self.left_out[lang] = left_out.target.hypotheses
        self.progress.note(
            f"{path}: {len(left_out.target)} pairs left out; their photos or {self.source_lang} "
            "sentences are held out for other languages."
        )
        return kept

    def beside(self, training: Parallel, lang: str) -> Parallel | None:
        """The rows of a training text with what they say in another language, where it has them."""
        if lang == self.source_lang:
            return training
        if split_path(self.folder, self.config.train_split, lang) is None:
            return None
        other = self._split(lang, self.config.train_split, self.progress)
        return join(training.target, other, lang)

    def _has_dev_file(self, lang: str) -> bool:
        return split_path(self.folder, self.config.dev_split, lang) is not None

    def _joined(self, lang: str, split: str, progress: Progress) -> Parallel:
        source_lang = self.source_lang
        if split not in self._sources and split_path(self.folder, split, source_lang):
            self._sources[split] = self._split(source_lang, split, self.progress)
        target = self._split(lang, split, progress)
        parallel = join(target, self._sources.get(split), source_lang)
        if parallel.num_unmatched_target or parallel.num_unmatched_source:
            progress.note(
                f"{parallel.target.path}: {parallel.num_unmatched_target} rows have no "
                f"{source_lang} row and {parallel.num_unmatched_source} {source_lang} rows no "
                f"{lang} row (such as "
                f"{', '.join(parallel.unmatched_examples)}); left out."
            )
        return parallel

    def _split(self, lang: str, split: str, progress: Progress) -> Split:
        """A split in one language: sentences count, labels and images only where they are."""
        return read_split(
            self.folder,
            split,
            lang,
            labelled=False,
            with_images=False,
            source_lang=self.source_lang,
            skip_bad=self.config.skip_bad,
            skip_suspect=self.config.skip_suspect,
            progress=progress,
        )


@dataclass(frozen=True)
class HeldOut:
    """What stands in for a dev file: photos with all their rows, or sentences of plain text.

    Attributes:
        photos: the photos, by `image_stem`.
        beside: the source sentences of their rows; a row that names no photo is held out by these.
        sentences: source sentences that are held out wherever they stand.
    """

    photos: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    sentences: frozenset[str] = frozenset()

    def __or__(self, other: HeldOut) -> HeldOut:
        """What is in one of the two."""
        return HeldOut(
            self.photos | other.photos, self.beside | other.beside, self.sentences | other.sentences
        )

    def divide(self, parallel: Parallel) -> tuple[Parallel, Parallel]:
        """The rows to train on, and those that are held out."""
        held = [
            source in self.sentences
            or (source in self.beside if photo is None else photo in self.photos)
            for source, photo in zip(parallel.sources, _photos(parallel), strict=True)
        ]
        return parallel.take(np.flatnonzero(~np.array(held))), parallel.take(np.flatnonzero(held))


def held_out(parallel: Parallel, fraction: float, seed: int) -> HeldOut:
    """What stands in for a dev file; of the same photos or sentences, the same ones.

    Raises:
        DataError: there are too few of them.
    """
    photos = _photos(parallel)
    names = sorted({photo for photo in photos if photo is not None})
    kind, items = ("photos", names) if names else ("sentences", distinct(parallel.sources)[0])
    num_held = max(1, round(fraction * len(items)))
    if num_held >= len(items):
        raise DataError(
            f"{parallel.target.path}: {len(items)} distinct {kind} are too few to hold out "
            f"{fraction:.0%} of them; give a dev file or a smaller --dev-fraction."
        )
    chosen = frozenset(items[i] for i in np.flatnonzero(are_first(items, num_held, seed)))
    if not names:
        return HeldOut(sentences=chosen)
    rows = zip(parallel.sources, photos, strict=True)
    return HeldOut(chosen, frozenset(source for source, photo in rows if photo in chosen))


def _photos(parallel: Parallel) -> list[str | None]:
    """The photo of each row, by `image_stem`; None where it names none."""
    stems = [*map(image_stem, parallel.target.image_names), None]  # -1 is the last
    return [stems[number] for number in parallel.target.image_index.tolist()]


def limited(parallel: Parallel, limit: int | None, seed: int, progress: Progress) -> Parallel:
    """The rows of the first distinct source sentences, in a random order.

    The order depends on the sentences and the seed alone: a smaller limit takes a part of what a
    larger one takes, and every language the translations of the same sentences.

    Args:
        parallel: the training text of a language.
        limit: how many sentences; None: all.
        seed: of the order.
        progress: hears where there are fewer.
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
    """What a language brings: its sentences, and its P distinct pairs with source ones.

    Attributes:
        lang: the language.
        tokens: its distinct sentences, tokenised for the student.
        sentence_of_pair: (P,) which of them.
        source_of_pair: (P,) which of the corpus's source sentences.
        counts: (P,) how often each pair stands in the data.
        weight: of its pairs in the loss, on average.
    """

    lang: str
    tokens: TokenTable
    sentence_of_pair: Rows
    source_of_pair: Rows
    counts: Rows
    weight: float = 1.0

    def portions(self) -> tuple[Rows, npt.NDArray[np.float64]]:
        """The pairs to train on in an epoch, some of them several times, and their weights.

        A pair's weights add up in proportion to how often it stands in the data; the mean of all is
        `weight`, so that a heavy pair's parts do not lower the loss.
        """
        times = np.ceil(self.counts / self.counts.mean() / _HEAVIEST).astype(np.intp)
        pairs = np.repeat(np.arange(len(self.counts)), times)
        weights = (self.counts / times)[pairs]
        return pairs, self.weight * weights / weights.mean()


@dataclass(eq=False)
class Corpus:
    """The parallel text to train on, taken in language by language.

    Ten languages of SNLI-VE are five million rows: what stays of a row is its tokens and a few
    numbers, not its strings.

    Attributes:
        student: whose tokens the sentences become.
        progress: hears about sentences that are cut.
    """

    student: SentenceEncoder
    progress: Progress
    _sources: dict[str, int] = field(default_factory=dict, init=False)
    _parts: list[LanguagePairs] = field(default_factory=list, init=False)
    _kept: npt.NDArray[np.int32] = field(init=False, default_factory=lambda: np.empty(0, np.int32))

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
        target, numbers = text.target, self._sources
        sentences = tokenize_sentences(self.student, target.hypotheses, target.where, self.progress)
        sources = np.array(
            [numbers.setdefault(s, len(numbers)) for s in text.sources], dtype=np.intp
        )
        pair_ids, counts = np.unique(sentences.index * len(numbers) + sources, return_counts=True)
        of_pair = np.divmod(pair_ids, len(numbers))
        part = LanguagePairs(target.lang, sentences.tokens, *of_pair, counts, weight)
        self._parts.append(part)
        return part

    def add_source(self, source_lang: str) -> LanguagePairs:
        """Takes in every source sentence so far as its own translation."""
        every_source = np.arange(len(self._sources))
        standing = np.concatenate([np.repeat(p.source_of_pair, p.counts) for p in self._parts])
        counts = np.bincount(standing, minlength=len(every_source))
        where = f"the {source_lang} sentences"
        sentences = tokenize_sentences(self.student, self.sources, lambda _: where, self.progress)
        part = LanguagePairs(source_lang, sentences.tokens, every_source, every_source, counts)
        self._parts.append(part)
        return part

    def keep_tokens(self, sentences: Sequence[str]) -> None:
        """Counts the tokens of sentences among those that occur, though nothing trains on them."""
        tokens = self.student.tokenize(list(dict.fromkeys(sentences)))
        self._kept = np.union1d(self._kept, tokens.ids)

    def trim_vocabulary(self, name: str) -> None:
        """Reduces the student, called `name`, to the tokens that occur, and renumbers them."""
        used = np.unique(np.concatenate([self._kept, *(part.tokens.ids for part in self._parts)]))
        places = trim_vocabulary(self.student, used, name)
        for part in self._parts:
            part.tokens.ids[:] = places[part.tokens.ids]

    def pairs(self, teacher: ClipVE, with_autocast: Autocast) -> TrainingPairs:
        """Everything taken in, with the teacher's embeddings."""
        vectors = sentence_embeddings(
            teacher.text,
            self.sources,
            autocast=with_autocast,
            description="teacher embeddings",
            progress=self.progress,
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
            np.repeat(np.arange(len(self._parts)), [len(part) for part in sources]),
            np.concatenate(distinct_pairs),
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
    """

    sentences: Sentences
    teacher: Features
    weights: Tensor
    languages: tuple[str, ...]
    language: Rows
    distinct: Rows

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def num_distinct(self) -> int:
        """How many different pairs there are."""
        return int(self.distinct[-1]) + 1
