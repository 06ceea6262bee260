"""`clseave push`: publishes models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clseave_cli.commands import terminal


def run(
    folder: Annotated[Path, typer.Argument(help="A model, or a folder of models.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the hub.")],
    *,
    license: Annotated[
        str, typer.Option("--license", metavar="ID", help="Licence, such as cc-by-4.0; required.")
    ] = "",
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="The models' report of evaluate --report."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", metavar="DIR", help="A student's CLIP-VE; unset: next to it."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Visible only to you.")] = False,
) -> None:
    """Publish models on the Hugging Face hub, with a card that shows their results.

    FOLDER is a student (published with its CLIP-VE), a CLIP-VE, a whole runs
    folder, or an exported one. Other commands read it with --runs ORG/NAME.
    Log in with `hf auth login`, or set HF_TOKEN.
    """
    from clseave_cli.core.evaluation.publishing import push

    result = push(
        folder,
        repository,
        license=license,
        report=report,
        teacher=teacher,
        private=private,
        progress=terminal.TerminalProgress(),
    )
    languages = ", ".join(result.languages)
    terminal.say(f"{result.url}: {languages} · {result.num_files} files")
