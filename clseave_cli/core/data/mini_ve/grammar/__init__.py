"""Hand-written grammars: one hypothesis, said in six languages.

Each language has three paraphrases per form, and the paraphrases correspond: number 2 in German
translates number 2 in English. So an English sentence has exactly one translation, and the choice
of a paraphrase, made without regard to the label, gives nothing away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from clseave_cli.core.data.mini_ve.grammar import (
    chinese,
    dutch,
    english,
    german,
    japanese,
    korean,
)
from clseave_cli.core.data.mini_ve.world import Hypothesis

#: Paraphrases per form and language.
NUM_TEMPLATES = 3

_SENTENCES: dict[str, Callable[[Hypothesis, int], str]] = {
    "en": english.sentence,
    "de": german.sentence,
    "nl": dutch.sentence,
    "ja": japanese.sentence,
    "zh": chinese.sentence,
    "ko": korean.sentence,
}

#: The languages of the built-in world, English first.
LANGUAGES = tuple(_SENTENCES)


# A few thousand sentences, each of which is said many times.
@cache
def say(hypothesis: Hypothesis, template: int, language: str) -> str:
    """`hypothesis` as a sentence of `language`, in paraphrase `template` (0, 1 or 2)."""
    return _SENTENCES[language](hypothesis, template)
