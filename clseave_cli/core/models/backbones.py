"""Loading the pretrained towers: image-text models of several layouts, encoders with a tokenizer.

Names are hub ids or local folders in Hugging Face layout, alike. Code in a model's repository is
never run, and only safetensors weights are read: pickled ones could run code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from clseave_cli.core.config import Pooling
from clseave_cli.core.models.encoders import ImageEncoder, Save, SentenceEncoder
from clseave_cli.core.models.tokens import Filling, require_usable
from clseave_cli.core.models.weights import load, load_linear, save_weights
from clseave_cli.errors import ModelError

_LOADING: dict[str, Any] = {
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
        ModelError: it cannot be found or read, or has an unknown layout.
    """
    layout, is_whole = _layout(name, "text")
    tower, projection = _load_tower(name, layout, "text", is_whole)
    return _text_encoder(name, layout, tower, projection, saved or {})


def load_clip_image(name: str | Path) -> ImageEncoder:
    """The image tower of a CLIP-like model, or one saved by itself, with its preprocessing.

    Raises:
        ModelError: it cannot be found or read, or has an unknown layout.
    """
    layout, is_whole = _layout(name, "vision")
    return _image_encoder(name, layout, *_load_tower(name, layout, "image", is_whole))


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
    model = load(
        name, layout.loader("whole"), **loading_arguments(load(name, AutoConfig.from_pretrained))
    )
    text = _text_encoder(name, layout, *_split(model, layout, "text"), {})
    return model, text, _image_encoder(name, layout, *_split(model, layout, "image"))


def new_dual_encoder(
    text: str, vision: str, embedding_dim: int
) -> tuple[Any, SentenceEncoder, ImageEncoder]:
    """Two pretrained encoders made a CLIP-like model by a new projection each, as `load_clip`.

    Args:
        text: hub id or folder of a bidirectional text encoder.
        vision: of a vision encoder, or of an image-text model that has one.
        embedding_dim: D.

    Raises:
        ModelError: one of them cannot be found or read, or is something else.
    """
    config = load(text, AutoConfig.from_pretrained)
    # An untrained pooling layer is as good as any start: it is trained along.
    arguments = {**_encoder_arguments(text, config), "may_lack": "pooler."}
    text_model = load(text, AutoModel.from_pretrained, **arguments)
    vision_model = _load_vision(vision)
    configs = (vision_model.config, text_model.config)
    model = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(
            *configs, projection_dim=embedding_dim
        ),
        vision_model,
        text_model,
    )
    encoder = _text_encoder(text, _DUAL, *_split(model, _DUAL, "text"), {})
    tokens = encoder.tokenize(list(_PROBES))
    encoder.packs = False  # so that the model masks by itself
    with torch.no_grad():
        first, second, _ = encoder.eval()(encoder.pack(tokens, np.arange(len(_PROBES))))
    encoder.packs = True
    if torch.allclose(first, second):
        raise ModelError(
            f"{text}: its first token has the same state whatever the sentence; expected a "
            "bidirectional encoder such as XLM-R or BERT."
        )
    return model, encoder, _image_encoder(vision, _DUAL, *_split(model, _DUAL, "image"))


def _load_vision(name: str) -> Any:
    config = load(name, AutoConfig.from_pretrained)
    config = getattr(config, "vision_config", config)
    kind = MODEL_MAPPING.get(type(config), None)
    if kind is None or not hasattr(config, "num_channels") or not hasattr(config, "hidden_size"):
        raise ModelError(
            f"{name}: a {config.model_type} model; expected a vision encoder such as ViT."
        )
    return load(name, kind.from_pretrained, may_lack="pooler.", **loading_arguments(config))


def load_encoder(name: str | Path) -> tuple[Any, Any]:
    """Any bidirectional text encoder and its fast tokenizer, without pooling layer.

    Raises:
        ModelError: it cannot be found or read, is something else, or its tokenizer is slow.
    """
    config = load(name, AutoConfig.from_pretrained)
    arguments = _encoder_arguments(name, config)
    # Made up at random where it was not saved: the same encoder would be another each time.
    if _takes(MODEL_MAPPING.get(type(config), None), "add_pooling_layer"):
        arguments["add_pooling_layer"] = False
    return load(name, AutoModel.from_pretrained, **arguments), _load_tokenizer(name)


