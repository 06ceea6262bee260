"""Drives an engine through the work: pace, patience, and nothing asked for twice.

The main thread claims texts, hands them to worker threads, and keeps what comes back at once; no
more calls are under way than `Limits.concurrency`, and none is handed out before an earlier answer
is in the memory. So a kill at any moment costs the calls under way and no more.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.engine import Engine, Fault, Limits, Refusal, Rejection
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.quality import Checks
from clseave_cli.core.translation.segments import Segmented
from clseave_cli.core.translation.work import Item, Work
from clseave_cli.errors import ClseaveError, Interrupted, TranslationError
from clseave_cli.progress import Task

#: Rounds of refusals with no answer between them before the service counts as closed to us.
REFUSAL_ROUNDS = 8
#: Refusals of one and the same call before that text is given up.
CALL_REFUSALS = 12
#: Texts per worker that fail in a row, with no success, before the run is stopped.
FAILURE_ROUNDS = 5
#: A service that asks to wait longer than this is left alone; the user comes back later.
LONGEST_WAIT_SECONDS = 300.0
#: The first request for a text, and a second one where the first answer is suspect.
MAX_ATTEMPTS = 2

_LONGEST_BACKOFF_SECONDS = 60.0
_CLAIM_AT_LEAST = 64
_POLL_SECONDS = 0.5
_FAREWELL_SECONDS = 5.0


@dataclass(frozen=True)
class Patience:
    """How a service is treated.

    Attributes:
        requests_per_second: at most so many; None for as many as it takes.
        retries: further tries of a call that failed.
        retry_seconds: the wait before the first of them; doubles, with jitter.
    """

    requests_per_second: float | None
    retries: int
    retry_seconds: float

    @classmethod
    def of(cls, config: TranslateConfig, limits: Limits) -> Patience:
        """What the user says, or else what suits the engine."""
        rate = config.requests_per_second or limits.requests_per_second
        return cls(rate, config.retries, config.retry_seconds)


@dataclass
class Outcome:
    """What a run of the driver came to.

    Attributes:
        num_translated: texts translated now.
        num_failed: texts given up.
        num_requests: calls made, failed ones included.
        stopped: why the run ended before the work did, None when it did not.
    """

    num_translated: int = 0
    num_failed: int = 0
    num_requests: int = 0
    stopped: str | None = None


class _Stopped(Exception):
    """Ends a worker's wait: nothing more is to be asked."""


class _Pace:
    """When the next request may leave, whichever worker sends it, and when to stop altogether."""

    def __init__(self, patience: Patience, concurrency: int) -> None:
        rate = patience.requests_per_second
        self._interval = 1 / rate if rate else 0.0
        self._patience = patience
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._next = 0.0
        self._refusals = 0
        self._failures = 0
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
            _Stopped: the service has evidently shut us out, or another worker found so.
        """
        wait = fault.retry_after
        if wait is not None and wait > LONGEST_WAIT_SECONDS:
            self.stop(f"{fault}; it asks to wait {wait:.0f} s")
            raise _Stopped
        if isinstance(fault, Refusal):
            with self._lock:
                self._refusals += 1
                rounds, _ = divmod(self._refusals, self._concurrency)
                pause = self._backoff(rounds) if wait is None else wait
                self._next = max(self._next, time.monotonic() + pause)
            if rounds >= REFUSAL_ROUNDS:
                self.stop(f"the service has evidently shut us out ({fault})")
                raise _Stopped
        else:
            self._sleep(self._backoff(tries) if wait is None else wait)

    def _backoff(self, doublings: int) -> float:
        longest = min(self._patience.retry_seconds * 2.0**doublings, _LONGEST_BACKOFF_SECONDS)
        return longest * random.uniform(0.5, 1.0)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(0.0, seconds)):
            raise _Stopped


@dataclass
class _Answer:
    """One item's fate: a translation, or the reason why there is none, or neither (not asked)."""

    item: Item
    translation: str | None = None
    reason: str | None = None


@dataclass
class _Report:
    """What a worker tells the main thread: answers so far, and whether its batch is done."""

    answers: list[_Answer] = field(default_factory=list)
    done: bool = False
    error: BaseException | None = None


