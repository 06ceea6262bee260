"""Texts and the pictures they belong to, out of pages, tables, folders and archives.

No input stops the others: what cannot be read becomes a `Text` with a `problem`. Every reader is
linear in the size of its file, whatever is in it.
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
    """A text that is to fit a picture.

    Attributes:
        file: its file, as messages name it.
        where: the line in it, from 1, or the place in a file that has no lines.
        text: the text, its white space made single spaces; empty where there is none.
        picture: the picture.
        lang: the language that the page declares, if any.
        problem: why nothing could be read here.
    """

    file: str
    where: int | str
    text: str
    picture: Picture
    lang: str = ""
    problem: str = ""


@dataclass(frozen=True)
class _File:
    """A file to read; `named` where the user named it, and not only a folder around it."""

    path: Path
    shown: str
    locator: Locator
    config: CheckConfig
    named: bool

    def text(self, text: Any, picture: Picture, where: int | str, lang: str = "") -> Text:
        # A lone surrogate, which JSON can spell, is in no encoding.
        clean = str("" if text is None else text).encode("utf-8", "replace").decode()
        return Text(self.shown, where, " ".join(clean.split()), picture, lang)

    def problem(self, message: str, where: int | str = "") -> Text:
        return Text(self.shown, where, "", Picture("", None, "unread"), problem=message)

    def content(self, limit: int) -> bytes:
        with self.path.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise DataError(f"larger than {limit >> 20} MiB; split it.")
        return content

    def picture(self, value: Any) -> Picture:
        """The picture that a cell of a table holds or names."""
        if isinstance(value, dict):  # as the library datasets keeps images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Picture("bytes", value)
        if isinstance(value, str) and value.strip():
            return self.locator.file(value.strip(), self.config.images or self.path.parent)
        return Picture("", None, "missing")

    def columns(self, names: Sequence[str]) -> tuple[str, str] | None:
        """The columns of pictures and texts; None in a file that only lies there.

        Raises:
            DataError: they or the file were named, and they are not there, or it is not UTF-8.
        """
        by_name = {name.strip().lower(): name for name in reversed(names)}
        chosen = []
        for wanted, usual, flag in (
            (self.config.image_column, _IMAGE_COLUMNS, "--image-column"),
            (self.config.text_column, _TEXT_COLUMNS, "--text-column"),
        ):
            options = (wanted.lower(),) if wanted else usual
            column = next((by_name[option] for option in options if option in by_name), None)
            if column is None and not wanted and not self.named:
                return None
            if column is None and is_garbled(names):
                raise DataError(NOT_UTF8)
            if column is None:
                there = ", ".join(names)[:200]
                raise DataError(f"{flag} {wanted or 'NAME'}: choose a column; there are: {there}.")
            chosen.append(column)
        return chosen[0], chosen[1]


def read_texts(
    paths: Sequence[Path], config: CheckConfig, fetching: bool, progress: Progress
) -> Iterator[Text]:
    """The texts in files and folders, in order, as they are read.

    Args:
        paths: files and folders; of a folder, every file of a kind that is read, hidden ones apart.
        config: the columns of tables, and where pictures may be.
        fetching: whether remote pictures may be requested.
        progress: told of files that are skipped.

    Raises:
        UsageError: a path is not there, or of no kind that is read.
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
            raise UsageError(f"{path}: not a kind of file that is checked; there are: {kinds}.")
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
    """Relative to the working directory where it is in it: the same on every machine."""
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
    """The texts of a table whose columns have these names, or the keys of its first row."""
    columns = file.columns(names) if names else None
    if names and columns is None:
        return
    for number, values, _ in rows:
        where = f"{unit}{number}" if unit else number
        if isinstance(values, BadRow):
            yield file.problem(str(values), where)
        elif values:
            if (columns := columns or file.columns(list(values))) is None:
                return
            yield file.text(values.get(columns[1]), file.picture(values.get(columns[0])), where)


def _loads(text: str | bytes) -> Any:
    """A JSON document; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _coco(file: _File) -> Iterator[Text]:
    document = _loads(file.content(_MAX_JSON_BYTES))
    images = document.get("images") if isinstance(document, dict) else None
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(images, list) or not isinstance(annotations, list):
        if file.named:
            raise DataError('not COCO captions; expected lists "images" and "annotations".')
        return  # some other JSON that lies in the folder
    names = {str(i.get("id")): i.get("file_name") for i in images if isinstance(i, dict)}
    for number, entry in enumerate(annotations):
        where = f"annotations[{number}]"
        if isinstance(entry, dict) and "caption" in entry:
            picture = file.picture(names.get(str(entry.get("image_id"))))
            yield file.text(entry["caption"], picture, where)
        else:
            yield file.problem('expected "image_id" and "caption".', where)


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
                # Damaged sizes can lead backwards, and then for ever.
                if member.offset <= offset:
                    raise tarfile.TarError("members overlap")
                offset = member.offset
                archive.members = []  # type: ignore[attr-defined]  # it would grow
                folder, name = os.path.split(member.name)
                stem, _, kind = name.lower().partition(".")
                if (new := f"{folder.removeprefix('.')}/{stem}".removeprefix("/")) != key:
                    yield from _sample(file, key, parts)
                    key, parts = new, {}
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


#: By the end of a file's name, who reads it.
_READERS = {
    ".html": _html, ".htm": _html, ".xhtml": _html, ".md": _markdown, ".markdown": _markdown,
    ".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".ndjson": _json_lines,
    ".parquet": _parquet, ".json": _coco, ".txt": _beside, ".tar": _tar,
}  # fmt: skip
