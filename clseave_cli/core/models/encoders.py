"""Sentence and image encoders: thin modules over transformers' models.

Legend: B sentences or images · R rows · T tokens in a row · H hidden width · D embedding width ·
E width of what a head reads of an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.config import Pooling
from clseave_cli.core.data.images import Preparation
from clseave_cli.core.files import json_digest
from clseave_cli.core.models.half import in_half
from clseave_cli.core.models.packing import PackedBatch, pack
from clseave_cli.core.models.tokens import Filling, TokenTable, Trimmed, tokenize
from clseave_cli.core.models.weights import quiet
from clseave_cli.progress import SILENT, Progress

#: Row length of packed batches; an encoder that reads less is packed to what it reads. Masked
#: places of the attention cost, on a CPU with dropout much: rows are about as long as the longest
#: sentences there, and twice as long on a GPU (docs/experiments.md, 2026-11-21 and 2026-11-26).
_ROW_TOKENS = {"cuda": 64, "cpu": 32}
#: What a call of the backbone costs beside its tokens, in tokens: where it cannot be packed, rows
#: are computed apart if that saves more padding. Estimates for 12 layers; a GPU computes thousands
#: of tokens in the time that starting all its kernels takes.
_CALL_TOKENS = {"cuda": 4096, "cpu": 32}
#: Sentences embedded in one call. A GPU computes a thousand of them in less time than it takes to
#: start all kernels of a call.
_EMBEDDED_AT_ONCE = {"cuda": 4096, "cpu": 512}

#: What a configuration says of how it was saved, not of what the model computes.
_OF_SAVING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")

#: Writes a tower into a folder, in Hugging Face layout.
Save = Callable[[Path], object]

#: What packing is checked on; the long one reaches beyond the windows of local attention.
_PROBES = (
    "a",
    "two dogs run",
    "a man in a red shirt is sitting on a bench",
    "yes .",
    "two dogs run " * 60,
)


class SentenceEncoder(nn.Module):
    """A transformer, read at one token of each sentence and projected.

    Both text towers have this shape: the teacher's own, and the student that replaces it (thesis
    Figure 3.6). The projected vector is the embedding; what transformers calls the pooled output
    is not. A student may be read otherwise (`pooling`).
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        norm: nn.Module,
        projection: nn.Linear,
        *,
        save: Save,
        causal: bool,
        max_tokens: int,
        first_position: int | None,
        terminal_id: int,
        packs: bool = True,
        pooling: Pooling = "terminal",
        filling: Filling | None = None,
    ) -> None:
        """Puts the parts together.

        Args:
            backbone: gives `last_hidden_state` for `input_ids`, `attention_mask` and, if there is a
                `first_position`, `position_ids`.
            tokenizer: its fast tokenizer.
            norm: applied to the pooled hidden state (identity where the backbone ends in a
                normalisation of its own).
            projection: H → D.
            save: writes it in Hugging Face layout: the backbone, or a model around it that shares
                its weights.
            causal: tokens look back only (CLIP).
            max_tokens: longest sentence, terminal token included.
            first_position: position id of a sentence's first token; None: the backbone is never
                told positions.
            terminal_id: the token that ends every sentence.
            packs: several sentences may lie in a row.
            pooling: which hidden state stands for a sentence.
            filling: padding that counts as part of the sentence (SigLIP); None: there is none.
        """
        super().__init__()
        self.backbone = backbone
        self.norm = norm
        self.projection = projection
        self.tokenizer = tokenizer
        self._save = save
        self.causal = causal
        self.max_tokens = max_tokens
        self.first_position = first_position
        self.terminal_id = terminal_id
        self.pooling = pooling
        self.filling = filling
        self.pad_id = tokenizer.pad_token_id or 0
        self.packs = packs
        #: (V,) where each token's vector lies while the vocabulary is reduced.
        self.token_places: Tensor | None = None
        #: What was taken out of the vocabulary for good.
        self.trimmed: Trimmed | None = None
        #: Fingerprint of the folder it was loaded from; empty for a new one.
        self.fingerprint = ""
        #: Of a student, the digest of the pretrained backbone it was trained from; empty: unknown.
        self.pretrained = ""

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self.projection.out_features)

    @property
    def state_width(self) -> int:
        """H."""
        return int(self.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.projection.parameters()).device

    @property
    def packing(self) -> dict[str, Any]:
        """What was found out about packing, for `config.json`; `backbones.reading` reads it."""
        return {"packs": self.packs, "first_position": self.first_position}

    @property
    def few_shapes(self) -> bool:
        """Whether batches are filled up to few shapes, for steps that are captured on a GPU."""
        return self.device.type == "cuda"

    @property
    def halves(self) -> bool:
        """Whether the backbone computes in bfloat16 throughout: in training by it on a GPU."""
        in_bf16 = torch.get_autocast_dtype("cuda") == torch.bfloat16
        return self.training and torch.is_autocast_enabled("cuda") and in_bf16

    @property
    def row_tokens(self) -> int | None:
        """T of a packed row; None: one sentence a row."""
        return min(_ROW_TOKENS[self.device.type], self.max_tokens) if self.packs else None

    def tokenize(self, sentences: list[str]) -> TokenTable:
        """Tokenises for this encoder."""
        return tokenize(
            self.tokenizer.backend_tokenizer,
            sentences,
            max_tokens=self.max_tokens,
            terminal_id=self.terminal_id,
            filling=self.filling,
        )

    def pack(
        self, tokens: TokenTable, sentences: npt.NDArray[np.intp], places: int | None = None
    ) -> PackedBatch:
        """Lays some tokenised sentences out for `forward`.

        Args:
            tokens: the tokenised sentences.
            sentences: which of them.
            places: how many embeddings there shall be if `few_shapes`; those behind the sentences'
                mean nothing.
        """
        batch = pack(
            tokens,
            sentences,
            row_tokens=self.row_tokens,
            pad_id=self.pad_id,
            call_tokens=_CALL_TOKENS[self.device.type],
            few_shapes=self.few_shapes,
            max_tokens=self.max_tokens,
            places=places,
        )
        if self.token_places is None:
            return batch
        return replace(batch, input_ids=self.token_places[batch.input_ids])

    def forward(self, batch: PackedBatch) -> Tensor:
        """Embeds sentences.

        Returns:
            (B, D) embeddings, unnormalised, in the order the batch was packed in.
        """
        batch = batch.to(self.device)
        return self.project(pool(self.hidden_states(batch), batch, self.pooling))

    def hidden_states(self, batch: PackedBatch, layer: int | None = None) -> Tensor:
        """The hidden states, (R, T, H), of a batch on its device; of no use at unused places.

        Args:
            batch: packed sentences.
            layer: whose output, counted from 1, or -1 for the last; None: the backbone's last
                hidden states, which in CLIP are normalised.
        """
        with in_half(self.backbone) if self.halves else nullcontext():
            if not batch.groups:
                return self._states(batch, layer)
            width = batch.input_ids.shape[1]
            states = [self._states(part, layer) for part in batch.parts()]
        return torch.cat(
            [functional.pad(rows, (0, 0, 0, width - rows.shape[1])) for rows in states]
        )

    def _states(self, batch: PackedBatch, layer: int | None) -> Tensor:
        """(R, T, H) hidden states of rows that are computed together."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        inputs["attention_mask"] = self._attention_mask(batch)
        # A sentence alone in its row is the plain case: the model counts by itself.
        if self.packs and self.first_position is not None:
            inputs["position_ids"] = batch.positions + self.first_position
        if layer is not None:
            inputs["output_hidden_states"] = True
        output = self.backbone(**inputs)
        hidden: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return hidden

    def project(self, pooled: Tensor) -> Tensor:
        """(B, D) embeddings from (B, H) pooled hidden states."""
        embedding: Tensor = self.projection(self.norm(pooled))
        return embedding

    def _attention_mask(self, batch: PackedBatch) -> Tensor | dict[str, Tensor]:
        """What the backbone may look at, as it wants to be told.

        One sentence a row is the plain case, which every model masks by itself, each in its way.
        """
        if not self.packs:
            return batch.padding_mask()
        mask = batch.attention_mask(self.causal)
        config = self.backbone.config
        if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
            return mask
        near = batch.attention_mask(self.causal, window=config.sliding_window)
        return {"full_attention": mask, "sliding_attention": near}

    def embed(
        self,
        tokens: TokenTable,
        batch_size: int | None = None,
        sentences: npt.NDArray[np.intp] | None = None,
    ) -> Iterator[Tensor]:
        """The embeddings of tokenised sentences in order, a batch at a time: (≤ B, D) each.

        Args:
            tokens: the sentences.
            batch_size: B; None: what suits the device.
            sentences: which of them; all where None.
        """
        wanted = np.arange(len(tokens)) if sentences is None else sentences
        size = batch_size or _EMBEDDED_AT_ONCE[self.device.type]
        for start in range(0, len(wanted), size):
            yield self(self.pack(tokens, wanted[start : start + size]))

    @quiet()
    def save_pretrained(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face layout."""
        self._save(folder)
        self.tokenizer.save_pretrained(folder)

    def digest(self) -> str:
        """One digest of everything that decides an embedding: hidden states and their reading."""
        # An activation is in no weight, but in what a module says of itself.
        added = [[module_digest(part), repr(part)] for part in (self.norm, self.projection)]
        return json_digest([self.states_digest(), self.pooling, added])

    def states_digest(self) -> str:
        """One digest of everything that decides hidden states: backbone, tokenizer, limits."""
        return json_digest(
            [
                backbone_digest(self.backbone),
                self.tokenizer.backend_tokenizer.to_str(),
                repr(self.filling),
                self.max_tokens,
                self.first_position,
                self.causal,
            ]
        )

    def verify_packing(self, name: str = "", progress: Progress = SILENT) -> bool:
        """Checks that packing changes no embedding; otherwise turns to one sentence a row.

        They are compared with those of each sentence by itself, where the backbone counts positions
        on its own.

        Args:
            name: the encoder's, for the note.
            progress: notes if it pads.

        Returns:
            True if packed rows are exact for this backbone, within float tolerance.
        """
        was_training = self.training
        self.eval()
        self.packs = False
        tokens = self.tokenize(list(_PROBES))
        rows = np.arange(len(_PROBES))
        with torch.no_grad():
            alone = torch.cat([self(self.pack(tokens, rows[i : i + 1])) for i in rows])
            self.packs = True
            try:
                packed = self(self.pack(tokens, rows))
            # What a backbone raises that takes no mask of pairs of tokens (DeBERTa, XLM).
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                packed = torch.full_like(alone, torch.nan)
        self.train(was_training)
        self.packs = torch.allclose(packed, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
        if not self.packs:
            progress.note(f"{name}: packing is not exact for this encoder; padding instead.")
        return self.packs


class ImageEncoder(nn.Module):
    """A teacher's image tower with its preprocessing."""

    _mean: Tensor  # (3, 1, 1), like `_std` of uint8 pixels divided by 255
    _std: Tensor

    def __init__(
        self, backbone: Any, projection: nn.Linear | None, processor: Any, save: Save
    ) -> None:
        """Puts the parts together.

        Args:
            backbone: gives a `pooler_output` for `pixel_values`.
            projection: H → D, no bias; None: the pooled output is the embedding (SigLIP).
            processor: its image processor.
            save: writes both in Hugging Face layout.
        """
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Identity() if projection is None else projection
        self.processor = processor
        self._width = backbone.config.hidden_size if projection is None else projection.out_features
        self._save = save
        #: Cells along a side whose states `forward` adds to each embedding; 0: none.
        self.patch_grid = 0
        #: Blocks at the end of the tower that are trained, and computed in every step (`states`).
        self.num_trained = 0
        self.preparation = Preparation.of(processor)
        if self.preparation is not None:
            for name in ("mean", "std"):
                values = torch.tensor(getattr(self.preparation, name))[:, None, None]
                self.register_buffer(f"_{name}", values, persistent=False)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self._width)

    @property
    def premise_width(self) -> int:
        """E, the numbers that `forward` gives for an image: D, or (1 + patch_grid²) · D."""
        return self.embedding_dim * (1 + self.patch_grid**2)

    @property
    def state_width(self) -> int:
        """H."""
        return int(self.backbone.config.hidden_size)

    @property
    def states_width(self) -> int:
        """The numbers that `states` gives for an image: T · H, the class token included."""
        return int(self.backbone.embeddings.position_embedding.num_embeddings) * self.state_width

    @property
    def blocks(self) -> nn.ModuleList:
        """The tower's transformer blocks, the last one last."""
        blocks: nn.ModuleList = self.backbone.encoder.layers
        return blocks

    @property
    def grid(self) -> int:
        """Patches along a side of the square that the tower sees; 0: it has no fixed grid."""
        config = self.backbone.config
        size = getattr(config, "image_size", None)
        # Swin and its like merge patches from layer to layer.
        if not isinstance(size, int) or hasattr(config, "depths"):
            return 0
        # DINOv2 is given smaller pictures than its positions were made for.
        shown = size if self.preparation is None else self.preparation.crop[0]
        return shown // int(config.patch_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @quiet()
    def save_pretrained(self, folder: Path) -> None:
        """Writes model and image processor in Hugging Face layout."""
        self._save(folder)
        self.processor.save_pretrained(folder)

    def digest(self) -> str:
        """One digest of everything that decides an embedding: model and preprocessing."""
        processing = [type(self.processor).__name__, self.processor.to_dict()]
        backbone = backbone_digest(self.backbone)
        return json_digest([backbone, module_digest(self.projection), processing])

    def preprocess(self, images: list[Any]) -> Tensor:
        """Pixels of decoded RGB images, on the CPU: float32, (B, 3, height, width).

        Where a GPU can do the arithmetic, they are uint8, (B, height, width, 3), a quarter of the
        bytes: cores then only decode and resize, in C. For a tower that reads patches in the
        picture's own proportions (SigLIP 2 NaFlex) they are (B, patches, values): each patch's
        pixels, then the grid's height and width.
        """
        if self.preparation is not None and self.device.type == "cuda":
            return torch.from_numpy(np.stack([self.preparation.cut(image) for image in images]))
        prepared = self.processor(images=images, return_tensors="pt")
        pixels: Tensor = prepared["pixel_values"]
        if "spatial_shapes" in prepared:
            grids = prepared["spatial_shapes"].float()[:, None].expand(-1, pixels.shape[1], -1)
            pixels = torch.cat([pixels, grids], dim=2)
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, E) projected embeddings, unnormalised, of what `preprocess` gives.

        With a `patch_grid`, the patches' states stand behind each, normalised and projected
        likewise and averaged over the cells of the grid, row by row.
        """
        pixels = self._normalised(pixels)
        if not self.patch_grid:
            embedding: Tensor = self.projection(self.backbone(pixel_values=pixels).pooler_output)
            return embedding
        output = self.backbone(pixel_values=pixels, output_hidden_states=True)
        return self._premise(output.hidden_states[-2], output.pooler_output)

    def states(self, pixels: Tensor) -> Tensor:
        """(B, `states_width`) what the first of the trained blocks reads of the same pixels."""
        output = self.backbone(pixel_values=self._normalised(pixels), output_hidden_states=True)
        states: Tensor = output.hidden_states[-1 - self.num_trained]
        return states.flatten(1)

    def from_states(self, states: Tensor) -> Tensor:
        """What `forward` gives, (B, E), by the trained blocks, from what `states` gave."""
        backbone = self.backbone
        weight = backbone.post_layernorm.weight
        state = states.to(weight).reshape(len(states), -1, len(weight))
        for block in self.blocks[-self.num_trained :]:
            before, state = state, block(state, None)
        # SigLIP pools by attention, the others take the class token.
        pooled = backbone.post_layernorm(state)
        pooled = backbone.head(pooled) if hasattr(backbone, "head") else pooled[:, 0]
        return self._premise(before, pooled) if self.patch_grid else self.projection(pooled)

    def _normalised(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        return pixels

    def _premise(self, states: Tensor, pooled: Tensor) -> Tensor:
        """(B, E) from what the last block reads, (B, T, H), and the pooled output, (B, H).

        Nothing was trained on what the last block makes of any patch, so it is not read.
        """
        # Without CLIP's class token.
        states = self.projection(self._pooled(states[:, -(self.grid**2) :]))
        if self.patch_grid != self.grid:
            cells = states.transpose(1, 2).reshape(-1, self.embedding_dim, self.grid, self.grid)
            cells = functional.avg_pool2d(cells, self.grid // self.patch_grid)
            states = cells.flatten(2).transpose(1, 2)
        return torch.cat([self.projection(pooled)[:, None], states], dim=1).flatten(1)

    def _pooled(self, states: Tensor) -> Tensor:
        """What the tower makes of its class token's state before the projection, of any states."""
        norm = getattr(self.backbone, "post_layernorm", None) or self.backbone.layernorm
        pooler = getattr(self.backbone, "pooler", None)  # ViT's
        states = norm(states)
        return states if pooler is None else pooler.activation(pooler.dense(states))


