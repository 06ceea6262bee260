"""One run of `translate`, killed again and again: what comes of it, and what it cost."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from loopback import Loopback

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.corpus import translate
from clseave_cli.core.translation.engine import Identity
from clseave_cli.core.translation.memory import Memory

CONCURRENCY = 4

# A server that forks, with everything imported: a start takes milliseconds, so that a hundred of
# them leave most kills to hit the work itself.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["clseave_cli.core.translation.corpus", "clseave_cli.core.translation.web"]
)


def _translate(data: Path, memory: Path, url: str) -> None:
    """What is killed: the whole use case, in a process of its own."""
    sys.modules["lingua"] = None  # type: ignore[assignment]  # slow to load, a hundred times over
    summary = translate(
        TranslateConfig(
            data=data, lang=("de",), engine="google", url=url, memory=memory,
            concurrency=CONCURRENCY, requests_per_second=1e6,
        )
    )  # fmt: skip
    if summary.stopped or any(file.num_failed for file in summary.files):
        sys.exit(1)


@dataclass(frozen=True)
class KillReport:
    """What a run with kills came to.

    Attributes:
        num_kills: SIGKILLs sent.
        num_texts: distinct texts there were to translate.
        num_requests: requests the server saw.
        lost: per kill, how many requests were under way and so were made again.
        identical: whether the file is that of an undisturbed run.
        leftovers: files that do not belong there at the end.
        seconds: how long all of it took.
    """

    num_kills: int
    num_texts: int
    num_requests: int
    lost: list[int]
    identical: bool
    leftovers: list[str]
    seconds: float


def write_rows(path: Path, num_rows: int) -> list[str]:
    """An SNLI-VE-like file, every fourth sentence an old one; returns the distinct sentences."""
    generator = random.Random(0)
    texts: dict[str, None] = {}
    with path.open("w", encoding="utf-8") as stream:
        for index in range(num_rows):
            if texts and generator.random() < 0.25:
                text = f"A man number {generator.randrange(index)} sleeps."
            else:
                text = f"A man number {index} sleeps."
            texts[text] = None
            row = {"pairID": f"{index}.jpg#0r1e", "sentence2": text, "gold_label": "neutral"}
            stream.write(json.dumps(row) + "\n")
    return list(texts)


def run_with_kills(folder: Path, num_rows: int, num_kills: int, seed: int) -> KillReport:
    """Translates `num_rows` rows against a loopback server, with SIGKILLs at random moments."""
    start = time.monotonic()
    generator = random.Random(seed)
    data = folder / "data"
    data.mkdir(parents=True)
    texts = write_rows(data / "snli_ve_train.jsonl", num_rows)
    output = data / "snli_ve_train.de.jsonl"
    with Loopback("google") as server:
        _finish(_start(data, folder / "undisturbed.sqlite", server))
        assert sorted(server.requested) == sorted(texts)
        expected = output.read_bytes()
        output.unlink()
        server.requested.clear()
        server.answered.clear()
        lost = []
        for number in range(num_kills):
            # So far into the work, on average, that what is left lasts for the kills to come.
            left = (len(texts) - len(set(server.requested))) / (num_kills - number + 1)
            lost.append(_run_and_kill(data, folder / "memory.sqlite", server, generator, left))
        _finish(_start(data, folder / "memory.sqlite", server))
        num_requests = len(server.requested)
    kept = {"snli_ve_train.jsonl", output.name}
    leftovers = [path.name for path in data.iterdir() if path.name not in kept]
    return KillReport(
        num_kills, len(texts), num_requests, lost, output.read_bytes() == expected, leftovers,
        time.monotonic() - start,
    )  # fmt: skip


def _start(data: Path, memory: Path, server: Loopback) -> ForkServerProcess:
    process = _CONTEXT.Process(target=_translate, args=(data, memory, server.url))
    process.start()
    return process


def _finish(process: ForkServerProcess) -> None:
    process.join()
    assert process.exitcode == 0


def _run_and_kill(
    data: Path,
    memory_path: Path,
    server: Loopback,
    generator: random.Random,
    num_requests: float,
) -> int:
    """One run, killed after about `num_requests`; returns how many of them were in vain."""
    before = len(server.requested)
    process = _start(data, memory_path, server)
    if generator.random() < 0.1:  # while it starts, or reads, or looks around
        time.sleep(generator.uniform(0, 0.3))
    else:
        target = before + generator.uniform(1, 1.5 * num_requests)
        while len(server.requested) < target and process.is_alive():
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.003))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
    server.settle()
    asked = set(server.requested[before:])
    with Memory(memory_path) as memory:
        number = memory.identity_id(Identity("google", server.url, "", "", "en", "de"))
        return len(asked - memory.find(number, asked).keys())
