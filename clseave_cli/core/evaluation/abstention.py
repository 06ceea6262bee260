"""`calibrate`: temperatures, and thresholds that keep a promised precision.

The rows of a photo are not independent, photos are. So the evidence for a threshold is gathered
photo by photo, and holds for any dependence among a photo's rows.

N rows · C labels (3) · G photos · L thresholds · B bets
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from clseave_cli.core.config import CalibrateConfig, EvaluateConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.images import ImageFolder
from clseave_cli.core.data.records import Split
from clseave_cli.core.data.seen import UNSEEN
from clseave_cli.core.evaluation.baselines import Rows
from clseave_cli.core.evaluation.metrics import Floats, probabilities
from clseave_cli.core.evaluation.outputs import Outputs, run_systems
from clseave_cli.core.evaluation.run import labelled_rows, language_systems
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

# Shares of the capital that are bet: large ones find few errors soon, small ones many rows.
_BETS = np.array([0.25, 0.5, 1.0])
# Thresholds tried below the promised precision.
_NUM_THRESHOLDS = 40


@dataclass(frozen=True)
class Threshold:
    """What was found for some answers of a language.

    Attributes:
        least: the least probability of an answer; None: the rows do not support the promise.
        coverage: share of these answers that are given; where `least` is None, of the surest.
        accuracy: share of those given that are right.
        num_photos: photos of the rows.
        num_needed: where `least` is None, about how many there should be; None: no number helps,
            because the surest answers are wrong too often.
    """

    least: float | None
    coverage: float
    accuracy: float
    num_photos: int
    num_needed: int | None = None


def find_threshold(
    confidence: npt.ArrayLike,
    correct: npt.ArrayLike,
    images: npt.ArrayLike,
    precision: float,
    *,
    delta: float = DELTA,
) -> Threshold:
    """The lowest threshold above which at least a share `precision` of the answers is right.

    With probability 1 − `delta` over the choice of photos it is so, for a photo drawn at random and
    one of its rows, whatever ties the rows of a photo to each other.

    The hypothesis that a threshold answers rightly less often is tested by betting against it, a
    photo at a time. With α = 1 − `precision`, let x be a photo's mean of (wrong − α) over its rows,
    0 where no answer is given. Under the hypothesis E x ≥ 0, so the mean over ν of Π (1 − ν x) has
    an expectation of at most 1, and one over it is a p-value (Waudby-Smith and Ramdas, "Estimating
    means of bounded random variables by betting", 2024, section 4). Thresholds are tested from high
    to low until one fails, from two starts that share `delta`: fixed-sequence testing of Learn then
    Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021).

    Args:
        confidence: (N,) probability of each answer; below 0 for rows without one of interest.
        correct: (N,) whether it is right.
        images: (N,) photos of the rows.
        precision: the share to promise.
        delta: how often the promise may be wrong.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=bool)
    _, photo = np.unique(np.asarray(images), return_inverse=True)
    starts = {(1 + precision) / 2: 0.2 * delta, precision: 0.8 * delta}
    below = np.linspace(precision, 1 / len(LABELS), _NUM_THRESHOLDS)
    tried = np.array([max(starts), *below])
    evidence = _evidence(sure, right, photo, tried, 1 - precision)  # (B, L) logarithms, of all G
    total = logsumexp(evidence, axis=0) - math.log(len(_BETS))
    level, found = 0.0, None
    for least, gained in zip(tried.tolist(), total.tolist(), strict=True):
        level += starts.get(least, 0.0)
        if level and gained >= -math.log(level):
            found = least
        else:
            level = 0.0
    shown = precision if found is None else found
    given, num_photos = sure >= shown, int(photo.max()) + 1
    coverage = float(given.sum() / max(1, (sure >= 0).sum()))
    accuracy = float(right[given].mean()) if given.any() else math.nan
    needed = None
    wanted = math.log(len(_BETS) / starts[precision])
    if found is None and (rate := float(evidence.max()) / num_photos) > 0:
        needed = max(num_photos + 1, math.ceil(wanted / rate))
    return Threshold(found, coverage, accuracy, num_photos, needed)


def _evidence(
    sure: Floats,
    right: npt.NDArray[np.bool_],
    photo: npt.NDArray[np.intp],
    tried: Floats,
    risk: float,
) -> Floats:
    """(B, L) logarithms of what each bet makes of 1 at each threshold."""
    order = np.argsort(photo, kind="stable")
    sizes = np.bincount(photo)
    given = sure[order, None] >= tried  # (N, L)
    excess = (~right[order] - risk)[:, None] * given
    # Over all rows: among answers alone, one more wrong answer would lower its own weight.
    means = np.add.reduceat(excess, np.cumsum(sizes) - sizes, axis=0) / sizes[:, None]  # (G, L)
    return np.stack([np.log1p(-bet * means).sum(axis=0) for bet in _BETS])


