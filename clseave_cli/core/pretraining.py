"""`pretrain`: contrastive training of a CLIP-family model from image-caption pairs.

Each image of a batch is encoded once and meets several of its captions; a caption that stands for
two images of a batch is a match of both, not a negative (equal captions are common in small
worlds).

Legend: B images · K captions per image · D embedding width.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.config import PretrainConfig
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import distinct
from clseave_cli.core.data.rows import BadRow, read_rows, require_text
from clseave_cli.core.features import Photos
from clseave_cli.core.files import file_digest, json_digest
from clseave_cli.core.guided import GuidedPictures, divergence, gap
from clseave_cli.core.models.backbones import load_clip
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.scratch import ClipShape, new_clip
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.models.weights import quiet
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.placement import on_device
from clseave_cli.core.training.run import Run, StageResult, public_name, set_up
from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT, Progress

#: CLIP's bound on the learned temperature: logits are scaled by at most 100.
_LARGEST_LOGIT_SCALE = float(np.log(100.0))
#: Decoded images kept in memory between epochs.
_PIXEL_MEMORY_BYTES = 1 << 30
_DEV_IMAGES = 1024


@dataclass(frozen=True)
class _Captions:
    """Images with their captions, in the order of first mention; `photos` is their digest."""

    path: Path
    photos: str
    images: list[Path]
    captions: list[list[str]]

    def take(self, rows: Sequence[int]) -> _Captions:
        return replace(
            self,
            images=[self.images[i] for i in rows],
            captions=[self.captions[i] for i in rows],
        )


class _Batch(NamedTuple):
    """B images and the captions they meet, made ready.

    Attributes:
        pixels: this process's shard of the images, as `ImageEncoder.preprocess` gives them.
        num_images: B.
        captions: this process's shard of the batch's C distinct captions, packed.
        num_captions: C.
        caption_of_slot: (K, B) int64 into the C.
        caption_ids: (K, B) int64; equal ids mark equal captions.
        guided: as `pixels`, of guided pictures, and (B,) float32 1; without one the image's, and 0.
    """

    pixels: Tensor
    num_images: int
    captions: PackedBatch
    num_captions: int
    caption_of_slot: Tensor
    caption_ids: Tensor
    guided: tuple[Tensor, Tensor] | None


def pretrain(config: PretrainConfig, progress: Progress = SILENT) -> StageResult:
    """Trains a CLIP model, from scratch or from a given one.

    Raises:
        ClseaveError: bad data, an unusable model, a full disk, or an interruption.
    """
    out = config.out or config.runs / "clip"
    setup = set_up("pretrain", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, (), None)
    device = setup.device
    images = ImageFolder.of(config.data, config.images)
    train_captions = _read_captions(config.data, config.train_split, images)
    dev_captions = _read_captions(config.data, config.dev_split, images)
    if not config.allow_leak:
        _check_leak(train_captions, dev_captions)
    names = [path.name for path in train_captions.images]
    guided = GuidedPictures.of(config, names, progress)
    model, text, image = _starting_model(config, train_captions)
    model = model.to(device)
    text.verify_packing("the text tower", progress)
    torch.manual_seed(config.seed)
    inputs = {"clip": json_digest([text.digest(), image.digest()])}
    for split, read in ((config.train_split, train_captions), (config.dev_split, dev_captions)):
        inputs |= {read.path.name: file_digest(read.path), f"photos: {split}": read.photos}
    if guided is not None:
        inputs["guided pictures"] = guided.photos.digest()
    with Run("pretrain", out, config, inputs) as run:
        training = _Examples(config, train_captions, text, image, guided)
        dev = _Examples(
            config,
            dev_captions.take(range(min(_DEV_IMAGES, len(dev_captions.images)))),
            text,
            image,
        )

        def loss(batch: _Batch) -> Tensor:
            images = processes().gather(lambda: image(batch.pixels), batch.num_images)
            captions = processes().gather(lambda: text(batch.captions), batch.num_captions)
            image_embeddings = functional.normalize(images.float(), dim=1)
            text_embeddings = functional.normalize(captions.float(), dim=1)
            per_slot = text_embeddings[batch.caption_of_slot]  # (K, B, D)
            scale = model.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
            losses = [
                contrastive_loss(image_embeddings, embeddings, batch.caption_ids[slot], scale)
                for slot, embeddings in enumerate(per_slot)
            ]
            mean = torch.stack(losses).mean()
            if batch.guided is None:
                return mean
            (pixels, is_there), drawn = batch.guided, torch.randn_like(images)
            if config.guided_control != "noise":
                drawn = processes().gather(lambda: image(pixels), batch.num_images)
            # Which of the batch's captions does the picture mean, and which the photo? (eq. 3, 5)
            answers = [
                scale * embeddings @ per_slot.flatten(0, -2).T
                for embeddings in (functional.normalize(drawn, dim=1), image_embeddings)
            ]
            terms = config.guided_kl * divergence(*answers)
            if config.guided_cosine:
                distances = gap(drawn, images.float(), config.guided_distance)
                terms = terms + config.guided_cosine * distances
            return mean + (terms * is_there).mean()

        def evaluate() -> dict[str, float]:
            rows = np.arange(len(dev.captions.images))
            parts = np.array_split(rows, max(1, len(rows) // config.batch_size))
            losses = [loss(on_device(dev.batch(part), device)).item() for part in parts]
            return {"loss": float(np.mean(losses))}

        stage = Stage(
            name="pretrain",
            module=model,
            num_examples=len(train_captions.images),
            prepare=training.batch,
            loss=loss,
            evaluate=evaluate,
            selection=Selection("loss", "lowest"),
        )
        result = train(stage, config, device=device, folder=run.folder, progress=progress)

        @quiet()
        def save(aside: Path) -> None:
            model.save_pretrained(aside)
            text.tokenizer.save_pretrained(aside)
            image.processor.save_pretrained(aside)

        run.publish(save, _card(config, len(train_captions.images), result))
        return StageResult(out, (), result)


def contrastive_loss(
    images: Tensor, captions: Tensor, caption_ids: Tensor, scale: Tensor
) -> Tensor:
    """CLIP's symmetric contrastive loss, with equal captions counted as matches.

    Args:
        images: (B, D) unit vectors.
        captions: (B, D) unit vectors; caption i belongs to image i.
        caption_ids: (B,) equal ids mark equal captions.
        scale: the temperature's inverse, a positive scalar.

    Returns:
        The mean of the image-to-caption and the caption-to-image cross-entropy, a scalar.
    """
    logits = scale * images @ captions.T  # (B, B)
    matches = (caption_ids[:, None] == caption_ids[None, :]).float()
    targets = matches / matches.sum(dim=1, keepdim=True)
    return 0.5 * (
        functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)
    )


class _Examples:
    """Prepares batches: pixels, decoded once and kept while memory allows, and packed captions."""

    def __init__(
        self,
        config: PretrainConfig,
        captions: _Captions,
        text: SentenceEncoder,
        image: ImageEncoder,
        guided: GuidedPictures | None = None,
    ) -> None:
        self.captions = captions
        self._config, self._text, self._image, self._guided = config, text, image, guided
        flat = [caption for of_image in captions.captions for caption in of_image]
        sentences, index = distinct(flat)
        self._tokens: TokenTable = text.tokenize(sentences)
        ends = np.cumsum([len(of_image) for of_image in captions.captions])
        self._caption_ids = np.split(index, ends[:-1])
        self._kept: dict[Path, Tensor] = {}
        self._kept_bytes = 0
        self._decoders = ThreadPoolExecutor()

    def batch(self, rows: Rows) -> _Batch:
        # Which captions an image meets depends on the batch's rows alone, so that a resumed run
        # draws the same.
        random = np.random.default_rng([self._config.seed, *rows.tolist()])
        count = self._config.captions_per_image
        slots = np.stack(
            [
                random.choice(ids, count, replace=len(ids) < count)
                for ids in (self._caption_ids[row] for row in rows)
            ],
            axis=1,
        )  # (K, B)
        needed, caption_of_slot = np.unique(slots, return_inverse=True)
        share = processes().shard
        paths, guided = [self.captions.images[row] for row in share(rows)], None
        if self._guided is not None:
            drawn, index = self._guided.photos.paths, self._guided.index
            own = zip(index[share(rows)].tolist(), paths, strict=True)
            pixels = self._pixels([drawn[item] if item >= 0 else photo for item, photo in own])
            guided = pixels, torch.from_numpy(index[rows] >= 0).float()
        return _Batch(
            self._pixels(paths),
            len(rows),
            self._text.pack(self._tokens, share(needed)),
            len(needed),
            torch.from_numpy(caption_of_slot.reshape(slots.shape)),
            torch.from_numpy(slots),
            guided,
        )

    def _pixels(self, paths: list[Path]) -> Tensor:
        new = [path for path in paths if path not in self._kept]
        fresh: dict[Path, Tensor] = {}
        if new:
            images = list(self._decoders.map(open_image, new))
            fresh = dict(zip(new, self._image.preprocess(images).unbind(), strict=True))
        pixels = torch.stack([fresh[p] if p in fresh else self._kept[p] for p in paths])
        for path, image in fresh.items():
            if self._kept_bytes + image.nbytes <= _PIXEL_MEMORY_BYTES:
                self._kept[path] = image.clone()
                self._kept_bytes += image.nbytes
        return pixels


def _read_captions(folder: Path, split: str, images: ImageFolder) -> _Captions:
    path = folder / f"captions_{split}.jsonl"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected lines such as "
            '{"image": "1.jpg", "caption": "two dogs run"}.'
        )
    captions: dict[str, list[str]] = defaultdict(list)
    first_line: dict[str, int] = {}
    for line, row, _ in read_rows(path, ("image", "caption")):
        try:
            name = require_text(row, ("image",), "the image's name")
            captions[name].append(require_text(row, ("caption",), "a sentence about it"))
        except BadRow as bad:
            raise DataError.at(path, line, str(bad)) from None
        first_line.setdefault(name, line)
    if not captions:
        raise DataError(f"{path}: no captions in it.")
    where = [f"{path}:{first_line[name]}" for name in captions]
    photos = Photos.named(list(captions), where, images)
    return _Captions(path, photos.digest(), photos.paths, list(captions.values()))


def _check_leak(training: _Captions, dev: _Captions) -> None:
    shared = set(training.images).intersection(dev.images)
    if shared:
        raise DataError(
            f"{dev.path}: {len(shared)} of its images are also in {training.path}, such as "
            f"{min(shared).name}; --allow-leak permits it."
        )


def _starting_model(
    config: PretrainConfig, captions: _Captions
) -> tuple[Any, SentenceEncoder, ImageEncoder]:
    if config.clip is not None:
        return load_clip(config.clip)
    shape = ClipShape(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        vocab_size=config.vocabulary,
        embedding_dim=config.embedding_dim,
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = [caption for of_image in captions.captions for caption in of_image]
        new_clip(Path(folder), texts, shape, config.seed)
        return load_clip(Path(folder))


def _card(config: PretrainConfig, num_images: int, result: TrainingResult) -> str:
    start = f"`{public_name(config.clip)}`" if config.clip else "random weights"
    return f"""---
library_name: transformers
tags: [clip]
---

# CLIP model

Contrastive training from {start} on {num_images} images with captions, {result.epochs} epochs,
the weights of epoch {result.best_epoch} kept (dev loss {result.dev["loss"]:.4f}). Load it with
`transformers.AutoModel`, or give it to `clseave finetune-ve --clip`.
"""
