"""The web engines `libre` and `google`, and their HTTP.

`libre` is LibreTranslate, or any server with its protocol. `google` is Google Translate's free web
page, which comes without a contract: it may slow down, refuse or change at any time, and Google's
terms decide what the translations may be used for.
"""

from __future__ import annotations

import html
import json
import os
import queue
import re
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.languages import spellings
from clseave_cli.core.translation.engine import (
    Engine,
    Fault,
    Identity,
    Limits,
    Refusal,
    Rejection,
    Unreachable,
)
from clseave_cli.errors import TranslationError, UsageError
from clseave_cli.version import __version__

USER_AGENT = f"clseave/{__version__} (research translation; python-requests)"
#: Not an option, because all users of a machine can read command lines.
API_KEY_VARIABLE = "LIBRETRANSLATE_API_KEY"

#: A longer answer cannot be a translation.
_MAX_ANSWER_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 10
_CAPTCHA_SIGNS = ("captcha", "unusual traffic", "/sorry/", "are you a robot", "cf-challenge")

_NO_ANSWER = "no answer within {seconds:g} s"
_NOBODY_THERE = "cannot be reached; is the address right, and the server running?"
# An exception's class, a pattern of its text, and our error; the first match counts.
_PROBLEMS: tuple[tuple[type[Exception], str, type[Fault], str], ...] = (
    (requests.ConnectTimeout, "", Unreachable, "cannot be reached within {seconds:g} s"),
    (requests.Timeout, "", Fault, _NO_ANSWER),
    (TimeoutError, "", Fault, _NO_ANSWER),
    (requests.exceptions.ChunkedEncodingError, "", Fault, "the answer broke off"),
    (requests.exceptions.ContentDecodingError, "", Fault, "the answer is damaged (compression)"),
    (requests.exceptions.ProxyError, "", Unreachable, "the proxy cannot be reached"),
    (requests.exceptions.SSLError, "", Unreachable, "no TLS connection; is the certificate valid?"),
    (requests.ConnectionError, "NewConnection|NameResolution", Unreachable, _NOBODY_THERE),
    (requests.ConnectionError, "", Fault, "the connection broke off"),
)

_LIBRE_BATCH_SIZE = 32
_LIBRE_TEXT_CHARACTERS = 2_000
_LIBRE_CONCURRENCY = 2

