"""The report of an evaluation: a self-contained HTML page, figures, and a LaTeX table.

The page's text is in `page.html`; its numbers and sentences are in `summary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clseave_cli.core.data.languages import language_name
from clseave_cli.core.evaluation import summary
from clseave_cli.core.evaluation.comparison import PredictedRows
from clseave_cli.core.evaluation.figures import Drawing, LearningCurve, draw_figures
from clseave_cli.core.evaluation.gallery import Gallery, data_uri, thumbnail
from clseave_cli.core.evaluation.results import Results, means
from clseave_cli.core.files import Kind, atomic_folder, require_replaceable
from clseave_cli.labels import LABELS

HTML_FILE, LATEX_FILE = "report.html", "table.tex"

#: A folder of `evaluate --report`, which a new one may replace; older ones have Markdown, too.
REPORT = Kind(
    "a report",
    rf"results\.json|{HTML_FILE}|report\.md|{LATEX_FILE}|predictions\.[^/]+\.jsonl"
    r"|figures/[^/]+\.png|images/\d{3}\.\w+",
    "results.json",
    lambda document: "results" in document and "signature" in document,
)

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def write_report(
    results: Results,
    folder: Path,
    *,
    predictions: Sequence[PredictedRows] = (),
    curves: Sequence[LearningCurve] = (),
    galleries: Sequence[Gallery] = (),
) -> Path:
    """Writes `results.json`, `report.html`, `table.tex`, `figures/` and `predictions.*.jsonl`.

    The folder appears as a whole, in place of an older report. Returns the path of `report.html`,
    which needs no other file. Galleries without photos are left out.

    Raises:
        ClseaveError: the disk is full or read-only.
    """
    drawn = draw_figures(results, curves)
    page = html_page(results, drawn, [gallery for gallery in galleries if gallery.items], curves)
    with atomic_folder(folder) as unfinished:
        (unfinished / "figures").mkdir()
        for name, drawing in drawn.items():
            (unfinished / "figures" / f"{name}.png").write_bytes(drawing.encoded)
        for name, text in ((HTML_FILE, page), (LATEX_FILE, latex_table(results))):
            (unfinished / name).write_text(text, encoding="utf-8")
        for rows in predictions:
            rows.write(unfinished)
        results.write(unfinished)
        require_replaceable(folder, REPORT)
    return folder / HTML_FILE


def html_page(
    results: Results,
    drawn: Mapping[str, Drawing],
    galleries: Sequence[Gallery],
    curves: Sequence[LearningCurve] = (),
) -> str:
    """The page, with figures by name."""
    figures = {name: [data_uri(panel, "png") for panel in d.panels] for name, d in drawn.items()}
    aligned = [curve for curve in curves if "dev mse" in curve.lines]
    more = {"galleries": galleries, "figures": figures, "aligned": aligned, "thumbnail": thumbnail}
    return _render("page.html", results, **more)


def latex_table(results: Results) -> str:
    """A `table` environment that needs the package `booktabs`; means of several trainings."""
    return _render("table.tex", results)


def escape_latex(text: str) -> str:
    """Text with the special characters of LaTeX escaped."""
    return "".join(_LATEX_SPECIAL.get(character, character) for character in text)


def _render(template: str, results: Results, **more: Any) -> str:
    is_html = template.endswith(".html")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=is_html,
        variable_start_string="{{" if is_html else "<<",
        variable_end_string="}}" if is_html else ">>",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["latex"] = escape_latex
    public = {name: value for name, value in vars(summary).items() if not name.startswith("_")}
    public |= {"language_name": language_name, "labels": LABELS, "getattr": getattr}
    page = environment.get_template(template)
    return page.render(public | more, results=results, mean=means(results))
