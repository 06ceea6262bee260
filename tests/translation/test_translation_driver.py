"""Pace and patience, with engines that fail as they are told."""

import re
import threading
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.driver import Driver, Pace, segments
from clseave_cli.core.translation.engine import (
    Fault,
    Identity,
    Limits,
    Refusal,
    Rejection,
    Unreachable,
)
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.quality import Checks, needs_translation
from clseave_cli.errors import Interrupted, TranslationError
from clseave_cli.progress import SILENT


class FakeEngine:
    """Translates by upper-casing; `misbehave` may raise, or return something else, first."""

    licence = "none"
    identity = Identity("fake", "", "", "", "en", "de")

    def __init__(self, misbehave=lambda call, texts: None, batch_size=1, concurrency=1):
        self.limits = Limits(batch_size, 10_000, 1_000, concurrency)
        self.misbehave = misbehave
        self.calls, self.attempts = [], []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def translate(self, texts, attempt):
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

    def close(self):
        pass


def _fails(error, when=lambda call, texts: True):
    """Raises an error in the calls it is to fail in."""

    def misbehave(call, texts):
        if when(call, texts):
            raise error

    return misbehave


@pytest.fixture
def memory(tmp_path):
    with Memory(tmp_path / "memory.sqlite") as opened:
        yield opened


def _drive(engine, memory, texts, *, retries=2, per_second=None, retry_suspect=False):
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


def _texts(count):
    return [f"text {index}" for index in range(count)]


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (1, 4), (7, 1), (7, 3)])
def test_translates_everything_once(memory, batch_size, concurrency):
    texts = [f"text {'x' * (index % 7)} {index}" for index in range(200)]
    engine = FakeEngine(batch_size=batch_size, concurrency=concurrency)
    driver, pace, held, reasons = _drive(engine, memory, [*texts, *texts])
    assert held == {text: text.upper() for text in texts} and not reasons
    assert sorted(text for call in engine.calls for text in call) == sorted(texts)
    assert max(map(len, engine.calls)) <= batch_size
    assert engine.most_under_way <= concurrency
    assert (driver.num_translated, pace.stopped) == (200, None)


def test_batches_hold_texts_of_like_length(memory):
    engine = FakeEngine(batch_size=10)
    _drive(engine, memory, [f"a {'b' * (index * 37 % 100)} {index}" for index in range(100)])
    lengths = [len(text) for call in sorted(engine.calls, key=lambda c: len(c[0])) for text in call]
    assert lengths == sorted(lengths)


def test_what_another_process_translated_meanwhile_is_not_asked_for(memory, tmp_path):
    texts = _texts(20)
    number = memory.identity_id(FakeEngine.identity)

    def misbehave(call, asked):
        if not call:
            rest = [text for text in texts if text not in asked]
            with Memory(tmp_path / "memory.sqlite") as other:
                other.identity_id(engine.identity)
                other.store(number, [(text, Entry("OTHER", 1, "1", ())) for text in rest])

    engine = FakeEngine(misbehave, batch_size=2)
    _, _, held, _ = _drive(engine, memory, texts)
    assert len(held) == 20 and len(engine.calls) <= 2  # the first, and one that was prepared


@pytest.mark.parametrize("answer", ["", "  ", "half a \ud800 pair"])
def test_answers_that_no_reader_takes_are_never_kept(memory, answer):
    bad = {"never": 2, "second time": 1, "A man.": 2}  # attempts that go wrong

    def misbehave(call, asked):
        attempt = engine.attempts[call]
        return [answer if attempt < bad.get(text, 0) else text.upper() for text in asked]

    engine = FakeEngine(misbehave, batch_size=3)
    _, pace, held, reasons = _drive(engine, memory, ["never", "second time", "A man.\n42", "fine"])
    assert held == {"second time": "SECOND TIME", "fine": "FINE"}
    assert reasons == dict.fromkeys(["never", "A man.\n42"], "fake: an empty or invalid answer")
    assert pace.stopped is None


