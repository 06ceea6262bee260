"""SNLI-VE-shaped data: reading a split, refusing bad rows, joining two languages.

A split is a file `snli_ve_{split}.jsonl` (other languages `snli_ve_{split}.{lang}.jsonl`), or the
same as `.csv` or `.parquet`, or without the `snli_ve_` prefix, or `{lang}/{split}` as IGLUE lays
XVNLI out. Rows are kept as columns: half a million pairs are a few lists and arrays, not half a
million objects.

The caption (`sentence1`) is never read: it would leak a text premise into the model.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from clseave_cli.core.files import atomic_file, file_digest
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABEL_IDS, LABELS, UNLABELLED
from clseave_cli.progress import SILENT, Progress

#: The language whose file may go without a suffix; the source language unless it is said.
ENGLISH = "en"

ID_KEYS = ("pairID", "pair_id")
HYPOTHESIS_KEYS = ("sentence2", "hypothesis")
LABEL_KEYS = ("gold_label", "label")
#: SNLI-VE, XVNLI and e-SNLI-VE spell it each in its own way.
IMAGE_KEYS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image")

_NO_MAJORITY = "-"
_EXTENSIONS = (".jsonl", ".csv", ".parquet")
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
        sources: the source sentence beside each translated one, where the file keeps it.
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
    sources: list[str] | None
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
            sources=None if self.sources is None else [self.sources[i] for i in rows],
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
        for extension in _EXTENSIONS:
            path = folder / (stem + extension)
            if path.is_file():
                return path
    return None


def languages(folder: Path, split: str) -> list[str]:
    """Codes of the languages a split is there in, English first, then by name."""
    pattern = re.compile(
        rf"(?:snli_ve_)?{re.escape(split)}\.({_LANGUAGE.pattern})(?:{'|'.join(_EXTENSIONS)})"
    )
    names = [path.name for path in folder.iterdir()]
    found = {match[1] for name in names if (match := pattern.fullmatch(name))}
    found |= {name for name in names if _LANGUAGE.fullmatch(name)} | {ENGLISH}
    found = {lang for lang in found if split_path(folder, split, lang)}
    return sorted(found, key=lambda lang: (lang != ENGLISH, lang))


def require_split_path(folder: Path, split: str, lang: str) -> Path:
    """The file of a split in a language.

    Raises:
        DataError: the folder or the file is not there.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such data folder; expected one with snli_ve_{split}.jsonl "
            "(--data DIR says where)."
        )
    path = split_path(folder, split, lang)
    if path is None:
        suffix = "" if lang == ENGLISH else f".{lang}"
        there = ", ".join(languages(folder, split)) or "none"
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
        progress: told what was left out.

    Raises:
        DataError: a missing file, or the first bad row, named by file and line.
    """
    path = require_split_path(folder, split, lang)
    columns = _Columns(labelled, with_images, f"sentence2_{source_lang}")
    rejected: list[dict[str, Any]] = []
    line = 0
    for line, row in _rows(path):
        try:
            columns.add(line, row)
        except _BadRow as bad:
            if not skip_bad:
                raise DataError.at(
                    path, line, f"{bad} Mend the row, or set such rows aside with --skip-bad."
                ) from None
            kept = bad.text if isinstance(row, _BadRow) else row
            rejected.append({"line": line, "reason": str(bad), "row": kept})
    if skip_bad and rejected:
        progress.note(
            f"{path}: {len(rejected)} bad rows set aside in {_write_rejected(path, rejected)}."
        )
    if columns.num_dropped:
        progress.note(f"{path}: {columns.num_dropped} rows without a majority label (-) left out.")
    if not columns.pair_ids:
        raise DataError(f"{path}: no usable rows; expected one JSON object a line.")
    return Split(
        name=split,
        lang=lang,
        path=path,
        pair_ids=columns.pair_ids,
        hypotheses=columns.hypotheses,
        sources=columns.sources if len(columns.sources) == len(columns.pair_ids) else None,
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
        DataError: nothing matches.
    """
    if source is None:
        if target.sources is None:
            raise DataError(
                f"{target.path}: no sentences in the source language {source_lang}: neither a file "
                f"of the split {target.name} in it nor the key sentence2_{source_lang} in the rows."
            )
        return Parallel(target, target.sources, 0, 0, ())
    by_id = dict(zip(source.pair_ids, source.hypotheses, strict=True))
    rows = [i for i, pair_id in enumerate(target.pair_ids) if pair_id in by_id]
    if not rows:
        raise DataError(
            f"{target.path}: none of its pairIDs occurs in {source.path} "
            f"(first here {target.pair_ids[0]!r}, first there {source.pair_ids[0]!r})."
        )
    matched = target if len(rows) == len(target) else target.take(np.array(rows))
    known = set(target.pair_ids)
    strays = [p for p in target.pair_ids if p not in by_id][:3]
    strays += [p for p in source.pair_ids if p not in known][:3]
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
    stem, dot, extension = name.rpartition(".")
    return stem if dot and 3 <= len(extension) <= 4 and extension.isalnum() and stem else name