def load_pooler(name: str | Path) -> nn.Linear:
    """The matrix of an encoder's pooling layer; untrained where its weights are not saved.

    Raises:
        ModelError: the encoder cannot be found or read, or has none.
    """
    config = load(name, AutoConfig.from_pretrained)
    if config.model_type not in _POOLED:
        raise ModelError(
            f"{name}: a {config.model_type} model has no pooling layer; use --sentence-token cls."
        )
    model = load(
        name, AutoModel.from_pretrained, may_lack="pooler.", **_encoder_arguments(name, config)
    )
    dense: nn.Linear = model.pooler.dense
    return dense


def _encoder_arguments(name: str | Path, config: Any) -> dict[str, Any]:
    if config.is_encoder_decoder or not hasattr(config, "max_position_embeddings"):
        raise ModelError(
            f"{name}: a {config.model_type} model; expected a text encoder such as BERT."
        )
    return loading_arguments(config)


def loading_arguments(config: Any) -> dict[str, Any]:
    """How `load` reads a model with this configuration, by what attention it has."""
    # Always said, or the configuration could name code of the hub. DeBERTa has no sdpa.
    parts = [getattr(config, f"{part}_config", config) for part in ("text", "vision")]
    kinds = [MODEL_MAPPING.get(type(part), None) for part in parts]
    has_sdpa = all(getattr(kind, "_supports_sdpa", True) for kind in kinds)
    return {**_LOADING, "attn_implementation": "sdpa" if has_sdpa else "eager"}


def terminal_id(tokenizer: Any) -> int:
    """The token that ends every sentence: [SEP], </s>, or what else the tokenizer puts there.

    Raises:
        ModelError: the tokenizer has no such token, or does not append it.
    """
    end_ids = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
    if not end_ids:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has neither a [SEP] nor an end-of-sentence "
            "token."
        )
    last = tokenizer.backend_tokenizer.encode("a").ids[-1]
    if last not in end_ids:
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
            states = model(**inputs, position_ids=positions).last_hidden_state
            # The same computation, or another one: there is next to nothing between them.
            if torch.allclose(states, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())):
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
    model_type = load(name, AutoConfig.from_pretrained).model_type
    is_projected = part != "whole" and Path(name, PROJECTION).is_file()
    for family, layout in LAYOUTS.items():
        if model_type == family:
            return layout, True
        # Beside a projection, CLIP's vision tower is one half of a dual encoder.
        if model_type == f"{family}_{part}_model" and layout.projects_outside >= is_projected:
            return layout, False
    if is_projected:
        return _DUAL, False
    raise ModelError(
        f"{name}: a {model_type} model; expected one of CLIP layout, or of SigLIP's, "
        "Chinese-CLIP's or AltCLIP's, or a dual encoder."
    )


def _load_tower(
    name: str | Path, layout: Layout, part: Literal["text", "image"], is_whole: bool
) -> tuple[Any, Any]:
    """A tower, and its projection where that lies outside."""
    loading = loading_arguments(load(name, AutoConfig.from_pretrained))
    if layout.projects_outside and is_whole:
        return _split(load(name, layout.loader("whole"), **loading), layout, part)
    # Chinese-CLIP's pooling layer is not used, and not there where the tower was saved by itself.
    tower = load(name, layout.loader(part), may_lack="pooler.", **loading)
    return tower, load_linear(Path(name, PROJECTION)) if layout.projects_outside else None


def _split(model: Any, layout: Layout, part: Literal["text", "image"]) -> tuple[Any, Any]:
    """A tower of a whole model, as `_load_tower` gives it."""
    if not layout.projects_outside:
        return model, None
    if part == "text":
        return model.text_model, model.text_projection
    return model.vision_model, model.visual_projection


def _text_encoder(
    name: str | Path, layout: Layout, tower: Any, projection: Any, saved: Mapping[str, Any]
) -> SentenceEncoder:
    tokenizer = _load_tokenizer(name)
    backbone, norm, projection, save = layout.text_parts(tower, projection)
    return SentenceEncoder(
        backbone,
        tokenizer,
        norm,
        projection,
        save=save,
        causal=layout.causal,
        pooling=layout.pooling,
        filling=Filling(tokenizer.pad_token_id, tokenizer.padding_side) if layout.fills else None,
        **reading(backbone, tokenizer, saved),
    )


