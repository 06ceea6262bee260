"""The commands that train: `pretrain`, `finetune-ve`, `align` and `autoencode`."""

from __future__ import annotations

from clseave_cli.commands import terminal
from clseave_cli.core.config import AlignConfig, AutoencodeConfig, FinetuneConfig, PretrainConfig


def pretrain(config: PretrainConfig) -> None:
    """Train a CLIP-family model on image-caption pairs, contrastively.

    Reads captions_train.jsonl and captions_dev.jsonl, lines such as
    {"image": "1.jpg", "caption": "two dogs run"}. Pass the folder it
    writes to finetune-ve as --clip.
    """
    from clseave_cli.core import pretraining

    result = pretraining.pretrain(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)


def finetune_ve(config: FinetuneConfig) -> None:
    """Fine-tune CLIP for visual entailment in one language (CLIP-VE).

    Trains the text encoder, the projection and the head. The image encoder
    is frozen and its features are computed once, unless --unfreeze-blocks
    or --lora train it. Use --preset thesis for the thesis's
    hyper-parameters.
    """
    from clseave_cli.core import finetuning

    result = finetuning.finetune(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)


def align(config: AlignConfig) -> None:
    """Teach a multilingual encoder CLIP-VE's sentence embeddings.

    Reads snli_ve_train.jsonl, snli_ve_dev.jsonl and their translations into
    LANG by clseave translate. Use --preset thesis for the thesis's
    hyper-parameters.
    """
    from clseave_cli.core import alignment

    result = alignment.align(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)


def autoencode(config: AutoencodeConfig) -> None:
    """Train the autoencoder that the thesis's token method starts from.

    Reads snli_ve_train.LANG.jsonl and snli_ve_dev.LANG.jsonl. Only
    align --method token --pretrained-code needs it. The defaults are the
    thesis's hyper-parameters.
    """
    from clseave_cli.core.alignment import autoencoding

    result = autoencoding.autoencode(config, terminal.TerminalProgress())
    terminal.print_training(result.folder, result.training)
