"""What is printed: lines in a pipe, bars on a terminal, and no character that steers it."""

import io
import re

import pytest

from clseave_cli.commands import terminal
from clseave_cli.errors import ClseaveError


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test puts forward."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def test_a_line_tells_metrics_and_one_labelled_clock(clock, capsys):
    with terminal.TerminalProgress().task("align de: epoch 1/2", 1000, "pairs") as task:
        task.advance(0)
        clock.now += 20
        task.advance(100, **{"loss": 0.25, "pairs/s": 5})
        clock.now += 3700
        task.advance(800)
        clock.now += 5
        task.advance(100)  # no line of its own: the last one is too young
        clock.now += 24 * 3600
    assert capsys.readouterr().err.splitlines() == [
        "align de: epoch 1/2: 100/1000 pairs · 0:03:00 left · loss 0.25 · pairs/s 5",
        "align de: epoch 1/2: 900/1000 pairs · 0:06:53 left · loss 0.25 · pairs/s 5",
        "align de: epoch 1/2: 1000/1000 pairs · in 25:02:05 · loss 0.25 · pairs/s 5",
    ]


def test_what_an_earlier_sitting_did_is_not_taken_for_speed(clock, capsys):
    with terminal.TerminalProgress().task("align", 1000, "pairs") as task:
        task.advance(800)
        clock.now += 10
        task.advance(100)
        assert "900/1000 pairs · 0:00:10 left" in capsys.readouterr().err


def test_a_single_item_is_singular(capsys):
    with terminal.TerminalProgress().task("check", unit="texts") as task:
        task.advance(1)
    assert capsys.readouterr().err == "check: 1 text · in 0:00:00\n"


def test_time_left_is_not_guessed(clock, capsys):
    for total in (None, 10):
        with terminal.TerminalProgress().task("reading", total) as task:
            clock.now += 30
            task.advance(5)
    assert "left" not in capsys.readouterr().err


@pytest.fixture
def screen(monkeypatch):
    """What a terminal of 60 columns is sent on stderr, with its control sequences."""
    stream = io.StringIO()
    console = terminal.make_console(stderr=True, file=stream, force_terminal=True, width=60)
    monkeypatch.setattr(terminal, "stderr", lambda: console)
    return stream


def test_a_bar_leaves_one_line_of_finished_work_and_nothing_of_interrupted_work(screen):
    progress = terminal.TerminalProgress()
    with progress.task("features", 3) as task:
        task.advance(3)
    with progress.task("epoch 1/2", 3, "pairs", summary=False) as task:
        task.advance(3)
    with pytest.raises(KeyboardInterrupt), progress.task("epoch 2/2", 3, "pairs"):
        raise KeyboardInterrupt
    # Whatever is written over a line that was erased is no longer there.
    left = re.sub(r"[^\n]*\n?\r?\x1b\[1A\x1b\[2K|[^\n]*\r\x1b\[2K", "", screen.getvalue())
    left = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", left)
    assert "features: 3/3 · in 0:00:00" in left
    assert "epoch" not in left


def test_a_note_breaks_between_words_and_never_in_a_path(screen):
    path = "/a/folder/" + "long/" * 15 + "file"
    terminal.TerminalProgress().note(f"loss 0.1234 · accuracy 0.9876 · saved in {path} · again")
    lines = screen.getvalue().splitlines()
    assert any(path in line for line in lines) and len(lines) == 3
    assert lines[0].split() == ["loss", "0.1234", "·", "accuracy", "0.9876", "·", "saved", "in"]


def test_control_characters_of_data_never_reach_the_terminal(capsys):
    from rich.table import Table

    table = Table("id")
    table.add_row("a\x1b]0;title\x07b")
    terminal.make_console(stderr=False).print(table)
    terminal.TerminalProgress().note("\x1b[31mred\x9b and \u202eback")
    out, err = capsys.readouterr()
    assert r"a\x1b]0;title\x07b" in out
    assert err == "\\x1b[31mred\\x9b and \\u202eback\n"


def test_data_that_spells_an_emoji_stays_text(capsys):
    terminal.say("photos:ok:.jpg")
    assert capsys.readouterr().out == "photos:ok:.jpg\n"


def test_json_holds_no_nan(capsys):
    with pytest.raises(ClseaveError, match="not finite"):
        terminal.print_json({"accuracy": float("nan")})
    assert capsys.readouterr().out == ""
