"""CLIP-VE: a frozen image tower, a trained text tower and the entailment head (thesis 3.1.2).

Legend: B pairs · D embedding width · P patches · E width of a premise, D or (1 + P) · D
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.config import Head
from clseave_cli.core.data.records import ENGLISH
from clseave_cli.core.models import backbones
from clseave_cli.core.models.calibration import write_fitted
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.folder import peek, seal, unsealed
from clseave_cli.core.models.weights import load_weights, save_weights
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

FORMAT = "clip-ve"
#: Rows per call of the head: its features, four times as wide, then stay in the processor's cache
#: (2.6 times as fast as 18,000 rows at once, with less memory). With the patches of a ViT-B/16, 64
#: rows are 26 MB.
_HEAD_ROWS, _PATCH_ROWS = 1024, 64


class ClipVE(nn.Module):
    """The visual-entailment model of one language, from which students of all others are trained.

    Attributes:
        source_lang: the language that the text tower reads.
        text: trained, projects to the shared space.
        image: frozen, and always in eval mode.
        head: trained.
        fingerprint: digest of the saved model; empty until it is saved.
    """

    def __init__(
        self,
        text: SentenceEncoder,
        image: ImageEncoder,
        head: EntailmentHead,
        source_lang: str = ENGLISH,
    ) -> None:
        """Freezes the image tower.

        Raises:
            ModelError: the widths or the patch grids of the parts do not fit.
        """
        super().__init__()
        widths = (text.embedding_dim, image.embedding_dim, head.config.embedding_dim)
        if len(set(widths)) > 1:
            raise ModelError(
                f"the text tower projects to {widths[0]}, the image tower to {widths[1]}, the "
                f"head reads {widths[2]}; the three must be equal."
            )
        grid, heads = head.config.patch_grid, head.config.patch_heads
        if grid and (not 0 < grid <= image.grid or image.grid % grid or heads < 1):
            raise ModelError(
                f"the head reads {grid} × {grid} patches, which the image tower's {image.grid} × "
                f"{image.grid} cannot be averaged to; choose another --patch-grid."
            )
        image.patch_grid = grid
        self.text = text
        self.image = image
        self.head = head
        self.source_lang = source_lang
        self.fingerprint = ""
        self.image.requires_grad_(False)

    @classmethod
    def from_clip(
        cls,
        name: str | Path,
        source_lang: str = ENGLISH,
        head: Head = "pooled",
        patch_grid: int | None = None,
        adapter: bool = False,
    ) -> ClipVE:
        """A new CLIP-VE around a pretrained CLIP-like model; only the head is untrained.

        Args:
            name: hub id or folder of the model.
            source_lang: the language it will be trained in.
            head: the kind of head.
            patch_grid: side of the grid that patches are averaged to; None: keep all patches.
            adapter: whether the head adapts image embeddings.

        Raises:
            ModelError: the model cannot be loaded, has an unknown layout, or lacks such patches.
        """
        text, image = backbones.load_clip_text(name), backbones.load_clip_image(name)
        grid = (patch_grid or image.grid) if head == "patches" else 0
        if head == "patches" and not grid:
            raise ModelError(
                f"{name}: its image tower has no fixed grid of patches; use --head pooled."
            )
        shape = HeadConfig(embedding_dim=text.embedding_dim, patch_grid=grid, adapter=adapter)
        return cls(text, image, EntailmentHead(shape), source_lang)

    @classmethod
    def from_folder(cls, folder: Path, text: SentenceEncoder | None = None) -> ClipVE:
        """Loads a folder that `save` wrote, in eval mode; `text` replaces the saved text tower.

        Raises:
            ModelError: it is missing, damaged, or of another format.
        """
        with unsealed(folder, FORMAT, without=None if text is None else "text") as config:
            with torch.device("meta"):  # its config may claim larger sizes than its file has
                head = EntailmentHead(HeadConfig(**config["head"]))
            load_weights(head, folder / "head.safetensors")
            if text is None:
                text = backbones.load_clip_text(folder / "text", config)
            image = backbones.load_clip_image(folder / "image")
            try:
                model = cls(text, image, head, config["languages"][0])
            except ModelError as error:
                raise ModelError(f"{folder}: {error}") from None
        model.fingerprint = config["fingerprint"]
        return model.eval()

    def train(self, mode: bool = True) -> ClipVE:
        """Sets the mode of text tower and head; the image tower stays in eval mode."""
        super().train(mode)
        self.image.eval()
        return self

    def save(self, folder: Path, dev: Mapping[str, float] | None = None) -> None:
        """Writes the model and the temperature in its dev metrics, and sets the fingerprint."""
        self.text.save_pretrained(folder / "text")
        self.image.save_pretrained(folder / "image")
        save_weights(self.head, folder / "head.safetensors")
        config = {
            "languages": [self.source_lang],
            **self.text.packing,
            "head": self.head.config.to_json(),
        }
        self.fingerprint = seal(folder, FORMAT, config)
        write_fitted(folder, [self.source_lang], dev or {})

    @property
    def rows_at_once(self) -> int:
        """Rows per call of the head, outside training."""
        return _PATCH_ROWS if self.head.config.patch_grid else _HEAD_ROWS

    def forward(self, hypothesis: Tensor, premise: Tensor) -> Tensor:
        """(B, 3) logits from (B, D) sentence embeddings and (B, E) premises of the image tower."""
        # In training, BatchNorm needs the whole batch; in eval mode, rows are independent.
        rows = len(hypothesis) if self.training else self.rows_at_once
        blocks = zip(torch.split(hypothesis, rows), torch.split(premise, rows), strict=True)
        return torch.cat([self.head(*block) for block in blocks])


def fingerprint(folder: Path) -> str:
    """The fingerprint of a saved CLIP-VE; raises ModelError for any other folder."""
    return str(peek(folder, FORMAT)["fingerprint"])


def source_language(folder: Path) -> str:
    """The language that a saved CLIP-VE reads; raises ModelError for any other folder."""
    return str(peek(folder, FORMAT)["languages"][0])


@dataclass(frozen=True)
class HeadConfig:
    """Shape of an `EntailmentHead`, stored in `config.json`.

    The defaults are CLIP-VE's (thesis 3.1.2). The thesis' text does not say whether embeddings are
    normalised; its code L2-normalises both and applies dropout to each, and so do we.
    """

    embedding_dim: int = 512
    hidden_dim: int = 128
    dropout: float = 0.1
    normalize: bool = True
    patch_grid: int = 0  # cells along a side of the photo; 0: the head reads one embedding of it
    patch_heads: int = 4
    adapter: bool = False  # p ← p + A p, on the photo's embedding

    def to_json(self) -> dict[str, Any]:
        """For `config.json`; unused options are left out, or old fingerprints would change."""
        fields = dataclasses.asdict(self)
        unused = [] if self.patch_grid else ["patch_grid", "patch_heads"]
        unused += [] if self.adapter else ["adapter"]
        return {name: value for name, value in fields.items() if name not in unused}


class EntailmentHead(nn.Module):
    """f = [h, p, |h − p|, h ∘ p] → BatchNorm → three linear layers (thesis eq. 3.1–3.3)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        num_features = (5 if config.patch_grid else 4) * config.embedding_dim
        self.layers = nn.Sequential(
            nn.BatchNorm1d(num_features),
            nn.Dropout(config.dropout),
            nn.Linear(num_features, config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.ReLU(),
            nn.BatchNorm1d(config.hidden_dim),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_dim, len(LABELS)),
        )
        self.patches = PatchAttention(config) if config.patch_grid else None
        self.adapter: nn.Linear | None = None
        if config.adapter:
            self.adapter = nn.Linear(config.embedding_dim, config.embedding_dim, bias=False)
            nn.init.zeros_(self.adapter.weight)

    def forward(self, hypothesis: Tensor, premise: Tensor) -> Tensor:
        """(B, C) float32 logits, in the order of `LABELS`, from (B, D) and (B, E) embeddings."""
        # Normalisation and batch statistics in float32, whatever the encoders' precision.
        with torch.autocast(hypothesis.device.type, enabled=False):
            h, p, cells = hypothesis.float(), self.embedding(premise), self._parts(premise)[1:]
            gathered = [self.patches(h, *cells)[0]] if self.patches else []
            h, p = self._prepare(h), self._prepare(p)
            features = torch.cat([h, p, (h - p).abs(), h * p, *gathered], dim=1)  # (B, 4D or 5D)
            logits: Tensor = self.layers(features)
        return logits

    def attention(self, hypothesis: Tensor, premise: Tensor) -> Tensor:
        """(B, grid, grid) float32 attention to the cells, averaged over heads; each sums to 1."""
        assert self.patches is not None, "a head without patches"
        with torch.autocast(hypothesis.device.type, enabled=False):
            weights: Tensor = self.patches(hypothesis.float(), self._parts(premise)[1])[1]
            return weights.mean(dim=1).reshape(-1, self.config.patch_grid, self.config.patch_grid)

    def embedding(self, premise: Tensor) -> Tensor:
        """(B, D) float32 embeddings of (B, E) premises, adapted if the head has an adapter."""
        p = self._parts(premise)[0]
        with torch.autocast(p.device.type, enabled=False):
            return p if self.adapter is None else p + self.adapter(p)

    def _parts(self, premise: Tensor) -> tuple[Tensor, ...]:
        """(B, D) embeddings and, if the head reads them, (B, P, D) patches, float32."""
        if self.patches is None:
            return (premise.float(),)
        shape = (-1, 1 + self.config.patch_grid**2, self.config.embedding_dim)
        states = premise.float().reshape(shape)
        return states[:, 0], states[:, 1:]

    def _prepare(self, embedding: Tensor) -> Tensor:
        if self.config.normalize:
            embedding = functional.normalize(embedding, dim=1)
        return functional.dropout(embedding, self.config.dropout, self.training)


class PatchAttention(nn.Module):
    """Multi-head cross-attention from a sentence to the patches of a photo.

    The sentence is a single query, so the key and value matrices can be applied to it and to the
    result instead of to every patch: (K x)·q = x·(Kᵀ q), and a mean of V x is V times the mean of
    x. This costs 2 · P · D products per head and row, instead of 2 · P · D² per row.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, heads = config.embedding_dim, config.patch_heads
        self.shape = (-1, heads, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.position = nn.Parameter(0.02 * torch.randn(config.patch_grid**2, width))
        self.query = nn.Linear(width, heads * width)  # Kᵀ times the query matrix
        self.value = nn.Linear(heads * width, width)

    def forward(self, hypothesis: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) result and (B, heads, P) attention, of (B, D) sentences and (B, P, D) patches."""
        cells = self.norm(patches) + self.position
        query = self.query(self.norm(hypothesis)).reshape(self.shape)  # (B, heads, D)
        scores = query @ cells.transpose(1, 2) / math.sqrt(self.shape[2])
        weights = scores.softmax(dim=2)
        return self.value((weights @ cells).flatten(1)), weights
