"""Progress where there is no terminal: plain lines."""

import pytest

from clseave_cli.commands import terminal


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


def test_a_line_tells_figures_and_time_left(clock, capsys):
    with terminal.TerminalProgress().task("align de: epoch 1/2", 1000, "pairs") as task:
        task.advance(0)
        clock.now += 20
        task.advance(100, **{"loss": 0.25, "pairs/s": 5})
        clock.now += 3700
        task.advance(800)
        clock.now += 5
        task.advance(100)  # no line of its own: the last one is too young
    assert capsys.readouterr().err.splitlines() == [
        "align de: epoch 1/2: 100/1000 pairs · 0:00:20 · 0:03:00 left · loss 0.25 · pairs/s 5",
        "align de: epoch 1/2: 900/1000 pairs · 1:02:00 · 0:06:53 left · loss 0.25 · pairs/s 5",
        "align de: epoch 1/2: 1000/1000 pairs · 1:02:05 · loss 0.25 · pairs/s 5",
    ]


def test_what_an_earlier_sitting_did_is_not_taken_for_speed(clock, capsys):
    with terminal.TerminalProgress().task("align", 1000, "pairs") as task:
        task.advance(800)
        clock.now += 10
        task.advance(100)
        assert "900/1000 pairs · 0:00:10 · 0:00:10 left" in capsys.readouterr().err


def test_time_left_is_not_guessed(clock, capsys):
    for total in (None, 10):
        with terminal.TerminalProgress().task("reading", total) as task:
            clock.now += 30
            task.advance(5)
    assert "left" not in capsys.readouterr().err
