"""Pace and patience, with engines that fail as they are told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.driver import Driver, Pace
from clseave_cli.core.translation.engine import (
    Fault,
    Identity,
    Limits,
    Refusal,
    Rejection,
    Unreachable,
)
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.errors import Interrupted, TranslationError
from clseave_cli.progress import SILENT


class FakeEngine:
    """Translates by upper-casing; `misbehave` may raise, or return something else, first."""

    licence = "none"
    identity = Identity("fake", "", "", "", "en", "de")

    def __init__(self, batch_size: int = 1, concurrency: int = 1) -> None:
        self.limits = Limits(batch_size, 10_000, 1_000, concurrency)
        self.calls: list[tuple[str, ...]] = []
        self.attempts: list[int] = []
        self.misbehave: Callable[[int, Sequence[str]], list[str] | None] = lambda call, texts: None
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def translate(self, texts: Sequence[str], attempt: int) -> list[str]:
        with self._lock:
            number = len(self.calls)
            self.calls.append(tuple(texts))
            self.attempts.append(attempt)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            answer = self.misbehave(number, texts)
            return [text.upper() for text in texts] if answer is None else answer
        finally:
            with self._lock:
                self.under_way -= 1

    def close(self) -> None:
        pass


def _fails(
    error: Exception, when: Callable[[int, Sequence[str]], bool] = lambda call, texts: True
) -> Callable[[int, Sequence[str]], None]:
    """Raises an error in the calls it is to fail in."""

    def misbehave(call: int, texts: Sequence[str]) -> None:
        if when(call, texts):
            raise error

    return misbehave


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory(tmp_path / "memory.sqlite") as opened:
        yield opened


def _drive(
    engine: FakeEngine,
    memory: Memory,
    texts: Sequence[str],
    *,
    retries: int = 2,
    per_second: float | None = None,
    retry_suspect: bool = False,
) -> tuple[Driver, Pace, dict[str, str], dict[str, str]]:
    """Drives; returns driver and pace, what the memory holds, and why the rest is missing."""
    number = memory.identity_id(engine.identity)
    config = TranslateConfig(
        requests_per_second=per_second, retries=retries, retry_seconds=0.001,
        on_suspect="retry" if retry_suspect else "keep",
    )  # fmt: skip
    pace = Pace(config, engine.limits)
    driver = Driver(config, engine, memory, pace)
    with SILENT.task("") as task:
        driver.run(dict.fromkeys(texts, 0), task)
    held = {text: entry.translation for text, entry in memory.find(number, texts).items()}
    return driver, pace, held, driver.failures


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (1, 4), (7, 1), (7, 3)])
def test_translates_everything_once(memory: Memory, batch_size: int, concurrency: int) -> None:
    texts = [f"text {'x' * (index % 7)} {index}" for index in range(200)]
    engine = FakeEngine(batch_size, concurrency)
    driver, pace, held, reasons = _drive(engine, memory, [*texts, *texts])
    assert held == {text: text.upper() for text in texts} and not reasons
    assert sorted(text for call in engine.calls for text in call) == sorted(texts)
    assert max(map(len, engine.calls)) <= batch_size
    assert engine.most_under_way <= concurrency
    assert (driver.num_translated, len(driver.failures), pace.stopped) == (200, 0, None)


def test_batches_hold_texts_of_like_length(memory: Memory) -> None:
    texts = [f"a {'b' * (index * 37 % 100)} {index}" for index in range(100)]
    engine = FakeEngine(batch_size=10)
    _drive(engine, memory, texts)
    lengths = [len(text) for call in sorted(engine.calls, key=lambda c: len(c[0])) for text in call]
    assert lengths == sorted(lengths)


def test_what_another_process_translated_meanwhile_is_not_asked_for(
    memory: Memory, tmp_path: Path
) -> None:
    engine = FakeEngine(batch_size=2)
    texts = [f"text {index}" for index in range(20)]
    number = memory.identity_id(engine.identity)

    def misbehave(call: int, asked: Sequence[str]) -> None:
        if not call:
            rest = [text for text in texts if text not in asked]
            with Memory(tmp_path / "memory.sqlite") as other:
                other.identity_id(engine.identity)
                other.store(number, [(text, Entry("OTHER", 1, "1", ())) for text in rest])

    engine.misbehave = misbehave
    _, _, held, _ = _drive(engine, memory, texts)
    assert len(held) == 20 and len(engine.calls) <= 2  # the first, and one that was prepared


@pytest.mark.parametrize("answer", ["", "  ", "half a \ud800 pair"])
def test_answers_that_no_reader_takes_are_never_kept(memory: Memory, answer: str) -> None:
    engine = FakeEngine(batch_size=3)
    texts = ["never", "second time", "A man.\n42", "fine"]

    def misbehave(call: int, asked: Sequence[str]) -> list[str]:
        bad = {"never": 2, "second time": 1, "A man.": 2}
        return [
            answer if engine.attempts[call] < bad.get(text, 0) else text.upper() for text in asked
        ]

    engine.misbehave = misbehave
    _, pace, held, reasons = _drive(engine, memory, texts)
    assert held == {"second time": "SECOND TIME", "fine": "FINE"}
    assert reasons == dict.fromkeys(["never", "A man.\n42"], "fake: an empty or invalid answer")
    assert pace.stopped is None


def test_a_fault_is_asked_again_and_then_given_up(memory: Memory) -> None:
    engine = FakeEngine()
    engine.misbehave = _fails(
        Fault("HTTP 500"), lambda call, texts: texts[0] == "never" or call in (0, 2)
    )
    driver, pace, held, reasons = _drive(engine, memory, ["one", "two", "never", "three"])
    assert held == {"one": "ONE", "two": "TWO", "three": "THREE"}
    assert reasons == {"never": "HTTP 500, 3 times"}
    assert engine.calls.count(("never",)) == 3
    assert (driver.num_translated, len(driver.failures)) == (3, 1)
    assert pace.num_requests == len(engine.calls)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda texts: [text.upper() for text in texts][:-1],
        lambda texts: [text.upper() for text in texts] + ["MORE"],
        lambda texts: [],
    ],
)
def test_wrong_counts_misalign_nothing(
    memory: Memory, spoil: Callable[[Sequence[str]], list[str]]
) -> None:
    engine = FakeEngine(batch_size=5)
    engine.misbehave = lambda call, texts: spoil(texts) if len(texts) > 1 else None
    texts = [f"text {index}" for index in range(23)]
    _, _, held, _ = _drive(engine, memory, texts, retries=1)
    assert held == {text: text.upper() for text in texts}


def test_one_rejected_text_does_not_spoil_its_batch(memory: Memory) -> None:
    engine = FakeEngine(batch_size=8)
    engine.misbehave = _fails(Rejection("HTTP 413"), lambda call, texts: "bad" in texts)
    _, _, held, reasons = _drive(engine, memory, ["a", "b", "bad", "c"])
    assert held == {"a": "A", "b": "B", "c": "C"}
    assert reasons == {"bad": "HTTP 413"}
    assert engine.calls.count(("bad",)) == 1  # asking again would not help


def test_stops_when_the_service_shuts_us_out(memory: Memory) -> None:
    engine = FakeEngine(concurrency=2)
    engine.misbehave = _fails(Refusal("HTTP 429"), lambda call, texts: call >= 10)
    texts = [f"text {index}" for index in range(500)]
    _, pace, held, reasons = _drive(engine, memory, texts)
    assert pace.stopped == "the service has evidently shut us out (HTTP 429)"
    assert len(held) == 10 and len(engine.calls) < 40
    assert not reasons  # none of them is to blame


@pytest.mark.parametrize("num_answers", [0, 10])
def test_a_server_that_is_not_there_is_called_so(memory: Memory, num_answers: int) -> None:
    engine = FakeEngine(concurrency=2)
    unreachable = Unreachable("http://x: cannot be reached")
    engine.misbehave = _fails(unreachable, lambda call, texts: call >= num_answers)
    _, pace, held, _ = _drive(engine, memory, [f"text {index}" for index in range(100)])
    assert pace.stopped == "http://x: cannot be reached" and len(held) == num_answers
    # It may come back once it has been seen, and is waited for; else the first try decides.
    assert (len(engine.calls) <= 2) == (not num_answers)


def test_refusals_between_answers_are_waited_out(memory: Memory) -> None:
    engine = FakeEngine(concurrency=2)
    tries: Counter[str] = Counter()  # by text, so that no chance in the order of two workers counts

    def misbehave(call: int, texts: Sequence[str]) -> None:
        tries[texts[0]] += 1
        if tries[texts[0]] < 3:
            raise Refusal("HTTP 429", retry_after=0.001)

    engine.misbehave = misbehave
    texts = [f"text {index}" for index in range(30)]
    _, pace, held, _ = _drive(engine, memory, texts, retries=0)
    assert len(held) == 30 and pace.stopped is None


def test_a_text_that_is_always_refused_is_given_up(memory: Memory) -> None:
    engine = FakeEngine(concurrency=2)

    def misbehave(call: int, texts: Sequence[str]) -> None:
        if texts[0] == "bad":
            raise Refusal("HTTP 403")
        time.sleep(0.002)

    engine.misbehave = misbehave
    texts = ["bad", *(f"text {index}" for index in range(200))]
    _, _, held, reasons = _drive(engine, memory, texts)
    assert len(held) == 200
    assert "HTTP 403" in reasons["bad"]


def test_a_long_wait_asked_for_ends_the_run(memory: Memory) -> None:
    engine = FakeEngine()
    engine.misbehave = _fails(Refusal("HTTP 429", retry_after=7200))
    _, pace, held, _ = _drive(engine, memory, ["a", "b"])
    assert pace.stopped == "HTTP 429; it asks to wait 7200 s"
    assert len(engine.calls) == 1 and not held


def test_stops_when_every_text_fails(memory: Memory) -> None:
    engine = FakeEngine()
    engine.misbehave = _fails(Fault("HTTP 503"))
    texts = [f"text {index}" for index in range(100)]
    driver, pace, _, reasons = _drive(engine, memory, texts, retries=0)
    assert pace.stopped is not None and "fails on every text" in pace.stopped
    assert len(driver.failures) < 20
    assert list(reasons.values()) == ["HTTP 503, 1 times"] * len(driver.failures)


def test_retry_after_and_rate_are_kept(memory: Memory) -> None:
    engine = FakeEngine(concurrency=4)
    times: list[float] = []

    def misbehave(call: int, texts: Sequence[str]) -> None:
        times.append(time.monotonic())
        if call == 0:
            raise Refusal("HTTP 429", retry_after=0.3)

    engine.misbehave = misbehave
    _drive(engine, memory, [f"text {index}" for index in range(12)], per_second=50)
    # Requests already timed when the refusal came may follow at once; then all wait, and have a
    # fiftieth of a second each. A busy machine makes them late, never early.
    waited = [moment - times[0] for moment in sorted(times)[4:]]
    assert len(waited) == 9
    assert all(moment > 0.299 + 0.02 * turn for turn, moment in enumerate(waited))


def test_suspect_answers_get_a_second_chance_once(memory: Memory) -> None:
    engine = FakeEngine(batch_size=4)
    answers = {
        "A dog sees 3 men.": ["Ein Hund sieht Männer.", "Ein Hund sieht 3 Männer."],
        "A dog sees 4 men.": ["Ein Hund sieht Männer.", "Ein Hund."],
        "A man.": ["Ein Mann.", "never asked"],
    }
    engine.misbehave = lambda call, texts: [answers[text][engine.attempts[call]] for text in texts]
    _, _, held, _ = _drive(engine, memory, list(answers), retry_suspect=True)
    assert held["A dog sees 3 men."] == "Ein Hund sieht 3 Männer."
    assert held["A dog sees 4 men."] == "Ein Hund sieht Männer."  # the second was no better
    assert held["A man."] == "Ein Mann."
    entries = memory.find(1, answers)
    assert [entries[text].attempts for text in answers] == [2, 2, 1]
    assert entries["A dog sees 3 men."].suspicions == ()
    assert entries["A dog sees 4 men."].suspicions == ("numerals",)


def test_ctrl_c_keeps_what_was_answered(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(concurrency=2)
    keep = Driver._keep
    pressed: list[bool] = []

    def interrupted(self: Driver, *rest: object) -> None:
        keep(self, *rest)  # type: ignore[arg-type]
        if self.num_translated >= 20 and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Driver, "_keep", interrupted)
    texts = [f"text {index}" for index in range(1000)]
    with pytest.raises(Interrupted, match=r"new translations are in the memory.*to go on"):
        _drive(engine, memory, texts)
    held = memory.find(memory.identity_id(engine.identity), texts)
    assert 20 <= len(held) < 1000
    assert {text for call in engine.calls for text in call} - set(held) == set()


def test_a_broken_engine_ends_the_run_with_its_name(memory: Memory) -> None:
    engine = FakeEngine()
    engine.misbehave = _fails(ZeroDivisionError("division by zero"))
    with pytest.raises(TranslationError, match="engine fake: ZeroDivisionError: division by zero"):
        _drive(engine, memory, ["a"])


def test_long_and_broken_texts_are_asked_in_parts(memory: Memory) -> None:
    engine = FakeEngine(batch_size=3)
    long = "One two three. " * 400  # 6,000 characters
    texts = ["first\nsecond", "nul\0inside", long, "sur\ud800rogate", "plain"]
    _, _, held, _ = _drive(engine, memory, texts)
    assert held == {
        "first\nsecond": "FIRST\nSECOND",
        "nul\0inside": "NUL\0INSIDE",
        long: long.upper(),
        "sur\ud800rogate": "SUR�ROGATE",
        "plain": "PLAIN",
    }
    assert all(sum(map(len, call)) <= 10_000 for call in engine.calls)
