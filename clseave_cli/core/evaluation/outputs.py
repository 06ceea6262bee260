"""What the models say of the rows: their embeddings and logits, with and without the right photo.

N rows · D embedding width · C labels · G cells along a side of a photo
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from scipy.special import softmax
from torch import Tensor

from clseave_cli.core.config import EvaluateConfig
from clseave_cli.core.data.heat_map import heat_map
from clseave_cli.core.data.images import Preparation
from clseave_cli.core.data.records import Split
from clseave_cli.core.evaluation.baselines import Rows, shuffled_rows
from clseave_cli.core.evaluation.comparison import rows_in_common
from clseave_cli.core.evaluation.results import Mode, result_key
from clseave_cli.core.features import by_rows, image_features, tokenize_sentences
from clseave_cli.core.models.calibration import Calibration, read_calibrations
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.student import load_student
from clseave_cli.core.training.device import autocast, resolve_device
from clseave_cli.errors import DataError, ModelError
from clseave_cli.progress import SILENT, Progress

#: Longest side of a photo under a heat map: so that its scale can be read in the report.
_HEAT_MAP_PIXELS = 320


@dataclass(frozen=True)
class System:
    """One thing to evaluate: a language, and how it is read."""

    lang: str  # language code
    mode: Mode  # `zero-shot` for the source language, too
    student: Path | None  # folder of the student; None: CLIP-VE itself reads it

    @property
    def key(self) -> str:
        """What names its result among the others."""
        return result_key(self.lang, self.mode)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What one system says of its rows."""

    system: System  # what was evaluated
    split: Split  # the rows
    images: npt.NDArray[np.str_]  # (N,) name of each row's image: the unit of the bootstrap
    embeddings: npt.NDArray[np.float32]  # (N, D) of the hypotheses
    logits: npt.NDArray[np.float64]  # (N, C), finite, divided by the temperature
    # (N, C) with every row's photo exchanged for another row's.
    shuffled_logits: npt.NDArray[np.float64]  # not divided
    # (N, G, G) shares of the cells of each photo, of a head that sees patches.
    attention: npt.NDArray[np.float32] | None
    calibration: Calibration  # temperature and thresholds of the language read
    preparation: Preparation | None  # says which part of a photo the cells cover

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the predicted label is the gold label."""
        return self.is_gold(self.logits.argmax(axis=1))

    @property
    def unsure(self) -> npt.NDArray[np.bool_]:
        """(N,) whether the answer stays below its threshold, where there is one."""
        return self.calibration.is_unsure(softmax(self.logits, axis=1))

    @property
    def shuffled_correct(self) -> npt.NDArray[np.bool_]:
        """(N,) the same with every row's photo exchanged for another row's."""
        return self.is_gold(self.shuffled_logits.argmax(axis=1))

    def looked(self, row: int) -> Callable[[Image], Image] | None:
        """Draws where the head looked for a row over its picture; None: it sees no patches."""
        if self.attention is None:
            return None
        shares = self.attention[row]
        return lambda picture: heat_map(picture, shares, self.preparation, _HEAT_MAP_PIXELS)

    def is_gold(self, predicted: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """(N,) whether `predicted` label ids (or one for all rows) are the gold labels."""
        correct: npt.NDArray[np.bool_] = np.asarray(predicted) == self.split.labels
        return correct


def shared_rows(
    first: Outputs, second: Outputs
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The rows that both have, by number in the one and in the other.

    Raises:
        DataError: there are none.
    """
    rows, others = rows_in_common(first.split.pair_ids, second.split.pair_ids)
    if not len(rows):
        raise DataError(
            f"{first.split.path}: none of its pairIDs occurs in {second.split.path}; "
            "rows of two languages belong together by pairID."
        )
    return rows, others


def run_systems(
    config: EvaluateConfig,
    clip_ve: Path,
    systems: Sequence[System],
    rows: Mapping[str, Rows],
    progress: Progress = SILENT,
) -> dict[str, Outputs]:
    """Runs systems of the CLIP-VE in a folder on their rows; each model is loaded once.

    Rows and outputs are by `System.key`, the outputs in the order of `systems`.

    Raises:
        ModelError: a model is damaged, a student belongs to another CLIP-VE, or logits are NaN.
    """
    folders = {system.student or clip_ve for system in systems}
    calibrations = {folder: read_calibrations(folder) for folder in folders}
    model = ClipVE.from_folder(clip_ve).to(resolve_device(config.device))
    outputs, premises, features = {}, {}, {}
    for system in systems:
        split = rows[system.key].split
        # Several files name the same images in the same order: they are looked up once.
        images_of_rows = tuple(split.image_names), split.image_index.tobytes()
        if images_of_rows not in features:
            features[images_of_rows] = image_features(
                model.image,
                split,
                rows[system.key].photos,
                autocast=autocast(config.precision, model.image.device),
                progress=progress,
            )
        premises[system.key] = features[images_of_rows]
    # One student in memory at a time, whatever the order of its languages.
    for student in dict.fromkeys(system.student for system in systems):
        encoder = model.text
        if student is not None:
            encoder = load_student(student, model.fingerprint).to(model.text.device)
        for system in (system for system in systems if system.student == student):
            split, photos = rows[system.key].split, premises[system.key]
            names = np.array(split.image_names)[split.image_index]
            others = replace(photos, index=photos.index[shuffled_rows(names, config.seed)])
            attention = None
            with torch.no_grad():
                embeddings = _embed(config, encoder, system.key, rows[system.key], progress)
                logits, shuffled_logits = (
                    by_rows(model, embeddings, shown, model.rows_at_once)
                    for shown in (photos, others)
                )
                if model.image.patch_grid:
                    looks = model.head.attention
                    attention = by_rows(looks, embeddings, photos, model.rows_at_once)
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
    """(N, C) logits on the CPU.

    Raises:
        ModelError: some are NaN or infinite: a label computed from them would mean nothing.
    """
    values: npt.NDArray[np.float64] = logits.double().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ModelError(
            f"{model}: gives NaN or infinite logits for {len(bad)} of {len(values)} rows, first "
            f"for {split.where(int(bad[0]))}; its weights are damaged or its training diverged. "
            "Train it again; if it was trained well, try --precision fp32."
        )
    return values
