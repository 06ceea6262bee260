"""`calibrate`: temperatures, and thresholds that keep a promised precision.

Photos are independent, rows of a photo are not. So the evidence for a threshold is gathered photo
by photo.

N rows · G photos · L thresholds · B bets
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from clseave_cli.core.config import CalibrateConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import Split
from clseave_cli.core.data.seen import UNSEEN
from clseave_cli.core.evaluation.baselines import Rows
from clseave_cli.core.evaluation.metrics import probabilities
from clseave_cli.core.evaluation.outputs import Outputs, run_systems
from clseave_cli.core.evaluation.run import check_models, labelled_rows, systems_of
from clseave_cli.core.features import Photos
from clseave_cli.core.files import json_object, locked_target
from clseave_cli.core.models.calibration import (
    Calibration,
    fit_temperature,
    read_calibrations,
    write_calibrations,
)
from clseave_cli.core.models.clip_ve import source_language
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

#: Probability that a promise is wrong.
DELTA = 0.05

# Shares of the capital to bet: large ones need few errors, small ones many rows.
_BETS = np.array([0.25, 0.5, 1.0])[:, None, None]
_ALL = "all"  # labels together


@dataclass(frozen=True)
class Threshold:
    """The least probability of an answer, and its effect on the rows it was set on."""

    least: float | None  # None: the rows do not support the promise
    coverage: float  # share of the answers that are given
    accuracy: float  # share of the given answers that are right
    num_photos: int
    num_needed: int | None = None  # photos that would suffice, roughly; None: no number would


def find_threshold(
    confidence: npt.ArrayLike,
    correct: npt.ArrayLike,
    images: npt.ArrayLike,
    precision: float,
    delta: float = DELTA,
) -> Threshold:
    """The lowest threshold above which at least a share `precision` of the answers is right.

    This holds with probability 1 − `delta` over the choice of photos, for a random photo and one of
    its rows. `confidence` (N,) is the probability of each answer, below 0 for answers to ignore;
    `correct` (N,) whether it is right.

    The hypothesis that a threshold answers rightly less often is tested by betting against it, a
    photo at a time. With α = 1 − `precision`, let x be a photo's mean of (wrong − α) over its rows,
    0 for rows without an answer. Under the hypothesis E x ≥ 0, so the mean over ν of Π (1 − ν x)
    has an expectation of at most 1, and its inverse is a p-value (Waudby-Smith and Ramdas,
    "Estimating means of bounded random variables by betting", 2024, section 4). Thresholds are
    tested from high to low until one fails, from two starts that share `delta`: fixed-sequence
    testing of Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021).
    """
    p_answer, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    _, photo, sizes = np.unique(np.asarray(images), return_inverse=True, return_counts=True)
    starts = {(1 + precision) / 2: 0.2 * delta, precision: 0.8 * delta}
    below = np.linspace(precision, 1 / len(LABELS), 40)
    thresholds = np.array([max(starts), *below])
    order = np.argsort(photo, kind="stable")
    excess = (precision - right[order])[:, None] * (p_answer[order, None] >= thresholds)  # (N, L)
    # Over all rows: among answers alone, one more wrong answer would lower its own weight.
    means = np.add.reduceat(excess, np.cumsum(sizes) - sizes) / sizes[:, None]  # (G, L)
    gains = np.log1p(-_BETS * means).sum(axis=1)  # (B, L)
    evidence = logsumexp(gains, axis=0) - math.log(len(_BETS))
    level, least = 0.0, None
    for threshold, log_evidence in zip(thresholds.tolist(), evidence.tolist(), strict=True):
        level += starts.get(threshold, 0.0)
        if level and log_evidence >= -math.log(level):
            least = threshold
        else:
            level = 0.0
    answered, needed = p_answer >= (precision if least is None else least), None
    if least is None and gains.max() > 0:
        share = math.log(len(_BETS) / starts[precision]) / gains.max()
        needed = max(len(sizes) + 1, math.ceil(share * len(sizes)))
    coverage = answered.sum() / max(1, (p_answer >= 0).sum())
    accuracy = right[answered].sum() / max(1, answered.sum())
    return Threshold(least, float(coverage), float(accuracy), len(sizes), needed)


@dataclass(frozen=True)
class Calibrated:
    """The calibration of one language."""

    lang: str
    folder: Path  # of the model that reads it
    temperature: float
    thresholds: dict[str, Threshold]  # by label, or under `all`; empty without a promise

    def store(self, precision: float | None) -> None:
        """Writes it into the model's folder."""
        least = {name: t.least or 0.0 for name, t in self.thresholds.items()}
        if _ALL in least:
            least = dict.fromkeys(LABELS, least[_ALL])
        with locked_target(self.folder):
            new = {self.lang: Calibration(self.temperature, least, precision)}
            write_calibrations(self.folder, read_calibrations(self.folder) | new)


