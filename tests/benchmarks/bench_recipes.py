"""Gain and cost of recipes of `finetune-ve` over its preset; also a grid search.

    clseave demo --out demo
    python tests/benchmarks/bench_recipes.py demo --out recipes
    python tests/benchmarks/bench_recipes.py demo --out grid \
        --grid learning_rate=1e-3,2.5e-3,5e-3 --grid schedule=cosine,linear

Trained models are kept under --out, so an interrupted benchmark resumes; with `--next` it makes one
training only. The table has the test accuracy of every recipe in the source language, its paired
difference to the plain preset with a 95 % interval by photo, and the processor time of the whole
`finetune-ve`, with an empty cache, as a ratio to the preset's.

The seed of the trainings on each demo is that of its world.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clseave_cli.core.config import FinetuneConfig, PredictConfig
from clseave_cli.core.evaluation.metrics import compare_predictions
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.prediction.predictor import predict_file

PLAIN, ENSEMBLE = "plain", "ensemble of the three"
#: Plain models of other seeds; `soft labels` learns from their mean probabilities.
MEMBERS = {f"plain, seed {seed}": {"seed": seed} for seed in (100, 101, 102)}
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "last block unfrozen": {"unfreeze_blocks": 1},
    "LoRA, rank 8": {"lora": 8},
    **MEMBERS,
    "soft labels, weight 0.5": {"soft_weight": 0.5, "soft_labels": ()},
    "two blocks unfrozen": {"unfreeze_blocks": 2},
    "soft labels, weight 0.9": {"soft_weight": 0.9, "soft_labels": ()},
}


def grid(options: list[str]) -> dict[str, dict[str, Any]]:
    """Every combination of `name=value,value…`, by its name."""

    def parsed(text: str) -> Any:
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
        return text

    axes = []
    for option in options:
        name, values = option.split("=")
        axes.append([(name, parsed(value)) for value in values.split(",")])
    combinations = map(dict, itertools.product(*axes))
    named = {" ".join(f"{k}={v}" for k, v in each.items()): each for each in combinations}
    return {PLAIN: {}} | named


def train(demo: Path, folder: Path, options: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Runs `finetune-ve` with an empty cache; records its time and its predictions on test."""
    shared = FinetuneConfig.PRESETS[arguments.preset] | {
        "data": str(demo / "data"), "clip": str(arguments.clip or demo / "runs" / "clip"),
        "runs": folder, "device": "cpu", "resume": folder.exists(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        os.environ["CLSEAVE_CACHE"] = cache
        began = time.process_time()
        finetune(FinetuneConfig(**(shared | options)))
        seconds = time.process_time() - began
    if not shared["resume"]:  # a resumed training has only a part of the time
        (folder / "seconds.json").write_text(json.dumps(seconds))
    predict(demo, folder, "test")


def predict(demo: Path, folder: Path, split: str) -> Path:
    """The file with a model's predictions on a split."""
    target = folder / f"{split}.jsonl"
    if not target.exists():
        config = PredictConfig(runs=folder, images=demo / "data" / "images", device="cpu")
        predict_file(config, demo / "data" / f"snli_ve_{split}.jsonl", target)
    return target


def missing(
    demos: list[Path], recipes: dict[str, dict[str, Any]], arguments: argparse.Namespace
) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """Models still to be trained: the demo, their folder and their options."""
    for demo in demos:
        path = demo / "data" / "world.json"
        seed = json.loads(path.read_bytes())["seed"] if path.exists() else 0
        world = arguments.out / f"world-{seed}"
        for name, options in recipes.items():
            if (world / name / "test.jsonl").exists():
                continue
            options = {"seed": seed} | options
            if "soft_labels" in options:
                files = tuple(predict(demo, world / member, "train") for member in MEMBERS)
                options |= {"soft_labels": files}
            yield demo, world / name, options


def table(arguments: argparse.Namespace, names: list[str]) -> None:
    """Prints a table of the models trained so far."""
    for world in sorted(arguments.out.glob("world-*")):
        print(f"\n{world.name}\n\n| recipe | accuracy, % | difference, points | time |")
        print("|---|---|---|---|")
        correct, images = {}, None
        for name in names:
            if (world / name / "test.jsonl").exists():
                correct[name], images, _ = _read(world / name)
        if correct.keys() >= MEMBERS.keys():
            members = [_read(world / name)[2] for name in MEMBERS]
            mean = np.mean([probabilities for probabilities, _ in members], axis=0)
            correct[ENSEMBLE] = mean.argmax(axis=1) == members[0][1]
        for name, rows in correct.items():
            difference = compare_predictions(rows, correct[PLAIN], images, resamples=2000, seed=0)
            ends = "" if name == PLAIN else (
                f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, "
                f"{100 * difference.high:+.1f}]"
            )  # fmt: skip
            cost = f"{_seconds(world / name) / _seconds(world / PLAIN):.2f}"
            print(f"| {name} | {100 * rows.mean():.1f} | {ends} | {cost} |")


def _seconds(folder: Path) -> float:
    path = folder / "seconds.json"
    return float(json.loads(path.read_text())) if path.exists() else float("nan")


def _read(folder: Path) -> tuple[Any, Any, Any]:
    """Whether each test row is right, its photo, and the probabilities and gold labels."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    labels = list(rows[0]["probabilities"])
    probabilities = np.array([list(row["probabilities"].values()) for row in rows])
    gold = np.array([labels.index(row["gold_label"]) for row in rows])
    images = np.array([row["image"] for row in rows])
    return probabilities.argmax(axis=1) == gold, images, (probabilities, gold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", nargs="+", type=Path, help="folders that `clseave demo` made")
    parser.add_argument("--out", type=Path, required=True, help="where the models are kept")
    parser.add_argument("--clip", type=Path, help="CLIP model; unset: that of each demo")
    parser.add_argument("--preset", default="mini-ve", choices=FinetuneConfig.PRESETS)
    parser.add_argument("--grid", action="append", metavar="NAME=A,B", help="search these instead")
    parser.add_argument("--next", action="store_true", help="only one training, the next")
    arguments = parser.parse_args()
    recipes = grid(arguments.grid) if arguments.grid else RECIPES
    for demo, folder, options in missing(arguments.demos, recipes, arguments):
        print(f"{folder}: {options}", flush=True)
        train(demo, folder, options, arguments)
        if arguments.next:
            break
    table(arguments, list(recipes))


if __name__ == "__main__":
    main()
