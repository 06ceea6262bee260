"""`clseave curve`: the quality of students by the number of sentences."""

from __future__ import annotations

from dataclasses import asdict

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import CurveConfig


def run(config: CurveConfig, *, json: Json = False) -> None:
    """Train students on 100, 300, … all sentences and evaluate each.

    Trains a student per language and number of sentences; --together adds
    one of all languages. Options of align come from --config FILE.toml.
    Writes curve.json and curve.png. Run an interrupted command again to
    resume; finished points are kept.
    """
    from clseave_cli.commands.tables import data_curves_table
    from clseave_cli.core.evaluation.curve import data_curves

    curves = data_curves(config, terminal.TerminalProgress())
    if json:
        terminal.print_json(asdict(curves))
        return
    terminal.stdout().print(data_curves_table(curves))
    figure = (config.out or config.runs / "curve") / "curve.png"
    terminal.say(f"figure: {figure}")
