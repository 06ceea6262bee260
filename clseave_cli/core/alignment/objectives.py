"""What a student is pulled towards: the loss of a batch of training pairs.

Legend: B pairs of a batch · S distinct source sentences among them · D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.alignment.corpus import TrainingPairs
from clseave_cli.core.config import StudentConfig
from clseave_cli.core.features import Vectors
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows
from clseave_cli.errors import UsageError

#: Of the in-batch softmax over cosines: SimCSE's (Gao et al. 2021), half of CLIP's first one.
_TEMPERATURE = 0.05
#: Teacher embeddings whose variance stands for that of all.
_VARIANCE_SAMPLE = 20_000


@dataclass(frozen=True, eq=False)
class SentenceBatch:
    """B training pairs, made ready.

    Attributes:
        sentences: this process's shard of the targets, packed.
        teacher: (S, D) the teacher's embeddings of the distinct source sentences; where batches are
            filled up to few shapes (B, D), those behind them no pair's.
        source: (B,) int64, which of them each pair has.
        weights: (B,) of the pairs.
    """

    sentences: PackedBatch
    teacher: Tensor
    source: Tensor
    weights: Tensor

    @property
    def wanted(self) -> Tensor:
        """(B, D) the teacher's embedding of each pair."""
        return self.teacher[self.source]


#: From (B, D) embeddings in float32 and their batch to the loss of each pair, (B,).
Comparison = Callable[[Tensor, SentenceBatch], Tensor]


@dataclass(frozen=True, eq=False)
class SentenceObjective:
    """The student's sentence embedding against the teacher's (thesis 3.3).

    Attributes:
        student: what is trained.
        pairs: what it is trained on.
        compare: the loss of each pair.
    """

    student: SentenceEncoder
    pairs: TrainingPairs
    compare: Comparison

    def prepare(self, rows: Rows) -> SentenceBatch:
        """Packs this process's shard; the teacher's side is that of all rows.

        Called ahead of time in another thread; depends on the numbers of the pairs alone.
        """
        pairs, shard = self.pairs, processes().shard(rows)
        sources, source = np.unique(pairs.teacher.index[rows], return_inverse=True)
        if self.student.buckets_shapes:
            sources = np.pad(sources, (0, len(rows) - len(sources)), mode="edge")
        return SentenceBatch(
            self.student.pack(pairs.sentences.tokens, pairs.sentences.index[shard]),
            pairs.teacher.vectors.rows(sources),
            torch.from_numpy(source),
            pairs.weights[torch.from_numpy(rows)],
        )

    def loss(self, batch: SentenceBatch) -> Tensor:
        """The mean loss: embeds the shard, gathers those of all processes, compares."""
        embeddings = processes().gather(lambda: self.student(batch.sentences), len(batch.weights))
        return self.loss_of(embeddings, batch)

    def loss_of(self, embeddings: Tensor, batch: SentenceBatch) -> Tensor:
        """The loss of (B, D) embeddings that were computed already."""
        with torch.autocast(embeddings.device.type, enabled=False):
            per_pair = self.compare(embeddings.float(), batch)  # (B,)
        return torch.mean(per_pair * batch.weights)


def require_fitting(config: StudentConfig, teacher: ClipVE) -> None:
    """Refuses an objective that cannot work with a teacher.

    Raises:
        UsageError: it says nothing about the length of embeddings, which the head looks at.
    """
    name = config.objective
    if name in ("cosine", "contrastive") and not teacher.head.config.normalize:
        raise UsageError(
            f"--objective {name}: leaves the length of embeddings open, and the head of "
            f"{config.teacher or config.runs / 'clip-ve'} looks at it; take mse or mse+cosine."
        )


def comparison(config: StudentConfig, pairs: TrainingPairs) -> Comparison:
    """The loss that `--objective` names (docs/methods.md, "Objectives")."""
    plain = {"mse": squared_error, "cosine": cosine_distance, "contrastive": contrastive}
    if config.objective in plain:
        return plain[config.objective]
    variance = _variance(pairs.teacher.vectors)
    return lambda embeddings, batch: (
        squared_error(embeddings, batch) / variance + cosine_distance(embeddings, batch)
    )


def squared_error(embeddings: Tensor, batch: SentenceBatch) -> Tensor:
    """(B,) squared error, mean over dimensions (thesis 3.3.2)."""
    return (embeddings - batch.wanted).square().mean(dim=1)


def cosine_distance(embeddings: Tensor, batch: SentenceBatch) -> Tensor:
    """(B,) one minus the cosine."""
    return 1 - functional.cosine_similarity(embeddings, batch.wanted)


def contrastive(embeddings: Tensor, batch: SentenceBatch) -> Tensor:
    """(B,) InfoNCE in both directions over the whole batch.

    Student → teacher: the cross-entropy of picking the pair's source sentence among those of the
    batch. Teacher → student: that of picking the pair among all of the batch. Translations of one
    source sentence into several languages are all its positives, each a term of its own (Khosla
    et al. 2020, eq. 2).
    """
    students = functional.normalize(embeddings, dim=1)
    teachers = functional.normalize(batch.teacher, dim=1)
    logits = students @ teachers.T / _TEMPERATURE  # (B, S)
    is_filling = torch.ones_like(logits[0], dtype=torch.bool).index_fill(0, batch.source, False)
    logits = logits.masked_fill(is_filling, -torch.inf)
    to_teacher = functional.cross_entropy(logits, batch.source, reduction="none")
    to_student = -logits.log_softmax(dim=0).gather(1, batch.source[:, None])[:, 0]
    return (to_teacher + to_student) / 2


def _variance(vectors: Vectors) -> float:
    """The teacher's variance over sentences, mean over dimensions: a squared error of 1 after it.

    Divided by it, the squared error is the share of the variance that is not explained yet, to
    which a cosine can be added whatever the scale of the teacher.
    """
    step = max(1, len(vectors) // _VARIANCE_SAMPLE)
    variance = vectors.rows(np.arange(0, len(vectors), step)).var(dim=0, correction=0).mean()
    return max(variance.item(), 1e-12)
