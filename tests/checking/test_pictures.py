"""Remote pictures: only on demand, only http(s), only from public addresses, within limits."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.prediction.checking import pictures
from clseave_cli.core.prediction.checking.findings import check
from clseave_cli.errors import DataError


@pytest.fixture
def server(site):
    """Serves the site's red.png and a few nasty answers; gives its address and what was asked."""
    content = (site / "red.png").read_bytes()
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            target = {"/loop": "/loop", "/away": "file:///etc/passwd", "/moved": "/a%20b?c=%C3%A9"}
            self.send_response(302 if self.path in target else 404 if self.path == "/no" else 200)
            if self.path in target:
                self.send_header("Location", target[self.path])
            length = 1000 if self.path in ("/slow", "/short") else len(content)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.path == "/slow":
                over.wait(10)
            elif self.path != "/short":
                self.wfile.write(content)

        def log_message(self, *arguments):
            return

    over = threading.Event()
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}", asked, content
    over.set()
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def as_public(monkeypatch):
    """Lets the loopback count as a public address."""
    monkeypatch.setattr(pictures, "is_public", lambda address: address == "127.0.0.1")


@pytest.mark.parametrize("fetch", [False, True])
def test_pictures_are_requested_only_on_demand(site, model, server, as_public, clseave, fetch):
    url, asked, _ = server
    (site / "page.html").write_text(f"<img src={url}/red.png alt='A blue square.'>" * 2)
    code, out, _ = clseave("check", "page.html", *(["--fetch"] if fetch else []))
    assert asked == (["/red.png"] if fetch else [])
    assert code == (1 if fetch else 0)
    assert ("contradicts" if fetch else "not judged: 2 remote") in out


def test_redirects_are_followed(server, as_public):
    url, asked, content = server
    assert pictures.fetch(f"{url}/moved") == content
    assert asked == ["/moved", "/a%20b?c=%C3%A9"]
    assert pictures.fetch(f"{url}/ä b") == content


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/no", "HTTP 404"),
        ("/loop", "too many redirects"),
        ("/away", "not http"),
        ("/slow", "within|timed out"),
        ("/short", "within"),
        ("/red.png", "larger than"),
    ],
)
def test_answers_that_are_refused(server, as_public, monkeypatch, path, reason):
    monkeypatch.setattr(pictures, "_FETCH_SECONDS", 0.3)
    if reason == "larger than":
        monkeypatch.setattr(pictures, "MAX_BYTES", 20)
    with pytest.raises(DataError, match=reason):
        pictures.fetch(server[0] + path)


def test_a_private_address_is_never_connected_to(site, model, server, monkeypatch):
    url, asked, _ = server
    port = url.rpartition(":")[2]
    addresses = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)  # a hostile name server
    (site / "page.md").write_text(f"![Red]({url}/a.png) ![Red](http://example.org:{port}/b.png)")
    result = check([site / "page.md"], CheckConfig(), fetching=True)
    assert asked == []
    assert result.summary()["skipped"] == {"refused: the host is not at a public address": 2}


def test_a_redirect_to_a_private_address_is_refused(server, monkeypatch):
    url, asked, _ = server
    answers = iter([True, False])
    monkeypatch.setattr(pictures, "is_public", lambda address: next(answers))
    with pytest.raises(DataError, match="not at a public address"):
        pictures.fetch(f"{url}/moved")
    assert asked == ["/moved"]


def test_public_addresses():
    public = ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"]
    private = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0
        224.0.0.1 255.255.255.255 ::1 :: fe80::1%eth0 fd00::1 ff02::1 ::ffff:127.0.0.1
        64:ff9b::a00:1 2002:7f00:1:: 2001:0:4136:e378:8000:63bf:3fff:fdd2"""
    assert list(filter(pictures.is_public, public + private.split())) == public


@pytest.mark.parametrize("url", ["ftp://example.org/a", "http:///a", "http://[::1", "http://h:x/"])
def test_what_is_no_url_of_a_picture(url):
    with pytest.raises(DataError):
        pictures.fetch(url)
