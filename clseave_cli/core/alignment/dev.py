"""Dev metrics of a student, by language.

Legend: N dev rows · P sentences to retrieve among · D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from clseave_cli.core.config import StudentConfig
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import Parallel, Split, distinct
from clseave_cli.core.features import (
    Features,
    Photos,
    Sentences,
    by_rows,
    embed_rows,
    image_features,
    sentence_embeddings,
    tokenize_sentences,
)
from clseave_cli.core.models.calibration import fit_temperature
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.ranking import rank
from clseave_cli.core.training.device import Autocast
from clseave_cli.core.training.loop import Rows, Selection
from clseave_cli.errors import DataError, TrainingError
from clseave_cli.labels import UNLABELLED
from clseave_cli.progress import Progress

#: A student whose variance is below this share of the teacher's has collapsed.
_COLLAPSED = 1e-3
#: Retrieval: candidates (P at most), and the rank that counts as a hit.
_CANDIDATES, _HIT_RANK = 1000, 10

#: Dev metrics by objective, without images; mse for the others. Cosine objectives leave the length
#: of embeddings open, so squared error does not rank them.
_TEXT_METRICS = {"cosine": "cosine", "contrastive": "recall_at_10"}


@dataclass(frozen=True, eq=False)
class DevSet:
    """The dev rows of one language, ready for evaluation."""

    lang: str
    is_averaged: bool  # False for an auxiliary language, which does not select the checkpoint
    sentences: Sentences  # the targets, tokenised for the student
    teacher: Features  # (N, D) the teacher's embeddings of the source sentences
    premises: Features | None  # the rows' images, if accuracy is measured
    labels: Tensor  # (N,) int64 ids of `labels.LABELS`


#: The dev rows of a language, and their photos if accuracy is measured.
DevRows = tuple[Parallel, Photos | None]


def scored_rows(
    folder: Path, config: StudentConfig, rows: dict[str, Parallel], progress: Progress
) -> dict[str, DevRows]:
    """The dev rows to evaluate on, with photos if accuracy selects the checkpoint.

    With `--select auto`, it does if every language has rows with a label and an image. Rows without
    are then skipped, with a note.

    Raises:
        DataError: `--select accuracy` without labels or images, or an image is missing.
    """
    images = _images_for_accuracy(folder, config, rows)
    if images is None:
        return {lang: (parallel, None) for lang, parallel in rows.items()}
    scored: dict[str, DevRows] = {}
    for lang, parallel in rows.items():
        has_both = _has_label_and_image(parallel.target)
        if num_others := int((~has_both).sum()):
            progress.note(
                f"{parallel.target.path}: dev metrics skip {num_others} rows without label or "
                "image."
            )
            parallel = parallel.take(np.flatnonzero(has_both))
        parallel = images.rows_with_image(parallel, config.skip_bad, progress)
        scored[lang] = parallel, Photos.of(parallel.target, images)
    return scored


def _images_for_accuracy(
    folder: Path, config: StudentConfig, rows: Mapping[str, Parallel]
) -> ImageFolder | None:
    if config.select not in ("auto", "accuracy"):
        return None
    is_needed = config.select == "accuracy"
    if not all(_has_label_and_image(parallel.target).any() for parallel in rows.values()):
        if is_needed:
            raise DataError(
                f"{folder}: --select accuracy needs dev rows with labels and images; "
                "--select mse needs only text."
            )
        return None
    try:
        return ImageFolder.of(folder, config.images)
    except DataError:
        if is_needed or config.images is not None:
            raise
        return None


def selection(config: StudentConfig, with_photos: bool) -> Selection:
    """The dev metric that selects the checkpoint."""
    if with_photos:
        return Selection("accuracy", "highest")
    text_metric = _TEXT_METRICS.get(config.objective, "mse")
    metric = text_metric if config.select == "auto" else config.select
    return Selection(metric, "lowest" if metric == "mse" else "highest")


def dev_sets(
    student: SentenceEncoder,
    teacher: ClipVE,
    rows: dict[str, DevRows],
    languages: Sequence[str],
    with_autocast: Autocast,
    progress: Progress,
) -> list[DevSet]:
    """Prepares the dev rows of each language; `languages` are the student's."""
    sets = []
    for lang, (parallel, photos) in rows.items():
        target = parallel.target
        sources, source_of_row = distinct(parallel.sources)
        vectors = sentence_embeddings(
            teacher.text,
            sources,
            autocast=with_autocast,
            description=f"{target.name}: teacher embeddings",
            progress=progress,
        )
        sentences = tokenize_sentences(student, target.hypotheses, target.where, progress)
        premises = None
        if photos is not None:
            premises = image_features(
                teacher.image, target, photos, autocast=with_autocast, progress=progress
            )
        labels = torch.from_numpy(target.labels.astype(np.int64))
        targets = Features(vectors, source_of_row)
        sets.append(DevSet(lang, lang in languages, sentences, targets, premises, labels))
    return sets


