"""`clseave finetune-ve`: the visual-entailment model of the source language."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import FinetuneConfig


def run(config: FinetuneConfig) -> None:
    """Fine-tune CLIP for visual entailment in one language (CLIP-VE).

    The image encoder is frozen and its features are computed once; text
    encoder, projection and head are trained. --preset thesis takes the
    thesis' hyper-parameters.
    """
    from clseave_cli.core.finetuning import finetune

    result = finetune(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)
