"""Loading pretrained towers: image-text models of several families, and text encoders.

Names are hub ids or local folders in Hugging Face layout; `weights` says what is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from clseave_cli.core.models.weights import load, load_linear, load_model, save_weights
from clseave_cli.errors import ModelError

#: Texts on which two tokenizers are compared.
_PROBES = ("A dog's ball is red, isn't it?", "ZWEI  Hunde laufen.", "犬が公園を走っている。")


def load_clip_text(name: str | Path, saved: Mapping[str, Any] | None = None) -> SentenceEncoder:
    """Loads the text tower of a CLIP-like model, or one that was saved alone.

    `saved` is as for `input_settings`.

    Raises:
        ModelError: it cannot be loaded, or has an unknown layout.
    """
    return _text_encoder(name, *_load_tower(name, "text"), saved or {})


def load_clip_image(name: str | Path) -> ImageEncoder:
    """Loads the image tower of a CLIP-like model, or one that was saved alone, and its processor.

    Raises:
        ModelError: it cannot be loaded, or has an unknown layout.
    """
    return _image_encoder(name, *_load_tower(name, "vision"))


def load_clip(name: str | Path) -> tuple[Any, SentenceEncoder, ImageEncoder]:
    """Loads a CLIP-like model for contrastive training, and its towers, which share its weights.

    Raises:
        ModelError: it cannot be loaded, or was not trained with a contrastive softmax.
    """
    layout, _ = _layout(name, "whole")
    if not layout.contrastive:
        raise ModelError(
            f"{name}: SigLIP was trained with another loss than CLIP's, so `pretrain` would spoil "
            "it; give it to finetune-ve as it is."
        )
    model = load_model(name, layout.loader("whole"))
    return model, *_towers(model, layout, name, name)


def new_dual_encoder(
    text: str, vision: str, embedding_dim: int
) -> tuple[Any, SentenceEncoder, ImageEncoder]:
    """A CLIP-like model from two pretrained encoders and two new projections, as `load_clip`.

    Args:
        text: hub id or folder of a bidirectional text encoder.
        vision: the same of a vision encoder, or of an image-text model that has one.
        embedding_dim: D.

    Raises:
        ModelError: one of them cannot be loaded, or is of another kind.
    """
    _text_config(text)
    # A new pooling layer will do: it is trained along with the rest.
    text_model = load_model(text, AutoModel.from_pretrained, optional="pooler.")
    config = load(vision, AutoConfig.from_pretrained)
    config = getattr(config, "vision_config", config)
    kind = MODEL_MAPPING.get(type(config), None)
    if kind is None or not hasattr(config, "num_channels") or not hasattr(config, "hidden_size"):
        raise ModelError(
            f"{vision}: a {config.model_type} model; expected a vision encoder such as ViT."
        )
    vision_model = load_model(vision, kind.from_pretrained, optional="pooler.")
    dual_config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_model.config, text_model.config, projection_dim=embedding_dim
    )
    model = VisionTextDualEncoderModel(dual_config, vision_model, text_model)
    encoder, image = _towers(model, _DUAL, text, vision)
    tokens = encoder.tokenize(list(_PROBES))
    encoder.packs = False  # the model then builds its attention mask itself
    with torch.no_grad():
        first, second, _ = encoder.eval()(encoder.pack(tokens, np.arange(len(_PROBES))))
    encoder.packs = True
    if torch.allclose(first, second):
        raise ModelError(
            f"{text}: its first token has the same state in every sentence; expected a "
            "bidirectional encoder such as XLM-R or BERT."
        )
    return model, encoder, image


def load_encoder(name: str | Path) -> tuple[Any, Any]:
    """Loads any bidirectional text encoder, without pooling layer, and its fast tokenizer.

    Raises:
        ModelError: it cannot be loaded, is of another kind, or has no fast tokenizer.
    """
    arguments: dict[str, Any] = {}
    # If it was not saved, it would be initialised at random and change the encoder's digest.
    if _accepts(MODEL_MAPPING.get(type(_text_config(name)), None), "add_pooling_layer"):
        arguments["add_pooling_layer"] = False
    return load_model(name, AutoModel.from_pretrained, **arguments), _load_tokenizer(name)


def load_pooler(name: str | Path) -> nn.Linear:
    """Loads the linear layer of an encoder's pooling layer; untrained if it was not saved.

    Raises:
        ModelError: the encoder cannot be loaded, or has no pooling layer.
    """
    config = _text_config(name)
    if config.model_type not in ("bert", "roberta", "xlm-roberta"):
        raise ModelError(
            f"{name}: a {config.model_type} model has no pooling layer; use --sentence-token cls."
        )
    dense: nn.Linear = load_model(name, AutoModel.from_pretrained, optional="pooler.").pooler.dense
    return dense


def _text_config(name: str | Path) -> Any:
    config = load(name, AutoConfig.from_pretrained)
    if config.is_encoder_decoder or not hasattr(config, "max_position_embeddings"):
        raise ModelError(
            f"{name}: a {config.model_type} model; expected a text encoder such as BERT."
        )
    return config


def input_settings(model: Any, tokenizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SentenceEncoder` that describe how sentences are fed to an encoder.

    `saved` includes the `SentenceEncoder.packing` of a saved encoder, except one of an earlier
    version; it is empty for a new encoder.

    Raises:
        ModelError: the tokenizer does not end a text in an end-of-sentence token.
    """
    ids = tokenizer.backend_tokenizer.encode("a").ids
    if not ids or ids[-1] not in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer does not end a text in its [SEP] or "
            "end-of-sentence token."
        )
    candidates = _candidate_positions(model)
    if "first_position" in saved:
        first = saved["first_position"]
    else:
        first = _first_position(model, tokenizer, candidates)
    # If it is unknown, the limit must hold for each candidate.
    unused = max(candidates) if first is None else first
    return {
        "max_tokens": min(
            int(model.config.max_position_embeddings) - unused, int(tokenizer.model_max_length)
        ),
        "first_position": first,
        "terminal_id": ids[-1],
        "packs": saved.get("packs", True),
    }


