"""Embeddings and logits of the models, with the right photos and with shuffled ones.

N rows · D embedding width · C labels · G cells along a side of a photo
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from scipy.special import softmax
from torch import Tensor

from clseave_cli.core.config import EvaluateConfig, RetrieveConfig
from clseave_cli.core.data.heat_map import heat_map
from clseave_cli.core.data.images import Preparation
from clseave_cli.core.data.records import Split
from clseave_cli.core.evaluation.baselines import Rows, shuffled_rows
from clseave_cli.core.evaluation.comparison import rows_in_common
from clseave_cli.core.evaluation.results import Mode, Signature, result_key
from clseave_cli.core.features import by_rows, image_features, tokenize_sentences
from clseave_cli.core.models.calibration import Calibration
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import load_student
from clseave_cli.core.training.device import autocast, resolve_device, resolve_precision
from clseave_cli.errors import DataError, ModelError
from clseave_cli.progress import Progress
from clseave_cli.version import __version__


@dataclass(frozen=True)
class System:
    """A language and its reader."""

    lang: str  # language code
    mode: Mode  # `zero-shot` for the source language, too
    student: Path | None  # folder of the student; None: CLIP-VE itself reads it

    @property
    def key(self) -> str:
        """The key of its result."""
        return result_key(self.lang, self.mode)


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of one system for its rows."""

    system: System
    split: Split
    images: npt.NDArray[np.str_]  # (N,) name of each row's image: the unit of the bootstrap
    embeddings: npt.NDArray[np.float32]  # (N, D) of the hypotheses
    logits: npt.NDArray[np.float64]  # (N, C), finite, divided by the temperature
    shuffled_logits: npt.NDArray[np.float64]  # (N, C) with shuffled photos, not divided
    attention: npt.NDArray[np.float32] | None  # (N, G, G), of a head that sees patches
    calibration: Calibration  # of the language read
    preparation: Preparation | None  # maps cells to parts of the photo

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the predicted label is the gold label."""
        return self.is_gold(self.logits.argmax(axis=1))

    @property
    def unsure(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the answer is below its threshold."""
        return self.calibration.is_unsure(softmax(self.logits, axis=1))

    @property
    def shuffled_correct(self) -> npt.NDArray[np.bool_]:
        """(N,) the same with shuffled photos."""
        return self.is_gold(self.shuffled_logits.argmax(axis=1))

    def heat_map(self, row: int) -> Callable[[Image], Image] | None:
        """Draws the head's attention for a row over its photo; None if it sees no patches."""
        if self.attention is None:
            return None
        shares = self.attention[row]
        # The longest side in pixels makes the scale legible in the report.
        return lambda photo: heat_map(photo, shares, self.preparation, 320)

    def is_gold(self, predicted: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """(N,) whether `predicted` label ids (or one for all rows) are the gold labels."""
        correct: npt.NDArray[np.bool_] = np.asarray(predicted) == self.split.labels
        return correct


def shared_rows(
    first: Outputs, second: Outputs
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The numbers of the rows that both have, in the one and in the other; DataError if none."""
    rows, others = rows_in_common(first.split.pair_ids, second.split.pair_ids)
    if not len(rows):
        raise DataError(
            f"{first.split.path}: none of its pairIDs occurs in {second.split.path}; "
            "rows of two languages belong together by pairID."
        )
    return rows, others


def signature(config: EvaluateConfig | RetrieveConfig, folder: Path, **measured: Any) -> Signature:
    """The signature of an evaluation on the data in a folder, today."""
    device = resolve_device(config.device)
    return Signature(
        version=__version__,
        seed=config.seed,
        resamples=config.resamples,
        precision=resolve_precision(config.precision, device),
        device=device.type,
        dataset=config.data if config.data.startswith("hf:") else folder.resolve().name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        **measured,
    )


def run_systems(
    config: EvaluateConfig,
    clip_ve: Path,
    systems: Sequence[System],
    calibrations: Mapping[Path, Mapping[str, Calibration]],
    rows: Mapping[str, Rows],
    progress: Progress,
) -> dict[str, Outputs]:
    """Runs systems of the CLIP-VE in a folder on their rows; each model is loaded once.

    Calibrations are by model folder and language, rows and outputs by `System.key`. The outputs are
    in the order of `systems`.

    Raises:
        ModelError: a model is damaged, a student belongs to another CLIP-VE, or logits are NaN.
    """
    device = resolve_device(config.device)
    model = ClipVE.from_folder(clip_ve).to(device)
    outputs, premises, features = {}, {}, {}
    for system in systems:
        split = rows[system.key].split
        # Files with the same images in the same order share one look-up.
        images_of_rows = tuple(split.image_names), split.image_index.tobytes()
        if images_of_rows not in features:
            photos, arithmetic = rows[system.key].photos, autocast(config.precision, device)
            features[images_of_rows] = image_features(
                model.image, split, photos, autocast=arithmetic, progress=progress
            )
        premises[system.key] = features[images_of_rows]
    # One student in memory at a time.
    for student in dict.fromkeys(system.student for system in systems):
        encoder = model.text
        if student is not None:
            encoder = load_student(student, model.fingerprint).to(device)
        for system in (system for system in systems if system.student == student):
            split, premise = rows[system.key].split, premises[system.key]
            names = np.array(split.image_names)[split.image_index]
            shuffled = replace(premise, index=premise.index[shuffled_rows(names, config.seed)])
            attention = None
            with torch.no_grad():
                embeddings = _embed(config, encoder, system.key, rows[system.key], progress)
                logits, shuffled_logits = (
                    by_rows(model, embeddings, photos, model.rows_at_once)
                    for photos in (premise, shuffled)
                )
                if model.image.patch_grid:
                    attend = model.head.attention
                    attention = by_rows(attend, embeddings, premise, model.rows_at_once)
            folder = student or clip_ve
            calibration = calibrations[folder].get(rows[system.key].lang, Calibration())
            outputs[system.key] = Outputs(
                system,
                split,
                names,
                embeddings.cpu().numpy(),
                _finite(logits, folder, split) / calibration.temperature,
                _finite(shuffled_logits, folder, split),
                None if attention is None else attention.cpu().numpy(),
                calibration,
                model.image.preparation,
            )
    return {system.key: outputs[system.key] for system in systems}


def _embed(
    config: EvaluateConfig, encoder: SentenceEncoder, name: str, rows: Rows, progress: Progress
) -> Tensor:
    """(N, D) embeddings of the hypotheses; each distinct sentence is embedded once."""
    sentences = tokenize_sentences(encoder, rows.hypotheses, rows.split.where, progress)
    embedded = []
    with (
        autocast(config.precision, encoder.device)(),
        progress.task(f"{name}: sentences", len(sentences.tokens)) as task,
    ):
        for part in encoder.embed(sentences.tokens, config.batch_size):
            embedded.append(part.float())
            task.advance(len(part))
    return torch.cat(embedded)[torch.from_numpy(sentences.index)]


def _finite(logits: Tensor, model: Path, split: Split) -> npt.NDArray[np.float64]:
    """(N, C) logits on the CPU, or ModelError if some are NaN or infinite."""
    values: npt.NDArray[np.float64] = logits.double().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ModelError(
            f"{model}: gives NaN or infinite logits for {len(bad)} of {len(values)} rows, first "
            f"for {split.where(int(bad[0]))}; its weights are damaged or its training diverged. "
            "Train it again; if it was trained well, try --precision fp32."
        )
    return values
