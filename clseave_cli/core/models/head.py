"""The entailment head: from a hypothesis and a premise embedding to three logits.

Legend: B batch · D embedding width · C labels (3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from clseave_cli.labels import LABELS


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
