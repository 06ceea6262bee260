"""How good a student is on the dev rows, language by language.

Legend: N dev rows · D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clseave_cli.core.config import AlignConfig
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import Parallel, Split, distinct
from clseave_cli.core.features import (
    Features,
    Sentences,
    embed_rows,
    image_features,
    sentence_embeddings,
    tokenize_sentences,
)
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.progress import Progress
from clseave_cli.core.training.loop import Rows
from clseave_cli.core.training.precision import Autocast
from clseave_cli.errors import DataError, TrainingError
from clseave_cli.labels import UNLABELLED

#: A student whose embeddings vary less than this share of the teacher's says the same to all.
_COLLAPSED = 1e-3


@dataclass(frozen=True, eq=False)
class DevSet:
    """One language's dev rows: what the teacher says, and what the labels are where known."""

    lang: str
    sentences: Sentences
    teacher: Features
    premises: Features | None
    labels: Tensor


def images_for_accuracy(
    folder: Path, config: AlignConfig, dev_text: Sequence[Parallel]
) -> ImageFolder | None:
    """The image folder if dev accuracy shall choose the checkpoint, or can (`auto`).

    Raises:
        DataError: accuracy was asked for, and rows or images do not allow it.
    """
    if config.select == "mse":
        return None
    possible = all(_judged_rows(parallel.target).size > 0 for parallel in dev_text)
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


def dev_set(
    student: SentenceEncoder,
    teacher: ClipVE,
    parallel: Parallel,
    images: ImageFolder | None,
    with_autocast: Autocast,
    progress: Progress,
) -> DevSet:
    """Prepares the dev rows of a language; with images, only those that can be judged."""
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
    return DevSet(
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


def evaluate_student(
    student: SentenceEncoder, teacher: ClipVE, dev_sets: Sequence[DevSet]
) -> dict[str, float]:
    """Dev figures averaged over languages: mean squared error per dimension, and accuracy.

    Raises:
        TrainingError: the student has collapsed.
    """
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


def _judged_rows(split: Split) -> Rows:
    """Rows with both a label and an image: those that accuracy can be measured on."""
    return np.flatnonzero((split.labels != UNLABELLED) & (split.image_index >= 0))
