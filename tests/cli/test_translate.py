"""`clseave translate` as the user meets it: output, streams and exit codes."""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from tiny_world import CommandProcess, read_jsonl, write_jsonl

sys.path.insert(0, str(Path(__file__).parents[1] / "translation"))
from loopback import Loopback, translated

OUTPUT = Path("data", "snli_ve_dev.de.jsonl")
GERMAN = ("translate", "--lang", "de")


@pytest.fixture
def server():
    with Loopback("google") as server:
        yield server


@pytest.fixture
def google(server):
    """The command with the engine that `server` answers."""
    return (*GERMAN, "--engine", "google", "--url", server.url, "--requests-per-second", "1000")


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Thirty English rows in the working directory's data folder."""
    (tmp_path / "data").mkdir()
    rows = [{"pairID": str(i), "sentence2": f"A man sees {i} dogs."} for i in range(30)]
    write_jsonl(tmp_path / "data" / "snli_ve_dev.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lingua", None)
    monkeypatch.setenv("COLUMNS", "200")


def test_translates_and_tells_what_it_did(google, server, clseave):
    server.fault = lambda handler, body, texts: (
        handler.send(200, body.replace(b" de7 ", b" ").replace(b" de8 ", b" "), "text/html") is None
    )
    code, out, err = clseave(*google, "--review", "3")
    assert code == 0, err
    summary = f"{OUTPUT}: 30 rows · 30 translated · 2 suspect (numerals 2)"
    assert len(out.splitlines()) == 1 and out.startswith(summary)
    assert sum("translation_suspect" in row for row in read_jsonl(OUTPUT)) == 2
    assert "data/snli_ve_dev.de.review.md" in out
    assert "no contract and no guarantee" in err and "30/30 texts" in err
    code, out, err = clseave(*google, "--json")
    document = json.loads(out)
    assert code == 0 and document["engine"] == "google" and document["stopped"] is None
    assert document["files"][0]["num_from_memory"] == 30
    assert read_jsonl(OUTPUT)[6]["sentence2"] == translated("A man sees 6 dogs.")


def test_a_dead_server_is_one_line_and_no_file(clseave, refused):
    libre = (*GERMAN, "--engine", "libre", "--url", "http://127.0.0.1:9")
    code, out, err = clseave(*libre)
    assert code == 1 and not OUTPUT.exists()
    assert out.startswith(f"{OUTPUT}: not written, because no row is translated · 30")
    assert "clseave: stopped: http://127.0.0.1:9/languages: cannot be reached; is the" in err
    OUTPUT.write_text("mine\n")
    error = refused(*libre)
    assert "exists already" in error and "--overwrite" in error
    assert OUTPUT.read_text() == "mine\n"


def test_failures_are_in_the_exit_code(google, server, clseave):
    server.fault = lambda handler, body, texts: "7" in texts[0] and handler.send(413, b"") is None
    code, out, err = clseave(*google)
    assert code == 1 and "27 translated · 3 failed" in out and "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        "clseave: 3 rows could not be translated; data/snli_ve_dev.de.failed.jsonl says why."
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--engine", "babel"), 2, "no such engine; choose from nmt, google"),
        (("--on-suspect", "laugh"), 2, "--on-suspect"),
        (("--model", "./nowhere"), 1, "./nowhere: no such model folder"),
    ],
)
def test_refusals(refused, arguments, code, message):
    assert message in refused(*GERMAN, *arguments, code=code)


def test_ctrl_c_saves_what_there_is(google, server, clseave, tmp_path):
    server.delay_seconds = 0.1
    chdir = functools.partial(os.chdir, tmp_path)
    command = (*google, "--concurrency", "2")
    process = CommandProcess(*command, folder=tmp_path / "outputs", before=chdir)
    process.wait_until(lambda: len(server.requested) >= 6)
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert "interrupted; " in process.stderr
    assert "Run the same command again to continue." in process.stderr
    server.delay_seconds = 0.0
    code, _, err = clseave(*google)
    assert code == 0, err
    assert len(server.requested) == 30  # those under way at Ctrl-C were waited for
