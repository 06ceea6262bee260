"""Measures what `translate` must reach: `python tests/benchmarks/bench_translate.py [NAME …]`.

Names: memory, scale, nmt, kills, faults. Each prints its figures; nothing is asserted about time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[1] / "translation"), str(_HERE.parents[2])]

_WORDS = [
    *("a", "the", "man", "woman", "dog", "child", "red", "blue", "green", "shirt", "street"),
    *("field", "park", "bicycle", "ball", "table", "sits", "runs", "plays", "holds", "watches"),
    *("two", "three", "people", "are", "is", "riding", "outside", "near", "front", "of", "with"),
]


def sentence(index: int) -> str:
    """A sentence like a hypothesis, about 7 words, different for every index."""
    generator = random.Random(index)
    words = generator.choices(_WORDS, k=generator.randint(4, 9))
    return f"{' '.join(words).capitalize()} {index}."


def _say(**figures: object) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def _calibrate() -> float:
    """Seconds for ten million rounds of a plain loop: how much of a core there is just now."""
    start, total = time.perf_counter(), 0
    for number in range(10_000_000):
        total += number
    return round(time.perf_counter() - start, 2)


def _fill(folder: Path, num_rows: int) -> Path:
    """A data file of `num_rows` rows and a memory that holds every translation."""
    from clseave_cli.core.translation.engine import Identity
    from clseave_cli.core.translation.memory import Entry, Memory
    from clseave_cli.core.translation.quality import Checks

    version = Checks("en", "de").version
    with (
        Memory(folder / "memory.sqlite") as memory,
        (folder / "snli_ve_train.jsonl").open("w", encoding="utf-8") as stream,
    ):
        identity = memory.identity_id(
            Identity("google", "http://127.0.0.1:9/m", "", "", "en", "de")
        )
        entries = []
        for index in range(num_rows):
            text = sentence(index)
            row = {
                "Flickr30K_ID": f"{index % 31783}.jpg",
                "pairID": f"{index}.jpg#2r1n",
                "sentence1": "Two people in a park are looking at something outside the picture.",
                "sentence2": text,
                "gold_label": "neutral",
                "captionID": f"{index}.jpg#2",
            }
            stream.write(json.dumps(row) + "\n")
            entries.append((text, Entry(f"Übersetzt: {text}", 1, version, ())))
            if len(entries) == 20_000 or index == num_rows - 1:
                memory.store(identity, entries)
                entries.clear()
    return folder


_WRITE = """
import json, resource, sys
from pathlib import Path
from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.corpus import translate
folder = Path(sys.argv[1])
summary = translate(TranslateConfig(
    data=folder, lang=("de",), engine="google", url="http://127.0.0.1:9/m",
    memory=folder / "memory.sqlite",
))
file = summary.files[0]
assert file.num_from_memory == file.num_rows
print(json.dumps({
    "rows": file.num_rows, "seconds": round(file.seconds, 2),
    "rows_per_second": round(file.num_rows / file.seconds),
    "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
}))
"""


def _write_out(num_rows: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        _fill(Path(name), num_rows)
        # In a process of its own, so that the peak of memory is its own.
        out = subprocess.run(
            [sys.executable, "-c", _WRITE, name],
            check=True, stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)},
        ).stdout  # fmt: skip
    figures: dict[str, object] = json.loads(out)
    return figures


def memory() -> None:
    """Rows that are in the memory already, written out."""
    for _ in range(3):
        _say(benchmark="memory", loop_seconds=_calibrate(), **_write_out(500_000))


def scale() -> None:
    """Five million rows."""
    _say(benchmark="scale", loop_seconds=_calibrate(), **_write_out(5_000_000))


def kills() -> None:
    """A hundred SIGKILLs during one run."""
    from kills import run_with_kills

    with tempfile.TemporaryDirectory() as name:
        report = run_with_kills(Path(name), num_rows=20_000, num_kills=100, seed=0)
    _say(
        benchmark="kills",
        kills=report.num_kills,
        texts=report.num_texts,
        requests=report.num_requests,
        under_way_at_a_kill=sum(report.lost),
        most_under_way=max(report.lost),
        requested_twice_otherwise=report.num_requests - report.num_texts - sum(report.lost),
        identical=report.identical,
        leftovers=report.leftovers,
        seconds=round(report.seconds),
    )


def faults() -> None:
    """A server that goes wrong in every way, with 2,000 rows."""
    from loopback import Loopback, misbehave_at_random, translated

    from clseave_cli.core.config import TranslateConfig
    from clseave_cli.core.translation.corpus import translate

    for engine in ("google", "libre"):
        with tempfile.TemporaryDirectory() as name, Loopback(engine) as server:
            folder = Path(name)
            texts = [sentence(index) for index in range(2_000)]
            for index in range(0, 2_000, 200):
                texts[index] = f"A poison sentence {index}."
            rows = [{"pairID": str(index), "sentence2": text} for index, text in enumerate(texts)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "snli_ve_dev.jsonl").write_text(lines)
            server.fault = misbehave_at_random(seed=0)
            summary = translate(
                TranslateConfig(
                    data=folder, lang=("de",), engine=engine, url=server.url, concurrency=8,
                    requests_per_second=1e6, timeout_seconds=0.5, retry_seconds=0.005, retries=8,
                    memory=folder / "memory.sqlite",
                )
            )  # fmt: skip
            file = summary.files[0]
            written = [json.loads(line) for line in file.output.read_text().splitlines()]
            failed = [json.loads(line) for line in file.failed.read_text().splitlines()]
            right = sum(
                row["sentence2"] == translated(texts[int(row["pairID"])]) for row in written
            )
            _say(
                benchmark="faults", engine=engine, rows=file.num_rows, right=right,
                misaligned=len(written) - right, failed=len(failed),
                failed_poison=sum("poison" in row["text"] for row in failed),
                requests=file.num_requests, stopped=summary.stopped,
                seconds=round(file.seconds, 1),
            )  # fmt: skip


def nmt(num_rows: int = 32, batch_size: int = 16, beams: int = 2, rounds: int = 2) -> None:
    """The local engine against its own decoder, and CTranslate2 against transformers.

    The model has the size of OPUS-MT's (6 + 6 layers, width 512, 58,101 words), random weights,
    and an end that is forced by the bound on length, so that all decode the same number of tokens.
    """
    import torch
    from tiny_models import make_marian

    from clseave_cli.core.config import TranslateConfig
    from clseave_cli.core.translation import nmt as nmt_module
    from clseave_cli.core.translation.corpus import translate
    from clseave_cli.core.translation.engine import create_engine

    # Random weights loop, real ones hardly ever do: here nothing may be decoded a second time.
    nmt_module.has_loop = lambda text: False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_marian(
            folder / "model", vocab_size=58_101, width=512, layers=6, heads=8, init_std=0.1
        )
        texts = [sentence(index)[: 16 + index % 8] for index in range(num_rows)]
        rows = [{"pairID": str(index), "sentence2": text} for index, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "snli_ve_dev.jsonl").write_text(lines)
        texts = sorted(dict.fromkeys(texts), key=len, reverse=True)
        for backend, int8 in (
            ("transformers", False), ("ctranslate2", False), ("ctranslate2", True),
        ):  # fmt: skip
            config = TranslateConfig(
                data=folder, lang=("de",), model=str(model), backend=backend, beams=beams,
                int8=int8, batch_size=batch_size, memory=folder / f"{backend}.sqlite",
            )  # fmt: skip
            engine = create_engine(config, "en", "de")
            codec, decoder = engine._load()
            decoder(codec.encode(texts[:2]), 4, False)  # warm
            counted = _count(engine)
            codec, decoder = engine._load()
            best: dict[str, float] = {}
            # In turns, and the best of each, because other work comes and goes on a shared machine.
            for number in range(rounds):
                for side in ("raw", "translate") if number % 2 == 0 else ("translate", "raw"):
                    counted[0], start = 0, time.perf_counter()
                    if side == "raw":
                        for at in range(0, len(texts), batch_size):
                            ids = codec.encode(texts[at : at + batch_size])
                            longest = 2 * max(map(len, ids)) + 16
                            codec.decode(decoder(ids, longest, False))
                    else:
                        config.memory.unlink(missing_ok=True)
                        with _engine_reused(engine):
                            translate(config)
                    rate = counted[0] / (time.perf_counter() - start)
                    best[side] = max(rate, best.get(side, 0.0))
            _say(
                benchmark="nmt", backend=backend, int8=int8, batch_size=batch_size, beams=beams,
                threads=torch.get_num_threads(), tokens=counted[0], rounds=rounds,
                raw_tokens_per_second=round(best["raw"], 1),
                translate_tokens_per_second=round(best["translate"], 1),
                share=round(best["translate"] / best["raw"], 3),
            )  # fmt: skip


def _count(engine: object) -> list[int]:
    """Makes a loaded engine count the tokens that its decoder returns."""
    total = [0]
    codec, decoder = engine._load()  # type: ignore[attr-defined]

    def counting(*arguments: object) -> list[list[int]]:
        rows: list[list[int]] = decoder(*arguments)
        total[0] += sum(map(len, rows))
        return rows

    engine._loaded = codec, counting  # type: ignore[attr-defined]
    return total


class _engine_reused:
    """Lets `translate` use an engine whose model is loaded; loading is not what is measured."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        from clseave_cli.core.translation import corpus

        self._create = corpus.create_engine
        self._close = self._engine.close  # type: ignore[attr-defined]
        corpus.create_engine = lambda *arguments: self._engine
        self._engine.close = lambda: None  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        from clseave_cli.core.translation import corpus

        corpus.create_engine = self._create
        self._engine.close = self._close  # type: ignore[attr-defined]


_BENCHMARKS: dict[str, Callable[[], None]] = {
    "memory": memory, "scale": scale, "nmt": nmt, "kills": kills, "faults": faults,
}  # fmt: skip


def main() -> None:
    """Runs the benchmarks named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(_BENCHMARKS))
    for name in parser.parse_args().names or _BENCHMARKS:
        _BENCHMARKS[name]()


if __name__ == "__main__":
    main()
