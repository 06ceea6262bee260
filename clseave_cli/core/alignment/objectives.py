"""The loss of a batch of training pairs.

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
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.loop import Rows
from clseave_cli.errors import UsageError

#: Of the in-batch softmax over cosines: SimCSE's (Gao et al. 2021), close to CLIP's initial 0.07.
_TEMPERATURE = 0.05
#: Teacher embeddings to estimate the variance from.
_VARIANCE_SAMPLE = 20_000


@dataclass(frozen=True, eq=False)
class SentenceBatch:
    """B training pairs, prepared."""

    sentences: PackedBatch  # this process's shard of the targets
    #: (S, D) the teacher's embeddings of the distinct source sentences; if shapes must be few,
    #: padded to (B, D) with rows of no pair.
    teacher: Tensor
    source: Tensor  # (B,) int64 row of `teacher`
    weights: Tensor  # (B,)

    @property
    def targets(self) -> Tensor:
        """(B, D) the teacher's embedding for each pair."""
        return self.teacher[self.source]


#: Maps (B, D) float32 student embeddings and their batch to (B,) losses.
Comparison = Callable[[Tensor, SentenceBatch], Tensor]


@dataclass(frozen=True, eq=False)
class SentenceObjective:
    """Compares the student's sentence embeddings with the teacher's (thesis 3.3)."""

    student: SentenceEncoder
    pairs: TrainingPairs
    compare: Comparison

    def prepare(self, rows: Rows) -> SentenceBatch:
        """Packs this process's shard of the targets and looks up all teacher embeddings.

        Runs ahead in another thread, so it depends on nothing but `rows`.
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
        """The weighted mean loss of the whole batch, gathered from all processes."""
        embeddings = processes().gather(lambda: self.student(batch.sentences), len(batch.weights))
        return self.loss_of(embeddings, batch)

    def loss_of(self, embeddings: Tensor, batch: SentenceBatch) -> Tensor:
        """The weighted mean loss of (B, D) embeddings."""
        with torch.autocast(embeddings.device.type, enabled=False):
            per_pair = self.compare(embeddings.float(), batch)  # (B,)
        return torch.mean(per_pair * batch.weights)


def require_fitting(config: StudentConfig, teacher: ClipVE) -> None:
    """Raises a UsageError if the objective ignores the embeddings' length but the head does not."""
    name = config.objective
    if name in ("cosine", "contrastive") and not teacher.head.config.normalize:
        raise UsageError(
            f"--objective {name}: leaves the length of embeddings open, but the head of "
            f"{config.teacher or config.runs / 'clip-ve'} depends on it; use mse or mse+cosine."
        )


def comparison(config: StudentConfig, pairs: TrainingPairs) -> Comparison:
    """The loss that `--objective` names (docs/methods.md, "Objectives")."""
    plain = {"mse": squared_error, "cosine": cosine_distance, "contrastive": contrastive}
    if config.objective in plain:
        return plain[config.objective]
    # Divided by the teacher's variance, squared error is the unexplained share, which is comparable
    # to a cosine distance at any scale of embeddings.
    vectors = pairs.teacher.vectors
    step = max(1, len(vectors) // _VARIANCE_SAMPLE)
    sample = vectors.rows(np.arange(0, len(vectors), step))
    variance = max(sample.var(dim=0, correction=0).mean().item(), 1e-12)
    return lambda embeddings, batch: (
        squared_error(embeddings, batch) / variance + cosine_distance(embeddings, batch)
    )


def squared_error(embeddings: Tensor, batch: SentenceBatch) -> Tensor:
    """(B,) squared error, mean over dimensions (thesis 3.3.2)."""
    return (embeddings - batch.targets).square().mean(dim=1)


def cosine_distance(embeddings: Tensor, batch: SentenceBatch) -> Tensor:
    """(B,) one minus the cosine."""
    return 1 - functional.cosine_similarity(embeddings, batch.targets)


def contrastive(embeddings: Tensor, batch: SentenceBatch) -> Tensor:
    """(B,) InfoNCE in both directions over the whole batch.

    Student → teacher picks the pair's source sentence, teacher → student the pair. Several
    translations of one source sentence are all positives, with one term each (Khosla et al. 2020,
    eq. 2).
    """
    students = functional.normalize(embeddings, dim=1)
    teachers = functional.normalize(batch.teacher, dim=1)
    logits = students @ teachers.T / _TEMPERATURE  # (B, S)
    is_padding = torch.ones_like(logits[0], dtype=torch.bool).index_fill(0, batch.source, False)
    logits = logits.masked_fill(is_padding, -torch.inf)
    to_teacher = functional.cross_entropy(logits, batch.source, reduction="none")
    to_student = -logits.log_softmax(dim=0).gather(1, batch.source[:, None])[:, 0]
    return (to_teacher + to_student) / 2
