"""`clseave autoencode`: the multilingual autoencoder of the token method."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import AutoencodeConfig


def run(config: AutoencodeConfig) -> None:
    """Train the autoencoder that the thesis's token method starts from.

    Reads snli_ve_{train,dev}.LANG.jsonl. Only align --method token
    --pretrained-code needs it. --preset thesis takes the thesis'
    hyper-parameters, as the defaults do.
    """
    from clseave_cli.core.alignment.autoencoding import autoencode

    result = autoencode(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)
