"""`finetune-ve`: trains CLIP-VE, the visual-entailment model of the source language (thesis 3.1.2).

Legend: N training rows · B rows of a batch · S distinct hypotheses · E width of image features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.config import FinetuneConfig
from clseave_cli.core.data.hypothesis_only import HypothesisClassifier
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.pairs import read_probabilities
from clseave_cli.core.data.records import (
    Split,
    check_leak,
    hold_out_images,
    read_split,
    require_language,
    split_path,
)
from clseave_cli.core.data.seen import SeenRows, seen_before
from clseave_cli.core.features import (
    Features,
    Photos,
    Sentences,
    by_rows,
    embed_rows,
    image_features,
    premises_now,
    tokenize_sentences,
)
from clseave_cli.core.files import file_digest, json_digest
from clseave_cli.core.guided import GuidedPictures, divergence, fixed_running_statistics, gap, leak
from clseave_cli.core.models.adapters import adapted, require_peft, train_blocks
from clseave_cli.core.models.calibration import fit_temperature
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.training.device import Autocast
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.run import Run, StageResult, public_name, set_up
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

#: Learning rate of `--unfreeze-blocks` as a share of `--learning-rate`.
_BLOCKS_RATE = 0.1


class _Batch(NamedTuple):
    """B pairs, prepared."""

    sentences: PackedBatch  # this process's shard of the batch's distinct hypotheses
    num_sentences: int  # S; in one process B, because a GPU's batches are padded to few shapes
    sentence_of_row: Tensor  # (B,) int64 into the S
    #: (B, E) image features; if the image tower is trained, its inputs (`ImageEncoder.states`) for
    #: this process's shard of the rows.
    premises: Tensor
    labels: Tensor  # (B,) int64 ids of `labels.LABELS`
    targets: Tensor  # the labels, or (B, 3) probabilities
    #: (B, E) features of guided pictures, and (B,) float32 1; of its photo and 0 if a row has none.
    guided: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class _Pairs:
    """A split as tokens of distinct sentences and image features."""

    sentences: Sentences
    images: Features
    labels: Tensor
    guided: Features | None = None  # of guided pictures; index -1: the row has none

    def batch(self, rows: Rows, model: ClipVE, targets: Tensor) -> _Batch:
        # A repeated sentence is encoded once; its gradients add up.
        sentences, sentence_of_row = np.unique(self.sentences.index[rows], return_inverse=True)
        group = processes()
        places = len(rows) if group.count == 1 else None
        image_rows = group.shard(rows) if model.image.num_trained else rows
        premises, guided = self.images.vectors.rows(self.images.index[image_rows]), None
        if self.guided is not None:
            index = self.guided.index[rows]
            has_guided = torch.from_numpy(index >= 0)
            pictures = self.guided.vectors.rows(index)
            pictures[~has_guided] = premises[~has_guided]
            guided = pictures, has_guided.float()
        numbers = torch.from_numpy(rows)
        return _Batch(
            model.text.pack(self.sentences.tokens, group.shard(sentences), places),
            places or len(sentences),
            torch.from_numpy(sentence_of_row),
            premises,
            self.labels[numbers],
            targets[numbers],
            guided,
        )


def finetune(config: FinetuneConfig, progress: Progress = SILENT) -> StageResult:
    """Trains the text tower, its projection and the head on cached image features.

    Raises:
        ClseaveError: bad data, an unusable CLIP model, a full disk, or an interruption.
    """
    require_language(config.source_lang, "--source-lang")
    out = config.out or config.runs / "clip-ve"
    languages = (config.source_lang,)
    _require_compatible(config)
    setup = set_up("finetune-ve", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, languages, None)
    device, folder = setup.device, setup.data
    train_split, dev_split, images = _data(config, folder, progress)
    _require_trainable(config, train_split)
    keys = train_split.pair_ids
    if config.guided_by == "image":
        keys = [train_split.image_names[image] for image in train_split.image_index]
    guided = GuidedPictures.of(config, keys, progress)
    splits = [(split, Photos.of(split, images)) for split in (train_split, dev_split)]

    torch.manual_seed(config.seed)
    model = ClipVE.from_clip(
        config.clip, config.source_lang, config.head, config.patch_grid, config.guided_adapter
    ).to(device)
    if config.unfreeze_blocks is not None or config.lora is not None:
        flag = "--unfreeze-blocks" if config.lora is None else "--lora"
        train_blocks(model.image, config.unfreeze_blocks, flag)
    model.text.verify_packing(config.clip, progress)
    inputs = {"clip": json_digest([model.text.digest(), model.image.digest()])}
    for split, photos in splits:
        inputs |= {split.path.name: split.digest, f"photos: {split.name}": photos.digest()}
    targets = _targets(config, train_split)
    for number, path in enumerate(config.soft_labels, 1):
        inputs[f"soft labels {number}"] = file_digest(path)
    if guided is not None:
        inputs["guided pictures"] = guided.photos.digest()
    with Run("finetune-ve", out, config, inputs) as run:
        train_pairs, dev_pairs = (
            _prepare(model, split, photos, pictures, setup.autocast, progress)
            for (split, photos), pictures in zip(splits, (guided, None), strict=True)
        )
        leak_note = ""
        if train_pairs.guided is not None:
            width = model.image.embedding_dim
            leak_note = leak(train_pairs.guided, train_pairs.images, train_split.labels, width)
            progress.note(leak_note)

        def loss(batch: _Batch) -> Tensor:
            sentences = processes().gather(lambda: model.text(batch.sentences), batch.num_sentences)
            premises = batch.premises
            if model.image.num_trained:
                premises = processes().gather(
                    lambda: model.image.from_states(batch.premises), len(batch.labels)
                )
            hypotheses = sentences[batch.sentence_of_row]
            logits = model(hypotheses, premises)
            total = functional.cross_entropy(logits, batch.targets)
            if batch.guided is not None:
                total = total + guided_loss(hypotheses, logits, batch, *batch.guided)
            return torch.stack([total, _accuracy(logits, batch.labels)])

        def guided_loss(
            hypotheses: Tensor, logits: Tensor, batch: _Batch, pictures: Tensor, has_guided: Tensor
        ) -> Tensor:
            """The loss of guided pictures: CE(p_y) + γ · KL(p_y ‖ p_x), eq. 12 to 14."""
            if config.guided_control == "noise":
                pictures = torch.randn_like(pictures)
            with fixed_running_statistics(model.head):
                guided_logits = model(hypotheses, pictures)
            losses = functional.cross_entropy(guided_logits, batch.targets, reduction="none")
            losses = losses + config.guided_kl * divergence(guided_logits, logits)
            if config.guided_adapter:
                of_pictures, of_photos = map(model.head.embedding, (pictures, batch.premises))
                weight = 0.5 if config.guided_cosine is None else config.guided_cosine
                losses = losses + weight * gap(of_pictures, of_photos, config.guided_distance)
            return (losses * has_guided).mean()

        def evaluate() -> dict[str, float]:
            hypotheses = embed_rows(model.text, dev_pairs.sentences)
            photos = premises_now(model.image, dev_pairs.images)
            logits = by_rows(model, hypotheses, photos, model.rows_at_once)
            labels = dev_pairs.labels.to(device)
            temperature = fit_temperature(logits.float().cpu().numpy(), dev_pairs.labels.numpy())
            return {
                "loss": functional.cross_entropy(logits, labels).item(),
                "accuracy": _accuracy(logits, labels).item(),
                "temperature": temperature,
            }

        stage = Stage(
            name="finetune-ve",
            module=model,
            num_examples=len(train_split),
            prepare=lambda rows: train_pairs.batch(rows, model, targets),
            loss=loss,
            evaluate=evaluate,
            selection=Selection(config.select, "lowest" if config.select == "loss" else "highest"),
            metrics=("accuracy",),
            trained_first=tuple(model.head.parameters()),
            freeze_epochs=config.freeze_epochs or 0.0,
            rate_factors={model.image: _image_rate(config)} if model.image.num_trained else {},
        )
        tokens = [pairs.sentences.tokens for pairs in (train_pairs, dev_pairs)]
        with (
            adapted((model.text, model.image), config.lora, config.seed),
            reduced_vocabulary(model.text, *tokens),
        ):
            result = train(stage, config, device=device, folder=run.folder, progress=progress)
        seen = [SeenRows.of(split, photos.keys) for split, photos in splits]
        seen += seen_before(config.clip)

        def save(aside: Path) -> None:
            model.save(aside, result.dev)
            with progress.task("hypothesis-only classifier", 1) as task:
                hypotheses, labels = train_split.hypotheses, train_split.labels
                HypothesisClassifier.fit(hypotheses, labels, train_split).write(aside)
                task.advance()

        run.publish(save, _card(config, len(train_split), result, leak_note), seen)
    _note_if_not_learnt(config, dev_split, result, progress)
    return StageResult(out, languages, result)


def _note_if_not_learnt(
    config: FinetuneConfig, dev: Split, result: TrainingResult, progress: Progress
) -> None:
    """Advises a larger learning rate after a chance result: 1e-6 suits a long-trained CLIP."""
    counts = np.bincount(dev.labels, minlength=len(LABELS))
    majority = counts.max() / len(dev)
    accuracy = result.dev["accuracy"]
    if accuracy <= majority + 2 * math.sqrt(majority * (1 - majority) / len(dev)):
        progress.note(
            f"dev accuracy {accuracy:.1%}: no better than always saying {LABELS[counts.argmax()]} "
            f"({majority:.1%}). A small CLIP, or one that `clseave pretrain` made, needs a larger "
            f"learning rate than {config.learning_rate:g}: try --learning-rate 1e-4 or 1e-3."
        )


def _data(
    config: FinetuneConfig, folder: Path, progress: Progress
) -> tuple[Split, Split, ImageFolder]:
    """Reads the training and dev rows, and finds their images; refuses bad or shared ones."""
    lang = config.source_lang
    read = partial(read_split, folder, lang=lang, skip_bad=config.skip_bad, progress=progress)
    train_split = read(config.train_split)
    if split_path(folder, config.dev_split, lang) is None:
        train_split, dev_split = hold_out_images(
            train_split, config.dev_split, config.dev_fraction, config.seed, progress
        )
    else:
        dev_split = read(config.dev_split)
        if not config.allow_leak:
            check_leak(train_split, dev_split)
    images = ImageFolder.of(folder, config.images)
    train_split, dev_split = (
        images.rows_with_image(split, config.skip_bad, progress)
        for split in (train_split, dev_split)
    )
    return train_split, dev_split, images


def _targets(config: FinetuneConfig, split: Split) -> Tensor:
    """The training targets: (N,) label ids, or (N, 3) probabilities.

    Cross-entropy with (1 − w) y + w q is the weighted sum of that with y and of the KL divergence
    from q, except for the entropy of q, which has no gradient. Raises a DataError if a row has no
    soft label, or a file of them is damaged.
    """
    labels = torch.from_numpy(split.labels.astype(np.int64))
    if not config.soft_labels and not config.label_smoothing:
        return labels
    hard = functional.one_hot(labels, len(LABELS)).float()
    targets = torch.lerp(hard, torch.full_like(hard, 1 / len(LABELS)), config.label_smoothing)
    if config.soft_labels:
        files = [read_probabilities(path, split.pair_ids) for path in config.soft_labels]
        targets = torch.lerp(targets, torch.from_numpy(np.mean(files, axis=0)), config.soft_weight)
    return targets


def _image_rate(config: FinetuneConfig) -> float:
    """The image tower's multiplier of the learning rate."""
    if config.image_learning_rate is None:
        return 1.0 if config.unfreeze_blocks is None else _BLOCKS_RATE
    return config.image_learning_rate / (config.learning_rate or 1.0)


