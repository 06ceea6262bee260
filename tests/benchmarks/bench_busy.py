"""Predictions and trainings beside other programs: how OpenMP's threads should wait.

    clseave demo --out DEMO
    python tests/benchmarks/bench_busy.py --demo DEMO [--busy 0 1 3] [--settings …] [--work …]

Each piece of work runs in a process of its own, under each setting in turn, beside so many busy
programs (0: none). Prints seconds as medians of `--rounds`, and the ratios to spinning on the idle
machine. Give it the whole machine: other work makes the idle figures meaningless.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: Variables of the environment that decide how threads wait and how many there are.
_VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

#: Environments to compare; `default` is what clseave chooses for itself.
SETTINGS = {
    "spinning": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"},  # libgomp's own default
    "brief": {"GOMP_SPINCOUNT": "1000"},
    "brief, active": {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "active"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "default": {},
}

_PREDICT = """
import sys, time
from clseave_cli import VisualEntailment
runs, image = sys.argv[1:]
model = VisualEntailment.from_pretrained(runs, lang="de")
model(image, "Es gibt einen roten Kreis.")
start = time.perf_counter()
for _ in range(60):
    model(image, "Es gibt einen roten Kreis.")
print(time.perf_counter() - start)
"""

_BUSY = "while True: pass"


def predict(demo: Path, environment: dict[str, str]) -> float:
    """Seconds of 60 single predictions."""
    image = demo / "data" / "images" / "test-00000.png"
    done = _python(environment, "-c", _PREDICT, demo / "runs", image)
    return float(done.stdout)


def finetune(demo: Path, environment: dict[str, str]) -> float:
    """Seconds of 1,000 pairs of `finetune-ve`, image features apart."""
    return _training(demo, environment, "finetune-ve", "--clip", demo / "runs" / "clip",
                     "--epochs", 1)  # fmt: skip


def align(demo: Path, environment: dict[str, str]) -> float:
    """Seconds of 1,000 pairs of `align --lang de`."""
    return _training(demo, environment, "align", "--lang", "de", "--epochs", 2,
                     "--student", demo / "runs" / "encoder",
                     "--teacher", demo / "runs" / "clip-ve")  # fmt: skip


def whole_demo(demo: Path, environment: dict[str, str]) -> float:
    """Seconds of `clseave demo` from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        _python(environment, "-m", "clseave_cli", "demo", "--out", Path(folder) / "demo")
        return time.perf_counter() - start


WORK = {"predict": predict, "finetune-ve": finetune, "align": align, "demo": whole_demo}


def _training(demo: Path, environment: dict[str, str], *arguments: object) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        _python(environment, "-m", "clseave_cli", *arguments, "--preset", "mini-ve",
                "--data", demo / "data", "--runs", folder, "--out", out)  # fmt: skip
        summary = json.loads((out / "training" / "summary.json").read_text(encoding="utf-8"))
    return 1000 / float(summary["pairs_per_second"])


def _python(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """So many other programs that compute without end."""
    programs = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def main() -> None:
    """Measures and prints a table for each piece of work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="what `clseave demo` left")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--work", nargs="+", choices=WORK, default=["predict", "finetune-ve"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for work in arguments.work:
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(arguments.rounds):
            for number in arguments.busy:
                with busy(number):
                    for setting in arguments.settings:
                        taken = WORK[work](arguments.demo, SETTINGS[setting])
                        seconds.setdefault((setting, number), []).append(taken)
        print(f"{work}: seconds beside {', '.join(map(str, arguments.busy))} other programs")
        reference = seconds.get(("spinning", 0))
        for setting in arguments.settings:
            medians = [statistics.median(seconds[setting, number]) for number in arguments.busy]
            line = f"  {setting:<17}" + "".join(f"{median:9.3f}" for median in medians)
            if reference:
                idle = statistics.median(reference)
                line += "   × idle spinning:" + "".join(f"{m / idle:7.2f}" for m in medians)
            print(line, flush=True)


if __name__ == "__main__":
    main()
