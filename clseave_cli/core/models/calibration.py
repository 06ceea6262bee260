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

#: Temperatures that are tried: at the ends a model is certain, or says nothing.
_TEMPERATURES = (0.01, 100.0)


@dataclass(frozen=True)
class Calibration:
    """What is done to the probabilities of one language; by default nothing.

    Attributes:
        temperature: what the logits are divided by (Guo et al., 2017); 1 where none was fitted.
        thresholds: by label, the least probability of an answer; other labels have none.
        precision: the share of right answers that the thresholds promise.
        data: fingerprint of the rows they were set on.
    """

    temperature: float = 1.0
    thresholds: dict[str, float] = field(default_factory=dict)
    precision: float | None = None
    data: str = ""

    @classmethod
    def from_json(cls, content: Any) -> Calibration:
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError: not as it was written; also AttributeError, KeyError, TypeError.
        """
        thresholds = {str(label): float(least) for label, least in content["thresholds"].items()}
        temperature, precision = float(content["temperature"]), content["precision"]
        if not (
            _TEMPERATURES[0] <= temperature <= _TEMPERATURES[1]
            and thresholds.keys() <= set(LABELS)
            and all(0 <= least <= 1 for least in thresholds.values())
        ):
            raise ValueError("out of range")
        promised = None if precision is None else float(precision)
        return cls(temperature, thresholds, promised, str(content["data"]))

    def apply(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, C) probabilities softmax(z / T) from softmax(z); the likeliest stays the likeliest.

        Double precision keeps apart what differs in single precision.
        """
        if self.temperature == 1:
            return probabilities
        with np.errstate(divide="ignore"):  # of a probability of 0
            logits = np.log(probabilities.astype(np.float64)) / self.temperature
        scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
        calibrated: npt.NDArray[np.float64] = scaled / scaled.sum(axis=1, keepdims=True)
        return calibrated

    def is_unsure(self, probabilities: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """(N,) whether the likeliest label of a row, by (N, C) `apply`'d ones, is too unlikely."""
        least = np.array([self.thresholds.get(label, 0.0) for label in LABELS])
        unsure: npt.NDArray[np.bool_] = (
            probabilities.max(axis=1) < least[probabilities.argmax(axis=1)]
        )
        return unsure


def fit_temperature(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """The temperature of the least cross-entropy of (N, C) logits with (N,) label ids.

    1 where every row is right, which leaves no largest certainty.
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

    bounds = [math.log(end) for end in _TEMPERATURES]
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def fitted_on_dev(dev: Mapping[str, float], languages: Iterable[str]) -> dict[str, Calibration]:
    """What the dev metrics of a checkpoint say of some languages; nothing without photos in dev."""
    temperatures = {
        lang: dev.get(f"temperature/{lang}", dev.get("temperature")) for lang in languages
    }
    return {lang: Calibration(t) for lang, t in temperatures.items() if t is not None}


def write_calibrations(folder: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Writes those of a saved model, by language, in place of earlier ones; of none, no file."""
    if calibrations:
        content = {
            "model": json_object(folder / "config.json").get("fingerprint"),
            "languages": {lang: asdict(each) for lang, each in calibrations.items()},
        }
        write_json(folder / CALIBRATION_FILE, content | {"digest": json_digest(content)})


def read_calibrations(folder: Path) -> dict[str, Calibration]:
    """Those of the model in a folder, by language; none where there is no such file.

    Raises:
        ModelError: the file is damaged, or belongs to another model.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return {}
    content = read_json(path)
    try:
        digest = content.pop("digest")
        languages = content["languages"].items()
        calibrations = {str(lang): Calibration.from_json(each) for lang, each in languages}
        is_sound = digest == json_digest(content)
    except (AttributeError, KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise ModelError(
            f"{path}: damaged, its content is not what was saved; copy it again, or delete it and "
            "run `clseave calibrate`."
        )
    if content.get("model") != json_object(folder / "config.json").get("fingerprint"):
        raise ModelError(
            f"{path}: belongs to another model; delete it, and run `clseave calibrate`."
        )
    return calibrations
