"""Converts published data sets to data folders.

`LAYOUTS` lists their columns. Sentences become rows (`snli_ve_{split}.jsonl`) or captions
(`captions_{split}.jsonl`), with the language before the extension if it is not English
(`captions_test.de.jsonl`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from PIL import Image

from clseave_cli.core.data.images import FORMATS
from clseave_cli.core.data.languages import LANGUAGES
from clseave_cli.core.data.records import ENGLISH, image_stem
from clseave_cli.core.data.rows import (
    ID_KEYS,
    IMAGE_KEYS,
    LABEL_KEYS,
    SUSPECT_FIELD,
    BadRow,
    first_value,
    json_line,
    read_rows,
)
from clseave_cli.errors import DataError
from clseave_cli.progress import Progress


class Layout(NamedTuple):
    """The columns of published data sets."""

    name: str  # of the data sets
    text: str  # column of the sentence or sentences; `*`: a column for each language
    #: Columns that may name the photo. One that holds the photo is recognised by its type.
    photo: tuple[str, ...]
    #: Rows or captions; choices become rows, in which the photo entails the `caption` and
    #: contradicts the `negative_caption`.
    kind: Literal["rows", "captions", "choices"]


#: The first one whose text column exists is used.
LAYOUTS = (
    Layout("SNLI-VE, XVNLI (IGLUE)", "sentence2", IMAGE_KEYS, "rows"),
    Layout(
        "floschne/xvnli, HuggingFaceM4/SNLI-VE, e-SNLI-VE", "hypothesis",
        ("flikr30k_id", "filename", *IMAGE_KEYS), "rows",
    ),
    Layout("Phando/snli-ve-shuffled", "sentence", ("filename", "image_id", *IMAGE_KEYS), "rows"),
    Layout("SugarCrepe", "negative_caption", ("filename", "image"), "choices"),
    Layout("xFlickrCO (IGLUE, floschne/xflickrco)", "sentences", ("img_path", "id"), "captions"),
    Layout("floschne/xm3600", "captions", ("image_id", "filename"), "captions"),
    Layout("COCO captions, STAIR", "caption", ("file_name", "filename", "image_id"), "captions"),
    Layout("Crossmodal-3600, Multi30k", "*", ("image/key", "filename", "image_id"), "captions"),
)  # fmt: skip

#: Our splits, by the names that others use.
SPLITS = {"train": "train", "validation": "dev", "val": "dev", "dev": "dev", "test": "test"}
#: Names of splits, folders and columns that are languages.
CODES = {*LANGUAGES, "fil", "quz"}

#: A part of a data set: prefix of its row ids, split, language, and rows, with photos as the bytes
#: of their files.
Part = tuple[str, str, str, Iterable[dict[str, Any]]]


def file_parts(paths: Iterable[Path]) -> Iterator[Part]:
    """The parts in files, whose names and folders give split and language.

    Raises:
        DataError: a file cannot be read.
    """
    for path in paths:
        # STAIR has COCO's format, in Japanese, which only the file name tells.
        lang = "ja" if path.name.startswith("stair_captions") else path.parent.name
        lang = lang if lang in CODES else ENGLISH
        split = re.search("|".join(SPLITS), path.stem)
        yield path.stem, SPLITS[split[0] if split else "test"], lang, _file_rows(path)


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix != ".json":
        for line, row, _ in read_rows(path):
            if isinstance(row, BadRow):
                raise DataError.at(path, line, str(row))
            yield row
        return
    try:
        document = json.loads(path.read_bytes())
        if "annotations" in document:
            names = {image["id"]: image["file_name"] for image in document["images"]}
            for entry in document["annotations"]:
                yield {"caption": entry["caption"], "file_name": names[entry["image_id"]]}
        else:  # SugarCrepe numbers its rows
            yield from map(dict, document.values() if isinstance(document, dict) else document)
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not readable as COCO captions or rows ({error!r:.200})."
        ) from None


def write_folder(folder: Path, parts: Iterable[Part], data: str, progress: Progress) -> None:
    """Fills a data folder with the parts of `--data`.

    Raises:
        DataError: a part has none of the `LAYOUTS`, has no rows, or contains a damaged photo.
    """
    with ExitStack() as stack, progress.task(data, unit="rows") as task:
        writer = _Writer(folder, stack)
        for name, split, lang, rows in parts:
            number = 0
            for number, row in enumerate(rows, start=1):
                try:
                    writer.add(split, lang, f"{name}-{number}", row)
                except BadRow as bad:
                    raise DataError(f"--data {data}: {name}, row {number}: {bad}") from None
                task.advance()
            if not number:
                raise DataError(f"--data {data}: {name} has no rows.")


class _Writer:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._files: dict[str, BinaryIO] = {}
        self._photos: dict[str, str] = {}
        self._ids: dict[str, tuple[Any, ...]] = {}

    def add(self, split: str, split_lang: str, number: str, row: dict[str, Any]) -> None:
        layout = _layout(row)
        photo = self._photo(layout, row)
        label = first_value(row, LABEL_KEYS)
        for lang, text in _sentences(layout, row, split_lang):
            if layout.kind == "captions" and photo is not None:
                self._write(f"captions_{split}", lang, {"image": photo, "caption": text})
                continue
            row_id = str(first_value(row, ID_KEYS) or number)
            if layout.kind == "choices":
                label = "contradiction" if text == row[layout.text] else "entailment"
                row_id += f"-{label}"
            # Languages are joined by row ids, so numbers must not match rows in different orders.
            first_lang, *first = self._ids.setdefault(row_id, (lang, photo, label))
            if first_lang != lang and first != [photo, label]:
                row_id = f"{lang}-{row_id}"
            out = {"pairID": row_id, "image": photo, "hypothesis": text, "label": label}
            # Other keys are dropped, the caption above all, except those that `translate` adds.
            kept_keys = [k for k in row if k == SUSPECT_FIELD or k.startswith("sentence2_")]
            self._write(f"snli_ve_{split}", lang, out | {key: row[key] for key in kept_keys})

    def _write(self, stem: str, lang: str, row: dict[str, Any]) -> None:
        name = f"{stem}.jsonl" if lang == ENGLISH else f"{stem}.{lang}.jsonl"
        if name not in self._files:
            self._files[name] = self._stack.enter_context((self._folder / name).open("wb"))
        self._files[name].write(json_line({k: v for k, v in row.items() if v is not None}))

    def _photo(self, layout: Layout, row: dict[str, Any]) -> str | None:
        """The name of a row's photo; writes the file if the row contains it."""
        names = (str(row[key]) for key in layout.photo if isinstance(row.get(key), str | int))
        name = PurePosixPath(next(names, "")).name
        contents = (v.get("bytes") if isinstance(v, dict) else v for v in row.values())
        content = next((each for each in contents if isinstance(each, bytes)), None)
        if content is None:
            return name or None
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        stem = image_stem(name)
        # A name that is unsafe as a path, or belongs to another photo, is replaced by the digest.
        if not re.fullmatch(r"\w[\w.-]*", stem) or self._photos.setdefault(stem, digest) != digest:
            stem = digest
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                file = self._folder / "images" / f"{stem}.{str(image.format).lower()}"
        except Exception:
            raise BadRow(f"damaged, or not an image in {', '.join(FORMATS)}.") from None
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        return file.name


def _layout(row: dict[str, Any]) -> Layout:
    for layout in LAYOUTS:
        if layout.text in row or (layout.text == "*" and ENGLISH in row):
            return layout
    raise BadRow(f"no supported layout has these columns: {', '.join(map(str, row))[:200]}.")


def _sentences(layout: Layout, row: dict[str, Any], lang: str) -> Iterator[tuple[str, str]]:
    """The language and the text of every sentence of a row."""
    columns = [layout.text]
    if layout.kind == "choices":
        columns.insert(0, "caption")
    if layout.text == "*":  # a string under `id` is an id, not Indonesian
        columns = [
            k for k in row if k in CODES and not (k == "id" and isinstance(row[k], str | None))
        ]
    for column in columns:
        value = row.get(column)
        value = value.get("caption") if isinstance(value, dict) else value
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text.strip():
                raise BadRow(f"{column} has no sentence.")
            yield column if layout.text == "*" else lang, text
