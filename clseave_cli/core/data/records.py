"""SNLI-VE-shaped data: reading a split, refusing bad rows, joining two languages.

A split is a file `snli_ve_{split}.jsonl` (other languages `snli_ve_{split}.{lang}.jsonl`), or the
same in another format, or without the `snli_ve_` prefix, or `{lang}/{split}` as IGLUE lays XVNLI
out. Rows are kept as columns: half a million pairs are a few lists and arrays, not half a
million objects.

The caption (`sentence1`) is never read: it would leak a text premise into the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clseave_cli.core.data.rows import (
    EXTENSIONS,
    HYPOTHESIS_KEYS,
    ID_KEYS,
    IMAGE_KEYS,
    LABEL_KEYS,
    SUSPECT_FIELD,
    BadRow,
    first_value,
    image_name,
    json_line,
    json_rows,
    missing,
    read_rows,
    reading,
    require_text,
    short,
    split_name,
)
from clseave_cli.core.files import atomic_file, file_digest
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABEL_IDS, LABELS, UNLABELLED
from clseave_cli.progress import SILENT, Progress

#: The language whose file may go without a suffix; the source language unless it is said.
ENGLISH = "en"

#: Endings of the images that are read.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
#: Endings that name an image; a year (`holiday.2021`) is none.
_IMAGE_ENDINGS = (*IMAGE_EXTENSIONS, ".tif", ".tiff", ".heic", ".avif")

_NO_MAJORITY = "-"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{4})?(-[A-Z]{2})?")


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split in one language, as columns of equal length N.

    Attributes:
        name: split name, such as `train`.
        lang: language code of the hypotheses.
        path: the file they were read from.
        pair_ids: unique row ids.
        hypotheses: sentences in `lang`.
        sources: the source sentence kept beside each translated one; None where there is none.
        labels: (N,) int8, an id of `labels.LABELS` or `UNLABELLED`.
        image_names: the distinct images, as the file names them.
        image_index: (N,) int32 into `image_names`; -1 where the row names no image.
        lines: (N,) int32, 1-based line (or row) numbers in the file.
        num_lines: how many lines the file has, to the last row.
        digest: BLAKE2b-256 of the file.
    """

    name: str
    lang: str
    path: Path
    pair_ids: list[str]
    hypotheses: list[str]
    sources: list[str | None]
    labels: npt.NDArray[np.int8]
    image_names: list[str]
    image_index: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    num_lines: int
    digest: str

    def __len__(self) -> int:
        return len(self.pair_ids)

    def where(self, row: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{self.path}:{self.lines[row]}"

    def take(self, rows: npt.NDArray[np.intp]) -> Split:
        """The split with only the given rows, in the given order."""
        kept_images, image_index = np.unique(self.image_index[rows], return_inverse=True)
        names = [self.image_names[i] for i in kept_images if i >= 0]
        if len(kept_images) and kept_images[0] < 0:
            image_index = image_index - 1
        return dataclasses.replace(
            self,
            pair_ids=[self.pair_ids[i] for i in rows],
            hypotheses=[self.hypotheses[i] for i in rows],
            sources=[self.sources[i] for i in rows],
            labels=self.labels[rows],
            image_names=names,
            image_index=image_index.astype(np.int32),
            lines=self.lines[rows],
        )


@dataclass(frozen=True, eq=False)
class Parallel:
    """Sentences of two languages that belong together, joined by `pairID`.

    Attributes:
        target: the rows of the target language that have a counterpart, M of them.
        sources: the M sentences in the source language.
        num_unmatched_target: rows of the target file without a row in the source language.
        num_unmatched_source: rows of the source language's file without a target row.
        unmatched_examples: a few of those `pairID`s, to look at.
    """

    target: Split
    sources: list[str]
    num_unmatched_target: int
    num_unmatched_source: int
    unmatched_examples: tuple[str, ...]

    def take(self, rows: npt.NDArray[np.intp]) -> Parallel:
        """Only the given rows, in the given order."""
        return dataclasses.replace(
            self, target=self.target.take(rows), sources=[self.sources[i] for i in rows]
        )


def is_language(lang: str) -> bool:
    """Whether this is a language code such as `de`, `zh-Hant` or `pt-BR`."""
    return _LANGUAGE.fullmatch(lang) is not None


def require_language(lang: str, flag: str = "--lang") -> None:
    """Refuses what is no language code: it becomes part of file names.

    Raises:
        UsageError: not of the form `de`, `zh-Hant` or `pt-BR`; names the flag.
    """
    if not is_language(lang):
        raise UsageError(f"{flag} {lang}: not a language code; expected one such as de, ja or zh.")


def split_path(folder: Path, split: str, lang: str) -> Path | None:
    """The file of a split in a language, or None."""
    stems = [f"snli_ve_{split}.{lang}", f"{split}.{lang}", f"{lang}/{split}"]
    if lang == ENGLISH:
        stems = [f"snli_ve_{split}", *stems, split]
    for stem in stems:
        for extension in EXTENSIONS:
            path = folder / (stem + extension)
            if path.is_file():
                return path
    return None


def languages(folder: Path, split: str) -> list[str]:
    """Codes of the languages a split is there in, English first, then by name."""
    endings = "|".join(map(re.escape, EXTENSIONS))
    pattern = re.compile(rf"(?:snli_ve_)?{re.escape(split)}\.({_LANGUAGE.pattern})(?:{endings})")
    names = [path.name for path in folder.iterdir()]
    codes = {match[1] for name in names if (match := pattern.fullmatch(name))}
    codes |= {name for name in names if _LANGUAGE.fullmatch(name)} | {ENGLISH}
    existing = [lang for lang in codes if split_path(folder, split, lang)]
    return sorted(existing, key=lambda lang: (lang != ENGLISH, lang))


def require_split_path(folder: Path, split: str, lang: str) -> Path:
    """The file of a split in a language.

    Raises:
        DataError: the folder or the file is not there.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such data folder; expected one with snli_ve_{split}.jsonl "
            "(choose the folder with --data DIR)."
        )
    try:
        path = split_path(folder, split, lang)
        there = "" if path else ", ".join(languages(folder, split)) or "none"
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}).") from None
    if path is None:
        suffix = "" if lang == ENGLISH else f".{lang}"
        advice = f" `clseave translate --lang {lang}` makes it." if lang != ENGLISH else ""
        raise DataError(
            f"{folder}: no snli_ve_{split}{suffix}.jsonl "
            f"(languages of the split {split} there: {there}).{advice}"
        )
    return path


def read_split(
    folder: Path,
    split: str,
    lang: str = ENGLISH,
    *,
    labelled: bool = True,
    with_images: bool = True,
    source_lang: str = ENGLISH,
    skip_bad: bool = False,
    skip_suspect: bool | None = None,
    progress: Progress = SILENT,
) -> Split:
    """Reads and checks one split in one language.

    Args:
        folder: the data folder.
        split: name of the split.
        lang: language code.
        labelled: rows need a label; those with SNLI's `-` are dropped and counted. Otherwise
            labels are taken where they are, and `-` rows stay.
        with_images: rows need an image name.
        source_lang: language of the sentences kept beside translated ones (`sentence2_en`).
        skip_bad: set bad rows aside in `{file}.rejected.jsonl` instead of refusing the file.
        skip_suspect: leave out rows marked `translation_suspect`; False: tell how many there are;
            None: ignore the marks.
        progress: told what was left out.

    Raises:
        DataError: a missing file, or the first bad row, named by file and line.
    """
    path = require_split_path(folder, split, lang)
    columns = _Columns(labelled, with_images, f"sentence2_{source_lang}", bool(skip_suspect))
    rejected: list[dict[str, Any]] = []
    line = 0
    for line, row, _ in read_rows(path, columns.keys):
        try:
            columns.add(line, row)
        except BadRow as bad:
            if not skip_bad:
                raise DataError.at(
                    path, line, f"{bad} Fix the row, or set such rows aside with --skip-bad."
                ) from None
            kept = bad.text if isinstance(row, BadRow) else row
            rejected.append({"line": line, "reason": str(bad), "row": kept})
    columns.tell(path, skip_suspect, progress)
    if not columns.pair_ids:
        reason = "expected one JSON object a line, or a table with a header"
        if columns.num_dropped or columns.num_suspect:
            reason = "all are left out"
        if rejected:
            first = rejected[0]
            reason = f"all {len(rejected)} are bad, as line {first['line']}: {first['reason']}"
        raise DataError(f"{path}: no usable rows; {reason.removesuffix('.')}.")
    if rejected:
        progress.note(
            f"{path}: {len(rejected)} bad rows set aside in {_write_rejected(path, rejected)}."
        )
    return Split(
        name=split,
        lang=lang,
        path=path,
        pair_ids=columns.pair_ids,
        hypotheses=columns.hypotheses,
        sources=columns.sources,
        labels=np.array(columns.labels, dtype=np.int8),
        image_names=list(columns.image_ids),
        image_index=np.array(columns.image_index, dtype=np.int32),
        lines=np.array(columns.lines, dtype=np.int32),
        num_lines=line,
        digest=file_digest(path),
    )


def join(target: Split, source: Split | None, source_lang: str = ENGLISH) -> Parallel:
    """Brings a translated split together with its source sentences, by `pairID` only.

    Args:
        target: the translated rows.
        source: the rows in the source language; None takes the sentence kept beside each
            translation (`sentence2_en`).
        source_lang: the source language.

    Raises:
        DataError: nothing matches, or rows lack the sentence that has to stand beside them.
    """
    if source is None:
        sources = [sentence for sentence in target.sources if sentence is not None]
        if len(sources) < len(target):
            key, num_missing = f"sentence2_{source_lang}", len(target) - len(sources)
            raise DataError(
                f"{target.where(target.sources.index(None))}: no {key}, nor in {num_missing - 1} "
                f"other rows of {len(target)}; expected it in every row, or a file of the split "
                f"{target.name} in {source_lang}."
            )
        return Parallel(target, sources, 0, 0, ())
    by_id = dict(zip(source.pair_ids, source.hypotheses, strict=True))
    rows = [i for i, pair_id in enumerate(target.pair_ids) if pair_id in by_id]
    if not rows:
        raise DataError(
            f"{target.path}: none of its pairIDs occurs in {source.path} "
            f"(first here {target.pair_ids[0]!r}, first there {source.pair_ids[0]!r})."
        )
    matched = target if len(rows) == len(target) else target.take(np.array(rows))
    target_ids = set(target.pair_ids)
    strays = [p for p in target.pair_ids if p not in by_id][:3]
    strays += [p for p in source.pair_ids if p not in target_ids][:3]
    return Parallel(
        target=matched,
        sources=[by_id[pair_id] for pair_id in matched.pair_ids],
        num_unmatched_target=len(target) - len(matched),
        num_unmatched_source=len(source) - len(matched),
        unmatched_examples=tuple(strays[:3]),
    )


def check_leak(first: Split, second: Split) -> None:
    """Refuses two splits that share an image.

    Raises:
        DataError: they do; names the count and an example.
    """
    stems = {image_stem(name) for name in first.image_names}
    shared = [name for name in second.image_names if image_stem(name) in stems]
    if shared:
        raise DataError(
            f"{second.path}: {len(shared)} of its images are also in {first.path}, such as "
            f"{shared[0]}; what is measured on them would not count. "
            "--allow-leak permits it."
        )


def distinct(values: Sequence[str]) -> tuple[list[str], npt.NDArray[np.intp]]:
    """The distinct values in order of first occurrence, and for every value which one it is."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.intp)
    return list(numbers), index


def image_stem(name: str) -> str:
    """An image's name without its extension: `123.jpg` and `123` are the same image."""
    stem, _, extension = name.rpartition(".")
    return stem if stem and f".{extension.lower()}" in _IMAGE_ENDINGS else name


def are_first(values: Sequence[str], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which values come first in a random order that is the same wherever they stand."""
    keys = [hashlib.blake2b(f"{seed} {v}".encode(), digest_size=16).digest() for v in values]
    first = np.zeros(len(values), dtype=bool)
    first[sorted(range(len(keys)), key=keys.__getitem__)[:count]] = True
    return first


def hold_out_images(
    split: Split, name: str, fraction: float, seed: int, progress: Progress = SILENT
) -> tuple[Split, Split]:
    """Divides a split by its images where another split has no file.

    Args:
        split: the rows to divide.
        name: of the split that has no file.
        fraction: share of the images that go there, with all their rows.
        seed: of the choice, which depends on the images' names alone.
        progress: told what is held out.

    Returns:
        What is left of the split, and the split held out.

    Raises:
        DataError: there are too few images.
    """
    stems, stem_of_image = distinct([image_stem(image) for image in split.image_names])
    num_held = max(1, round(fraction * len(stems)))
    if num_held >= len(stems):
        raise DataError(
            f"{split.path}: {len(stems)} images are too few to hold out {fraction:.0%} of them; "
            f"give a file for the split {name}, or a smaller --dev-fraction."
        )
    held = are_first(stems, num_held, seed)[stem_of_image][split.image_index]
    kept, held_out = split.take(np.flatnonzero(~held)), split.take(np.flatnonzero(held))
    progress.note(
        f"{split.path.parent}: no file for the split {name}; holding out {num_held} of "
        f"{len(stems)} images of {split.path.name} with their {len(held_out)} rows instead."
    )
    return kept, dataclasses.replace(held_out, name=name)


@dataclass
class _Columns:
    labelled: bool
    with_images: bool
    source_key: str
    skip_suspect: bool
    pair_ids: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    sources: list[str | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_ids: dict[str, int] = field(default_factory=dict)
    image_index: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    num_dropped: int = 0
    num_suspect: int = 0
    first_line: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys that are looked at."""
        keys = {*ID_KEYS, *HYPOTHESIS_KEYS, *LABEL_KEYS, *IMAGE_KEYS}
        return keys | {self.source_key, SUSPECT_FIELD}

    def add(self, line: int, row: Any) -> None:
        """Takes in a row.

        Raises:
            BadRow: it cannot be used.
        """
        pair_id = require_text(row, ID_KEYS, "the row's unique id")
        hypothesis = require_text(row, HYPOTHESIS_KEYS, "the hypothesis")
        label, image = self._label(row), self._image(row)
        source = row.get(self.source_key)
        if source is not None:
            source = require_text(row, (self.source_key,), "the sentence that was translated")
        if pair_id in self.first_line:
            raise BadRow(
                f"pairID {pair_id!r} stands already in line {self.first_line[pair_id]}; "
                "every row needs its own."
            )
        self.first_line[pair_id] = line
        if label is None:
            self.num_dropped += 1
            return
        if row.get(SUSPECT_FIELD):
            self.num_suspect += 1
            if self.skip_suspect:
                return
        self.pair_ids.append(pair_id)
        self.hypotheses.append(hypothesis)
        self.labels.append(label)
        self.lines.append(line)
        self.image_index.append(
            -1 if image is None else self.image_ids.setdefault(image, len(self.image_ids))
        )
        self.sources.append(source)

    def tell(self, path: Path, skip_suspect: bool | None, progress: Progress) -> None:
        """Tells what was left out, or should perhaps be."""
        if self.num_dropped:
            progress.note(f"{path}: {self.num_dropped} rows without a majority label (-) left out.")
        if self.num_suspect and skip_suspect is not None:
            rest = "left out" if skip_suspect else "used; --skip-suspect leaves them out"
            progress.note(f"{path}: {self.num_suspect} rows marked {SUSPECT_FIELD} {rest}.")

    def _label(self, row: dict[str, Any]) -> int | None:
        value = first_value(row, LABEL_KEYS)
        if isinstance(value, str) and value in LABEL_IDS:
            return LABEL_IDS[value]
        if value == _NO_MAJORITY:
            return None if self.labelled else UNLABELLED
        if not self.labelled and value is None:
            return UNLABELLED
        expected = f"one of {', '.join(LABELS)}"
        if value is None:
            raise BadRow(missing(row, LABEL_KEYS, expected))
        raise BadRow(f"{LABEL_KEYS[0]} is {short(value)}; expected {expected}.")

    def _image(self, row: dict[str, Any]) -> str | None:
        value = image_name(row)
        if isinstance(value, str) and value.strip():
            return value
        if value is None:
            if self.with_images:
                raise BadRow(missing(row, IMAGE_KEYS, "the image's name"))
            return None
        raise BadRow(f"{IMAGE_KEYS[0]} is {short(value)}; expected the image's name.")


def _write_rejected(path: Path, rejected: list[dict[str, Any]]) -> Path:
    target = path.with_name(split_name(path)[0] + ".rejected.jsonl")
    if target.exists():
        with reading(target) as stream:
            _, first, _ = next(json_rows(stream), (0, {}, b""))
        if not isinstance(first, dict) or first.keys() != rejected[0].keys():
            raise DataError(
                f"{target}: is there already and --skip-bad did not write it; move it away, the "
                "bad rows are set aside there."
            )
    with atomic_file(target) as stream:
        for entry in rejected:
            try:
                stream.write(json_line(entry))
            except RecursionError:
                stream.write(json_line(entry | {"row": short(entry["row"])}))
    return target
