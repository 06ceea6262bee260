"""Google Translate's free web page, through deep-translator.

No contract stands behind that page: it may slow down, refuse or change at any time, and Google's
terms decide what the translations may be used for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import requests
from deep_translator import google as deep_google
from deep_translator.constants import BASE_URLS, GOOGLE_LANGUAGES_TO_CODES
from deep_translator.exceptions import TranslationNotFound

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.languages import canonical
from clseave_cli.core.translation import http
from clseave_cli.core.translation.engine import Fault, Identity, Limits, language_code

# The text travels in the address, percent-encoded, and addresses over 8 kB are often refused;
# deep-translator itself stops at 5,000 characters.
_TEXT_CHARACTERS = 1_800
_CONCURRENCY = 4
_REQUESTS_PER_SECOND = 5.0  # deep-translator's documentation: five a second, 200,000 a day
_WHOLE_RESULT = re.compile(r'class="(?:t0|result-container)"[^>]*>.*?</div>', re.DOTALL)

#: Canonical code → Google's code, from deep-translator's own table.
LANGUAGES = {canonical(code): code for code in GOOGLE_LANGUAGES_TO_CODES.values()}


class _Transport:
    """Stands in for the `requests` module inside deep-translator's `translate`."""

    def __init__(self, client: http.Client) -> None:
        self._client = client

    def get(self, url: str, params: dict[str, str], proxies: Any) -> requests.Response:
        response = self._client.request("GET", url, params=params)
        # Without a charset in the header, requests would read German umlauts as Latin-1.
        response.encoding = "utf-8"
        if not _WHOLE_RESULT.search(response.text):
            where = http.address(url)
            if not response.content.strip():
                raise Fault(f"{where}: an empty answer")
            raise Fault(f"{where}: a page without a (whole) translation in it")
        return response


def _translator_class(client: http.Client) -> type[Any]:
    # deep-translator calls `requests.get` with neither a time-out nor headers and gives no way to
    # pass any. A copy of its function whose global `requests` is ours changes nothing for others
    # in this process who use deep-translator.
    original = deep_google.GoogleTranslator.translate
    globals_ = {**original.__globals__, "requests": _Transport(client)}
    translate = FunctionType(
        original.__code__, globals_, original.__name__, original.__defaults__, original.__closure__
    )
    return type("GoogleTranslator", (deep_google.GoogleTranslator,), {"translate": translate})


class GoogleEngine:
    """One request per text; alignment cannot slip."""

    licence = (
        "translations by Google's free web page: no contract and no guarantee; "
        "Google's terms of service decide what they may be used for"
    )

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        url = http.check_url(config.url or BASE_URLS["GOOGLE_TRANSLATE"])
        self._codes = {
            "source": language_code(LANGUAGES, source, "google"),
            "target": language_code(LANGUAGES, target, "google"),
        }
        self._url = url
        self._class = _translator_class(http.Client(config.timeout_seconds))
        self.identity = Identity("google", http.address(url), "", "", source, target)
        self.limits = Limits(
            1, _TEXT_CHARACTERS, _TEXT_CHARACTERS, config.concurrency or _CONCURRENCY
        )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Asks the page for each text."""
        return [self._translate(text) for text in texts]

    def _translate(self, text: str) -> str:
        translator = self._class(**self._codes)  # it keeps the text in itself: one per request
        translator._base_url = self._url
        try:
            translation: str | None = translator.translate(text)
        except TranslationNotFound:
            raise Fault(f"{http.address(self._url)}: a page without a translation in it") from None
        # None is deep-translator's word for "came back unchanged".
        return text if translation is None else translation

    def close(self) -> None:
        """Nothing to free."""


def create(config: TranslateConfig, source: str, target: str) -> GoogleEngine:
    """The engine, for `create_engine`."""
    return GoogleEngine(config, source, target)
