"""A LibreTranslate server, or anything that speaks its protocol."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import requests

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.languages import spellings
from clseave_cli.core.translation import http
from clseave_cli.core.translation.engine import Fault, Identity, Limits
from clseave_cli.errors import TranslationError, UsageError

#: Where the key is taken from: command lines can be read by every user of a machine.
API_KEY_VARIABLE = "LIBRETRANSLATE_API_KEY"

_BATCH_SIZE = 32
_TEXT_CHARACTERS = 2_000
_CONCURRENCY = 2


class LibreEngine:
    """Texts in batches, as arrays; the server's own list of languages is asked for first."""

    licence = (
        "LibreTranslate is AGPL-3.0 software; its models (Argos, mostly OPUS data) and the "
        "operator of the server decide what the translations may be used for"
    )

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        if config.url is None:
            raise UsageError("--url is missing: where is the LibreTranslate server?")
        self._url = http.check_url(config.url).rstrip("/").removesuffix("/translate")
        self._client = http.Client(config.timeout_seconds)
        self._pair = (source, target)
        self._codes: tuple[str, str] | None = None
        self._key = os.environ.get(API_KEY_VARIABLE)
        self.identity = Identity("libre", http.address(self._url), "", "", source, target)
        self.limits = Limits(
            batch_size=config.batch_size or _BATCH_SIZE,
            batch_characters=4 * _TEXT_CHARACTERS,
            text_characters=_TEXT_CHARACTERS,
            concurrency=config.concurrency or _CONCURRENCY,
        )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Sends one batch."""
        if self._codes is None:
            self._codes = self._find_codes()
        request: dict[str, Any] = {
            "q": list(texts),
            "source": self._codes[0],
            "target": self._codes[1],
            "format": "text",
        }
        if self._key:
            request["api_key"] = self._key
        answer = self._ask("POST", "translate", json=request)
        found = answer.get("translatedText") if isinstance(answer, dict) else None
        if isinstance(found, str) and len(texts) == 1:
            found = [found]
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise Fault(f"{self._address('translate')}: an answer without translations")
        return found

    def _find_codes(self) -> tuple[str, str]:
        """The server's codes for the two languages (`zh` or `zh-Hans`, as it is)."""
        answer = self._ask("GET", "languages")
        if not isinstance(answer, list) or not answer:
            raise Fault(f"{self._address('languages')}: an answer without languages")
        table = {
            str(entry["code"]).replace("-", "_").lower(): str(entry["code"])
            for entry in answer
            if isinstance(entry, dict) and "code" in entry
        }
        codes = []
        for language in self._pair:
            wanted = [name.replace("-", "_").lower() for name in spellings(language)]
            found = [table[name] for name in wanted if name in table]
            if not found:
                raise TranslationError(
                    f"{self._url_shown}: does not know the language {language}; "
                    f"it knows: {' '.join(sorted(table.values()))}."
                )
            codes.append(found[0])
        return codes[0], codes[1]

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._client.request(method, f"{self._url}/{path}", **arguments)
        if not response.content.strip():
            raise Fault(f"{self._address(path)}: an empty answer")
        try:
            return response.json()
        except requests.exceptions.JSONDecodeError:
            raise Fault(f"{self._address(path)}: the answer is not (whole) JSON") from None

    @property
    def _url_shown(self) -> str:
        return http.address(self._url)

    def _address(self, path: str) -> str:
        return http.address(f"{self._url}/{path}")

    def close(self) -> None:
        """Nothing to free."""


def create(config: TranslateConfig, source: str, target: str) -> LibreEngine:
    """The engine, for `create_engine`."""
    return LibreEngine(config, source, target)
