"""Links between words, and the Pharaoh format that aligners exchange them in.

Each line holds the links of a sentence pair; `i-j` links word i of the source to word j of the
target, counted from 0. Gold files may add possible links, written `ipj` (Och and Ney 2003, section
2.2), and may count from 1.

Legend: P sentence pairs · L links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT, Progress

_LINK = re.compile(r"(\d+)([-p])(\d+)")
#: Share of a gold file's links that may name missing words; published files have a few.
_MOST_MISNUMBERED = 0.01
_LINK_OF_WORD_0 = re.compile(r"\b0[-p]|[-p]0\b")


@dataclass(frozen=True, eq=False)
class Links:
    """The links of sentence pairs, stored flat: pair p has `words[offsets[p]:offsets[p + 1]]`."""

    words: npt.NDArray[np.int64]  # (L, 2) source word and target word, from 0
    sure: npt.NDArray[np.bool_]  # (L,); False for the possible links of a gold file
    offsets: npt.NDArray[np.int64]  # (P + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def pairs(self) -> npt.NDArray[np.int64]:
        """(L,) the sentence pair that each link belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @classmethod
    def of(
        cls, pairs: npt.NDArray[np.int64], words: npt.NDArray[np.int64], num_pairs: int
    ) -> Links:
        """Sure links, with (L,) sentence pairs and (L, 2) words in any order; P is `num_pairs`."""
        order = np.argsort(pairs, kind="stable")
        offsets = np.searchsorted(pairs[order], np.arange(num_pairs + 1))
        return cls(words[order], np.ones(len(words), dtype=bool), offsets)

    def counts(self, pairs: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """The number of links of each given pair."""
        return self.offsets[pairs + 1] - self.offsets[pairs]

    def take(self, pairs: npt.NDArray[np.intp]) -> Links:
        """The links of the given pairs, in the given order."""
        counts = self.counts(pairs)
        offsets = np.cumsum([0, *counts])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[pairs] - offsets[:-1], counts)
        return Links(self.words[rows], self.sure[rows], offsets)

    def lines(self) -> Iterator[str]:
        """The Pharaoh line of each pair."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            links = zip(self.words[start:end].tolist(), self.sure[start:end], strict=True)
            yield " ".join(f"{i}{'-' if sure else 'p'}{j}" for (i, j), sure in links)


def read_links(
    path: Path,
    num_words: npt.NDArray[np.int64],
    *,
    text: str,
    lines: npt.NDArray[np.integer[Any]],
    num_lines: int,
    first_word: int | None = 0,
    skip_bad: bool = False,
    gold: bool = False,
    progress: Progress = SILENT,
) -> Links:
    """Reads a Pharaoh file.

    Args:
        path: the file.
        num_words: (P, 2) words of each source and target sentence.
        text: name of the parallel text, for messages.
        lines: (P,) line of each pair, from 1; other lines are ignored.
        num_lines: number of lines in the text.
        first_word: number of a sentence's first word; None: 1 if no link names word 0.
        skip_bad: skip bad links instead of refusing the file.
        gold: skip the few links of a gold file that name a missing word.
        progress: notes skipped links and the detected `first_word`.

    Raises:
        DataError: the file cannot be read, its number of lines differs from the text's, or a link
            is malformed or names a missing word.
    """
    content = read_lines(path, "links such as 0-0 1-2")
    if len(content) > num_lines:
        raise DataError.at(
            path, num_lines + 1, f"more lines than sentences; {text} has {num_lines}."
        )
    if len(content) < num_lines:
        raise DataError(f"{path}: {len(content)} lines; expected {num_lines}, as in {text}.")
    if first_word is None:
        first_word = 0 if any(map(_LINK_OF_WORD_0.search, content)) else 1
        progress.note(f"{path}: words are counted from {first_word}.")
    words: list[tuple[int, int]] = []
    sure: list[bool] = []
    offsets = [0]
    bad: list[str] = []
    for number, sizes in zip(lines.tolist(), num_words.tolist(), strict=True):
        for item in content[number - 1].split():
            try:
                link, is_sure = _parse(item, first_word, sizes)
            except ValueError as error:
                if not (skip_bad or (gold and isinstance(error, _NoSuchWord))):
                    raise DataError.at(path, number, str(error)) from None
                bad.append(f"line {number}: {error}")
                continue
            words.append(link)
            sure.append(is_sure)
        offsets.append(len(words))
    if not skip_bad and len(bad) > max(1, _MOST_MISNUMBERED * len(words)):
        raise DataError(f"{path}: {len(bad)} links name words that do not exist: {bad[0]}")
    if bad:
        progress.note(f"{path}: {len(bad)} bad links skipped, the first in {bad[0]}")
    return Links(
        np.array(words, dtype=np.int64).reshape(-1, 2),
        np.array(sure, dtype=bool),
        np.array(offsets, dtype=np.int64),
    )


def read_lines(path: Path, expected: str) -> list[str]:
    """The lines of a UTF-8 file, or a DataError that says what was `expected`."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; expected {expected}.") from None
    return content.removesuffix("\n").split("\n") if content else []


class _NoSuchWord(ValueError):
    """A link names a word that the sentence does not have."""


def _parse(item: str, first_word: int, sizes: list[int]) -> tuple[tuple[int, int], bool]:
    match = _LINK.fullmatch(item)
    if match is None:
        raise ValueError(f"{item[:40]!r} is no link; expected two word numbers such as 0-2.")
    link = int(match[1]) - first_word, int(match[3]) - first_word
    for side, word, size in zip(("source", "target"), link, sizes, strict=True):
        if not 0 <= word < size:
            raise _NoSuchWord(
                f"{item} names a word that does not exist; the {side} sentence has {size}, "
                f"counted from {first_word}."
            )
    return link, match[2] == "-"


@dataclass(frozen=True)
class AlignmentScore:
    """Agreement of links A with sure gold links S and possible ones P ⊇ S."""

    precision: float  # |A ∩ P| / |A|; 0 if A is empty
    recall: float  # |A ∩ S| / |S|
    error_rate: float  # alignment error rate, 1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|)
    num_pairs: int
    num_found: int  # |A|
    num_sure: int  # |S|
    num_possible: int  # |P|


def score(links: Links, gold: Links) -> AlignmentScore:
    """Compares links with gold links of the same P pairs; duplicates count once.

    Raises:
        DataError: there is no sure gold link.
    """
    width = 1 + max((int(each.words.max()) for each in (links, gold) if each.words.size), default=0)

    def keys(links: Links) -> npt.NDArray[np.int64]:
        source, target = links.words.T
        numbers: npt.NDArray[np.int64] = (links.pairs * width + source) * width + target
        return numbers

    linked, possible, sure = map(np.unique, (keys(links), keys(gold), keys(gold)[gold.sure]))
    if not len(sure):
        raise DataError("the gold links hold no sure link (i-j), so nothing can be scored.")
    sure_hits, possible_hits = (
        len(np.intersect1d(linked, gold_keys, assume_unique=True)) for gold_keys in (sure, possible)
    )
    return AlignmentScore(
        precision=possible_hits / len(linked) if len(linked) else 0.0,
        recall=sure_hits / len(sure),
        error_rate=1 - (sure_hits + possible_hits) / (len(linked) + len(sure)),
        num_pairs=len(gold),
        num_found=len(linked),
        num_sure=len(sure),
        num_possible=len(possible),
    )
