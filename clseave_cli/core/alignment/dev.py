"""How good a student is on the dev rows, language by language.

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

#: A student whose embeddings vary less than this share of the teacher's says the same to all.
_COLLAPSED = 1e-3
#: Dev sentences that retrieval chooses among (P at most), and how many answers it may give.
_RETRIEVED_AMONG, _ANSWERS = 1000, 10

#: Without images: the metric an objective is about. Of embeddings that are only turned the right
#: way, and not brought to the teacher's length, the squared error says nothing.
_TEXT_SELECTION = {
    "mse": Selection("mse", "lowest"),
    "mse+cosine": Selection("mse", "lowest"),
    "cosine": Selection("cosine", "highest"),
    "contrastive": Selection("recall_at_10", "highest"),
}


@dataclass(frozen=True, eq=False)
class DevSet:
    """One language's dev rows: what the teacher says, and what the labels are where there are any.

    Attributes:
        lang: the language.
        counts: whether it is one of the student's, so that its metrics count in choosing.
        sentences: of the rows, tokenised for the student.
        teacher: (N, D) the teacher's embeddings of the source sentences.
        premises: features of the rows' images, where accuracy is measured.
        labels: (N,) int64 ids of `labels.LABELS`.
    """

    lang: str
    counts: bool
    sentences: Sentences
    teacher: Features
    premises: Features | None
    labels: Tensor


#: The dev rows of a language, and their photos where accuracy is measured.
DevRows = tuple[Parallel, Photos | None]


def judged_rows(
    folder: Path, config: StudentConfig, rows: dict[str, Parallel], progress: Progress
) -> dict[str, DevRows]:
    """The rows to judge a student on, with photos if dev accuracy shall choose, or can (`auto`).

    Args:
        folder: the data folder.
        config: what shall choose, and where the photos are.
        rows: by language; with photos, only those that have a label and an image are returned.
        progress: told how many the others are.

    Raises:
        DataError: accuracy was asked for, and rows or images do not allow it; or an image is
            missing.
    """
    images = _images_for_accuracy(folder, config, rows)
    if images is None:
        return {lang: (parallel, None) for lang, parallel in rows.items()}
    judged: dict[str, DevRows] = {}
    for lang, parallel in rows.items():
        can_be_judged = _can_be_judged(parallel.target)
        if num_others := int((~can_be_judged).sum()):
            progress.note(
                f"{parallel.target.path}: {num_others} rows without label or image; the dev "
                "metrics leave them out."
            )
            parallel = parallel.take(np.flatnonzero(can_be_judged))
        parallel = images.rows_with_image(parallel, config.skip_bad, progress)
        judged[lang] = parallel, Photos.of(parallel.target, images)
    return judged


def _images_for_accuracy(
    folder: Path, config: StudentConfig, rows: Mapping[str, Parallel]
) -> ImageFolder | None:
    if config.select not in ("auto", "accuracy"):
        return None
    is_needed = config.select == "accuracy"
    if not all(_can_be_judged(parallel.target).any() for parallel in rows.values()):
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
    """The dev metric that chooses the checkpoint."""
    if with_photos:
        return Selection("accuracy", "highest")
    if config.select == "auto":
        return _TEXT_SELECTION[config.objective]
    return Selection(config.select, "lowest" if config.select == "mse" else "highest")


def dev_sets(
    student: SentenceEncoder,
    teacher: ClipVE,
    rows: dict[str, DevRows],
    languages: Sequence[str],
    with_autocast: Autocast,
    progress: Progress,
) -> list[DevSet]:
    """Prepares the dev rows of each language; `languages` are the student's."""
    prepared = []
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
        wanted = Features(vectors, source_of_row)
        prepared.append(DevSet(lang, lang in languages, sentences, wanted, premises, labels))
    return prepared


