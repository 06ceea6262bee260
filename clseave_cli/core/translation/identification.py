"""Language identification: which language is this text in? An extra (`pip install lingua-…`)."""

from __future__ import annotations

from typing import Any

# Kept small, because every language costs memory: the two at hand, and those that models fall
# into by mistake.
_CONFUSED = ("en", "de", "nl", "fr", "es", "ja", "zh", "ko", "ru")
_MIN_CHARACTERS = 20
_MIN_DENSE_CHARACTERS = 6
_MIN_CONFIDENCE = 0.9


class LanguageIdentifier:
    """Tells texts in the target language from texts in another; slow to start, so it starts late.

    Args:
        source: canonical code of the language translated from.
        target: canonical code of the language translated into.

    Attributes:
        covers_target: False where the identifier does not know the target language.
    """

    def __init__(self, source: str, target: str) -> None:
        from lingua import IsoCode639_1

        wanted = dict.fromkeys([target.split("-")[0], source.split("-")[0], *_CONFUSED])
        self._codes = [
            code for name in wanted if (code := getattr(IsoCode639_1, name.upper(), None))
        ]
        self._target = getattr(IsoCode639_1, target.split("-")[0].upper(), None)
        self.covers_target = self._target is not None
        self._detector: Any = None

    def is_wrong(self, text: str) -> bool:
        """Whether the text is surely in another language; short texts are never sure."""
        if len(text) < (_MIN_CHARACTERS if text.isascii() else _MIN_DENSE_CHARACTERS):
            return False
        if self._detector is None:
            from lingua import LanguageDetectorBuilder

            builder = LanguageDetectorBuilder.from_iso_codes_639_1(*self._codes)
            self._detector = builder.build()
        best = self._detector.compute_language_confidence_values(text)[0]
        return bool(best.language.iso_code_639_1 != self._target and best.value >= _MIN_CONFIDENCE)
