"""Languages: codes and their spellings, scripts, names, and identification.

The user writes `zh`. A translation engine may call it `zh-CN`, `zho_Hans`, `zh_Hans` or `__zh__`;
the command line accepts these, too. Identifying languages needs lingua (extra `langid`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from clseave_cli.errors import ExtraMissing, UsageError

# A warning needs high certainty: "A dog waits outside." is taken for Estonian with 0.75.
_CERTAIN = 0.9
_UNLIKELY = 0.02


class Language(NamedTuple):
    """One language."""

    code: str  # the spelling of the command line and of file names (BCP 47, as short as possible)
    iso3: str  # ISO 639-3; if `code` is a macrolanguage, that of the individual language
    script: str  # ISO 15924
    region: str = ""  # the country in mBART-50's code; empty if it does not support the language


# code, ISO 639-3, script, region: languages of M2M-100 and Google. Other codes are passed to the
# engine unchanged.
_TABLE = """
af afr Latn ZA|ak aka Latn|am amh Ethi|ar arb Arab AR|as asm Beng|ast ast Latn|ay ayr Latn
az azj Latn AZ|ba bak Cyrl|be bel Cyrl|bg bul Cyrl|bho bho Deva|bm bam Latn|bn ben Beng IN
br bre Latn|bs bos Latn|ca cat Latn|ceb ceb Latn|ckb ckb Arab|co cos Latn|cs ces Latn CZ
cy cym Latn|da dan Latn|de deu Latn DE|dv div Thaa|ee ewe Latn|el ell Grek|en eng Latn XX
eo epo Latn|es spa Latn XX|et est Latn EE|eu eus Latn|fa pes Arab IR|ff fuv Latn|fi fin Latn FI
fr fra Latn XX|fy fry Latn|ga gle Latn|gd gla Latn|gl glg Latn ES|gn grn Latn
gu guj Gujr IN|ha hau Latn|haw haw Latn|he heb Hebr IL|hi hin Deva IN|hmn hmn Latn
hr hrv Latn HR|ht hat Latn|hu hun Latn|hy hye Armn|id ind Latn ID|ig ibo Latn|ilo ilo Latn
is isl Latn|it ita Latn IT|ja jpn Jpan XX|jv jav Latn|ka kat Geor GE|kk kaz Cyrl KZ
km khm Khmr KH|kn kan Knda|ko kor Hang KR|ku kmr Latn|ky kir Cyrl|la lat Latn|lb ltz Latn
lg lug Latn|ln lin Latn|lo lao Laoo|lt lit Latn LT|lv lvs Latn LV|mai mai Deva|mg plt Latn
mi mri Latn|mk mkd Cyrl MK|ml mal Mlym IN|mn khk Cyrl MN|mr mar Deva IN|ms zsm Latn
mt mlt Latn|my mya Mymr MM|ne npi Deva NP|nl nld Latn XX|no nob Latn|nso nso Latn|ny nya Latn
oc oci Latn|om gaz Latn|or ory Orya|pa pan Guru|pl pol Latn PL|ps pbt Arab AF|pt por Latn XX
qu quy Latn|ro ron Latn RO|ru rus Cyrl RU|rw kin Latn|sa san Deva|sd snd Arab|si sin Sinh LK
sk slk Latn|sl slv Latn SI|sm smo Latn|sn sna Latn|so som Latn|sq als Latn|sr srp Cyrl
ss ssw Latn|st sot Latn|su sun Latn|sv swe Latn SE|sw swh Latn KE|ta tam Taml IN|te tel Telu IN
tg tgk Cyrl|th tha Thai TH|ti tir Ethi|tk tuk Latn|tl tgl Latn XX|tn tsn Latn|tr tur Latn TR
ts tso Latn|tt tat Cyrl|ug uig Arab|uk ukr Cyrl UA|ur urd Arab PK|uz uzn Latn|vi vie Latn VN
wo wol Latn|xh xho Latn ZA|yi ydd Hebr|yo yor Latn|zh zho Hans CN|zh-Hant zho Hant|zu zul Latn
"""

# code, other spellings.
_MORE_SPELLINGS = """
zh zh_CN zh_Hans cmn_Hans cmn|zh-Hant zh_TW zh_HK cmn_Hant|he iw|jv jw|no nb nor|nso ns|tl fil
ar ara|fa fas|et ekk|lv lav|ms msa|sw swa|mn mon|ne nep|az aze|sq sqi|yi yid|uz uzb|ps pus
or ori|mg mlg|ku kur|hr hbs_Latn|sr hbs_Cyrl
"""


def _read(table: str) -> list[list[str]]:
    return [entry.split() for line in table.split("\n") for entry in line.split("|") if entry]


_EXTRA_SPELLINGS = {code: spellings for code, *spellings in _read(_MORE_SPELLINGS)}
LANGUAGES = {entry[0]: Language(*entry) for entry in _read(_TABLE)}


def spellings(code: str) -> tuple[str, ...]:
    """The spellings that models may use for a language, the most specific first."""
    if code not in LANGUAGES:
        return (code,)
    _, iso3, script, region = LANGUAGES[code]
    candidates = [f"{iso3}_{script}", f"{code}_{region}" if region else ""]
    candidates += [code.replace("-", "_"), code, iso3, *_EXTRA_SPELLINGS.get(code, ())]
    return tuple(dict.fromkeys(filter(None, candidates)))


# A spelling shared by two languages belongs to the first.
_ALIASES = {
    spelling.replace("_", "-").lower(): code
    for code in reversed(LANGUAGES)
    for spelling in spellings(code)
}

# Letters per script: enough to tell scripts apart, not every Unicode block.
_SCRIPT_RANGES = {
    "Latn": "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿ",
    "Cyrl": "\u0400-\u052f",
    "Grek": "\u0370-\u03ff\u1f00-\u1fff",
    "Arab": "\u0620-\u064a\u066e-\u06d3\u06d5\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Hebr": "\u05d0-\u05ea",
    "Hani": "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "Kana": "\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "Hang": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "Deva": "\u0904-\u0939\u0958-\u0961",
    "Beng": "\u0985-\u09b9\u09dc-\u09e1",
    "Guru": "\u0a05-\u0a39\u0a59-\u0a5e",
    "Gujr": "\u0a85-\u0ab9",
    "Orya": "\u0b05-\u0b39\u0b5c-\u0b61",
    "Taml": "\u0b83-\u0bb9",
    "Telu": "\u0c05-\u0c39",
    "Knda": "\u0c85-\u0cb9",
    "Mlym": "\u0d05-\u0d3a",
    "Sinh": "\u0d85-\u0dc6",
    "Thai": "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e45",
    "Laoo": "\u0e81-\u0eb0\u0ec0-\u0ec4",
    "Mymr": "\u1000-\u102a\u1050-\u1055",
    "Geor": "\u10a0-\u10ff",
    "Armn": "\u0531-\u0587",
    "Ethi": "\u1200-\u135a",
    "Khmr": "\u1780-\u17b3",
    "Thaa": "\u0780-\u07a5",
}
# The East Asian scripts, all dense (see `is_dense`), by their parts.
_EAST_ASIAN = {
    "Jpan": ("Hani", "Kana"), "Hans": ("Hani",), "Hant": ("Hani",), "Hang": ("Hang", "Hani"),
}  # fmt: skip


def canonical(code: str) -> str:
    """The project's spelling of a language code: `zh_CN`, `zho_Hans`, `cmn` → `zh`.

    A code that is not in the table is returned unchanged, for the engine to accept or refuse.

    Raises:
        UsageError: not a language code.
    """
    if not re.fullmatch(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*", code):
        raise UsageError(
            f"--lang {code!r}: not a language code; expected one such as de, ja, zh or pt-BR."
        )
    return _ALIASES.get(code.replace("_", "-").lower(), code)


def letters_of(code: str) -> str | None:
    """The letters of a language, for a regular expression's `[…]`; None: unknown script."""
    if code not in LANGUAGES:
        return None
    script = LANGUAGES[code].script
    return "".join(_SCRIPT_RANGES[each] for each in _EAST_ASIAN.get(script, (script,)))


