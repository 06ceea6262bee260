"""HTTP for the engines behind a web address: what an answer means, in our own errors."""

from __future__ import annotations

import email.utils
import threading
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import requests

from clseave_cli.core.translation.engine import Fault, Refusal, Rejection
from clseave_cli.errors import TranslationError, UsageError
from clseave_cli.version import __version__

USER_AGENT = f"clseave/{__version__} (research translation; python-requests)"

#: An answer longer than this is not a translation; reading on would only fill the memory.
_MAX_ANSWER_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 16
_CAPTCHA_SIGNS = ("captcha", "unusual traffic", "/sorry/", "are you a robot", "cf-challenge")


class Client:
    """Requests with a deadline for the whole answer, a User-Agent, and errors that say what to do.

    Safe to use from several threads: each has its own connection pool.

    Args:
        timeout_seconds: for connecting, for every read, and for the answer as a whole.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._local = threading.local()

    def request(self, method: str, url: str, **arguments: Any) -> requests.Response:
        """Sends one request and reads the whole answer, which is then in `content`.

        Raises:
            Fault: worth asking again (time-out, broken connection, 408, 5xx).
            Refusal: the service does not want us (429, 403, captcha, unreachable).
            Rejection: the service does not take this text (400, 413, 414, 422).
            TranslationError: no use asking at all (401, 404, …).
        """
        session = self._session()
        deadline = time.monotonic() + self._timeout_seconds
        where = address(url)
        try:
            with session.request(
                method, url, timeout=self._timeout_seconds, stream=True, **arguments
            ) as response:
                response._content = self._read(response, deadline)
                response._content_consumed = True  # type: ignore[attr-defined,unused-ignore]
        except requests.Timeout:
            raise Fault(f"{where}: no answer within {self._timeout_seconds:g} s") from None
        except requests.exceptions.ChunkedEncodingError:
            raise Fault(f"{where}: the answer broke off") from None
        except requests.exceptions.ContentDecodingError:
            raise Fault(f"{where}: the answer is damaged (compression)") from None
        except requests.exceptions.ProxyError:
            raise Refusal(f"{where}: the proxy cannot be reached") from None
        except requests.exceptions.SSLError:
            raise Refusal(
                f"{where}: the TLS connection failed; is the certificate valid?"
            ) from None
        except requests.ConnectionError as error:
            if _nobody_there(error):
                raise Refusal(f"{where}: cannot be reached; is the address right?") from None
            raise Fault(f"{where}: the connection broke off") from None
        except requests.RequestException as error:
            raise TranslationError(f"{where}: {type(error).__name__}; check --url.") from None
        self._judge(response, where)
        return response

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.headers["User-Agent"] = USER_AGENT
        return session

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        """The answer's bytes. A server that drips is cut off as well as one that hangs."""
        content = bytearray()
        for chunk in response.iter_content(_CHUNK_BYTES):
            content += chunk
            if time.monotonic() > deadline:
                raise requests.Timeout
            if len(content) > _MAX_ANSWER_BYTES:
                raise Fault(f"{address(response.url)}: an answer of over {len(content)} bytes")
        return bytes(content)

    def _judge(self, response: requests.Response, where: str) -> None:
        status = response.status_code
        wait = retry_after(response.headers.get("Retry-After"))
        if is_captcha(response):
            raise Refusal(f"{where}: asks for a captcha", wait)
        if 200 <= status < 300:
            return
        said = f"{where}: HTTP {status}"
        if status in (403, 429):
            raise Refusal(said, wait)
        if status == 408 or status >= 500:
            raise Fault(said, wait)
        if status in (400, 413, 414, 422):
            raise Rejection(said)
        if status == 401:
            raise TranslationError(f"{said}: the API key is missing or wrong.")
        raise TranslationError(f"{said}: is this the address of the service? Check --url.")


def address(url: str) -> str:
    """Scheme, host and path of a URL: what may be shown, without user, password and query."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def check_url(url: str) -> str:
    """`url` itself, when it is an http(s) address.

    Raises:
        UsageError: it is not.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url {url}: expected an address such as http://localhost:5000.")
    return url


def retry_after(header: str | None) -> float | None:
    """Seconds a `Retry-After` header asks to wait; None when absent or unreadable."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def is_captcha(response: requests.Response) -> bool:
    """Whether the answer is a page that wants proof of a human rather than a translation."""
    if "html" not in response.headers.get("Content-Type", "html"):
        return False
    if "/sorry/" in response.url:
        return True
    page = response.content[:20_000].decode("utf-8", "replace").lower()
    # A translation may well speak of captchas; a page that carries one is no result page.
    return "result-container" not in page and any(sign in page for sign in _CAPTCHA_SIGNS)


def _nobody_there(error: requests.ConnectionError) -> bool:
    said = repr(error)
    return "NewConnectionError" in said or "NameResolutionError" in said
