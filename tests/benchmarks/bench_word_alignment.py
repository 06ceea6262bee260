"""Batched word alignment against one sentence pair at a time.

    python tests/benchmarks/bench_word_alignment.py [--pairs 1000] [--device cpu] [--out FILE.json]

Two comparisons, the links equal in both: the extraction alone, from the same hidden states, and the
whole of it, from sentences to links, the encoder's forward pass included. The encoder has mBERT's
width and by default fewer layers, with random weights; sentences are random words, as long as
SNLI-VE's. Medians of several rounds, taken in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference_aligner

from clseave_cli.core.models.scratch import new_encoder
from clseave_cli.core.models.student import new_student
from clseave_cli.core.word_alignment.aligner import THRESHOLD, WordAligner
from clseave_cli.core.word_alignment.extraction import link_words
from clseave_cli.core.word_alignment.places import NONE
from clseave_cli.core.word_alignment.words import split_words

SYLLABLES = [a + b for a in "bdfgklmnprstvw" for b in "aeiou"]


def random_words(random: np.random.Generator, count: int) -> list[str]:
    """`count` sentences of 3 to 13 words of one to three syllables; 7.4 words on average."""
    return [
        " ".join(
            "".join(random.choice(SYLLABLES, random.integers(1, 4)))
            for _ in range(np.clip(round(random.normal(7.4, 2.5)), 3, 13))
        )
        for _ in range(count)
    ]


def in_order(pairs: Iterable[set[tuple[int, int]]]) -> list[tuple[int, int, int]]:
    """Pair, source word and target word of every link."""
    return [(number, *link) for number, links in enumerate(pairs) for link in sorted(links)]


@torch.no_grad()
def batched(states: list[tuple[Any, ...]], batch_size: int = 256) -> list[tuple[int, ...]]:
    """The links from the states that the reference is given, padding included in the work."""
    order = sorted(range(len(states)), key=lambda number: [len(side) for side in states[number]])
    found = []
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        source, target, source_words, target_words = zip(
            *(states[number] for number in numbers), strict=True
        )
        words = (
            pad_sequence(list(map(torch.tensor, side)), batch_first=True, padding_value=NONE)
            for side in (source_words, target_words)
        )
        links = link_words(
            pad_sequence(source, batch_first=True),
            pad_sequence(target, batch_first=True),
            *(side.to(source[0].device) for side in words),
            THRESHOLD,
        ).cpu()
        links[:, 0] = torch.tensor(numbers)[links[:, 0]]
        found.append(links)
    return [tuple(link) for link in torch.cat(found).tolist()]


def whole(aligner: WordAligner, words: Any, pairs: Any) -> list[set[tuple[int, int]]]:
    """The links from sentences, by the aligner itself."""
    links = aligner.align(*words, pairs)
    found: list[set[tuple[int, int]]] = [set() for _ in range(len(links))]
    for pair, (source, target) in zip(links.pairs, links.words.tolist(), strict=True):
        found[pair].add((source, target))
    return found


def measured(functions: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict, dict]:
    """Median seconds and last result of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results = {}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            results[name] = function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    random = np.random.default_rng(0)
    sources, targets = (random_words(random, given.pairs) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        new_encoder(
            Path(folder), sources + targets, width=given.width, num_layers=given.layers,
            num_heads=max(1, given.width // 64), vocab_size=1000,
        )  # fmt: skip
        encoder = new_student(folder, 1).eval().to(given.device)
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval().to(given.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    aligner = WordAligner(encoder, "encoder", layer=given.layers)
    words = split_words(sources), split_words(targets)
    pairs = np.stack([np.arange(given.pairs)] * 2)

    def of_pair(number: int) -> tuple[Any, ...]:
        (source, source_words), (target, target_words) = (
            reference_aligner.sentence_states(model, tokenizer, side[number].split(), given.layers)
            for side in (sources, targets)
        )
        return source, target, source_words, target_words

    states = [of_pair(number) for number in range(given.pairs)]

    def extraction_by_reference() -> list[tuple[int, int, int]]:
        return in_order(reference_aligner.link_words(*pair, THRESHOLD) for pair in states)

    seconds, links = measured(
        {
            "extraction, one by one": extraction_by_reference,
            "extraction, batched": lambda: batched(states),
            "whole, one by one": lambda: in_order(
                reference_aligner.link_words(*of_pair(number), THRESHOLD)
                for number in range(given.pairs)
            ),
            "whole, batched": lambda: in_order(whole(aligner, words, pairs)),
        },
        given.rounds,
    )
    report: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(given).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    for part in ("extraction", "whole"):
        reference, ours = (links[f"{part}, {how}"] for how in ("one by one", "batched"))
        report[f"{part}: times as fast"] = (
            seconds[f"{part}, one by one"] / seconds[f"{part}, batched"]
        )
        report[f"{part}: links"] = len(reference)
        report[f"{part}: links that differ"] = len(set(reference) ^ set(ours))
    text = json.dumps(report, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