def _first_position(model: Any, tokenizer: Any, candidates: list[int]) -> int | None:
    """The position id of a first token with which the model's states are its default ones.

    None if the model takes no position ids, or counts in another way.
    """
    if not _accepts(model.forward, "position_ids"):
        return None
    ids = torch.tensor([tokenizer.backend_tokenizer.encode("a").ids])  # (1, T)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        for first in candidates:
            positions = torch.arange(first, first + ids.shape[1])[None]
            states = model(**inputs, position_ids=positions).last_hidden_state
            # Either rounding errors apart or far apart.
            if torch.allclose(states, expected, rtol=0, atol=1e-5 * float(expected.abs().max())):
                return first
    return None


def _candidate_positions(model: Any) -> list[int]:
    """Most models count from 0, RoBERTa and its relatives from after their padding id."""
    padding = model.config.pad_token_id
    # No model would waste half of its position table.
    if padding is None or padding >= model.config.max_position_embeddings // 2:
        return [0]
    return [0, padding + 1]


def _accepts(function: Any, argument: str) -> bool:
    return callable(function) and argument in inspect.signature(function).parameters


def _layout(name: str | Path, part: Literal["whole", "text", "vision"]) -> tuple[Layout, bool]:
    """The layout of a model, and whether it is whole rather than one tower."""
    model_type = load(name, AutoConfig.from_pretrained).model_type
    is_projected = part != "whole" and Path(name, PROJECTION).is_file()
    for family, layout in LAYOUTS.items():
        if model_type == family:
            return layout, True
        # With a projection beside it, CLIP's vision tower is one half of a dual encoder.
        if model_type == f"{family}_{part}_model" and layout.projects_outside >= is_projected:
            return layout, False
    if is_projected:
        return _DUAL, False
    raise ModelError(
        f"{name}: a {model_type} model; expected one of CLIP layout, or of SigLIP's, "
        "Chinese-CLIP's or AltCLIP's, or a dual encoder."
    )