def evaluate_student(
    student: SentenceEncoder, teacher: ClipVE, dev_sets: Sequence[DevSet]
) -> dict[str, float]:
    """Dev metrics averaged over the student's languages, and `metric/language` if it has several.

    Errors are per dimension. `recall_at_10` retrieves the source sentence among at most a thousand,
    so that it can be compared across languages and data sets.
    """
    by_language = {dev.lang: _metrics(student, teacher, dev) for dev in dev_sets}
    averaged = [by_language[dev.lang] for dev in dev_sets if dev.is_averaged]
    metrics = {name: sum(one[name] for one in averaged) / len(averaged) for name in averaged[0]}
    if len(dev_sets) > 1:
        for lang, values in by_language.items():
            metrics |= {f"{name}/{lang}": value for name, value in values.items()}
    return metrics


def _metrics(student: SentenceEncoder, teacher: ClipVE, dev: DevSet) -> dict[str, float]:
    predicted = embed_rows(student, dev.sentences)  # (N, D)
    device = predicted.device
    target = dev.teacher.of_rows().to(device)
    variance, target_variance = (
        embeddings.var(dim=0, correction=0).sum().item() for embeddings in (predicted, target)
    )
    metrics = {
        "mse": (predicted - target).square().mean().item(),
        "mae": (predicted - target).abs().mean().item(),
        "cosine": functional.cosine_similarity(predicted, target).mean().item(),
        "recall_at_10": _recall(predicted, target, dev.teacher.index),
        # With a single sentence, the teacher's variance is 0, too.
        "variance_ratio": variance / target_variance if target_variance else 1.0,
    }
    if dev.premises is not None:
        logits = by_rows(teacher, predicted, dev.premises, teacher.rows_at_once)
        is_correct = logits.argmax(dim=1) == dev.labels.to(device)
        metrics["accuracy"] = is_correct.float().mean().item()
        metrics["temperature"] = fit_temperature(logits.float().cpu().numpy(), dev.labels.numpy())
    return metrics


def _recall(predicted: Tensor, target: Tensor, source_of_row: Rows) -> float:
    """The share of sentences whose source is among the ten nearest by cosine."""
    # One row for each source sentence: repetitions would tie.
    first = np.unique(source_of_row, return_index=True)[1][:_CANDIDATES]
    rows = torch.from_numpy(first).to(predicted.device)
    queries, candidates = (x[rows].float().cpu().numpy() for x in (predicted, target))
    is_source = np.eye(len(first), dtype=np.bool_)
    return float(rank(queries, candidates, lambda part: is_source[part]).within(_HIT_RANK).mean())


class CollapseWatch:
    """Ends a training whose student gives every sentence the same embedding.

    From random weights, a small student gives every sentence the mean embedding for some epochs.
    So only one that did better before, or that ends like this, has collapsed. `languages` names the
    student's in errors; with `may_collapse`, nothing is checked.
    """

    def __init__(self, languages: str, *, may_collapse: bool = False) -> None:
        self._languages = languages
        self._may_collapse = may_collapse
        self._varied: set[str] = set()

    def check(self, metrics: dict[str, float], *, at_the_end: bool = False) -> dict[str, float]:
        """Returns an epoch's metrics, or raises a TrainingError if the student has collapsed.

        `at_the_end`: its weights are those that are kept.
        """
        for name, ratio in metrics.items():
            metric, _, lang = name.partition("/")
            if metric != "variance_ratio" or self._may_collapse:
                continue
            if ratio >= _COLLAPSED:
                self._varied.add(lang)
            elif at_the_end or lang in self._varied or math.isnan(ratio):
                raise TrainingError(
                    f"{lang or self._languages}: the student gives every sentence the same "
                    f"embedding (variance {ratio:.1e} of the teacher's); lower --learning-rate or "
                    "raise --warmup-fraction."
                )
        return metrics


def _has_label_and_image(split: Split) -> npt.NDArray[np.bool_]:
    """(N,) whether each row has what accuracy needs."""
    mask: npt.NDArray[np.bool_] = (split.labels != UNLABELLED) & (split.image_index >= 0)
    return mask
