"""Writes the whole report of an evaluation into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clseave_cli.core.evaluation.report.curves import LearningCurve
from clseave_cli.core.evaluation.report.figures import draw_figures
from clseave_cli.core.evaluation.report.gallery import Gallery, Thumbnail, thumbnail
from clseave_cli.core.evaluation.report.latex import latex_table
from clseave_cli.core.evaluation.report.markdown import markdown_report
from clseave_cli.core.evaluation.report.names import language_name
from clseave_cli.core.evaluation.report.numbers import DASH
from clseave_cli.core.evaluation.report.sections import (
    Section,
    build_sections,
    headline,
    highlights,
    notes,
)
from clseave_cli.core.evaluation.results import Results
from clseave_cli.core.evaluation.rows import PredictedRows
from clseave_cli.core.files import Kind, atomic_folder, require_replaceable
from clseave_cli.labels import LABELS

HTML_FILE, MARKDOWN_FILE, LATEX_FILE = "report.html", "report.md", "table.tex"

#: A folder of `evaluate --report`, which a new one may replace.
REPORT = Kind(
    "a report",
    rf"results\.json|{HTML_FILE}|{MARKDOWN_FILE}|{LATEX_FILE}|predictions\.[^/]+\.jsonl"
    r"|figures/[^/]+\.png|images/\d{3}\.\w+",
    "results.json",
    lambda document: "results" in document and "signature" in document,
)

_DEFAULT_TITLE = "Visual entailment across languages"


def write_report(
    results: Results,
    folder: Path,
    *,
    predictions: Sequence[PredictedRows] = (),
    curves: Sequence[LearningCurve] = (),
    galleries: Sequence[Gallery] = (),
    title: str = _DEFAULT_TITLE,
) -> Path:
    """Writes `results.json`, `report.html`, `report.md`, `table.tex`, `figures/` and `images/`.

    The folder appears as a whole, in place of an older report. `report.html` needs no other file.

    Args:
        results: the document.
        folder: where to write.
        predictions: of every row, to be compared with those of other models.
        curves: learning curves of the models, see `curves.read_learning_curve`.
        galleries: sections of pictures with sentences; empty ones are left out.
        title: heading of the report.

    Returns:
        Path of `report.html`.

    Raises:
        ClseaveError: the disk is full or read-only.
    """
    galleries = [gallery for gallery in galleries if gallery.items]
    drawn = draw_figures(results, curves)
    sections = build_sections(results, tuple(curves), drawn)
    thumbnails = {
        id(item): found
        for gallery in galleries
        for item in gallery.items
        if (found := thumbnail(item.image)) is not None
    }
    figures = {name: f"figures/{name}.png" for name in drawn}
    # Numbered: a name from the data could be anything, a path upwards included.
    pictures = {
        key: f"images/{number:03d}.{picture.extension}"
        for number, (key, picture) in enumerate(thumbnails.items(), start=1)
    }
    texts = {
        HTML_FILE: _page(title, results, sections, galleries, drawn, thumbnails),
        MARKDOWN_FILE: markdown_report(title, results, sections, galleries, figures, pictures),
        LATEX_FILE: latex_table(results),
    }
    with atomic_folder(folder) as unfinished:
        for path in {*figures.values(), *pictures.values()}:
            (unfinished / path).parent.mkdir(exist_ok=True)
        for name, path in figures.items():
            (unfinished / path).write_bytes(drawn[name])
        for key, path in pictures.items():
            (unfinished / path).write_bytes(thumbnails[key].encoded)
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        for rows in predictions:
            rows.write(unfinished)
        results.write(unfinished)
        require_replaceable(folder, REPORT)
    return folder / HTML_FILE


def _page(
    title: str,
    results: Results,
    sections: Sequence[Section],
    galleries: Sequence[Gallery],
    drawn: dict[str, bytes],
    thumbnails: dict[int, Thumbnail],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        headline=headline(results),
        highlights=highlights(results),
        notes=notes(results),
        results=results,
        sections=sections,
        galleries=galleries,
        figures={name: Thumbnail(encoded, "png", 0, 0).data_uri for name, encoded in drawn.items()},
        thumbnail_of=lambda item: thumbnails.get(id(item)),
        labels=LABELS,
        dash=DASH,
        language_name=language_name,
    )
