"""Locates the pictures of pages and tables: inside the folder, in a `data:` URI, or remote.

References come from untrusted files. A file is read only if it is inside the folder after resolving
symbolic links; a remote picture is requested only on demand, and only from public addresses.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import ipaddress
import re
import socket
import ssl
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urljoin, urlsplit

from clseave_cli.errors import DataError

#: Largest picture.
MAX_BYTES = 64 << 20
_MAX_REDIRECTS = 5
_FETCH_SECONDS = 20.0
_CONTROLS = re.compile(r"[\x00-\x20\x7f-\x9f]+")
#: IPv6 addresses that a gateway translates to the IPv4 address in their last 32 bits.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Picture:
    """A picture of a text.

    Attributes:
        name: the reference, shortened for messages.
        source: a file inside the folder, the encoded picture, or a URL to request.
        skipped: why there is no `source`.
    """

    name: str
    source: Path | bytes | str | None
    skipped: str = ""

    @property
    def key(self) -> str:
        """Equal for the same picture."""
        if isinstance(self.source, bytes):
            return hashlib.blake2b(self.source, digest_size=16).hexdigest()
        return str(self.source or self.name)

    def read(self) -> bytes:
        """The encoded picture; raises `DataError` if it cannot be read or is too large."""
        if self.source is None:
            raise DataError(self.skipped)
        if isinstance(self.source, str):
            return fetch(self.source)
        if isinstance(self.source, bytes):
            content = self.source
        else:
            try:
                with self.source.open("rb") as stream:
                    content = stream.read(MAX_BYTES + 1)
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror})") from None
        if len(content) > MAX_BYTES:
            raise DataError(f"larger than {MAX_BYTES >> 20} MiB")
        return content


class Locator:
    """Resolves references to pictures inside `root`, and to remote ones if `fetching`."""

    def __init__(self, root: Path, fetching: bool) -> None:
        self._root = root.resolve()
        self._fetching = fetching
        self._resolve_cached = lru_cache(1 << 14)(self._resolve)  # a logo is on every page

    def file(self, reference: str, folder: Path) -> Picture:
        """The picture at a path or URL in a table, relative to `folder`."""
        if re.match(r"https?://", reference, re.IGNORECASE):
            return self._remote(reference)
        return self._inside(folder / reference, _short(reference))

    def web(self, references: Iterable[str | None], folder: Path, base: str = "") -> Picture:
        """The picture of one `<img>` or link in a page of `folder` with `<base href>`.

        Of its references, a file is preferred to a URL, and a URL to a `data:` URI, which is often
        only a placeholder until a script loads the picture.
        """
        pictures = [
            _data_uri(reference)
            if reference[:5].lower() == "data:"
            else self._resolve_cached(reference, folder, base)
            for reference in ((each or "").strip() for each in references)
            if reference
        ]
        return min(pictures, key=_rank, default=Picture("", None, "no source"))

    def _resolve(self, reference: str, folder: Path, base: str) -> Picture:
        # Like browsers: drop line breaks, and treat a backslash as a slash.
        plain = re.sub(r"[\t\r\n]", "", reference).replace("\\", "/")
        name = _short(reference)
        try:
            url = urljoin(base, plain) if base else plain
            parts = urlsplit(url)
        except ValueError:
            return Picture(name, None, "not a valid URL")
        if parts.scheme in ("http", "https") or (parts.netloc and not parts.scheme):
            return self._remote(url if parts.scheme else f"https:{url}")
        if parts.scheme:  # file:, a Windows drive, …
            return Picture(name, None, "outside the folder")
        path = unquote(parts.path)
        # An absolute path starts at the root of the site, which is the folder.
        start = self._root if path.startswith("/") else folder
        return self._inside(start / path.lstrip("/"), name)

    def _remote(self, url: str) -> Picture:
        return Picture(_short(url), url if self._fetching else None, "remote")

    def _inside(self, path: Path, name: str) -> Picture:
        try:
            real = path.resolve()
            if not real.is_relative_to(self._root):
                return Picture(name, None, "outside the folder")
            # Opening a pipe or a device could block forever.
            if stat.S_ISREG(real.stat().st_mode):
                return Picture(name, real)
        except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL, a name too long, …
            pass
        return Picture(name, None, "missing")


def _rank(picture: Picture) -> int:
    for rank, kind in enumerate((Path, str, bytes)):
        if isinstance(picture.source, kind):
            return rank
    return 3 if picture.skipped == "remote" else 4


def _short(reference: str) -> str:
    text = _CONTROLS.sub(" ", reference).encode("utf-8", "replace").decode()
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def _data_uri(text: str) -> Picture:
    head, _, body = text.partition(",")
    content = unquote_to_bytes(body)
    if head.rstrip().lower().endswith(";base64"):
        content = b"".join(content.split())
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4))
        except ValueError:
            content = b""
    picture = Picture("", content)
    return Picture(f"data:{picture.key[:12]}", content)


def fetch(url: str) -> bytes:
    """Downloads a picture, following redirects.

    Raises:
        DataError: the URL is not http(s) or not at a public address, or the answer is an error, too
            large or too slow.
    """
    for _ in range(_MAX_REDIRECTS):
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise DataError("redirected to something that is not http(s)")
            answer = _request(parts)
        except (OSError, http.client.HTTPException, ValueError, UnicodeError) as error:
            raise DataError(f"could not be fetched ({error or type(error).__name__})") from None
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise DataError("could not be fetched (too many redirects)")


def _request(parts: SplitResult) -> bytes | str:
    """The body, or the location of a redirect."""
    connection = _PublicConnection(parts)
    # A socket's timeout restarts with every byte; this one does not.
    timer = threading.Timer(_FETCH_SECONDS, connection.abort)
    timer.daemon = True
    timer.start()
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", quote(target, safe="!#$%&'()*+,/:;=?@[]~"))
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.headers.get("Location", "")
        if response.status != 200:
            raise DataError(f"could not be fetched (HTTP {response.status})")
        content = response.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise DataError(f"larger than {MAX_BYTES >> 20} MiB")
        if response.length:  # incomplete
            raise DataError(f"could not be fetched within {_FETCH_SECONDS:.0f} s")
        return content
    finally:
        timer.cancel()
        connection.close()


class _PublicConnection(http.client.HTTPConnection):
    """A connection to an address that was checked to be public.

    The host name is resolved once: a second answer could differ (DNS rebinding).
    """

    def __init__(self, parts: SplitResult) -> None:
        self._tls = parts.scheme == "https"
        port = parts.port or (443 if self._tls else 80)
        super().__init__(parts.hostname or "", port, timeout=_FETCH_SECONDS)

    def connect(self) -> None:
        """Connects, unless the host has any address that is not public."""
        entries = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        if not entries or not all(is_public(str(entry[4][0])) for entry in entries):
            raise DataError("refused: the host is not at a public address")
        family, kind, protocol, _, address = entries[0]
        self.sock = socket.socket(family, kind, protocol)
        self.sock.settimeout(self.timeout)
        self.sock.connect(address)
        if self._tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)

    def abort(self) -> None:
        """Ends a request that is waiting for the server."""
        with suppress(OSError, AttributeError):  # not connected
            self.sock.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address that it translates to, is public."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast
