"""Translates files of a data set, or a split's hypotheses.

One pass adds missing translations to the memory; the next takes all translations from it. So a run
may be interrupted at any moment.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from clseave_cli.core.config import EngineConfig, EvaluateConfig, SeededConfig, TranslateConfig
from clseave_cli.core.data.languages import canonical
from clseave_cli.core.data.records import Split
from clseave_cli.core.data.rows import EXTENSIONS, split_name
from clseave_cli.core.data.text_files import Row, open_text_file
from clseave_cli.core.files import locked_target
from clseave_cli.core.translation.driver import Driver, Pace
from clseave_cli.core.translation.engine import create_engine, find_engine
from clseave_cli.core.translation.memory import Entry, Memory
from clseave_cli.core.translation.output import COUNTS, LISTS, Outputs, review_path, write_file
from clseave_cli.core.translation.quality import CHECKS, needs_translation
from clseave_cli.errors import DataError, TranslationError, UsageError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import SILENT, Progress, Task

_SPLITS = ("train", "dev", "test")
_ROWS_AT_ONCE = 10_000
#: Texts to translate at a time, enough to batch texts of similar length.
_TEXTS_AT_ONCE = 100_000

_T = TypeVar("_T")


@dataclass(frozen=True)
class FileSummary:
    """The outcome for one file in one language; `num_*` count rows unless stated otherwise."""

    input: Path
    output: Path
    lang: str  # canonical
    is_written: bool  # False if no row was translated
    num_rows: int
    num_from_memory: int  # the translation was in the memory before
    num_translated: int
    num_unchanged: int  # without a letter, so the same in every language
    num_failed: int  # skipped, because there is no translation
    num_dropped: int  # skipped, because the translation is suspect
    num_suspect: int  # marked by any check, including dropped ones
    suspicions: dict[str, int]  # rows marked by each check
    num_requests: int  # calls made to the engine
    seconds: float
    failed: Path | None  # list of failed rows, if any
    rejected: Path | None  # list of dropped rows
    suspect: Path | None  # list of suspect rows in plain text, which cannot mark them
    review: Path | None  # the side-by-side sample


@dataclass(frozen=True)
class TranslationSummary:
    """The outcome of a whole call."""

    engine: str
    model: str
    revision: str
    licence: str  # what the translations may be used for
    files: tuple[FileSummary, ...]  # one per file and language
    stopped: str | None  # why the run ended early, if it did


#: A row with its translation, or with the reason why it has none.
_Translated = tuple[Row, Entry | str]


class _Incomplete(Exception):
    """The memory lacks translations; the argument is their number."""


class _Passes:
    """The passes over the rows of a file; `rows` returns all of them, anew for each pass.

    Attributes:
        num_from_memory: rows whose translation was in the memory before `run`.
    """

    def __init__(self, driver: Driver, path: Path, rows: Callable[[], Iterable[Row]]) -> None:
        self._driver, self._path, self._rows = driver, path, rows
        limits = driver.engine.limits
        self._by_pair_id, self._is_exact = limits.by_pair_id, limits.text_characters is None
        self.num_from_memory = 0

    def run(self, use: Callable[[Iterator[_Translated]], _T], progress: Progress) -> _T:
        """Returns the result of `use`, called with all rows and their translations.

        If a translation is missing, that call ends with an exception, and `use` is called again
        once the memory is filled. So a file that is all in the memory is read once.
        """
        with progress.task(f"reading {self._path.name}", unit="rows") as task:
            try:
                return use(self._from_memory(task))
            except _Incomplete as error:
                num_missing = error.args[0]
        target = self._driver.engine.identity.target
        with progress.task(f"{self._path.name} into {target}", num_missing, "texts") as task:
            self._fill(task)
        with progress.task(f"collecting {self._path.name} in {target}", unit="rows") as task:
            return use(self._from_all(task))

    def _from_memory(self, task: Task) -> Iterator[_Translated]:
        """Yields rows up to the first missing translation; raises `_Incomplete` at the end."""
        missing = array("q")  # hashes, because millions of texts would need too much memory
        for chunk in self._chunks():
            for _, key, entry in chunk:
                if not self._driver.is_final(entry):
                    missing.append(hash(key))
                self.num_from_memory += entry is not None and entry.attempts > 0
            task.advance(len(chunk), from_memory=self.num_from_memory, to_translate=len(missing))
            if not missing:
                yield from ((row, entry) for row, _, entry in chunk if entry)
        if missing:
            import numpy as np

            raise _Incomplete(len(np.unique(missing)))

    def _fill(self, task: Task) -> None:
        driver = self._driver
        texts: dict[str, int] = {}  # and their attempts
        for chunk in itertools.chain(self._chunks(), ([],)):
            for _, key, entry in chunk:
                if not (driver.is_final(entry) or key in driver.failures):
                    texts[key or ""] = int(entry is not None)
            if len(texts) >= _TEXTS_AT_ONCE or not chunk:
                driver.run(texts, task)
                texts = {}
                if driver.pace.stopped:
                    return

    def _from_all(self, task: Task) -> Iterator[_Translated]:
        driver = self._driver
        default = f"not asked: {driver.pace.stopped or 'its entry in the memory is damaged'}"
        for chunk in self._chunks():
            for row, key, entry in chunk:
                yield row, entry or driver.failures.get(key or "", default)
            task.advance(len(chunk))

    def _chunks(self) -> Iterator[list[tuple[Row, str | None, Entry | None]]]:
        """Rows with their keys and checked entries; a text without letters is its own entry."""
        memory, identity, checks = self._driver.memory, self._driver.identity, self._driver.checks
        rows = iter(self._rows())
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            keys = [self._key(row) for row in chunk]
            entries = memory.find(identity, {key for key in keys if key is not None})
            renewed: dict[str, Entry] = {}
            checked = []
            for row, key in zip(chunk, keys, strict=True):
                entry = Entry(row.text, 0, "", ()) if key is None else entries.get(key)
                if entry is not None and entry.checked != checks.version:
                    suspicions = checks.find(row.text, entry.translation)
                    entry = entry._replace(checked=checks.version, suspicions=suspicions)
                    if entry.attempts:
                        renewed[row.text] = entry
                checked.append((row, key, entry))
            # Stored by pairID, a translation may belong to rows of different texts.
            if renewed and not self._by_pair_id:
                memory.store(identity, renewed.items())
            yield checked

    def _key(self, row: Row) -> str | None:
        """A row's key in the memory; None for a text without letters."""
        if self._by_pair_id:
            if row.pair_id is None:
                raise DataError.at(
                    self._path, row.line, "no pairID to find the translation by; try --match text."
                )
            return row.pair_id
        return row.text if self._is_exact or needs_translation(row.text) else None


