"""`clseave check`: does each text of a page, folder or table fit its picture?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from clseave_cli.commands import terminal
from clseave_cli.core.config import CheckConfig


def run(
    config: CheckConfig,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Pages, tables, archives, and folders of them."),
    ],
    *,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Request remote pictures, from public addresses only.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write a page to go through by hand."),
    ] = None,
) -> None:
    """Check that texts fit their pictures: alt texts, captions, product texts.

    Reads HTML, Markdown, CSV, TSV, JSONL, Parquet, COCO captions, WebDataset
    tars, photo.jpg beside photo.txt, and folders of these. Options can also
    be in pyproject.toml or clseave.toml, in the table tool.clseave.check.

    Exit status: 0 nothing found, 1 findings, 2 wrong usage.
    """
    from clseave_cli.core.prediction.checking import findings, output

    page = output.report_target(report) if report is not None else None
    result = findings.check(
        paths,
        config,
        terminal.TerminalProgress(),
        fetching=fetch,
        thumbnails=page is not None,
    )
    text = output.render(result, config.format)
    encoding = sys.stdout.encoding if config.format == "text" else "utf-8"
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(encoding, "backslashreplace"))
    sys.stdout.buffer.flush()
    notes = [] if config.format == "text" else [output.summary_line(result)]
    if page is not None:
        output.write_report(page, result)
        notes.append(f"{page}: open it in a browser to go through the findings")
    for note in notes:
        terminal.stderr().print(note, soft_wrap=True, markup=False)
    if result.fails(config.fail_on):
        raise typer.Exit(1)