def pool(hidden: Tensor, batch: PackedBatch, pooling: Pooling) -> Tensor:
    """One hidden state for each sentence of packed rows.

    Args:
        hidden: (R, T, H) hidden states of the rows.
        batch: how the sentences lie in them.
        pooling: which state, or the mean of all of a sentence.

    Returns:
        (B, H), for the mean in float32.
    """
    flat = hidden.flatten(0, 1)  # (R · T, H)
    if pooling == "terminal":
        return flat[batch.terminals]
    if pooling == "cls":
        return flat[batch.starts]
    # A product with zeros and ones: next to nothing beside the backbone, and the same bits every
    # time, which adding at indices on a GPU is not.
    sentences = torch.arange(batch.terminals.shape[0], device=hidden.device)
    belongs = (sentences[:, None] == batch.segments.flatten()).float()  # (B, R · T)
    with torch.autocast(hidden.device.type, enabled=False):
        # Places behind the sentences have no tokens.
        return belongs @ flat.float() / belongs.sum(dim=1, keepdim=True).clamp(min=1)


def backbone_digest(backbone: Any) -> str:
    """One digest of weights and configuration, the same for a model made, saved or loaded."""
    config = backbone.config.to_dict()
    said = {key: value for key, value in config.items() if key not in _OF_SAVING}
    return json_digest([module_digest(backbone), said])


def module_digest(module: nn.Module) -> str:
    """BLAKE2b-256 of a module's weights and buffers: names, shapes, types and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