# The text is part of the URL, percent-encoded, and URLs over 8 kB are often refused.
_GOOGLE_TEXT_CHARACTERS = 1_800
_GOOGLE_CONCURRENCY = 4
_GOOGLE_REQUESTS_PER_SECOND = 5.0  # deep-translator's documentation: five a second, 200,000 a day
_GOOGLE_RESULT = re.compile(r'class="(?:t0|result-container)"[^>]*>(.*?)</div>', re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


class _WebEngine(Engine):
    """Thread-safe requests with a deadline, and errors that say what to do.

    Redirects are not followed, because they would get the API key. The deadline covers everything
    from the DNS lookup to the last byte.
    """

    def __init__(
        self, name: str, config: TranslateConfig, url: str, source: str, target: str
    ) -> None:
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is not a number, or an open bracket
            is_address = False
        if not is_address:
            raise UsageError(f"--url {url}: expected an address such as http://localhost:5000.")
        self._url = url
        self._timeout_seconds = config.timeout_seconds
        self.identity = Identity(name, address(url), "", "", source, target)
        self._idle: queue.SimpleQueue[requests.Session] = queue.SimpleQueue()

    def _pair(self, codes: Collection[str], where: str) -> list[str]:
        """The service's codes of the two languages (`zh-CN`, `zh-Hans`), or a TranslationError."""
        table = {code.replace("-", "_").lower(): code for code in codes}
        pair = []
        for language in (self.identity.source, self.identity.target):
            names = (name.replace("-", "_").lower() for name in spellings(language))
            code = next((table[name] for name in names if name in table), None)
            if code is None:
                raise TranslationError(
                    f"{where}: does not know the language {language}; "
                    f"it knows: {' '.join(sorted(codes))}."
                )
            pair.append(code)
        return pair

    def _request(self, method: str, url: str, **arguments: Any) -> requests.Response:
        """Sends one request and reads the whole answer; raises errors as in `Engine.translate`."""
        where = address(url)
        outcome: Future[requests.Response] = Future()
        # In a thread, abandoned at the deadline: a socket's timeout restarts with every byte that
        # drips in, and a DNS lookup has none.
        request = (outcome, method, url, arguments)
        threading.Thread(target=self._exchange, args=request, daemon=True).start()
        try:
            response = outcome.result(self._timeout_seconds)
        except Exception as error:
            raise self._explain(error, where) from None
        _require_success(response, where)
        return response

    def _exchange(
        self, outcome: Future[requests.Response], method: str, url: str, more: dict[str, Any]
    ) -> None:
        try:
            session = self._idle.get_nowait()
        except queue.Empty:
            session = requests.Session()
            session.headers["User-Agent"] = USER_AGENT
        try:
            more |= {"timeout": self._timeout_seconds, "stream": True, "allow_redirects": False}
            with session.request(method, url, **more) as response:
                content = bytearray()
                for chunk in response.iter_content(_CHUNK_BYTES):
                    content += chunk
                    if len(content) > _MAX_ANSWER_BYTES:
                        raise Fault(f"{address(url)}: an answer of over {len(content)} bytes")
                response._content = bytes(content)
                response._content_consumed = True  # type: ignore[attr-defined,unused-ignore]
        except Exception as error:
            outcome.set_exception(error)
        else:
            self._idle.put(session)
            outcome.set_result(response)

    def _explain(self, error: Exception, where: str) -> Exception:
        for kind, words, fault, problem in _PROBLEMS:
            if isinstance(error, kind) and re.search(words, repr(error)):
                return fault(f"{where}: {problem.format(seconds=self._timeout_seconds)}")
        if isinstance(error, requests.RequestException):
            return TranslationError(f"{where}: {type(error).__name__}; check --url.")
        return error


def _require_success(response: requests.Response, where: str) -> None:
    """Raises an error unless the answer is a success; see `_WebEngine._request`."""
    status = response.status_code
    wait = retry_after(response.headers.get("Retry-After"))
    target = response.headers.get("Location", "") if 300 <= status < 400 else ""
    if is_captcha(response) or "/sorry/" in target:
        raise Refusal(f"{where}: asks for a captcha", wait)
    if 200 <= status < 300:
        if not response.content.strip():
            raise Fault(f"{where}: an empty answer")
        return
    problem = f"{where}: HTTP {status}"
    if target:
        raise TranslationError(
            f"{problem}: redirects to {address(urljoin(where, target))}; if you trust that "
            "address, pass it with --url."
        )
    if status in (403, 429):
        raise Refusal(problem, wait)
    if status == 408 or status >= 500:
        raise Fault(problem, wait)
    if status in (400, 413, 414, 422):
        raise Rejection(problem)
    if status == 401:
        raise TranslationError(f"{problem}: the API key is missing or wrong.")
    raise TranslationError(f"{problem}: is this the address of the service? Check --url.")


def address(url: str) -> str:
    """Scheme, host and path of a URL, without user, password and query, to be shown."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def retry_after(header: str | None) -> float | None:
    """The seconds to wait that a `Retry-After` header names; None if missing or invalid."""
    if header is None:
        return None
    try:
        is_number = re.fullmatch(r"\s*[0-9]+\s*", header)
        return float(header) if is_number else Retry().parse_retry_after(header)
    except (InvalidHeader, ValueError, OverflowError):
        return None


def is_captcha(response: requests.Response) -> bool:
    """Whether the answer is a captcha page."""
    if "html" not in response.headers.get("Content-Type", "html"):
        return False
    page = response.content[:20_000].decode("utf-8", "replace").lower()
    # A translation may mention captchas, but only a result page has a result container.
    return "result-container" not in page and any(sign in page for sign in _CAPTCHA_SIGNS)


class LibreEngine(_WebEngine):
    """Sends texts in batches to a LibreTranslate server."""

    licence = (
        "LibreTranslate is AGPL-3.0 software; its models (Argos, mostly OPUS data) and the "
        "operator of the server decide what the translations may be used for"
    )

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        if config.url is None:
            raise UsageError("--url is missing: name the address of the LibreTranslate server.")
        url = config.url.rstrip("/").removesuffix("/translate")
        super().__init__("libre", config, url, source, target)
        self._codes: list[str] = []
        self._key = os.environ.get(API_KEY_VARIABLE)
        self.limits = Limits(
            batch_size=config.batch_size or _LIBRE_BATCH_SIZE,
            batch_characters=4 * _LIBRE_TEXT_CHARACTERS,
            text_characters=_LIBRE_TEXT_CHARACTERS,
            concurrency=config.concurrency or _LIBRE_CONCURRENCY,
        )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Sends one batch."""
        source, target = self._codes = self._codes or self._language_codes()
        request = {"q": list(texts), "source": source, "target": target, "format": "text"}
        if self._key:
            request["api_key"] = self._key
        answer = self._ask("POST", "translate", json=request)
        translations = answer.get("translatedText") if isinstance(answer, dict) else None
        if isinstance(translations, str) and len(texts) == 1:
            translations = [translations]
        if not isinstance(translations, list) or not all(isinstance(t, str) for t in translations):
            raise Fault(f"{address(self._url)}/translate: an answer without translations")
        return translations

    def _language_codes(self) -> list[str]:
        """The server's codes for the two languages."""
        answer = self._ask("GET", "languages")
        entries = answer if isinstance(answer, list) else ()
        codes = [
            str(entry["code"]) for entry in entries if isinstance(entry, dict) and "code" in entry
        ]
        if not codes:
            raise Fault(f"{address(self._url)}/languages: an answer without languages")
        return self._pair(codes, address(self._url))

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._request(method, f"{self._url}/{path}", **arguments)
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError):
            raise Fault(f"{address(self._url)}/{path}: the answer is not complete JSON") from None