def test_a_fault_is_asked_again_and_then_given_up(memory):
    engine = FakeEngine(
        _fails(Fault("HTTP 500"), lambda call, texts: texts[0] == "never" or call in (0, 2))
    )
    driver, pace, held, reasons = _drive(engine, memory, ["one", "two", "never", "three"])
    assert held == {"one": "ONE", "two": "TWO", "three": "THREE"}
    assert reasons == {"never": "HTTP 500, 3 times"}
    assert engine.calls.count(("never",)) == driver.num_translated == 3
    assert pace.num_requests == len(engine.calls)


@pytest.mark.parametrize("spoil", [lambda a: a[:-1], lambda a: [*a, "MORE"], lambda a: []])
def test_wrong_counts_misalign_nothing(memory, spoil):
    def misbehave(call, texts):
        return spoil([text.upper() for text in texts]) if len(texts) > 1 else None

    texts = _texts(23)
    _, _, held, _ = _drive(FakeEngine(misbehave, batch_size=5), memory, texts, retries=1)
    assert held == {text: text.upper() for text in texts}


def test_one_rejected_text_does_not_spoil_its_batch(memory):
    engine = FakeEngine(
        _fails(Rejection("HTTP 413"), lambda call, texts: "bad" in texts), batch_size=8
    )
    _, _, held, reasons = _drive(engine, memory, ["a", "b", "bad", "c"])
    assert held == {"a": "A", "b": "B", "c": "C"}
    assert reasons == {"bad": "HTTP 413"}
    assert engine.calls.count(("bad",)) == 1  # asking again would not help


@pytest.mark.parametrize(
    ("error", "num_answers", "most_calls", "stopped"),
    [
        (Refusal("HTTP 429"), 10, 40, "the service keeps refusing (HTTP 429)"),
        (Refusal("HTTP 429", retry_after=7200), 0, 2, "HTTP 429; it asks to wait 7200 s"),
        # It may come back once it has been seen, and is waited for; else the first try decides.
        (Unreachable("http://x: cannot be reached"), 0, 2, "http://x: cannot be reached"),
        (Unreachable("http://x: cannot be reached"), 10, 40, "http://x: cannot be reached"),
    ],
)
def test_stops_when_the_service_is_gone(memory, error, num_answers, most_calls, stopped):
    engine = FakeEngine(_fails(error, lambda call, texts: call >= num_answers), concurrency=2)
    _, pace, held, reasons = _drive(engine, memory, _texts(500))
    assert pace.stopped == stopped
    assert len(held) == num_answers and len(engine.calls) <= most_calls
    assert not reasons  # no text is to blame


def test_refusals_between_answers_are_waited_out(memory):
    tries = Counter()  # by text, so that no chance in the order of two workers counts

    def misbehave(call, texts):
        tries[texts[0]] += 1
        if tries[texts[0]] < 3:
            raise Refusal("HTTP 429", retry_after=0.001)

    _, pace, held, _ = _drive(FakeEngine(misbehave, concurrency=2), memory, _texts(30), retries=0)
    assert len(held) == 30 and pace.stopped is None


def test_a_text_that_is_always_refused_is_given_up(memory):
    def misbehave(call, texts):
        if texts[0] == "bad":
            raise Refusal("HTTP 403")
        time.sleep(0.002)

    engine = FakeEngine(misbehave, concurrency=2)
    _, _, held, reasons = _drive(engine, memory, ["bad", *_texts(200)])
    assert len(held) == 200
    assert "HTTP 403" in reasons["bad"]


def test_stops_when_every_text_fails(memory):
    engine = FakeEngine(_fails(Fault("HTTP 503")))
    driver, pace, _, reasons = _drive(engine, memory, _texts(100), retries=0)
    assert pace.stopped is not None and "fails on every text" in pace.stopped
    assert len(driver.failures) < 20
    assert list(reasons.values()) == ["HTTP 503, 1 times"] * len(driver.failures)


def test_retry_after_and_rate_are_kept(memory):
    times = []

    def misbehave(call, texts):
        times.append(time.monotonic())
        if call == 0:
            raise Refusal("HTTP 429", retry_after=0.3)

    _drive(FakeEngine(misbehave, concurrency=4), memory, _texts(12), per_second=50)
    # Requests already timed when the refusal came may follow at once; then all wait, and have a
    # fiftieth of a second each. A busy machine makes them late, never early.
    waited = [moment - times[0] for moment in sorted(times)[4:]]
    assert len(waited) == 9
    assert all(moment > 0.299 + 0.02 * turn for turn, moment in enumerate(waited))


