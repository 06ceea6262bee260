"""`word-align`: which words of parallel sentences translate each other, and how right that is.

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

from clseave_cli.core.alignment.links import (
    AlignmentScore,
    Links,
    read_lines,
    read_links,
    score,
)
from clseave_cli.core.alignment.word_aligner import WordAligner, load_aligner
from clseave_cli.core.alignment.words import Words, split_words
from clseave_cli.core.config import WordAlignConfig
from clseave_cli.core.data.hub import data_folder
from clseave_cli.core.data.records import (
    distinct,
    join,
    read_split,
    require_language,
    split_path,
)
from clseave_cli.core.files import atomic_file, locked_target, writing
from clseave_cli.core.training.device import resolve_device
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import SILENT, Progress

_SEPARATOR = "|||"
#: Tried by --search: mBERT is best at the first, encoders made for similarity at the last ones.
_THRESHOLDS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3)
#: The lines of what `word-align` writes, which it may replace: links, and words.
_LINKS = re.compile(r"(\d+-\d+( |$))*")
_WORDS = re.compile(r"(.*\|\|\|.*)?")


@dataclass(frozen=True)
class WordAlignResult:
    """Links of a text.

    Attributes:
        lines: of the Pharaoh format, one for each line of the text.
        num_pairs: P, lines that are a sentence pair.
        num_links: of all pairs.
        score: against the gold links, where they were given.
        layer: whose states were compared; None: the links were read.
        threshold: likewise, the least probability.
    """

    lines: list[str]
    num_pairs: int
    num_links: int
    score: AlignmentScore | None
    layer: int | None = None
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class _Text:
    """Parallel sentences.

    Attributes:
        path: the file they come from; of two, that of the target.
        sources: P sentences.
        targets: their translations.
        source_lang: their language; None: words stand between spaces.
        lang: likewise of the targets.
        lines: (P,) the line of each pair in the file, counted from 1.
        num_lines: how many lines the file has.
    """

    path: Path
    sources: list[str]
    targets: list[str]
    source_lang: str | None
    lang: str | None
    lines: npt.NDArray[np.integer]
    num_lines: int


def align_words(config: WordAlignConfig, progress: Progress = SILENT) -> WordAlignResult:
    """Aligns the words of a text, or reads their links, writes them and scores them.

    Raises:
        ClseaveError: bad text, bad links, an unusable model, or a missing segmenter.
    """
    if config.search and (config.gold is None or config.alignments is not None):
        raise UsageError("--search: needs --gold to compare with, and no --alignments.")
    inputs = [path for path in (config.input, config.alignments, config.gold) if path is not None]
    with ExitStack() as stack:
        for target, kind in ((config.out, _LINKS), (config.words, _WORDS)):
            if target is None:
                continue
            if any(target.resolve() == path.resolve() for path in inputs):
                raise UsageError(f"{target}: is both input and output; choose another file.")
            if target.exists() and not kind.fullmatch(_first_line(target)):
                raise UsageError(
                    f"{target}: is there already, with something else in it; choose another file."
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

    def read(path: Path, first_word: int | None, gold: bool) -> Links:
        return read_links(
            path,
            num_words,
            text=str(text.path),
            lines=text.lines,
            num_lines=text.num_lines,
            first_word=first_word,
            skip_bad=config.skip_bad,
            gold=gold,
            progress=progress,
        )

    gold = None
    if config.gold is not None:
        base = None if config.gold_base == "auto" else int(config.gold_base)
        gold = read(config.gold, base, gold=True)
    if config.words is not None:
        shown = (
            f"{' '.join(source_words.of(source))} {_SEPARATOR} {' '.join(target_words.of(target))}"
            for source, target in pairs.T
        )
        _write(config.words, _placed(shown, text))
    if config.alignments is not None:
        links, aligner = read(config.alignments, 0, gold=False), None
    else:
        aligner = load_aligner(config, config.aligner, resolve_device(config.device), progress)
        if config.search and gold is not None:
            aligner = _best(aligner, gold, source_words, target_words, pairs, progress)
        links = aligner.align(source_words, target_words, pairs, progress=progress)
    lines = _placed(links.lines(), text)
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
    """The aligner with the layer and threshold that agree best with gold links."""
    tried = [aligner.having(*values) for values in itertools.product(aligner.layers, _THRESHOLDS)]
    rates = []
    with progress.task("layers and thresholds", len(tried), "settings") as task:
        for candidate in tried:
            rates.append(score(candidate.align(source, target, pairs), gold).error_rate)
            task.advance(1)
    return tried[int(np.argmin(rates))]


def _read_file(path: Path) -> _Text:
    """A text of `source ||| target` lines, as aligners read it: words stand between spaces."""
    content = read_lines(path, "lines of source ||| target") or [""]
    rows = [line.split(_SEPARATOR) for line in content]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError.at(
                path, number, f"{len(row) - 1} times |||; expected source ||| target."
            )
    sources, targets = ([side.strip() for side in column] for column in zip(*rows, strict=True))
    return _Text(path, sources, targets, None, None, np.arange(1, len(rows) + 1), len(rows))


def _read_data(config: WordAlignConfig, progress: Progress) -> _Text:
    """The source sentences of a split and their translations."""
    lang, source_lang = config.lang, config.source_lang
    if lang is None:
        raise UsageError("--lang is missing; for example --lang de, or --input FILE.")
    require_language(lang)
    require_language(source_lang, "--source-lang")
    if lang == source_lang:
        raise UsageError(
            f"--lang {lang}: is --source-lang too; name the language of the translations."
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
    return _Text(
        target.path,
        parallel.sources,
        parallel.target.hypotheses,
        source_lang,
        lang,
        parallel.target.lines,
        target.num_lines,
    )


def _placed(of_pairs: Iterable[str], text: _Text) -> list[str]:
    """What belongs to the pairs, in the lines where they stand."""
    lines = [""] * text.num_lines
    for line, content in zip(text.lines.tolist(), of_pairs, strict=True):
        lines[line - 1] = content
    return lines


def _write(path: Path, lines: Iterable[str]) -> None:
    with atomic_file(path) as stream:
        stream.writelines(f"{line}\n".encode() for line in lines)