class GoogleEngine(_WebEngine):
    """Sends one text per request.

    deep-translator provides the URL and the languages. Its requests allow neither a timeout nor
    headers, so the page is fetched and parsed here.
    """

    licence = (
        "translations by Google's free web page: no contract and no guarantee; "
        "Google's terms of service decide what they may be used for"
    )

    def __init__(self, config: TranslateConfig, source: str, target: str) -> None:
        from deep_translator.constants import BASE_URLS, GOOGLE_LANGUAGES_TO_CODES

        url = config.url or BASE_URLS["GOOGLE_TRANSLATE"]
        super().__init__("google", config, url, source, target)
        codes = self._pair(GOOGLE_LANGUAGES_TO_CODES.values(), "engine google")
        self._codes = dict(zip(("sl", "tl"), codes, strict=True))
        self.limits = Limits(
            batch_size=1,
            batch_characters=_GOOGLE_TEXT_CHARACTERS,
            text_characters=_GOOGLE_TEXT_CHARACTERS,
            concurrency=config.concurrency or _GOOGLE_CONCURRENCY,
            requests_per_second=_GOOGLE_REQUESTS_PER_SECOND,
        )

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        """Fetches the page of a text; `limits` allow one at a time."""
        (text,) = texts
        response = self._request("GET", self._url, params={**self._codes, "q": text})
        # Without a charset in the header, requests would read German umlauts as Latin-1.
        result = _GOOGLE_RESULT.search(response.content.decode("utf-8", "replace"))
        if result is None:
            raise Fault(f"{address(self._url)}: a page without a complete translation")
        return [html.unescape(_TAG.sub(" ", result[1])).strip()]