def test_suspect_answers_get_a_second_chance_once(memory):
    answers = {
        "A dog sees 3 men.": ["Ein Hund sieht Männer.", "Ein Hund sieht 3 Männer."],
        "A dog sees 4 men.": ["Ein Hund sieht Männer.", "Ein Hund."],
        "A man.": ["Ein Mann.", "never asked"],
    }
    engine = FakeEngine(
        lambda call, texts: [answers[text][engine.attempts[call]] for text in texts], batch_size=4
    )
    _drive(engine, memory, list(answers), retry_suspect=True)
    entries = memory.find(1, answers)
    assert [entries[text] for text in answers] == [
        Entry("Ein Hund sieht 3 Männer.", 2, Checks("en", "de").version, ()),
        # The second answer was no better.
        Entry("Ein Hund sieht Männer.", 2, Checks("en", "de").version, ("numerals",)),
        Entry("Ein Mann.", 1, Checks("en", "de").version, ()),
    ]


def test_ctrl_c_keeps_what_was_answered(memory, monkeypatch):
    keep = Driver._keep
    pressed = []

    def interrupted(self, *rest):
        keep(self, *rest)
        if self.num_translated >= 20 and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Driver, "_keep", interrupted)
    engine, texts = FakeEngine(concurrency=2), _texts(1000)
    with pytest.raises(Interrupted, match=r"new translations are in the memory.*to continue"):
        _drive(engine, memory, texts)
    held = memory.find(memory.identity_id(engine.identity), texts)
    assert 20 <= len(held) < 1000
    assert {text for call in engine.calls for text in call} - set(held) == set()


def test_a_broken_engine_ends_the_run_with_its_name(memory):
    engine = FakeEngine(_fails(ZeroDivisionError("division by zero")))
    with pytest.raises(TranslationError, match="engine fake: ZeroDivisionError: division by zero"):
        _drive(engine, memory, ["a"])


def test_long_and_broken_texts_are_asked_in_parts(memory):
    engine = FakeEngine(batch_size=3)
    long = "One two three. " * 400  # 6,000 characters
    texts = ["first\nsecond", "nul\0inside", long, "sur\ud800rogate", "plain"]
    _, _, held, _ = _drive(engine, memory, texts)
    assert held == {text: text.upper().replace("\ud800", "\ufffd") for text in texts}
    assert all(sum(map(len, call)) <= 10_000 for call in engine.calls)


# --- what an engine is shown, and that the rest comes back in its place ---

_ANY_TEXT = st.text(st.characters(codec=None), max_size=200)


@given(_ANY_TEXT, st.integers(1, 60))
def test_parts_are_clean_and_join_to_the_text(text, limit):
    pieces = segments(text, limit)
    for part in pieces[1::2]:
        assert part == part.strip() and 0 < len(part) <= limit
        assert needs_translation(part)
        assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl") for character in part)
    # Only lone surrogates are replaced, for no engine could be sent one, and no reader takes one.
    assert "".join(pieces) == re.sub("[\ud800-\udfff]", "\ufffd", text)
    assert segments(text, None) == ["", text, ""]


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("A man.\nA dog.\r\n", 100, ["A man.", "A dog."]),
        ("  A man\0sleeps \t", 100, ["A man", "sleeps"]),
        ("A man.\n42\n…\nA dog.", 100, ["A man.", "A dog."]),
        ("", 100, []), ("…", 100, []), ("42 %", 100, []), ("😀👩‍🚀", 100, []),
        # Cut at sentence ends, then at spaces, then anywhere.
        ("One two. Three four. Five", 14, ["One two.", "Three four.", "Five"]),
        ("one two three four", 9, ["one two", "three", "four"]),
        ("一二三。四五六。七", 5, ["一二三。", "四五六。七"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
    ],
)  # fmt: skip
def test_parts(text, limit, parts):
    assert segments(text, limit)[1::2] == parts
