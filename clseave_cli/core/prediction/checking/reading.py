"""Reads texts and their pictures from pages, tables, folders and archives.

Unreadable input becomes a `Text` with a `problem` and does not stop the rest. Every reader takes
linear time.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.data.records import IMAGE_EXTENSIONS
from clseave_cli.core.data.rows import (
    NOT_UTF8,
    BadRow,
    DelimitedRows,
    Record,
    is_garbled,
    json_rows,
    parquet_rows,
    reading_parquet,
)
from clseave_cli.core.prediction.checking import pages
from clseave_cli.core.prediction.checking.pictures import MAX_BYTES, Locator, Picture
from clseave_cli.errors import DataError, UsageError
from clseave_cli.progress import Progress

_IMAGE_COLUMNS = (
    "image", "image_path", "img", "picture", "photo", "filename", "file_name", "image_file",
    "image_url", "url", "path", "file", "src",
)  # fmt: skip
_TEXT_COLUMNS = (
    "text", "caption", "alt", "alt_text", "hypothesis", "sentence2", "sentence", "description",
)  # fmt: skip
_MOST_PROBLEMS = 100
_MAX_PAGE_BYTES = 8 << 20
_MAX_MARKDOWN_BYTES = 2 << 20
_MAX_LINE_BYTES = 16 << 20
_MAX_TEXT_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class Text:
    """A text and its picture.

    Attributes:
        file: name of the file in messages.
        place: line, from 1; or a description, in a file without lines.
        text: with single spaces; may be empty.
        picture: the picture.
        lang: the language that the page declares, if any.
        problem: why the text could not be read.
    """

    file: str
    place: int | str
    text: str
    picture: Picture
    lang: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _File:
    """A file to read; `is_named`: it is an argument itself, not found in a folder."""

    path: Path
    shown: str
    locator: Locator
    config: CheckConfig
    is_named: bool

    def text(self, text: Any, picture: Picture, place: int | str, lang: str = "") -> Text:
        # JSON can hold lone surrogates, which no encoding accepts.
        clean = str("" if text is None else text).encode("utf-8", "replace").decode()
        return Text(self.shown, place, " ".join(clean.split()), picture, lang)

    def problem(self, message: str, place: int | str = "") -> Text:
        return Text(self.shown, place, "", Picture("", None, "unread"), problem=message)

    def content(self, limit: int) -> bytes:
        with self.path.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise DataError(f"larger than {limit >> 20} MiB; split it.")
        return content

    def picture(self, value: Any) -> Picture:
        """The picture in a cell of a table, or at its path or URL."""
        if isinstance(value, dict):  # the image format of Hugging Face datasets
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Picture("bytes", value)
        if isinstance(value, str) and value.strip():
            return self.locator.file(value.strip(), self.config.images or self.path.parent)
        return Picture("", None, "missing")

    def columns(self, names: Sequence[str]) -> tuple[str, str] | None:
        """The columns of pictures and texts; None: a table found in a folder has none."""
        by_name = {name.strip().lower(): name for name in reversed(names)}
        columns = []
        for requested, usual, flag in (
            (self.config.image_column, _IMAGE_COLUMNS, "--image-column"),
            (self.config.text_column, _TEXT_COLUMNS, "--text-column"),
        ):
            candidates = (requested.lower(),) if requested else usual
            column = next((by_name[each] for each in candidates if each in by_name), None)
            if column is not None:
                columns.append(column)
            elif not requested and not self.is_named:
                return None
            elif is_garbled(names):
                raise DataError(NOT_UTF8)
            else:
                existing = ", ".join(names)[:200]
                raise DataError(
                    f"{flag} {requested or 'NAME'}: choose a column; there are: {existing}."
                )
        return columns[0], columns[1]


def read_texts(
    paths: Sequence[Path], config: CheckConfig, fetching: bool, progress: Progress
) -> Iterator[Text]:
    """Yields the texts in files and folders, in order.

    In folders, hidden files and files of other kinds are skipped. Only with `fetching`, remote
    pictures may be requested.

    Raises:
        UsageError: a path does not exist, or is not of a supported kind.
        ExtraMissing: a page needs a parser that is not installed.
    """
    for folder in (config.root, config.images):
        if folder is not None and not folder.is_dir():
            raise UsageError(f"{folder}: no such folder.")
    for path in paths:
        if not path.is_dir() and not path.is_file():
            raise UsageError(f"{path}: no such file or folder.")
        if path.is_file() and path.suffix.lower() not in _READERS:
            kinds = " ".join(_READERS)
            raise UsageError(f"{path}: unsupported kind of file; expected one of {kinds}.")
    for path in paths:
        root = config.root or (path if path.is_dir() else path.parent)
        web, tables = Locator(root, fetching), Locator(config.images or root, fetching)
        for file in _walk(path, progress) if path.is_dir() else [path]:
            reader = _READERS[file.suffix.lower()]
            is_table = reader in (_delimited, _json_lines, _parquet, _coco)
            locator = tables if is_table else web
            source = _File(file, _shown(file), locator, config, file == path)
            num_problems = 0
            try:
                for text in reader(source):
                    yield text
                    num_problems += bool(text.problem)
                    if num_problems == _MOST_PROBLEMS:
                        raise DataError(f"{num_problems} problems; the rest was not read.")
            except DataError as error:
                yield source.problem(str(error))
            except OSError as error:
                yield source.problem(f"cannot be read ({error.strerror}).")


def _walk(root: Path, progress: Progress) -> Iterator[Path]:
    real = root.resolve()
    for folder, folders, names in os.walk(
        root, onerror=lambda error: progress.note(f"{error.filename}: {error.strerror}; skipped.")
    ):
        folders[:] = sorted(n for n in folders if n[0] != "." and n != "node_modules")
        for path in (Path(folder, name) for name in sorted(names)):
            if path.name[0] == "." or path.suffix.lower() not in _READERS:
                continue
            if not path.resolve().is_relative_to(real) or not path.is_file():
                progress.note(f"{_shown(path)}: not a file inside {root}; skipped.")
            elif path.suffix.lower() != ".txt" or _picture_beside(path) is not None:
                yield path


def _shown(path: Path) -> str:
    """Relative to the working directory if possible: the same on every machine."""
    absolute = Path(os.path.normpath(path.absolute()))
    shown = absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
    return shown.as_posix().encode("utf-8", "replace").decode()


def _html(file: _File) -> Iterator[Text]:
    return _page(file, pages.read_html(file.content(_MAX_PAGE_BYTES)))


def _markdown(file: _File) -> Iterator[Text]:
    return _page(file, pages.read_markdown(file.content(_MAX_MARKDOWN_BYTES)))


def _page(file: _File, images: Iterable[pages.Image]) -> Iterator[Text]:
    for image in images:
        picture = file.locator.web(image.sources, file.path.parent, image.base)
        if image.decorative:
            picture = Picture(picture.name, None, "decorative")
        yield file.text(image.text, picture, image.line, image.lang)


def _lines(file: _File) -> Iterator[bytes]:
    with file.path.open("rb") as stream:
        while line := stream.readline(_MAX_LINE_BYTES + 1):
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(f"a line of more than {_MAX_LINE_BYTES >> 20} MiB.")
            yield line


def _delimited(file: _File) -> Iterator[Text]:
    rows = DelimitedRows(_lines(file), errors="replace")
    return _rows(file, rows, [name.strip() for name in rows.header])


def _json_lines(file: _File) -> Iterator[Text]:
    return _rows(file, json_rows(_lines(file)))


def _parquet(file: _File) -> Iterator[Text]:
    with reading_parquet(file.path, file.shown) as table:
        names = table.schema_arrow.names
    if (columns := file.columns(names)) is not None:
        yield from _rows(file, parquet_rows(file.path, file.shown, columns), names, "row ")


def _rows(
    file: _File, rows: Iterable[Record], names: Sequence[str] = (), unit: str = ""
) -> Iterator[Text]:
    """The texts of a table; without `names`, its columns are the keys of the first row."""
    columns = file.columns(names) if names else None
    if names and columns is None:
        return
    for number, values, _ in rows:
        place = f"{unit}{number}" if unit else number
        if isinstance(values, BadRow):
            yield file.problem(str(values), place)
        elif values:
            if (columns := columns or file.columns(list(values))) is None:
                return
            yield file.text(values.get(columns[1]), file.picture(values.get(columns[0])), place)


def _loads(text: str | bytes) -> Any:
    """A JSON document; None: invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _coco(file: _File) -> Iterator[Text]:
    document = _loads(file.content(_MAX_JSON_BYTES))
    images = document.get("images") if isinstance(document, dict) else None
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(images, list) or not isinstance(annotations, list):
        if file.is_named:
            raise DataError('not COCO captions; expected lists "images" and "annotations".')
        return  # another kind of JSON in a folder
    names = {str(i.get("id")): i.get("file_name") for i in images if isinstance(i, dict)}
    for number, entry in enumerate(annotations):
        place = f"annotations[{number}]"
        if isinstance(entry, dict) and "caption" in entry:
            picture = file.picture(names.get(str(entry.get("image_id"))))
            yield file.text(entry["caption"], picture, place)
        else:
            yield file.problem('expected "image_id" and "caption".', place)


