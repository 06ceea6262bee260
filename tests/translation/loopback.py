"""Real HTTP servers on loopback that translate by a rule, and misbehave on demand."""

import html
import itertools
import json
import random
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CAPTCHA = b"<html><body>Our systems have detected unusual traffic. <form id=captcha-form></body>"


def translated(text, target="de"):
    """What the servers answer: the words, each marked with the language, in the same order."""
    return " ".join(f"{target}{word}" for word in text.split(" "))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self):
        split = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
        if split.path.endswith("/languages"):
            self.send(200, b'[{"code": "en"}, {"code": "de"}, {"code": "zh-Hans"}]')
            return
        text = query["q"][0]
        answer = html.escape(translated(text, query["tl"][0]))
        page = f'<html><body><div class="result-container">{answer}</div></body></html>'
        self.answer([text], page.encode(), "text/html", query)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = request["q"]
        answers = [translated(text, request["target"]) for text in texts]
        payload = json.dumps({"translatedText": answers}).encode()
        self.answer(texts, payload, "application/json", request)

    def answer(self, texts, body, kind, request):
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

    def send(self, status, body, kind="application/json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def half_send(self, body, kind, with_length):
        """Half of the answer, and then the connection is closed."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if with_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: len(body) * 2 // 3])
        self.close_connection = True

    def hang_up(self):
        """No answer, and the connection is closed."""
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def stall(self, seconds):
        time.sleep(seconds)
        self.close_connection = True

    def log_message(self, format, *args):
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that is killed hangs up; nothing to report."""


class Loopback:
    """A server, `google` or `libre`, that lives as long as the `with` block."""

    def __init__(self, kind):
        self.kind = kind
        #: Given the handler, its proper answer and the texts, answers, or returns False to pass.
        self.fault = None
        self.delay_seconds = 0.0
        self.requested = []  # every text, in order, repetitions included
        self.agents = set()
        self.last_request = None
        self.under_way = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.loopback = self
        path = "/m" if kind == "google" else ""
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def settle(self):
        """Waits until requests of a client that died have been read, and dealt with."""
        time.sleep(0.02)
        while self.under_way > 0:
            time.sleep(0.001)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def misbehave_at_random(seed):
    """A fault of a server that goes wrong in every way, half of the time."""
    choose, lock, numbers = random.Random(seed), threading.Lock(), itertools.count()

    def misbehave(handler, body, texts):
        with lock:
            kind, number = choose.randrange(16), next(numbers)
        if any("poison" in text for text in texts):
            kind = 1
        answers = [translated(text) for text in texts]
        spoilt = answers[1:] if number % 2 else [*answers, "deone demore"]
        faults = [
            lambda: handler.send(429, b"slow down", Retry_After="0" if number % 2 else "1"),
            lambda: handler.send(500, b"oops"),
            lambda: handler.send(200, b"", "text/html"),
            lambda: handler.send(200, CAPTCHA, "text/html"),
            lambda: handler.half_send(body, "text/html", with_length=True),
            lambda: handler.half_send(body, "application/json", with_length=False),
            lambda: handler.send(200, json.dumps({"translatedText": spoilt}).encode()),
            lambda: handler.stall(0.8),
        ]
        if kind >= len(faults) or (kind == 7 and number % 4):
            return False
        faults[kind]()
        return True

    return misbehave
