"""The parallel text a student learns from: read, joined by `pairID`, and tokenised.

Legend: N parallel rows · U distinct sentence pairs · S distinct source sentences · D embedding
width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
    """Reads parallel text, one language after another; the source side only once."""

    folder: Path
    config: StudentConfig
    progress: Progress  # receives notes about skipped rows
    source_lang: str = ENGLISH
    #: By language, its rows that are held out for other languages.
    left_out: dict[str, Parallel] = field(default_factory=dict, init=False)
    _held_out: dict[str, HeldOut] = field(default_factory=dict, init=False)
    _sources: dict[str, Split] = field(default_factory=dict, init=False)

    def read(self, lang: str) -> tuple[Parallel, Parallel]:
        """Returns the training and the dev text of a language.

        Photos and sentences held out for one language of the run are trained on in none.

        Raises:
            DataError: a file is missing or bad, two splits share images, or there is too little
                text to hold any out.
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
        return self._without_held_out(training), dev

    def _without_held_out(self, training: Parallel) -> Parallel:
        """Drops the rows that are held out for other languages of the run."""
        config, lang, path = self.config, training.target.lang, training.target.path
        held = HeldOut()
        for other in (*config.lang, *config.auxiliary):
            if other == lang or self._has_dev_file(other):
                continue
            if other not in self._held_out:
                # Only to choose what is held out: `read` will read these rows again, with notes.
                whole = self._joined(other, config.train_split, SILENT)
                self._held_out[other] = held_out(whole, config.dev_fraction, config.seed)
            held = HeldOut(*map(frozenset.union, held, self._held_out[other]))
        kept, left_out = held.divide(training)
        if not len(left_out.target):
            return training
        if not len(kept.target):
            raise DataError(
                f"{path}: nothing is left to train on, because all rows are held out for other "
                "languages; add dev files for those, or lower --dev-fraction."
            )
        self.left_out[lang] = left_out
        self.progress.note(
            f"{path}: {len(left_out.target)} pairs skipped, because their photos or "
            f"{self.source_lang} sentences are held out for other languages."
        )
        return kept

    def with_source(self, training: Parallel, lang: str) -> Parallel | None:
        """Joins a training text with another source language; None if that has no file."""
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
                f"{lang} row (such as {', '.join(parallel.unmatched_examples)}); skipped."
            )
        return parallel

    def _split(self, lang: str, split: str, progress: Progress) -> Split:
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


class HeldOut(NamedTuple):
    """What replaces a missing dev file: photos with all their rows, or sentences of plain text."""

    photos: frozenset[str] = frozenset()  # by `image_stem`
    photo_sources: frozenset[str] = frozenset()  # their sentences, for rows that name no photo
    sentences: frozenset[str] = frozenset()  # source sentences, held out in any row

    def divide(self, parallel: Parallel) -> tuple[Parallel, Parallel]:
        """Splits rows into those to train on and those held out."""
        held = [
            source in self.sentences
            or (source in self.photo_sources if photo is None else photo in self.photos)
            for source, photo in zip(parallel.sources, _photos(parallel), strict=True)
        ]
        return parallel.take(np.flatnonzero(~np.array(held))), parallel.take(np.flatnonzero(held))


def held_out(parallel: Parallel, fraction: float, seed: int) -> HeldOut:
    """Chooses what to hold out, always the same; raises a DataError if there is too little text."""
    photos = _photos(parallel)
    names = sorted({photo for photo in photos if photo is not None})
    kind, items = ("photos", names) if names else ("sentences", distinct(parallel.sources)[0])
    num_held = max(1, round(fraction * len(items)))
    if num_held >= len(items):
        raise DataError(
            f"{parallel.target.path}: {len(items)} distinct {kind} are too few to hold out "
            f"{fraction:.0%} of them; add a dev file or lower --dev-fraction."
        )
    chosen = frozenset(items[i] for i in np.flatnonzero(are_first(items, num_held, seed)))
    if not names:
        return HeldOut(sentences=chosen)
    rows = zip(parallel.sources, photos, strict=True)
    return HeldOut(chosen, frozenset(source for source, photo in rows if photo in chosen))


def _photos(parallel: Parallel) -> list[str | None]:
    """The `image_stem` of each row's photo; None if it has none."""
    stems = [*map(image_stem, parallel.target.image_names), None]  # an index of -1 means none
    return [stems[number] for number in parallel.target.image_index.tolist()]


def limited(parallel: Parallel, limit: int | None, seed: int, progress: Progress) -> Parallel:
    """Keeps the rows of `limit` distinct source sentences; None keeps all.

    The choice depends only on the sentences and the seed, so a smaller limit gives a subset of a
    larger one, and every language gets translations of the same sentences.
    """
    if limit is None:
        return parallel
    sentences, index = distinct(parallel.sources)
    if limit >= len(sentences):
        if limit > len(sentences):
            progress.note(
                f"{parallel.target.path}: {len(sentences)} distinct sentences, fewer than "
                f"--limit {limit}; all are used."
            )
        return parallel
    return parallel.take(np.flatnonzero(are_first(sentences, limit, seed)[index]))


