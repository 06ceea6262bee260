"""Loading the pretrained towers: image-text models of several layouts, encoders with a tokenizer.

Names are hub ids or local folders in Hugging Face layout, alike. Code in a model's repository is
never run, and only safetensors weights are read: pickled ones could run code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.layouts import LAYOUTS, PROJECTION, ImageTower, Layout, TextTower
from clseave_cli.core.models.tokens import Filling
from clseave_cli.core.models.weights import load_linear, quiet
from clseave_cli.errors import ModelError

#: `name` or `organisation/name`; anything else can only be a folder, and the hub is not asked.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_LOADING = {
    "dtype": torch.float32,
    "use_safetensors": True,
    "attn_implementation": "sdpa",
}

#: Encoders whose pooling layer is BERT's.
_POOLED = ("bert", "roberta", "xlm-roberta")

#: What a tokenizer is compared with another on.
_PROBES = ("A dog's ball is red, isn't it?", "ZWEI  Hunde laufen.", "犬が公園を走っている。")


def load_clip_text(name: str | Path, saved: Mapping[str, Any] | None = None) -> SentenceEncoder:
    """The text tower of a CLIP-like model, or one saved by itself.

    Args:
        name: hub id or folder.
        saved: as for `reading`.

    Raises:
        ModelError: it cannot be found or read, or is of no layout that is known.
    """
    layout, is_whole = _layout(name, "text")
    tower = layout.text_parts(*_load_tower(name, layout, "text", is_whole))
    return _text_encoder(tower, _load_tokenizer(name), saved or {})


def load_clip_image(name: str | Path) -> ImageEncoder:
    """The image tower of a CLIP-like model, or one saved by itself, with its preprocessing.

    Raises:
        ModelError: it cannot be found or read, or is of no layout that is known.
    """
    layout, is_whole = _layout(name, "vision")
    tower = layout.image_parts(*_load_tower(name, layout, "image", is_whole))
    # Pillow's resampling, always: torchvision's differs, and so would every feature.
    return _image_encoder(tower, _load(name, _of(layout.processor)))


def load_clip(name: str | Path) -> tuple[Any, SentenceEncoder, ImageEncoder]:
    """A whole CLIP-like model for contrastive training, and its towers, which share its weights.

    Raises:
        ModelError: it cannot be found or read, or was not trained with a contrastive softmax.
    """
    layout, _ = _layout(name, "whole")
    if not layout.contrastive:
        raise ModelError(
            f"{name}: SigLIP was trained with another loss than CLIP's, by which `pretrain` would "
            "spoil it; give it to finetune-ve as it is."
        )
    model = _load(name, _of(layout.whole), **_LOADING)
    text, image = _split(model, layout, "text"), _split(model, layout, "image")
    return (
        model,
        _text_encoder(layout.text_parts(*text), _load_tokenizer(name), {}),
        _image_encoder(layout.image_parts(*image), _load(name, _of(layout.processor))),
    )


def load_encoder(name: str | Path) -> tuple[Any, Any]:
    """Any bidirectional text encoder and its fast tokenizer, without pooling layer.

    Raises:
        ModelError: it cannot be found or read, is something else, or its tokenizer is slow.
    """
    config = _load(name, AutoConfig.from_pretrained)
    arguments = _encoder_arguments(name, config)
    # Made up at random where it was not saved: the same encoder would be another each time.
    if _takes(MODEL_MAPPING.get(type(config), None), "add_pooling_layer"):
        arguments["add_pooling_layer"] = False
    return _load(name, AutoModel.from_pretrained, **arguments), _load_tokenizer(name)


def load_pooler(name: str | Path) -> nn.Linear:
    """The matrix of an encoder's pooling layer; untrained where its weights are not saved.

    Raises:
        ModelError: the encoder cannot be found or read, or has none.
    """
    config = _load(name, AutoConfig.from_pretrained)
    if config.model_type not in _POOLED:
        raise ModelError(
            f"{name}: a {config.model_type} model has no pooling layer; use --sentence-token cls."
        )
    model = _load(name, AutoModel.from_pretrained, **_encoder_arguments(name, config))
    dense: nn.Linear = model.pooler.dense
    return dense


def _encoder_arguments(name: str | Path, config: Any) -> dict[str, Any]:
    if config.is_encoder_decoder or not hasattr(config, "max_position_embeddings"):
        raise ModelError(
            f"{name}: a {config.model_type} model; expected a text encoder such as BERT."
        )
    arguments = dict(_LOADING)
    if not getattr(MODEL_MAPPING.get(type(config), None), "_supports_sdpa", False):
        del arguments["attn_implementation"]  # DeBERTa's positions need an attention of its own
    return arguments


def terminal_id(tokenizer: Any) -> int:
    """The token that ends every sentence: [SEP], </s>, or what else the tokenizer puts there.

    Raises:
        ModelError: the tokenizer has no such token, or does not append it.
    """
    known = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
    if not known:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has neither a [SEP] nor an end-of-sentence "
            "token."
        )
    last = tokenizer.backend_tokenizer.encode("a").ids[-1]
    if last not in known:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer does not end a text in its [SEP] or "
            "end-of-sentence token."
        )
    return int(last)


def reading(model: Any, tokenizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """How an encoder is given its sentences: arguments of `SentenceEncoder`.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        saved: `SentenceEncoder.packing` of a saved one, among other things; empty for a new one.
            Folders of earlier versions lack some of it.

    Raises:
        ModelError: as `terminal_id`.
    """
    first = saved["first_position"] if "first_position" in saved else _first(model, tokenizer)
    # Where it is not known, as many places as there are in any case.
    before = max(_possible_firsts(model)) if first is None else first
    places = int(model.config.max_position_embeddings) - before
    return {
        "max_tokens": min(places, int(tokenizer.model_max_length)),
        "first_position": first,
        "terminal_id": terminal_id(tokenizer),
        "packs": saved.get("packs", True),
    }


def _first(model: Any, tokenizer: Any) -> int | None:
    """Position id of a sentence's first token: what gives the states that the model has unasked.

    Returns:
        None if the model takes no positions, or counts them in another way.
    """
    if not _takes(model.forward, "position_ids"):
        return None
    ids = torch.tensor([tokenizer.backend_tokenizer.encode("a").ids])  # (1, T)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
        for first in _possible_firsts(model):
            positions = torch.arange(first, first + ids.shape[1])[None]
            found = model(**inputs, position_ids=positions).last_hidden_state
            # The same computation, or another one: there is next to nothing between them.
            if torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())):
                return first
    return None


def _possible_firsts(model: Any) -> list[int]:
    """Most models count from 0, RoBERTa's relatives from behind their padding token."""
    padding = model.config.pad_token_id
    # No table of positions would lose half its places to that.
    if padding is None or padding >= model.config.max_position_embeddings // 2:
        return [0]
    return [0, padding + 1]


