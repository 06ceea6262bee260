"""Texts and the parts of them an engine is asked about.

Engines translate sentences. Line breaks and control characters are kept out of their sight and put
back in their places; a text over an engine's limit is cut at sentence ends; and what holds no
letters (`…`, `42`, an emoji) is the same in every language and never asked about.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTER = re.compile(r"[^\W\d_]")
_SEPARATOR = re.compile(r"([\x00-\x1f\x7f-\x9f\u2028\u2029]+)")
_EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[」』”’]*")


def needs_translation(text: str) -> bool:
    """Whether the text holds a letter at all."""
    return _LETTER.search(text) is not None


class Segmented:
    """One text cut into the parts to ask about and what stands between them.

    Args:
        text: any string.
        max_characters: the longest part an engine takes; None: the whole text as it is.

    Attributes:
        parts: what to translate: no line breaks, no white space around, valid Unicode.
    """

    def __init__(self, text: str, max_characters: int | None) -> None:
        self.parts: list[str] = []
        self._pieces: list[str | None] = []
        if max_characters is None:
            self.parts.append(text)
            self._pieces.append(None)
            return
        for index, piece in enumerate(_SEPARATOR.split(text)):
            if index % 2:
                self._pieces.append(piece)
            else:
                self._add_line(piece, max_characters)

    def _add_line(self, line: str, max_characters: int) -> None:
        for chunk in _cut(line, max_characters):
            before, inner, after = _EDGES.fullmatch(chunk).groups()  # type: ignore[union-attr]
            if needs_translation(inner):
                self.parts.append(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", inner))
                self._pieces += [before, None, after]
            else:
                self._pieces.append(chunk)

    def join(self, translations: Sequence[str]) -> str:
        """The whole text, with each part replaced by its translation."""
        remaining = iter(translations)
        return "".join(next(remaining) if piece is None else piece for piece in self._pieces)


def _cut(line: str, max_characters: int) -> list[str]:
    """The line in chunks of at most `max_characters`, at sentence ends, else at spaces."""
    chunks = []
    while len(line) > max_characters:
        head = line[:max_characters]
        ends = [match.end() for match in _SENTENCE_END.finditer(head)]
        at = ends[-1] if ends else head.rfind(" ") + 1 or max_characters
        chunks.append(line[:at])
        line = line[at:]
    return [*chunks, line]
