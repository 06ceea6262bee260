"""Loading the pretrained towers: any CLIP-layout model, any encoder with a tokenizer.

Names are hub ids or local folders in Hugging Face layout, alike. Code in a model's repository is
never run, and only safetensors weights are read: pickled ones could run code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.errors import ModelError

# Loading and saving are told of by `core.progress`, not by transformers' own bars and warnings.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

#: `name` or `organisation/name`; anything else can only be a folder, and the hub is not asked.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_LOADING = {
    "dtype": torch.float32,
    "use_safetensors": True,
    "attn_implementation": "sdpa",
}


def load_clip_text(name: str | Path) -> SentenceEncoder:
    """The text tower of a CLIP model, or one saved by itself.

    Raises:
        ModelError: it cannot be found or read, or is not of the CLIP layout.
    """
    _require_type(name, ("clip", "clip_text_model"))
    model = _load(name, CLIPTextModelWithProjection.from_pretrained, **_LOADING)
    return clip_text_encoder(model, _load(name, AutoTokenizer.from_pretrained))


def clip_text_encoder(model: Any, tokenizer: Any) -> SentenceEncoder:
    """A `CLIPTextModelWithProjection` (or a whole `CLIPModel`) as a sentence encoder."""
    # CLIP's own tower normalises its last hidden state, so nothing is left to do here.
    return SentenceEncoder(
        model.text_model,
        tokenizer,
        nn.Identity(),
        model.text_projection,
        hub_model=model,
        causal=True,
        max_tokens=model.text_model.config.max_position_embeddings,
        first_position=0,
        terminal_id=tokenizer.eos_token_id,
    )


def load_clip_image(name: str | Path) -> ImageEncoder:
    """The image tower of a CLIP model, or one saved by itself, with its preprocessing.

    Raises:
        ModelError: it cannot be found or read, or is not of the CLIP layout.
    """
    _require_type(name, ("clip", "clip_vision_model"))
    model = _load(name, CLIPVisionModelWithProjection.from_pretrained, **_LOADING)
    # Pillow's resampling, always: torchvision's differs, and so would every feature.
    return clip_image_encoder(model, _load(name, CLIPImageProcessorPil.from_pretrained))


def clip_image_encoder(model: Any, processor: Any) -> ImageEncoder:
    """A `CLIPVisionModelWithProjection` (or a whole `CLIPModel`) as an image encoder."""
    return ImageEncoder(model.vision_model, model.visual_projection, processor, hub_model=model)


def load_clip(name: str | Path) -> tuple[Any, Any, Any]:
    """A whole CLIP model for contrastive training: model, tokenizer, image processor.

    Raises:
        ModelError: it cannot be found or read, or is not of the CLIP layout.
    """
    _require_type(name, ("clip",))
    model = _load(name, CLIPModel.from_pretrained, **_LOADING)
    tokenizer = _load(name, AutoTokenizer.from_pretrained)
    return model, tokenizer, _load(name, CLIPImageProcessorPil.from_pretrained)


def load_encoder(name: str | Path) -> tuple[Any, Any]:
    """Any bidirectional text encoder and its fast tokenizer, without pooling layer.

    Raises:
        ModelError: it cannot be found or read, or its tokenizer has no terminal token.
    """
    config = _load(name, AutoConfig.from_pretrained)
    arguments = dict(_LOADING)
    if config.model_type in ("bert", "roberta", "xlm-roberta"):
        arguments["add_pooling_layer"] = False
    model = _load(name, AutoModel.from_pretrained, **arguments)
    tokenizer = _load(name, AutoTokenizer.from_pretrained)
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: has no fast tokenizer (tokenizer.json); convert it first.")
    return model, tokenizer


def terminal_id(tokenizer: Any) -> int:
    """The token that ends every sentence: [SEP], or </s> where there is no [SEP].

    Raises:
        ModelError: the tokenizer has neither.
    """
    for token in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError(
        f"{tokenizer.name_or_path}: its tokenizer has neither a [SEP] nor an end-of-sentence token."
    )


def first_position(model: Any) -> int:
    """Position id of a sentence's first token: RoBERTa's family counts from padding_idx + 1."""
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return int(model.config.pad_token_id) + 1
    return 0


def max_tokens(model: Any) -> int:
    """The longest sentence an encoder reads, terminal token included."""
    return int(model.config.max_position_embeddings) - first_position(model)


def _require_type(name: str | Path, accepted: tuple[str, ...]) -> None:
    config = _load(name, AutoConfig.from_pretrained)
    if config.model_type not in accepted:
        raise ModelError(f"{name}: a {config.model_type} model; expected one of CLIP layout.")


def _load(name: str | Path, loader: Callable[..., Any], **arguments: Any) -> Any:
    if not Path(name).is_dir() and (isinstance(name, Path) or not _HUB_ID.fullmatch(name)):
        raise ModelError(f"{name}: no such model folder.")
    try:
        return loader(str(name), trust_remote_code=False, **arguments)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        where = (
            "folder" if Path(name).is_dir() else "neither a folder here nor loadable as a hub id"
        )
        raise ModelError(f"{name}: cannot be loaded ({where}: {reason}).") from None
