"""`evaluate`: how good the models are, in every language, and whether they look at the photo.

Legend: N rows · D embedding width · C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clseave_cli import __version__
from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import (
    ENGLISH,
    Split,
    check_leak,
    languages,
    read_split,
    require_language,
    require_split_path,
    split_path,
)
from clseave_cli.core.features import image_features, tokenize_sentences
from clseave_cli.core.linguistics import analyse_distances
from clseave_cli.core.metrics.baselines import (
    majority_label,
    predict_from_hypotheses,
    shuffled_rows,
)
from clseave_cli.core.metrics.bootstrap import compare_predictions
from clseave_cli.core.metrics.classification import agreement, probabilities, score
from clseave_cli.core.metrics.transfer import measure_transfer
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import find_students, load_student
from clseave_cli.core.progress import SILENT, Progress
from clseave_cli.core.reporting.curves import read_learning_curve
from clseave_cli.core.reporting.gallery import (
    Gallery,
    GalleryEntry,
    GalleryItem,
    most_confident_errors,
)
from clseave_cli.core.reporting.report import write_report
from clseave_cli.core.results import Baselines, LanguageResult, Results, Signature
from clseave_cli.core.rows import PredictedRows
from clseave_cli.core.training.precision import autocast, resolve_device
from clseave_cli.errors import DataError, ModelError
from clseave_cli.labels import LABELS

_EXAMPLES = 8


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What the models say of one language's rows."""

    split: Split
    embeddings: npt.NDArray[np.float32]  # (N, D)
    premises: npt.NDArray[np.float32]  # (N, D)
    logits: npt.NDArray[np.float32]  # (N, C)
    row_of_pair: dict[str, int]

    @property
    def images(self) -> npt.NDArray[np.str_]:
        """(N,) name of each row's image: the unit of the bootstrap."""
        return np.array(self.split.image_names)[self.split.image_index]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the row's label was found."""
        correct: npt.NDArray[np.bool_] = self.logits.argmax(axis=1) == self.split.labels
        return correct


def evaluate(config: EvaluateConfig, progress: Progress = SILENT) -> Results:
    """Evaluates the English model and the students under `config.runs`.

    Each language's rows are compared with the English model's on the rows that share a `pairID`.
    Where `config.report` is set, the report is written there.

    Raises:
        ClseaveError: bad data, or a model that is missing, damaged, or of another teacher.
    """
    device = resolve_device(config.device)
    folder = data_folder(config.data, progress)
    model_folders = _models(config, folder, progress)
    images = ImageFolder.of(folder, config.images)
    model = ClipVE.from_folder(config.runs / "clip-ve").to(device)
    checkpoints = {"clip-ve": model.fingerprint}
    outputs: dict[str, _Outputs] = {}
    for lang, student_folder in model_folders.items():
        encoder = model.text
        if student_folder is not None:
            encoder = load_student(student_folder, model.fingerprint).to(device)
            checkpoints[student_folder.name] = encoder.fingerprint
        split = read_split(folder, config.split, lang, skip_bad=config.skip_bad, progress=progress)
        outputs[lang] = _run(config, model, encoder, split, images, progress)

    results, baselines = [], {}
    for lang, own in outputs.items():
        baselines[lang], hypothesis_only = _baselines(config, folder, model, own)
        results.append(_language_result(config, own, outputs.get(ENGLISH), hypothesis_only))
    document = Results(
        results=tuple(results),
        baselines=baselines,
        signature=Signature(
            version=__version__,
            data={own.split.path.name: own.split.digest for own in outputs.values()},
            checkpoints=checkpoints,
            seed=config.seed,
            resamples=config.resamples,
            num_examples=max(len(own.split) for own in outputs.values()),
        ),
        distances=analyse_distances({result.lang: result.accuracy for result in results}),
    )
    if config.report is not None:
        curves = [
            curve
            for name in ("clip", *checkpoints)
            if (curve := read_learning_curve(config.runs / name)) is not None
        ]
        galleries = [_examples(outputs, images), _errors(outputs, images)]
        for own in outputs.values():
            _predicted_rows(own).write(config.report)
        write_report(document, config.report, curves=curves, galleries=galleries)
    return document


