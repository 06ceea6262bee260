"""Sentence and image encoders: thin modules around transformers models.

Legend: B sentences or images · R rows · T tokens in a row · H hidden width · D embedding width ·
E width of a premise, the image features that a head reads.
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
from clseave_cli.core.models.half import in_bfloat16
from clseave_cli.core.models.packing import PackedBatch, pack
from clseave_cli.core.models.tokens import Filling, TokenTable, Trimmed, tokenize
from clseave_cli.core.models.weights import quiet
from clseave_cli.progress import SILENT, Progress

#: Row length of packed batches, unless the encoder's limit is lower. Masked positions still cost
#: time in the attention, most on a CPU with dropout, so rows are about as long as the longest
#: sentences there, and twice as long on a GPU (docs/experiments.md, 2026-11-21 and 2026-11-26).
_ROW_TOKENS = {"cuda": 64, "cpu": 32}
#: The fixed cost of a backbone call, in tokens, estimated for 12 layers: an unpacked batch is split
#: if that saves more padding. On a GPU, launching the kernels takes as long as thousands of tokens.
_CALL_TOKENS = {"cuda": 4096, "cpu": 32}
#: Sentences embedded in one call; on a GPU, launching the kernels outweighs a thousand of them.
_EMBEDDED_AT_ONCE = {"cuda": 4096, "cpu": 512}

#: Keys of a configuration that describe how it was saved, not what the model computes.
_SAVING_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")

#: Writes a tower into a folder, in Hugging Face layout.
Save = Callable[[Path], object]

#: Sentences that packing is checked on; the long one exceeds the windows of local attention.
_PROBES = (
    "a",
    "two dogs run",
    "a man in a red shirt is sitting on a bench",
    "yes .",
    "two dogs run " * 60,
)


class SentenceEncoder(nn.Module):
    """A transformer that pools one hidden state per sentence, normalises and projects it.

    The teacher's text tower and the student that replaces it both have this shape (thesis
    Figure 3.6). The projected vector is the embedding, not what transformers calls pooled output.

    Args:
        backbone: maps `input_ids`, `attention_mask` and, unless `first_position` is None,
            `position_ids` to `last_hidden_state`.
        tokenizer: a fast tokenizer.
        norm: applied to the pooled hidden state; identity if the backbone ends in a normalisation.
        projection: H → D.
        save: writes the backbone, or a model that contains it, in Hugging Face layout.
        causal: tokens attend backwards only (CLIP).
        max_tokens: longest sentence, terminal token included.
        first_position: position id of a sentence's first token; None: positions are never passed.
        terminal_id: the token that ends every sentence.
        packs: several sentences may share a row.
        pooling: which hidden state represents a sentence.
        filling: padding that counts as part of the sentence (SigLIP).
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
        self.state_width = int(backbone.config.hidden_size)  # H
        #: (V,) each token's row in the word vectors while the vocabulary is reduced.
        self.token_places: Tensor | None = None
        #: The trimmed vocabulary, if tokens were removed for good.
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
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.projection.parameters()).device

    @property
    def packing(self) -> dict[str, Any]:
        """What `config.json` stores about packing, for `backbones.input_settings`."""
        return {"packs": self.packs, "first_position": self.first_position}

    @property
    def buckets_shapes(self) -> bool:
        """Whether batches are padded to few distinct shapes, for steps captured on a GPU."""
        return self.device.type == "cuda"

    @property
    def trains_in_bfloat16(self) -> bool:
        """Whether the backbone computes in bfloat16 throughout: in bf16 training on a GPU."""
        in_bf16 = torch.get_autocast_dtype("cuda") == torch.bfloat16
        return self.training and torch.is_autocast_enabled("cuda") and in_bf16

    @property
    def row_tokens(self) -> int | None:
        """T of a packed row; None: one sentence per row."""
        return min(_ROW_TOKENS[self.device.type], self.max_tokens) if self.packs else None

    def tokenize(self, sentences: list[str]) -> TokenTable:
        """Tokenises sentences for this encoder."""
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
        """Packs (B,) sentences, given by index, for `forward`.

        With `buckets_shapes`, that returns `places` embeddings; those after B are meaningless.
        """
        batch = pack(
            tokens,
            sentences,
            row_tokens=self.row_tokens,
            pad_id=self.pad_id,
            call_tokens=_CALL_TOKENS[self.device.type],
            bucket_limit=self.max_tokens if self.buckets_shapes else None,
            places=places if self.buckets_shapes else None,
        )
        if self.token_places is None:
            return batch
        return replace(batch, input_ids=self.token_places[batch.input_ids])

    def forward(self, batch: PackedBatch) -> Tensor:
        """(B, D) embeddings, unnormalised, in the order in which the batch was packed."""
        batch = batch.to(self.device)
        return self.project(pool(self.hidden_states(batch), batch, self.pooling))

    def hidden_states(self, batch: PackedBatch, layer: int | None = None) -> Tensor:
        """(R, T, H) states for a batch on the encoder's device; meaningless at unused places.

        Those of `layer`, counted from 1, or -1 for the last; by default, the backbone's last hidden
        states, which are normalised in CLIP.
        """
        with in_bfloat16(self.backbone) if self.trains_in_bfloat16 else nullcontext():
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
        # Without packing, the model counts positions itself.
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
        """The attention mask in the form that the backbone expects."""
        # Given a padding mask, every model builds its mask itself.
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
        """Yields the embeddings of all sentences, or of the given ones, in batches: (≤ B, D).

        By default, the batch size B suits the device.
        """
        rows = np.arange(len(tokens)) if sentences is None else sentences
        size = batch_size or _EMBEDDED_AT_ONCE[self.device.type]
        for start in range(0, len(rows), size):
            yield self(self.pack(tokens, rows[start : start + size]))

    @quiet()
    def save_pretrained(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face layout."""
        self._save(folder)
        self.tokenizer.save_pretrained(folder)

    def digest(self) -> str:
        """A digest of everything that determines an embedding."""
        # An activation has no weights, but its module's repr names it.
        added = [[module_digest(part), repr(part)] for part in (self.norm, self.projection)]
        return json_digest([self.states_digest(), self.pooling, added])

    def states_digest(self) -> str:
        """A digest of everything that determines hidden states: backbone, tokenizer, limits."""
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
        """Returns whether packing leaves every embedding unchanged, within float tolerance.

        The reference is each sentence alone, where the backbone counts positions itself. If it
        differs, packing is turned off, with a note to `progress` that names the encoder.
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
            # Raised by backbones that accept no mask of token pairs (DeBERTa, XLM).
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                packed = torch.full_like(alone, torch.nan)
        self.train(was_training)
        self.packs = torch.allclose(packed, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
        if not self.packs:
            progress.note(f"{name}: packing is not exact for this encoder; padding instead.")
        return self.packs


class ImageEncoder(nn.Module):
    """A teacher's image tower with its preprocessing.

    Args:
        backbone: maps `pixel_values` to `pooler_output`.
        projection: H → D, without bias; None: the pooled output is the embedding (SigLIP).
        processor: its image processor.
        save: writes the tower in Hugging Face layout.
    """

    _mean: Tensor  # (3, 1, 1), like `_std`, of uint8 pixels divided by 255
    _std: Tensor

    def __init__(
        self, backbone: Any, projection: nn.Linear | None, processor: Any, save: Save
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Identity() if projection is None else projection
        self.processor = processor
        self.state_width = int(backbone.config.hidden_size)  # H
        self.embedding_dim = self.state_width if projection is None else projection.out_features
        self._save = save
        #: Cells along a side whose states `forward` appends to each embedding; 0: none.
        self.patch_grid = 0
        #: Blocks at the end of the tower that are trained, and computed in every step (`states`).
        self.num_trained = 0
        self.preparation = Preparation.of(processor)
        if self.preparation is not None:
            for name in ("mean", "std"):
                values = torch.tensor(getattr(self.preparation, name))[:, None, None]
                self.register_buffer(f"_{name}", values, persistent=False)

    @property
    def premise_width(self) -> int:
        """E, the width of what `forward` returns: D, or (1 + patch_grid²) · D."""
        return self.embedding_dim * (1 + self.patch_grid**2)

    @property
    def states_width(self) -> int:
        """The width of what `states` returns: T · H, class token included."""
        return int(self.backbone.embeddings.position_embedding.num_embeddings) * self.state_width

    @property
    def blocks(self) -> Any:
        """The tower's transformer blocks, in order, as an `nn.ModuleList`."""
        return self.backbone.encoder.layers

    @property
    def grid(self) -> int:
        """Patches along a side of the square that the tower sees; 0: it has no fixed grid."""
        config = self.backbone.config
        size = getattr(config, "image_size", None)
        # Swin and its relatives merge patches from layer to layer.
        if not isinstance(size, int) or hasattr(config, "depths"):
            return 0
        # DINOv2's processor crops to a smaller size than its position table covers.
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
        """A digest of everything that determines an embedding: model and preprocessing."""
        processing = [type(self.processor).__name__, self.processor.to_dict()]
        backbone = backbone_digest(self.backbone)
        return json_digest([backbone, module_digest(self.projection), processing])

    def preprocess(self, images: list[Any]) -> Tensor:
        """Pixels of decoded RGB images, on the CPU: float32, (B, 3, height, width).

        If a GPU can do the arithmetic, uint8, (B, height, width, 3): a quarter of the bytes, and
        the CPU only decodes and resizes. For SigLIP 2 NaFlex, which keeps an image's proportions,
        (B, patches, values): each patch's pixels, then the height and width of the grid.
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
        """(B, E) projected embeddings, unnormalised, of what `preprocess` returns.

        With a `patch_grid`, each embedding is followed by the patches' states, normalised,
        projected and averaged over the cells of the grid, row by row.
        """
        pixels = self._normalise(pixels)
        if not self.patch_grid:
            embedding: Tensor = self.projection(self.backbone(pixel_values=pixels).pooler_output)
            return embedding
        output = self.backbone(pixel_values=pixels, output_hidden_states=True)
        return self._premise(output.hidden_states[-2], output.pooler_output)

    def states(self, pixels: Tensor) -> Tensor:
        """(B, `states_width`) input states of the first trained block, for the same pixels."""
        output = self.backbone(pixel_values=self._normalise(pixels), output_hidden_states=True)
        states: Tensor = output.hidden_states[-1 - self.num_trained]
        return states.flatten(1)

    def from_states(self, states: Tensor) -> Tensor:
        """(B, E) as `forward`, computed by the trained blocks from the result of `states`."""
        backbone = self.backbone
        weight = backbone.post_layernorm.weight
        state = states.to(weight).reshape(len(states), -1, len(weight))
        for block in self.blocks[-self.num_trained :]:
            before, state = state, block(state, None)
        # SigLIP pools by attention, the others take the class token.
        pooled = backbone.post_layernorm(state)
        pooled = backbone.head(pooled) if hasattr(backbone, "head") else pooled[:, 0]
        return self._premise(before, pooled) if self.patch_grid else self.projection(pooled)

    def _normalise(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        return pixels

    def _premise(self, states: Tensor, pooled: Tensor) -> Tensor:
        """(B, E) from the last block's input, (B, T, H), and the pooled output, (B, H).

        The last block's output for patches is not used, because no loss was ever computed on it.
        """
        # From the end, because CLIP's class token comes first.
        states = self.projection(self._pooled(states[:, -(self.grid**2) :]))
        if self.patch_grid != self.grid:
            cells = states.transpose(1, 2).reshape(-1, self.embedding_dim, self.grid, self.grid)
            cells = functional.avg_pool2d(cells, self.grid // self.patch_grid)
            states = cells.flatten(2).transpose(1, 2)
        return torch.cat([self.projection(pooled)[:, None], states], dim=1).flatten(1)

    def _pooled(self, states: Tensor) -> Tensor:
        """Applies to any states what the tower applies to its class token before projecting."""
        norm = getattr(self.backbone, "post_layernorm", None) or self.backbone.layernorm
        pooler = getattr(self.backbone, "pooler", None)  # ViT's
        states = norm(states)
        return states if pooler is None else pooler.activation(pooler.dense(states))


def pool(hidden: Tensor, batch: PackedBatch, pooling: Pooling) -> Tensor:
    """(B, H) states of the sentences in a batch from the (R, T, H) states of its rows.

    That of one token, or the mean over all tokens, in float32.
    """
    flat = hidden.flatten(0, 1)  # (R · T, H)
    if pooling == "terminal":
        return flat[batch.terminals]
    if pooling == "cls":
        return flat[batch.starts]
    # A product with zeros and ones costs little next to the backbone and, unlike adding at indices
    # on a GPU, gives the same bits every time.
    sentences = torch.arange(batch.terminals.shape[0], device=hidden.device)
    belongs = (sentences[:, None] == batch.segments.flatten()).float()  # (B, R · T)
    with torch.autocast(hidden.device.type, enabled=False):
        # The clamp is for places after the last sentence, which have no tokens.
        return belongs @ flat.float() / belongs.sum(dim=1, keepdim=True).clamp(min=1)


def backbone_digest(backbone: Any) -> str:
    """A digest of weights and configuration; saving and loading leave it unchanged."""
    config = backbone.config.to_dict()
    relevant = {key: value for key, value in config.items() if key not in _SAVING_KEYS}
    return json_digest([module_digest(backbone), relevant])


def module_digest(module: nn.Module) -> str:
    """BLAKE2b-256 of a module's weights and buffers: names, shapes, types and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
