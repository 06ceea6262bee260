"""Word alignment one sentence pair at a time: what the batched extraction must equal.

Written after section 2 of Dou and Neubig (2021), number by number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def link_words(
    source: list[list[float]],
    target: list[list[float]],
    source_words: list[int],
    target_words: list[int],
    threshold: float,
) -> set[tuple[int, int]]:
    """The linked words of one pair: states and words of both sides' sub-words, without specials."""
    similarity = [[sum(a * b for a, b in zip(s, t, strict=True)) for t in target] for s in source]
    forward = [softmax(row) for row in similarity]
    backward = [softmax(list(column)) for column in zip(*similarity, strict=True)]
    return {
        (source_words[i], target_words[j])
        for i in range(len(source))
        for j in range(len(target))
        if forward[i][j] > threshold and backward[j][i] > threshold
    }


def softmax(scores: list[float]) -> list[float]:
    highest = max(scores)
    parts = [math.exp(score - highest) for score in scores]
    return [part / sum(parts) for part in parts]


@torch.no_grad()
def sentence_states(model, tokenizer, words: list[str], layer: int) -> tuple[Tensor, list[int]]:
    """The states of a sentence's sub-words and the word of each; layers count from 1."""
    inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    states = model(**inputs.to(model.device), output_hidden_states=True).hidden_states[layer][0]
    places = [place for place, word in enumerate(inputs.word_ids(0)) if word is not None]
    return states[places], [inputs.word_ids(0)[place] for place in places]