def unexpected_script(text: str, code: str) -> bool:
    """Whether most letters of a text are in scripts that the language does not use."""
    expected = letters_of(code)
    if expected is None:
        return False
    letters = re.sub(r"[\W\d_]", "", text)
    return 2 * len(re.findall(f"[{expected}]", letters)) < len(letters)


def is_dense(code: str) -> bool:
    """Whether a character is about as much as a syllable or word (Han, kana, Hangul)."""
    return code in LANGUAGES and LANGUAGES[code].script in _EAST_ASIAN


_NAMES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "ru": "Russian", "zh": "Chinese",
}  # fmt: skip


def language_name(code: str) -> str:
    """`German` for `de`; the code itself if the name is not listed."""
    return _NAMES.get(code, code)


class LanguageIdentifier:
    """Identifies the language of a text; loads lingua's models, slowly, with the first text.

    Attributes:
        languages: the candidates that lingua supports. `zh-Hant` counts as `zh`; of several such
            candidates, the first is used.

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
        """The likeliest language of a text, and its probability."""
        if len(self.languages) == 1:
            return self.languages[0], 1.0
        if self._detector is None:
            from lingua import LanguageDetectorBuilder

            self._detector = LanguageDetectorBuilder.from_iso_codes_639_1(*self._by_code).build()
        best = self._detector.compute_language_confidence_values(text)[0]
        return self._by_code[best.language.iso_code_639_1], float(best.value)


def language_warning(text: str, lang: str, thorough: bool = True) -> str | None:
    """A warning if a text is probably not in the language `lang`, else None.

    If `thorough` and lingua is installed, checks the language, not only the script. Lingua compares
    the trigrams of all its languages, which takes 64 MB, and a second at first.
    """
    if unexpected_script(text, lang):
        return f"the sentence is not in the script of {lang}; check the language."
    detector = _all_languages() if thorough else None
    if detector is None:
        return None
    probabilities = {
        each.language.iso_code_639_1.name.lower(): each.value
        for each in detector.compute_language_confidence_values(text)
    }
    code = lang.split("-")[0].lower()
    likeliest = max(probabilities, key=probabilities.__getitem__, default=code)
    if probabilities.get(code, 1) <= _UNLIKELY and probabilities[likeliest] >= _CERTAIN:
        return f"the sentence seems to be in {likeliest}, not in {lang}; check the language."
    return None


@functools.cache
def _all_languages() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        return None
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
