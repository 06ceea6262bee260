"""The two use cases: files of a data set in other languages, and a split's hypotheses.

Both make the same two passes: the first has translated what the memory lacks, straight into the
memory; the second reads the translations from it. So a run may end at any moment.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clseave_cli.core.config import EngineConfig, EvaluateConfig, TranslateConfig
from clseave_cli.core.data.languages import canonical
from clseave_cli.core.data.records import Split
from clseave_cli.core.data.text_files import Row, open_text_file, split_name
from clseave_cli.core.files import locked_target
from clseave_cli.core.translation.driver import MAX_ATTEMPTS, Driver, Pace
from clseave_cli.core.translation.engine import Engine, create_engine, find_engine
from clseave_cli.core.translation.memory import Entry, Memory, default_path
from clseave_cli.core.translation.output import COUNTS, LISTS, Outputs, review_path, write_file
from clseave_cli.core.translation.quality import CHECKS, Checks, needs_translation
from clseave_cli.errors import DataError, TranslationError, UsageError
from clseave_cli.processes import is_first_process
from clseave_cli.progress import SILENT, Progress, Task

_SPLITS = ("train", "dev", "test")
_ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
_ROWS_AT_ONCE = 10_000
#: Texts held at a time while they are translated; enough to put texts of like length together.
_TEXTS_AT_ONCE = 100_000
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class FileSummary:
    """What became of one file in one language; numbers are of rows.

    Attributes:
        input: the file read.
        output: the file written, if `is_written`: it is not if no row of it would be translated.
        lang: canonical code of the language.
        num_from_memory: rows whose translation was in the memory before this run.
        num_unchanged: rows without a letter, the same in every language.
        num_failed: rows left out because there is no translation.
        num_dropped: rows left out because they are suspect.
        num_suspect: rows that at least one check marked, the dropped ones included.
        suspicions: how many rows each check marked, by its name.
        num_requests: calls made to the engine.
        failed, rejected, suspect: lists of the rows that failed, were dropped, or are suspect in a
            file that cannot mark them (plain text); None if there are none.
        review: the side-by-side sample, None if none was asked for.
    """

    input: Path
    output: Path
    lang: str
    is_written: bool
    num_rows: int
    num_from_memory: int
    num_translated: int
    num_unchanged: int
    num_failed: int
    num_dropped: int
    num_suspect: int
    suspicions: dict[str, int]
    num_requests: int
    seconds: float
    failed: Path | None
    rejected: Path | None
    suspect: Path | None
    review: Path | None


@dataclass(frozen=True)
class TranslationSummary:
    """What became of a whole call.

    Attributes:
        engine: name of the engine; `model`, `revision`: of what is behind it.
        licence: what the translations may be used for.
        files: one summary per file and language.
        stopped: why the run ended early, None if it did not.
    """

    engine: str
    model: str
    revision: str
    licence: str
    files: tuple[FileSummary, ...]
    stopped: str | None


#: A row and what the memory holds for it.
_Held = tuple[Row, Entry | None]


class _Passes:
    """The two passes over rows, which `rows` starts; `path` is for messages.

    Attributes:
        num_from_memory: rows whose translation was in the memory before `fill`.
    """

    def __init__(
        self,
        config: TranslateConfig,
        engine: Engine,
        memory: Memory,
        pace: Pace,
        path: Path,
        rows: Callable[[], Iterable[Row]],
    ) -> None:
        self._engine, self._memory, self._pace = engine, memory, pace
        self._path, self._rows = path, rows
        self._identity = memory.identity_id(engine.identity)
        self._checks = Checks(engine.identity.source, engine.identity.target)
        self._is_exact = engine.limits.text_characters is None
        self._retries_suspect = config.on_suspect == "retry" and not self._is_exact
        self.num_from_memory = 0

    def fill(self, progress: Progress) -> None:
        """The first pass: has translated what the memory lacks."""
        missing = array("Q")  # hashes, because millions of texts would fill the memory
        with progress.task(f"reading {self._path.name}", unit="rows") as task:
            for chunk in self._chunks():
                for row, entry in chunk:
                    if not self._is_final(entry):
                        missing.append(hash(self._key(row)) & _MASK)
                    self.num_from_memory += entry is not None and entry.attempts > 0
                task.advance(
                    len(chunk), from_memory=self.num_from_memory, to_translate=len(missing)
                )
        if not missing:
            return
        import numpy as np

        total = len(np.unique(np.frombuffer(missing, np.uint64)))
        driver = Driver(self._engine, self._memory, self._checks, self._pace, self._retries_suspect)
        title = f"{self._path.name} into {self._engine.identity.target}"
        with progress.task(title, total=total, unit="texts") as task:
            for texts in self._missing():
                driver.run(texts, task)
                if self._pace.stopped:
                    break

    def translations(self, task: Task | None = None) -> Iterator[tuple[Row, Entry | str]]:
        """The second pass: each row with its translation, or with the reason why it has none."""
        for chunk in self._chunks():
            without = [self._key(row) or "" for row, entry in chunk if entry is None]
            reasons = self._memory.reasons(self._identity, without) if without else {}
            default = f"not asked: {self._pace.stopped or 'its entry in the memory is damaged'}"
            for row, entry in self._checked(chunk):
                yield row, entry or reasons.get(self._key(row) or "", default)
            if task:
                task.advance(len(chunk))

    def _chunks(self) -> Iterator[list[_Held]]:
        """The rows in pieces, each row with what the memory holds for it."""
        rows = iter(self._rows())
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            keys = [self._key(row) for row in chunk]
            entries = self._memory.find(self._identity, {key for key in keys if key is not None})
            yield [
                (row, Entry(row.text, 0, "", ()) if key is None else entries.get(key))
                for row, key in zip(chunk, keys, strict=True)
            ]

    def _missing(self) -> Iterator[dict[str, int]]:
        """Texts that the memory lacks, many at a time, with the attempt each is at."""
        texts: dict[str, int] = {}
        for chunk in itertools.chain(self._chunks(), (None,)):
            for row, entry in chunk or ():
                if not self._is_final(entry):
                    texts[self._key(row) or ""] = int(entry is not None)
            if texts and (chunk is None or len(texts) >= _TEXTS_AT_ONCE):
                for text in self._memory.reasons(self._identity, texts):
                    del texts[text]
                yield texts
                texts = {}

    def _key(self, row: Row) -> str | None:
        """What the memory knows a row by; None for a text that needs no translation."""
        if self._engine.limits.by_pair_id:
            if row.pair_id is None:
                raise DataError.at(
                    self._path, row.line, "no pairID to find the translation by; try --match text."
                )
            return row.pair_id
        return row.text if self._is_exact or needs_translation(row.text) else None

    def _is_final(self, entry: Entry | None) -> bool:
        """Whether an entry is to be written as it is rather than asked for (once more)."""
        if entry is None:
            return False
        asked_once = 0 < entry.attempts < MAX_ATTEMPTS
        return not (self._retries_suspect and entry.suspicions and asked_once)

    def _checked(self, chunk: list[_Held]) -> list[_Held]:
        """The chunk, with the checks made where the memory holds none of this version."""
        version = self._checks.version
        checked: list[_Held] = []
        renewed: dict[str, Entry] = {}
        for row, entry in chunk:
            if entry is not None and entry.checked != version:
                suspicions = self._checks.find(row.text, entry.translation)
                entry = entry._replace(checked=version, suspicions=suspicions)
                if entry.attempts:
                    renewed[row.text] = entry
            checked.append((row, entry))
        # Known by its pairID, a translation may belong to rows of different texts.
        if renewed and not self._engine.limits.by_pair_id:
            self._memory.store(self._identity, renewed.items())
        return checked


def translate(config: TranslateConfig, progress: Progress = SILENT) -> TranslationSummary:
    """Translates files of a data set and writes them beside the originals.

    Under `torchrun` every process translates, through one memory; rank 0 writes.

    Raises:
        UsageError: the configuration makes no sense.
        DataError: an input is missing or has a bad row, or an output is a file of the user's.
        TranslationError: the engine or the memory cannot work.
        Interrupted: by Ctrl-C.
    """
    find_engine(config.engine)  # refused before anything else is looked at
    source = canonical(config.source)
    langs = list(dict.fromkeys(canonical(lang) for lang in config.lang))
    if not langs:
        raise UsageError("--lang is missing: choose a language, for example --lang de.")
    if source in langs:
        raise UsageError(f"--lang {source}: that is the language of the input (--source).")
    inputs = _inputs(config)
    is_first = is_first_process()
    summaries: list[FileSummary] = []
    pace: Pace | None = None
    with ExitStack() as stack:
        memory = stack.enter_context(Memory(config.memory or default_path()))
        outputs = Outputs(memory, config.overwrite)
        targets = [output_path(config, path, lang) for lang in langs for path in inputs]
        for target in targets if is_first else ():
            stack.enter_context(locked_target(target))
            outputs.check(target)
            if config.review:
                outputs.check(review_path(target))
        for lang in langs:
            engine = create_engine(config, source, lang)
            if pace is None:
                progress.note(f"engine {config.engine}: {engine.licence}")
                pace = Pace(config, engine.limits)  # one for all files and languages
            try:
                for path in inputs:
                    summary = _translate_file(config, engine, memory, outputs, pace, path, progress)
                    summaries += [summary] if summary else []
                    if pace.stopped:
                        break
            finally:
                engine.close()
            if pace.stopped:
                break
    name = engine.identity
    stopped = pace.stopped if pace else None
    return TranslationSummary(
        name.engine, name.model, name.revision, engine.licence, tuple(summaries), stopped
    )


def _translate_file(
    config: TranslateConfig,
    engine: Engine,
    memory: Memory,
    outputs: Outputs,
    pace: Pace,
    path: Path,
    progress: Progress,
) -> FileSummary | None:
    """Translates one file into one language; only rank 0 writes it and returns a summary."""
    start, num_requests = time.monotonic(), pace.num_requests
    target = output_path(config, path, engine.identity.target)
    file = open_text_file(path, config.field, engine.identity.source)
    passes = _Passes(config, engine, memory, pace, path, file.rows)
    passes.fill(progress)
    if not is_first_process():
        return None
    with progress.task(f"writing {target.name}", unit="rows") as task:
        rows = passes.translations(task)
        counts, paths = write_file(file, path, target, config, outputs, rows)
    num_asked = counts["rows"] - counts["unchanged"] - counts["failed"]
    num_from_memory = min(passes.num_from_memory, num_asked)
    numbers: dict[str, Any] = {f"num_{name}": counts[name] for name in COUNTS}
    lists: dict[str, Any] = {name: paths.get(name) for name in (*LISTS, "review")}
    return FileSummary(
        input=path,
        output=target,
        lang=engine.identity.target,
        is_written="output" in paths,
        num_from_memory=num_from_memory,
        num_translated=num_asked - num_from_memory,
        suspicions={name: counts[name] for name in CHECKS if counts[name]},
        num_requests=pace.num_requests - num_requests,
        seconds=time.monotonic() - start,
        **numbers,
        **lists,
    )


def _inputs(config: TranslateConfig) -> list[Path]:
    paths = list(config.input)
    for split in () if paths else config.split or _SPLITS:
        names = [f"snli_ve_{split}{ending}" for ending in _ENDINGS]
        found = [config.data / name for name in names if (config.data / name).is_file()]
        if config.split and not found:
            raise DataError(f"{config.data / names[0]}: no such file; is --data the right folder?")
        paths += found[:1]
    if not paths:
        raise DataError(
            f"{config.data}: no snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl "
            "there; name the folder with --data, or files with --input."
        )
    (output, count), *_ = Counter(output_path(config, path, "xx") for path in paths).most_common(1)
    if count > 1:
        raise UsageError(
            f"two inputs would be written to {output.name}; translate them one by one."
        )
    return paths


def output_path(config: TranslateConfig, path: Path, lang: str) -> Path:
    """Where the translation of a file goes: `x.jsonl.gz` → `x.de.jsonl.gz`."""
    stem, ending = split_name(path)
    return (config.out or path.parent) / f"{stem}.{lang}{ending}"


@dataclass(frozen=True)
class TranslatedHypotheses:
    """A split's hypotheses in another language.

    Attributes:
        sentences: N of them, in the split's order.
        translator: the engine, its model, the model's revision and the settings, in one line.
    """

    sentences: list[str]
    translator: str


def translate_hypotheses(
    config: EvaluateConfig, split: Split, into: str, progress: Progress = SILENT
) -> TranslatedHypotheses:
    """Translates a split's hypotheses into another language for translate-test.

    Nothing is written but the memory. `{lang}` in `--model` and `--translations` stands for the
    split's language.

    Raises:
        UsageError: the configuration makes no sense.
        TranslationError: the engine cannot work, or a hypothesis stays without translation.
        Interrupted: by Ctrl-C; what was answered is kept.
    """
    request = _translate_config(config, split.lang)
    engine = create_engine(request, canonical(split.lang), canonical(into))
    progress.note(f"{split.path} into {into}, engine {request.engine}: {engine.licence}")
    rows = [
        Row(number, text, pair_id, None)
        for number, (text, pair_id) in enumerate(zip(split.hypotheses, split.pair_ids, strict=True))
    ]
    try:
        with Memory(request.memory or default_path()) as memory:
            pace = Pace(request, engine.limits)
            passes = _Passes(request, engine, memory, pace, split.path, lambda: rows)
            passes.fill(progress)
            results = list(passes.translations())
    finally:
        engine.close()
    failures = [(row, reason) for row, reason in results if isinstance(reason, str)]
    if failures:
        row, reason = failures[0]
        raise TranslationError(
            f"{split.where(row.line)}: {len(failures)} of {len(rows)} hypotheses could not be "
            f"translated ({reason}); the others are kept: run the same command again to try only "
            "those, or choose another --engine."
        )
    entries = [entry for _, entry in results if isinstance(entry, Entry)]
    if num_suspect := sum(bool(entry.suspicions) for entry in entries):
        counts = Counter(name for entry in entries for name in entry.suspicions)
        named = ", ".join(f"{name} {counts[name]}" for name in CHECKS if counts[name])
        progress.note(
            f"{split.path}: {num_suspect} of {len(entries)} translations look suspect ({named}); "
            "they are scored as they are."
        )
    name = engine.identity
    parts = (name.engine, name.model, name.revision[:12], name.settings)
    sentences = [entry.translation for entry in entries]
    return TranslatedHypotheses(sentences, " ".join(part for part in parts if part))


def _translate_config(config: EvaluateConfig, lang: str) -> TranslateConfig:
    shared = {part.name: getattr(config, part.name) for part in dataclasses.fields(EngineConfig)}
    for name in ("model", "translations"):  # engines put in the language translated into
        if shared[name] is not None:
            shared[name] = type(shared[name])(str(shared[name]).replace("{lang}", lang))
    return TranslateConfig(
        seed=config.seed, device=config.device, precision=config.precision, **shared
    )