def _models(config: EvaluateConfig, folder: Path, progress: Progress) -> dict[str, Path | None]:
    """The student folder per language to evaluate; None for English, the teacher's own."""
    students = find_students(config.runs)
    if config.lang:
        for lang in config.lang:
            require_language(lang)
            require_split_path(folder, config.split, lang)
            if lang != ENGLISH and lang not in students:
                known = ", ".join([ENGLISH, *students])
                raise ModelError(
                    f"{config.runs}: no student for {lang} (there are models for {known}); "
                    f"`clseave align --lang {lang}` makes one."
                )
        wanted = list(dict.fromkeys(config.lang))
    else:
        require_split_path(folder, config.split, ENGLISH)
        there = languages(folder, config.split)
        wanted = [lang for lang in there if lang == ENGLISH or lang in students]
        without = [lang for lang in there if lang not in wanted]
        if without:
            progress.note(
                f"{config.runs}: no student for {', '.join(without)}; `clseave align --lang "
                f"{without[0]}` makes one."
            )
    return {lang: None if lang == ENGLISH else students[lang] for lang in wanted}


def _run(
    config: EvaluateConfig,
    model: ClipVE,
    encoder: SentenceEncoder,
    split: Split,
    images: ImageFolder,
    progress: Progress,
) -> _Outputs:
    """Embeds each distinct sentence once, looks the images up, and scores the rows."""
    device = encoder.device
    with_autocast = autocast(config.precision, device)
    features = image_features(model.image, split, images, autocast=with_autocast, progress=progress)
    sentences = tokenize_sentences(encoder, split.hypotheses, split.where, progress)
    embedded = []
    with (
        torch.no_grad(),
        with_autocast(),
        progress.task(f"{split.lang}: sentences", len(sentences.tokens)) as task,
    ):
        for part in encoder.embed(sentences.tokens, config.batch_size):
            embedded.append(part.float())
            task.advance(len(part))
    embeddings = torch.cat(embedded)[torch.from_numpy(sentences.index)]
    premises = features.of_rows().to(device)
    with torch.no_grad():
        logits = model(embeddings, premises)
    return _Outputs(
        split,
        embeddings.cpu().numpy(),
        premises.cpu().numpy(),
        logits.cpu().numpy(),
        {pair_id: row for row, pair_id in enumerate(split.pair_ids)},
    )


def _baselines(
    config: EvaluateConfig, folder: Path, model: ClipVE, own: _Outputs
) -> tuple[Baselines, npt.NDArray[np.int64] | None]:
    """What is reached without looking, and what the hypothesis-only classifier says."""
    labels = own.split.labels
    shuffled = own.premises[shuffled_rows(own.images, config.seed)]
    device = model.text.device
    with torch.no_grad():
        logits = model(
            torch.from_numpy(own.embeddings).to(device), torch.from_numpy(shuffled).to(device)
        )
    shuffled_accuracy = float((logits.argmax(dim=1).cpu().numpy() == labels).mean())
    if split_path(folder, config.train_split, own.split.lang) is None:
        return Baselines(shuffled_image=shuffled_accuracy), None
    training = read_split(
        folder, config.train_split, own.split.lang, with_images=False, skip_bad=config.skip_bad
    )
    if not config.allow_leak and config.train_split != config.split:
        check_leak(training, own.split)
    guesses = predict_from_hypotheses(training.hypotheses, training.labels, own.split.hypotheses)
    return (
        Baselines(
            majority=float((labels == majority_label(training.labels)).mean()),
            hypothesis_only=float((guesses == labels).mean()),
            shuffled_image=shuffled_accuracy,
        ),
        guesses,
    )


def _language_result(
    config: EvaluateConfig,
    own: _Outputs,
    english: _Outputs | None,
    hypothesis_only: npt.NDArray[np.int64] | None,
) -> LanguageResult:
    more: dict[str, Any] = {}
    if hypothesis_only is not None:
        hard = hypothesis_only != own.split.labels
        more["num_hard"] = int(hard.sum())
        more["hard_accuracy"] = float(own.correct[hard].mean()) if hard.any() else None
    if english is not None:
        more |= _against_english(config, own, english)
    scores = score(
        own.split.labels, own.logits, own.images, resamples=config.resamples, seed=config.seed
    )
    return LanguageResult.from_scores(scores, lang=own.split.lang, split=own.split.name, **more)


