"""SNLI-VE-shaped data: reads a split, refuses bad rows, joins two languages.

A split is a file `snli_ve_{split}.jsonl` (other languages: `snli_ve_{split}.{lang}.jsonl`), also in
another format, without `snli_ve_`, or as `{lang}/{split}`, IGLUE's layout of XVNLI. Rows are stored
as columns: half a million pairs are a few lists and arrays, not half a million objects.

The caption (`sentence1`) is never read: it would leak a text premise into the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
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

#: The default source language, whose files may have no language suffix.
ENGLISH = "en"

#: Extensions of images that can be read.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
#: Extensions in names of images, unlike the year in `holiday.2021`.
_IMAGE_ENDINGS = (*IMAGE_EXTENSIONS, ".tif", ".tiff", ".heic", ".avif")

_NO_MAJORITY = "-"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{4})?(-[A-Z]{2})?")


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split in one language, as columns of equal length N."""

    name: str  # split name, such as `train`
    lang: str  # language code of the hypotheses
    path: Path
    pair_ids: list[str]  # unique row ids
    hypotheses: list[str]  # sentences in `lang`
    sources: list[str | None]  # the source sentence of each translated one; None: the row has none
    labels: npt.NDArray[np.int8]  # (N,) an id of `labels.LABELS` or `UNLABELLED`
    image_names: list[str]  # the distinct images, as the file names them
    image_index: npt.NDArray[np.int32]  # (N,) index into `image_names`; -1: the row names no image
    lines: npt.NDArray[np.int32]  # (N,) 1-based line (or row) numbers in the file
    num_lines: int  # number of lines in the file, to the last row
    digest: str  # BLAKE2b-256 of the file

    def __len__(self) -> int:
        return len(self.pair_ids)

    def where(self, row: int) -> str:
        """`file:line` of a row, for messages."""
        return f"{self.path}:{self.lines[row]}"

    def take(self, rows: npt.NDArray[np.intp]) -> Split:
        """Only the given rows, in the given order."""
        images, image_index = np.unique(self.image_index[rows], return_inverse=True)
        num_none = np.count_nonzero(images < 0)
        return dataclasses.replace(
            self,
            pair_ids=[self.pair_ids[i] for i in rows],
            hypotheses=[self.hypotheses[i] for i in rows],
            sources=[self.sources[i] for i in rows],
            labels=self.labels[rows],
            image_names=[self.image_names[i] for i in images[num_none:]],
            image_index=(image_index - num_none).astype(np.int32),
            lines=self.lines[rows],
        )


@dataclass(frozen=True, eq=False)
class Parallel:
    """Sentences of two languages, joined by `pairID`."""

    target: Split  # the M rows of the target language that have a counterpart
    sources: list[str]  # their M sentences in the source language
    num_unmatched_target: int  # rows of the target language without a source row
    num_unmatched_source: int  # rows of the source language without a target row
    unmatched_examples: tuple[str, ...]  # a few of their `pairID`s

    def take(self, rows: npt.NDArray[np.intp]) -> Parallel:
        """Only the given rows, in the given order."""
        return dataclasses.replace(
            self, target=self.target.take(rows), sources=[self.sources[i] for i in rows]
        )


def is_language(lang: str) -> bool:
    """Whether this is a language code such as `de`, `zh-Hant` or `pt-BR`."""
    return _LANGUAGE.fullmatch(lang) is not None


def require_language(lang: str, flag: str = "--lang") -> None:
    """Refuses anything but a language code, which becomes part of file names.

    Raises:
        UsageError: not a language code; names the flag.
    """
    if not is_language(lang):
        raise UsageError(f"{flag} {lang}: not a language code; expected one such as de, ja or zh.")


def split_path(folder: Path, split: str, lang: str) -> Path | None:
    """The file of a split in a language, or None."""
    stems = [f"snli_ve_{split}.{lang}", f"{split}.{lang}", f"{lang}/{split}"]
    if lang == ENGLISH:
        stems = [f"snli_ve_{split}", *stems, split]
    paths = (folder / (stem + extension) for stem in stems for extension in EXTENSIONS)
    return next((path for path in paths if path.is_file()), None)


def languages(folder: Path, split: str) -> list[str]:
    """Codes of the languages of a split, English first, then by name."""
    # In {split}.{lang}.jsonl the code is the last part but the extension; {lang}/ is a folder.
    names = [path.name for path in folder.iterdir()]
    codes = {ENGLISH, *names, *(split_name(Path(name))[0].rpartition(".")[2] for name in names)}
    existing = [lang for lang in codes if is_language(lang) and split_path(folder, split, lang)]
    return sorted(existing, key=lambda lang: (lang != ENGLISH, lang))


