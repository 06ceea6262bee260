"""`clseave align`: a multilingual student of CLIP-VE."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import AlignConfig


def run(config: AlignConfig) -> None:
    """Teach a multilingual encoder CLIP-VE's sentence embeddings.

    Reads snli_ve_{train,dev}.jsonl and the same in LANG, as translate
    writes them. --preset thesis takes the thesis' hyper-parameters.
    """
    from clseave_cli.core.alignment import align

    result = align(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)
