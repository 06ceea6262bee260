"""What languages are called in a report."""

from __future__ import annotations

_NAMES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "ru": "Russian",
    "zh": "Chinese",
}


def language_name(lang: str) -> str:
    """`German` for `de`; the code itself where the name is not known."""
    return _NAMES.get(lang, lang)
