"""Language identification: which of some languages is a text in? Needs the extra `langid`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from clseave_cli.core.data.languages import unexpected_script
from clseave_cli.errors import ExtraMissing

# A warning needs more certainty than a guess: "A dog waits outside." is Estonian with 0.75.
_CERTAIN = 0.9
_UNLIKELY = 0.02


class LanguageIdentifier:
    """Tells languages apart; slow to start, so it starts with the first text.

    Args:
        languages: their codes; `zh-Hant` counts as `zh`, and the first of several such is meant.

    Attributes:
        languages: those of them that can be told apart.

    Raises:
        ExtraMissing: lingua is not installed.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        try:
            from lingua import IsoCode639_1
        except ImportError:
            raise ExtraMissing(
                "language identification needs lingua; run: pip install -e '.[langid]'."
            ) from None
        self._by_code: dict[Any, str] = {}
        for lang in languages:
            code = getattr(IsoCode639_1, lang.split("-")[0].upper(), None)
            if code is not None:
                self._by_code.setdefault(code, lang)
        self.languages = tuple(self._by_code.values())
        self._detector: Any = None

    def identify(self, text: str) -> tuple[str, float]:
        """The likeliest language of a text, and how sure that is (0 to 1)."""
        if len(self.languages) == 1:
            return self.languages[0], 1.0
        if self._detector is None:
            from lingua import LanguageDetectorBuilder

            self._detector = LanguageDetectorBuilder.from_iso_codes_639_1(*self._by_code).build()
        best = self._detector.compute_language_confidence_values(text)[0]
        return self._by_code[best.language.iso_code_639_1], float(best.value)


def language_warning(text: str, lang: str, thorough: bool = True) -> str | None:
    """Why a text is probably not in a language; None where nothing speaks against it.

    Args:
        text: the text.
        lang: the language.
        thorough: check the language if lingua is installed, not only the script: among all that
            lingua can tell apart, from trigrams alone, which takes a second once and 64 MB.
    """
    if unexpected_script(text, lang):
        return f"the sentence is not in the script of {lang}; check the language."
    detector = _all_languages() if thorough else None
    if detector is None:
        return None
    shares = {
        each.language.iso_code_639_1.name.lower(): each.value
        for each in detector.compute_language_confidence_values(text)
    }
    code = lang.split("-")[0].lower()
    likeliest = max(shares, key=lambda each: shares[each], default=code)
    if shares.get(code, 1) <= _UNLIKELY and shares[likeliest] >= _CERTAIN:
        return f"the sentence seems to be in {likeliest}, not in {lang}; check the language."
    return None


@functools.cache
def _all_languages() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        return None
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
