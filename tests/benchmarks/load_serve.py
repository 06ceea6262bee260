"""Does `clseave serve` stay up, fast and small under many good and bad requests at once?

    python tests/benchmarks/load_serve.py --runs DIR [--minutes 1] [--clients 200] [--idle 1300]

Starts `clseave serve` on models or on an exported folder. Many clients send good requests and every
kind of bad ones: damaged and oversized uploads, decompression bombs, half-closed and broken
connections. Other connections stay idle; the server may have 1,024 descriptors. Prints the answers
to each kind, the latencies of good requests and the server's memory. The exit status is 1 if an
answer was not the intended one.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_world import png

_BOUNDARY = "clseave-load"
_NO_ANSWER = 0
_MEGABYTE = 1_000_000
#: Requests that break off: bytes sent, how they end, and allowed answers.
_BROKEN: dict[str, tuple[int | None, str, set[int]]] = {
    "half-closed after the request": (None, "eof", {200, _NO_ANSWER}),
    "half-closed within the request": (4000, "eof", {400, _NO_ANSWER}),
    "broken off": (4000, "reset", {_NO_ANSWER}),
}


def multipart(image: bytes | None, **fields: str) -> bytes:
    """A form with an image and text fields."""
    head = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    if image is not None:
        parts += [f'{head}"image"; filename="i"\r\n\r\n'.encode(), image, b"\r\n"]
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()


def request(
    body: bytes, *, length: int | None = None, chunked: bool = False, host: str = "localhost"
) -> bytes:
    """The bytes of one POST to /predict."""
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length or len(body)}"
    head = (
        f"POST /predict HTTP/1.1\r\nHost: {host}\r\n{size}\r\nConnection: close\r\n"
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n\r\n"
    )
    return head.encode() + (b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)


def photo(seed: int, size: tuple[int, int] = (640, 480)) -> bytes:
    """A JPEG of soft random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