def require_split_path(folder: Path, split: str, lang: str) -> Path:
    """The file of a split in a language.

    Raises:
        DataError: the folder or the file does not exist.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such data folder; expected one with snli_ve_{split}.jsonl "
            "(choose the folder with --data DIR)."
        )
    try:
        path = split_path(folder, split, lang)
        others = "" if path else ", ".join(languages(folder, split)) or "none"
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}).") from None
    if path is None:
        suffix = "" if lang == ENGLISH else f".{lang}"
        advice = "" if lang == ENGLISH else f" `clseave translate --lang {lang}` creates it."
        raise DataError(
            f"{folder}: no snli_ve_{split}{suffix}.jsonl "
            f"(languages of the split {split}: {others}).{advice}"
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
        labelled: rows need a label; those with SNLI's `-` are skipped. If False, labels are
            optional, and `-` rows are kept.
        with_images: rows need an image name.
        source_lang: language of the source sentences in translated rows (`sentence2_en`).
        skip_bad: write bad rows to `{file}.rejected.jsonl` instead of refusing the file.
        skip_suspect: skip rows marked `translation_suspect`; False: only note their number; None:
            ignore the marks.
        progress: receives notes about skipped rows.

    Raises:
        DataError: a missing file, or the first bad row; names file and line.
    """
    path = require_split_path(folder, split, lang)
    source_key = f"sentence2_{source_lang}"
    keys = {*ID_KEYS, *HYPOTHESIS_KEYS, *LABEL_KEYS, *IMAGE_KEYS, source_key, SUSPECT_FIELD}
    pair_ids, hypotheses, labels, lines, image_index = [], [], [], [], []
    sources: list[str | None] = []
    image_ids: dict[str, int] = {}
    first_line: dict[str, int] = {}
    rejected: list[dict[str, Any]] = []
    num_unlabelled = num_suspect = line = 0
    for line, row, _ in read_rows(path, keys):
        try:
            pair_id = require_text(row, ID_KEYS, "the row's unique id")
            hypothesis = require_text(row, HYPOTHESIS_KEYS, "the hypothesis")
            label, image = _label(row, labelled), _image(row, with_images)
            source = row.get(source_key)
            if source is not None:
                source = require_text(row, (source_key,), "the sentence that was translated")
            if pair_id in first_line:
                number = first_line[pair_id]
                raise BadRow(f"pairID {pair_id!r} is also in line {number}; ids must be unique.")
        except BadRow as bad:
            if not skip_bad:
                raise DataError.at(
                    path, line, f"{bad} Fix the row, or set such rows aside with --skip-bad."
                ) from None
            content = bad.text if isinstance(row, BadRow) else row
            rejected.append({"line": line, "reason": str(bad), "row": content})
            continue
        first_line[pair_id] = line
        if label is None:
            num_unlabelled += 1
            continue
        if row.get(SUSPECT_FIELD):
            num_suspect += 1
            if skip_suspect:
                continue
        pair_ids.append(pair_id)
        hypotheses.append(hypothesis)
        labels.append(label)
        lines.append(line)
        image_index.append(-1 if image is None else image_ids.setdefault(image, len(image_ids)))
        sources.append(source)
    if num_unlabelled:
        progress.note(f"{path}: {num_unlabelled} rows without a majority label (-) skipped.")
    if num_suspect and skip_suspect is not None:
        outcome = "skipped" if skip_suspect else "used; --skip-suspect skips them"
        progress.note(f"{path}: {num_suspect} rows marked {SUSPECT_FIELD} {outcome}.")
    if not pair_ids:
        reason = "expected one JSON object a line, or a table with a header"
        if num_unlabelled or num_suspect:
            reason = "all are skipped"
        if rejected:
            first = rejected[0]
            reason = f"all {len(rejected)} are bad, as line {first['line']}: {first['reason']}"
        raise DataError(f"{path}: no usable rows; {reason.removesuffix('.')}.")
    if rejected:
        target = _write_rejected(path, rejected)
        progress.note(f"{path}: {len(rejected)} bad rows set aside in {target}.")
    return Split(
        name=split,
        lang=lang,
        path=path,
        pair_ids=pair_ids,
        hypotheses=hypotheses,
        sources=sources,
        labels=np.array(labels, dtype=np.int8),
        image_names=list(image_ids),
        image_index=np.array(image_index, dtype=np.int32),
        lines=np.array(lines, dtype=np.int32),
        num_lines=line,
        digest=file_digest(path),
    )


