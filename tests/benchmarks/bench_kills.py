"""Kills every command that writes at random moments, runs it again, and compares what it wrote.

    python tests/benchmarks/bench_kills.py --kills 100 --out DIR
    python tests/benchmarks/bench_kills.py --kills 25 --out DIR align predict

A command is started on a small mini-VE world, killed with SIGKILL after a random time, started
again with what continues it, and so on, until it ends. Then its output is compared, byte for byte,
with that of runs that nobody disturbed (those of its files in which two such runs agree), and the
next round begins, until the kills are spent. Then two processes are started at one output at the
same time. Beside every output lie files of the user's, which must stay. Prints a line a command;
the exit status is 1 if an output differs, anything of the user's is gone or anything is left
behind.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_world import (
    CLIP_SHAPE,
    ENCODER_SHAPE,
    CommandProcess,
    read_jsonl,
    sentences,
    tree,
    write_jsonl,
)

from clseave_cli.core.data import mini_ve
from clseave_cli.core.data.mini_ve.generation import Sizes
from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder

#: Of an undisturbed run's time; later, the run is mostly over.
_LATEST_KILL = 0.95
_MOST_KILLS_A_ROUND = 8
#: Seconds that a command may take.
_LONGEST = 1800.0
_USERS = {"thesis.tex": b"the user's", ".output.original": b"the user's", ".other.lock": b""}


def write_world(out: Path) -> None:
    """A small mini-VE with untrained models, and rows to judge and to translate."""
    mini_ve.generate(out / "data", sizes=Sizes(120, 60, 60))
    texts = sentences(out / "data")
    for name in ("clip", "encoder"):
        (out / name).mkdir()
    new_clip(out / "clip", texts, ClipShape(**CLIP_SHAPE | {"image_size": 64, "vocab_size": 1000}))
    new_encoder(out / "encoder", texts, **ENCODER_SHAPE | {"vocab_size": 1000})
    rows = read_jsonl(out / "data" / "snli_ve_test.de.jsonl")
    write_jsonl(
        out / "pairs.jsonl",
        [
            {
                "image": str(out / "data" / "images" / row["Flickr30K_ID"]),
                "hypothesis": row["sentence2"],
            }
            for row in rows
        ],
    )
    with (out / "de.tsv").open("w") as stream:
        for split in ("train", "dev", "test"):
            english = read_jsonl(out / "data" / f"snli_ve_{split}.jsonl")
            german = read_jsonl(out / "data" / f"snli_ve_{split}.de.jsonl")
            translations = {row["pairID"]: row["sentence2"] for row in german}
            for row in english:
                stream.write(f"{row['sentence2']}\t{translations[row['pairID']]}\n")


def small_demo() -> None:
    """Makes `demo` in this process a matter of seconds."""
    from clseave_cli.core import config

    mini_ve.generate = functools.partial(mini_ve.generate, sizes=Sizes(120, 60, 60))
    for stage in (config.PretrainConfig, config.FinetuneConfig, config.AlignConfig):
        stage.PRESETS["mini-ve"] |= {"epochs": 1}


@dataclass(frozen=True)
class Writer:
    """A command: its arguments without the output, and what continues it."""

    arguments: tuple[object, ...]
    option: str = "--out"
    resume: tuple[str, ...] = ()

    def start(self, output: Path, said: Path, resume: bool) -> CommandProcess:
        more = self.resume if resume else ()
        return CommandProcess(
            *map(str, (*self.arguments, self.option, output, *more)),
            folder=said,
            before=small_demo if self.arguments[0] == "demo" else None,
        )


def writers(out: Path) -> dict[str, Writer]:
    """Every command that writes, in the order in which each has what it reads."""
    training = ("--epochs", 6, "--batch-size", 16, "--device", "cpu", "--precision", "fp32",
                "--checkpoint-minutes", 0.003)  # fmt: skip
    data, models = ("--data", out / "data"), ("--runs", out / "models")
    student = (*data, "--lang", "de", "--student", out / "encoder")
    teacher = ("--teacher", out / "models" / "clip-ve")
    shape = ("--image-size", 64, "--width", 32, "--layers", 1, "--heads", 2, "--embedding-dim", 16)
    resume = ("--resume",)
    return {
        "pretrain": Writer(("pretrain", *data, *shape, *training), resume=resume),
        "finetune-ve": Writer(
            ("finetune-ve", *data, "--clip", out / "clip", "--patience", 99, "--learning-rate",
             1e-3, *training),
            resume=resume,
        ),
        "align": Writer(("align", *student, *teacher, *training), resume=resume),
        "autoencode": Writer(("autoencode", *student, *teacher, *training), resume=resume),
        "evaluate": Writer(
            ("evaluate", *data, *models, "--resamples", 200, "--device", "cpu"), "--report"
        ),
        "export": Writer(("export", *models)),
        "predict": Writer(
            ("predict", "--input", out / "pairs.jsonl", *models, "--lang", "de", "--batch-size", 1,
             "--device", "cpu"),
            "--output",
            resume,
        ),
        "translate": Writer(
            ("translate", *data, "--lang", "de", "--engine", "file", "--translations",
             out / "de.tsv", "--match", "text"),
        ),
        "demo": Writer(("demo", "--device", "cpu")),
    }  # fmt: skip


def content(output: Path) -> dict[str, bytes]:
    """The bytes of an output, a file or a folder."""
    return tree(output) if output.is_dir() else {"": output.read_bytes()}


def run_to_end(writer: Writer, output: Path, said: Path, resume: bool = False) -> float:
    """Runs a command undisturbed; returns how long it took."""
    begin = time.monotonic()
    process = writer.start(output, said, resume)
    process.process.join(_LONGEST)
    if process.wait():
        raise SystemExit(process.stderr)
    return time.monotonic() - begin


def run_with_kills(
    writer: Writer, output: Path, said: Path, latest: float, most: int, generator: random.Random
) -> int:
    """Runs a command to its end, killing it up to `most` times; returns how often it was killed."""
    for number in range(most):
        process = writer.start(output, said, number > 0)
        process.process.join(generator.uniform(0, latest))
        process.process.kill()
        code = process.wait()
        if code == 0:
            return number
        if code != -9:
            raise SystemExit(process.stderr)
    run_to_end(writer, output, said, resume=True)
    return most


def run_twice(writer: Writer, output: Path, said: Path) -> list[int]:
    """Exit codes of two processes at one output; one that is refused must say why."""
    both = [writer.start(output, said / str(number), False) for number in range(2)]
    for process in both:
        process.process.join(_LONGEST)
    codes = [process.wait() for process in both]
    for process, code in zip(both, codes, strict=True):
        if code and not any(
            words in process.stderr for words in ("another process", "an unfinished run")
        ):
            raise SystemExit(process.stderr)
    return codes


class Round:
    """A fresh folder for an output, with files of the user's beside it."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, users in _USERS.items():
            (folder / name).write_bytes(users)
        self._folder, self.output = folder, folder / "output"

    def faults(self, expected: dict[str, bytes]) -> list[str]:
        """What is not as it should be after the command has ended."""
        there = content(self.output)
        faults = [f"{name}: differs" for name in expected if there.get(name) != expected[name]]
        faults += [f"{path}: left behind" for path in there if ".clseave-" in path]
        beside = {p.name: p.read_bytes() for p in self._folder.iterdir() if p != self.output}
        return faults + [
            f"{name}: gone, changed or left behind"
            for name in beside | _USERS
            if beside.get(name) != _USERS.get(name)
        ]