def _beside(file: _File) -> Iterator[Text]:
    image = _picture_beside(file.path)
    if image is None:
        raise DataError(f"no picture beside it; expected {file.path.stem}.jpg, .png, …")
    picture = file.locator.file(image.name, file.path.parent)
    lines = pages.decoded(file.content(_MAX_TEXT_BYTES)).split("\n")
    texts = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in texts or [(1, "")]:
        yield file.text(line, picture, number)


def _picture_beside(path: Path) -> Path | None:
    for suffix in (*IMAGE_EXTENSIONS, *(suffix.upper() for suffix in IMAGE_EXTENSIONS)):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    return None


def _tar(file: _File) -> Iterator[Text]:
    """A WebDataset: members that share a name up to its first dot belong together."""
    key, offset = "", -1
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(file.path, "r:") as archive:
            for member in archive:
                # Damaged sizes can lead backwards, which would loop forever.
                if member.offset <= offset:
                    raise tarfile.TarError("members overlap")
                offset = member.offset
                archive.members = []  # type: ignore[attr-defined]  # or it grows without limit
                folder, name = os.path.split(member.name)
                stem, _, kind = name.lower().partition(".")
                new_key = f"{folder.removeprefix('.')}/{stem}".removeprefix("/")
                if new_key != key:
                    yield from _sample(file, key, parts)
                    key, parts = new_key, {}
                is_picture = PurePosixPath(name.lower()).suffix in IMAGE_EXTENSIONS
                if (is_picture or kind in ("txt", "caption", "json")) and member.isreg():
                    stream = archive.extractfile(member)
                    limit = 1 + (MAX_BYTES if is_picture else _MAX_TEXT_BYTES)
                    content = stream.read(limit) if stream is not None else b""
                    parts["picture" if is_picture else kind] = content
    except tarfile.TarError as error:
        yield file.problem(f"damaged or not a plain tar ({error}); unpack a .tar.gz first.")
    yield from _sample(file, key, parts)


def _sample(file: _File, key: str, parts: dict[str, bytes]) -> Iterator[Text]:
    if "picture" in parts and len(parts) > 1:
        text: Any = parts.get("txt", parts.get("caption"))
        if text is not None:
            text = text.decode("utf-8", "replace")
        elif isinstance(row := _loads(parts["json"]), dict):
            names = (file.config.text_column,) if file.config.text_column else _TEXT_COLUMNS
            text = next((row[name] for name in names if name in row), None)
        yield file.text(text, Picture(key, parts["picture"]), key)


#: Readers by file name extension.
_READERS = {
    ".html": _html, ".htm": _html, ".xhtml": _html, ".md": _markdown, ".markdown": _markdown,
    ".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".ndjson": _json_lines,
    ".parquet": _parquet, ".json": _coco, ".txt": _beside, ".tar": _tar,
}  # fmt: skip