def _load_tower(name: str | Path, part: Literal["text", "vision"]) -> tuple[Layout, Any, Any]:
    """The layout, the tower, and its projection if that is a separate module."""
    layout, is_whole = _layout(name, part)
    if layout.projects_outside and is_whole:
        return layout, *_split(load_model(name, layout.loader("whole")), layout, part)
    # Chinese-CLIP's pooling layer is not used, and not saved with a single tower.
    tower = load_model(name, layout.loader(part), optional="pooler.")
    return layout, tower, load_linear(Path(name, PROJECTION)) if layout.projects_outside else None


def _split(model: Any, layout: Layout, part: Literal["text", "vision"]) -> tuple[Any, Any]:
    if not layout.projects_outside:
        return model, None
    if part == "text":
        return model.text_model, model.text_projection
    return model.vision_model, model.visual_projection


def _towers(
    model: Any, layout: Layout, text: str | Path, vision: str | Path
) -> tuple[SentenceEncoder, ImageEncoder]:
    """Both towers of a whole model; tokenizer and processor are loaded by name."""
    encoder = _text_encoder(text, layout, *_split(model, layout, "text"), {})
    return encoder, _image_encoder(vision, layout, *_split(model, layout, "vision"))


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
        **input_settings(backbone, tokenizer, saved),
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
                f"{name}: its tokenizer.json gives other tokens than its slow tokenizer."
            )
        tokenizer = fast
    # Some of sentence-transformers' were saved with padding to 128 tokens.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    require_usable(tokenizer.backend_tokenizer, name)
    return tokenizer


#: Saved beside a tower if no class of transformers includes its projection.
PROJECTION = "projection.safetensors"

#: Backbone, norm of the pooled token, projection, and the function that saves them.
TextParts = tuple[Any, nn.Module, nn.Linear, Save]
#: Backbone, projection, and the function that saves them.
ImageParts = tuple[Any, nn.Linear | None, Save]


@dataclass(frozen=True)
class Layout:
    """A family of models."""

    #: Of its class names in transformers, which are imported only when used; empty: any two
    #: encoders, whose classes transformers chooses.
    prefix: str
    #: Split a tower (and its separate projection) for a `SentenceEncoder` or an `ImageEncoder`.
    text_parts: Callable[[Any, Any], TextParts]
    image_parts: Callable[[Any, Any], ImageParts]
    pooling: Pooling = "terminal"  # the token that represents a text
    causal: bool = False  # tokens attend backwards only
    fills: bool = False  # texts are padded to the limit, and the padding is attended to
    tower_suffix: str = ""  # of the class names of its towers
    processor: str | None = None  # prefix of its image processor; None: the same
    projects_outside: bool = False  # the projections belong to the whole model, not to the towers
    contrastive: bool = True  # trained with the loss of `pretrain`

    def loader(self, part: Literal["whole", "text", "vision", "processor"]) -> Callable[..., Any]:
        """The `from_pretrained` of a part."""
        if self.prefix:
            name = {
                "whole": f"{self.prefix}Model",
                "text": f"{self.prefix}TextModel{self.tower_suffix}",
                "vision": f"{self.prefix}VisionModel{self.tower_suffix}",
                # Pillow always resizes: another backend would change every feature.
                "processor": f"{self.processor or self.prefix}ImageProcessorPil",
            }[part]
        elif part == "processor":
            return functools.partial(AutoImageProcessor.from_pretrained, backend="pil")
        else:
            name = "AutoModel"
        loader: Callable[..., Any] = getattr(transformers, name).from_pretrained
        return loader


def _save_projected(tower: Any, projection: nn.Linear, folder: Path) -> None:
    """Writes a tower and its separate projection."""
    tower.save_pretrained(folder)
    save_weights(projection, folder / PROJECTION)


def _save_headed(tower: Any, head: nn.Linear, folder: Path) -> None:
    """Writes a tower with its last layer, which was split off."""
    tower.head = head
    try:
        tower.save_pretrained(folder)
    finally:
        tower.head = nn.Identity()


