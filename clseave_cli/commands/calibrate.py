"""`clseave calibrate`: how sure the models may say they are, and when they are too unsure."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.commands.options import Json
from clseave_cli.core.config import CalibrateConfig


def run(config: CalibrateConfig, *, json: Json = False) -> None:
    """Make probabilities honest, and set thresholds that keep a promised precision.

    Fits a temperature for each language on a labelled split with images, and stores it in the
    model's folder. With --precision, also finds the threshold above which at least that share of
    the answers is right, with 95 % confidence: `predict --unsure`, `serve` and `check` answer
    `unsure` below it. It replaces earlier thresholds of the language.
    """
    from clseave_cli.commands.tables import calibration_table
    from clseave_cli.core.evaluation.abstention import calibrate

    done = calibrate(config, terminal.TerminalProgress())
    if json:
        terminal.print_json({"calibrated": [each.to_json() for each in done]})
        return
    terminal.stdout().print(calibration_table(done, config.promise, config.split))
