"""Texts and the pictures they belong to, out of pages, tables, folders and archives.

No input stops the others: what cannot be read becomes a `Text` with a `problem`. Every reader is
linear in the size of its file, whatever is in it.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.prediction.checking.pictures import MAX_BYTES, Locator, Picture
from clseave_cli.errors import DataError, ExtraMissing, UsageError
from clseave_cli.progress import Progress

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_IMAGE_COLUMNS = (
    "image", "image_path", "img", "picture", "photo", "filename", "file_name", "image_file",
    "image_url", "url", "path", "file", "src",
)  # fmt: skip
_TEXT_COLUMNS = (
    "text", "caption", "alt", "alt_text", "hypothesis", "sentence2", "sentence", "description",
)  # fmt: skip
_MAX_PAGE_BYTES = 16 << 20
_MAX_TEXT_BYTES = 1 << 20
_MAX_LINE_BYTES = 16 << 20
_MAX_JSON_BYTES = 1 << 30
_MAX_CANDIDATES = 32
#: How far above its end a tag's start is looked for.
_MAX_TAG_LINES = 100
#: The encodings of pages; Python knows others that are none, or slow on purpose-made input.
_ENCODINGS = re.compile(
    r"utf-?8|us-ascii|windows-125\d|iso-8859-\d+|koi8-[ru]|shift[_-]jis|euc-(jp|kr)|gb(k|2312|18030)"
    r"|big5",
    re.IGNORECASE,
)
_CHARSET = re.compile(rb"""charset\s{0,9}=\s{0,9}["']?([\w-]{1,20})""", re.IGNORECASE)