class _BadRow(Exception):
    """Why a row cannot be used; `text` is its line where that could not be parsed."""

    def __init__(self, reason: str, text: bytes = b"") -> None:
        super().__init__(reason)
        self.text = text.decode(errors="replace").rstrip("\n")


@dataclass
class _Columns:
    labelled: bool
    with_images: bool
    source_key: str
    pair_ids: list[str] = field(default_factory=list)
    hypotheses: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_ids: dict[str, int] = field(default_factory=dict)
    image_index: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    num_dropped: int = 0
    first_line: dict[str, int] = field(default_factory=dict)

    def add(self, line: int, row: Any) -> None:
        if isinstance(row, _BadRow):
            raise row
        if not isinstance(row, dict):
            raise _BadRow(f"expected a JSON object, found {type(row).__name__}.")
        pair_id = _text(row, ID_KEYS, "the row's unique id")
        hypothesis = _text(row, HYPOTHESIS_KEYS, "the hypothesis")
        label = self._label(row)
        image = self._image(row)
        if pair_id in self.first_line:
            raise _BadRow(
                f"pairID {pair_id!r} stands already in line {self.first_line[pair_id]}; "
                "every row needs its own."
            )
        self.first_line[pair_id] = line
        if label is None:
            self.num_dropped += 1
            return
        self.pair_ids.append(pair_id)
        self.hypotheses.append(hypothesis)
        self.labels.append(label)
        self.lines.append(line)
        self.image_index.append(
            -1 if image is None else self.image_ids.setdefault(image, len(self.image_ids))
        )
        source = row.get(self.source_key)
        if isinstance(source, str):
            self.sources.append(source)

    def _label(self, row: dict[str, Any]) -> int | None:
        value = _find(row, LABEL_KEYS)
        if isinstance(value, str) and value in LABEL_IDS:
            return LABEL_IDS[value]
        if value == _NO_MAJORITY:
            return None if self.labelled else UNLABELLED
        if not self.labelled and value is None:
            return UNLABELLED
        expected = ", ".join(LABELS)
        if value is None:
            raise _BadRow(f"no {LABEL_KEYS[0]}; expected one of {expected}.")
        raise _BadRow(f"{LABEL_KEYS[0]} is {_short(value)}; expected one of {expected}.")

    def _image(self, row: dict[str, Any]) -> str | None:
        value = _find(row, IMAGE_KEYS)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value
        if not self.with_images and value is None:
            return None
        if value is None:
            raise _BadRow(f"no {IMAGE_KEYS[0]}; expected the image's name.")
        raise _BadRow(f"{IMAGE_KEYS[0]} is {_short(value)}; expected the image's name.")


def _find(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key in keys:
        if key in row:
            return row[key]
    return None


def _text(row: dict[str, Any], keys: tuple[str, ...], meaning: str) -> str:
    value = _find(row, keys)
    if value is None:
        raise _BadRow(f"no {keys[0]}; expected {meaning}.")
    if not isinstance(value, str):
        raise _BadRow(f"{keys[0]} is {_short(value)}; expected {meaning} as text.")
    if not value.strip():
        raise _BadRow(f"{keys[0]} is empty; expected {meaning}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{keys[0]} holds half a surrogate pair; expected valid Unicode.") from None
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".jsonl":
        yield from _json_rows(path)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            try:
                for row in reader:
                    yield reader.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError.at(path, reader.line_num, f"not valid CSV ({error}).") from None
    else:
        yield from _parquet_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                row = orjson.loads(raw)
            except orjson.JSONDecodeError:
                row = _strange_json(raw)
            yield line, row


def _strange_json(raw: bytes) -> Any:
    """A line that orjson refuses: what Python's laxer parser makes of it, or what is wrong."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        return _BadRow(f"not valid JSON ({error.msg} at column {error.colno}).", raw)
    except UnicodeDecodeError:
        return _BadRow("not UTF-8 text.", raw)
    except RecursionError:
        return _BadRow("JSON nested too deeply.", raw)
    except ValueError as error:  # such as a number of thousands of digits
        return _BadRow(f"not valid JSON ({error}).", raw)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        line = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                line += 1
                yield line, row
    # A damaged file shows as any of these, depending on where the damage is.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from None


def _write_rejected(path: Path, rejected: list[dict[str, Any]]) -> Path:
    target = path.with_name(path.stem + ".rejected.jsonl")
    with atomic_file(target) as stream:
        for entry in rejected:
            line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
            # Half a surrogate pair, a reason to reject a row, stays written as an escape.
            stream.write(line.encode(errors="backslashreplace"))
    return target
