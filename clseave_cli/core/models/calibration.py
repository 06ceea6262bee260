"""How sure a model is: a temperature, and thresholds below which it answers `unsure`.

Both belong to a model and a language. They stand in `calibration.json` beside `config.json`, and
do not count in the model's fingerprint: students stay bound to a CLIP-VE that is calibrated again.

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

#: Temperatures that are tried: from certainty to saying nothing.
_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Calibration:
    """What is done to the probabilities of one language; by default nothing."""

    temperature: float = 1.0  # divides the logits (Guo et al., 2017); 1: none was fitted
    thresholds: dict[str, float] = field(default_factory=dict)  # least probability by label
    precision: float | None = None  # the share of right answers that the thresholds promise

    def __post_init__(self) -> None:
        """Raises ValueError, or TypeError, where a folder says what nobody fitted."""
        shares = [*self.thresholds.values(), self.precision or 0.0]
        if not (
            _COLDEST <= self.temperature <= _HOTTEST
            and all(0 <= share <= 1 for share in shares)
            and self.thresholds.keys() <= set(LABELS)
        ):
            raise ValueError("not a calibration")

    def apply(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, C) probabilities softmax(z / T) from softmax(z), in double precision.

        It keeps apart what differs in single precision, so the likeliest stays the likeliest.
        """
        if self.temperature == 1:
            return probabilities
        with np.errstate(divide="ignore"):  # of a probability of 0
            logits = np.log(probabilities.astype(np.float64)) / self.temperature
        scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
        calibrated: npt.NDArray[np.float64] = scaled / scaled.sum(axis=1, keepdims=True)
        return calibrated

    def is_unsure(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """(N,) whether the likeliest label is below its threshold, by (N, C) calibrated ones."""
        least = np.array([self.thresholds.get(label, 0.0) for label in LABELS])
        unsure: npt.NDArray[np.bool_] = probabilities.max(1) < least[probabilities.argmax(1)]
        return unsure


def fit_temperature(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """The temperature at which (N, C) logits have the least cross-entropy with (N,) label ids.

    1 where every row is right: no certainty would be too large.
    """
    # Not at the top: answering needs NumPy alone.
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
    """Writes the temperatures that a model's dev metrics have; without photos they have none."""
    of = {lang: dev.get(f"temperature/{lang}", dev.get("temperature")) for lang in languages}
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)  # of what was saved there before
    if fitted := {lang: Calibration(t) for lang, t in of.items() if t is not None}:
        write_calibrations(folder, fitted)


def write_calibrations(folder: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Writes those of the model saved in a folder, by language, in place of earlier ones."""
    languages = {lang: asdict(each) for lang, each in calibrations.items()}
    content = {"model": _fingerprint(folder), "languages": languages}
    write_json(folder / CALIBRATION_FILE, content | {"digest": json_digest(content)})


def read_calibrations(folder: Path) -> dict[str, Calibration]:
    """Those of the model in a folder, by language; none where there is no such file.

    Raises:
        ModelError: the file is damaged, or belongs to another model.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        digest = content.pop("digest")
        there = {str(k): Calibration(**each) for k, each in content["languages"].items()}
        if digest != json_digest(content) or content["model"] != _fingerprint(folder):
            raise ValueError("changed, or of another model")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(
            f"{path}: damaged, or belongs to another model; copy the model folder again, or delete "
            "that file and run `clseave calibrate`."
        ) from None
    return there


def _fingerprint(folder: Path) -> Any:
    return json_object(folder / "config.json").get("fingerprint")
