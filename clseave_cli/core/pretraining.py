"""`pretrain`: contrastive training of a CLIP-family model from image-caption pairs.

Each image of a batch is encoded once and compared with several of its captions, each in every
language. A caption of two images of a batch is a match of both, not a negative (equal captions are
common in small data sets).

Legend: B images · K captions per image · L languages · D embedding width.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.config import PretrainConfig
from clseave_cli.core.data.captions import Captions, read_captions
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import ENGLISH, distinct
from clseave_cli.core.data.seen import SeenRows, seen_before
from clseave_cli.core.features import Photos, Sentences, embed_rows
from clseave_cli.core.files import file_digest, json_digest
from clseave_cli.core.guided import GuidedPictures, divergence, gap
from clseave_cli.core.models.backbones import load_clip, new_dual_encoder
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.models.ranking import rank_pairs
from clseave_cli.core.models.scratch import ClipShape, new_clip
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.models.vocabulary import reduced_vocabulary
from clseave_cli.core.models.weights import quiet
from clseave_cli.core.training.device import on_device
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.run import Run, StageResult, public_name, set_up
from clseave_cli.core.training.sampling import RECALL, self_paced_shares, whole_parts
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress

#: CLIP's bound on the learned temperature: logits are scaled by at most 100.
_MAX_LOGIT_SCALE = float(np.log(100.0))
#: Decoded images cached between epochs.
_PIXEL_CACHE_BYTES = 1 << 30
_DEV_IMAGES = 1024
_RECALL_RANK = 10  # as in `RECALL`


class _Batch(NamedTuple):
    """B images and their captions, prepared."""

    pixels: Tensor  # this process's shard of the images, from `ImageEncoder.preprocess`
    num_images: int  # B
    captions: PackedBatch  # this process's shard of the batch's C distinct captions
    num_captions: int  # C
    caption_of_slot: Tensor  # (K, L, B) int64 into the C
    caption_ids: Tensor  # (K, L, B) int64; equal ids mark equal captions
    #: Like `pixels`, of guided pictures, and (B,) float32 1; an image without one repeats, with 0.
    guided: tuple[Tensor, Tensor] | None


def pretrain(config: PretrainConfig, progress: Progress = SILENT) -> StageResult:
    """Trains a CLIP model, from scratch or from an existing one.

    Raises:
        ClseaveError: bad data, an unusable model, a full disk, or an interruption.
    """
    languages = tuple(dict.fromkeys(config.lang)) or (ENGLISH,)
    _require_compatible(config, languages)
    out = config.out or config.runs / "clip"
    setup = set_up("pretrain", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, (), None)
    device, folder = setup.device, setup.data
    images = ImageFolder.of(folder, config.images)
    split_names = config.train_split, config.dev_split
    splits = [read_captions(folder, name, languages) for name in split_names]
    photos = [Photos.named(split.images, split.where, images) for split in splits]
    if not config.allow_leak:
        _check_leak(splits, photos)
    guided = GuidedPictures.of(config, [path.name for path in photos[0].paths], progress)
    torch.manual_seed(config.seed)
    model, text, image = _starting_model(config, splits[0])
    model = model.to(device)
    text.verify_packing("the text tower", progress)
    torch.manual_seed(config.seed)
    inputs = {"clip": json_digest([text.digest(), image.digest()])}
    for name, split, pictures in zip(split_names, splits, photos, strict=True):
        inputs |= {path.name: file_digest(path) for path in split.paths.values()}
        inputs[f"photos: {name}"] = pictures.digest()
    if guided is not None:
        inputs["guided pictures"] = guided.photos.digest()
    with Run("pretrain", out, config, inputs) as run:
        is_parallel, objective = config.sampling == "parallel", contrastive_loss
        if config.objective == "triplet":
            hardest = config.negatives == "hardest"
            objective = partial(triplet_loss, margin=config.margin, hardest=hardest)
            model.logit_scale.requires_grad_(False)  # it has no gradient
        training, dev = (
            _Examples(config, split, pictures.paths, text, image, supervision)
            for split, pictures, supervision in zip(splits, photos, (guided, None), strict=True)
        )

        def embed(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
            """(B, D) images, (K, L, B, D) unit captions, and the logit scale."""
            images = processes().gather(lambda: image(batch.pixels), batch.num_images)
            captions = processes().gather(lambda: text(batch.captions), batch.num_captions)
            text_embeddings = functional.normalize(captions.float(), dim=1)
            scale = model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
            return images.float(), text_embeddings[batch.caption_of_slot], scale

        def loss(batch: _Batch) -> Tensor:
            images, captions, scale = embed(batch)
            embeddings = functional.normalize(images, dim=1)
            mean = _mean_loss(objective, batch, embeddings, captions, scale)
            if batch.guided is None:
                return mean
            pixels, has_guided = batch.guided
            if config.guided_control == "noise":
                pictures = torch.randn_like(images)
            else:
                pictures = processes().gather(lambda: image(pixels), batch.num_images).float()
            # How guided pictures and photos match the batch's captions (eq. 3, 5).
            guided_logits, logits = (
                scale * each @ captions.flatten(0, -2).T
                for each in (functional.normalize(pictures, dim=1), embeddings)
            )
            terms = config.guided_kl * divergence(guided_logits, logits)
            if config.guided_cosine:
                terms = terms + config.guided_cosine * gap(pictures, images, config.guided_distance)
            return mean + (terms * has_guided).mean()

        def evaluate() -> dict[str, float]:
            rows = np.arange(min(_DEV_IMAGES, len(dev)))
            losses, photo_embeddings = [], []
            for part in np.array_split(rows, max(1, len(rows) // config.batch_size)):
                batch = on_device(dev.batch(part), device)
                images, captions, scale = embed(batch)
                embeddings = functional.normalize(images, dim=1)
                photo_embeddings.append(embeddings.cpu())
                # One language at a time: the joint loss grows with the number of languages.
                means = (
                    _mean_loss(objective, batch, embeddings, captions, scale, slice(n, n + 1))
                    for n in range(len(languages))
                )
                losses.append([mean.item() for mean in means])
            by_language = {
                "loss": [float(np.mean(of_language)) for of_language in zip(*losses, strict=True)],
                RECALL: dev.recalls(rows, torch.cat(photo_embeddings)),
            }
            metrics = {name: float(np.mean(values)) for name, values in by_language.items()}
            for name, values in by_language.items() if len(languages) > 1 else ():
                metrics |= {f"{name}/{k}": v for k, v in zip(languages, values, strict=True)}
            return metrics

        projections = nn.ModuleList([model.text_projection, model.visual_projection])
        stage = Stage(
            name="pretrain",
            module=model,
            num_examples=len(training) * (1 if is_parallel else len(languages)),
            prepare=training.batch if is_parallel else training.monolingual_batch,
            loss=loss,
            evaluate=evaluate,
            selection=Selection("loss", "lowest"),
            sample=None if is_parallel else training.batches,
            trained_first=(*projections.parameters(), model.logit_scale),
            freeze_epochs=config.freeze_epochs or 0.0,
        )
        # Only a pretrained vocabulary has vectors worth keeping for tokens without a caption.
        is_pretrained = config.clip is not None or config.text is not None
        vocabulary = reduced_vocabulary(text, training.tokens, dev.tokens)
        with vocabulary if is_pretrained else nullcontext():
            result = train(stage, config, device=device, folder=run.folder, progress=progress)

        @quiet()
        def save(aside: Path) -> None:
            model.save_pretrained(aside)
            text.tokenizer.save_pretrained(aside)
            image.processor.save_pretrained(aside)

        seen = [
            SeenRows.of_photos(split.images, pictures.keys)
            for split, pictures in zip(splits, photos, strict=True)
        ]
        seen += seen_before(config.clip)
        run.publish(save, _card(config, languages, len(training), result), seen)
        return StageResult(out, (), result)


def _mean_loss(
    objective: Callable[..., Tensor],
    batch: _Batch,
    images: Tensor,
    captions: Tensor,
    scale: Tensor,
    languages: slice = slice(None),
) -> Tensor:
    """The loss in some languages, averaged over the K captions of an image."""
    losses = [
        objective(images, embeddings[languages], ids[languages], scale)
        for embeddings, ids in zip(captions, batch.caption_ids, strict=True)
    ]
    return torch.stack(losses).mean()


def contrastive_loss(
    images: Tensor, captions: Tensor, caption_ids: Tensor, scale: Tensor
) -> Tensor:
    """CLIP's symmetric contrastive loss in several languages at once (docs/training.md).

    An image's captions in all languages are its matches, as are those equal to one of them.

    Args:
        images: (B, D) unit vectors.
        captions: (L, B, D) unit vectors; caption i of each language belongs to image i.
        caption_ids: (L, B) equal ids mark equal captions.
        scale: the inverse temperature, a positive scalar.

    Returns:
        A scalar: the mean of the image-to-caption cross-entropy over the captions of all languages
        and the caption-to-image cross-entropy averaged over languages.
    """
    logits = scale * images @ captions.flatten(0, 1).T  # (B, L · B)
    ids = caption_ids.flatten()
    matches = (caption_ids[:, :, None] == ids).any(dim=0)  # (B, L · B)
    image_loss = functional.cross_entropy(logits, _shares(matches))
    caption_losses = [
        functional.cross_entropy(logits_of_language.T, _shares(matches_of_language.T))
        for logits_of_language, matches_of_language in zip(
            logits.chunk(len(captions), dim=1), matches.chunk(len(captions), dim=1), strict=True
        )
    ]
    return 0.5 * (image_loss + torch.stack(caption_losses).mean())


def triplet_loss(
    images: Tensor,
    captions: Tensor,
    caption_ids: Tensor,
    scale: Tensor,
    *,
    margin: float,
    hardest: bool,
) -> Tensor:
    """Triplet ranking loss in several languages, the sum of both directions (docs/training.md).

    Takes the arguments of `contrastive_loss`, but ignores the scale. The margin is in cosine.
    Counts the `hardest` negative only (VSE++, Faghri et al. 2018, equation 6), or the sum over all
    (VSE, Kiros et al. 2014, equation 8); equal captions are not negatives. Returns a scalar.
    """
    losses = []
    for embeddings, ids in zip(captions, caption_ids, strict=True):
        cosine = images @ embeddings.T  # (B, B)
        lead = margin - cosine.diagonal()[:, None]
        equal = ids[:, None] == ids
        for rows in (cosine, cosine.T):
            costs = (lead + rows).clamp(min=0).masked_fill(equal, 0.0)
            losses.append((costs.amax(dim=1) if hardest else costs.sum(dim=1)).mean())
    return torch.stack(losses).sum() / len(captions)


def _shares(matches: Tensor) -> Tensor:
    """Equal probabilities for each row's matches."""
    weights = matches.float().contiguous()
    return weights / weights.sum(dim=1, keepdim=True)