class _NaFlex(nn.Module):
    """Adapts SigLIP 2 NaFlex, which keeps an image's proportions, to a single input tensor.

    `ImageEncoder.preprocess` builds it: each patch's values, then height and width of the grid.
    Unused patches are masked.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.config = tower.config

    def forward(self, pixel_values: Tensor) -> Any:
        """Encodes (B, P, values + 2) patches."""
        grids = pixel_values[:, 0, -2:].long()  # (B, 2)
        index = torch.arange(pixel_values.shape[1], device=pixel_values.device)
        mask = index < grids.prod(dim=1, keepdim=True)  # (B, P)
        return self.tower(
            pixel_values=pixel_values[..., :-2],
            pixel_attention_mask=mask.long(),
            spatial_shapes=grids,
        )


def _clip_text(model: Any, _: None) -> TextParts:
    """CLIP: the tower ends in a normalisation; then a projection."""
    return model.text_model, nn.Identity(), model.text_projection, model.save_pretrained


def _clip_image(model: Any, _: None) -> ImageParts:
    return model.vision_model, model.visual_projection, model.save_pretrained


def _siglip_text(tower: Any, _: None) -> TextParts:
    head = tower.head
    tower.head = nn.Identity()  # or the encoder would have its weights twice
    return tower, nn.Identity(), head, functools.partial(_save_headed, tower, head)


def _siglip_image(tower: Any, _: None) -> ImageParts:
    """SigLIP: the state pooled by attention is the embedding."""
    return tower, None, tower.save_pretrained


def _siglip2_image(tower: Any, _: None) -> ImageParts:
    return _NaFlex(tower), None, tower.save_pretrained


def _chinese_clip_text(tower: Any, projection: nn.Linear) -> TextParts:
    """Chinese-CLIP: a BERT without normalisation, then a projection."""
    tower.pooler = None  # unused, see `_load_tower`
    return tower, nn.Identity(), projection, functools.partial(_save_projected, tower, projection)


def _altclip_text(tower: Any, projection: nn.Linear) -> TextParts:
    """AltCLIP: an XLM-RoBERTa; normalised, mapped to CLIP's width, projected."""
    norm = nn.Sequential(tower.pre_LN, tower.transformation)
    return tower.roberta, norm, projection, functools.partial(_save_projected, tower, projection)


def _dual_text(tower: Any, projection: nn.Linear) -> TextParts:
    """A dual encoder: through the pooling layer if there is one, as in transformers."""
    pooler = getattr(tower, "pooler", None)
    norm: nn.Module = nn.Identity()
    if pooler is not None:
        norm = nn.Sequential(pooler.dense, getattr(pooler, "activation", nn.Tanh()))
    return tower, norm, projection, functools.partial(_save_projected, tower, projection)


def _projected_image(tower: Any, projection: nn.Linear) -> ImageParts:
    return tower, projection, functools.partial(_save_projected, tower, projection)


_CLIP = Layout("CLIP", _clip_text, _clip_image, causal=True, tower_suffix="WithProjection")
_DUAL = Layout("", _dual_text, _projected_image, pooling="cls", projects_outside=True)
_SIGLIP = Layout("Siglip", _siglip_text, _siglip_image, fills=True, contrastive=False)

#: By the `model_type` of the whole model; that of a tower ends in `_text_model`, `_vision_model`.
LAYOUTS = {
    "clip": _CLIP,
    "metaclip_2": replace(_CLIP, prefix="MetaClip2", processor="CLIP"),
    "vision-text-dual-encoder": _DUAL,
    "siglip": _SIGLIP,
    "siglip2": replace(_SIGLIP, prefix="Siglip2", image_parts=_siglip2_image),
    "chinese_clip": replace(_DUAL, prefix="ChineseCLIP", text_parts=_chinese_clip_text),
    "altclip": replace(_DUAL, prefix="AltCLIP", text_parts=_altclip_text, processor="CLIP"),
}
