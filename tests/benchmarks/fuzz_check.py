"""Runs `check` on thousands of invented pages and tables: no traceback, no hang, no escape.

    python tests/benchmarks/fuzz_check.py [--inputs 10000] [--seed 0]

The inputs are HTML, Markdown, CSV, JSONL, JSON and tar files of valid pieces in any order, nasty
strings and noise, then one large input of every pathological kind. An audit hook watches that
nothing outside the folder is opened, except Python's code, and that nothing is connected to. An
input that takes longer than ten seconds of processor time hangs. Prints the numbers of inputs and
the failures.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.prediction.checking.findings import check
from clseave_cli.core.prediction.checking.output import render
from clseave_cli.core.prediction.checking.reading import read_texts
from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT

_HANG_SECONDS = 10
_PIECES = (
    "<img ", "<IMG\n", "alt=", "alt", "src=", "srcset=", "data-src=", ">", "/>", "'", '"',
    "<figure>", "</figure>", "<figcaption>", "</figcaption>", "<picture>", "<source ",
    "<base href=", "<!--", "-->", "<![CDATA[", "<script>", "</script>", "<svg>", "<template>",
    "<html lang=de>", "<meta charset=", "utf-16", "idna", "![", "](", ")", "[x]: ", "`", "```\n",
    "    ", "> ", "- ", "| a |\n|---|\n", "<p>\n", "image,text\n", "image\ttext\n", ",", ";", "\t",
    "\n", "\r\n", "\r", "{", "}", '{"image": "', '", "text": "', '"}\n',
    '{"images": [{"id": 1, "file_name": "', '"}], "annotations": [{"image_id": 1, "caption": "',
    "red.png", "page.html", "A red square.", "image", "&#0;", "&#x110000;", "&lt;", "\0", "\ufeff",
)  # fmt: skip
_PATHS = (
    "../secret.png", "../../../../etc/passwd", "/etc/passwd", "//etc/passwd", "%2e%2e/secret.png",
    "..\\secret.png", "file:///etc/passwd", "FILE:/etc/passwd", "C:\\secret.png", "link.png",
    "dir/secret.png", "http://127.0.0.1:1/a.png", "//127.0.0.1/a", "https://[::1]/a",
    "data:image/png;base64,AAAA", "data:,", "data:;base64,%%%", "/proc/self/mem", "/dev/zero",
    "pipe.png", "http://[", "javascript:1", ".", "x" * 5000,
)  # fmt: skip

#: Makes a path refer to a picture, in every format.
_FRAMES = (
    "%", '<img src="%" alt=x>', "<img srcset='% 2x' alt=x>", "![x](%)", "![x](<%>)", "\n%,x\n",
    '\n{"image": "%", "text": "x"}\n',
)  # fmt: skip


def source(randomness: random.Random) -> bytes:
    """Pieces of all formats in any order, with some noise."""
    parts = []
    for _ in range(randomness.randrange(60)):
        kind = randomness.random()
        if kind < 0.7:
            parts.append(randomness.choice(_PIECES))
        elif kind < 0.9:
            frame = randomness.choice(_FRAMES)
            parts.append(frame.replace("%", randomness.choice(_PATHS), 1))
        else:
            points = (randomness.randrange(0x110000) for _ in range(randomness.randrange(6)))
            parts.append("".join(map(chr, points)))
    if randomness.random() < 0.3:
        parts.insert(0, "image,text\n")
    content = "".join(parts).encode("utf-8", "replace")
    if randomness.random() < 0.1:
        content = randomness.randbytes(20).join([content[:50], content[50:]])
    return content


def tar(randomness: random.Random) -> bytes:
    """A WebDataset with paths of every kind and a few changed bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number in range(randomness.randrange(4)):
            for kind in ("png", "txt", "json"):
                name = randomness.choice(("", "/", "../../", "a/")) + f"{number}.{kind}"
                member = tarfile.TarInfo(name)
                content = source(randomness)[:200]
                member.size = len(content)
                member.type = randomness.choice((tarfile.REGTYPE,) * 8 + (tarfile.SYMTYPE,))
                member.linkname = "/etc/passwd" if member.issym() else ""
                archive.addfile(member, io.BytesIO(content))
    changed = bytearray(stream.getvalue())
    for _ in range(randomness.randrange(4)):
        changed[randomness.randrange(min(len(changed), 2000))] = randomness.randrange(256)
    return bytes(changed)


def watch(folder: Path, events: Counter[str]) -> None:
    """Counts files opened outside the folder, connections and processes."""
    code = tuple({str(Path(path).resolve()) for path in (*sys.path, sys.prefix, sys.base_prefix)})

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
            events[f"{event} {arguments[-1]}"] += 1
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = Path(os.fsdecode(arguments[0])).resolve()
            if not path.is_relative_to(folder) and not str(path).startswith(code):
                events[f"open {path}"] += 1

    sys.addaudithook(hook)


def attempt(path: Path) -> str:
    """Checks a file, renders every format and reads every picture; returns the failure, if any."""
    start = time.process_time()
    faulthandler.dump_traceback_later(6 * _HANG_SECONDS, exit=True)
    try:
        result = check([path], CheckConfig(judge=False))
        for format in ("text", "json", "jsonl", "junit", "sarif", "github"):
            render(result, format).encode()
        for text in read_texts([path], CheckConfig(), False, SILENT):
            if text.picture.source is not None:
                with contextlib.suppress(DataError):
                    text.picture.read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - start
    return f"took {seconds:.0f} s" if seconds > _HANG_SECONDS else ""


def large(size: int) -> dict[str, bytes]:
    """Inputs on which a quadratic parser takes for ever."""
    repeated = (
        "<", "<!--", "<!", "<?", "<a ", "<a b='", "</", "</a ", "<a/", "<a b=", "&", "&#",
        "<![CDATA[", '<img alt="', "<div>", "<figure>", "<figure><figcaption>&amp;",
        "<img src=x srcset='a,b 1x'>", "<source srcset=a>", "<script>", "![", "![a](", "[",
        "*a **b ", "> ", "- ", "`", "|", "<p>\n", '"', ",", "{", "[1,", '{"a":', "\r",
        "</figcaption><figcaption>a",
    )  # fmt: skip
    return {piece: (piece * (size // len(piece))).encode() for piece in repeated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=1.0)
    arguments = parser.parse_args()
    randomness = random.Random(arguments.seed)
    failures, tried, events = [], Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "site"
        folder.mkdir()
        for path in (folder / "red.png", folder.parent / "secret.png"):
            Image.new("RGB", (32, 32), "red").save(path)
        (folder / "link.png").symlink_to(folder.parent / "secret.png")
        (folder / "dir").symlink_to(folder.parent)
        watch(folder, events)
        kinds = ("html", "md", "csv", "tsv", "jsonl", "json", "tar")

        def run(kind: str, content: bytes, name: str, group: str) -> None:
            path = folder / f"input.{kind}"
            path.write_bytes(content)
            if problem := attempt(path):
                failures.append(f"{kind} {name}: {problem}")
            tried[group] += 1

        for number in range(arguments.inputs):
            kind = kinds[number % len(kinds)]
            content = tar(randomness) if kind == "tar" else source(randomness)
            run(kind, content, str(number), kind)
        for piece, content in large(int(1e6 * arguments.megabytes)).items():
            for kind in ("html", "md", "csv", "jsonl", "json"):
                run(kind, content, f"of {piece!r}", f"large {kind}")
        outside = dict(events)  # before the folder itself is removed
    print(json.dumps({"tried": tried, "outside": outside, "failures": failures}, indent=1))


if __name__ == "__main__":
    main()
