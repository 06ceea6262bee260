"""`finetune-ve`: CLIP-VE, the visual-entailment model of the source language (thesis 3.1.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.config import FinetuneConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import Split, check_leak, read_split, require_language
from clseave_cli.core.features import (
    Features,
    Photos,
    Sentences,
    embed_rows,
    image_features,
    tokenize_sentences,
)
from clseave_cli.core.files import json_digest, require_replaceable
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.precision import Autocast, autocast, resolve_device
from clseave_cli.core.training.run import Run, finished_before, model_kind
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress


@dataclass(frozen=True)
class FinetuneResult:
    """A finished CLIP-VE.

    Attributes:
        folder: the model.
        training: how the run went; None if it had been finished before.
    """

    folder: Path
    training: TrainingResult | None


class _Batch(NamedTuple):
    sentences: PackedBatch
    num_sentences: int
    sentence_of_row: Tensor
    image_of_row: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class _Pairs:
    """A split ready for training: distinct sentences as tokens, images as features."""

    sentences: Sentences
    images: Features
    labels: Tensor

    def batch(self, rows: Rows, model: ClipVE) -> _Batch:
        # A sentence that stands twice in a batch is encoded once; its gradients add up.
        distinct, sentence_of_row = np.unique(self.sentences.index[rows], return_inverse=True)
        return _Batch(
            model.text.pack(self.sentences.tokens, processes().share(distinct)),
            len(distinct),
            torch.from_numpy(sentence_of_row),
            torch.from_numpy(self.images.index[rows]),
            self.labels[torch.from_numpy(rows)],
        )


def finetune(config: FinetuneConfig, progress: Progress = SILENT) -> FinetuneResult:
    """Trains text tower, its projection and the head on cached features of the frozen image tower.

    Raises:
        ClseaveError: bad data, an unusable CLIP model, a full disk, or an interruption.
    """
    require_language(config.source_lang, "--source-lang")
    out = config.out or config.runs / "clip-ve"
    require_replaceable(out, model_kind("finetune-ve"), config)
    if config.resume and finished_before(out, progress):
        return FinetuneResult(out, None)
    device = resolve_device(config.device)
    team = processes()
    folder = team.once(lambda: data_folder(config.data, progress))
    train_split, dev_split = (
        read_split(folder, split, config.source_lang, skip_bad=config.skip_bad, progress=progress)
        for split in (config.train_split, config.dev_split)
    )
    if not config.allow_leak:
        check_leak(train_split, dev_split)
    images = ImageFolder.of(folder, config.images)
    _require_batch_statistics(config, train_split)
    _require_two_labels(train_split)
    splits = [(split, Photos.of(split, images)) for split in (train_split, dev_split)]

    torch.manual_seed(config.seed)
    model = ClipVE.from_clip(config.clip, config.source_lang).to(device)
    model.text.verify_packing(config.clip, progress)
    inputs = {"clip": json_digest([model.text.digest(), model.image.digest()])}
    for split, photos in splits:
        inputs |= {split.path.name: split.digest, f"photos: {split.name}": photos.digest()}
    with Run("finetune-ve", out, config, inputs) as run:
        with_autocast = autocast(config.precision, device)
        train_pairs, dev_pairs = (
            _prepare(model, split, photos, with_autocast, progress) for split, photos in splits
        )
        train_vectors = train_pairs.images.vectors.all().to(device)
        dev_premises = dev_pairs.images.of_rows().to(device)

        def loss(batch: _Batch) -> Tensor:
            sentences = team.spread(lambda: model.text(batch.sentences), batch.num_sentences)
            logits = model(sentences[batch.sentence_of_row], train_vectors[batch.image_of_row])
            return torch.stack(
                [functional.cross_entropy(logits, batch.labels), _accuracy(logits, batch.labels)]
            )

        def evaluate() -> dict[str, float]:
            hypotheses = embed_rows(model.text, dev_pairs.sentences)
            logits = model(hypotheses, dev_premises)
            labels = dev_pairs.labels.to(device)
            return {
                "loss": functional.cross_entropy(logits, labels).item(),
                "accuracy": _accuracy(logits, labels).item(),
            }

        stage = Stage(
            name="finetune-ve",
            module=model,
            num_examples=len(train_split),
            prepare=lambda rows: train_pairs.batch(rows, model),
            loss=loss,
            evaluate=evaluate,
            selection=Selection(config.select, "lowest" if config.select == "loss" else "highest"),
            figures=("accuracy",),
        )
        tokens = [pairs.sentences.tokens for pairs in (train_pairs, dev_pairs)]
        with reduced_vocabulary(model.text, *tokens):
            result = train(stage, config, device=device, folder=run.folder, progress=progress)
        run.publish(model.save, _card(config, len(train_split), result))
        return FinetuneResult(out, result)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float().mean()


def _require_two_labels(split: Split) -> None:
    labels = np.unique(split.labels)
    if len(labels) == 1:
        raise DataError(
            f"{split.path}: every row is {LABELS[labels[0]]!r}; expected rows of at least two "
            "labels, or there is nothing to tell apart."
        )


def _require_batch_statistics(config: FinetuneConfig, split: Split) -> None:
    """The head normalises over the examples it sees at once, so there must be two of them."""
    smallest = len(split) // math.ceil(len(split) / config.batch_size)
    if smallest // min(config.accumulation, smallest) < 2:
        raise UsageError(
            f"{split.path}: {len(split)} rows with --batch-size {config.batch_size} and "
            f"--accumulation {config.accumulation} leave parts of one example; the head's batch "
            "normalisation needs two. Raise --batch-size or lower --accumulation."
        )


def _prepare(
    model: ClipVE,
    split: Split,
    photos: Photos,
    with_autocast: Autocast,
    progress: Progress,
) -> _Pairs:
    return _Pairs(
        tokenize_sentences(model.text, split.hypotheses, split.where, progress),
        image_features(model.image, split, photos, autocast=with_autocast, progress=progress),
        torch.from_numpy(split.labels.astype(np.int64)),
    )


def _card(config: FinetuneConfig, num_train: int, result: TrainingResult) -> str:
    dev = result.dev
    return f"""---
library_name: clseave
tags: [visual-entailment, clip]
language: [{config.source_lang}]
base_model: {config.clip}
---

# CLIP-VE

Says whether an image entails, contradicts or leaves open a sentence in `{config.source_lang}`
({", ".join(LABELS)}). Image tower of `{config.clip}`, frozen; text tower, projection and
head trained on {num_train} pairs, {result.epochs} epochs, the weights of epoch
{result.best_epoch} kept: dev loss {dev["loss"]:.4f}, dev accuracy {dev["accuracy"]:.2%}.

    clseave predict image.jpg "a sentence" --lang {config.source_lang} --runs {config.runs}

`training/` records every option, version and figure.
"""
