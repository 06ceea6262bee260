"""Splits sentences into words, at spaces or with a segmenter, and maps tokens to words.

Legend: N sentences · W words of all sentences · M tokens of all sentences.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.errors import ExtraMissing

#: Returns the words of a text in order, perhaps with spaces among them.
Segmenter = Callable[[str], Sequence[str]]

_BETWEEN_SPACES = re.compile(r"\S+")


@dataclass(frozen=True, eq=False)
class Words:
    """The words of N sentences, stored flat: sentence i has `offsets[i]` to `offsets[i + 1]`."""

    sentences: Sequence[str]
    starts: npt.NDArray[np.int64]  # (W,) first character of each word in its sentence
    ends: npt.NDArray[np.int64]  # (W,) the character after its last
    offsets: npt.NDArray[np.int64]  # (N + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(N,) number of words in each sentence."""
        return np.diff(self.offsets)

    def of(self, sentence: int) -> list[str]:
        """The words of one sentence."""
        text = self.sentences[sentence]
        span = slice(self.offsets[sentence], self.offsets[sentence + 1])
        return [text[a:b] for a, b in zip(self.starts[span], self.ends[span], strict=True)]


def split_words(sentences: Sequence[str], lang: str | None = None) -> Words:
    """Splits N sentences into words, with a segmenter in Japanese, Chinese, Korean and Thai.

    Raises:
        ExtraMissing: the segmenter of `lang` is not installed.
    """
    segmenter = None
    if lang is not None and (code := lang.split("-")[0]) in _SEGMENTERS:
        segmenter = _segmenter(code)
    starts: list[int] = []
    ends: list[int] = []
    offsets = [0]
    for sentence in sentences:
        for start, end in _spans(sentence, segmenter):
            starts.append(start)
            ends.append(end)
        offsets.append(len(starts))
    return Words(sentences, *(np.array(part, dtype=np.int64) for part in (starts, ends, offsets)))


def _spans(text: str, segmenter: Segmenter | None) -> Iterator[tuple[int, int]]:
    if segmenter is None:
        yield from (match.span() for match in _BETWEEN_SPACES.finditer(text))
        return
    end = 0
    for word in map(str.strip, segmenter(text)):
        # A segmenter that normalises may return words that are not in the text; skip those.
        if word and (start := text.find(word, end)) >= 0:
            end = start + len(word)
            yield start, end


#: The package that segments each language.
_SEGMENTERS = {"ja": "sudachipy", "zh": "rjieba", "ko": "python-mecab-ko", "th": "pythainlp"}


@functools.cache
def _segmenter(code: str) -> Segmenter:
    segmenter: Segmenter
    try:
        if code == "ja":
            from sudachipy import Dictionary, SplitMode

            tokenizer = Dictionary(dict="small").tokenizer(mode=SplitMode.A)  # the shortest units
            return lambda text: [word.surface() for word in tokenizer.tokenize(text)]
        elif code == "zh":
            from rjieba import cut as segmenter
        elif code == "ko":
            from mecab import MeCab

            segmenter = MeCab().morphs
        else:
            from pythainlp import word_tokenize as segmenter
    except ImportError:
        raise ExtraMissing(
            f"words in {code} need {_SEGMENTERS[code]}; run: pip install -e '.[segment]'."
        ) from None
    return segmenter


#: The word of a token in no word, and the token of a word without tokens.
NONE = -1

_SENTENCES_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class WordTokens:
    """The tokens of N sentences and their words, both counted within their sentence."""

    tokens: TokenTable
    word_of_token: npt.NDArray[np.int64]  # (M,); -1 for special tokens
    #: (W,); -1 if the word was truncated or shares its first token with the word before.
    first_token: npt.NDArray[np.int64]
    words: Words


def find_tokens(encoder: SentenceEncoder, words: Words) -> WordTokens:
    """Tokenises N sentences for an encoder and maps tokens to words.

    A token belongs to the word that it starts in, or that follows the space it starts with.
    """
    texts = list(words.sentences)
    tokens = encoder.tokenize(texts)
    starts, ends = _characters(encoder, texts, tokens)
    # Positions are those in one long text of all sentences.
    begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
    sentence_of_token = np.repeat(np.arange(len(texts)), np.diff(tokens.offsets))
    sentence_of_word = np.repeat(np.arange(len(texts)), words.counts)
    word = np.searchsorted(
        words.ends + begins[sentence_of_word], starts + begins[sentence_of_token], side="right"
    )
    word_starts = np.append(words.starts + begins[sentence_of_word], begins[-1])
    inside = (ends > starts) & (word_starts[word] < ends + begins[sentence_of_token])
    first_token = np.full(len(words.starts), NONE, dtype=np.int64)
    words_inside, first = np.unique(word[inside], return_index=True)
    first_token[words_inside] = (np.arange(len(word)) - tokens.offsets[sentence_of_token])[inside][
        first
    ]
    word_of_token = np.where(inside, word - words.offsets[sentence_of_token], NONE)
    return WordTokens(tokens, word_of_token, first_token, words)


def _characters(
    encoder: SentenceEncoder, texts: list[str], tokens: TokenTable
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(M,) first and (M,) end character of each token in its sentence; both 0 for special ones."""
    parts: list[npt.NDArray[np.int64]] = []
    for begin in range(0, len(texts), _SENTENCES_AT_ONCE):
        spans: list[tuple[int, int]] = []
        chunk = texts[begin : begin + _SENTENCES_AT_ONCE]
        encodings = encoder.tokenizer.backend_tokenizer.encode_batch(chunk)
        for number, encoding in enumerate(encodings, start=begin):
            # A truncated sentence keeps its first tokens and ends with the terminal one.
            length = int(tokens.offsets[number + 1] - tokens.offsets[number])
            spans += [*encoding.offsets[: length - 1], (0, 0)]
        parts.append(np.array(spans, dtype=np.int64).reshape(-1, 2))
    starts, ends = np.concatenate([np.empty((0, 2), dtype=np.int64), *parts]).T
    return starts, ends