def _image_encoder(name: str | Path, layout: Layout, *tower: Any) -> ImageEncoder:
    backbone, projection, save = layout.image_parts(*tower)
    processor = load(name, layout.loader("processor"))
    return ImageEncoder(backbone, projection, processor, save)


def _load_tokenizer(name: str | Path) -> Any:
    tokenizer = load(name, AutoTokenizer.from_pretrained)
    if not tokenizer.is_fast:
        try:
            fast = load(name, PreTrainedTokenizerFast.from_pretrained)
        except ModelError:
            raise ModelError(
                f"{name}: has no fast tokenizer (tokenizer.json); convert it first."
            ) from None
        if any(fast(text)["input_ids"] != tokenizer(text)["input_ids"] for text in _PROBES):
            raise ModelError(
                f"{name}: its tokenizer.json gives other tokens than its own tokenizer."
            )
        tokenizer = fast
    # Some were saved filling every text up to 128 tokens (sentence-transformers' models).
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    require_usable(tokenizer.backend_tokenizer, name)
    return tokenizer


#: Beside a tower for which transformers has no class with its projection.
PROJECTION = "projection.safetensors"

#: A tower taken apart: backbone, (norm of the token that is read,) projection, and what saves it.
TextParts = tuple[Any, nn.Module, nn.Linear, Save]
ImageParts = tuple[Any, nn.Linear | None, Save]


@dataclass(frozen=True)
class Layout:
    """A family of models.

    Attributes:
        prefix: how the names of its transformers classes begin; the code of a family is imported
            only when it is used.
        text_parts: takes a text tower (and its projection, if that lies outside) apart: into
            backbone, norm, projection and what saves it, of a `SentenceEncoder`.
        image_parts: likewise, into backbone, projection and what saves it, of an `ImageEncoder`.
        pooling: the token of a text that is read.
        causal: tokens look back only.
        fills: texts are padded up to the limit, and the padding is read as well.
        tower_suffix: how the names of its towers' classes end.
        processor: prefix of its image processor; None: the same.
        projects_outside: the projections belong to the whole model, not to the towers.
        contrastive: trained with the loss that `pretrain` has.
    """

    prefix: str
    text_parts: Callable[[Any, Any], TextParts]
    image_parts: Callable[[Any, Any], ImageParts]
    pooling: Pooling = "terminal"
    causal: bool = False
    fills: bool = False
    tower_suffix: str = ""
    processor: str | None = None
    projects_outside: bool = False
    contrastive: bool = True

    def loader(self, part: Literal["whole", "text", "image", "processor"]) -> Callable[..., Any]:
        """What loads a part; pictures are resampled by Pillow, or every feature would differ."""
        name = {
            "whole": f"{self.prefix}Model",
            "text": f"{self.prefix}TextModel{self.tower_suffix}",
            "image": f"{self.prefix}VisionModel{self.tower_suffix}",
            "processor": f"{self.processor or self.prefix}ImageProcessorPil",
        }[part]
        loader: Callable[..., Any] = getattr(transformers, name).from_pretrained
        return loader


@dataclass(frozen=True)
class _DualLayout(Layout):
    """Two encoders of any kinds, which transformers tells apart."""

    def loader(self, part: Literal["whole", "text", "image", "processor"]) -> Callable[..., Any]:
        if part == "processor":
            return functools.partial(AutoImageProcessor.from_pretrained, backend="pil")
        whole: Callable[..., Any] = AutoModel.from_pretrained
        return whole


def _save_projected(tower: Any, projection: nn.Linear, folder: Path) -> None:
    """Writes a tower and its projection, which no class of transformers holds together."""
    tower.save_pretrained(folder)
    save_weights(projection, folder / PROJECTION)


def _save_headed(tower: Any, head: nn.Linear, folder: Path) -> None:
    """Writes a tower whose last layer was taken out to be read by itself."""
    tower.head = head
    try:
        tower.save_pretrained(folder)
    finally:
        tower.head = nn.Identity()


