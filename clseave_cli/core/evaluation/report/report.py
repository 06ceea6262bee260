"""Writes the whole report of an evaluation into a folder."""

from __future__ import annotations

import shutil
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
from clseave_cli.core.files import atomic_file, atomic_folder, writing
from clseave_cli.labels import LABELS

HTML_FILE, MARKDOWN_FILE, LATEX_FILE = "report.html", "report.md", "table.tex"

_DEFAULT_TITLE = "Visual entailment across languages"


def write_report(
    results: Results,
    folder: Path,
    *,
    curves: Sequence[LearningCurve] = (),
    galleries: Sequence[Gallery] = (),
    title: str = _DEFAULT_TITLE,
) -> Path:
    """Writes `results.json`, `report.html`, `report.md`, `table.tex`, `figures/` and `images/`.

    `report.html` needs none of the others. Files of an older report are replaced; `results.json`
    comes last, so a folder that has a new one is complete.

    Args:
        results: the document.
        folder: where to write; made if it is not there.
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
    figures = _write_figures(folder / "figures", drawn)
    pictures = _write_pictures(folder / "images", thumbnails)
    page = _page(title, results, sections, galleries, drawn, thumbnails)
    _write(folder / HTML_FILE, page)
    _write(
        folder / MARKDOWN_FILE,
        markdown_report(title, results, sections, galleries, figures, pictures),
    )
    _write(folder / LATEX_FILE, latex_table(results))
    results.write(folder)
    return folder / HTML_FILE


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as stream:
        stream.write(text.encode())


def _write_figures(folder: Path, drawn: dict[str, bytes]) -> dict[str, str]:
    with atomic_folder(folder) as aside:
        for name, encoded in drawn.items():
            (aside / f"{name}.png").write_bytes(encoded)
    return {name: f"{folder.name}/{name}.png" for name in drawn}


def _write_pictures(folder: Path, thumbnails: dict[int, Thumbnail]) -> dict[int, str]:
    # Numbered: a name from the data could be anything, a path upwards included.
    names = {
        key: f"{number:03d}.{picture.extension}"
        for number, (key, picture) in enumerate(thumbnails.items(), start=1)
    }
    if names:
        with atomic_folder(folder) as aside:
            for key, name in names.items():
                (aside / name).write_bytes(thumbnails[key].encoded)
    elif folder.exists():
        with writing(folder):
            shutil.rmtree(folder)
    return {key: f"{folder.name}/{name}" for key, name in names.items()}


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
