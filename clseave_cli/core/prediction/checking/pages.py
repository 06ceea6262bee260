"""Reads images, their texts and their lines from HTML and Markdown."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from clseave_cli.errors import DataError, ExtraMissing

_MAX_CANDIDATES = 8
_MAX_BLOCK = 20_000
#: Tags whose lines are needed: a page is fed to the parser in pieces that begin with them.
_TAG = re.compile(r"<(?:img|figcaption)", re.IGNORECASE)
#: Accepted encodings; some of Python's others are no text encodings, or slow on crafted input.
_ENCODING = re.compile(
    r"utf-8|windows-125\d|iso-8859-\d+|koi8-[ru]|shift_jis|euc-(jp|kr)|gb(k|2312|18030)|big5", re.I
)
_CHARSET = re.compile(rb"""charset\s{0,9}=\s{0,9}["']?([\w-]{1,20})""", re.IGNORECASE)


@dataclass(frozen=True)
class Image:
    """An image of a page.

    Attributes:
        line: from 1.
        text: alt text or caption; None: neither.
        sources: alternative references to the image.
        base: the page's `<base href>`.
        lang: the language that the page declares.
        decorative: whether the page marks it as decorative.
    """

    line: int
    text: str | None
    sources: tuple[str | None, ...]
    base: str = ""
    lang: str = ""
    decorative: bool = False


def decoded(content: bytes) -> str:
    """Decodes text from the encoding that it declares, or UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    declared = _CHARSET.search(content[:1024])
    name = declared[1].decode() if declared else "utf-8"
    text = content.decode(name if _ENCODING.fullmatch(name) else "utf-8", "replace")
    return text.removeprefix("\ufeff")


def read_html(content: bytes) -> list[Image]:
    """The images of a page, in order; raises `DataError` if it cannot be parsed."""
    return _Page(decoded(content), 0).images


def read_markdown(content: bytes) -> Iterator[Image]:
    """The images of a Markdown text, including those in its HTML."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise _missing(error) from None
    # Inline parsing takes quadratic time, so the length of blocks is checked first.
    parser = MarkdownIt("commonmark").enable("table").disable("inline")
    env: dict[str, Any] = {}
    for block in parser.parse(decoded(content), env):
        line = block.map[0] if block.map is not None else 0
        inside: list[Any] = []
        if len(block.content) > _MAX_BLOCK and block.type == "inline":
            raise DataError(f"line {line + 1}: a paragraph of more than {_MAX_BLOCK} characters.")
        if block.type == "inline":
            parser.inline.parse(block.content, parser, env, inside)
        if block.type == "html_block":
            yield from _Page(block.content, line).images
        for token in inside:
            if token.type == "image":
                alt = "".join(_plain(child) for child in token.children or ())
                yield Image(line + 1, alt, (str(token.attrGet("src") or ""),))
            elif token.type == "html_inline" and token.content[:4].lower() == "<img":
                yield from _Page(token.content, line).images
            line += token.content.count("\n") + (token.type in ("softbreak", "hardbreak"))


def _missing(error: ImportError) -> ExtraMissing:
    return ExtraMissing(f"check needs {error.name}; run: pip install -e '.[check]'.")


def _plain(token: Any) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return " "
    return str(token.content) if token.type in ("text", "code_inline", "image") else ""


@dataclass
class _Figure:
    images: list[Image] = field(default_factory=list)
    caption: list[str] = field(default_factory=list)
    line: int = 0
    is_open: bool = False


class _Page:
    """Target of lxml's parser; without a tree, neither depth nor length of a page is limited."""

    def __init__(self, source: str, lines_before: int) -> None:
        try:
            from lxml import etree
        except ImportError as error:
            raise _missing(error) from None
        self.images: list[Image] = []
        self._lines: dict[str, int] = {}  # of the last tag by name
        self._base = self._lang = ""
        self._sources: list[str] = []  # of the enclosing <picture>
        self._figures: list[_Figure] = []
        self._is_code = False
        if not source.strip():
            return
        parser = etree.HTMLParser(target=self, encoding="utf-8", huge_tree=True)
        try:
            line = lines_before + 1
            cuts = [0, *(match.start() for match in _TAG.finditer(source)), len(source)]
            for piece in (source[start:end] for start, end in pairwise(cuts)):
                if piece[:1] == "<":
                    self._lines["img" if piece[1:2] in "iI" else "figcaption"] = line
                parser.feed(piece.encode("utf-8", "replace"))
                line += piece.count("\n")
            parser.close()
        except etree.LxmlError as error:
            raise DataError(f"HTML cannot be parsed ({error}).") from None
        while self._figures:
            self._close_figure()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "img":
            self._image(attributes)
        elif tag == "figure":
            self._figures.append(_Figure())
        elif tag == "figcaption" and self._figures:
            self._figures[-1].line, self._figures[-1].is_open = self._lines[tag], True
        elif tag == "picture":
            self._sources = []
        elif tag == "source":
            candidates = _candidates(attributes.get("srcset", ""))
            self._sources = (self._sources + candidates)[:_MAX_CANDIDATES]
        elif tag == "base":
            self._base = self._base or attributes.get("href", "").strip()
        elif tag == "html":
            self._lang = attributes.get("lang", "")
        elif tag in ("script", "style"):
            self._is_code = True

    def end(self, tag: str) -> None:
        if tag == "figure" and self._figures:
            self._close_figure()
        elif tag == "figcaption" and self._figures:
            self._figures[-1].is_open = False
        elif tag == "picture":
            self._sources = []
        elif tag in ("script", "style"):
            self._is_code = False

    def data(self, text: str) -> None:
        if self._figures and self._figures[-1].is_open and not self._is_code:
            self._figures[-1].caption.append(text)

    def close(self) -> None:
        return

    def _image(self, attributes: dict[str, str]) -> None:
        alt = attributes.get("alt")
        image = Image(
            self._lines["img"],
            alt,
            (
                attributes.get("src"), attributes.get("data-src"),
                *_candidates(attributes.get("srcset", "")), *self._sources,
            ),
            self._base,
            attributes.get("lang") or self._lang,
            decorative=(alt is not None and not alt.strip())
            or attributes.get("role") in ("presentation", "none")
            or attributes.get("aria-hidden") == "true",
        )  # fmt: skip
        (self._figures[-1].images if self._figures else self.images).append(image)

    def _close_figure(self) -> None:
        figure = self._figures.pop()
        # A captioned image needs no alt text; a caption of several images describes none of them.
        caption = "".join(figure.caption).strip() if len(figure.images) == 1 else ""
        self.images += [i for i in figure.images if not caption or (i.text and not i.decorative)]
        if caption:
            image = figure.images[0]
            self.images.append(replace(image, line=figure.line, text=caption, decorative=False))


def _candidates(srcset: str) -> list[str]:
    """The URLs of a `srcset`; a URL may contain commas, but does not end with one."""
    urls: list[str] = []
    while (srcset := srcset.strip(" \t\r\n\f,")) and len(urls) < _MAX_CANDIDATES:
        url, *rest = srcset.split(None, 1)
        srcset = rest[0] if rest else ""
        if not url.endswith(","):  # skip its width or density, up to the next comma
            srcset = srcset.partition(",")[2]
        urls.append(url.rstrip(","))
    return urls
