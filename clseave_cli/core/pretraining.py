"""`pretrain`: contrastive training of a CLIP-family model from image-caption pairs.

Each image of a batch is encoded once and meets several of its captions, each in every language; a
caption that stands for two images of a batch is a match of both, not a negative (equal captions are
common in small worlds).

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
from torch import Tensor
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
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows, Selection, Stage, TrainingResult, train
from clseave_cli.core.training.placement import on_device
from clseave_cli.core.training.run import Run, StageResult, public_name, set_up
from clseave_cli.core.training.sampling import RECALL, self_paced_shares, whole_parts
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress

#: CLIP's bound on the learned temperature: logits are scaled by at most 100.
_LARGEST_LOGIT_SCALE = float(np.log(100.0))
#: Decoded images kept in memory between epochs.
_PIXEL_MEMORY_BYTES = 1 << 30
_DEV_IMAGES = 1024
#: Images that the dev recall looks among, as in `RECALL`.
_ANSWERS = 10


class _Batch(NamedTuple):
    """B images and the captions they meet, made ready.

    Attributes:
        pixels: this process's shard of the images, as `ImageEncoder.preprocess` gives them.
        num_images: B.
        captions: this process's shard of the batch's C distinct captions, packed.
        num_captions: C.
        caption_of_slot: (K, L, B) int64 into the C.
        caption_ids: (K, L, B) int64; equal ids mark equal captions.
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
    languages = tuple(dict.fromkeys(config.lang)) or (ENGLISH,)
    _require_sense(config, languages)
    out = config.out or config.runs / "clip"
    setup = set_up("pretrain", config, config.data, out, progress)
    if setup is None:
        return StageResult(out, (), None)
    device, folder = setup.device, setup.data
    images = ImageFolder.of(folder, config.images)
    splits = [
        read_captions(folder, split, languages) for split in (config.train_split, config.dev_split)
    ]
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
    for name, split, pictures in zip(
        (config.train_split, config.dev_split), splits, photos, strict=True
    ):
        inputs |= {path.name: file_digest(path) for path in split.paths.values()}
        inputs[f"photos: {name}"] = pictures.digest()
    if guided is not None:
        inputs["guided pictures"] = guided.photos.digest()
    with Run("pretrain", out, config, inputs) as run:
        together, objective = config.sampling == "parallel", contrastive_loss
        if config.objective == "triplet":
            hardest = config.negatives == "hardest"
            objective = partial(triplet_loss, margin=config.margin, hardest=hardest)
            model.logit_scale.requires_grad_(False)  # it has no gradient
        training, dev = (
            _Examples(config, split, pictures.paths, text, image, drawn)
            for split, pictures, drawn in zip(splits, photos, (guided, None), strict=True)
        )

        def embed(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
            """(B, D) images, (K, L, B, D) captions of unit length, and the scale."""
            images = processes().gather(lambda: image(batch.pixels), batch.num_images)
            captions = processes().gather(lambda: text(batch.captions), batch.num_captions)
            text_embeddings = functional.normalize(captions.float(), dim=1)
            scale = model.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
            return images.float(), text_embeddings[batch.caption_of_slot], scale

        def loss(batch: _Batch) -> Tensor:
            images, captions, scale = embed(batch)
            embeddings = functional.normalize(images, dim=1)
            mean = _mean_loss(objective, batch, embeddings, captions, scale)
            if batch.guided is None:
                return mean
            pixels, is_there = batch.guided
            if config.guided_control == "noise":
                drawn = torch.randn_like(images)
            else:
                drawn = processes().gather(lambda: image(pixels), batch.num_images).float()
            # Which of the batch's captions does the picture mean, and which the photo? (eq. 3, 5)
            answers = [
                scale * each @ captions.flatten(0, -2).T
                for each in (functional.normalize(drawn, dim=1), embeddings)
            ]
            terms = config.guided_kl * divergence(*answers)
            if config.guided_cosine:
                terms = terms + config.guided_cosine * gap(drawn, images, config.guided_distance)
            return mean + (terms * is_there).mean()

        def evaluate() -> dict[str, float]:
            rows = np.arange(min(_DEV_IMAGES, len(dev)))
            losses: list[list[float]] = [[] for _ in languages]
            pictures = []
            for part in np.array_split(rows, max(1, len(rows) // config.batch_size)):
                batch = on_device(dev.batch(part), device)
                images, captions, scale = embed(batch)
                embedded = functional.normalize(images, dim=1), captions, scale
                pictures.append(embedded[0].cpu())
                # One language at a time: the loss of several together grows with their number.
                for number, of_language in enumerate(losses):
                    one = slice(number, number + 1)
                    of_language.append(_mean_loss(objective, batch, *embedded, one).item())
            measured = {
                "loss": [float(np.mean(of_language)) for of_language in losses],
                RECALL: dev.recalls(rows, torch.cat(pictures)),
            }
            metrics = {name: float(np.mean(values)) for name, values in measured.items()}
            for name, values in measured.items() if len(languages) > 1 else ():
                metrics |= {f"{name}/{k}": v for k, v in zip(languages, values, strict=True)}
            return metrics

        stage = Stage(
            name="pretrain",
            module=model,
            num_examples=len(training) * (1 if together else len(languages)),
            prepare=training.batch if together else training.of_one_language,
            loss=loss,
            evaluate=evaluate,
            selection=Selection("loss", "lowest"),
            sample=None if together else training.batches,
            trained_first=(
                *model.text_projection.parameters(),
                *model.visual_projection.parameters(),
                model.logit_scale,
            ),
            freeze_epochs=config.freeze_epochs or 0.0,
        )
        # A pretrained vocabulary keeps the vectors of tokens that these captions do not use.
        keeps = config.clip is not None or config.text is not None
        with reduced_vocabulary(text, training.tokens, dev.tokens) if keeps else nullcontext():
            result = train(stage, config, device=device, folder=run.folder, progress=progress)

        @quiet()
        def save(aside: Path) -> None:
            model.save_pretrained(aside)
            text.tokenizer.save_pretrained(aside)
            image.processor.save_pretrained(aside)

        pairs = zip(splits, photos, strict=True)
        seen = [SeenRows.of_photos(split.images, pictures.keys) for split, pictures in pairs]
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
    """The loss in some languages, mean over the K captions that an image meets."""
    losses = [
        objective(images, embeddings[languages], ids[languages], scale)
        for embeddings, ids in zip(captions, batch.caption_ids, strict=True)
    ]
    return torch.stack(losses).mean()


def contrastive_loss(
    images: Tensor, captions: Tensor, caption_ids: Tensor, scale: Tensor
) -> Tensor:
    """CLIP's symmetric contrastive loss in several languages at once (docs/training.md).

    An image's captions in all languages are its matches, and so are those equal to one of them.

    Args:
        images: (B, D) unit vectors.
        captions: (L, B, D) unit vectors; caption i of each language belongs to image i.
        caption_ids: (L, B) equal ids mark equal captions.
        scale: the temperature's inverse, a positive scalar.

    Returns:
        The mean of the image-to-caption cross-entropy, over the captions of all languages, and the
        caption-to-image cross-entropy, mean over languages; a scalar.
    """
    logits = scale * images @ captions.flatten(0, 1).T  # (B, L · B)
    ids = caption_ids.flatten()
    matches = torch.stack([of_language[:, None] == ids for of_language in caption_ids]).any(dim=0)
    of_images = functional.cross_entropy(logits, _shares(matches))
    of_captions = [
        functional.cross_entropy(to_captions.T, _shares(are_matches.T))
        for to_captions, are_matches in zip(
            logits.chunk(len(captions), dim=1), matches.chunk(len(captions), dim=1), strict=True
        )
    ]
    return 0.5 * (of_images + torch.stack(of_captions).mean())


def triplet_loss(
    images: Tensor,
    captions: Tensor,
    caption_ids: Tensor,
    scale: Tensor,
    *,
    margin: float,
    hardest: bool,
) -> Tensor:
    """Triplet ranking in several languages, both directions added, a scalar (docs/training.md).

    Takes what `contrastive_loss` takes, without use for the scale. The margin is in cosine. Only
    the `hardest` negative counts (VSE++, Faghri et al. 2018, equation 6), or the sum over all of
    them (VSE, Kiros et al. 2014, equation 8); equal captions are none.
    """
    losses = []
    for of_language, ids in zip(captions, caption_ids, strict=True):
        cosine = images @ of_language.T  # (B, B)
        lead = margin - cosine.diagonal()[:, None]
        equal = ids[:, None] == ids
        for rows in (cosine, cosine.T):
            costs = (lead + rows).clamp(min=0).masked_fill(equal, 0.0)
            losses.append((costs.amax(dim=1) if hardest else costs.sum(dim=1)).mean())
    return torch.stack(losses).sum() / len(captions)


def _shares(matches: Tensor) -> Tensor:
    """Each row's matches as probabilities, all equal."""
    weights = matches.float().contiguous()
    return weights / weights.sum(dim=1, keepdim=True)


class _Examples:
    """Prepares batches: pixels, decoded once and kept while memory allows, and packed captions."""

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
        ends = np.cumsum([len(of_image) for of_image in first])
        # (L, captions of it) for each image: they are parallel.
        self._caption_ids = np.split(index.reshape(len(captions.texts), -1), ends[:-1], axis=1)
        self._kept: dict[Path, Tensor] = {}
        self._kept_bytes = 0
        self._decoders = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self._photos)

    def batches(self, epoch: int, dev: dict[str, float]) -> list[Rows]:
        """The batches of an epoch, each of one language: image i in language l is l · N + i.

        Args:
            epoch: its number, from 0.
            dev: the dev metrics after the epoch before; empty before the first.
        """
        config, count = self._config, len(self._languages)
        random = np.random.default_rng([config.seed, epoch])
        shares = np.full(count, 1 / count)
        if config.sampling == "self-paced":
            shares = self_paced_shares(self._languages, dev)
        drawn: list[Rows] = []
        num_pairs = len(self) * count
        num_batches = math.ceil(num_pairs / config.batch_size)
        for language, number in enumerate(whole_parts(shares, num_batches).tolist()):
            needed = number * num_pairs // num_batches
            rounds = [random.permutation(len(self)) for _ in range(math.ceil(needed / len(self)))]
            if rounds:
                images = np.concatenate(rounds)[:needed]
                drawn += np.array_split(language * len(self) + images, number)
        return [drawn[place] for place in random.permutation(num_batches)]

    def of_one_language(self, rows: Rows) -> _Batch:
        """The examples of a batch of `batches`."""
        language, images = int(rows[0]) // len(self), rows % len(self)
        return self.batch(images, slice(language, language + 1))

    def batch(self, rows: Rows, languages: slice = slice(None)) -> _Batch:
        """The examples of some images, in all languages or in some."""
        # Which captions an image meets depends on the batch's rows alone, so that a resumed run
        # draws the same.
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
        share = processes().shard
        paths, guided = [self._photos[row] for row in share(rows)], None
        if self._guided is not None:
            drawn, index = self._guided.photos.paths, self._guided.index
            own = zip(index[share(rows)].tolist(), paths, strict=True)
            pixels = self._pixels([drawn[item] if item >= 0 else photo for item, photo in own])
            guided = pixels, torch.from_numpy(index[rows] >= 0).float()
        return _Batch(
            self._pixels(paths),
            len(rows),
            self._text.pack(self.tokens, share(needed)),
            len(needed),
            torch.from_numpy(caption_of_slot.reshape(slots.shape)),
            torch.from_numpy(slots),
            guided,
        )

    def recalls(self, rows: Rows, images: Tensor) -> list[float]:
        """Of each language, the share of captions whose image is among the nearest ten.

        Args:
            rows: I images.
            images: (I, D) their embeddings.
        """
        ids = np.concatenate([self._caption_ids[row] for row in rows], axis=1)  # (L, captions)
        image = np.repeat(np.arange(len(rows)), [self._caption_ids[row].shape[1] for row in rows])
        texts = embed_rows(self._text, Sentences(self.tokens, np.arange(len(self.tokens)))).cpu()
        recalls = []
        for of_language in ids:
            needed, text = np.unique(of_language, return_inverse=True)
            ranks = rank_pairs(texts[needed], images, text, image)
            recalls.append(float(ranks.within(_ANSWERS)[text].mean()))
        return recalls

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


def _check_leak(splits: Sequence[Captions], photos: Sequence[Photos]) -> None:
    shared = set(photos[0].paths).intersection(photos[1].paths)
    if shared:
        train_path, dev_path = (next(iter(split.paths.values())) for split in splits)
        raise DataError(
            f"{dev_path}: {len(shared)} of its images are also in {train_path}, such as "
            f"{min(shared).name}; --allow-leak permits it."
        )


def _require_sense(config: PretrainConfig, languages: Sequence[str]) -> None:
    """Refuses options that contradict each other, or would do nothing.

    Raises:
        UsageError: names them.
    """
    if (config.text is None) != (config.vision is None):
        raise UsageError("--text and --vision go together: a model needs both encoders.")
    if config.clip is not None and config.text is not None:
        raise UsageError("--clip is a whole model; leave it out, or --text and --vision.")
    if config.freeze_epochs and config.clip is None and config.text is None:
        raise UsageError(
            "--freeze-epochs keeps pretrained encoders as they are for a while; it goes with "
            "--text and --vision, or --clip."
        )
    changed = config.margin != PretrainConfig.margin or config.negatives != PretrainConfig.negatives
    if changed and config.objective != "triplet":
        raise UsageError("--margin and --negatives go with --objective triplet.")
    if config.sampling != "parallel" and len(languages) < 2:
        raise UsageError(f"--sampling {config.sampling} needs several --lang to choose among.")


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
    starts = (config.clip,) if config.clip else (config.text, config.vision)
    named = [f"`{public_name(start)}`" for start in starts if start]
    start = " and ".join(named) or "random weights"
    return f"""---
library_name: transformers
tags: [clip]
language: [{", ".join(languages)}]
---

# CLIP model

{training} from {start} on {num_images} images with captions, {result.epochs} epochs,
the weights of epoch {result.best_epoch} kept (dev loss {result.dev["loss"]:.4f}). Load it with
`transformers.AutoModel`, or give it to `clseave finetune-ve --clip`.
"""