def _takes(function: Any, argument: str) -> bool:
    return callable(function) and argument in inspect.signature(function).parameters


def _layout(name: str | Path, part: Literal["whole", "text", "vision"]) -> tuple[Layout, bool]:
    """The layout of a model, and whether it is whole or one tower."""
    model_type = _load(name, AutoConfig.from_pretrained).model_type
    for family, layout in LAYOUTS.items():
        if model_type in (family, f"{family}_{part}_model"):
            return layout, model_type == family
    raise ModelError(
        f"{name}: a {model_type} model; expected one of CLIP layout, or of SigLIP's, "
        "Chinese-CLIP's or AltCLIP's."
    )


def _load_tower(
    name: str | Path, layout: Layout, part: Literal["text", "image"], is_whole: bool
) -> tuple[Any, Any]:
    """A tower, and its projection where that lies outside."""
    if layout.projects_outside and is_whole:
        return _split(_load(name, _of(layout.whole), **_LOADING), layout, part)
    tower = _load(name, _of(getattr(layout, part)), **_LOADING)
    return tower, load_linear(Path(name, PROJECTION)) if layout.projects_outside else None


def _of(class_name: str) -> Callable[..., Any]:
    loader: Callable[..., Any] = getattr(transformers, class_name).from_pretrained
    return loader


def _split(model: Any, layout: Layout, part: Literal["text", "image"]) -> tuple[Any, Any]:
    """A tower of a whole model, as `_load_tower` gives it."""
    if not layout.projects_outside:
        return model, None
    if part == "text":
        return model.text_model, model.text_projection
    return model.vision_model, model.visual_projection


def _text_encoder(tower: TextTower, tokenizer: Any, saved: Mapping[str, Any]) -> SentenceEncoder:
    filling = None
    if tower.fills:
        filling = Filling(tokenizer.pad_token_id, tokenizer.padding_side)
    return SentenceEncoder(
        tower.backbone,
        tokenizer,
        tower.norm,
        tower.projection,
        hub_model=tower.hub_model,
        causal=tower.causal,
        pooling=tower.pooling,
        filling=filling,
        **reading(tower.backbone, tokenizer, saved),
    )


def _image_encoder(tower: ImageTower, processor: Any) -> ImageEncoder:
    return ImageEncoder(tower.backbone, tower.projection, processor, hub_model=tower.hub_model)


def _load_tokenizer(name: str | Path) -> Any:
    tokenizer = _fast_tokenizer(name)
    # Some were saved filling every text up to 128 tokens (sentence-transformers' models).
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _fast_tokenizer(name: str | Path) -> Any:
    tokenizer = _load(name, AutoTokenizer.from_pretrained)
    if tokenizer.is_fast:
        return tokenizer
    try:
        fast = _load(name, PreTrainedTokenizerFast.from_pretrained)
    except ModelError:
        raise ModelError(
            f"{name}: has no fast tokenizer (tokenizer.json); convert it first."
        ) from None
    if any(fast(text)["input_ids"] != tokenizer(text)["input_ids"] for text in _PROBES):
        raise ModelError(f"{name}: its tokenizer.json gives other tokens than its own tokenizer.")
    return fast


def _load(name: str | Path, loader: Callable[..., Any], **arguments: Any) -> Any:
    if not Path(name).is_dir() and (isinstance(name, Path) or not _HUB_ID.fullmatch(name)):
        raise ModelError(f"{name}: no such model folder.")
    try:
        with quiet():
            return loader(str(name), trust_remote_code=False, **arguments)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        where = (
            "folder" if Path(name).is_dir() else "neither a folder here nor loadable as a hub id"
        )
        raise ModelError(f"{name}: cannot be loaded ({where}: {reason}).") from None
