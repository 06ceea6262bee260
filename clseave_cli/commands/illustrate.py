"""`clseave illustrate`: pictures drawn from the texts of a data set."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import IllustrateConfig


def run(config: IllustrateConfig) -> None:
    """Draw pictures from captions or hypotheses with a text-to-image model.

    finetune-ve and pretrain take the folder as --guided. After a crash, a
    kill or Ctrl-C, the same command goes on where it stopped.
    """
    from clseave_cli.core.guided.illustration import illustrate

    result = illustrate(config, terminal.TerminalProgress())
    withheld = f" · {result.withheld} withheld by the model" if result.withheld else ""
    terminal.say(
        f"{result.folder}: {result.drawn} pictures drawn · {result.kept} there before{withheld}"
    )