def _require_compatible(config: FinetuneConfig) -> None:
    """Raises a UsageError for options that do not go together, or an ExtraMissing for `--lora`."""
    trains_image = config.unfreeze_blocks is not None or config.lora is not None
    if config.patch_grid and config.head != "patches":
        raise UsageError("--patch-grid goes with --head patches.")
    if config.unfreeze_blocks is not None and config.lora is not None:
        raise UsageError("--unfreeze-blocks trains weights, --lora adapters instead; choose one.")
    if config.image_learning_rate is not None and not trains_image:
        raise UsageError("--image-learning-rate goes with --unfreeze-blocks or --lora.")
    if config.soft_weight != type(config).soft_weight and not config.soft_labels:
        raise UsageError("--soft-weight goes with --soft-labels FILE.")
    if config.guided is not None and trains_image:
        raise UsageError("--guided needs a frozen tower; leave out --unfreeze-blocks and --lora.")
    needs_adapter = config.guided_cosine or config.guided_distance == "l2"
    if config.guided is not None and needs_adapter and not config.guided_adapter:
        raise UsageError(
            "--guided-cosine and --guided-distance go with --guided-adapter: the tower is frozen."
        )
    if config.lora is not None:
        require_peft()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float().mean()


def _require_trainable(config: FinetuneConfig, split: Split) -> None:
    """Raises an error if a batch may have a single example, or all rows have the same label."""
    smallest = len(split) // math.ceil(len(split) / config.batch_size)
    if smallest // min(config.accumulation, smallest) < 2:
        raise UsageError(
            f"{split.path}: {len(split)} rows with --batch-size {config.batch_size} and "
            f"--accumulation {config.accumulation} leave parts of one example; the head's batch "
            "normalisation needs two. Raise --batch-size or lower --accumulation."
        )
    labels = np.unique(split.labels)
    if len(labels) == 1:
        raise DataError(
            f"{split.path}: every row is {LABELS[labels[0]]!r}; expected rows of at least two "
            "labels."
        )


