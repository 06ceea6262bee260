"""What a student is pulled towards: the loss of a batch of training pairs.

Legend: B pairs of a batch · D embedding width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clseave_cli.core.alignment.corpus import TrainingPairs
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows


class Objective(Protocol):
    """A loss, as the flow hands it to the training loop.

    Attributes:
        module: what is trained: the student, and whatever is trained along with it.
    """

    module: nn.Module

    def prepare(self, rows: Rows) -> Any:
        """What the loss of some training pairs needs; depends on their numbers and the seed only.

        Called ahead of time in another thread.
        """
        ...

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a prepared batch; of several processes, each gives that of all of it."""
        ...


class SentenceBatch(NamedTuple):
    """B training pairs, made ready.

    Attributes:
        sentences: this process's share of the targets, packed.
        teacher: (B, D) the teacher's embeddings of the sources.
        weights: (B,) of the pairs.
    """

    sentences: PackedBatch
    teacher: Tensor
    weights: Tensor


class SentenceObjective:
    """The student's sentence embedding against the teacher's (thesis 3.3)."""

    def __init__(self, student: SentenceEncoder, pairs: TrainingPairs) -> None:
        self.module = student
        self._student = student
        self._pairs = pairs

    def prepare(self, rows: Rows) -> SentenceBatch:
        """Packs this process's share; the teacher's side is that of all rows."""
        pairs, own = self._pairs, processes().share(rows)
        return SentenceBatch(
            self._student.pack(pairs.sentences.tokens, pairs.sentences.index[own]),
            pairs.teacher.vectors.rows(pairs.teacher.index[rows]),
            pairs.weights[torch.from_numpy(rows)],
        )

    def loss(self, batch: SentenceBatch) -> Tensor:
        """Embeds the share, gathers those of all processes, compares."""
        embeddings = processes().spread(lambda: self._student(batch.sentences), len(batch.weights))
        return self.loss_of(embeddings, batch)

    def loss_of(self, embeddings: Tensor, batch: SentenceBatch) -> Tensor:
        """The loss of (B, D) embeddings that were computed already."""
        wanted = batch.teacher.to(embeddings.device)  # (B, D)
        per_pair = torch.mean((embeddings.float() - wanted) ** 2, dim=1)  # (B,)
        return torch.mean(per_pair * batch.weights.to(embeddings.device))
