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
        typer.Option("--report", metavar="DIR", help="Write a page to review the findings."),
    ] = None,
) -> None:
    """Check that texts fit their pictures: alt texts, captions, product texts.

    Reads HTML, Markdown, CSV, TSV, JSONL, Parquet, COCO captions, WebDataset
    tars, photo.jpg with photo.txt, and folders of these. Options can also be
    in pyproject.toml or clseave.toml, in the table tool.clseave.check.

    Exit status: 0 no findings, 1 findings, 2 wrong usage.
    """
    from clseave_cli.core.prediction.checking import findings, output

    page = output.report_target(report) if report is not None else None
    progress = terminal.TerminalProgress()
    result = findings.check(paths, config, progress, fetching=fetch, thumbnails=page is not None)
    text = output.render(result, config.format)
    encoding = sys.stdout.encoding if config.format == "text" else "utf-8"
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(encoding, "backslashreplace"))
    sys.stdout.buffer.flush()
    if config.format != "text":
        terminal.say(output.summary_line(result), to_stderr=True)
    if page is not None:
        output.write_report(page, result)
        terminal.say(f"{page}: open it in a browser to review the findings", to_stderr=True)
    if result.fails(config.fail_on):
        raise typer.Exit(1)