def translate(config: TranslateConfig, progress: Progress = SILENT) -> TranslationSummary:
    """Translates files of a data set and writes them beside the originals.

    Under `torchrun`, all processes translate into one memory, and rank 0 writes.

    Raises:
        UsageError: options are missing or contradict each other.
        DataError: an input is missing or has a bad row, or an output is not ours to replace.
        TranslationError: the engine or the memory fails.
        Interrupted: by Ctrl-C.
    """
    find_engine(config.engine)  # refuse an unknown engine first
    source = canonical(config.source)
    langs = list(dict.fromkeys(canonical(lang) for lang in config.lang))
    if not langs:
        raise UsageError("--lang is missing: choose a language, for example --lang de.")
    if source in langs:
        raise UsageError(f"--lang {source}: is the language of the input (--source).")
    inputs = _inputs(config)
    summaries: list[FileSummary] = []
    pace: Pace | None = None
    with ExitStack() as stack:
        memory = stack.enter_context(Memory(config.memory))
        outputs = Outputs(memory, config.overwrite)
        targets = [output_path(config, path, lang) for lang in langs for path in inputs]
        for target in targets if is_first_process() else ():
            stack.enter_context(locked_target(target))
            outputs.check(target)
            if config.review:
                outputs.check(review_path(target))
        for lang in langs:
            with closing(create_engine(config, source, lang)) as engine:
                if pace is None:
                    progress.note(f"engine {config.engine}: {engine.licence}")
                    pace = Pace(config, engine.limits)  # shared by all files and languages
                driver = Driver(config, engine, memory, pace)
                for path in inputs:
                    summary = _translate_file(config, driver, outputs, path, progress)
                    summaries += [summary] if summary else []
                    if pace.stopped:
                        break
            if pace.stopped:
                break
    name = engine.identity
    stopped = pace.stopped if pace else None
    return TranslationSummary(
        name.engine, name.model, name.revision, engine.licence, tuple(summaries), stopped
    )


