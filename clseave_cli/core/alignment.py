"""`align`: a multilingual student of the CLIP-VE text tower (thesis 3.3).

The student learns, by mean squared error, to give a translated hypothesis the embedding that the
frozen English teacher gives the original. The teacher is asked once per sentence; after that it is
a look-up.

Legend: N parallel rows · U distinct sentence pairs · B batch · D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.config import AlignConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import (
    ENGLISH,
    Parallel,
    Split,
    check_leak,
    distinct,
    join,
    read_split,
    require_language,
    require_split_path,
    split_path,
)
from clseave_cli.core.features import (
    Features,
    Sentences,
    embed_rows,
    image_features,
    sentence_embeddings,
    tokenize_sentences,
)
from clseave_cli.core.files import json_digest
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.student import new_student, save_student
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.progress import SILENT, Progress
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.precision import Autocast, autocast, resolve_device
from clseave_cli.core.training.run import Run, is_complete, require_writable
from clseave_cli.errors import DataError, TrainingError, UsageError
from clseave_cli.labels import UNLABELLED

#: Largest weight of a pair in a step, in multiples of the mean.
_HEAVIEST = 5.0
#: A student whose embeddings vary less than this share of the teacher's says the same to all.
_COLLAPSED = 1e-3


@dataclass(frozen=True)
class AlignResult:
    """A finished student.

    Attributes:
        folder: the model.
        languages: what it reads.
        training: how the run went; None if it had been finished before.
    """

    folder: Path
    languages: tuple[str, ...]
    training: TrainingResult | None


class _Batch(NamedTuple):
    sentences: PackedBatch
    teacher: Tensor
    weights: Tensor


class _Corpus:
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

    def pairs(self, teacher: ClipVE, with_autocast: Autocast, progress: Progress) -> _TrainingPairs:
        """Everything taken in, with the teacher's embeddings."""
        target_of_pair, source_of_pair = np.concatenate(self._pairs, axis=1)
        counts = np.concatenate(self._counts)
        each, weights = _portions(counts)
        vectors = sentence_embeddings(
            teacher.text,
            list(self._sources),
            autocast=with_autocast,
            description="teacher embeddings",
            progress=progress,
        )
        return _TrainingPairs(
            Sentences(TokenTable.concatenate(self._tokens), target_of_pair[each]),
            Features(vectors, source_of_pair[each]),
            torch.from_numpy(weights).float(),
            len(counts),
        )


@dataclass(frozen=True, eq=False)
class _TrainingPairs:
    """Distinct (target sentence, source sentence) pairs of each language.

    Translations repeat as hypotheses do. A pair that stands n times in the data is trained on once
    an epoch with weight n, which is the same expected gradient for less work. Very frequent pairs
    are trained on several times an epoch, in parts: rare steps with a huge gradient throw Adam off,
    and what those sentences differ in was then never learnt (docs/experiments.md, 2026-11-21).
    """

    sentences: Sentences
    teacher: Features
    weights: Tensor
    num_distinct: int

    def batch(self, rows: Rows, student: SentenceEncoder) -> _Batch:
        own = processes().share(rows)
        return _Batch(
            student.pack(self.sentences.tokens, self.sentences.index[own]),
            self.teacher.vectors.rows(self.teacher.index[rows]),
            self.weights[torch.from_numpy(rows)],
        )


