"""What trimming mBERT's vocabulary to a few languages saves: size, loading, speed; and that it is
exact.

    python tests/benchmarks/bench_trim.py --vocabulary FILE --sentences DIR --split sick \\
        --lang nl --lang ja --out DIR

FILE is mBERT's vocab.txt; DIR holds SPLIT.LANG.jsonl, an SNLI-VE folder or any parallel text. The
encoder has mBERT's architecture (`--layers` and `--width` make it smaller) and random weights. The
student is saved whole and trimmed. Loading and embedding are timed in turn, `--rounds` times, and
the median is told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_full_size import write_bert

from clseave_cli.core.data.records import read_split
from clseave_cli.core.models.student import (
    load_student,
    new_student,
    restore_student,
    save_student,
)
from clseave_cli.core.models.vocabulary import trim_vocabulary


def embed(student, sentences: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(student.embed(student.tokenize(sentences))))


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--lang", action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--embedded", type=int, default=256, help="Sentences embedded a round.")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    texts = [
        text
        for lang in options.lang
        for text in dict.fromkeys(
            read_split(
                options.sentences, options.split, lang, labelled=False, with_images=False
            ).hypotheses
        )
    ]
    encoder = options.out / "encoder"
    if not encoder.is_dir():
        write_bert(
            encoder,
            options.vocabulary,
            num_hidden_layers=options.layers,
            hidden_size=options.width,
            num_attention_heads=options.width // 64,
            intermediate_size=4 * options.width,
        )
    student = new_student(encoder, 512).eval()
    folders = {"whole": options.out / "whole", "trimmed": options.out / "trimmed"}
    tokens = student.tokenize(texts)
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if name == "trimmed":
            trim_vocabulary(student, np.unique(tokens.ids), str(encoder))
        save_student(student, folder, languages=options.lang, teacher="0" * 64)

    some = texts[:: max(1, len(texts) // options.embedded)][: options.embedded]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in folders}
    for _ in range(options.rounds):
        for name, folder in folders.items():
            own = times[name]
            own.setdefault("load", []).append(seconds(lambda f=folder: load_student(f)))
            loaded = load_student(folder)
            own.setdefault("tokenise", []).append(seconds(lambda s=loaded: s.tokenize(texts)))
            own.setdefault("embed", []).append(seconds(lambda s=loaded: embed(s, some)))

    loaded = {name: load_student(folder) for name, folder in folders.items()}
    places = np.searchsorted(loaded["trimmed"].trimmed.kept, tokens.ids)
    same_tokens = np.array_equal(loaded["trimmed"].tokenize(texts).ids, places)
    vectors = [embed(loaded[name], some) for name in folders]
    restored = restore_student(folders["trimmed"])
    print(f"{' + '.join(options.lang)}: {len(texts):,} distinct sentences\n")
    print("| | whole | trimmed |\n|---|---:|---:|")

    def row(title: str, value: Callable[[str], str]) -> None:
        print(f"| {title} | {value('whole')} | {value('trimmed')} |")

    def count(name: str) -> int:
        return sum(p.numel() for p in loaded[name].parameters())

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in folders[name].rglob("*") if path.is_file())

    def median(name: str, what: str) -> float:
        return statistics.median(times[name][what])

    row("tokens", lambda n: f"{loaded[n].backbone.get_input_embeddings().num_embeddings:,}")
    row("weights, millions", lambda n: f"{count(n) / 1e6:.1f}")
    row("folder, MB", lambda n: f"{size(n) / 1e6:.0f}")
    row("loading, s", lambda n: f"{median(n, 'load'):.2f}")
    row("sentences tokenised a second", lambda n: f"{len(texts) / median(n, 'tokenise'):,.0f}")
    row("sentences embedded a second", lambda n: f"{len(some) / median(n, 'embed'):,.1f}")
    print(
        f"\ntokens the same: {same_tokens} · embeddings the same: {torch.equal(*vectors)} · "
        f"restored to the same weights: "
        f"{all(map(torch.equal, restored.parameters(), loaded['whole'].parameters()))}"
    )


if __name__ == "__main__":
    main()
