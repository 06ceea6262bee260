"""clseave: cross-lingual visual entailment.

Given a photo and a sentence in any language: does the photo entail it, contradict it, or leave it
open? The command line is `clseave`. From Python, each stage is a function with keyword options,
and `VisualEntailment` predicts (docs/python.md). Arguments and errors of all stages are those of
`pretrain`, each with the fields of its config.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clseave_cli.version import __version__

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.results import Results, Retrieval
    from clseave_cli.core.prediction.predictor import Prediction, VisualEntailment
    from clseave_cli.core.training.run import StageResult
    from clseave_cli.core.translation.corpus import TranslationSummary
    from clseave_cli.progress import Progress

__all__ = [
    "Prediction",
    "VisualEntailment",
    "__version__",
    "align",
    "evaluate",
    "finetune",
    "pretrain",
    "retrieve",
    "translate",
]


def pretrain(*, progress: Progress | None = None, **options: Any) -> StageResult:
    """Trains a CLIP-family model on image-caption pairs: `clseave pretrain`.

    Args:
        progress: receives progress and notes; None: discards them.
        options: fields of `PretrainConfig`, named like the flags, with underscores; also `preset`,
            and `config`, a TOML file of options.

    Raises:
        UsageError: an option does not exist or is invalid.
        ClseaveError: bad data, an unusable model, a full disk, or an interruption.
    """
    result: StageResult = _stage("pretraining:pretrain", "PretrainConfig", progress, options)
    return result


def finetune(*, progress: Progress | None = None, **options: Any) -> StageResult:
    """Trains CLIP-VE in the source language: `clseave finetune-ve` (`FinetuneConfig`)."""
    result: StageResult = _stage("finetuning:finetune", "FinetuneConfig", progress, options)
    return result


def translate(*, progress: Progress | None = None, **options: Any) -> TranslationSummary:
    """Translates the hypotheses of a data set: `clseave translate` (`TranslateConfig`)."""
    place = "translation.corpus:translate"
    result: TranslationSummary = _stage(place, "TranslateConfig", progress, options)
    return result


def align(*, progress: Progress | None = None, **options: Any) -> StageResult:
    """Trains a student of CLIP-VE for other languages: `clseave align` (`AlignConfig`)."""
    result: StageResult = _stage("alignment:align", "AlignConfig", progress, options)
    return result


def evaluate(*, progress: Progress | None = None, **options: Any) -> Results:
    """Evaluates the models in every language: `clseave evaluate` (`EvaluateConfig`)."""
    result: Results = _stage("evaluation.run:evaluate", "EvaluateConfig", progress, options)
    return result


def retrieve(*, progress: Progress | None = None, **options: Any) -> Retrieval:
    """Ranks images for captions and the reverse: `clseave retrieve` (`RetrieveConfig`)."""
    place = "evaluation.retrieval:retrieve"
    result: Retrieval = _stage(place, "RetrieveConfig", progress, options)
    return result


def _stage(place: str, config: str, progress: Progress | None, options: dict[str, Any]) -> Any:
    from clseave_cli.core.config import named_options, preset_options, toml_options
    from clseave_cli.core.data.hub import with_local_models
    from clseave_cli.progress import SILENT

    module, _, name = place.partition(":")
    config_class: Any = getattr(importlib.import_module("clseave_cli.core.config"), config)
    stage: Callable[..., Any] = getattr(importlib.import_module(f"clseave_cli.core.{module}"), name)
    preset = preset_options(config_class, options.pop("preset", None))
    path = options.pop("config", None)
    from_file = toml_options(config_class, Path(path)) if path is not None else {}
    values = preset | from_file | named_options(config_class, options)
    progress = progress or SILENT
    return stage(with_local_models(config_class(**values), progress), progress)


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must not import torch.
    if name in ("Prediction", "VisualEntailment"):
        from clseave_cli.core.prediction import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