def calibrate(config: CalibrateConfig, progress: Progress = SILENT) -> list[Calibrated]:
    """Fits a temperature and, to promise a precision, thresholds for each language.

    They are stored in the models' folders and replace earlier ones of these languages.

    Raises:
        ClseaveError: bad options or rows, rows that a model was trained on, too few photos for the
            promise, or a bad model; then nothing is stored. Bad input of any folder is refused
            before a model runs.
    """
    if config.label and config.promise is None:
        raise UsageError("--label goes with --precision.")
    if unknown := set(config.label) - set(LABELS):
        raise UsageError(f"--label {min(unknown)}: expected {', '.join(LABELS)}.")
    folder = data_folder(config.data, progress)
    images = ImageFolder.of(folder, config.images)
    systems = [
        systems_of(config, runs, source_language(runs / "clip-ve"), folder, progress)
        for runs in config.runs
    ]
    calibrations = check_models(config.runs, systems)
    rows: dict[str, Rows] = {}
    levels: dict[tuple[Path, str], float] = {}
    for runs, of_folder in zip(config.runs, systems, strict=True):
        for system in of_folder:
            if system.key not in rows:
                split = labelled_rows(config, folder, system.lang, images, progress)
                unseen, photos = np.full(len(split), UNSEEN, np.int8), Photos.of(split, images)
                rows[system.key] = Rows(split, system.lang, split.hypotheses, photos, unseen)
            levels[runs, system.key] = DELTA
            for model in {runs / "clip-ve", system.student or runs / "clip-ve"}:
                levels[runs, system.key] /= _num_checkpoints(model, rows[system.key].split)
    calibrated = []
    for runs, of_folder in zip(config.runs, systems, strict=True):
        clip_ve = runs / "clip-ve"
        models = clip_ve, of_folder, calibrations
        for key, outputs in run_systems(config, *models, rows, progress).items():
            model = outputs.system.student or clip_ve
            calibrated.append(_calibrated(config, outputs, model, levels[runs, key]))
    if problems := [
        f"{each.lang}, {name} answers: {t.num_photos:,} photos, "
        + (f"about {t.num_needed:,} would do" if t.num_needed else "more would not help")
        for each in calibrated
        for name, t in each.thresholds.items()
        if t.least is None
    ]:
        raise DataError(
            f"--precision {config.promise:g}: the {config.split} split cannot support it; nothing "
            f"was stored. {'; '.join(problems)}. Lower --precision, or leave languages out."
        )
    for each in calibrated:
        each.store(config.promise)
    return calibrated


def _calibrated(config: CalibrateConfig, outputs: Outputs, model: Path, delta: float) -> Calibrated:
    split, logits = outputs.split, outputs.logits * outputs.calibration.temperature
    temperature = fit_temperature(logits, split.labels)
    p, thresholds = probabilities(logits / temperature), {}
    predicted, answers = np.array(LABELS)[p.argmax(axis=1)], (outputs.correct, outputs.images)
    if config.promise is not None:
        for name in config.label or (_ALL,):
            confidence = np.where((predicted == name) | (name == _ALL), p.max(axis=1), -1.0)
            thresholds[name] = find_threshold(confidence, *answers, config.promise, delta)
    return Calibrated(split.lang, model, temperature, thresholds)


def _num_checkpoints(model: Path, split: Split) -> int:
    """The number of checkpoints that the rows chose from; DataError if a model learnt from them."""
    record = json_object(model / "training" / "run.json")
    if split.digest not in record.get("inputs", {}).values():
        return 1
    if split.name == record["options"]["train_split"]:
        raise DataError(
            f"{split.path}: {model} was trained on these rows, so it is overconfident on them; "
            "choose another --split."
        )
    # Any of them could have been lucky on these rows.
    return int(json_object(model / "training" / "summary.json").get("epochs", 1))
