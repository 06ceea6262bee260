"""`calibrate`: temperatures, and thresholds that keep a promised precision.

The rows of a photo are not independent, photos are. So evidence for a threshold is gathered photo
by photo, and holds whatever ties the rows of a photo to each other.

N rows · G photos · L thresholds · B bets
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from clseave_cli.core.evaluation.outputs import run_systems
from clseave_cli.core.evaluation.run import labelled_rows, systems_of
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

#: How often a promise may turn out wrong.
DELTA = 0.05

# Shares of the capital that are bet: large ones need few errors, small ones many rows.
_BETS = np.array([0.25, 0.5, 1.0])[:, None, None]
# Thresholds tried below the promised precision.
_NUM_THRESHOLDS = 40
_ALL = "all"  # labels together


@dataclass(frozen=True)
class Threshold:
    """The least probability of an answer, and what it comes to on the rows it was set on."""

    least: float | None  # None: the rows do not support the promise
    coverage: float  # share of the answers that are given
    accuracy: float  # share of those given that are right
    num_photos: int
    num_needed: int | None = None  # about how many photos would; None: no number helps


def find_threshold(
    confidence: npt.ArrayLike,
    correct: npt.ArrayLike,
    images: npt.ArrayLike,
    precision: float,
    delta: float = DELTA,
) -> Threshold:
    """The lowest threshold above which at least a share `precision` of the answers is right.

    With probability 1 − `delta` over the choice of photos it is so, for a photo drawn at random and
    one of its rows.

    `confidence` (N,) is the probability of each answer, below 0 where it is of no interest, and
    `correct` (N,) whether it is right.

    The hypothesis that a threshold answers rightly less often is tested by betting against it, a
    photo at a time. With α = 1 − `precision`, let x be a photo's mean of (wrong − α) over its rows,
    0 where no answer is given. Under the hypothesis E x ≥ 0, so the mean over ν of Π (1 − ν x) has
    an expectation of at most 1, and one over it is a p-value (Waudby-Smith and Ramdas, "Estimating
    means of bounded random variables by betting", 2024, section 4). Thresholds are tested from high
    to low until one fails, from two starts that share `delta`: fixed-sequence testing of Learn then
    Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021).
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    _, photo, sizes = np.unique(np.asarray(images), return_inverse=True, return_counts=True)
    starts = {(1 + precision) / 2: 0.2 * delta, precision: 0.8 * delta}
    below = np.linspace(precision, 1 / len(LABELS), _NUM_THRESHOLDS)
    tried = np.array([max(starts), *below])
    order = np.argsort(photo, kind="stable")
    excess = (precision - right[order])[:, None] * (sure[order, None] >= tried)  # (N, L)
    # Over all rows: among answers alone, one more wrong answer would lower its own weight.
    means = np.add.reduceat(excess, np.cumsum(sizes) - sizes) / sizes[:, None]  # (G, L)
    gains = np.log1p(-_BETS * means).sum(axis=1)  # (B, L)
    evidence = logsumexp(gains, axis=0) - math.log(len(_BETS))
    level, found = 0.0, None
    for least, gained in zip(tried.tolist(), evidence.tolist(), strict=True):
        level += starts.get(least, 0.0)
        if level and gained >= -math.log(level):
            found = least
        else:
            level = 0.0
    given, needed = sure >= (precision if found is None else found), None
    if found is None and gains.max() > 0:
        share = math.log(len(_BETS) / starts[precision]) / gains.max()
        needed = max(len(sizes) + 1, math.ceil(share * len(sizes)))
    coverage = given.sum() / max(1, (sure >= 0).sum())
    accuracy = right[given].sum() / max(1, given.sum())
    return Threshold(found, float(coverage), float(accuracy), len(sizes), needed)


