"""Batched word alignment against one sentence pair at a time.

    python tests/benchmarks/bench_word_alignment.py [--pairs 1000] [--device cpu] [--out FILE.json]

The extraction alone starts from the same hidden states, as each way gets them from its encoder: the
reference, spelled out number by number, and the tensor operations of the authors' tool, pair by
pair, from those of one sentence; the batched one from packed rows. The whole of it goes from
sentences to links, the encoder included. The encoder has mBERT's width, with random weights;
sentences are random words, as long as SNLI-VE's. Medians of rounds taken in turns; the links must
not differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference_aligner

from clseave_cli.core.models.scratch import new_encoder
from clseave_cli.core.models.student import new_student
from clseave_cli.core.word_alignment.aligner import THRESHOLD, WordAligner, link_words, take_states
from clseave_cli.core.word_alignment.words import NONE, split_words
from clseave_cli.progress import SILENT

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


def in_order(links: torch.Tensor | list[set[tuple[int, int]]]) -> list[tuple[int, ...]]:
    """Pair, source word and target word of every link."""
    if isinstance(links, torch.Tensor):
        return sorted(map(tuple, links.tolist()))
    return [(number, *link) for number, pair in enumerate(links) for link in sorted(pair)]


class Flat:
    """One side of all pairs as the encoder leaves it: the states of all tokens, one after another.

    Attributes:
        states: (tokens, H).
        words: (tokens,) the word of each.
        lengths: (P,) tokens of each sentence.
        offsets: (P,) where each begins.
    """

    def __init__(self, states: list[torch.Tensor], words: list[list[int]]) -> None:
        self.states = torch.cat(states)
        self.words = torch.tensor([word for of_one in words for word in of_one])
        self.words = self.words.to(self.states.device)
        self.lengths = torch.tensor(list(map(len, words)), device=self.states.device)
        self.offsets = self.lengths.cumsum(0) - self.lengths

    def batch(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded states and words of some sentences."""
        lengths = self.lengths[numbers, None]
        token = torch.arange(int(lengths.max()), device=lengths.device)
        inside = token < lengths
        places = self.offsets[numbers, None] + torch.where(inside, token, 0)
        return take_states(self.states, places), self.words[places].masked_fill(~inside, NONE)


@torch.no_grad()
def batched(source: Flat, target: Flat, batch_size: int = 256) -> torch.Tensor:
    """(L, 3) links; bringing the states into batches is part of the work."""
    order = torch.argsort(source.lengths * 1000 + target.lengths)
    found = []
    for numbers in order.split(batch_size):
        source_states, source_words = source.batch(numbers)
        target_states, target_words = target.batch(numbers)
        links = link_words(source_states, target_states, source_words, target_words, THRESHOLD)
        links[:, 0] = numbers[links[:, 0]]
        found.append(links)
    return torch.cat(found).cpu()


def whole(aligner: WordAligner, words: Any, pairs: Any) -> torch.Tensor:
    """(L, 3) links from sentences, by the aligner itself."""
    links = aligner._align(*words, pairs, "", SILENT)  # not from the cache
    return torch.from_numpy(np.column_stack([links.pairs, links.words]))


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

    numbers = [(source.tolist(), target.tolist(), *rest) for source, target, *rest in states]
    flat = [Flat([pair[i] for pair in states], [pair[i + 2] for pair in states]) for i in range(2)]
    seconds, links = measured(
        {
            "extraction, number by number": lambda: [
                reference_aligner.link_words(*pair, THRESHOLD) for pair in numbers
            ],
            "extraction, pair by pair": lambda: [
                reference_aligner.link_words_with_tensors(*pair, THRESHOLD) for pair in states
            ],
            "extraction, batched": lambda: batched(*flat),
            "whole, pair by pair": lambda: [
                reference_aligner.link_words_with_tensors(*of_pair(number), THRESHOLD)
                for number in range(given.pairs)
            ],
            "whole, batched": lambda: whole(aligner, words, pairs),
        },
        given.rounds,
    )
    found = {name: in_order(result) for name, result in links.items()}
    report: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(given).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
    }
    for name in seconds:
        part, how = name.split(", ")
        if how != "batched":
            ours = f"{part}, batched"
            report[name] = {
                "times as slow": seconds[name] / seconds[ours],
                "links": len(found[name]),
                "links that differ": len(set(found[name]) ^ set(found[ours])),
            }
    text = json.dumps(report, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
