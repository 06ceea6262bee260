"""Real HTTP servers on loopback that translate by a rule, and misbehave on demand."""

from __future__ import annotations

import html
import itertools
import json
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: A fault: given the handler and its proper answer, it answers otherwise; returns False to pass.
Fault = Callable[["_Handler", bytes, list[str]], bool]

CAPTCHA = b"<html><body>Our systems have detected unusual traffic. <form id=captcha-form></body>"


def translated(text: str, target: str = "de") -> str:
    """What the servers answer: the words, each marked with the language, in the same order."""
    return " ".join(f"{target}{word}" for word in text.split(" "))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def do_GET(self) -> None:
        split = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
        if split.path.endswith("/languages"):
            self.send(
                200, json.dumps([{"code": "en"}, {"code": "de"}, {"code": "zh-Hans"}]).encode()
            )
            return
        text = query["q"][0]
        page = (
            "<html><head><title>Translate</title></head><body>"
            f'<div class="result-container">{html.escape(translated(text, query["tl"][0]))}</div>'
            "</body></html>"
        )
        self.answer([text], page.encode(), "text/html", query)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        texts = request["q"]
        answers = [translated(text, request["target"]) for text in texts]
        payload = json.dumps({"translatedText": answers}).encode()
        self.answer(texts, payload, "application/json", request)

    def answer(self, texts: list[str], body: bytes, kind: str, request: Any) -> None:
        loopback = self.server.loopback
        with loopback.lock:
            loopback.requested += texts
            loopback.under_way += 1
            loopback.agents.add(self.headers.get("User-Agent", ""))
            loopback.last_request = request
            fault = loopback.fault
        if loopback.delay_seconds:
            time.sleep(loopback.delay_seconds)
        try:
            if fault is None or not fault(self, body, texts):
                self.send(200, body, kind)
        finally:
            with loopback.lock:
                loopback.under_way -= 1

    def send(
        self, status: int, body: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def half_send(self, body: bytes, kind: str, with_length: bool) -> None:
        """Half of the answer, and then the connection is closed."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if with_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: len(body) * 2 // 3])
        self.close_connection = True

    def hang_up(self) -> None:
        """No answer, and the connection is closed."""
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    loopback: Loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed hangs up; nothing to report."""


class Loopback:
    """A server that lives as long as the `with` block.

    Attributes:
        url: where it listens.
        fault: makes it misbehave, None for a good server.
        delay_seconds: how long it takes for an answer.
        requested: every text it was asked for, in order, repetitions included.
        agents: the User-Agents seen.
        last_request: query or JSON body of the last request.
    """

    def __init__(self, kind: str, port: int = 0) -> None:
        self.fault: Fault | None = None
        self.delay_seconds = 0.0
        self.requested: list[str] = []
        self.agents: set[str] = set()
        self.last_request: Any = None
        self.under_way = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.loopback = self
        path = "/m" if kind == "google" else ""
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def settle(self) -> None:
        """Waits until requests of a client that died have been read, and dealt with."""
        time.sleep(0.02)
        while self.under_way > 0:
            time.sleep(0.001)

    def __enter__(self) -> Loopback:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def misbehave_at_random(seed: int) -> Fault:
    """A fault of a server that goes wrong in every way, half of the time."""
    choose = random.Random(seed)
    lock = threading.Lock()
    numbers = itertools.count()

    def misbehave(handler: Any, body: bytes, texts: list[str]) -> bool:
        with lock:
            kind = choose.randrange(16)
            number = next(numbers)
        if any("poison" in text for text in texts):
            kind = 1
        if kind == 0:
            handler.send(429, b"slow down", Retry_After="0" if number % 2 else "1")
        elif kind == 1:
            handler.send(500, b"oops")
        elif kind == 2:
            handler.send(200, b"", "text/html")
        elif kind == 3:
            handler.send(200, CAPTCHA, "text/html")
        elif kind == 4:
            handler.half_send(body, "text/html", with_length=True)
        elif kind == 5:
            handler.half_send(body, "application/json", with_length=False)
        elif kind == 6:
            answers = [translated(text) for text in texts]
            spoilt = answers[1:] if number % 2 else [*answers, "deone demore"]
            handler.send(200, json.dumps({"translatedText": spoilt}).encode())
        elif kind == 7 and number % 4 == 0:
            threading.Event().wait(0.8)
            handler.close_connection = True
        else:
            return False
        return True

    return misbehave
