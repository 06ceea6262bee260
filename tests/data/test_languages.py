"""One spelling for the user, every spelling for the engines."""

import re

import pytest

from clseave_cli.core.data.languages import LANGUAGES, canonical, letters_of, spellings
from clseave_cli.errors import UsageError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("zh", "zh"), ("zh-CN", "zh"), ("zh_CN", "zh"), ("zho_Hans", "zh"), ("zh_Hans", "zh"),
        ("zh-TW", "zh-Hant"), ("zho_Hant", "zh-Hant"), ("deu", "de"), ("deu_Latn", "de"),
        ("de_DE", "de"), ("iw", "he"), ("jw", "jv"), ("nb", "no"), ("KO", "ko"),
        ("tlh", "tlh"), ("pt-BR", "pt-BR"),
    ],
)  # fmt: skip
def test_any_engines_spelling_is_understood(given, expected):
    assert canonical(given) == expected


@pytest.mark.parametrize("bad", ["", "german", "d", "de/../x", "de fr", "zh;"])
def test_what_is_no_code_is_refused(bad):
    with pytest.raises(UsageError, match="expected one such as de"):
        canonical(bad)


def test_spellings_of_one_language_lead_back_to_it_and_all_have_letters():
    for code in LANGUAGES:
        assert code in {canonical(spelling) for spelling in spellings(code)}
        assert canonical(code) == code
        assert letters_of(code)
    assert letters_of("tlh") is None


def test_engine_spellings_from_their_own_tables():
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as m2m
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as mbart
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as nllb

    for code in ("de", "nl", "ja", "zh", "ko", "ar", "es", "fr", "ru", "sw", "no", "fa"):
        for table in (m2m["m2m100"], nllb):
            assert sum(spelling in table for spelling in spellings(code)) == 1, code
    assert next(spelling for spelling in spellings("zh") if spelling in nllb) == "zho_Hans"
    assert {canonical(code) for code in mbart} <= {*LANGUAGES}


@pytest.mark.parametrize(
    ("code", "inside", "outside"),
    [("ja", "赤いシャツ", "A"), ("ko", "남자", "男a"[1]), ("ru", "Мяч", "M"), ("ar", "رجل", "m"),
     ("zh", "红色", "あ"), ("de", "Übergrößen", "ж"), ("hi", "आदमी"[0], "a")],
)  # fmt: skip
def test_letters(code, inside, outside):
    letters = re.compile(f"[{letters_of(code)}]")
    assert all(letters.match(character) for character in inside)
    assert not any(letters.match(character) for character in outside)