class Load:
    """The requests and their answers."""

    def __init__(self, port: int, lang: str, seed: int) -> None:
        self._port = port
        self._random = random.Random(seed)
        self.answers: dict[str, Counter[int]] = defaultdict(Counter)
        self.seconds: list[float] = []
        self.unexpected: list[str] = []
        photos = [photo(number) for number in range(40)]
        text = {"hypothesis": "A dog runs through the park.", "lang": lang}
        flat = png(8000, 4000, bytes(1) * (24001 * 4000))  # 32 megapixels in 93 kB: allowed
        oversized = multipart(bytes(12 * _MEGABYTE), **text)
        webp = io.BytesIO()
        Image.new("RGB", (8000, 5000)).save(webp, "WEBP", quality=0)

        def ask(image: bytes | None = photos[0], **fields: str) -> bytes:
            return request(multipart(image, **text | fields))

        self._fixed = {
            "damaged image": (ask(photos[0][: len(photos[0]) // 2]), {400}),
            "no image": (ask(b"hello"), {400}),
            "bomb, 3600 megapixels": (ask(png(60_000, 60_000, bytes(_MEGABYTE))), {413}),
            "bomb, 60 megapixels": (ask(png(10_000, 6_000, bytes(_MEGABYTE))), {413}),
            "20,000 × 1 pixels": (ask(png(20_000, 1, bytes(60_001))), {400}),
            "40 megapixels in WebP": (ask(webp.getvalue()), {200}),
            "32 megapixels in 93 kB": (ask(flat), {200}),
            "empty sentence": (ask(hypothesis=" "), {422}),
            "long sentence": (ask(hypothesis="x" * 5000), {422}),
            "unknown language": (ask(lang="../xx"), {422}),
            "form without image": (ask(None), {422}),
            "form that is none": (request(b"\x00" * 300), {400, 422}),
            "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", {400}),
            "another host": (request(multipart(photos[0], **text), host="evil.example"), {400}),
            "oversized, announced": (request(b"", length=50 * _MEGABYTE), {413}),
            "oversized, chunked": (request(oversized, chunked=True), {413}),
        }
        self._good = [ask(image) for image in photos]
        self._text = text

    async def client(self, until: float) -> None:
        """Sends one request after another."""
        while time.monotonic() < until:
            choice = self._random.random()
            if choice < 0.6:
                await self._timed("good, known photo", self._random.choice(self._good))
            elif choice < 0.7:
                image = photo(self._random.randrange(10**9))
                await self._timed("good, new photo", request(multipart(image, **self._text)))
            elif choice < 0.9:
                name = self._random.choice(list(self._fixed))
                payload, expected = self._fixed[name]
                self._note(name, await self._send(payload), expected)
            else:
                name = self._random.choice(list(_BROKEN))
                length, finish, expected = _BROKEN[name]
                self._note(name, await self._send(self._good[0][:length], finish), expected)

    async def _timed(self, name: str, payload: bytes) -> None:
        begin = time.perf_counter()
        status = await self._send(payload)
        self.seconds.append(time.perf_counter() - begin)
        self._note(name, status, {200})

    async def _send(self, payload: bytes, finish: str = "") -> int:
        """Sends bytes on a new connection; returns the status of the answer, 0 for none."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError as error:
            return -(error.errno or 1)
        try:
            writer.write(payload)
            if finish == "reset":
                await writer.drain()
                writer.transport.abort()
                return _NO_ANSWER
            if finish == "eof":
                writer.write_eof()
            # The server may answer and close before everything is sent.
            head = await asyncio.wait_for(reader.read(12), 120)
            return int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else _NO_ANSWER
        except ConnectionError:
            return _NO_ANSWER
        except TimeoutError:
            return -1
        finally:
            writer.transport.abort()

    def _note(self, name: str, status: int, expected: set[int]) -> None:
        self.answers[name][status] += 1
        # If the server closes while the client still sends, TCP resets the connection, and the
        # answer may be lost.
        if status not in expected and not (name.startswith("oversized") and status == _NO_ANSWER):
            self.unexpected.append(f"{name}: {status}")


async def watch(process: psutil.Process, until: float) -> list[float]:
    """The server's memory in MiB, once a second."""
    mebibytes = []
    while time.monotonic() < until:
        mebibytes.append(process.memory_info().rss / 2**20)
        await asyncio.sleep(1)
    return mebibytes


async def attack(
    port: int, process: psutil.Process, arguments: argparse.Namespace
) -> tuple[Load, list[float]]:
    """Runs all clients for `--minutes`; returns them and the server's memory."""
    load = Load(port, arguments.lang, arguments.seed)
    until = time.monotonic() + 60 * arguments.minutes
    memory = asyncio.create_task(watch(process, until))
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(arguments.idle)]
    await asyncio.gather(*(load.client(until) for _ in range(arguments.clients)))
    for _, writer in idle:
        writer.transport.abort()
    return load, await memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--lang", default="en")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--idle", type=int, default=1300)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    if arguments.minutes > 5:
        parser.error("--minutes: at most 5")
    command = [sys.executable, "-m", "clseave_cli", "serve", "--port", "0"]
    # A full pipe that nobody reads would stop the server.
    with tempfile.TemporaryFile() as stderr:
        server = subprocess.Popen(
            [*command, "--runs", str(arguments.runs)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)),
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            port = int(line.split(" ")[0].rpartition(":")[2])
            process = psutil.Process(server.pid)
            start = process.memory_info().rss / 2**20
            load, memory = asyncio.run(attack(port, process, arguments))
            alive = server.poll() is None
        finally:
            server.terminate()
            server.communicate(timeout=30)
        stderr.seek(0)
        # The demo's models are not calibrated, which is noted once.
        lines = stderr.read().decode().splitlines()
        errors = "\n".join(line for line in lines if "no temperature was fitted" not in line)
    for name, statuses in sorted(load.answers.items()):
        print(f"{name:<34} {json.dumps(dict(sorted(statuses.items())))}")
    cuts = statistics.quantiles(load.seconds, n=100)
    quarters = [part for part in np.array_split(memory, 4) if len(part)]
    print(
        f"good requests: {len(load.seconds)}, {len(load.seconds) / 60 / arguments.minutes:.1f} a "
        f"second · p50 {cuts[49]:.2f} s · p95 {cuts[94]:.2f} s · p99 {cuts[98]:.2f} s\n"
        f"memory: {start:.0f} MiB at the start; median and largest of each quarter of the time: "
        + ", ".join(f"{np.median(part):.0f} and {part.max():.0f}" for part in quarters)
        + f" MiB\nserver still up: {alive} · stderr: {errors.strip()[-300:]!r}"
    )
    for problem, count in Counter(load.unexpected).items():
        print(f"NOT INTENDED: {problem} ({count} times)")
    return 1 if load.unexpected or not alive or errors.strip() else 0


if __name__ == "__main__":
    sys.exit(main())
