"""Where the pictures of a page or table are: inside the folder given, in a `data:` URI, or remote.

References come from files that nobody vouches for. A path leads to a picture only if the file it
names, symbolic links followed, is inside the folder; a remote picture is requested only on demand,
and only from public addresses.
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

#: Largest picture, in bytes, wherever it comes from.
MAX_BYTES = 64 << 20
_MAX_REDIRECTS = 5
_FETCH_SECONDS = 20.0
_CONTROLS = re.compile(r"[\x00-\x20\x7f-\x9f]+")
#: IPv6 addresses that a gateway turns into the IPv4 address in their last 32 bits.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Picture:
    """A picture that a text belongs to.

    Attributes:
        name: what messages call it: the reference, shortened.
        source: a file inside the folder, the bytes themselves, or a URL to request.
        skipped: why it cannot be looked at, where `source` is None.
    """

    name: str
    source: Path | bytes | str | None
    skipped: str = ""

    @property
    def key(self) -> str:
        """The same for the same picture."""
        if isinstance(self.source, bytes):
            return hashlib.blake2b(self.source, digest_size=16).hexdigest()
        return str(self.source or self.name)

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            DataError: it cannot be read or is too large.
        """
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
    """Turns references into pictures.

    Args:
        root: the folder that no path may lead out of.
        fetching: whether remote pictures may be requested.
    """

    def __init__(self, root: Path, fetching: bool) -> None:
        self._root = root.resolve()
        self._fetching = fetching
        self._one = lru_cache(1 << 14)(self._find)  # a logo is on every page

    def file(self, reference: str, folder: Path) -> Picture:
        """The picture that a path or URL in a table names, relative to `folder`."""
        if re.match(r"https?://", reference, re.IGNORECASE):
            return self._remote(reference)
        return self._inside(folder / reference, _short(reference))

    def web(self, references: Iterable[str | None], folder: Path, base: str = "") -> Picture:
        """The picture that the references of one `<img>` or link lead to.

        Args:
            references: alternatives; a file is preferred to a request, and that to a `data:` URI,
                which often only holds the place until a script loads the picture.
            folder: where the page is.
            base: the page's `<base href>`.
        """
        plain = (reference.strip() for reference in references if reference)
        pictures = [
            _data_uri(reference)
            if reference[:5].lower() == "data:"
            else self._one(reference, folder, base)
            for reference in plain
            if reference
        ]
        return min(pictures, key=_rank, default=Picture("", None, "no source"))

    def _find(self, reference: str, folder: Path, base: str) -> Picture:
        # As browsers do: line breaks are dropped, and a backslash is a slash.
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
        # A path from the root of the site, which the folder stands for.
        start = self._root if path.startswith("/") else folder
        return self._inside(start / path.lstrip("/"), name)

    def _remote(self, url: str) -> Picture:
        return Picture(_short(url), url if self._fetching else None, "remote")

    def _inside(self, path: Path, name: str) -> Picture:
        try:
            real = path.resolve()
            if not real.is_relative_to(self._root):
                return Picture(name, None, "outside the folder")
            # Opening a pipe or a device could wait for ever.
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
    """The body of a picture's URL, redirects followed.

    Raises:
        DataError: not http(s), not a public address, an error, too large, or too slow.
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
    """The body, or where the server redirects to."""
    connection = _PublicConnection(parts)
    # A timeout of the socket's starts anew with every byte; this one does not.
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
        if response.length:  # there was more to come
            raise DataError(f"could not be fetched within {_FETCH_SECONDS:.0f} s")
        return content
    finally:
        timer.cancel()
        connection.close()


class _PublicConnection(http.client.HTTPConnection):
    """A connection to the very address that was found to be public.

    The host's name is resolved once: a second answer could be another one (DNS rebinding).
    """

    def __init__(self, parts: SplitResult) -> None:
        self._tls = parts.scheme == "https"
        port = parts.port or (443 if self._tls else 80)
        super().__init__(parts.hostname or "", port, timeout=_FETCH_SECONDS)

    def connect(self) -> None:
        """Connects, and refuses a host that has any address which is not public."""
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        if not found or not all(is_public(str(entry[4][0])) for entry in found):
            raise DataError("refused: the host is not at a public address")
        family, kind, protocol, _, address = found[0]
        self.sock = socket.socket(family, kind, protocol)
        self.sock.settimeout(self.timeout)
        self.sock.connect(address)
        if self._tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)

    def abort(self) -> None:
        """Ends whatever waits for the server."""
        with suppress(OSError, AttributeError):  # not connected yet, or not any more
            self.sock.shutdown(socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's, also behind a translation to IPv4."""
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