def _prepare(
    model: ClipVE,
    split: Split,
    photos: Photos,
    guided: GuidedPictures | None,
    with_autocast: Autocast,
    progress: Progress,
) -> _Pairs:
    options: dict[str, Any] = {"autocast": with_autocast, "progress": progress}
    pictures = None
    if guided is not None:
        # The rows with the guided pictures as their photos, so that both share a cache.
        guided_split = replace(split, name="guided", image_index=guided.index)
        pictures = image_features(model.image, guided_split, guided.photos, **options)
        pictures.index[guided.index < 0] = -1
    return _Pairs(
        tokenize_sentences(model.text, split.hypotheses, split.where, progress),
        image_features(model.image, split, photos, **options),
        torch.from_numpy(split.labels.astype(np.int64)),
        pictures,
    )


def _card(config: FinetuneConfig, num_train: int, result: TrainingResult, leak_note: str) -> str:
    dev = result.dev
    model = public_name(config.clip)
    image, text = "frozen", "text tower"
    if config.unfreeze_blocks is not None:
        image = f"its last {config.unfreeze_blocks} blocks trained"
    if config.lora is not None:
        image = f"adapters of rank {config.lora} trained and merged"
        text = "the same in the text tower"
    guided = leak_note and f"Guided pictures supervised the photos. {leak_note}\n"
    return f"""---
library_name: clseave
tags: [visual-entailment, clip]
language: [{config.source_lang}]
base_model: {model}
---

# CLIP-VE

Says whether an image entails, contradicts or leaves open a sentence in `{config.source_lang}`
({", ".join(LABELS)}). Image tower of `{model}`, {image}; {text}, projection and
{config.head} head trained on {num_train} pairs, {result.epochs} epochs, the weights of epoch
{result.best_epoch} kept: dev loss {dev["loss"]:.4f}, dev accuracy {dev["accuracy"]:.2%}.
{guided}
    clseave predict image.jpg "a sentence" --lang {config.source_lang} --runs runs

`training/` records every option, version and metric.
"""
