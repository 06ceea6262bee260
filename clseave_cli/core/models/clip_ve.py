"""CLIP-VE: a frozen image tower, a trained text tower and the entailment head (thesis 3.1.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.core.data.records import ENGLISH
from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.folder import peek, seal, unsealed
from clseave_cli.core.models.weights import load_weights, save_weights
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

FORMAT = "clip-ve"
#: Rows the head judges at once: what it makes of them, four times as wide, stays in the
#: processor's cache (2.6 times as fast as 18,000 rows at once, and less memory).
_HEAD_ROWS = 1024


class ClipVE(nn.Module):
    """The visual-entailment model of one language, the source of all others.

    Attributes:
        source_lang: the language that the text tower reads.
        text: trained, projects to the shared space.
        image: frozen and in eval mode, whatever mode the whole is in.
        head: trained.
        fingerprint: digest of the saved model; empty until it has been saved.
    """

    def __init__(
        self,
        text: SentenceEncoder,
        image: ImageEncoder,
        head: EntailmentHead,
        source_lang: str = ENGLISH,
    ) -> None:
        """Puts the parts together and freezes the image tower.

        Raises:
            ModelError: the widths of the parts differ.
        """
        super().__init__()
        widths = (text.embedding_dim, image.embedding_dim, head.config.embedding_dim)
        if len(set(widths)) > 1:
            raise ModelError(
                f"the text tower projects to {widths[0]}, the image tower to {widths[1]}, the "
                f"head reads {widths[2]}; the three must be equal."
            )
        self.text = text
        self.image = image
        self.head = head
        self.source_lang = source_lang
        self.fingerprint = ""
        self.image.requires_grad_(False)

    @classmethod
    def from_clip(cls, name: str | Path, source_lang: str = ENGLISH) -> ClipVE:
        """A new CLIP-VE around a pretrained CLIP-like model; only the head is untrained.

        Args:
            name: hub id or folder of the model.
            source_lang: the language it will be trained in.

        Raises:
            ModelError: the model cannot be loaded or has an unknown layout.
        """
        text, image = backbones.load_clip_text(name), backbones.load_clip_image(name)
        head = EntailmentHead(HeadConfig(embedding_dim=text.embedding_dim))
        return cls(text, image, head, source_lang)

    @classmethod
    def from_folder(cls, folder: Path, text: SentenceEncoder | None = None) -> ClipVE:
        """Loads a folder that `save` wrote, in eval mode.

        Args:
            folder: the model's folder.
            text: a student to take the text tower's place, which is then not loaded.

        Raises:
            ModelError: it is missing, damaged, or of another format.
        """
        with unsealed(folder, FORMAT, without=None if text is None else "text") as config:
            with torch.device("meta"):  # its config may promise more than its file holds
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
        """Sets the mode of text tower and head; the frozen image tower stays in eval mode."""
        super().train(mode)
        self.image.eval()
        return self

    def save(self, folder: Path) -> None:
        """Writes the model's files into an existing folder and notes the fingerprint."""
        self.text.save_pretrained(folder / "text")
        self.image.save_pretrained(folder / "image")
        save_weights(self.head, folder / "head.safetensors")
        config = {
            "languages": [self.source_lang],
            **self.text.packing,
            "head": dataclasses.asdict(self.head.config),
        }
        self.fingerprint = seal(folder, FORMAT, config)

    def forward(self, hypothesis: Tensor, premise: Tensor) -> Tensor:
        """(B, 3) logits from (B, D) sentence and image embeddings."""
        # A batch that is trained on is normalised as one; otherwise rows do not see each other.
        rows = len(hypothesis) if self.training else _HEAD_ROWS
        blocks = zip(torch.split(hypothesis, rows), torch.split(premise, rows), strict=True)
        return torch.cat([self.head(*block) for block in blocks])


def fingerprint(folder: Path) -> str:
    """The fingerprint of a saved CLIP-VE, without loading it.

    Raises:
        ModelError: not a CLIP-VE folder.
    """
    return str(peek(folder, FORMAT)["fingerprint"])


def source_language(folder: Path) -> str:
    """The language that a saved CLIP-VE reads, without loading it.

    Raises:
        ModelError: not a CLIP-VE folder.
    """
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


class EntailmentHead(nn.Module):
    """f = [h, p, |h − p|, h ∘ p] → BatchNorm → three linear layers (thesis eq. 3.1–3.3)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.BatchNorm1d(4 * config.embedding_dim),
            nn.Dropout(config.dropout),
            nn.Linear(4 * config.embedding_dim, config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.ReLU(),
            nn.BatchNorm1d(config.hidden_dim),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_dim, len(LABELS)),
        )

    def forward(self, hypothesis: Tensor, premise: Tensor) -> Tensor:
        """Scores each label.

        Args:
            hypothesis: (B, D) sentence embeddings, any float type.
            premise: (B, D) image embeddings.

        Returns:
            (B, C) float32 logits, in the order of `labels.LABELS`.
        """
        # Normalisation and batch statistics in float32, whatever the encoders computed in.
        with torch.autocast(hypothesis.device.type, enabled=False):
            h, p = self._prepare(hypothesis.float()), self._prepare(premise.float())
            features = torch.cat([h, p, (h - p).abs(), h * p], dim=1)  # (B, 4D)
            logits: Tensor = self.layers(features)
        return logits

    def _prepare(self, embedding: Tensor) -> Tensor:
        if self.config.normalize:
            embedding = functional.normalize(embedding, dim=1)
        return functional.dropout(embedding, self.config.dropout, self.training)
