"""HTTP servers on loopback that translate by a rule and misbehave on demand."""

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
    """The servers' translation: every word with the language in front."""
    return " ".join(f"{target}{word}" for word in text.split(" "))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self):
        split = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
        if split.path.endswith("/languages"):
            codes = ({"code": code} for code in ("en", "de", "zh-Hans"))
            self.send(200, json.dumps(list(codes)).encode())
            return
        text = query["q"][0]
        page = (
            "<html><head><title>Translate</title></head><body>"
            f'<div class="result-container">{html.escape(translated(text, query["tl"][0]))}</div>'
            "</body></html>"
        )
        self.answer([text], page.encode(), "text/html", query)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = [translated(text, request["target"]) for text in request["q"]]
        body = json.dumps({"translatedText": answers}).encode()
        self.answer(request["q"], body, "application/json", request)

    def answer(self, texts, body, kind, request):
        loopback = self.server.loopback
        with loopback.lock:
            loopback.requested += texts
            loopback.num_pending += 1
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
                loopback.num_pending -= 1

    def send(self, status, body, kind="application/json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def half_send(self, body, kind, with_length):
        """Sends two thirds of the answer and closes the connection."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if with_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: len(body) * 2 // 3])
        self.close_connection = True

    def hang_up(self):
        """Closes the connection without an answer."""
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format, *args):
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Ignores clients that were killed."""


class Loopback:
    """A server that runs during the `with` block.

    Attributes:
        kind: `google` or `libre`.
        url: its address.
        fault: None, or a function of the handler, the proper answer and the texts that answers
            wrongly, or returns False to let the proper answer be sent.
        delay_seconds: time before an answer.
        requested: every text requested, in order, with repetitions.
        agents: the User-Agents.
        last_request: query or JSON body of the last request.
    """

    def __init__(self, kind):
        self.kind = kind
        self.fault = None
        self.delay_seconds = 0.0
        self.requested = []
        self.agents = set()
        self.last_request = None
        self.num_pending = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.loopback = self
        path = "/m" if kind == "google" else ""
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{path}"

    def settle(self):
        """Waits until the requests of a client that died are answered."""
        time.sleep(0.02)
        while self.num_pending > 0:
            time.sleep(0.001)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def misbehave_at_random(seed):
    """Returns a fault that goes wrong in one of eight ways, half of the time."""
    choose = random.Random(seed)
    lock = threading.Lock()
    numbers = itertools.count()

    def misbehave(handler, body, texts):
        with lock:
            kind = choose.randrange(16)
            number = next(numbers)
        if any("poison" in text for text in texts):
            kind = 1
        match kind:
            case 0:
                handler.send(429, b"slow down", Retry_After="0" if number % 2 else "1")
            case 1:
                handler.send(500, b"oops")
            case 2:
                handler.send(200, b"", "text/html")
            case 3:
                handler.send(200, CAPTCHA, "text/html")
            case 4:
                handler.half_send(body, "text/html", with_length=True)
            case 5:
                handler.half_send(body, "application/json", with_length=False)
            case 6:
                answers = [translated(text) for text in texts]
                answers = answers[1:] if number % 2 else [*answers, "deone demore"]
                handler.send(200, json.dumps({"translatedText": answers}).encode())
            case 7 if number % 4 == 0:
                time.sleep(0.8)
                handler.close_connection = True
            case _:
                return False
        return True

    return misbehave
