"""Drives an engine through texts: pace, patience, and nothing asked for twice.

The main thread hands batches to worker threads and stores each answer at once. No more calls are
under way than `Limits.concurrency`, and every batch is looked up in the memory before it is handed
out. So a kill at any moment costs the calls under way, and another process at work on the same
texts at most doubles those that both have under way.
"""

from __future__ import annotations

import itertools
import queue
import random
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.engine import (
    Engine,
    Fault,
    Limits,
    Refusal,
    Rejection,
    Unreachable,
)
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.quality import Checks, needs_translation
from clseave_cli.errors import ClseaveError, Interrupted, TranslationError
from clseave_cli.processes import process_count, process_rank
from clseave_cli.progress import Task

#: Rounds of refusals with no answer between them before the service counts as closed to us.
REFUSAL_ROUNDS = 8
#: Refusals of one and the same call before that text is given up.
CALL_REFUSALS = 12
#: Texts per worker that fail in a row, with no success, before the run is stopped.
FAILURE_ROUNDS = 5
#: If a service asks to wait longer than this, the run stops; the user comes back later.
LONGEST_WAIT_SECONDS = 300.0
#: The first request for a text, and a second one if the first answer is suspect or unusable.
MAX_ATTEMPTS = 2

_T = TypeVar("_T")

_LONGEST_BACKOFF_SECONDS = 60.0
_FAREWELL_SECONDS = 5.0

_SEPARATOR = re.compile(r"([\x00-\x1f\x7f-\x9f\u2028\u2029]+)")
_EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[」』”’]*")


def segments(text: str, max_characters: int | None) -> list[str]:
    """A text cut into what stays as it is and, at the odd places, the parts to ask about.

    Engines translate sentences. They never see line breaks and control characters; a text over an
    engine's limit is cut at sentence ends; and pieces without a letter (`…`, `42`, an emoji) are
    the same in every language and never asked about.

    Args:
        text: any string.
        max_characters: the longest part an engine takes; None: the whole text as it is.
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
    """The line in chunks of at most `max_characters`, at sentence ends, else at spaces."""
    chunks = []
    while len(line) > max_characters:
        head = line[:max_characters]
        ends = [match.end() for match in _SENTENCE_END.finditer(head)]
        at = ends[-1] if ends else head.rfind(" ") + 1 or max_characters
        chunks.append(line[:at])
        line = line[at:]
    return [*chunks, line]


class _Stopped(Exception):
    """Ends a worker's wait: nothing more is to be asked."""


class Pace:
    """When the next request may leave, whichever worker sends it, and when to stop altogether.

    Args:
        config: rate and retries that the user asks for.
        limits: concurrency, and the rate that suits the engine otherwise.

    Attributes:
        retries: further tries of a call that failed.
        num_requests: calls made, failed ones included.
        stopped: why the run is over before the work is, None while it is not.
    """

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
        self.retries = config.retries
        self.num_requests = 0
        self.stopped: str | None = None

    def stop(self, reason: str | None = None) -> None:
        """Ends every wait; the first reason given is kept."""
        with self._lock:
            if self.stopped is None:
                self.stopped = reason
        self._stop.set()

    def wait_for_turn(self) -> None:
        """Returns when a request may be sent.

        Raises:
            _Stopped: none may any more.
        """
        with self._lock:
            self.num_requests += 1
            start = max(self._next, time.monotonic())
            self._next = start + self._interval
        self._sleep(start - time.monotonic())

    def succeeded(self) -> None:
        """Notes an answer: the service is well."""
        with self._lock:
            self._refusals = self._failures = 0
            self._has_answers = True

    def gave_up(self, reason: str) -> None:
        """Notes a text that failed for good, not by its own fault."""
        with self._lock:
            self._failures += 1
            over = self._failures >= FAILURE_ROUNDS * self._concurrency
        if over:
            self.stop(f"the service fails on every text (the last time: {reason})")

    def back_off(self, fault: Fault, tries: int) -> None:
        """Waits before the same call is made again; after a refusal, every worker waits.

        Raises:
            _Stopped: the service refuses for good, or another worker learnt so.
        """
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
            self.stop(f"the service has evidently shut us out ({fault})")
        self._sleep(0)

    def _backoff(self, doublings: int) -> float:
        longest = min(self._retry_seconds * 2.0**doublings, _LONGEST_BACKOFF_SECONDS)
        return longest * random.uniform(0.5, 1.0)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise _Stopped