def _label(row: dict[str, Any], labelled: bool) -> int | None:
    """A label id; None: no majority, so the row is skipped."""
    value = first_value(row, LABEL_KEYS)
    if isinstance(value, str) and value in LABEL_IDS:
        return LABEL_IDS[value]
    if value == _NO_MAJORITY:
        return None if labelled else UNLABELLED
    if value is None and not labelled:
        return UNLABELLED
    expected = f"one of {', '.join(LABELS)}"
    if value is None:
        raise BadRow(missing(row, LABEL_KEYS, expected))
    raise BadRow(f"{LABEL_KEYS[0]} is {short(value)}; expected {expected}.")


def _image(row: dict[str, Any], is_required: bool) -> str | None:
    value = image_name(row)
    if (isinstance(value, str) and value.strip()) or (value is None and not is_required):
        return value
    if value is None:
        raise BadRow(missing(row, IMAGE_KEYS, "the image's name"))
    raise BadRow(f"{IMAGE_KEYS[0]} is {short(value)}; expected the image's name.")


def _write_rejected(path: Path, rejected: list[dict[str, Any]]) -> Path:
    target = path.with_name(split_name(path)[0] + ".rejected.jsonl")
    if target.exists():
        with reading(target) as stream:
            _, first, _ = next(json_rows(stream), (0, {}, b""))
        if not isinstance(first, dict) or first.keys() != rejected[0].keys():
            raise DataError(
                f"{target}: already exists and --skip-bad did not write it; move it away, because "
                "bad rows are set aside there."
            )
    with atomic_file(target) as stream:
        for entry in rejected:
            try:
                stream.write(json_line(entry))
            except RecursionError:
                stream.write(json_line(entry | {"row": short(entry["row"])}))
    return target


def join(target: Split, source: Split | None, source_lang: str = ENGLISH) -> Parallel:
    """Joins a translated split with its source sentences, by `pairID` only.

    Without `source`, uses the source sentence in each translated row (`sentence2_en`).

    Raises:
        DataError: nothing matches, or rows have no source sentence.
    """
    if source is None:
        sources = [sentence for sentence in target.sources if sentence is not None]
        if len(sources) < len(target):
            raise DataError(
                f"{target.where(target.sources.index(None))}: no sentence2_{source_lang}, nor in "
                f"{len(target) - len(sources) - 1} other rows of {len(target)}; expected it in "
                f"every row, or a file of the split {target.name} in {source_lang}."
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
    unmatched = [p for p in target.pair_ids if p not in by_id][:3]
    unmatched += [p for p in source.pair_ids if p not in target_ids][:3]
    return Parallel(
        target=matched,
        sources=[by_id[pair_id] for pair_id in matched.pair_ids],
        num_unmatched_target=len(target) - len(matched),
        num_unmatched_source=len(source) - len(matched),
        unmatched_examples=tuple(unmatched[:3]),
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
            f"{shared[0]}; metrics on them would be invalid. Use --allow-leak to permit it."
        )


def distinct(values: Sequence[str]) -> tuple[list[str], npt.NDArray[np.intp]]:
    """The distinct values in order of first occurrence, and the index of each value in them."""
    numbers: dict[str, int] = {}
    index = np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.intp)
    return list(numbers), index


def image_stem(name: str) -> str:
    """An image's name without its extension: `123.jpg` and `123` are the same image."""
    stem, _, extension = name.rpartition(".")
    return stem if stem and f".{extension.lower()}" in _IMAGE_ENDINGS else name


def are_first(values: Sequence[str], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Marks the first `count` values in a random order that depends on the values alone."""
    keys = [hashlib.blake2b(f"{seed} {v}".encode(), digest_size=16).digest() for v in values]
    first = np.zeros(len(values), dtype=bool)
    first[sorted(range(len(keys)), key=keys.__getitem__)[:count]] = True
    return first


def hold_out_images(
    split: Split, name: str, fraction: float, seed: int, progress: Progress = SILENT
) -> tuple[Split, Split]:
    """Holds out a fraction of a split's images, with all their rows, as the split `name`.

    The choice depends on the seed and the images' names alone.

    Returns:
        The rest of the split, and the held-out one.

    Raises:
        DataError: there are too few images.
    """
    stems, stem_of_image = distinct([image_stem(image) for image in split.image_names])
    num_held = max(1, round(fraction * len(stems)))
    if num_held >= len(stems):
        raise DataError(
            f"{split.path}: {len(stems)} images are too few to hold out {fraction:.0%} of them; "
            f"add a file for the split {name}, or set a smaller --dev-fraction."
        )
    is_held = are_first(stems, num_held, seed)[stem_of_image][split.image_index]
    kept, held_out = split.take(np.flatnonzero(~is_held)), split.take(np.flatnonzero(is_held))
    progress.note(
        f"{split.path.parent}: no file for the split {name}; holding out {num_held} of "
        f"{len(stems)} images of {split.path.name} with their {len(held_out)} rows instead."
    )
    return kept, dataclasses.replace(held_out, name=name)
