"""`report.md`: the report as Markdown, with its figures beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from clseave_cli.core.evaluation.report.gallery import Gallery, GalleryItem
from clseave_cli.core.evaluation.report.numbers import DASH
from clseave_cli.core.evaluation.report.sections import Section, Table, headline, notes
from clseave_cli.core.evaluation.results import Results
from clseave_cli.labels import LABELS

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!$&])")


def escape_markdown(text: str) -> str:
    """Text with every character that Markdown (or HTML in it) reads as markup made literal."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown_report(
    title: str,
    results: Results,
    sections: Sequence[Section],
    galleries: Sequence[Gallery],
    figures: Mapping[str, str],
    pictures: Mapping[int, str],
) -> str:
    """Renders the report.

    Args:
        title: heading of the page.
        results: the document.
        sections: from `build_sections`.
        galleries: pictures to show.
        figures: path of each figure's file, relative to the page, by name.
        pictures: the same of each gallery item's picture, by `id` of the item.
    """
    parts = [f"# {escape_markdown(title)}", escape_markdown(headline(results))]
    parts += [f"**{escape_markdown(note)}**" for note in notes(results)]
    for section in sections:
        parts += [f"## {section.title}", escape_markdown(section.text)]
        parts += [_table(table) for table in section.tables]
        for figure in section.figures:
            parts += [f"![{figure.caption}]({figures[figure.name]})", f"*{figure.caption}*"]
    for gallery in galleries:
        parts += [f"## {escape_markdown(gallery.title)}", escape_markdown(gallery.introduction)]
        for item in gallery.items:
            parts += _item(item, pictures.get(id(item)))
    parts += ["## Signature", _signature(results)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = [table.full_columns, ("---", *["---:"] * (len(table.columns) - 1))]
    lines += [tuple(escape_markdown(cell) for cell in row) for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _item(item: GalleryItem, picture: str | None) -> list[str]:
    name = escape_markdown(item.name)
    rows = tuple(
        (
            entry.lang,
            entry.hypothesis,
            entry.label,
            entry.predicted,
            *(f"{100 * p:.0f} %" for p in entry.probabilities),
        )
        for entry in item.entries
    )
    columns = ("language", "hypothesis", "gold", "predicted", *LABELS)
    shown = f"![{name}]({picture})" if picture else "(the picture cannot be read)"
    return [f"### {name}", shown, _table(Table(columns, rows))]


def _signature(results: Results) -> str:
    signature = results.signature
    rows = [
        ("clseave", signature.version),
        ("precision", f"{signature.precision or DASH} on {signature.device or DASH}"),
        ("seed", str(signature.seed)),
        ("resamples", str(signature.resamples)),
        *signature.data.items(),
        *signature.training.items(),
        *signature.checkpoints.items(),
        *((f"{lang} translated by", name) for lang, name in signature.translators.items()),
    ]
    return _table(Table(("what", "value"), tuple(rows)))