@dataclass(frozen=True)
class Calibrated:
    """What became of one language."""

    lang: str
    folder: Path  # the model that reads it
    temperature: float
    thresholds: dict[str, Threshold]  # by label, or under `all`; empty: nothing was promised

    def store(self, precision: float | None) -> None:
        """Writes it into the model's folder."""
        least = {
            label: found.least or 0.0
            for name, found in self.thresholds.items()
            for label in (LABELS if name == _ALL else (name,))
        }
        with locked_target(self.folder):
            new = {self.lang: Calibration(self.temperature, least, precision)}
            write_calibrations(self.folder, read_calibrations(self.folder) | new)


def calibrate(config: CalibrateConfig, progress: Progress = SILENT) -> list[Calibrated]:
    """Fits a temperature for each language and, if a precision is to be promised, thresholds.

    They are stored in the models' folders, in place of earlier ones of these languages.

    Raises:
        ClseaveError: bad options or rows, rows that a model was trained on, too few photos for the
            promise, or a bad model; then nothing is stored.
    """
    if config.label and config.promise is None:
        raise UsageError("--label goes with --precision.")
    if unknown := set(config.label) - set(LABELS):
        raise UsageError(f"--label {min(unknown)}: expected {', '.join(LABELS)}.")
    folder = data_folder(config.data, progress)
    images = ImageFolder.of(folder, config.images)
    done = [c for runs in config.runs for c in _of_runs(config, runs, folder, images, progress)]
    if problems := [
        f"{each.lang}, {name} answers: {found.num_photos:,} photos, "
        + (f"about {found.num_needed:,} would do" if found.num_needed else "more would not help")
        for each in done
        for name, found in each.thresholds.items()
        if found.least is None
    ]:
        raise DataError(
            f"--precision {config.promise:g}: the {config.split} split cannot support it; nothing "
            f"was stored. {'; '.join(problems)}. Lower --precision, or leave languages out."
        )
    for each in done:
        each.store(config.promise)
    return done


def _of_runs(
    config: CalibrateConfig, runs: Path, folder: Path, images: ImageFolder, progress: Progress
) -> Iterator[Calibrated]:
    """The languages of one folder of models."""
    clip_ve, rows, levels = runs / "clip-ve", {}, {}
    systems = systems_of(config, runs, source_language(clip_ve), folder, progress)
    for system in systems:
        split = labelled_rows(config, folder, system.lang, images, progress)
        unseen, photos = np.full(len(split), UNSEEN, np.int8), Photos.of(split, images)
        rows[system.key] = Rows(split, system.lang, split.hypotheses, photos, unseen)
        models = {clip_ve, system.student or clip_ve}
        levels[system.key] = DELTA / math.prod(_num_checkpoints(each, split) for each in models)
    for key, outputs in run_systems(config, clip_ve, systems, rows, progress).items():
        split, logits = outputs.split, outputs.logits * outputs.calibration.temperature
        temperature = fit_temperature(logits, split.labels)
        p, found = probabilities(logits / temperature), {}
        predicted, answers = np.array(LABELS)[p.argmax(axis=1)], (outputs.correct, outputs.images)
        for name in config.label or (_ALL,) if config.promise else ():
            confidence = np.where((predicted == name) | (name == _ALL), p.max(axis=1), -1.0)
            found[name] = find_threshold(confidence, *answers, config.promise or 0, levels[key])
        model = outputs.system.student or clip_ve
        yield Calibrated(split.lang, model, temperature, found)


def _num_checkpoints(model: Path, split: Split) -> int:
    """Among how many checkpoints the rows chose a model's; DataError if it was trained on them."""
    record = json_object(model / "training" / "run.json")
    if split.digest not in record.get("inputs", {}).values():
        return 1
    if split.name == record["options"]["train_split"]:
        raise DataError(
            f"{split.path}: {model} was trained on these rows, and is surer of them than of "
            "others; choose another --split."
        )
    # Each of them might have been lucky on these rows.
    return int(json_object(model / "training" / "summary.json").get("epochs", 1))