class _NaFlex(nn.Module):
    """SigLIP 2's tower for pictures in their own proportions, which reads patches.

    Its input is one tensor like any other tower's (`ImageEncoder.preprocess`): each patch's values,
    then height and width of the grid. Pictures have fewer patches than there is room for; the rest
    is masked.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config

    def forward(self, pixel_values: Tensor) -> Any:
        """(B, P, values + 2) patches with the sizes of their grids."""
        grids = pixel_values[:, 0, -2:].long()  # (B, 2)
        places = torch.arange(pixel_values.shape[1], device=pixel_values.device)
        mask = places < grids.prod(dim=1, keepdim=True)  # (B, P)
        return self.tower(
            pixel_values=pixel_values[..., :-2],
            pixel_attention_mask=mask.long(),
            spatial_shapes=grids,
        )


def _clip_text(model: Any, _: None) -> TextParts:
    """CLIP: the tower's own last normalisation, then a projection."""
    return model.text_model, nn.Identity(), model.text_projection, model.save_pretrained


def _clip_image(model: Any, _: None) -> ImageParts:
    return model.vision_model, model.visual_projection, model.save_pretrained


def _siglip_text(tower: Any, _: None) -> TextParts:
    head = tower.head
    tower.head = nn.Identity()  # or its weights would stand in the encoder twice
    return tower, nn.Identity(), head, functools.partial(_save_headed, tower, head)


def _siglip_image(tower: Any, _: None) -> ImageParts:
    """SigLIP: pooled by attention, and that is the embedding."""
    return tower, None, tower.save_pretrained


def _siglip2_image(tower: Any, _: None) -> ImageParts:
    return _NaFlex(tower), None, tower.save_pretrained


def _chinese_clip_text(tower: Any, projection: nn.Linear) -> TextParts:
    """Chinese-CLIP: a BERT without normalisation, then a projection."""
    tower.pooler = None  # made up by transformers, see `_load_tower`
    return tower, nn.Identity(), projection, functools.partial(_save_projected, tower, projection)


def _altclip_text(tower: Any, projection: nn.Linear) -> TextParts:
    """AltCLIP: an XLM-RoBERTa; normalised, transformed to CLIP's width, projected."""
    norm = nn.Sequential(tower.pre_LN, tower.transformation)
    return tower.roberta, norm, projection, functools.partial(_save_projected, tower, projection)


def _dual_text(tower: Any, projection: nn.Linear) -> TextParts:
    """A dual encoder's: read as transformers reads it, through its pooling layer if it has one."""
    pooler = getattr(tower, "pooler", None)
    norm: nn.Module = nn.Identity()
    if pooler is not None:
        norm = nn.Sequential(pooler.dense, getattr(pooler, "activation", nn.Tanh()))
    return tower, norm, projection, functools.partial(_save_projected, tower, projection)


def _projected_image(tower: Any, projection: nn.Linear) -> ImageParts:
    return tower, projection, functools.partial(_save_projected, tower, projection)


_DUAL = _DualLayout("", _dual_text, _projected_image, pooling="cls", projects_outside=True)

#: By the `model_type` of the whole model; that of a tower ends in `_text_model`, `_vision_model`.
LAYOUTS = {
    "clip": Layout("CLIP", _clip_text, _clip_image, causal=True, tower_suffix="WithProjection"),
    "metaclip_2": Layout(
        "MetaClip2",
        _clip_text,
        _clip_image,
        causal=True,
        tower_suffix="WithProjection",
        processor="CLIP",
    ),
    "vision-text-dual-encoder": _DUAL,
    "siglip": Layout("Siglip", _siglip_text, _siglip_image, fills=True, contrastive=False),
    "siglip2": Layout("Siglip2", _siglip_text, _siglip2_image, fills=True, contrastive=False),
    "chinese_clip": Layout(
        "ChineseCLIP", _chinese_clip_text, _projected_image, pooling="cls", projects_outside=True
    ),
    "altclip": Layout(
        "AltCLIP",
        _altclip_text,
        _projected_image,
        pooling="cls",
        processor="CLIP",
        projects_outside=True,
    ),
}
