"""Training part of a pretrained tower: its last blocks, or low-rank adapters (LoRA).

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021): a matrix W becomes
W + 2 B A (α = 2 r), and only B and A, of rank r, are trained. They are added to W at the end, so
the saved model is an ordinary one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.errors import ExtraMissing, UsageError

#: The matrices that get adapters: queries and values, as in the paper's section 7.1, by their names
#: in CLIP, SigLIP and BERT.
_MATRICES = r".*\.(q_proj|v_proj|query|value)"


def require_peft() -> None:
    """Raises ExtraMissing, before any work is done, if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ExtraMissing("--lora needs peft; run: pip install -e '.[lora]'.")


def train_blocks(image: ImageEncoder, count: int | None, flag: str) -> None:
    """Has the last `count` blocks of an image tower trained, and computed in every step.

    None: all blocks are computed but frozen, for adapters. Messages name the option `flag`.

    Raises:
        UsageError: the tower has fewer blocks, or is not like CLIP's.
    """
    if not (image.grid and hasattr(image.backbone, "post_layernorm")):
        raise UsageError(
            f"{flag}: only towers like CLIP's or SigLIP's, which see every picture as a square of "
            "patches, can be trained."
        )
    if count is not None and count > len(image.blocks):
        raise UsageError(f"{flag} {count}: the image tower has only {len(image.blocks)}.")
    image.num_trained = count or len(image.blocks)
    image.blocks[-image.num_trained :].requires_grad_(count is not None)


@contextmanager
def adapted(
    encoders: tuple[SentenceEncoder | ImageEncoder, ...], rank: int | None, seed: int
) -> Iterator[None]:
    """Within the block, the encoders' backbones have adapters of rank r, and train only those.

    Afterwards the adapters are merged into the weights. Without a rank, nothing happens.
    """
    if rank is None:
        yield
        return
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    torch.manual_seed(seed)
    config = {"default": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_MATRICES)}
    tuners = [LoraModel(encoder.backbone, config, "default") for encoder in encoders]
    yield
    for tuner in tuners:
        tuner.merge_and_unload()