class _Examples:
    """Prepares batches: packed captions, and pixels, decoded once while the cache has room."""

    def __init__(
        self,
        config: PretrainConfig,
        captions: Captions,
        photos: list[Path],
        text: SentenceEncoder,
        image: ImageEncoder,
        guided: GuidedPictures | None = None,
    ) -> None:
        self._config, self._photos, self._text, self._image = config, photos, text, image
        self._guided = guided
        self._languages = list(captions.texts)
        sentences, index = distinct(list(captions.all_texts()))
        self.tokens: TokenTable = text.tokenize(sentences)
        first, *_ = captions.texts.values()
        ends = np.cumsum([len(image_captions) for image_captions in first])
        # (L, captions) of each image; they are parallel.
        self._caption_ids = np.split(index.reshape(len(captions.texts), -1), ends[:-1], axis=1)
        self._cache: dict[Path, Tensor] = {}
        self._cache_bytes = 0
        self._decoders = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self._photos)

    def batches(self, epoch: int, dev: dict[str, float]) -> list[Rows]:
        """The batches of an epoch, each in one language: image i of N in language l is l · N + i.

        `dev` holds the previous epoch's dev metrics; empty before the first.
        """
        config, count = self._config, len(self._languages)
        random = np.random.default_rng([config.seed, epoch])
        shares = np.full(count, 1 / count)
        if config.sampling == "self-paced":
            shares = self_paced_shares(self._languages, dev)
        batches: list[Rows] = []
        num_pairs = len(self) * count
        num_batches = math.ceil(num_pairs / config.batch_size)
        for language, number in enumerate(whole_parts(shares, num_batches).tolist()):
            needed = number * num_pairs // num_batches
            rounds = [random.permutation(len(self)) for _ in range(math.ceil(needed / len(self)))]
            if rounds:
                images = np.concatenate(rounds)[:needed]
                batches += np.array_split(language * len(self) + images, number)
        return [batches[number] for number in random.permutation(num_batches)]

    def monolingual_batch(self, rows: Rows) -> _Batch:
        """Prepares a batch of `batches`."""
        language, images = int(rows[0]) // len(self), rows % len(self)
        return self.batch(images, slice(language, language + 1))

    def batch(self, rows: Rows, languages: slice = slice(None)) -> _Batch:
        """Prepares some images with captions in all languages or some."""
        # The captions depend on the batch's rows alone, so that a resumed run draws the same.
        random = np.random.default_rng([self._config.seed, *rows.tolist()])
        count = self._config.captions_per_image
        slots = np.stack(
            [
                random.choice(ids, count, replace=ids.shape[1] < count, axis=1).T
                for ids in (self._caption_ids[row][languages] for row in rows)
            ],
            axis=2,
        )  # (K, L, B)
        needed, caption_of_slot = np.unique(slots, return_inverse=True)
        shard = processes().shard
        paths, guided = [self._photos[row] for row in shard(rows)], None
        if self._guided is not None:
            pictures, index = self._guided.photos.paths, self._guided.index
            pairs = zip(index[shard(rows)].tolist(), paths, strict=True)
            pixels = self._pixels([pictures[i] if i >= 0 else photo for i, photo in pairs])
            guided = pixels, torch.from_numpy(index[rows] >= 0).float()
        return _Batch(
            self._pixels(paths),
            len(rows),
            self._text.pack(self.tokens, shard(needed)),
            len(needed),
            torch.from_numpy(caption_of_slot.reshape(slots.shape)),
            torch.from_numpy(slots),
            guided,
        )

    def recalls(self, rows: Rows, images: Tensor) -> list[float]:
        """For each language, the share of captions whose image is among the ten nearest.

        `rows` are I images, `images` their (I, D) embeddings.
        """
        ids = np.concatenate([self._caption_ids[row] for row in rows], axis=1)  # (L, captions)
        image = np.repeat(np.arange(len(rows)), [self._caption_ids[row].shape[1] for row in rows])
        texts = embed_rows(self._text, Sentences(self.tokens, np.arange(len(self.tokens)))).cpu()
        recalls = []
        for ids_of_language in ids:
            needed, text = np.unique(ids_of_language, return_inverse=True)
            ranks = rank_pairs(texts[needed], images, text, image)
            recalls.append(float(ranks.within(_RECALL_RANK)[text].mean()))
        return recalls

    def _pixels(self, paths: list[Path]) -> Tensor:
        new = [path for path in paths if path not in self._cache]
        decoded: dict[Path, Tensor] = {}
        if new:
            images = list(self._decoders.map(open_image, new))
            decoded = dict(zip(new, self._image.preprocess(images).unbind(), strict=True))
        pixels = torch.stack([decoded[p] if p in decoded else self._cache[p] for p in paths])
        for path, image in decoded.items():
            if self._cache_bytes + image.nbytes <= _PIXEL_CACHE_BYTES:
                self._cache[path] = image.clone()
                self._cache_bytes += image.nbytes
        return pixels