def bench(name: str, writer: Writer, out: Path, kills: int, seed: int) -> bool:
    """Kills one command, prints its line, and says whether all was well."""
    undisturbed, seconds = [], 0.0
    for number in range(2):  # the first one also warms up
        output = Round(out / f"undisturbed-{name}-{number}").output
        seconds = run_to_end(writer, output, out / "said")
        undisturbed.append(content(output))
    expected = {n: data for n, data in undisturbed[0].items() if undisturbed[1].get(n) == data}
    assert expected, f"{name}: two runs agree in no file"
    generator, left, num_rounds, faults = random.Random(seed), kills, 0, []
    latest = _LATEST_KILL * seconds
    while left > 0:
        this = Round(out / "killed")
        most = min(left, _MOST_KILLS_A_ROUND)
        num_kills = run_with_kills(writer, this.output, out / "said", latest, most, generator)
        if not num_kills:
            latest *= 0.7  # the machine has become faster
        left, num_rounds = left - num_kills, num_rounds + 1
        faults += this.faults(expected)
    this = Round(out / "killed")
    codes = run_twice(writer, this.output, out / "said")
    if codes == [0, 0] or sorted(map(bool, codes)) == [False, True]:
        faults += this.faults(expected)
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
    """Kills, runs again, compares."""
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
            run_to_end(every[name], out / "models" / folder, out / "said")
    names = options.commands or list(every)
    kills = [options.kills * (n + 1) // len(names) - options.kills * n // len(names)
             for n in range(len(names))]  # fmt: skip
    well = [
        bench(name, every[name], out, number, options.seed)
        for name, number in zip(names, kills, strict=True)
    ]
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
