"""Memory of preparing and streaming millions of pairs: `align` on made-up sentences of real length.

    python tests/benchmarks/bench_memory.py --rows 530000 --languages 10 --out DIR

Writes an English file and one of each language with ids and lengths as in SNLI-VE, prepares them as
`align` does and runs some steps of a small student. The teacher is an untrained CLIP of width 512;
its embeddings are put into the cache as random vectors, since what is measured is where they lie,
not how they are computed. `--distinct` gives every row of every language an English sentence of its
own: the worst there can be. Prints the time and the memory of each part: `anonymous` is what the
process must have, `mapped` are pages of cache files that the system takes back when it needs room.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from clseave_cli.core import alignment
from clseave_cli.core.config import AlignConfig
from clseave_cli.core.features import VectorCache
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder

_LANGUAGES = ("de", "nl", "fr", "es", "it", "pt", "ru", "pl", "cs", "tr")
_SYLLABLES = ("ka", "lo", "mi", "ter", "un", "sa", "por", "ne", "gri", "vol", "da", "eth")
#: Distinct English hypotheses per row in SNLI-VE, about.
_DISTINCT_SHARE = 0.9
_STEPS_BATCH = 128


def words(generator: random.Random, count: int) -> list[str]:
    """Made-up words of one to four syllables."""
    return ["".join(generator.choices(_SYLLABLES, k=generator.randint(1, 4))) for _ in range(count)]


def sentence(generator: random.Random, vocabulary: list[str], number: int) -> str:
    """About seven words (SNLI's hypotheses have 7.4), different for every number."""
    length = max(2, round(generator.gauss(6.4, 2.5)))
    return f"{' '.join(generator.choices(vocabulary, k=length))} {number:x}."


def write_rows(folder: Path, rows: int, languages: tuple[str, ...], distinct: bool) -> None:
    """The training and dev files of all languages."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    english = words(generator, 5000)
    for split, count in (("train", rows), ("dev", 1000)):
        sources = []
        for row in range(count):
            repeated = sources and generator.random() > _DISTINCT_SHARE
            sources.append(
                generator.choice(sources) if repeated else sentence(generator, english, row)
            )
        if not distinct:
            write(folder / f"snli_ve_{split}.jsonl", sources, None)
        for number, lang in enumerate(languages):
            own = words(random.Random(lang), 5000)
            targets = [sentence(generator, own, row) for row in range(count)]
            if distinct:
                sources = [sentence(generator, english, number * count + r) for r in range(count)]
            write(folder / f"snli_ve_{split}.{lang}.jsonl", targets, sources)


def write(path: Path, hypotheses: list[str], sources: list[str] | None) -> None:
    """A file with the keys of SNLI-VE that are read, and a label."""
    with path.open("w", encoding="utf-8") as stream:
        for row, hypothesis in enumerate(hypotheses):
            line = {
                "pairID": f"{row // 18 + 1_000_000_000}.jpg#{row % 5}r{row}e",
                "sentence2": hypothesis,
                "gold_label": "neutral",
            }
            if sources is not None:
                line["sentence2_en"] = sources[row]
            stream.write(json.dumps(line) + "\n")


def write_models(out: Path) -> None:
    """An untrained teacher and student."""
    texts = [" ".join(words(random.Random(7), 50)) for _ in range(200)]
    (out / "clip").mkdir()
    shape = ClipShape(
        image_size=32, patch_size=16, width=32, num_layers=1, num_heads=2, embedding_dim=512,
        max_tokens=77, vocab_size=1000,
    )  # fmt: skip
    new_clip(out / "clip", texts, shape)
    (out / "clip-ve").mkdir()
    ClipVE.from_clip(out / "clip").save(out / "clip-ve")
    (out / "encoder").mkdir()
    new_encoder(out / "encoder", texts, width=64, num_layers=2, num_heads=2, vocab_size=4000)


def memory() -> tuple[float, float]:
    """Anonymous and mapped resident memory, GiB."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))


class Watch:
    """Samples the memory in a thread, and prints its peak part by part."""

    def __init__(self) -> None:
        self._peak = [0.0, 0.0, 0.0]
        self._begin = time.perf_counter()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            anonymous, mapped = memory()
            self._peak = list(map(max, self._peak, (anonymous, mapped, anonymous + mapped)))
            time.sleep(0.05)

    def lap(self, title: str) -> None:
        """Prints what the part that ends here took."""
        seconds = time.perf_counter() - self._begin
        anonymous, mapped, both = self._peak
        print(
            f"{title:<32} {seconds:7.1f} s · anonymous {anonymous:.2f} GiB · mapped {mapped:.2f} "
            f"GiB · together {both:.2f} GiB at most",
            flush=True,
        )
        self._peak, self._begin = [0.0, 0.0, 0.0], time.perf_counter()


def random_vectors(items: np.ndarray) -> Iterator[torch.Tensor]:
    """What an encoder of width 512 would give, without the encoder."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(items), 8192):
        yield torch.randn(len(items[start : start + 8192]), 512, generator=generator)


def main() -> None:
    """Writes the data once, then trains a few steps, watching."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=530_000, help="of each language")
    parser.add_argument("--languages", type=int, default=10)
    parser.add_argument("--distinct", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out, languages = options.out, _LANGUAGES[: options.languages]
    os.environ["CLSEAVE_CACHE"] = str(out / "cache")
    if not (out / "data").is_dir():
        begin = time.perf_counter()
        write_rows(out / "data", options.rows, languages, options.distinct)
        write_models(out)
        print(f"data written in {time.perf_counter() - begin:.0f} s; call again to measure")
        return

    print(f"{len(languages)} languages × {options.rows} rows, distinct: {options.distinct}")
    get, train = VectorCache.get, alignment.train
    watch = Watch()

    def cached(self, keys, compute, description, progress):
        if description == "teacher embeddings":
            watch.lap("reading and tokenising")
        vectors = get(self, keys, random_vectors, description, progress)
        if description == "teacher embeddings":
            watch.lap(f"{len(keys)} teacher vectors")
        return vectors

    def trained(stage, config, **more):
        watch.lap("dev sets")
        result = train(stage, config, **more)
        watch.lap(f"{options.steps} steps of {stage.num_examples} pairs")
        return result

    VectorCache.get, alignment.train = cached, trained
    alignment.align(
        AlignConfig(
            data=str(out / "data"), lang=languages, student=str(out / "encoder"), runs=out,
            out=out / f"student-{time.time_ns()}", max_steps=options.steps,
            batch_size=_STEPS_BATCH, device="cpu", precision="fp32",
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
