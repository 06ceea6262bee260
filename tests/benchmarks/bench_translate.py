"""Writes out files whose translations are all in the memory, and prints throughput and peak memory.

    python tests/benchmarks/bench_translate.py [memory] [scale]

`memory` has 500,000 rows, three times; `scale` has five million.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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


def _loop_seconds() -> float:
    """Seconds of a loop of ten million rounds, which shows how much of a core is free."""
    start, total = time.perf_counter(), 0
    for number in range(10_000_000):
        total += number
    return round(time.perf_counter() - start, 2)


def _fill(folder: Path, num_rows: int) -> None:
    """Writes a data file and a memory that holds every translation."""
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
        # In a new process, whose peak memory is that of `translate` alone.
        out = subprocess.run(
            [sys.executable, "-c", _WRITE, name],
            check=True, stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)},
        ).stdout  # fmt: skip
    return json.loads(out)  # type: ignore[no-any-return]


#: Rows of each benchmark, and how often it runs.
_BENCHMARKS = {"memory": (500_000, 3), "scale": (5_000_000, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(_BENCHMARKS))
    for name in parser.parse_args().names or _BENCHMARKS:
        num_rows, repeats = _BENCHMARKS[name]
        for _ in range(repeats):
            metrics = {"benchmark": name, "loop_seconds": _loop_seconds(), **_write_out(num_rows)}
            print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
