"""Kills every command that writes at random moments, resumes it, and compares the output.

    python tests/benchmarks/bench_kills.py --kills 100 --out DIR
    python tests/benchmarks/bench_kills.py --kills 25 --out DIR align predict

A command is started on a small mini-VE world, killed with SIGKILL after a random time, resumed, and
so on until it ends. Its output is then compared, byte for byte, with that of undisturbed runs
(files in which two such runs agree), and the next round begins until the kills are spent. Finally,
two processes write to one output at the same time. Files of the user's beside the output must stay.
Prints a line a command. The exit status is 1 if an output differs, a file of the user's is gone or
anything is left behind.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_world
from tiny_world import CommandProcess, read_jsonl, tree

from clseave_cli.core.data import mini_ve
from clseave_cli.core.data.mini_ve.generation import Sizes

#: The latest kill, as a fraction of an undisturbed run's time.
_LATEST_KILL = 0.95
_MOST_KILLS_A_ROUND = 8
#: The longest that a command may take.
_TIMEOUT_SECONDS = 1800.0
_USERS = {"thesis.tex": b"the user's", ".output.original": b"the user's", ".other.lock": b""}


def write_world(out: Path) -> None:
    """A small mini-VE with untrained models, and rows to predict and to translate."""
    mini_ve.generate(out / "data", sizes=Sizes(120, 60, 60))
    texts = tiny_world.sentences(out / "data")
    for name in ("clip", "encoder"):
        (out / name).mkdir()
    tiny_world.write_clip(out / "clip", texts, image_size=64, vocab_size=1000)
    tiny_world.write_encoder(out / "encoder", texts, vocab_size=1000)
    images = out / "data" / "images"
    rows = [
        {"image": str(images / row["Flickr30K_ID"]), "hypothesis": row["sentence2"]}
        for row in read_jsonl(out / "data" / "snli_ve_test.de.jsonl")
    ]
    tiny_world.write_jsonl(out / "pairs.jsonl", rows)
    with (out / "de.tsv").open("w") as stream:
        for split in ("train", "dev", "test"):
            german = read_jsonl(out / "data" / f"snli_ve_{split}.de.jsonl")
            translations = {row["pairID"]: row["sentence2"] for row in german}
            for row in read_jsonl(out / "data" / f"snli_ve_{split}.jsonl"):
                stream.write(f"{row['sentence2']}\t{translations[row['pairID']]}\n")


def small_demo() -> None:
    """Makes `demo` quick in this process."""
    from clseave_cli.core import config

    mini_ve.generate = functools.partial(mini_ve.generate, sizes=Sizes(120, 60, 60))
    for stage in (config.PretrainConfig, config.FinetuneConfig, config.AlignConfig):
        stage.PRESETS["mini-ve"] |= {"epochs": 1}


@dataclass(frozen=True)
class Writer:
    """A command: its arguments, the option for its output, and the arguments that resume it."""

    command: str
    option: str = "--out"
    resume: str = ""

    def start(self, output: Path, logs: Path, resume: bool) -> CommandProcess:
        more = self.resume.split() if resume else []
        arguments = [*shlex.split(self.command), self.option, str(output), *more]
        before = small_demo if arguments[0] == "demo" else None
        return CommandProcess(*arguments, folder=logs, before=before)


def writers(out: Path) -> dict[str, Writer]:
    """Every command that writes, each after those whose output it reads."""
    out_dir = shlex.quote(str(out))
    training = "--epochs 6 --batch-size 16 --device cpu --precision fp32 --checkpoint-minutes 0.003"
    data, models = f"--data {out_dir}/data", f"--runs {out_dir}/models"
    student = f"{data} --lang de --student {out_dir}/encoder --teacher {out_dir}/models/clip-ve"
    shape = "--image-size 64 --width 32 --layers 1 --heads 2 --embedding-dim 16"
    clip = f"--clip {out_dir}/clip --patience 99 --learning-rate 0.001"
    rows = f"--input {out_dir}/pairs.jsonl"
    translations = f"--engine file --translations {out_dir}/de.tsv --match text"
    resume = "--resume"
    return {
        "pretrain": Writer(f"pretrain {data} {shape} {training}", resume=resume),
        "finetune-ve": Writer(f"finetune-ve {data} {clip} {training}", resume=resume),
        "align": Writer(f"align {student} {training}", resume=resume),
        "autoencode": Writer(f"autoencode {student} {training}", resume=resume),
        "evaluate": Writer(f"evaluate {data} {models} --resamples 200 --device cpu", "--report"),
        "export": Writer(f"export {models}"),
        "predict": Writer(
            f"predict {rows} {models} --lang de --batch-size 1 --device cpu", "--output", resume
        ),
        "translate": Writer(f"translate {data} --lang de {translations}"),
        "demo": Writer("demo --device cpu"),
    }


def content(output: Path) -> dict[str, bytes]:
    """The bytes of an output, a file or a folder."""
    return tree(output) if output.is_dir() else {"": output.read_bytes()}


def run_to_end(writer: Writer, output: Path, logs: Path, resume: bool = False) -> float:
    """Runs a command undisturbed; returns its seconds."""
    begin = time.monotonic()
    process = writer.start(output, logs, resume)
    process.process.join(_TIMEOUT_SECONDS)
    if process.wait():
        raise SystemExit(process.stderr)
    return time.monotonic() - begin


def run_with_kills(
    writer: Writer, output: Path, logs: Path, latest: float, most: int, generator: random.Random
) -> int:
    """Runs a command to its end with up to `most` kills; returns their number."""
    for number in range(most):
        process = writer.start(output, logs, number > 0)
        process.process.join(generator.uniform(0, latest))
        process.process.kill()
        code = process.wait()
        if code == 0:
            return number
        if code != -9:
            raise SystemExit(process.stderr)
    run_to_end(writer, output, logs, resume=True)
    return most


def run_twice(writer: Writer, output: Path, logs: Path) -> list[int]:
    """Exit codes of two processes that write one output; a refusal must say why."""
    both = [writer.start(output, logs / str(number), False) for number in range(2)]
    for process in both:
        process.process.join(_TIMEOUT_SECONDS)
    codes = [process.wait() for process in both]
    reasons = ("another process", "an unfinished run")
    for process, code in zip(both, codes, strict=True):
        if code and not any(reason in process.stderr for reason in reasons):
            raise SystemExit(process.stderr)
    return codes


def fresh(folder: Path) -> Path:
    """The path of an output in an empty folder, with files of the user's beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, users in _USERS.items():
        (folder / name).write_bytes(users)
    return folder / "output"