def evaluate_student(
    student: SentenceEncoder, teacher: ClipVE, dev_sets: Sequence[DevSet]
) -> dict[str, float]:
    """Dev metrics, averaged over the student's languages; of several, also `metric/language`.

    Errors are per dimension, and `recall_at_10` is retrieval of the source sentence among at most
    a thousand, so that languages and sizes of data can be compared.
    """
    by_language = {dev.lang: _metrics(student, teacher, dev) for dev in dev_sets}
    counted = [by_language[dev.lang] for dev in dev_sets if dev.counts]
    metrics = {name: sum(one[name] for one in counted) / len(counted) for name in counted[0]}
    if len(dev_sets) > 1:
        for lang, of_language in by_language.items():
            metrics |= {f"{name}/{lang}": value for name, value in of_language.items()}
    return metrics


def _metrics(student: SentenceEncoder, teacher: ClipVE, dev: DevSet) -> dict[str, float]:
    predicted = embed_rows(student, dev.sentences)  # (N, D)
    device = predicted.device
    wanted = dev.teacher.of_rows().to(device)
    variance, wanted_variance = (
        embeddings.var(dim=0, correction=0).sum().item() for embeddings in (predicted, wanted)
    )
    metrics = {
        "mse": (predicted - wanted).square().mean().item(),
        "mae": (predicted - wanted).abs().mean().item(),
        "cosine": functional.cosine_similarity(predicted, wanted).mean().item(),
        "recall_at_10": _recall(predicted, wanted, dev.teacher.index),
        # Of a single sentence the teacher has no spread either, so there is none to lose.
        "variance_ratio": variance / wanted_variance if wanted_variance else 1.0,
    }
    if dev.premises is not None:
        logits = by_rows(teacher, predicted, dev.premises, teacher.rows_at_once)
        right = logits.argmax(dim=1) == dev.labels.to(device)
        metrics["accuracy"] = right.float().mean().item()
        metrics["temperature"] = fit_temperature(logits.float().cpu().numpy(), dev.labels.numpy())
    return metrics


def _recall(predicted: Tensor, wanted: Tensor, source_of_row: Rows) -> float:
    """Share of sentences whose own source is among the nearest ten by cosine."""
    # Each source sentence once: its repetitions would be equally near.
    first = np.unique(source_of_row, return_index=True)[1][:_RETRIEVED_AMONG]
    rows = torch.from_numpy(first).to(predicted.device)
    embeddings, targets = (x[rows].float().cpu().numpy() for x in (predicted, wanted))
    own = np.eye(len(first), dtype=np.bool_)
    return float(rank(embeddings, targets, lambda part: own[part]).within(_ANSWERS).mean())


class CollapseWatch:
    """Tells a student that has collapsed from one that has not spread out yet.

    From random weights a student first gives every sentence the mean of all embeddings, for some
    epochs if it is small. Only one that did better before, or that ends so, has collapsed.

    Args:
        languages: whose metrics these are where no language is named with them.
        may_collapse: whether nothing is to be said, because the loss never sees the embeddings.
    """

    def __init__(self, languages: str, *, may_collapse: bool = False) -> None:
        self._languages = languages
        self._may_collapse = may_collapse
        self._spread: set[str] = set()

    def during(self, metrics: dict[str, float], *, at_the_end: bool = False) -> dict[str, float]:
        """Passes the metrics of an epoch on.

        Args:
            metrics: of the epoch.
            at_the_end: its weights are those that are kept.

        Raises:
            TrainingError: the student says the same to all sentences now, and did not before or
                will not learn better, or nothing that is a number.
        """
        for name, ratio in metrics.items():
            metric, _, lang = name.partition("/")
            if metric != "variance_ratio" or self._may_collapse:
                continue
            if ratio >= _COLLAPSED:
                self._spread.add(lang)
            elif at_the_end or lang in self._spread or math.isnan(ratio):
                raise TrainingError(
                    f"{lang or self._languages}: the student gives every sentence the same "
                    f"embedding (variance {ratio:.1e} of the teacher's); lower --learning-rate or "
                    "raise --warmup-fraction."
                )
        return metrics


def _can_be_judged(split: Split) -> npt.NDArray[np.bool_]:
    """Which rows have both a label and an image, so that accuracy can be measured on them."""
    judged: npt.NDArray[np.bool_] = (split.labels != UNLABELLED) & (split.image_index >= 0)
    return judged
