"""Language identification: which of some languages is a text in? Needs the extra `langid`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clseave_cli.errors import ExtraMissing


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
                "language identification needs lingua; run: pip install 'clseave-cli[langid]'."
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
