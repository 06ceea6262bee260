"""`word-align`: links words of parallel sentences that translate each other, and scores the links.

Legend: P sentence pairs.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clseave_cli.core.alignment.links import AlignmentScore, Links, read_lines, read_links, score
from clseave_cli.core.alignment.word_aligner import WordAligner, load_aligner
from clseave_cli.core.alignment.words import Words, split_words
from clseave_cli.core.config import WordAlignConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.records import distinct, join, read_split, require_language, split_path
from clseave_cli.core.files import atomic_file, locked_target, writing
from clseave_cli.core.training.device import resolve_device
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress

_SEPARATOR = "|||"
#: Candidates of --search. The lowest suits mBERT, the highest encoders trained for similarity.
_THRESHOLDS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3)
#: First lines of the files that `word-align` writes and may replace.
_LINKS = re.compile(r"(\d+-\d+( |$))*")
_WORDS = re.compile(r"(.*\|\|\|.*)?")


@dataclass(frozen=True)
class WordAlignResult:
    """The links of a text; layer and threshold are None if `--alignments` gave the links."""

    lines: list[str]  # Pharaoh format, one for each line of the text
    num_pairs: int
    num_links: int
    score: AlignmentScore | None  # agreement with `--gold`
    layer: int | None = None
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class _Text:
    """P sentence pairs; sentences without a language are split at spaces."""

    path: Path  # the file; of two, that of the targets
    sources: list[str]
    targets: list[str]
    source_lang: str | None
    lang: str | None
    lines: npt.NDArray[np.integer]  # (P,) line of each pair in the file, from 1
    num_lines: int


def align_words(config: WordAlignConfig, progress: Progress = SILENT) -> WordAlignResult:
    """Aligns the words of a text, or reads their links, writes them and scores them.

    Raises:
        ClseaveError: bad text, bad links, an unusable model, or a missing segmenter.
    """
    if config.search and (config.gold is None or config.alignments is not None):
        raise UsageError("--search: needs --gold to compare with, and no --alignments.")
    if config.out and config.words and config.out.resolve() == config.words.resolve():
        raise UsageError(f"--out and --words: both are {config.out}; name two files.")
    inputs = [path for path in (config.input, config.alignments, config.gold) if path is not None]
    with ExitStack() as stack:
        for name, first_line in (("out", _LINKS), ("words", _WORDS)):
            target: Path | None = getattr(config, name)
            if target is None:
                continue
            if target.is_dir():
                raise UsageError(
                    f"--{name} {target}: is a folder; name a file, such as {target / name}.txt."
                )
            if any(target.resolve() == path.resolve() for path in inputs):
                raise UsageError(f"{target}: is both input and output; choose another file.")
            if target.exists() and not first_line.fullmatch(_first_line(target)):
                raise UsageError(
                    f"{target}: exists already with other content; choose another file."
                )
            stack.enter_context(locked_target(target))
        return _align_words(config, progress)


def _first_line(path: Path) -> str:
    with writing(path), path.open(encoding="utf-8", errors="replace") as stream:
        return stream.readline(1 << 20).rstrip("\n")


def _align_words(config: WordAlignConfig, progress: Progress) -> WordAlignResult:
    text = _read_file(config.input) if config.input is not None else _read_data(config, progress)
    sources, source_of_pair = distinct(text.sources)
    targets, target_of_pair = distinct(text.targets)
    source_words = split_words(sources, text.source_lang)
    target_words = split_words(targets, text.lang)
    pairs = np.stack([source_of_pair, target_of_pair])
    num_words = np.stack([source_words.counts[pairs[0]], target_words.counts[pairs[1]]], axis=1)
    read = functools.partial(
        read_links,
        num_words=num_words,
        text=str(text.path),
        lines=text.lines,
        num_lines=text.num_lines,
        skip_bad=config.skip_bad,
        progress=progress,
    )
    gold = None
    if config.gold is not None:
        first_word = None if config.gold_base == "auto" else int(config.gold_base)
        gold = read(config.gold, first_word=first_word, gold=True)
    if config.words is not None:
        spaced = (
            f"{' '.join(source_words.of(source))} {_SEPARATOR} {' '.join(target_words.of(target))}"
            for source, target in pairs.T
        )
        _write(config.words, _by_line(spaced, text))
    if config.alignments is not None:
        links, aligner = read(config.alignments), None
    else:
        aligner = load_aligner(config, config.aligner, resolve_device(config.device), progress)
        if config.search and gold is not None:
            aligner = _best(aligner, gold, source_words, target_words, pairs, progress)
        links = aligner.align(source_words, target_words, pairs, progress=progress)
    lines = _by_line(links.lines(), text)
    if config.out is not None:
        _write(config.out, lines)
    return WordAlignResult(
        lines,
        len(links),
        len(links.words),
        None if gold is None else score(links, gold),
        None if aligner is None else aligner.layer,
        None if aligner is None else aligner.threshold,
    )


def _best(
    aligner: WordAligner,
    gold: Links,
    source: Words,
    target: Words,
    pairs: npt.NDArray[np.intp],
    progress: Progress,
) -> WordAligner:
    """The aligner whose layer and threshold have the lowest error rate against gold links."""
    settings = itertools.product(aligner.layers, _THRESHOLDS)
    candidates = [aligner.having(layer, threshold) for layer, threshold in settings]
    rates = []
    with progress.task("layers and thresholds", len(candidates), "settings") as task:
        for candidate in candidates:
            rates.append(score(candidate.align(source, target, pairs), gold).error_rate)
            task.advance(1)
    return candidates[int(np.argmin(rates))]


def _read_file(path: Path) -> _Text:
    """Reads `source ||| target` lines, the usual input of aligners, with words between spaces."""
    content = read_lines(path, "lines of source ||| target") or [""]
    rows = [line.split(_SEPARATOR) for line in content]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError.at(
                path, number, f"||| occurs {len(row) - 1} times; expected source ||| target."
            )
    sources, targets = ([side.strip() for side in column] for column in zip(*rows, strict=True))
    return _Text(path, sources, targets, None, None, np.arange(1, len(rows) + 1), len(rows))


def _read_data(config: WordAlignConfig, progress: Progress) -> _Text:
    """Reads a split in two languages."""
    lang, source_lang = config.lang, config.source_lang
    if lang is None:
        raise UsageError("--lang is missing; for example --lang de, or --input FILE.")
    require_language(lang)
    require_language(source_lang, "--source-lang")
    if lang == source_lang:
        raise UsageError(
            f"--lang {lang}: is --source-lang, too; name the language of the translations."
        )
    folder = data_folder(config.data, progress)
    read = functools.partial(
        read_split,
        folder,
        config.split,
        labelled=False,
        with_images=False,
        source_lang=source_lang,
        skip_bad=config.skip_bad,
        progress=progress,
    )
    target = read(lang)
    source = read(source_lang) if split_path(folder, config.split, source_lang) else None
    parallel = join(target, source, source_lang)
    if parallel.num_unmatched_target:
        progress.note(
            f"{target.path}: {parallel.num_unmatched_target} rows have no {source_lang} "
            "row; their lines stay empty."
        )
    joined = parallel.target
    sides = parallel.sources, joined.hypotheses, source_lang, lang
    return _Text(target.path, *sides, joined.lines, target.num_lines)


def _by_line(contents: Iterable[str], text: _Text) -> list[str]:
    """Puts the contents of the P pairs into the lines of their file; other lines stay empty."""
    lines = [""] * text.num_lines
    for line, content in zip(text.lines.tolist(), contents, strict=True):
        lines[line - 1] = content
    return lines


def _write(path: Path, lines: Iterable[str]) -> None:
    with atomic_file(path) as stream:
        stream.writelines(f"{line}\n".encode() for line in lines)