def _portions(
    counts: npt.NDArray[np.intp],
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Which pairs are trained on in an epoch, some of them several times, and with which weights.

    A pair's weights add up to its count in multiples of the mean count.
    """
    weights = counts / counts.mean()
    times = np.ceil(weights / _HEAVIEST).astype(np.intp)
    pairs = np.repeat(np.arange(len(counts)), times)
    return pairs, (weights / times)[pairs]


@dataclass(frozen=True, eq=False)
class _DevSet:
    """One language's dev rows: what the teacher says, and what the labels are where known."""

    lang: str
    sentences: Sentences
    teacher: Features
    premises: Features | None
    labels: Tensor


def align(config: AlignConfig, progress: Progress = SILENT) -> AlignResult:
    """Trains one student on the parallel text of one or several languages.

    Raises:
        ClseaveError: bad data, an unusable model, a full disk, a collapse, or an interruption.
    """
    languages = _languages(config)
    out = config.out or config.runs / f"align-{'+'.join(languages)}"
    require_writable(out)
    if config.resume and is_complete(out):
        progress.note(f"{out}: already complete.")
        return AlignResult(out, languages, None)
    device = resolve_device(config.device)
    with_autocast = autocast(config.precision, device)
    team = processes()
    folder = team.once(lambda: data_folder(config.data, progress))
    for lang in languages:
        require_split_path(folder, config.train_split, lang)

    teacher = ClipVE.from_folder(config.teacher or config.runs / "clip-ve").to(device)
    teacher.requires_grad_(False)
    torch.manual_seed(config.seed)
    student = new_student(config.student, teacher.text.embedding_dim).to(device)
    if not student.verify_packing():
        progress.note(f"{config.student}: packing is not exact for this encoder; padding instead.")
    inputs = {"teacher": teacher.fingerprint, "student": student.digest()}
    corpus, dev_text = _Corpus(student), {}
    read_english = functools.cache(functools.partial(_read, folder, ENGLISH, config, progress))
    for lang in languages:
        training, dev = _read_parallel(folder, lang, config, read_english, progress)
        for kind, parallel in (("train", training), ("dev", dev)):
            inputs[parallel.target.path.name] = parallel.target.digest
            inputs[f"{kind}: English of {lang}"] = json_digest(parallel.sources)
        corpus.add(training, progress)
        dev_text[lang] = dev
    read_english.cache_clear()
    del training, parallel
    images = _images_for_accuracy(folder, config, dev_text)
    run = Run("align", out, config, inputs)

    pairs = corpus.pairs(teacher, with_autocast, progress)
    del corpus
    dev_sets = [
        _dev_set(student, teacher, parallel, images, with_autocast, progress)
        for parallel in dev_text.values()
    ]

    def loss(batch: _Batch) -> Tensor:
        wanted = batch.teacher.to(device)  # (B, D)
        predicted = team.spread(lambda: student(batch.sentences), len(wanted))
        per_pair = torch.mean((predicted.float() - wanted) ** 2, dim=1)  # (B,)
        return torch.mean(per_pair * batch.weights.to(device))

    stage = Stage(
        name="align",
        title=f"align {'+'.join(languages)}",
        module=student,
        num_examples=len(pairs.weights),
        prepare=lambda rows: pairs.batch(rows, student),
        loss=loss,
        evaluate=lambda: _evaluate(student, teacher, dev_sets),
        selection=(
            Selection("accuracy", "highest") if images is not None else Selection("mse", "lowest")
        ),
    )
    tokens = [pairs.sentences.tokens, *(dev.sentences.tokens for dev in dev_sets)]
    with reduced_vocabulary(student, *tokens):
        result = train(stage, config, device=device, folder=run.folder, progress=progress)
    run.publish(
        lambda aside: save_student(
            student, aside, languages=languages, teacher=teacher.fingerprint
        ),
        _card(config, languages, pairs.num_distinct, result),
    )
    return AlignResult(out, languages, result)


def _languages(config: AlignConfig) -> tuple[str, ...]:
    if not config.lang:
        raise UsageError("--lang is missing; for example --lang de.")
    for lang in config.lang:
        require_language(lang)
        if lang == ENGLISH:
            raise UsageError(f"--lang {ENGLISH}: is the teacher's own language; name another.")
    return tuple(dict.fromkeys(config.lang))


def _read(folder: Path, lang: str, config: AlignConfig, progress: Progress, split: str) -> Split:
    """A split in one language: sentences count, labels and images only where they are."""
    return read_split(
        folder,
        split,
        lang,
        labelled=False,
        with_images=False,
        skip_bad=config.skip_bad,
        progress=progress,
    )


def _read_parallel(
    folder: Path,
    lang: str,
    config: AlignConfig,
    read_english: Callable[[str], Split],
    progress: Progress,
) -> tuple[Parallel, Parallel]:
    """The parallel training and dev text of a language."""

    def read(split: str) -> Parallel:
        english = read_english(split) if split_path(folder, split, ENGLISH) else None
        parallel = join(_read(folder, lang, config, progress, split), english)
        if parallel.num_unmatched_target or parallel.num_unmatched_source:
            progress.note(
                f"{parallel.target.path}: {parallel.num_unmatched_target} rows have no English row "
                f"and {parallel.num_unmatched_source} English rows no {lang} row (such as "
                f"{', '.join(parallel.unmatched_examples)}); left out."
            )
        return parallel

    training = read(config.train_split)
    if split_path(folder, config.dev_split, lang) is not None:
        dev = read(config.dev_split)
        if not config.allow_leak and config.dev_split != config.train_split:
            check_leak(training.target, dev.target)
        return training, dev
    progress.note(
        f"{folder}: no {config.dev_split} file for {lang}; holding out {config.dev_fraction:.0%} "
        f"of the {config.train_split} sentences instead."
    )
    return _hold_out(training, config.dev_fraction, config.seed)


def _hold_out(parallel: Parallel, fraction: float, seed: int) -> tuple[Parallel, Parallel]:
    """Splits by English sentence, so that no held-out sentence is trained on in other words."""
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


def _images_for_accuracy(
    folder: Path, config: AlignConfig, dev_text: dict[str, Parallel]
) -> ImageFolder | None:
    """The image folder if dev accuracy shall choose the checkpoint, or can (`auto`)."""
    if config.select == "mse":
        return None
    possible = all(_judged_rows(parallel.target).size > 0 for parallel in dev_text.values())
    if config.select == "accuracy":
        if not possible:
            raise DataError(
                f"{folder}: --select accuracy needs dev rows with labels and images; "
                "--select mse needs only text."
            )
        return ImageFolder.of(folder, config.images)
    if not possible:
        return None
    try:
        return ImageFolder.of(folder, config.images)
    except DataError:
        if config.images is not None:
            raise
        return None


def _judged_rows(split: Split) -> Rows:
    """Rows with both a label and an image: those that accuracy can be measured on."""
    return np.flatnonzero((split.labels != UNLABELLED) & (split.image_index >= 0))


def _dev_set(
    student: SentenceEncoder,
    teacher: ClipVE,
    parallel: Parallel,
    images: ImageFolder | None,
    with_autocast: Autocast,
    progress: Progress,
) -> _DevSet:
    if images is not None:
        rows = _judged_rows(parallel.target)
        if len(rows) < len(parallel.target):
            progress.note(
                f"{parallel.target.path}: {len(parallel.target) - len(rows)} rows without label or "
                "image; the dev figures leave them out."
            )
            parallel = parallel.take(rows)
    target = parallel.target
    sources, source_of_row = distinct(parallel.sources)
    vectors = sentence_embeddings(
        teacher.text,
        sources,
        autocast=with_autocast,
        description=f"{target.name}: teacher embeddings",
        progress=progress,
    )
    return _DevSet(
        target.lang,
        tokenize_sentences(student, target.hypotheses, target.where, progress),
        Features(vectors, source_of_row),
        None
        if images is None
        else image_features(
            teacher.image, target, images, autocast=with_autocast, progress=progress
        ),
        torch.from_numpy(target.labels.astype(np.int64)),
    )


def _evaluate(
    student: SentenceEncoder, teacher: ClipVE, dev_sets: list[_DevSet]
) -> dict[str, float]:
    """Dev figures averaged over languages: mean squared error per dimension, and accuracy."""
    figures: dict[str, list[float]] = {}
    for dev in dev_sets:
        predicted = embed_rows(student, dev.sentences)  # (N, D)
        device = predicted.device
        wanted = dev.teacher.of_rows().to(device)
        variance_ratio = predicted.var(dim=0).sum() / wanted.var(dim=0).sum()
        figures.setdefault("mse", []).append((predicted - wanted).square().mean().item())
        figures.setdefault("mae", []).append((predicted - wanted).abs().mean().item())
        figures.setdefault("variance_ratio", []).append(variance_ratio.item())
        if dev.premises is not None:
            premises = dev.premises.of_rows().to(device)
            labels = dev.labels.to(device)
            right = teacher(predicted, premises).argmax(dim=1) == labels
            figures.setdefault("accuracy", []).append(right.float().mean().item())
        if variance_ratio < _COLLAPSED:
            raise TrainingError(
                f"{dev.lang}: the student gives every sentence the same embedding (variance "
                f"{variance_ratio:.1e} of the teacher's); lower --learning-rate or raise "
                "--warmup-fraction."
            )
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _card(
    config: AlignConfig, languages: tuple[str, ...], num_pairs: int, result: TrainingResult
) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.dev.items())
    return f"""---
library_name: clseave
tags: [visual-entailment, multilingual, sentence-embeddings]
language: [{", ".join(languages)}]
base_model: {config.student}
---

# Student of CLIP-VE for {", ".join(languages)}

Gives sentences in {", ".join(languages)} the embedding that the English CLIP-VE teacher gives
their translation, so that the teacher's image tower and head work unchanged. `{config.student}`,
trained on {num_pairs} distinct sentence pairs, {result.epochs} epochs, the weights of epoch
{result.best_epoch} kept: {figures} on dev.

    clseave predict image.jpg "…" --lang {languages[0]} --runs {config.runs}

It works with the one teacher named in `config.json` only. `training/` records every option,
version and figure.
"""
