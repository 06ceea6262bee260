"""`clseave demo`: runs the whole method on the built-in mini-VE world."""

from __future__ import annotations

import shlex

from clseave_cli.commands import terminal
from clseave_cli.core.config import DemoConfig


def run(config: DemoConfig) -> None:
    """See the whole method work on a small drawn world, in minutes.

    Draws a small world, trains a CLIP model on it, fine-tunes it for visual
    entailment in English, transfers it to five languages, and reports the
    results. Everything is written to one folder, as the other commands would
    write it. Run an interrupted demo again to continue it.
    """
    from clseave_cli.commands.tables import results_table
    from clseave_cli.core.evaluation.demo import PRESET, demo

    result = demo(config, terminal.TerminalProgress())
    terminal.stdout().print()
    terminal.stdout().print(results_table(result.results))
    report = result.report / "report.html"
    terminal.say(f"Done in {result.seconds:.0f} s. The report, with pictures: {report}")
    terminal.say("\nTry next:")
    # Commands that are ready to paste.
    folders = (result.runs, result.data, result.encoder)
    runs, data, encoder = (shlex.quote(str(folder)) for folder in folders)
    for example in result.examples:
        terminal.say(f"  # {example.label}")
        for lang in ("en", "ja"):
            words = [str(example.image), example.hypotheses[lang], "--lang", lang]
            terminal.say(f"  clseave predict {shlex.join(words)} --runs {runs}")
    terminal.say("  # evaluate one language, and train one student of two")
    terminal.say(f"  clseave evaluate --data {data} --runs {runs} --lang de --json")
    terminal.say(
        f"  clseave align --lang de --lang nl --preset {PRESET} --data {data} --runs {runs} "
        f"--student {encoder}"
    )
