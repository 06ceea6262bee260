"""`clseave push`: models to the Hugging Face hub."""

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
        typer.Option("--report", metavar="DIR", help="What evaluate --report wrote of the models."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", metavar="DIR", help="A student's CLIP-VE; unset: beside it."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Open to you alone.")] = False,
) -> None:
    """Publish models on the Hugging Face hub, with a card that says how good they are.

    FOLDER is a student (its CLIP-VE goes with it), a CLIP-VE, a whole
    runs folder, or an exported one. `--runs ORG/NAME` reads it everywhere.
    Log in with `hf auth login`, or set HF_TOKEN.
    """
    from clseave_cli.core.evaluation.publishing import push

    done = push(
        folder,
        repository,
        license=license,
        report=report,
        teacher=teacher,
        private=private,
        progress=terminal.TerminalProgress(),
    )
    languages = ", ".join(done.languages)
    terminal.say(f"{done.url}: {languages} · {done.num_files} files")