@dataclass(frozen=True)
class Calibrated:
    """What became of one language.

    Attributes:
        lang: the language.
        folder: the model that reads it.
        num_examples: rows it was calibrated on.
        calibration: what was stored.
        thresholds: what was found, by label, or under `all`; empty if nothing was promised.
    """

    lang: str
    folder: Path
    num_examples: int
    calibration: Calibration
    thresholds: dict[str, Threshold]

    def to_json(self) -> dict[str, Any]:
        """The object that `calibrate --json` has for a language."""
        return {
            "lang": self.lang,
            "model": str(self.folder),
            "num_examples": self.num_examples,
            "temperature": self.calibration.temperature,
            "precision": self.calibration.precision,
            "thresholds": {
                name: {
                    "threshold": each.least,
                    "coverage": each.coverage,
                    "accuracy": each.accuracy,
                    "num_photos": each.num_photos,
                }
                for name, each in self.thresholds.items()
            },
        }


def calibrate(config: CalibrateConfig, progress: Progress = SILENT) -> list[Calibrated]:
    """Fits a temperature for each language and, if a precision is to be promised, thresholds.

    They are stored in the models' folders, in place of earlier ones of these languages.

    Raises:
        UsageError: `label` without `promise`, or an unknown one.
        DataError: bad rows, rows that a model was trained on, or too few photos for the promise;
            then nothing is stored.
        ModelError: a model is missing, damaged, or of another teacher.
    """
    if config.label and config.promise is None:
        raise UsageError("--label goes with --precision.")
    if unknown := set(config.label) - set(LABELS):
        raise UsageError(f"--label {min(unknown)}: expected {', '.join(LABELS)}.")
    runs, clip_ve = config.runs, config.runs / "clip-ve"
    settings = EvaluateConfig(
        data=config.data,
        images=config.images,
        skip_bad=config.skip_bad,
        runs=(runs,),
        lang=config.lang,
        split=config.split,
        batch_size=config.batch_size,
        device=config.device,
        precision=config.precision,
    )
    folder = data_folder(config.data, progress)
    systems = language_systems(settings, runs, source_language(clip_ve), folder, progress)
    images = ImageFolder.of(folder, config.images)
    rows: dict[str, Rows] = {}
    levels: dict[str, float] = {}
    for system in systems:
        split = labelled_rows(settings, folder, system.lang, images, progress)
        unseen = np.full(len(split), UNSEEN, np.int8)
        rows[system.key] = Rows(
            split, system.lang, split.hypotheses, Photos.of(split, images), unseen
        )
        models = dict.fromkeys([clip_ve, system.student or clip_ve])
        levels[system.key] = DELTA / math.prod(_num_checkpoints(each, split) for each in models)
    by_system = run_systems(settings, clip_ve, systems, rows, progress)
    done = [
        _calibrated(config, outputs, levels[key], outputs.system.student or clip_ve)
        for key, outputs in by_system.items()
    ]
    _require_support(config, done)
    for model in dict.fromkeys(each.folder for each in done):
        with locked_target(model):
            new = {each.lang: each.calibration for each in done if each.folder == model}
            write_calibrations(model, read_calibrations(model) | new)
    return done


def _num_checkpoints(model: Path, split: Split) -> int:
    """Among how many checkpoints some rows chose a model's: each might have been lucky on them.

    Raises:
        DataError: it was trained on the rows.
    """
    record = json_object(model / "training" / "run.json")
    options, inputs = record.get("options", {}), record.get("inputs", {})
    if split.digest not in inputs.values():
        return 1
    if split.name == options.get("train_split"):
        raise DataError(
            f"{split.path}: {model} was trained on these rows, on which it is surer than on others;"
            " choose another --split."
        )
    return max(1, int(json_object(model / "training" / "summary.json").get("epochs", 1)))


def _calibrated(
    config: CalibrateConfig, outputs: Outputs, level: float, folder: Path
) -> Calibrated:
    split, logits = outputs.split, outputs.logits * outputs.calibration.temperature
    calibration = Calibration(fit_temperature(logits, split.labels))
    found: dict[str, Threshold] = {}
    if config.promise is not None:
        p = probabilities(logits / calibration.temperature)
        sure, predicted = p.max(axis=1), p.argmax(axis=1)
        for name in config.label or ("all",):
            asked = np.ones(len(p), bool) if name == "all" else predicted == LABELS.index(name)
            confidence = np.where(asked, sure, -1.0)
            found[name] = find_threshold(
                confidence, outputs.correct, outputs.images, config.promise, delta=level
            )
        least = {
            label: found[name].least or 0.0
            for name in found
            for label in (LABELS if name == "all" else (name,))
        }
        calibration = Calibration(calibration.temperature, least, config.promise, split.digest)
    return Calibrated(split.lang, folder, len(split), calibration, found)


def _require_support(config: CalibrateConfig, done: Sequence[Calibrated]) -> None:
    """Refuses a promise that the rows do not support.

    Raises:
        DataError: says for each language how many photos would.
    """
    problems = []
    for each in done:
        for name, found in each.thresholds.items():
            if found.least is None:
                which = each.lang if name == "all" else f"{each.lang} ({name})"
                needed = "no number of photos helps, as the surest are wrong too often"
                if found.num_needed is not None:
                    needed = f"about {found.num_needed:,} would do"
                problems.append(f"{which}: {found.num_photos:,} photos, {needed}")
    if problems:
        raise DataError(
            f"--precision {config.promise:g}: the {config.split} split cannot support it; nothing "
            f"was stored. {'; '.join(problems)}. Lower --precision, or leave languages out."
        )
