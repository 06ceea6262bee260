"""Objective × pooling × projection, in one table: on mini-VE, and on parallel text.

    python tests/benchmarks/compare_objectives.py --demo DIR --out DIR [--lang de] [--together]
    python tests/benchmarks/compare_objectives.py --demo DIR --out DIR \\
        --text DIR --split sick --lang nl --lang ja

The first form trains students on a demo's data (`clseave demo --out DIR`: data, runs/clip-ve,
runs/encoder) with the preset mini-ve, and prints test accuracies. The second has no images: it
trains on the parallel text of a folder, from a small encoder made for that text, against the demo's
teacher, holds a twentieth of the sentences out, and prints error, cosine and retrieval on these.

`--objective` and `--pooling` (repeat) restrict the grid of 4 × 3; `--seed`
(repeat) gives mean ± sample standard deviation. Students that are there are not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, get_args

from clseave_cli.commands.terminal import TerminalProgress
from clseave_cli.core import config as options_of
from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, EvaluateConfig
from clseave_cli.core.data.records import languages, read_split
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.models.scratch import new_encoder

_FACTORS = {
    "objective": get_args(options_of.ObjectiveName),
    "pooling": get_args(options_of.Pooling),
}
_TEXT_FIGURES = {"mse": "{:.4f}", "cosine": "{:.3f}", "recall_at_10": "{:.3f}"}

Figures = dict[str, dict[str, float]]  # by language, by name


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training" / "summary.json").read_text())


def text_encoder(folder: Path, text: Path, split: str, langs: list[str]) -> Path:
    """A small encoder whose vocabulary is learnt from the text."""
    if not folder.is_dir():
        new_encoder(
            folder,
            [
                sentence
                for lang in langs
                for sentence in read_split(
                    text, split, lang, labelled=False, with_images=False
                ).hypotheses
            ],
            vocab_size=8000,
        )
    return folder


def train_and_measure(
    given: argparse.Namespace, langs: tuple[str, ...], choice: dict[str, str], seed: int
) -> Figures:
    """The figures of one student, by language."""
    runs = given.demo / "runs"
    folder = given.out / "-".join([*choice.values(), str(seed), "+".join(langs)])
    preset = AlignConfig.PRESETS["mini-ve"]
    if given.epochs is not None:
        preset = preset | {"epochs": given.epochs}
    shared = preset | choice | {
        "runs": runs, "lang": langs, "seed": seed, "resume": True,
        "out": folder / f"align-{'+'.join(langs)}", "limit": given.limit,
    }  # fmt: skip
    if given.text is not None:
        encoder = text_encoder(given.out / "encoder", given.text, given.split, given.lang)
        config = AlignConfig(
            data=str(given.text), student=str(encoder), train_split=given.split,
            dev_split="held-out", **shared,
        )  # fmt: skip
        result = align(config, TerminalProgress())
        found = summary(result.folder)
        dev = found["dev"]
        return {
            lang: {
                **{name: dev.get(f"{name}/{lang}", dev[name]) for name in _TEXT_FIGURES},
                "seconds": found["wall_seconds"],
            }
            for lang in langs
        }
    config = AlignConfig(data=str(given.demo / "data"), student=str(runs / "encoder"), **shared)
    result = align(config, TerminalProgress())
    document = evaluate(
        EvaluateConfig(
            data=config.data, runs=(runs,), students=folder, lang=("en", *langs), resamples=1
        ),
        TerminalProgress(),
    )
    seconds = summary(result.folder)["wall_seconds"]
    return {
        r.lang: {"accuracy": r.accuracy, "ratio": r.ratio_to_english or 0.0, "seconds": seconds}
        for r in document.results
        if r.lang != "en"
    }


def mean_and_spread(values: list[float], form: str) -> str:
    shown = form.format(statistics.mean(values))
    return shown if len(values) < 2 else f"{shown} ± {form.format(statistics.stdev(values))}"


def main() -> None:
    """Prints a Markdown table, a row for each combination."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--split", default="train", help="Of --text.")
    parser.add_argument("--lang", action="append")
    parser.add_argument("--together", action="store_true", help="One student of all languages.")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int)
    for factor, values in _FACTORS.items():
        parser.add_argument(f"--{factor}", action="append", choices=values)
    given = parser.parse_args()
    if given.lang is None:
        folder, split = (given.text, given.split) if given.text else (given.demo / "data", "train")
        given.lang = [lang for lang in languages(folder, split) if lang != "en"]
    figures = dict(_TEXT_FIGURES) if given.text else {"accuracy": "{:.2%}", "ratio": "{:.4f}"}
    students = [tuple(given.lang)] if given.together else [(lang,) for lang in given.lang]
    chosen = [getattr(given, factor) or values for factor, values in _FACTORS.items()]

    header = [*_FACTORS, *(f"{lang} {name}" for lang in given.lang for name in figures), "seconds"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(_FACTORS) + "---:|" * (len(header) - len(_FACTORS)), flush=True)
    for values in itertools.product(*chosen):
        choice = dict(zip(_FACTORS, values, strict=True))
        seeds: list[Figures] = []
        for seed in given.seed or [0]:
            found: Figures = {}
            for langs in students:
                found |= train_and_measure(given, langs, choice, seed)
            seeds.append(found)
        cells = [
            mean_and_spread([own[lang][name] for own in seeds], form)
            for lang in given.lang
            for name, form in figures.items()
        ]
        seconds = [sum(own[langs[0]]["seconds"] for langs in students) for own in seeds]
        row = [*values, *cells, mean_and_spread(seconds, "{:.0f}")]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
