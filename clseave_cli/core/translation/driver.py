"""Sends texts to an engine: paces requests, retries them, and pays for nothing twice.

The main thread hands batches to worker threads and stores each answer at once. At most
`Limits.concurrency` calls are in flight, and every batch is looked up in the memory before it is
sent. So a kill loses only the calls in flight, and only those may be made twice by two processes.
"""

from __future__ import annotations

import itertools
import queue
import random
import re
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.engine import (
    Engine,
    Fault,
    Limits,
    Refusal,
    Rejection,
    Unreachable,
    encode,
)
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.quality import Checks, needs_translation
from clseave_cli.errors import ClseaveError, Interrupted, TranslationError
from clseave_cli.processes import process_count, process_rank
from clseave_cli.progress import Task

#: Refusals per worker, with no answer in between, before the run stops.
REFUSAL_ROUNDS = 8
#: Refusals of one call before its text is given up.
CALL_REFUSALS = 12
#: Failed texts per worker, with no answer in between, before the run stops.
FAILURE_ROUNDS = 5
#: The run stops if a service asks for a longer wait.
LONGEST_WAIT_SECONDS = 300.0
#: A text is asked for again if the first answer is suspect or unusable.
MAX_ATTEMPTS = 2

_LONGEST_BACKOFF_SECONDS = 60.0
_LATE_SECONDS = 5.0

_SEPARATOR = re.compile(r"([\x00-\x1f\x7f-\x9f\u2028\u2029]+)")
_EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[」』”’]*")


def segments(text: str, max_characters: int | None) -> list[str]:
    """Splits a text; the odd items are to be translated, the even ones stay as they are.

    Engines never see line breaks, control characters or parts without a letter (`…`, `42`, an
    emoji). Parts longer than `max_characters` are split at sentence ends; None: translate the text
    as it is.
    """
    if max_characters is None:
        return ["", text, ""]
    pieces = [""]
    for line in _SEPARATOR.split(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)):
        for chunk in _cut(line, max_characters):
            before, inner, after = _EDGES.fullmatch(chunk).groups()  # type: ignore[union-attr]
            if needs_translation(inner):
                pieces[-1] += before
                pieces += [inner, after]
            else:
                pieces[-1] += chunk
    return pieces


def _cut(line: str, max_characters: int) -> list[str]:
    """Chunks of at most `max_characters`, split at sentence ends, else at spaces."""
    chunks = []
    while len(line) > max_characters:
        head = line[:max_characters]
        ends = [match.end() for match in _SENTENCE_END.finditer(head)]
        at = ends[-1] if ends else head.rfind(" ") + 1 or max_characters
        chunks.append(line[:at])
        line = line[at:]
    return [*chunks, line]


class _Stopped(Exception):
    """No more requests may be sent."""


class Pace:
    """Decides when workers may send requests, and when the run stops."""

    def __init__(self, config: TranslateConfig, limits: Limits) -> None:
        rate = config.requests_per_second or limits.requests_per_second
        self._interval = 1 / rate if rate else 0.0
        self._retry_seconds = config.retry_seconds
        self._concurrency = limits.concurrency
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._next = 0.0
        self._refusals = self._failures = 0
        self._has_answers = False
        self.num_requests = 0  # including failed ones
        self.stopped: str | None = None  # why the run ended early

    def stop(self, reason: str | None = None) -> None:
        """Ends every wait; the first reason is kept."""
        with self._lock:
            if self.stopped is None:
                self.stopped = reason
        self._stop.set()

    def wait_for_turn(self) -> None:
        """Returns when a request may be sent, or raises `_Stopped`."""
        with self._lock:
            self.num_requests += 1
            start = max(self._next, time.monotonic())
            self._next = start + self._interval
        self._sleep(start - time.monotonic())

    def succeeded(self) -> None:
        """Records an answer."""
        with self._lock:
            self._refusals = self._failures = 0
            self._has_answers = True

    def gave_up(self, reason: str) -> None:
        """Records a text given up because the service fails."""
        with self._lock:
            self._failures += 1
            over = self._failures >= FAILURE_ROUNDS * self._concurrency
        if over:
            self.stop(f"the service fails on every text (the last time: {reason})")

    def back_off(self, fault: Fault, tries: int) -> None:
        """Waits before a retry (all workers do after a refusal), or raises `_Stopped`."""
        wait = fault.retry_after
        if not isinstance(fault, Refusal) and (wait or 0) <= LONGEST_WAIT_SECONDS:
            self._sleep(self._backoff(tries) if wait is None else wait)
            return
        with self._lock:
            self._refusals += 1
            rounds = self._refusals // self._concurrency
            pause = self._backoff(rounds) if wait is None else wait
            self._next = max(self._next, time.monotonic() + pause)
        if wait is not None and wait > LONGEST_WAIT_SECONDS:
            self.stop(f"{fault}; it asks to wait {wait:.0f} s")
        elif isinstance(fault, Unreachable):
            if rounds >= REFUSAL_ROUNDS or not self._has_answers:
                self.stop(str(fault))
        elif rounds >= REFUSAL_ROUNDS:
            self.stop(f"the service keeps refusing ({fault})")
        self._sleep(0)

    def _backoff(self, doublings: int) -> float:
        longest = min(self._retry_seconds * 2.0**doublings, _LONGEST_BACKOFF_SECONDS)
        return longest * random.uniform(0.5, 1.0)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise _Stopped


