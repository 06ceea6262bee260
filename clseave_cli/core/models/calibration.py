"""How confident a model is: a temperature, and thresholds below which it answers `unsure`.

Both belong to a model and a language. They are in `calibration.json` beside `config.json`, outside
the model's fingerprint: students stay bound to a CLIP-VE that is recalibrated.

N rows · C labels (3)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clseave_cli.core.files import json_digest, json_object, read_json, write_json
from clseave_cli.errors import ModelError
from clseave_cli.labels import LABELS

CALIBRATION_FILE = "calibration.json"

#: Range of temperatures: from one-hot to uniform probabilities.
_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Calibration:
    """Calibration for one language; the default changes nothing."""

    temperature: float = 1.0  # divides the logits (Guo et al., 2017); 1: not fitted
    thresholds: dict[str, float] = field(default_factory=dict)  # lowest probability by label
    precision: float | None = None  # the share of correct answers that the thresholds promise

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for values that cannot have been fitted."""
        shares = [*self.thresholds.values(), self.precision or 0.0]
        if not (
            _COLDEST <= self.temperature <= _HOTTEST
            and all(0 <= share <= 1 for share in shares)
            and self.thresholds.keys() <= set(LABELS)
        ):
            raise ValueError("not a calibration")

    def apply(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, C) probabilities softmax(z / T) from softmax(z).

        Double precision, so that near ties stay apart and the likeliest label stays the likeliest.
        """
        if self.temperature == 1:
            return probabilities
        with np.errstate(divide="ignore"):  # probabilities of 0
            logits = np.log(probabilities.astype(np.float64)) / self.temperature
        scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
        calibrated: npt.NDArray[np.float64] = scaled / scaled.sum(axis=1, keepdims=True)
        return calibrated

    def is_unsure(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """(N,) whether the likeliest label is below its threshold; (N, C) calibrated input."""
        thresholds = np.array([self.thresholds.get(label, 0.0) for label in LABELS])
        unsure: npt.NDArray[np.bool_] = probabilities.max(1) < thresholds[probabilities.argmax(1)]
        return unsure


def fit_temperature(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """The temperature with the lowest cross-entropy of (N, C) logits with (N,) label ids.

    1 if every row is correct, because no confidence would be too high, or if a logit is not finite.
    """
    # Imported here because prediction needs only NumPy.
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    scores, rows = logits.astype(np.float64), np.arange(len(logits))
    if (scores.argmax(axis=1) == labels).all() or not np.isfinite(scores).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(scores / math.exp(log_temperature), axis=1)
        return -float(log_p[rows, labels].mean())

    bounds = math.log(_COLDEST), math.log(_HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def write_fitted(folder: Path, languages: Iterable[str], dev: Mapping[str, float]) -> None:
    """Writes the temperatures among a model's dev metrics; training without photos has none."""
    values = {lang: dev.get(f"temperature/{lang}", dev.get("temperature")) for lang in languages}
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)  # an earlier model's
    if fitted := {lang: Calibration(t) for lang, t in values.items() if t is not None}:
        write_calibrations(folder, fitted)


def write_calibrations(folder: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Writes the calibration of the model in a folder, by language; replaces an earlier one."""
    languages = {lang: asdict(each) for lang, each in calibrations.items()}
    content = {"model": _fingerprint(folder), "languages": languages}
    write_json(folder / CALIBRATION_FILE, content | {"digest": json_digest(content)})


def read_calibrations(folder: Path) -> dict[str, Calibration]:
    """The calibration of the model in a folder, by language; empty if it has none.

    Raises:
        ModelError: the file is damaged, or belongs to another model.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        digest = content.pop("digest")
        if digest != json_digest(content) or content["model"] != _fingerprint(folder):
            raise ValueError("changed, or of another model")
        return {str(k): Calibration(**each) for k, each in content["languages"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(
            f"{path}: damaged, or belongs to another model; copy the model folder again, or delete "
            "that file and run `clseave calibrate`."
        ) from None


def _fingerprint(folder: Path) -> Any:
    return json_object(folder / "config.json").get("fingerprint")
