"""Learning curves, read from what the training loop left beside a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clseave_cli.core.files import read_json
from clseave_cli.errors import DataError


@dataclass(frozen=True)
class CurvePoint:
    """One epoch.

    Attributes:
        epoch: its number, from 1.
        train_loss: mean loss of its training examples.
        dev: the dev figures after it, by name.
        train_accuracy: of its training examples, where the stage knows it.
    """

    epoch: int
    train_loss: float
    dev: dict[str, float]
    train_accuracy: float | None = None


@dataclass(frozen=True)
class LearningCurve:
    """How one training run went, epoch by epoch.

    Attributes:
        stage: `pretrain`, `finetune-ve` or `align`.
        name: name of the model folder, such as `align-de`.
        points: one an epoch, in order.
        best_epoch: the epoch whose weights were kept, if known.
        rates: the learning rate on the way: epochs done, and the rate.
    """

    stage: str
    name: str
    points: tuple[CurvePoint, ...]
    best_epoch: int | None = None
    rates: tuple[tuple[float, float], ...] = ()


def read_learning_curve(model: Path) -> LearningCurve | None:
    """Reads the learning curve of a model folder.

    Args:
        model: a folder that a training stage wrote, such as `runs/align-de`.

    Returns:
        None where the folder keeps no record of training.

    Raises:
        DataError: the record is damaged.
    """
    path = model / "training" / "metrics.jsonl"
    if not path.is_file():
        return None
    stage, points, steps = "", [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            stage = str(record["stage"])
            if "dev" in record:
                dev = {str(name): float(value) for name, value in record["dev"].items()}
                accuracy = float(record["accuracy"]) if "accuracy" in record else None
                epoch, loss = int(record["epoch"]), float(record["loss"])
                points.append(CurvePoint(epoch, loss, dev, accuracy))
                per_epoch = int(record["step"]) / epoch
            else:
                steps.append((int(record["step"]), float(record["learning_rate"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError.at(path, number, "not a record of training; train again.") from None
    if not points:
        return None
    summary = path.with_name("summary.json")
    best = read_json(summary).get("best_epoch") if summary.is_file() else None
    rates = tuple((step / per_epoch, rate) for step, rate in steps)
    return LearningCurve(stage, model.name, tuple(points), best, rates)
