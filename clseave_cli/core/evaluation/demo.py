"""`demo`: the whole method on the built-in mini-VE world, through the ordinary stages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clseave_cli.core.alignment import align
from clseave_cli.core.config import (
    AlignConfig,
    DemoConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    StageConfig,
)
from clseave_cli.core.data.mini_ve import generate
from clseave_cli.core.data.mini_ve.grammar import LANGUAGES
from clseave_cli.core.data.records import read_split
from clseave_cli.core.evaluation.comparison import read_predicted_rows
from clseave_cli.core.evaluation.report import REPORT
from clseave_cli.core.evaluation.results import Results
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.files import atomic_folder, locked_target, read_json, require_replaceable
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models.scratch import new_encoder
from clseave_cli.core.pretraining import pretrain
from clseave_cli.core.training.run import model_kind
from clseave_cli.errors import Interrupted, UsageError
from clseave_cli.labels import LABELS
from clseave_cli.progress import SILENT, Progress

PRESET = "mini-ve"

C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Example:
    """A picture and a hypothesis that every model gets right."""

    image: Path
    label: str
    hypotheses: dict[str, str]  # by language


@dataclass(frozen=True)
class DemoResult:
    """The outcome of a demo."""

    data: Path  # the world, an ordinary data folder
    runs: Path  # the models of every stage
    encoder: Path  # the untrained encoder of the students
    report: Path
    results: Results
    examples: tuple[Example, ...]  # at most one a label
    seconds: float  # of this call


def demo(config: DemoConfig, progress: Progress = SILENT) -> DemoResult:
    """Draws a world, trains a CLIP model, CLIP-VE and five students on it, and evaluates them.

    Resumes an earlier call in the same folder.

    Raises:
        UsageError: the folder holds the demo of another seed, or something that is not a demo.
        Interrupted: Ctrl-C or SIGTERM; says how to resume.
    """
    data = config.out / "data"
    if not (data / "world.json").is_file():
        require_replaceable(data, None)
    students = {f"align-{lang}": "align" for lang in LANGUAGES[1:]}
    for name, stage in ({"clip": "pretrain", "clip-ve": "finetune-ve"} | students).items():
        require_replaceable(config.out / "runs" / name, model_kind(stage))
    require_replaceable(config.out / "report", REPORT)
    try:
        with locked_target(data):
            return _demo(config, progress)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(
            f"{config.out}: interrupted; run the same command again to resume."
        ) from None


def _demo(config: DemoConfig, progress: Progress) -> DemoResult:
    started = time.monotonic()
    data, runs, report = config.out / "data", config.out / "runs", config.out / "report"
    encoder = runs / "encoder"
    progress.note("1/5  mini-VE: draw a world to look at")
    _world(data, encoder, config.seed, progress)
    progress.note("\n2/5  pretrain: a CLIP model from captions")
    pretrain(_stage(PretrainConfig, config, runs / "clip", data=data), progress)
    progress.note("\n3/5  finetune-ve: visual entailment in English")
    clip = str(runs / "clip")
    finetune(_stage(FinetuneConfig, config, runs / "clip-ve", data=str(data), clip=clip), progress)
    progress.note("\n4/5  align: five languages, from parallel sentences")
    for lang in LANGUAGES[1:]:
        student = {"lang": (lang,), "student": str(encoder), "data": str(data)}
        align(_stage(AlignConfig, config, runs / f"align-{lang}", **student), progress)
    progress.note("\n5/5  evaluate: six languages, and baselines that never see the picture")
    evaluation = EvaluateConfig(data=str(data), runs=(runs,), report=report, **_shared(config))
    results, examples = evaluate(evaluation, progress), _examples(data, report)
    seconds = time.monotonic() - started
    return DemoResult(data, runs, encoder, report, results, examples, seconds)


def _stage(config_class: type[C], config: DemoConfig, out: Path, **fields: Any) -> C:
    """A stage's config: the preset for this world, resumed if it was started before."""
    started = out.exists() or out.with_name(f"{out.name}.partial").exists()
    folder = {"runs": out.parent, "resume": started}
    return config_class(**(config_class.PRESETS[PRESET] | _shared(config) | folder | fields))


def _shared(config: DemoConfig) -> dict[str, Any]:
    return {"seed": config.seed, "device": config.device, "precision": config.precision}


def _world(data: Path, encoder: Path, seed: int, progress: Progress) -> None:
    """Draws the world and creates a small untrained multilingual encoder."""
    if (data / "world.json").is_file():
        if (existing := read_json(data / "world.json").get("seed")) != seed:
            raise UsageError(
                f"{data.parent}: holds the demo of seed {existing}, not {seed}; choose another "
                "--out."
            )
        progress.note(f"{data}: already there.")
    else:
        generate(data, seed=seed, progress=progress)
    if not encoder.is_dir():
        splits = [read_split(data, "train", lang).hypotheses for lang in LANGUAGES]
        sentences = [hypothesis for split in splits for hypothesis in dict.fromkeys(split)]
        with locked_target(encoder), atomic_folder(encoder) as unfinished:
            new_encoder(unfinished, sentences, seed=seed)


def _examples(data: Path, report: Path) -> tuple[Example, ...]:
    """For each label, the row that every language gets right with the highest probability."""
    confidence: dict[str, float] = {}
    sentences: dict[str, dict[str, str]] = {}
    splits = {lang: read_split(data, "test", lang) for lang in LANGUAGES}
    for lang, split in splits.items():
        rows = read_predicted_rows(report, lang)
        p = np.where(rows.predicted == rows.labels, rows.probabilities.max(axis=1), 0.0)
        for pair_id, probability in zip(rows.pair_ids, p.tolist(), strict=True):
            confidence[pair_id] = min(confidence.get(pair_id, 1.0), probability)
        sentences[lang] = dict(zip(split.pair_ids, split.hypotheses, strict=True))
    source = splits[LANGUAGES[0]]
    examples = []
    for label_id, label in enumerate(LABELS):
        rows_of_label = np.flatnonzero(source.labels == label_id)
        row = max(rows_of_label, key=lambda row: confidence[source.pair_ids[row]])
        if confidence[pair_id := source.pair_ids[row]] > 0:
            image = data / "images" / source.image_names[source.image_index[row]]
            hypotheses = {lang: sentences[lang][pair_id] for lang in LANGUAGES}
            examples.append(Example(image, label, hypotheses))
    return tuple(examples)