@dataclass(frozen=True)
class Text:
    """A text that is to fit a picture.

    Attributes:
        file: its file, as messages name it.
        line: the line in it, from 1; None where a file has no lines.
        place: where in such a file.
        text: the text, stripped; empty where there is none.
        picture: the picture.
        lang: the language that the page declares, if any.
        problem: why nothing could be read here; the other fields are then empty.
    """

    file: str
    line: int | None
    place: str
    text: str
    picture: Picture
    lang: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class _File:
    """A file to read: its path, its name in messages, and what its pictures may be."""

    path: Path
    shown: str
    locator: Locator
    folder: Path
    config: CheckConfig
    named: bool

    def text(
        self, text: Any, picture: Picture, line: int | None, place: str = "", lang: str = ""
    ) -> Text:
        # A lone surrogate, which JSON can spell, is in no encoding.
        clean = str("" if text is None else text).encode("utf-8", "replace").decode()
        return Text(self.shown, line, place, " ".join(clean.split()), picture, lang or None)

    def problem(self, message: str, line: int | None = None, place: str = "") -> Text:
        return Text(self.shown, line, place, "", Picture("", None, "unread"), problem=message)

    def bytes(self, limit: int) -> bytes:
        with self.path.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise DataError(f"larger than {limit >> 20} MiB; split it.")
        return content

    def value(self, value: Any) -> Picture:
        """The picture that a cell of a table holds or names."""
        if isinstance(value, dict):  # as the library datasets keeps images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return (
                Picture("bytes", value)
                if len(value) <= MAX_BYTES
                else Picture("bytes", None, "too large")
            )
        if isinstance(value, str) and value.strip():
            return self.locator.file(value.strip(), self.folder)
        return Picture("", None, "missing")

    def columns(self, names: Sequence[str]) -> tuple[str, str] | None:
        """The columns of pictures and texts; None in a file that only lies there.

        Raises:
            DataError: they were named, or the file was, and they are not there.
        """
        chosen = []
        for wanted, usual, flag in (
            (self.config.image_column, _IMAGE_COLUMNS, "--image-column"),
            (self.config.text_column, _TEXT_COLUMNS, "--text-column"),
        ):
            lowered = {name.strip().lower(): name for name in reversed(names)}
            options = (wanted,) if wanted else usual
            column = next((lowered[o.lower()] for o in options if o.lower() in lowered), None)
            if column is None and not wanted and not self.named:
                return None
            if column is None:
                there = ", ".join(map(str, names))[:200]
                raise DataError(f"{wanted or flag}: no such column; there are: {there}.")
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
        UsageError: a path is not there or of no kind that is read.
        ExtraMissing: a page needs a parser that is not installed.
    """
    for path in paths:
        if not path.is_dir() and not path.is_file():
            raise UsageError(f"{path}: no such file or folder.")
        if path.is_file() and path.suffix.lower() not in _READERS:
            kinds = " ".join(_READERS)
            raise UsageError(f"{path}: not a kind of file that is checked; there are: {kinds}.")
    if config.root is not None and not config.root.is_dir():
        raise UsageError(f"--root {config.root}: no such folder.")
    for path in paths:
        root = config.root or (path if path.is_dir() else path.parent)
        locator = Locator(root, fetching)
        tables = Locator(config.images, fetching) if config.images else locator
        for file in _walk(path, progress) if path.is_dir() else [path]:
            reader, is_table = _READERS[file.suffix.lower()]
            source = _File(
                file,
                _shown(file),
                tables if is_table else locator,
                config.images if is_table and config.images else file.parent,
                config,
                file == path,
            )
            try:
                yield from reader(source)
            except DataError as error:
                yield source.problem(str(error))
            except OSError as error:
                yield source.problem(f"cannot be read ({error.strerror}).")


def _walk(root: Path, progress: Progress) -> Iterator[Path]:
    real = root.resolve()
    for folder, folders, names in os.walk(
        root, onerror=lambda error: progress.note(f"{error.filename}: {error.strerror}; skipped.")
    ):
        folders[:] = sorted(
            name
            for name in folders
            if name[0] != "." and name not in ("node_modules", "__pycache__")
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name[0] == "." or path.suffix.lower() not in _READERS:
                continue
            if not path.resolve().is_relative_to(real) or not path.is_file():
                progress.note(f"{_shown(path)}: not a file inside {root}; skipped.")
            elif path.suffix != ".txt" or _picture_beside(path) is not None:
                yield path


def _shown(path: Path) -> str:
    """Relative to the working directory where it is in it: the same on every machine."""
    absolute = Path(os.path.normpath(path.absolute()))
    here = Path.cwd()
    shown = absolute.relative_to(here) if absolute.is_relative_to(here) else path
    return shown.as_posix().encode("utf-8", "replace").decode()


def _decoded(content: bytes) -> str:
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):  # fmt: skip
        if content.startswith(mark):
            return content[len(mark) :].decode(name, "replace")
    declared = _CHARSET.search(content[:1024])
    name = declared[1].decode() if declared else "utf-8"
    return content.decode(name if _ENCODINGS.fullmatch(name) else "utf-8", "replace")


class _Page:
    """Collects the pictures of a page: the target of lxml's parser, which is fed line by line.

    Fed so, the parser says in which line a tag ends. It builds no tree, so that neither depth nor
    number of lines has a limit.
    """

    def __init__(self, file: _File, lines: list[str], first: int) -> None:
        self._file = file
        self._lines = lines
        self._first = first
        self._number = 0
        self.found: list[Text] = []
        self._base = self._lang = ""
        self._sources: list[str] = []
        self._figures: list[_Figure] = []
        self._silent = 0

    def read(self) -> list[Text]:
        parser = _lxml().HTMLParser(target=self, encoding="utf-8", huge_tree=True)
        try:
            for line in self._lines:
                self._number += 1
                parser.feed(line.encode("utf-8", "replace"))
            if self._lines:
                parser.close()
        except _lxml().LxmlError as error:  # an empty page is one
            if any(line.strip() for line in self._lines):
                self.found.append(self._file.problem(f"not HTML that can be read ({error})."))
        while self._figures:
            self._close_figure()
        return self.found

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "img":
            self._image(attributes)
        elif tag == "figure":
            self._figures.append(_Figure())
        elif tag == "figcaption" and self._figures:
            figure = self._figures[-1]
            figure.line, figure.open = self._line(tag), True
            figure.lang = attributes.get("lang", "")
        elif tag == "picture":
            self._sources = []
        elif tag == "source":
            self._sources += _candidates(attributes.get("srcset", ""))
        elif tag == "base":
            self._base = self._base or attributes.get("href", "")
        elif tag == "html":
            self._lang = attributes.get("lang", "")
        elif tag in ("script", "style"):
            self._silent += 1

    def end(self, tag: str) -> None:
        if tag == "figure" and self._figures:
            self._close_figure()
        elif tag == "figcaption" and self._figures:
            self._figures[-1].open = False
        elif tag == "picture":
            self._sources = []
        elif tag in ("script", "style"):
            self._silent = max(0, self._silent - 1)

    def data(self, text: str) -> None:
        if self._figures and self._figures[-1].open and not self._silent:
            self._figures[-1].caption.append(text)

    def close(self) -> None:
        return

    def _image(self, attributes: dict[str, str]) -> None:
        candidates = _candidates(attributes.get("srcset", ""))
        picture = self._file.locator.web(
            [attributes.get("src"), attributes.get("data-src"), *candidates, *self._sources],
            self._file.folder,
            self._base,
        )
        alt = attributes.get("alt")
        hidden = attributes.get("role") in ("presentation", "none")
        if (
            hidden
            or attributes.get("aria-hidden") == "true"
            or (alt is not None and not alt.strip())
        ):
            picture = Picture(picture.name, picture.source, "decorative")
            alt = ""
        line = self._line("img")
        found = self._file.text(alt, picture, line, lang=attributes.get("lang") or self._lang)
        if self._figures:
            self._figures[-1].images.append(found)
        else:
            self.found.append(found)

    def _line(self, tag: str) -> int:
        """The line in which the tag that was just read begins."""
        opening = f"<{tag}"
        for number in range(self._number, max(0, self._number - _MAX_TAG_LINES), -1):
            if opening in self._lines[number - 1].lower():
                return self._first + number
        return self._first + self._number

    def _close_figure(self) -> None:
        figure = self._figures.pop()
        caption = "".join(figure.caption).strip()
        only = figure.images[0] if len(figure.images) == 1 else None
        for image in figure.images:
            # A picture that its caption describes needs no further text.
            if image.text or not (only and caption):
                self.found.append(image)
        if only and caption:
            picture = Picture(only.picture.name, only.picture.source, only.picture.skipped)
            if picture.skipped == "decorative":
                picture = Picture(picture.name, picture.source)
            lang = figure.lang or only.lang or ""
            self.found.append(self._file.text(caption, picture, figure.line, lang=lang))


class _Figure:
    def __init__(self) -> None:
        self.images: list[Text] = []
        self.caption: list[str] = []
        self.line = 0
        self.lang = ""
        self.open = False


def _candidates(srcset: str) -> list[str]:
    """The URLs of a `srcset`; a URL may contain commas, but does not end with one."""
    urls: list[str] = []
    while (srcset := srcset.strip(" \t\r\n\f,")) and len(urls) < _MAX_CANDIDATES:
        url, *rest = srcset.split(None, 1)
        srcset = rest[0] if rest else ""
        if url.endswith(","):
            url = url.rstrip(",")
        else:  # up to the comma goes its width or density
            srcset = srcset.partition(",")[2]
        urls.append(url)
    return urls


def _lxml() -> Any:
    try:
        from lxml import etree
    except ImportError:
        raise ExtraMissing(
            "check needs lxml for HTML; run: pip install 'clseave-cli[check]'."
        ) from None
    return etree


def _html(file: _File) -> Iterator[Text]:
    lines = _decoded(file.bytes(_MAX_PAGE_BYTES)).split("\n")
    yield from _Page(file, [f"{line}\n" for line in lines], 0).read()


def _markdown(file: _File) -> Iterator[Text]:
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise ExtraMissing(
            "check needs markdown-it-py for Markdown; run: pip install 'clseave-cli[check]'."
        ) from None
    source = _decoded(file.bytes(_MAX_PAGE_BYTES))
    for block in MarkdownIt("commonmark").enable("table").parse(source):
        if block.map is None:
            continue
        line = block.map[0]
        if block.type == "html_block":
            yield from _Page(file, block.content.splitlines(keepends=True), line).read()
        for token in block.children or ():
            if token.type == "image":
                picture = file.locator.web([str(token.attrGet("src") or "")], file.folder)
                alt = "".join(_plain(child) for child in token.children or ())
                yield file.text(alt, picture, line + 1)
            elif token.type == "html_inline" and token.content[:4].lower() == "<img":
                yield from _Page(file, token.content.splitlines(keepends=True), line).read()
            line += token.content.count("\n") + (token.type in ("softbreak", "hardbreak"))


def _plain(token: Any) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return " "
    return str(token.content) if token.type in ("text", "code_inline", "image") else ""


def _lines(stream: BinaryIO) -> Iterator[str]:
    while line := stream.readline(_MAX_LINE_BYTES + 1):
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(f"a line of more than {_MAX_LINE_BYTES >> 20} MiB.")
        yield line.decode("utf-8", "replace")


def _delimited(file: _File) -> Iterator[Text]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    with file.path.open("rb") as stream:
        lines = _lines(stream)
        header = next(lines, "").removeprefix("\ufeff")
        delimiter = "\t" if file.path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
        number = 1
        try:
            names = next(csv.reader([header], delimiter=delimiter), [])
            columns = file.columns(names)
            if columns is None:
                return
            image, text = (names.index(column) for column in columns)
            reader = csv.reader(lines, delimiter=delimiter)
            for cells in reader:
                if len(cells) > max(image, text):
                    yield file.text(cells[text], file.value(cells[image]), number + 1)
                elif cells:
                    yield file.problem(
                        f"{len(cells)} cells; expected {len(names)}, as in the header.", number + 1
                    )
                number = 1 + reader.line_num
        except csv.Error as error:
            yield file.problem(f"not valid CSV ({error}).", number + 1)


def _json_lines(file: _File) -> Iterator[Text]:
    columns = None
    with file.path.open("rb") as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            row = _loads(line.removeprefix("\ufeff"))
            if not isinstance(row, dict):
                yield file.problem("not a JSON object; expected one a line.", number)
                continue
            columns = columns or file.columns(list(row))
            if columns is None:
                return
            yield file.text(row.get(columns[1]), file.value(row.get(columns[0])), number)


def _loads(text: str | bytes) -> Any:
    """A JSON document; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parquet(file: _File) -> Iterator[Text]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path) as table:
            columns = file.columns(table.schema_arrow.names)
            if columns is None:
                return
            # Few rows at once: each may be a picture.
            for batch in table.iter_batches(32, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    picture = file.value(row[columns[0]])
                    yield file.text(row[columns[1]], picture, None, f"row {number}")
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        yield file.problem(f"damaged after row {number} ({reason}).")


def _coco(file: _File) -> Iterator[Text]:
    document = _loads(file.bytes(_MAX_JSON_BYTES)) if file.named or _looks_coco(file.path) else None
    images = document.get("images") if isinstance(document, dict) else None
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(images, list) or not isinstance(annotations, list):
        if file.named:
            raise DataError('not COCO captions; expected lists "images" and "annotations".')
        return
    names = {str(i.get("id")): i.get("file_name") for i in images if isinstance(i, dict)}
    for number, entry in enumerate(annotations):
        place = f"annotations[{number}]"
        if not isinstance(entry, dict) or "caption" not in entry:
            yield file.problem('expected "image_id" and "caption".', None, place)
            return
        name = names.get(str(entry.get("image_id")))
        yield file.text(entry["caption"], file.value(name), None, place)


def _looks_coco(path: Path) -> bool:
    """Whether a JSON file that nobody named may be one, so that others are not read whole."""
    with path.open("rb") as stream:
        start = stream.read(1 << 16)
    return b'"images"' in start or b'"annotations"' in start


def _beside(file: _File) -> Iterator[Text]:
    image = _picture_beside(file.path)
    if image is None:
        raise DataError(f"no picture beside it; expected {file.path.stem}.jpg, .png, …")
    picture = file.locator.file(image.name, file.path.parent)
    lines = _decoded(file.bytes(_MAX_TEXT_BYTES)).split("\n")
    texts = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in texts or [(1, "")]:
        yield file.text(line, picture, number)


def _picture_beside(path: Path) -> Path | None:
    for suffix in (*_PICTURES, *(suffix.upper() for suffix in _PICTURES)):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    return None


def _tar(file: _File) -> Iterator[Text]:
    """A WebDataset: members that share a name up to its first dot belong together."""
    key = ""
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(file.path, "r:") as archive:
            offset = -1
            for member in archive:
                # Damaged sizes can lead backwards, and then for ever.
                if member.offset <= offset:
                    raise DataError("damaged: members overlap.")
                offset = member.offset
                archive.members = []  # type: ignore[attr-defined]  # it would grow
                if not member.isreg() or member.issparse():
                    continue
                name = PurePosixPath(member.name)
                stem, _, kind = name.name.partition(".")
                if (new := f"{name.parent}/{stem}") != key:
                    yield from _sample(file, key, parts)
                    key, parts = new, {}
                kind = kind.lower()
                is_picture = f".{kind.rpartition('.')[2]}" in _PICTURES
                limit = MAX_BYTES if is_picture else _MAX_TEXT_BYTES
                if is_picture or kind in ("txt", "text", "caption", "json"):
                    stream = archive.extractfile(member)
                    content = stream.read(limit + 1) if stream is not None else b""
                    parts["picture" if is_picture else kind] = content
    except tarfile.TarError as error:
        yield file.problem(f"not a tar, or damaged ({error}); a packed one has to be unpacked.")
    yield from _sample(file, key, parts)


def _sample(file: _File, key: str, parts: dict[str, bytes]) -> Iterator[Text]:
    content = parts.pop("picture", None)
    if content is None or not parts:
        return
    name = key.removeprefix("./")
    picture = Picture(name, content)
    if len(content) > MAX_BYTES:
        picture = Picture(name, None, "too large")
    text: Any = next((parts[kind] for kind in ("txt", "text", "caption") if kind in parts), None)
    if text is not None:
        text = text[:_MAX_TEXT_BYTES].decode("utf-8", "replace")
    else:
        row = _loads(parts["json"])
        named = [file.config.text_column] if file.config.text_column else _TEXT_COLUMNS
        text = next((row[n] for n in named if n in row), None) if isinstance(row, dict) else None
    yield file.text(text, picture, None, name)


#: By the end of a file's name: who reads it, and whether its pictures are those of a table.
_READERS = {
    ".html": (_html, False),
    ".htm": (_html, False),
    ".xhtml": (_html, False),
    ".md": (_markdown, False),
    ".markdown": (_markdown, False),
    ".csv": (_delimited, True),
    ".tsv": (_delimited, True),
    ".jsonl": (_json_lines, True),
    ".ndjson": (_json_lines, True),
    ".parquet": (_parquet, True),
    ".json": (_coco, True),
    ".txt": (_beside, False),
    ".tar": (_tar, False),
}
