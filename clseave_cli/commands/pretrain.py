"""`clseave pretrain`: contrastive training of a CLIP-family model."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import PretrainConfig


def run(config: PretrainConfig) -> None:
    """Train a CLIP-family model on image-caption pairs, contrastively.

    Reads captions_{train,dev}.jsonl, lines such as
    {"image": "1.jpg", "caption": "two dogs run"}. The folder it writes
    can be given to finetune-ve as --clip.
    """
    from clseave_cli.core.pretraining import pretrain

    result = pretrain(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)