class _Caller:
    """Makes the calls for one batch, in a worker thread."""

    def __init__(self, engine: Engine, pace: _Pace, retries: int) -> None:
        self._engine = engine
        self._pace = pace
        self._retries = retries

    def translate(self, batch: Sequence[Item], tell: Callable[[list[_Answer]], None]) -> None:
        """Has a batch translated; `tell` hears of answers as soon as they are there."""
        limit = self._engine.limits.text_characters
        texts = [Segmented(item.text, limit) for item in batch]
        parts = [part for text in texts for part in text.parts]
        if len(batch) > 1 and self._fits(parts):
            try:
                answers = iter(self._call(parts, batch[0].attempt))
            except (Fault, Rejection):
                pass  # one text may have spoilt it for the others: now each on its own
            else:
                tell(
                    [
                        _Answer(item, text.join([next(answers) for _ in text.parts]))
                        for item, text in zip(batch, texts, strict=True)
                    ]
                )
                return
        for item, text in zip(batch, texts, strict=True):
            tell([self._translate_one(item, text)])

    def _translate_one(self, item: Item, text: Segmented) -> _Answer:
        try:
            answers = [
                answer
                for parts in self._calls(text.parts)
                for answer in self._call(parts, item.attempt)
            ]
        except Rejection as error:
            return _Answer(item, reason=str(error))
        except Fault as error:
            self._pace.gave_up(str(error))
            return _Answer(item, reason=f"{error}, {self._retries + 1} times")
        return _Answer(item, text.join(answers))

    def _fits(self, parts: Sequence[str]) -> bool:
        limits = self._engine.limits
        return len(parts) <= limits.batch_size and sum(map(len, parts)) <= limits.batch_characters

    def _calls(self, parts: Sequence[str]) -> list[list[str]]:
        """The parts of one long text in as few calls as the engine's limits allow."""
        calls: list[list[str]] = [[]]
        for part in parts:
            if calls[-1] and not self._fits([*calls[-1], part]):
                calls.append([])
            calls[-1].append(part)
        return calls

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
                refusals, tries = refusals + refused, tries + (not refused)
                if tries > self._retries or refusals > CALL_REFUSALS:
                    raise
                self._pace.back_off(fault, tries - 1)
            else:
                self._pace.succeeded()
                return answers


