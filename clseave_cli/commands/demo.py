"""`clseave demo`: the whole method on the built-in mini-VE world, through the ordinary stages."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any, TypeVar

from clseave_cli.commands import terminal
from clseave_cli.core.config import (
    AlignConfig,
    DemoConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    StageConfig,
)
from clseave_cli.errors import UsageError
from clseave_cli.progress import Progress

_PRESET = "mini-ve"

C = TypeVar("C", bound=StageConfig)


def run(config: DemoConfig) -> None:
    """See the whole method work on a small drawn world, in minutes.

    Draws a small world, trains a CLIP model on it, fine-tunes it for visual
    entailment in English, transfers it to five languages, and reports how
    well that went. Everything lands in one folder, as the ordinary commands
    would leave it; an interrupted demo goes on where it stopped.
    """
    from clseave_cli.core.data.mini_ve.grammar import LANGUAGES
    from clseave_cli.core.evaluation.report.report import REPORT
    from clseave_cli.core.files import locked_target, require_replaceable
    from clseave_cli.core.training.run import model_kind

    data = config.out / "data"
    if not (data / "world.json").is_file():
        require_replaceable(data, None)
    models = {"clip": "pretrain", "clip-ve": "finetune-ve"}
    models |= {f"align-{lang}": "align" for lang in LANGUAGES[1:]}
    for name, stage in models.items():
        require_replaceable(config.out / "runs" / name, model_kind(stage))
    require_replaceable(config.out / "report", REPORT)
    with locked_target(data):
        _run(config)


def _run(config: DemoConfig) -> None:
    from clseave_cli.commands.tables import results_table
    from clseave_cli.core.alignment import align
    from clseave_cli.core.data.mini_ve.grammar import LANGUAGES
    from clseave_cli.core.evaluation.run import evaluate
    from clseave_cli.core.finetuning import finetune
    from clseave_cli.core.pretraining import pretrain

    progress = terminal.TerminalProgress()
    started = time.monotonic()
    data, runs, report = config.out / "data", config.out / "runs", config.out / "report"
    encoder = runs / "encoder"
    # A stage that was finished or interrupted before goes on from there.
    shared = {"runs": runs, "resume": runs.exists()}

    def stage(title: str) -> None:
        terminal.stderr().print(f"\n[bold]{title}[/bold]")

    stage("1/5  a world to look at")
    _world(data, encoder, config.seed, progress)

    stage("2/5  pretrain: a CLIP model from captions")
    pretrain(_stage(PretrainConfig, config, data=data, **shared), progress)

    stage("3/5  finetune-ve: visual entailment in English")
    clip = str(runs / "clip")
    finetune(_stage(FinetuneConfig, config, data=str(data), clip=clip, **shared), progress)

    stage("4/5  align: five languages, from parallel sentences")
    for lang in LANGUAGES[1:]:
        student = {"lang": (lang,), "student": str(encoder)}
        align(_stage(AlignConfig, config, data=str(data), **student, **shared), progress)

    stage("5/5  evaluate: six languages, and did it look?")
    evaluation = EvaluateConfig(data=str(data), runs=(runs,), report=report, **_told(config))
    results = evaluate(evaluation, progress)

    terminal.stdout().print()
    terminal.stdout().print(results_table(results))
    _print_outlook(config.out, time.monotonic() - started)


def _stage(config_class: type[C], config: DemoConfig, **fields: Any) -> C:
    """A stage's config: the preset for this world, and what the demo was told."""
    preset = config_class.PRESETS[_PRESET] | _told(config)
    return config_class(**(preset | fields))


def _told(config: DemoConfig) -> dict[str, Any]:
    return {"seed": config.seed, "device": config.device, "precision": config.precision}


def _world(data: Path, encoder: Path, seed: int, progress: Progress) -> None:
    """Draws the world and makes a small multilingual encoder that has not learned anything yet."""
    from clseave_cli.core.data.mini_ve import generate
    from clseave_cli.core.data.mini_ve.grammar import LANGUAGES
    from clseave_cli.core.data.records import read_split
    from clseave_cli.core.files import atomic_folder, locked_target, read_json
    from clseave_cli.core.models.scratch import new_encoder

    if (data / "world.json").is_file():
        there = read_json(data / "world.json").get("seed")
        if there != seed:
            raise UsageError(
                f"{data.parent}: holds the demo of seed {there}; choose another --out for {seed}."
            )
        progress.note(f"{data}: already there.")
    else:
        generate(data, seed=seed, progress=progress)
    if not encoder.is_dir():
        sentences = [
            hypothesis
            for lang in LANGUAGES
            for hypothesis in dict.fromkeys(read_split(data, "train", lang).hypotheses)
        ]
        with locked_target(encoder), atomic_folder(encoder) as unfinished:
            new_encoder(unfinished, sentences, seed=seed)


def _print_outlook(out: Path, seconds: float) -> None:
    """Where the report lies, and commands to go on with, ready to paste."""
    runs = shlex.quote(str(out / "runs"))
    data = shlex.quote(str(out / "data"))
    image = shlex.quote(str(out / "data" / "images" / "test-00000.png"))
    predict = f"clseave predict {image}"
    lines = [
        f"{seconds:.0f} s in all. The report, with pictures: {out / 'report' / 'report.html'}",
        "",
        "Try next:",
        f'  {predict} "There is a red circle." --runs {runs}',
        f'  {predict} "赤い円があります。" --lang ja --runs {runs}',
        f"  clseave evaluate --data {data} --runs {runs} --lang de --json",
        f"  clseave align --lang de --lang nl --preset {_PRESET} --data {data} --runs {runs} "
        f"--student {shlex.quote(str(out / 'runs' / 'encoder'))}",
    ]
    terminal.stdout().print("\n".join(lines), soft_wrap=True, markup=False)