class _Item(NamedTuple):
    """One text to ask for; `attempt` as in `Engine.translate`."""

    text: str
    attempt: int


class _Answer(NamedTuple):
    """What became of one item: a translation, or the reason why there is none."""

    item: _Item
    translation: str | None
    reason: str = ""


def _calls(items: Iterable[_T], length: Callable[[_T], int], limits: Limits) -> list[list[_T]]:
    """Items in as few calls as an engine's limits allow, in their order."""
    calls: list[list[_T]] = []
    characters = 0
    for item in items:
        characters += length(item)
        full = not calls or len(calls[-1]) == limits.batch_size
        if full or characters > limits.batch_characters:
            calls.append([])
            characters = length(item)
        calls[-1].append(item)
    return calls


def _is_usable(answer: str) -> bool:
    """Whether a reader of the file would take it."""
    return bool(answer.strip()) and not _SURROGATE.search(answer)


class Driver:
    """Has texts translated and stores the answers in a `Memory`.

    Args:
        engine: translates.
        memory: where answers and failures go.
        checks: made on every answer.
        pace: how the service is treated.
        retries_suspect: ask a second time for what fails a check.
    """

    def __init__(
        self, engine: Engine, memory: Memory, checks: Checks, pace: Pace, retries_suspect: bool
    ) -> None:
        self._engine, self._memory, self._checks, self._pace = engine, memory, checks, pace
        self._identity = memory.identity_id(engine.identity)
        self._retries_suspect = retries_suspect
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        # What workers tell the main thread: answers, or the end of a batch with its error if any.
        self._reports: queue.SimpleQueue[list[_Answer] | BaseException | None] = queue.SimpleQueue()
        self._start = time.monotonic()
        self.num_translated = self.num_failed = 0

    def run(self, texts: Mapping[str, int], task: Task) -> None:
        """Works until every text is in the memory or has failed, or the pace stops it.

        Args:
            texts: what to translate, with the attempt as in `Engine.translate`.
            task: told of progress.

        Raises:
            Interrupted: by Ctrl-C; what was answered is in the memory.
            TranslationError: the engine cannot work at all.
        """
        concurrency = self._engine.limits.concurrency
        for _ in range(concurrency):
            # Daemons: an interrupted program does not wait for a server that hangs.
            threading.Thread(target=self._work, daemon=True).start()
        # A local engine, one call at a time, has its next batch ready when it ends one.
        places = concurrency if concurrency > 1 else 2
        batches = self._batches(texts)
        under_way = 0
        try:
            while True:
                while under_way < places and batches and not self._pace.stopped:
                    if batch := self._still_missing(batches.pop(), task):
                        self._queue.put(batch)
                        under_way += 1
                if not under_way:
                    break
                under_way -= self._keep(batches, task)
        except KeyboardInterrupt:
            self._pace.stop("interrupted")
            self._say_farewell(under_way, batches, task)
            raise Interrupted(
                f"interrupted; {self.num_translated} new translations are in the memory. "
                "Run the same command again to go on."
            ) from None
        except BaseException:
            self._pace.stop()
            raise
        finally:
            for _ in range(concurrency):
                self._queue.put(None)

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            end = None
            try:
                self._translate(batch)
            except _Stopped:
                pass
            except BaseException as error:
                end = error
            self._reports.put(end)

    def _translate(self, batch: list[_Item]) -> None:
        """Has a batch translated, in a worker; reports answers as soon as they are there."""
        limits, attempt = self._engine.limits, batch[0].attempt
        texts = [segments(item.text, limits.text_characters) for item in batch]
        calls = _calls([part for text in texts for part in text[1::2]], len, limits)
        try:
            answers = iter([answer for parts in calls for answer in self._call(parts, attempt)])
        except (Fault, Rejection) as error:
            if len(batch) > 1:  # one may have spoilt it for the others: now each on its own
                for item in batch:
                    self._translate([item])
                return
            reason = str(error)
            if isinstance(error, Fault):
                self._pace.gave_up(reason)
                reason += f", {self._pace.retries + 1} times"
            self._reports.put([_Answer(batch[0], None, reason)])
            return
        done, again = [], []
        for item, text in zip(batch, texts, strict=True):
            text[1::2] = itertools.islice(answers, len(text) // 2)
            if all(map(_is_usable, text[1::2])):
                done.append(_Answer(item, "".join(text)))
            elif item.attempt + 1 < MAX_ATTEMPTS:  # an engine that can decodes differently then
                again.append(item._replace(attempt=item.attempt + 1))
            else:
                name = self._engine.identity.engine
                done.append(_Answer(item, None, f"{name}: an empty or invalid answer"))
        self._reports.put(done)
        for item in again:
            self._translate([item])

    def _call(self, parts: list[str], attempt: int) -> list[str]:
        tries = refusals = 0
        while True:
            self._pace.wait_for_turn()
            try:
                answers = self._engine.translate(parts, attempt)
                if len(answers) != len(parts):
                    raise Fault(
                        f"{self._engine.identity.engine}: {len(answers)} translations "
                        f"for {len(parts)} texts"
                    )
            except Fault as fault:
                refused = isinstance(fault, Refusal)
                refusals += refused
                tries += not refused
                if tries > self._pace.retries or refusals > CALL_REFUSALS:
                    raise
                self._pace.back_off(fault, tries - 1)
            else:
                self._pace.succeeded()
                return answers

    def _batches(self, texts: Mapping[str, int]) -> list[list[_Item]]:
        """The texts in calls of one attempt each; the last one is to be made first.

        Processes that a launcher started begin with different shares. Others begin anywhere, so
        that two at once seldom have the same text under way.
        """
        count, rank = process_count(), process_rank()
        groups: dict[tuple[bool, int], list[_Item]] = {}
        for text, attempt in texts.items():
            share = zlib.crc32(text.encode("utf-8", "surrogatepass")) % count
            groups.setdefault((share == rank, attempt), []).append(_Item(text, attempt))
        batches: list[list[_Item]] = []
        for _, items in sorted(groups.items()):
            if self._engine.limits.by_length:
                items.sort(key=lambda item: len(item.text))
            calls = _calls(items, lambda item: len(item.text), self._engine.limits)
            random.shuffle(calls)
            batches += calls
        return batches

    def _still_missing(self, batch: list[_Item], task: Task) -> list[_Item]:
        """A batch without what another process has had translated in the meantime."""
        entries = self._memory.find(self._identity, [item.text for item in batch])
        attempts = {text: entry.attempts for text, entry in entries.items()}
        missing = [item for item in batch if attempts.get(item.text, 0) <= item.attempt]
        task.advance(len(batch) - len(missing))
        return missing

    def _keep(self, batches: list[list[_Item]], task: Task, timeout: float | None = None) -> int:
        """Stores what one report brings, and returns how many batches it ends."""
        report = self._reports.get(timeout=timeout)
        if isinstance(report, ClseaveError):
            raise report
        if isinstance(report, BaseException):
            name = self._engine.identity.engine
            raise TranslationError(f"engine {name}: {type(report).__name__}: {report}") from report
        if not report:
            return int(report is None)
        entries = {
            answer.item: self._entry(answer.item, answer.translation)
            for answer in report
            if answer.translation is not None
        }
        again = [
            item._replace(attempt=1)
            for item, entry in entries.items()
            if self._retries_suspect and entry.suspicions and entry.attempts < MAX_ATTEMPTS
        ]
        failures = {a.item.text: a.reason for a in report if a.translation is None}
        self._memory.store(self._identity, [(item.text, e) for item, e in entries.items()])
        self._memory.fail(self._identity, failures)
        self.num_translated += len(entries) - len(again)
        self.num_failed += len(failures)
        if again:
            batches.append(again)
        rate = self.num_translated / max(1e-9, time.monotonic() - self._start)
        task.advance(len(report) - len(again), per_second=rate, failed=self.num_failed)
        return 0

    def _entry(self, item: _Item, translation: str) -> Entry:
        attempts = item.attempt + 1
        if self._engine.limits.by_pair_id:  # the text is not available here; checked when written
            return Entry(translation, attempts, "", ())
        suspicions = self._checks.find(item.text, translation)
        if item.attempt and suspicions:
            before = self._memory.find(self._identity, [item.text]).get(item.text)
            if before is not None and len(before.suspicions) <= len(suspicions):
                return before._replace(attempts=attempts)
        return Entry(translation, attempts, self._checks.version, suspicions)

    def _say_farewell(self, under_way: int, batches: list[list[_Item]], task: Task) -> None:
        """Keeps what workers still bring within a moment, for it has been paid for."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while under_way and (left := deadline - time.monotonic()) > 0:
            try:
                under_way -= self._keep(batches, task, left)
            except (queue.Empty, ClseaveError):
                return