class Driver:
    """Has everything in a `Work` translated, and kept in a `Memory`.

    Args:
        engine: whom to ask.
        memory: where answers go.
        identity: the engine's number in the memory.
        checks: what is looked at in every answer.
        patience: how the service is treated.
        retry_suspect: ask a second time for what the checks find suspect.
    """

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        identity: int,
        checks: Checks,
        patience: Patience,
        retry_suspect: bool,
    ) -> None:
        self._engine = engine
        self._memory = memory
        self._identity = identity
        self._checks = checks
        self._retry_suspect = retry_suspect
        self._pace = _Pace(patience, engine.limits.concurrency)
        self._caller = _Caller(engine, self._pace, patience.retries)
        self._batches: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._claimed: list[Item] = []
        self._outcome = Outcome()

    def run(self, work: Work, task: Task) -> Outcome:
        """Works until nothing is left or the service shuts us out.

        Args:
            work: what to translate; afterwards it knows what failed and why.
            task: told of progress.

        Raises:
            Interrupted: by Ctrl-C; what was answered is in the memory.
            TranslationError: the engine cannot work at all.
        """
        concurrency = self._engine.limits.concurrency
        for _ in range(concurrency):
            # Daemons: an interrupted program does not wait for a server that hangs.
            threading.Thread(target=self._work, daemon=True).start()
        # A local engine, one call at a time, finds its next batch ready when it ends one.
        places = concurrency if concurrency > 1 else 2
        under_way = 0
        try:
            while True:
                while under_way < places and (batch := self._next_batch(work)):
                    self._batches.put(batch)
                    under_way += 1
                if under_way:
                    under_way -= self._keep(self._reports.get(), work, task)
                elif self._pace.stopped or not self._revisit(work, task):
                    break
        except KeyboardInterrupt:
            self._pace.stop("interrupted")
            self._say_farewell(under_way, work, task)
            raise Interrupted(
                f"interrupted; {self._outcome.num_translated} new translations are in the memory. "
                "Run the same command again to go on."
            ) from None
        finally:
            self._pace.stop()
            for _ in range(concurrency):
                self._batches.put(None)
        self._outcome.num_requests = self._pace.num_requests
        self._outcome.stopped = self._pace.stopped
        return self._outcome

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            report = _Report(done=True)
            try:
                self._caller.translate(batch, lambda answers: self._reports.put(_Report(answers)))
            except _Stopped:
                pass
            except BaseException as error:
                report.error = error
            self._reports.put(report)

    def _next_batch(self, work: Work) -> list[Item] | None:
        """Texts for one call, all of one attempt, claimed for this process."""
        limits = self._engine.limits
        while not self._claimed:
            if self._pace.stopped:
                return None
            # Batches of a local engine are large enough; single texts are claimed by the dozen.
            count = (
                limits.batch_size if limits.by_length else max(limits.batch_size, _CLAIM_AT_LEAST)
            )
            items = work.take(count)
            if not items:
                return None
            self._claimed = self._claim(items, work)
        batch = [self._claimed.pop(0)]
        characters = len(batch[0].text)
        while self._claimed and len(batch) < limits.batch_size:
            item = self._claimed[0]
            characters += len(item.text)
            if item.attempt != batch[0].attempt or characters > limits.batch_characters:
                break
            batch.append(self._claimed.pop(0))
        return batch

    def _claim(self, items: list[Item], work: Work) -> list[Item]:
        granted: set[str] = set()
        for attempt in {item.attempt for item in items}:
            texts = [item.text for item in items if item.attempt == attempt]
            granted |= self._memory.claim(self._identity, texts, attempt + 1)
        work.postpone(item for item in items if item.text not in granted)
        return [item for item in items if item.text in granted]

    def _revisit(self, work: Work, task: Task) -> bool:
        """Looks again at texts that another process had claimed; False when there are none."""
        items = work.take_postponed(1_000)
        if not items:
            return False
        known = self._memory.find(self._identity, [item.text for item in items])
        waiting = [
            item
            for item in items
            if item.text not in known or known[item.text].attempts <= item.attempt
        ]
        task.advance(len(items) - len(waiting))
        self._claimed = self._claim(waiting, work)
        if waiting and not self._claimed:
            time.sleep(_POLL_SECONDS)
        return True

    def _keep(self, report: _Report, work: Work, task: Task) -> int:
        """Stores what one report brings, and returns how many batches it ends."""
        if report.error is not None:
            self._pace.stop()
            raise self._explain(report.error) from report.error
        again: list[Item] = []
        entries: list[tuple[str, Entry]] = []
        for answer in report.answers:
            item = answer.item
            if answer.translation is None:
                self._outcome.num_failed += 1
                work.fail(item.text, answer.reason or "")
                continue
            entry = self._entry(item, answer.translation)
            entries.append((item.text, entry))
            if self._retry_suspect and entry.suspicions and entry.attempts < MAX_ATTEMPTS:
                again.append(Item(item.text, 1))
            else:
                self._outcome.num_translated += 1
        if report.answers:
            self._memory.store(self._identity, entries)
            self._memory.release(
                self._identity, [a.item.text for a in report.answers if a.translation is None]
            )
            work.add(again)
            task.advance(len(report.answers) - len(again), failed=self._outcome.num_failed)
        return int(report.done)

    def _entry(self, item: Item, translation: str) -> Entry:
        if self._engine.limits.by_pair_id:  # the text is not known here; checked when written
            return Entry(translation, item.attempt + 1, "", ())
        found = self._checks.find(item.text, translation)
        entry = Entry(translation, item.attempt + 1, self._checks.version, found)
        if item.attempt and found:
            before = self._memory.find(self._identity, [item.text]).get(item.text)
            if before is not None and len(before.suspicions) <= len(found):
                return before._replace(attempts=entry.attempts)
        return entry

    def _say_farewell(self, under_way: int, work: Work, task: Task) -> None:
        """Keeps what workers still bring within a moment, for it has been paid for."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while under_way and (left := deadline - time.monotonic()) > 0:
            try:
                under_way -= self._keep(self._reports.get(timeout=left), work, task)
            except (queue.Empty, ClseaveError):
                return

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, ClseaveError):
            return error
        name = self._engine.identity.engine
        return TranslationError(f"engine {name}: {type(error).__name__}: {error}")
