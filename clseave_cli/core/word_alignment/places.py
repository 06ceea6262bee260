"""Which tokens a word is made of, for any tokenizer.

Legend: N sentences · M tokens of all of them · W words of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.word_alignment.words import Words

#: Of a token that is in no word, or of a word that has no token.
NONE = -1

_SENTENCES_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class WordTokens:
    """Tokenised sentences and their words.

    Attributes:
        tokens: N sentences.
        word_of_token: (M,) int64, the word of its sentence that a token belongs to; -1 for special
            tokens.
        first_token: (W,) int64, the token of its sentence that a word begins with; -1 where a
            word's characters were cut off, or lie within a token of the word before.
        words: the N sentences' words.
    """

    tokens: TokenTable
    word_of_token: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    words: Words


def find_tokens(encoder: SentenceEncoder, words: Words) -> WordTokens:
    """Tokenises N sentences for an encoder, as it always reads them, and finds their words.

    A token belongs to the word that it begins in, or before which it begins with a space.
    """
    texts = list(words.sentences)
    tokens = encoder.tokenize(texts)
    starts, ends = _characters(encoder, texts, tokens)
    # All sentences as one long text, each behind the one before.
    begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
    sentence_of_token = np.repeat(np.arange(len(texts)), np.diff(tokens.offsets))
    sentence_of_word = np.repeat(np.arange(len(texts)), words.counts)
    word = np.searchsorted(
        words.ends + begins[sentence_of_word], starts + begins[sentence_of_token], side="right"
    )
    word_starts = np.append(words.starts + begins[sentence_of_word], begins[-1])
    inside = (ends > starts) & (word_starts[word] < ends + begins[sentence_of_token])
    first_token = np.full(len(words.starts), NONE, dtype=np.int64)
    own, first = np.unique(word[inside], return_index=True)
    first_token[own] = (np.arange(len(word)) - tokens.offsets[sentence_of_token])[inside][first]
    word_of_token = np.where(inside, word - words.offsets[sentence_of_token], NONE)
    return WordTokens(tokens, word_of_token, first_token, words)


def _characters(
    encoder: SentenceEncoder, texts: list[str], tokens: TokenTable
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(M,) (M,) where in its sentence each token begins and ends; the same for special tokens."""
    parts: list[npt.NDArray[np.int64]] = []
    for begin in range(0, len(texts), _SENTENCES_AT_ONCE):
        spans: list[tuple[int, int]] = []
        chunk = texts[begin : begin + _SENTENCES_AT_ONCE]
        encodings = encoder.tokenizer.backend_tokenizer.encode_batch(chunk)
        for number, encoding in enumerate(encodings, start=begin):
            # Of a sentence that was cut all tokens but the last are its own first ones.
            length = int(tokens.offsets[number + 1] - tokens.offsets[number])
            spans += [*encoding.offsets[: length - 1], (0, 0)]
        parts.append(np.array(spans, dtype=np.int64).reshape(-1, 2))
    starts, ends = np.concatenate([np.empty((0, 2), dtype=np.int64), *parts]).T
    return starts, ends