class _Batch(NamedTuple):
    """Texts to ask for together; `attempt` as in `Engine.translate`."""

    texts: list[str]
    attempt: int


def _calls(texts: Iterable[str], limits: Limits) -> list[list[str]]:
    """Groups texts, in order, into as few calls as the limits allow."""
    calls: list[list[str]] = []
    characters = 0
    for text in texts:
        characters += len(text)
        full = not calls or len(calls[-1]) == limits.batch_size
        if full or characters > limits.batch_characters:
            calls.append([])
            characters = len(text)
        calls[-1].append(text)
    return calls


def _is_usable(answer: str) -> bool:
    """Whether readers of the output accept it."""
    return bool(answer.strip()) and not _SURROGATE.search(answer)


class Driver:
    """Has an engine translate texts and stores the answers in a `Memory`."""

    def __init__(self, config: TranslateConfig, engine: Engine, memory: Memory, pace: Pace) -> None:
        self.engine, self.memory, self.pace, self._config = engine, memory, pace, config
        self.identity = memory.identity_id(engine.identity)
        self.checks = Checks(engine.identity.source, engine.identity.target)
        is_exact = engine.limits.text_characters is None
        self._retries_suspect = config.on_suspect == "retry" and not is_exact
        self.num_translated = 0
        self.failures: dict[str, str] = {}  # texts given up, with the reasons
        self._start = 0.0
        self._batches: list[_Batch] = []  # to send, the last one first
        self._in_flight = 0
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        # From the workers: a translation for each text of a batch, or an error.
        self._reports = queue.SimpleQueue[tuple[_Batch, list[str] | BaseException]]()

    def run(self, texts: Mapping[str, int], task: Task) -> None:
        """Translates `texts`, with their attempts, until all are stored, failed, or the pace stops.

        Raises:
            Interrupted: by Ctrl-C; answers are in the memory.
            TranslationError: the engine fails.
        """
        concurrency = self.engine.limits.concurrency
        for _ in range(concurrency):
            # Daemons, because an interrupted program must not wait for a hanging server.
            threading.Thread(target=self._work, daemon=True).start()
        # At least 2, so that a local engine, which takes one call at a time, is never idle.
        most_in_flight = max(2, concurrency)
        self._batches, self._in_flight = self._in_batches(texts), 0
        self._start = self._start or time.monotonic()
        try:
            while True:
                while self._in_flight < most_in_flight and self._batches and not self.pace.stopped:
                    batch = self._batches.pop()
                    if missing := self._still_missing(batch, task):
                        self._queue.put(_Batch(missing, batch.attempt))
                        self._in_flight += 1
                if not self._in_flight:
                    break
                self._keep(task)
        except KeyboardInterrupt:
            self.pace.stop("interrupted")
            self._store_late_answers(task)
            raise Interrupted(
                f"interrupted; {self.num_translated} new translations are in the memory. "
                "Run the same command again to continue."
            ) from None
        except BaseException:
            self.pace.stop()
            raise
        finally:
            for _ in range(concurrency):
                self._queue.put(None)

    def is_final(self, entry: Entry | None) -> bool:
        """Whether an entry needs no (further) request."""
        if entry is None:
            return False
        asked_once = 0 < entry.attempts < MAX_ATTEMPTS
        return not (self._retries_suspect and entry.suspicions and asked_once)

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                self._reports.put((batch, self._translate(batch)))
            except BaseException as error:
                self._reports.put((batch, error))

    def _translate(self, batch: _Batch) -> list[str]:
        """A translation for each text, "" if the answer is unusable; runs in a worker."""
        limits = self.engine.limits
        texts = [segments(text, limits.text_characters) for text in batch.texts]
        calls = _calls([part for text in texts for part in text[1::2]], limits)
        answers = iter([answer for parts in calls for answer in self._call(parts, batch.attempt)])
        for text in texts:
            text[1::2] = itertools.islice(answers, len(text) // 2)
        return ["".join(text) if all(map(_is_usable, text[1::2])) else "" for text in texts]

    def _call(self, parts: list[str], attempt: int) -> list[str]:
        tries = refusals = 0
        while True:
            self.pace.wait_for_turn()
            try:
                answers = self.engine.translate(parts, attempt)
                if len(answers) != len(parts):
                    raise Fault(
                        f"{self.engine.identity.engine}: {len(answers)} translations "
                        f"for {len(parts)} texts"
                    )
            except Fault as fault:
                is_refusal = isinstance(fault, Refusal)
                refusals += is_refusal
                tries += not is_refusal
                if tries > self._config.retries or refusals > CALL_REFUSALS:
                    raise
                self.pace.back_off(fault, tries - 1)
            else:
                self.pace.succeeded()
                return answers

    def _in_batches(self, texts: Mapping[str, int]) -> list[_Batch]:
        """Batches of one attempt each, the last to be sent first.

        Processes of one launcher start with different shares, others at random, so that two seldom
        have the same text in flight.
        """
        count, rank = process_count(), process_rank()
        groups: dict[tuple[bool, int], list[str]] = {}
        for text, attempt in texts.items():
            share = zlib.crc32(encode(text)) % count
            groups.setdefault((share == rank, attempt), []).append(text)
        batches: list[_Batch] = []
        for (_, attempt), group in sorted(groups.items()):
            calls = _calls(sorted(group, key=len), self.engine.limits)  # less padding
            random.shuffle(calls)
            batches += [_Batch(call, attempt) for call in calls]
        return batches

    def _still_missing(self, batch: _Batch, task: Task) -> list[str]:
        """The texts of a batch that no other process has translated in the meantime."""
        entries = self.memory.find(self.identity, batch.texts)
        attempts = {text: entry.attempts for text, entry in entries.items()}
        missing = [text for text in batch.texts if attempts.get(text, 0) <= batch.attempt]
        task.advance(len(batch.texts) - len(missing))
        return missing

    def _keep(self, task: Task, timeout: float | None = None) -> None:
        """Stores what a worker reports; texts to retry come next."""
        batch, outcome = self._reports.get(timeout=timeout)
        self._in_flight -= 1
        if isinstance(outcome, _Stopped):
            return
        name = self.engine.identity.engine
        entries: dict[str, Entry] = {}
        again: list[str] = []
        num_failed = len(self.failures)
        if isinstance(outcome, Fault | Rejection):
            if len(batch.texts) > 1:  # one text may have spoilt the call, so retry one by one
                self._batches += [_Batch([text], batch.attempt) for text in batch.texts]
                return
            reason = str(outcome)
            if isinstance(outcome, Fault):
                self.pace.gave_up(reason)
                reason += f", {self._config.retries + 1} times"
            self.failures[batch.texts[0]] = reason
        elif isinstance(outcome, ClseaveError):
            raise outcome
        elif isinstance(outcome, BaseException):
            problem = f"engine {name}: {type(outcome).__name__}: {outcome}"
            raise TranslationError(problem) from outcome
        else:
            for text, translation in zip(batch.texts, outcome, strict=True):
                entry = self._entry(text, batch.attempt, translation) if translation else None
                if entry is not None:
                    entries[text] = entry
                if not self.is_final(entry) and batch.attempt + 1 < MAX_ATTEMPTS:
                    again.append(text)
                elif entry is None:
                    self.failures[text] = f"{name}: an empty or invalid answer"
        self.memory.store(self.identity, entries.items())
        if again:
            self._batches.append(_Batch(again, batch.attempt + 1))
        num_done = len(batch.texts) - len(again)
        self.num_translated += num_done - len(self.failures) + num_failed
        rate = self.num_translated / max(1e-9, time.monotonic() - self._start)
        task.advance(num_done, per_second=rate, failed=len(self.failures))

    def _entry(self, text: str, attempt: int, translation: str) -> Entry:
        """The better of this answer and an earlier one."""
        attempts = attempt + 1
        if self.engine.limits.by_pair_id:  # without the text, it is checked only when written
            return Entry(translation, attempts, "", ())
        suspicions = self.checks.find(text, translation)
        if attempt and suspicions:
            before = self.memory.find(self.identity, [text]).get(text)
            if before is not None and len(before.suspicions) <= len(suspicions):
                return before._replace(attempts=attempts)
        return Entry(translation, attempts, self.checks.version, suspicions)

    def _store_late_answers(self, task: Task) -> None:
        """Stores what workers still deliver within seconds, because it may have been paid for."""
        deadline = time.monotonic() + _LATE_SECONDS
        with suppress(queue.Empty, ClseaveError):
            while self._in_flight and (left := deadline - time.monotonic()) > 0:
                self._keep(task, left)
