"""The use case: files of a data set, translated into other languages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.data.languages import canonical
from clseave_cli.core.data.text_files import split_name
from clseave_cli.core.translation.engine import check_numbers, create_engine, find_engine
from clseave_cli.core.translation.job import FileSummary, Job
from clseave_cli.core.translation.memory import Memory, default_path
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress

_SPLITS = ("train", "dev", "test")
_ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class TranslationSummary:
    """What became of a whole call.

    Attributes:
        engine: name of the engine.
        model: model or service behind it.
        revision: of the model.
        licence: what the translations may be used for.
        files: one summary per file and language.
        stopped: why the run ended early, None when it did not.
    """

    engine: str
    model: str
    revision: str
    licence: str
    files: tuple[FileSummary, ...]
    stopped: str | None


def translate(config: TranslateConfig, progress: Progress = SILENT) -> TranslationSummary:
    """Translates files of a data set and writes them beside the originals.

    Under `torchrun` every process translates, through one memory; the first one writes.

    Args:
        config: what to translate, into what, by which engine.
        progress: told how far things are.

    Returns:
        what became of each file, in the order they were written.

    Raises:
        UsageError: the configuration makes no sense.
        DataError: an input is missing or has a bad row.
        TranslationError: the engine or the memory cannot work.
        Interrupted: by Ctrl-C.
    """
    find_engine(config.engine)  # refused before anything else is looked at
    source = canonical(config.source)
    langs = _languages(config, source)
    inputs = _inputs(config)
    check_numbers(config)
    summaries: list[FileSummary] = []
    stopped = None
    with Memory(config.memory or default_path()) as memory:
        for lang in langs:
            engine = create_engine(config, source, lang)
            if lang == langs[0]:
                progress.note(f"engine {config.engine}: {engine.licence}")
            try:
                for path in inputs:
                    job = Job(config, engine, memory, path, output_path(config, path, lang))
                    summaries += job.run(progress)
                    stopped = job.outcome.stopped
                    if stopped:
                        break
            finally:
                engine.close()
            if stopped:
                break
    return TranslationSummary(
        engine=engine.identity.engine,
        model=engine.identity.model,
        revision=engine.identity.revision,
        licence=engine.licence,
        files=tuple(summaries),
        stopped=stopped,
    )


def _languages(config: TranslateConfig, source: str) -> list[str]:
    langs = list(dict.fromkeys(canonical(lang) for lang in config.lang))
    if not langs:
        raise UsageError("--lang is missing: which language shall it be? For example --lang de.")
    if source in langs:
        raise UsageError(f"--lang {source}: that is the language of the input (--source).")
    return langs


def _inputs(config: TranslateConfig) -> list[Path]:
    if config.input:
        paths = list(config.input)
    else:
        paths = [path for split in config.split or _SPLITS if (path := _split_file(config, split))]
        if not paths:
            raise DataError(
                f"{config.data}: no snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl "
                "there; name the folder with --data, or files with --input."
            )
    outputs = Counter(output_path(config, path, "xx") for path in paths)
    for output, count in outputs.items():
        if count > 1:
            raise UsageError(f"two inputs would be written to {output.name}; call them one by one.")
    return paths


def _split_file(config: TranslateConfig, split: str) -> Path | None:
    for ending in _ENDINGS:
        path = config.data / f"snli_ve_{split}{ending}"
        if path.is_file():
            return path
    if config.split:
        raise DataError(
            f"{config.data / f'snli_ve_{split}.jsonl'}: no such file; is --data the right folder?"
        )
    return None


def output_path(config: TranslateConfig, path: Path, lang: str) -> Path:
    """Where the translation of a file goes: `x.jsonl.gz` → `x.de.jsonl.gz`."""
    stem, ending = split_name(path)
    return (config.out or path.parent) / f"{stem}.{lang}{ending}"
