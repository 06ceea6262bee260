"""`clseave illustrate`: draws pictures from the texts of a data set."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import IllustrateConfig


def run(config: IllustrateConfig) -> None:
    """Draw pictures from captions or hypotheses with a text-to-image model.

    Pass the folder to finetune-ve or pretrain as --guided. After a crash, a
    kill or Ctrl-C, run the same command again to resume.
    """
    from clseave_cli.core.guided.illustration import illustrate

    result = illustrate(config, terminal.TerminalProgress())
    withheld = f" · {result.withheld} withheld by the model" if result.withheld else ""
    terminal.say(f"{result.folder}: {result.drawn} pictures drawn · {result.kept} kept{withheld}")