def _translate_file(
    config: TranslateConfig, driver: Driver, outputs: Outputs, path: Path, progress: Progress
) -> FileSummary | None:
    """Translates one file into one language; rank 0 writes it and returns a summary."""
    start, num_requests = time.monotonic(), driver.pace.num_requests
    identity = driver.engine.identity
    target = output_path(config, path, identity.target)
    file = open_text_file(path, config.field, identity.source)
    passes = _Passes(driver, path, file.rows)
    if not is_first_process():
        passes.run(lambda rows: deque(rows, maxlen=0), progress)
        return None
    write = functools.partial(write_file, file, target, config, outputs)
    counts, paths = passes.run(write, progress)
    num_asked = counts["rows"] - counts["unchanged"] - counts["failed"]
    num_from_memory = min(passes.num_from_memory, num_asked)
    numbers: dict[str, Any] = {f"num_{name}": counts[name] for name in COUNTS}
    lists: dict[str, Any] = {name: paths.get(name) for name in (*LISTS, "review")}
    return FileSummary(
        input=path,
        output=target,
        lang=identity.target,
        is_written="output" in paths,
        num_from_memory=num_from_memory,
        num_translated=num_asked - num_from_memory,
        suspicions={name: counts[name] for name in CHECKS if counts[name]},
        num_requests=driver.pace.num_requests - num_requests,
        seconds=time.monotonic() - start,
        **numbers,
        **lists,
    )


def _inputs(config: TranslateConfig) -> list[Path]:
    paths = list(config.input)
    splits = config.split or _SPLITS

    def existing(stem: str, split: str) -> list[Path]:
        candidates = [config.data / f"{stem}_{split}{ending}" for ending in EXTENSIONS]
        return [path for path in candidates if path.is_file()]

    has_captions = config.field == "caption" and any(existing("captions", s) for s in splits)
    stem = "captions" if has_captions else "snli_ve"
    for split in () if paths else splits:
        if config.split and not existing(stem, split):
            path = config.data / f"{stem}_{split}{EXTENSIONS[0]}"
            raise DataError(f"{path}: no such file; is --data the right folder?")
        paths += existing(stem, split)[:1]
    if not paths:
        raise DataError(
            f"{config.data}: no snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl; "
            "name the folder with --data, or files with --input."
        )
    (output, count), *_ = Counter(output_path(config, path, "xx") for path in paths).most_common(1)
    if count > 1:
        raise UsageError(
            f"two inputs would be written to {output.name}; translate them one by one."
        )
    return paths


def output_path(config: TranslateConfig, path: Path, lang: str) -> Path:
    """The path of a file's translation: `x.jsonl.gz` → `x.de.jsonl.gz`."""
    stem, ending = split_name(path)
    return (config.out or path.parent) / f"{stem}.{lang}{ending}"


def translate_hypotheses(
    config: EvaluateConfig, split: Split, into: str, progress: Progress = SILENT
) -> tuple[list[str], str]:
    """Translates a split's hypotheses for translate-test, through the memory.

    `{lang}` in `--model` and `--translations` stands for the split's language.

    Returns:
        The translations in the split's order, and one line that identifies the translator.

    Raises:
        UsageError: options are missing or contradict each other.
        TranslationError: the engine fails, or a hypothesis has no translation.
        Interrupted: by Ctrl-C; answers are kept.
    """
    parts = (*dataclasses.fields(SeededConfig), *dataclasses.fields(EngineConfig))
    options = {part.name: getattr(config, part.name) for part in parts}
    for name in ("model", "translations"):  # engines would insert the target
        options[name] = options[name] and str(options[name]).replace("{lang}", split.lang)
    request = TranslateConfig(**options)
    rows = [
        Row(number, text, pair_id, None)
        for number, (text, pair_id) in enumerate(zip(split.hypotheses, split.pair_ids, strict=True))
    ]
    with (
        closing(create_engine(request, canonical(split.lang), canonical(into))) as engine,
        Memory(request.memory) as memory,
    ):
        progress.note(f"{split.path} into {into}, engine {request.engine}: {engine.licence}")
        driver = Driver(request, engine, memory, Pace(request, engine.limits))
        results = _Passes(driver, split.path, lambda: rows).run(list, progress)
    failures = [(row, reason) for row, reason in results if isinstance(reason, str)]
    if failures:
        row, reason = failures[0]
        raise TranslationError(
            f"{split.where(row.line)}: {len(failures)} of {len(rows)} hypotheses could not be "
            f"translated ({reason}); the others are kept. Run the same command again to retry, or "
            "choose another --engine."
        )
    entries = [entry for _, entry in results if isinstance(entry, Entry)]
    if num_suspect := sum(bool(entry.suspicions) for entry in entries):
        counts = Counter(name for entry in entries for name in entry.suspicions)
        named = ", ".join(f"{name} {counts[name]}" for name in CHECKS if counts[name])
        progress.note(
            f"{split.path}: {num_suspect} of {len(entries)} translations look suspect ({named}); "
            "they are scored as they are."
        )
    by = engine.identity
    translator = (by.engine, by.model, by.revision[:12], by.settings)
    return [entry.translation for entry in entries], " ".join(part for part in translator if part)
