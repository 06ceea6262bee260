"""Words: what stands between spaces, or what a segmenter finds where none are written.

Legend: N sentences · W words of all of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clseave_cli.errors import ExtraMissing

#: Finds the words of a text, in order; spaces may be among them.
Segmenter = Callable[[str], Sequence[str]]

_BETWEEN_SPACES = re.compile(r"\S+")


@dataclass(frozen=True, eq=False)
class Words:
    """The words of sentences, stored flat: sentence i has words `offsets[i]` to `offsets[i + 1]`.

    Attributes:
        sentences: N texts.
        starts: (W,) int64, the character of its sentence that a word begins at.
        ends: (W,) int64, the character behind it.
        offsets: (N + 1,) int64.
    """

    sentences: Sequence[str]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(N,) how many words each sentence has."""
        return np.diff(self.offsets)

    def of(self, sentence: int) -> list[str]:
        """The words of one sentence."""
        text = self.sentences[sentence]
        own = slice(self.offsets[sentence], self.offsets[sentence + 1])
        return [text[a:b] for a, b in zip(self.starts[own], self.ends[own], strict=True)]


def split_words(sentences: Sequence[str], lang: str | None = None) -> Words:
    """Splits sentences into words.

    Args:
        sentences: N texts.
        lang: their language; Japanese, Chinese, Korean and Thai are segmented. None: whatever it
            is, words stand between spaces.

    Raises:
        ExtraMissing: the language needs a segmenter that is not installed.
    """
    spans = _spans_between_spaces
    if lang is not None and (code := lang.split("-")[0]) in _SEGMENTERS:
        spans = functools.partial(_spans_of, _segmenter(code))
    starts: list[int] = []
    ends: list[int] = []
    offsets = [0]
    for sentence in sentences:
        for start, end in spans(sentence):
            starts.append(start)
            ends.append(end)
        offsets.append(len(starts))
    return Words(sentences, *(np.array(part, dtype=np.int64) for part in (starts, ends, offsets)))


def _spans_between_spaces(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _BETWEEN_SPACES.finditer(text))


def _spans_of(segmenter: Segmenter, text: str) -> Iterator[tuple[int, int]]:
    end = 0
    for word in map(str.strip, segmenter(text)):
        # A segmenter that normalises gives words that are not in the text; they are no words of it.
        if word and (start := text.find(word, end)) >= 0:
            end = start + len(word)
            yield start, end


@functools.cache
def _segmenter(code: str) -> Segmenter:
    make, package = _SEGMENTERS[code]
    try:
        return make()
    except ImportError:
        raise ExtraMissing(
            f"words in {code} need {package}; run: pip install -e '.[segment]'."
        ) from None


def _japanese() -> Segmenter:
    from sudachipy import Dictionary, SplitMode

    tokenizer = Dictionary(dict="small").tokenizer(mode=SplitMode.A)  # the shortest units
    return lambda text: [word.surface() for word in tokenizer.tokenize(text)]


def _chinese() -> Segmenter:
    import rjieba

    cut: Segmenter = rjieba.cut
    return cut


def _korean() -> Segmenter:
    from mecab import MeCab

    morphs: Segmenter = MeCab().morphs
    return morphs


def _thai() -> Segmenter:
    from pythainlp import word_tokenize

    segmenter: Segmenter = word_tokenize
    return segmenter


_SEGMENTERS: dict[str, tuple[Callable[[], Segmenter], str]] = {
    "ja": (_japanese, "sudachipy"),
    "zh": (_chinese, "rjieba"),
    "ko": (_korean, "python-mecab-ko"),
    "th": (_thai, "pythainlp"),
}