def faults_of(output: Path, expected: dict[str, bytes]) -> list[str]:
    """What is wrong after the command has ended."""
    files = content(output)
    faults = [f"{name}: differs" for name in expected if files.get(name) != expected[name]]
    faults += [f"{path}: left behind" for path in files if ".clseave-" in path]
    beside = {p.name: p.read_bytes() for p in output.parent.iterdir() if p != output}
    return faults + [
        f"{name}: gone, changed or left behind"
        for name in beside | _USERS
        if beside.get(name) != _USERS.get(name)
    ]


def bench(name: str, writer: Writer, out: Path, kills: int, seed: int) -> bool:
    """Kills one command and prints its line; returns whether there was no fault."""
    undisturbed, seconds = [], 0.0
    for number in range(2):  # the first one also warms up
        output = fresh(out / f"undisturbed-{name}-{number}")
        seconds = run_to_end(writer, output, out / "logs")
        undisturbed.append(content(output))
    expected = {n: data for n, data in undisturbed[0].items() if undisturbed[1].get(n) == data}
    assert expected, f"{name}: two runs agree in no file"
    generator, left, num_rounds, faults = random.Random(seed), kills, 0, []
    latest = _LATEST_KILL * seconds
    while left > 0:
        output = fresh(out / "killed")
        most = min(left, _MOST_KILLS_A_ROUND)
        num_kills = run_with_kills(writer, output, out / "logs", latest, most, generator)
        if not num_kills:
            latest *= 0.7  # the machine has become faster
        left, num_rounds = left - num_kills, num_rounds + 1
        faults += faults_of(output, expected)
    output = fresh(out / "killed")
    codes = run_twice(writer, output, out / "logs")
    if codes == [0, 0] or sorted(map(bool, codes)) == [False, True]:
        faults += faults_of(output, expected)
    else:
        faults.append(f"two at once: exit codes {codes}")
    print(
        f"{name:<12} {kills} kills over {num_rounds} rounds of {seconds:.1f} s undisturbed, "
        f"{len(expected)} of {len(undisturbed[0])} files compared; two at once: {codes}; "
        f"{len(faults)} faults",
        flush=True,
    )
    for fault in faults:
        print(f"    {fault}", flush=True)
    return not faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help="unset: all that write")
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out = options.out.resolve()
    os.environ["CLSEAVE_CACHE"] = str(out / "cache")
    every = writers(out)
    if not (out / "encoder").is_dir():
        write_world(out)
    for name, folder in (("finetune-ve", "clip-ve"), ("align", "align-de")):
        if not (out / "models" / folder).is_dir():
            run_to_end(every[name], out / "models" / folder, out / "logs")
    names = options.commands or list(every)
    ends = [options.kills * n // len(names) for n in range(len(names) + 1)]
    passed = [
        bench(name, every[name], out, end - start, options.seed)
        for name, (start, end) in zip(names, itertools.pairwise(ends), strict=True)
    ]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
