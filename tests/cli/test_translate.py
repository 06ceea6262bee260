"""`clseave translate` as the user meets it: output, streams and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "translation"))
from loopback import Loopback, translated

# The command by itself, with the error handling of `main`.
_COMMAND = """
import sys
sys.modules["lingua"] = None
import typer
from clseave_cli.commands import options, translate
from clseave_cli.core.config import TranslateConfig
from clseave_cli.errors import ClseaveError
app = typer.Typer(pretty_exceptions_enable=False)
app.command("translate")(options.command(TranslateConfig, translate.run))
try:
    app()
except ClseaveError as error:
    print(f"clseave: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def _start(data: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CLSEAVE_CACHE": str(data / "cache"),
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=data,
    )  # fmt: skip


def _run(data: Path, *arguments: str) -> tuple[int, str, str]:
    with _start(data, *arguments) as process:
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    rows = [{"pairID": str(i), "sentence2": f"A man sees {i} dogs."} for i in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "snli_ve_dev.jsonl").write_text(lines)
    return tmp_path


def test_translates_and_tells_what_it_did(data: Path) -> None:
    with Loopback("google") as server:
        google = ("--engine", "google", "--url", server.url, "--requests-per-second", "1000")
        code, out, err = _run(data, "--lang", "de", *google, "--review", "3")
        assert code == 0, err
        line = out.splitlines()
        assert len(line) == 1 and line[0].startswith("data/snli_ve_dev.de.jsonl: 30 rows · 30 tran")
        assert "data/snli_ve_dev.de.review.md" in line[0]
        assert "no contract and no guarantee" in err and "30/30 texts" in err
        code, out, err = _run(data, "--lang", "de", *google, "--json")
        document = json.loads(out)
    assert code == 0 and document["engine"] == "google" and document["stopped"] is None
    assert document["files"][0]["num_from_memory"] == 30
    rows = (data / "data" / "snli_ve_dev.de.jsonl").read_text().splitlines()
    assert json.loads(rows[7])["sentence2"] == translated("A man sees 7 dogs.")


def test_suspect_rows_are_counted_in_the_summary(data: Path) -> None:
    with Loopback("google") as server:
        server.fault = lambda handler, body, texts: (
            handler.send(200, body.replace(b" de7 ", b" ").replace(b" de8 ", b" "), "text/html")
            is None
        )
        google = ("--engine", "google", "--url", server.url, "--requests-per-second", "1000")
        code, out, err = _run(data, "--lang", "de", *google)
    assert code == 0, err
    assert "30 rows · 30 translated · 2 suspect (numerals 2)" in out
    rows = (data / "data" / "snli_ve_dev.de.jsonl").read_text().splitlines()
    assert sum("translation_suspect" in row for row in rows) == 2


def test_a_dead_server_is_one_line_and_no_file(data: Path) -> None:
    output = data / "data" / "snli_ve_dev.de.jsonl"
    libre = ("--engine", "libre", "--url", "http://127.0.0.1:9")
    code, out, err = _run(data, "--lang", "de", *libre)
    assert code == 1 and not output.exists()
    assert out.startswith(
        "data/snli_ve_dev.de.jsonl: not written, because no row is translated · 30"
    )
    assert "clseave: stopped: http://127.0.0.1:9/languages: cannot be reached; is the" in err
    output.write_text("mine\n")
    code, out, err = _run(data, "--lang", "de", *libre)
    assert (code, out) == (1, "") and "exists already" in err and "--overwrite" in err
    assert output.read_text() == "mine\n"


def test_failures_are_in_the_exit_code(data: Path) -> None:
    with Loopback("google") as server:
        server.fault = lambda handler, body, texts: (
            "7" in texts[0] and handler.send(413, b"") is None
        )
        code, out, err = _run(
            data, "--lang", "de", "--engine", "google", "--url", server.url,
            "--requests-per-second", "1000",
        )  # fmt: skip
    assert code == 1
    assert "27 translated · 3 failed" in out
    assert err.splitlines()[-1].startswith(
        "clseave: 3 rows could not be translated; data/snli_ve_dev.de.failed.jsonl says why."
    )
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--lang", "de", "--engine", "babel"), 2, "no such engine; there are: nmt, google"),
        (("--lang", "de", "--on-suspect", "laugh"), 2, "--on-suspect"),
        (("--lang", "de", "--model", "./nowhere"), 1, "./nowhere: no such model folder"),
    ],
)
def test_refusals(data: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    returned, out, err = _run(data, *arguments)
    assert (returned, out) == (code, "")
    assert said in err and "Traceback" not in err


def test_ctrl_c_saves_what_there_is(data: Path) -> None:
    with Loopback("google") as server:
        server.delay_seconds = 0.1
        google = ("--engine", "google", "--url", server.url, "--concurrency", "2")
        with _start(data, "--lang", "de", *google) as process:
            while len(server.requested) < 6:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "interrupted; " in err and "Run the same command again to go on." in err
        server.delay_seconds = 0.0
        code, _, err = _run(data, "--lang", "de", *google, "--requests-per-second", "1000")
        assert code == 0, err
        assert len(server.requested) == 30  # those under way at Ctrl-C were waited for