def _check_leak(splits: Sequence[Captions], photos: Sequence[Photos]) -> None:
    shared = set(photos[0].paths).intersection(photos[1].paths)
    if shared:
        train_path, dev_path = (next(iter(split.paths.values())) for split in splits)
        raise DataError(
            f"{dev_path}: {len(shared)} of its images are also in {train_path}, such as "
            f"{min(shared).name}; --allow-leak permits it."
        )


def _require_compatible(config: PretrainConfig, languages: Sequence[str]) -> None:
    """Raises a UsageError for options that contradict each other, or would do nothing."""
    if (config.text is None) != (config.vision is None):
        raise UsageError("--text and --vision go together: a model needs both encoders.")
    if config.clip is not None and config.text is not None:
        raise UsageError("--clip is a whole model; leave it out, or --text and --vision.")
    if config.freeze_epochs and config.clip is None and config.text is None:
        raise UsageError(
            "--freeze-epochs freezes pretrained encoders at first; use it with --text and "
            "--vision, or --clip."
        )
    changed = config.margin != PretrainConfig.margin or config.negatives != PretrainConfig.negatives
    if changed and config.objective != "triplet":
        raise UsageError("--margin and --negatives go with --objective triplet.")
    if config.sampling != "parallel" and len(languages) < 2:
        raise UsageError(f"--sampling {config.sampling} needs several --lang.")


def _starting_model(
    config: PretrainConfig, captions: Captions
) -> tuple[Any, SentenceEncoder, ImageEncoder]:
    if config.clip is not None:
        return load_clip(config.clip)
    if config.text is not None and config.vision is not None:
        return new_dual_encoder(config.text, config.vision, config.embedding_dim)
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
        new_clip(Path(folder), captions.all_texts(), shape, config.seed)
        return load_clip(Path(folder))


def _card(
    config: PretrainConfig, languages: Sequence[str], num_images: int, result: TrainingResult
) -> str:
    training = f"{config.objective.capitalize()} training"
    starts = config.clip, config.text, config.vision
    start = " and ".join(f"`{public_name(start)}`" for start in starts if start) or "random weights"
    return f"""---
library_name: transformers
tags: [clip]
language: [{", ".join(languages)}]
---

# CLIP model

{training} from {start} on {num_images} images with captions, {result.epochs} epochs,
the weights of epoch {result.best_epoch} kept (dev loss {result.dev["loss"]:.4f}). Load it with
`transformers.AutoModel`, or pass it to `clseave finetune-ve --clip`.
"""