def _against_english(config: EvaluateConfig, own: _Outputs, english: _Outputs) -> dict[str, Any]:
    """Paired figures on the rows that both languages have."""
    shared = [pair_id for pair_id in own.split.pair_ids if pair_id in english.row_of_pair]
    if not shared:
        raise DataError(
            f"{own.split.path}: none of its pairIDs occurs in {english.split.path}; "
            "rows of two languages belong together by pairID."
        )
    ours = np.array([own.row_of_pair[pair_id] for pair_id in shared])
    theirs = np.array([english.row_of_pair[pair_id] for pair_id in shared])
    accuracy, english_accuracy = own.correct[ours].mean(), english.correct[theirs].mean()
    figures: dict[str, Any] = {
        "ratio_to_english": float(accuracy / english_accuracy) if english_accuracy else None,
        "agreement_with_english": agreement(own.logits[ours], english.logits[theirs]),
    }
    if own is not english:
        figures["difference_to_english"] = compare_predictions(
            own.correct[ours],
            english.correct[theirs],
            own.images[ours],
            resamples=config.resamples,
            seed=config.seed,
        )
        figures["transfer"] = measure_transfer(
            own.embeddings[ours],
            english.embeddings[theirs],
            np.array([english.split.hypotheses[row] for row in theirs]),
        )
    return figures


def _predicted_rows(own: _Outputs) -> PredictedRows:
    return PredictedRows(
        lang=own.split.lang,
        pair_ids=own.split.pair_ids,
        images=own.images.tolist(),
        labels=own.split.labels.astype(np.int64),
        probabilities=probabilities(own.logits),
    )


def _examples(outputs: dict[str, _Outputs], images: ImageFolder) -> Gallery:
    """A few rows with what every language's model says of them, all labels in turn."""
    first = next(iter(outputs.values()))
    everywhere = [
        row
        for row, pair_id in enumerate(first.split.pair_ids)
        if all(pair_id in own.row_of_pair for own in outputs.values())
    ]
    chosen: list[int] = []
    seen: set[str] = set()
    for row in sorted(everywhere, key=lambda r: (r * 2654435761) % 2**32):
        name, label = first.images[row], first.split.labels[row]
        if name not in seen and label == len(chosen) % len(LABELS):
            chosen.append(row)
            seen.add(name)
        if len(chosen) == _EXAMPLES:
            break
    items = [
        GalleryItem(
            str(first.images[row]),
            images.find(str(first.images[row]), first.split.where(row)),
            tuple(
                _entry(own, own.row_of_pair[first.split.pair_ids[row]]) for own in outputs.values()
            ),
        )
        for row in chosen
    ]
    return Gallery(
        "The same pictures in every language",
        "One hypothesis about each picture, in every language evaluated, with the verdicts.",
        tuple(items),
    )


def _errors(outputs: dict[str, _Outputs], images: ImageFolder) -> Gallery:
    """The most confident errors of the first language, usually English."""
    own = next(iter(outputs.values()))
    rows = most_confident_errors(own.split.labels, probabilities(own.logits), own.images)
    return Gallery(
        "The most confident errors",
        f"Where the {own.split.lang} model is wrong and surest of it; one a picture.",
        tuple(
            GalleryItem(
                str(own.images[row]),
                images.find(str(own.images[row]), own.split.where(row)),
                (_entry(own, row),),
            )
            for row in rows.tolist()
        ),
    )


def _entry(own: _Outputs, row: int) -> GalleryEntry:
    return GalleryEntry(
        lang=own.split.lang,
        hypothesis=own.split.hypotheses[row],
        label=LABELS[own.split.labels[row]],
        predicted=LABELS[int(own.logits[row].argmax())],
        probabilities=tuple(probabilities(own.logits[row : row + 1])[0].tolist()),
    )
