"""`clseave demo`: the whole method on the built-in mini-VE world."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from clseave_cli.commands import terminal
from clseave_cli.core.config import DemoConfig

if TYPE_CHECKING:
    from clseave_cli.core.evaluation.demo import DemoResult

#: The languages of the examples.
_SHOWN = ("en", "ja")


def run(config: DemoConfig) -> None:
    """See the whole method work on a small drawn world, in minutes.

    Draws a small world, trains a CLIP model on it, fine-tunes it for visual
    entailment in English, transfers it to five languages, and reports how
    well that went. Everything is written to one folder, as the other
    commands would write it. Run an interrupted demo again to continue it.
    """
    from clseave_cli.commands.tables import results_table
    from clseave_cli.core.evaluation.demo import demo

    result = demo(config, terminal.TerminalProgress())
    terminal.stdout().print()
    terminal.stdout().print(results_table(result.results))
    terminal.say("\n".join(_outlook(result)))


def _outlook(result: DemoResult) -> list[str]:
    """Where the report lies, and commands to go on with, ready to paste."""
    from clseave_cli.core.evaluation.demo import PRESET

    runs, data, encoder = (
        shlex.quote(str(path)) for path in (result.runs, result.data, result.encoder)
    )
    lines = [
        f"Done in {result.seconds:.0f} s. The report, with pictures: "
        f"{result.report / 'report.html'}",
        "",
        "Try next:",
    ]
    for example in result.examples:
        lines.append(f"  # {example.label}")
        for lang in _SHOWN:
            words = [str(example.image), example.hypotheses[lang], "--lang", lang]
            lines.append(f"  clseave predict {shlex.join(words)} --runs {runs}")
    return [
        *lines,
        "  # measure one language, and train one student of two",
        f"  clseave evaluate --data {data} --runs {runs} --lang de --json",
        f"  clseave align --lang de --lang nl --preset {PRESET} --data {data} --runs {runs} "
        f"--student {encoder}",
    ]
