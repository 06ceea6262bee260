"""Kills `finetune-ve` and `align` on a mini-VE world at random moments, and resumes them.

    python tests/benchmarks/bench_kills.py --stage align --kills 25 --out DIR

A run is started with `--resume`, killed with SIGKILL after a random time, started again, and so on
until it ends; then its weights are compared, byte for byte, with those of a run that nobody
disturbed, and the next run begins, until all kills are spent. A kill can hit the reading of data,
a training step, the writing of a state, the publication of the model, or a run that is over (which
is not counted). Prints one line a run and a summary, with what was left hidden: after a kill in the
partial folder, and beside the models after a run. The exit status is 1 if any weights differ.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_world import CLIP_SHAPE, ENCODER_SHAPE, CommandProcess, sentences, weights

from clseave_cli.core.data.mini_ve import generate
from clseave_cli.core.data.mini_ve.generation import Sizes
from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder

_NAMES = {"finetune-ve": "clip-ve", "align": "align-de"}
#: Of an undisturbed run's time; later, the run is mostly over.
_LATEST_KILL = 0.9


def write_world(out: Path, scenes: int) -> None:
    """A small mini-VE with untrained models."""
    generate(out / "data", sizes=Sizes(scenes, 100, 100))
    texts = sentences(out / "data")
    for name in ("clip", "encoder"):
        (out / name).mkdir()
    new_clip(out / "clip", texts, ClipShape(**CLIP_SHAPE | {"image_size": 64, "vocab_size": 1000}))
    new_encoder(out / "encoder", texts, **ENCODER_SHAPE | {"vocab_size": 1000})


def arguments(stage: str, out: Path, model: Path) -> list[str]:
    """The command of a stage that writes `model`."""
    own = {
        "finetune-ve": ["--clip", out / "clip", "--patience", "99", "--learning-rate", "1e-3"],
        "align": ["--lang", "de", "--student", out / "encoder", "--teacher", out / "clip-ve"],
    }[stage]
    shared = [
        "--data", out / "data", "--out", model, "--epochs", "6", "--batch-size", "16",
        "--device", "cpu", "--checkpoint-minutes", "0.003", "--resume",
    ]  # fmt: skip
    return [str(argument) for argument in (stage, *own, *shared)]


def run_to_end(command: list[str], said: Path) -> float:
    """Runs a command undisturbed; returns how long it took."""
    begin = time.monotonic()
    process = CommandProcess(*command, folder=said)
    if process.wait():
        raise SystemExit(process.stderr)
    return time.monotonic() - begin


def run_with_kills(
    command: list[str], model: Path, said: Path, latest: float, most: int, generator: random.Random
) -> tuple[int, int]:
    """Runs a command that writes `model` to its end, killing it up to `most` times.

    Returns:
        how often, and how much at most lay hidden in the partial folder after a kill.
    """
    partial, most_hidden = model.with_name(f"{model.name}.partial"), 0
    for number in range(most):
        process = CommandProcess(*command, folder=said)
        process.process.join(generator.uniform(0, latest))
        process.process.kill()
        code = process.wait()
        if code == 0:
            return number, most_hidden
        if code != -9:
            raise SystemExit(process.stderr)
        hidden = [*partial.glob(".*"), *(partial / "training").glob(".*")]
        most_hidden = max(most_hidden, len(hidden))
    run_to_end(command, said)
    return most, most_hidden


def main() -> None:
    """Kills, resumes, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=_NAMES, required=True)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--kills-a-run", type=int, default=8, help="at most")
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out = options.out
    os.environ["CLSEAVE_CACHE"] = str(out / "cache")
    if not (out / "encoder").is_dir():
        write_world(out, options.scenes)
    if options.stage == "align" and not (out / "clip-ve").is_dir():
        run_to_end(arguments("finetune-ve", out, out / "clip-ve"), out / "said")

    reference = out / f"undisturbed-{options.stage}"
    run_to_end(arguments(options.stage, out, out / "first"), out / "said")  # warms up
    seconds = run_to_end(arguments(options.stage, out, reference), out / "said")
    expected = weights(reference)
    generator = random.Random(options.seed)
    begin, left, num_runs, num_different, num_leftovers = time.monotonic(), options.kills, 0, 0, 0
    most_hidden = 0
    while left:
        runs = out / "killed"
        model = runs / _NAMES[options.stage]
        command = arguments(options.stage, out, model)
        most = min(left, options.kills_a_run)
        kills, hidden = run_with_kills(
            command, model, out / "said", _LATEST_KILL * seconds, most, generator
        )
        most_hidden = max(most_hidden, hidden)
        same = weights(model) == expected
        leftovers = [path for path in runs.iterdir() if path != model]
        left, num_runs = left - kills, num_runs + 1
        num_different, num_leftovers = num_different + (not same), num_leftovers + len(leftovers)
        print(f"run {num_runs}: {kills} kills, {'same weights' if same else 'OTHER WEIGHTS'}")
        shutil.rmtree(runs)
    print(
        f"{options.stage}: {options.kills} kills over {num_runs} runs of {seconds:.1f} s "
        f"undisturbed, {num_different} with other weights, at most {most_hidden} hidden in a "
        f"partial folder after a kill, {num_leftovers} left behind; "
        f"{time.monotonic() - begin:.0f} s"
    )
    sys.exit(num_different > 0)


if __name__ == "__main__":
    main()
