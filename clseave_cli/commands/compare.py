"""`clseave compare`: compares two evaluations, row by row."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json, Verbose


def run(
    first: Annotated[Path, typer.Argument(help="Report folder of one evaluation.")],
    second: Annotated[Path, typer.Argument(help="Report folder of the other.")],
    *,
    resamples: Annotated[
        int, typer.Option(min=1, help="Bootstrap resamples behind every interval.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare two evaluations on the rows they share.

    Both folders come from `evaluate --report DIR`. Differences are paired,
    with bootstrap intervals over photos.
    """
    from clseave_cli.commands.tables import comparison_table
    from clseave_cli.core.evaluation.comparison import compare_reports

    comparison = compare_reports(first, second, resamples=resamples, seed=seed)
    if json:
        terminal.print_json(asdict(comparison))
        return
    terminal.stdout().print(comparison_table(comparison, verbose=verbose))
    exclusive = {"A": comparison.missing_in_second, "B": comparison.missing_in_first}
    for name, languages in exclusive.items():
        if languages:
            terminal.say(f"only in {name}: {', '.join(languages)}")