def as_source(parallel: Parallel, source_lang: str) -> Parallel:
    """The rows with their source sentences as targets."""
    target = dataclasses.replace(parallel.target, lang=source_lang, hypotheses=parallel.sources)
    return dataclasses.replace(parallel, target=target)


@dataclass(frozen=True, eq=False)
class LanguagePairs:
    """The P distinct (target, source) sentence pairs of one language."""

    lang: str
    tokens: TokenTable  # the distinct target sentences, for the student
    sentence_of_pair: Rows  # (P,) index into `tokens`
    source_of_pair: Rows  # (P,) index into the corpus's source sentences
    counts: Rows  # (P,) how often each pair occurs
    weight: float = 1.0  # mean weight of its pairs in the loss

    def portions(self) -> tuple[Rows, npt.NDArray[np.float64]]:
        """The pairs of an epoch, frequent ones several times, and their weights.

        A pair's weights add up in proportion to its count. Their mean is `weight`, so that
        splitting a frequent pair does not lower the loss.
        """
        times = np.ceil(self.counts / self.counts.mean() / _HEAVIEST).astype(np.intp)
        pairs = np.repeat(np.arange(len(self.counts)), times)
        weights = (self.counts / times)[pairs]
        return pairs, self.weight * weights / weights.mean()


@dataclass(eq=False)
class Corpus:
    """The parallel text to train on, added one language at a time.

    Ten languages of SNLI-VE are five million rows, so only tokens and indices are kept, no strings.
    """

    student: SentenceEncoder
    progress: Progress  # notes truncated sentences
    _sources: dict[str, int] = field(default_factory=dict, init=False)
    _parts: list[LanguagePairs] = field(default_factory=list, init=False)
    _kept: npt.NDArray[np.int32] = field(init=False, default_factory=lambda: np.empty(0, np.int32))

    @property
    def sources(self) -> list[str]:
        """The distinct source sentences so far."""
        return list(self._sources)

    def add(self, text: Parallel, weight: float = 1.0) -> LanguagePairs:
        """Adds the rows of a language; `weight` is the mean weight of its pairs in the loss."""
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
        """Adds every source sentence so far, paired with itself."""
        numbers = np.arange(len(self._sources))
        rows = np.concatenate([np.repeat(p.source_of_pair, p.counts) for p in self._parts])
        counts = np.bincount(rows, minlength=len(numbers))
        where = f"the {source_lang} sentences"
        sentences = tokenize_sentences(self.student, self.sources, lambda _: where, self.progress)
        part = LanguagePairs(source_lang, sentences.tokens, numbers, numbers, counts)
        self._parts.append(part)
        return part

    def keep_tokens(self, sentences: Sequence[str]) -> None:
        """Keeps the tokens of these sentences in `trim_vocabulary`, though none is trained on."""
        tokens = self.student.tokenize(list(dict.fromkeys(sentences)))
        self._kept = np.union1d(self._kept, tokens.ids)

    def trim_vocabulary(self, name: str) -> None:
        """Reduces the vocabulary of the student, named `name`, to tokens that occur."""
        used = np.unique(np.concatenate([self._kept, *(part.tokens.ids for part in self._parts)]))
        places = trim_vocabulary(self.student, used, name)
        for part in self._parts:
            part.tokens.ids[:] = places[part.tokens.ids]

    def pairs(self, teacher: ClipVE, with_autocast: Autocast) -> TrainingPairs:
        """All training pairs, with the teacher's embeddings."""
        vectors = sentence_embeddings(
            teacher.text,
            self.sources,
            autocast=with_autocast,
            description="teacher embeddings",
            progress=self.progress,
        )
        targets, sources, weights, distinct_pairs = [], [], [], []
        num_targets = num_distinct = 0
        for part in self._parts:
            pairs, weights_of_pairs = part.portions()
            targets.append(part.sentence_of_pair[pairs] + num_targets)
            sources.append(part.source_of_pair[pairs])
            weights.append(weights_of_pairs)
            distinct_pairs.append(num_distinct + pairs)
            num_targets += len(part.tokens)
            num_distinct += len(part.counts)
        tokens = TokenTable.concatenate([part.tokens for part in self._parts])
        return TrainingPairs(
            Sentences(tokens, np.concatenate(targets)),
            Features(vectors, np.concatenate(sources)),
            torch.from_numpy(np.concatenate(weights)).float(),
            tuple(part.lang for part in self._parts),
            np.repeat(np.arange(len(self._parts)), list(map(len, sources))),
            np.concatenate(distinct_pairs),
        )


@dataclass(frozen=True, eq=False)
class TrainingPairs:
    """U (target sentence, source sentence) pairs of all languages, one language after another.

    A pair that occurs n times is trained on once an epoch with weight n: the same expected gradient
    for less work. Very frequent pairs are split over several steps, because rare huge gradients
    throw Adam off, and such sentences were then never told apart (docs/experiments.md, 2026-11-21).
    """

    sentences: Sentences  # the targets, tokenised for the student
    teacher: Features  # (U, D) the teacher's embeddings of the source sentences
    weights: Tensor  # (U,) count over its language's mean, times that language's weight
    languages: tuple[str, ...]
    language: Rows  # (U,) index into `languages`
    distinct: Rows  # (U,) number of the distinct pair, in the order they were added

    def __len__(self) -> int:
        return len(self.weights)
