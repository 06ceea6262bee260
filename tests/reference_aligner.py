"""Word alignment one sentence pair at a time: what the batched extraction must equal.

Written after section 2 of Dou and Neubig (2021), in its order and with nothing but its operations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def link_words(
    source: Tensor, target: Tensor, source_words: list[int], target_words: list[int],
    threshold: float,
) -> set[tuple[int, int]]:  # fmt: skip
    """The linked words of one pair.

    Args:
        source: (S, H) states of the source's sub-words, special tokens left out.
        target: (T, H) the same of the target.
        source_words: S, the word of each sub-word.
        target_words: T, the same of the target.
        threshold: least probability in both directions.
    """
    similarity = torch.matmul(source, target.transpose(-1, -2))
    forward = torch.nn.Softmax(dim=-1)(similarity)
    backward = torch.nn.Softmax(dim=-2)(similarity)
    linked = (forward > threshold) * (backward > threshold)
    return {(source_words[i], target_words[j]) for i, j in torch.nonzero(linked).tolist()}


@torch.no_grad()
def sentence_states(model, tokenizer, words: list[str], layer: int) -> tuple[Tensor, list[int]]:
    """The states of one sentence's sub-words and the word of each, without special tokens.

    Args:
        model: an encoder of transformers.
        tokenizer: its fast tokenizer.
        words: the sentence.
        layer: whose output, counted from 1.
    """
    inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    states = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
    places = [place for place, word in enumerate(inputs.word_ids(0)) if word is not None]
    return states[places], [inputs.word_ids(0)[place] for place in places]
