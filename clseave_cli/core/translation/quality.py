"""Checks that mark translations worth a second look.

- `empty`: no text.
- `copy`: the source, unchanged.
- `script`: most letters are not of the target language's script.
- `language`: language identification (an extra) is sure that it is another language.
- `length`: far too short or long for the source, given both scripts.
- `repetition`: a piece repeated over and over, as neural models do.
- `numerals`: a number of the source is missing.
- `added-sentence`: more sentences than the source.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections import Counter

from clseave_cli.core.data.languages import (
    LanguageIdentifier,
    is_dense,
    letters_of,
    unexpected_script,
)

#: Names of all checks, in the order of summaries.
CHECKS = (
    "empty", "copy", "script", "language", "length", "repetition", "numerals", "added-sentence",
)  # fmt: skip

#: Increase it when a check changes, so that entries of the memory are checked again.
_VERSION = "3"

_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W_]+")
# The same two to sixty characters four times in a row (or one word character eight times).
_LOOP = re.compile(r"(?=\S)(.{2,60}?)\1{3,}|(\w)\2{7,}", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,:\u066b\u066c ]?\d+)*")
_SENTENCE_END = re.compile(
    r"[.!?…]+[\"'”’»)\]]*(?=\s+[^\W\d_a-z]|\s*$)|[。！？]+[」』”’]*|[।؟۔]+(?=\s|$)"
)
_INITIAL = re.compile(r"\b(?:[^\W\d_]|Mr|Mrs|Ms|Dr|St|No|Nr|vs|bzw|ca)\.")

# Weights lengths, because Han, kana and Hangul need fewer characters.
_DENSE_WEIGHT = 2.5
_LENGTH_SLACK = 12
_LENGTH_RANGE = (0.35, 2.6)
_MIN_COPIED_WORDS = 3

# Languages that models produce by mistake; few, because each costs memory.
_CONFUSED = ("en", "de", "nl", "fr", "es", "ja", "zh", "ko", "ru")
_MIN_IDENTIFIED_CHARACTERS = 20
_MIN_IDENTIFIED_DENSE_CHARACTERS = 6
_MIN_CONFIDENCE = 0.9

# How East Asian languages write small numbers.
_HAN_NUMBERS = {str(value): digit for value, digit in enumerate("〇一二三四五六七八九十")} | {
    "11": "十一", "12": "十二", "100": "百", "1000": "千", "10000": "万",
}  # fmt: skip


class Checks:
    """All checks for two languages, by canonical code; `version` identifies them in the memory."""

    def __init__(self, source: str, target: str) -> None:
        letters = letters_of(target)
        self._foreign = re.compile(rf"[^{letters or ''}\W\d_]+")
        self._same_script = letters == letters_of(source)
        self._weights = [_DENSE_WEIGHT if is_dense(lang) else 1.0 for lang in (source, target)]
        self._target = target
        self._identifier: LanguageIdentifier | None = None
        self.version = _VERSION
        if source != target and importlib.util.find_spec("lingua") is not None:
            identifier = LanguageIdentifier([target, source, *_CONFUSED])
            if target in identifier.languages:
                self._identifier = identifier
                self.version += "+language"

    def find(self, source: str, translation: str) -> tuple[str, ...]:
        """Names of the checks that a translation fails."""
        if not translation.strip():
            return ("empty",)
        if not needs_translation(source):
            return ()
        in_wrong_script = self._is_in_wrong_script(source, translation)
        fails = {
            "copy": self._is_copy(source, translation),
            "script": in_wrong_script,
            "language": not in_wrong_script and self._is_in_wrong_language(translation),
            "length": not self._has_plausible_length(source, translation),
            "repetition": has_loop(translation) and not has_loop(source),
            "numerals": self._loses_numerals(source, translation),
            "added-sentence": _num_sentences(translation) > max(1, _num_sentences(source)),
        }
        return tuple(name for name in fails if fails[name])

    def _is_in_wrong_language(self, text: str) -> bool:
        """Whether the text is surely in another language; never for short texts."""
        least = _MIN_IDENTIFIED_CHARACTERS if text.isascii() else _MIN_IDENTIFIED_DENSE_CHARACTERS
        if self._identifier is None or len(text) < least:
            return False
        lang, confidence = self._identifier.identify(text)
        return lang != self._target and confidence >= _MIN_CONFIDENCE

    def _is_copy(self, source: str, translation: str) -> bool:
        if source.strip().casefold() != translation.strip().casefold():
            return False
        words = _WORD.findall(source)
        # "Pizza." may stay in the same script, and a name in any script.
        return not _is_name(words) and (not self._same_script or len(words) >= _MIN_COPIED_WORDS)

    def _is_in_wrong_script(self, source: str, translation: str) -> bool:
        if not unexpected_script(translation, self._target):
            return False
        words = _WORD.findall(source)
        foreign = set(self._foreign.findall(translation))
        # A name kept from the source, alone or in a sentence of the right script, is fine.
        is_kept_name = _is_name(list(foreign)) and foreign <= set(words)
        in_sentence = needs_translation(self._foreign.sub("", translation))
        return not (is_kept_name and (in_sentence or _is_name(words)))

    def _has_plausible_length(self, source: str, translation: str) -> bool:
        ratio = (len(translation) * self._weights[1] + _LENGTH_SLACK) / (
            len(source) * self._weights[0] + _LENGTH_SLACK
        )
        return _LENGTH_RANGE[0] <= ratio <= _LENGTH_RANGE[1]

    def _loses_numerals(self, source: str, translation: str) -> bool:
        lost = set(_numbers(source) - _numbers(translation))
        if is_dense(self._target):
            lost -= {number for number, han in _HAN_NUMBERS.items() if han in translation}
        return bool(lost)


def needs_translation(text: str) -> bool:
    """Whether the text has a letter."""
    return _LETTER.search(text) is not None


def _is_name(words: list[str]) -> bool:
    """Whether this is a single word that may be a name."""
    return len(words) == 1 and words[0][:1].isupper()


def has_loop(text: str) -> bool:
    """Whether a piece of the text is repeated over and over."""
    return _LOOP.search(text + " ") is not None  # the last word is followed by no space


def _numbers(text: str) -> Counter[str]:
    """The numbers in a text, with any digits and separators."""
    numbers: Counter[str] = Counter()
    for number in _NUMBER.findall(text):
        digits = "".join(str(unicodedata.digit(c)) for c in number if c.isdigit())
        numbers[digits.lstrip("0") or "0"] += 1
    return numbers


def _num_sentences(text: str) -> int:
    return len(_SENTENCE_END.findall(_INITIAL.sub("", text)))
