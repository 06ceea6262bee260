"""Two ways to train students for several languages, side by side on the same rows and seeds.

    python tests/benchmarks/compare_students.py --demo DIR … --out DIR [--only NAME …]
        [--student-seed N …]

Each DIR is what `clseave demo --out DIR` left, one for each seed; the students take the demo's
seed, or there is a set of them for each seed named. Every question compares two sets of students on
the test split: accuracy by language, the paired difference with its 95 % interval (resampled by
photo), and whether it is a tie. What is finished is not trained again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from clseave_cli.commands.terminal import TerminalProgress
from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, EvaluateConfig
from clseave_cli.core.data.records import ENGLISH, languages
from clseave_cli.core.evaluation.comparison import LanguageComparison, compare_reports
from clseave_cli.core.evaluation.run import evaluate
from clseave_cli.core.files import read_json


class Students(NamedTuple):
    """A set of students: one for each language, or one for all of them."""

    together: bool
    options: dict[str, Any]


FIVE = Students(together=False, options={})
# Both until the dev figure has long stopped rising, the best epoch's weights kept: so neither is
# ahead for having taken more steps.
FEW = {"limit": 500, "epochs": 40}
QUESTIONS = {
    "one for all, 4 epochs": (Students(True, {"epochs": 4}), FIVE),
    "one for all, 3 epochs": (Students(True, {"epochs": 3}), FIVE),
    "500 sentences, one for all": (Students(True, FEW), Students(False, FEW)),
    "500 sentences, one for all, 8 epochs": (
        Students(True, FEW | {"epochs": 8}),
        Students(False, FEW | {"epochs": 8}),
    ),
}


def seed_of(demo: Path) -> int:
    """The seed a demo was made with."""
    seed: int = read_json(demo / "runs" / "clip-ve" / "training" / "run.json")["options"]["seed"]
    return seed


def report(demo: Path, out: Path, wanted: Students, seed: int) -> Path:
    """Trains a set of students, unless they are there, and evaluates them; returns the report."""
    langs = [lang for lang in languages(demo / "data", "train") if lang != ENGLISH]
    name = "-".join(str(value) for value in wanted.options.values())
    group_name = f"seed{seed_of(demo)}" + ("" if seed == seed_of(demo) else f"-students{seed}")
    students = out / group_name / ("together" if wanted.together else "single") / (name or "all")
    if (students / "report" / "results.json").is_file():
        return students / "report"
    for group in [tuple(langs)] if wanted.together else [(lang,) for lang in langs]:
        preset = AlignConfig.PRESETS["mini-ve"] | wanted.options
        align(
            AlignConfig(
                data=str(demo / "data"),
                runs=demo / "runs",
                student=str(demo / "runs" / "encoder"),
                lang=group,
                out=students / f"align-{'+'.join(group)}",
                seed=seed,
                device="cpu",
                resume=True,
                **preset,
            ),
            TerminalProgress(),
        )
    evaluate(
        EvaluateConfig(
            data=str(demo / "data"),
            runs=(demo / "runs",),
            students=students,
            device="cpu",
            report=students / "report",
        ),
        TerminalProgress(),
    )
    return students / "report"


def cell(found: LanguageComparison) -> str:
    """Both accuracies and their difference, in %."""
    low, high = found.difference.low or 0.0, found.difference.high or 0.0
    return (
        f"{100 * found.accuracy_first:.1f} against {100 * found.accuracy_second:.1f}: "
        f"{100 * found.difference.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        + ("" if found.verdict == "tie" else " *")
    )


def mean_cell(differences: tuple[float, ...]) -> str:
    """The mean difference over the runs, in points, with its 95 % interval by Student's t."""
    points = 100 * np.array(differences)
    mean, spread = points.mean(), stats.sem(points)
    low, high = stats.t.interval(0.95, len(points) - 1, mean, spread)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def main() -> None:
    """Prints a Markdown table for each question; a star marks what is no tie."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--student-seed", type=int, nargs="*", default=[])
    given = parser.parse_args()
    runs = [(demo, seed) for demo in given.demo for seed in given.student_seed or [seed_of(demo)]]
    for question in given.only:
        first, second = QUESTIONS[question]
        print(f"\n{question} (as against: {second})\n")
        differences = []
        for number, (demo, seed) in enumerate(runs):
            compared = [
                found
                for found in compare_reports(
                    report(demo, given.out, first, seed), report(demo, given.out, second, seed)
                ).languages
                if found.lang != ENGLISH
            ]
            if number == 0:
                print(f"| demo, seed | {' | '.join(found.lang for found in compared)} | wins |")
                print("|---|" + "---|" * (len(compared) + 1))
            differences.append([found.difference.value for found in compared])
            wins = sum(value > 0 for value in differences[-1])
            cells = " | ".join(cell(found) for found in compared)
            print(f"| {demo.name}, {seed} | {cells} | {wins} of {len(compared)} |", flush=True)
        if len(runs) > 1:
            print(f"| mean | {' | '.join(map(mean_cell, zip(*differences, strict=True)))} | |")


if __name__ == "__main__":
    main()
