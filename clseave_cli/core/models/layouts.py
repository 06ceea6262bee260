"""The layouts of image-text models: where each keeps its towers, and how it reads a sentence.

A layout is a family of transformers classes. CLIP, SigLIP (and SigLIP 2), Chinese-CLIP and AltCLIP
end and pool a text differently, and transformers saves their towers differently: see each function
below. What follows from it is hidden behind `SentenceEncoder` and `ImageEncoder`.

Legend: B images · P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clseave_cli.core.config import Pooling
from clseave_cli.core.models.weights import save_weights

#: Beside a tower for which transformers has no class with its projection.
PROJECTION = "projection.safetensors"


@dataclass(frozen=True)
class TextTower:
    """A text tower taken apart: backbone → pooled token → norm → projection.

    Attributes:
        backbone: gives `last_hidden_state`.
        norm: applied to the pooled token.
        projection: into the shared space.
        hub_model: what saves the tower in Hugging Face layout.
        pooling: the token that is read.
        causal: tokens look back only.
        fills: texts are padded up to the limit, and the padding is read as well.
    """

    backbone: Any
    norm: nn.Module
    projection: nn.Linear
    hub_model: Any
    pooling: Pooling = "terminal"
    causal: bool = False
    fills: bool = False


@dataclass(frozen=True)
class ImageTower:
    """An image tower taken apart: backbone → pooled output → projection, if there is one.

    Attributes:
        backbone: gives `pooler_output`.
        projection: into the shared space.
        hub_model: what saves the tower in Hugging Face layout.
    """

    backbone: Any
    projection: nn.Linear | None
    hub_model: Any


@dataclass(frozen=True)
class Layout:
    """A family of models.

    Attributes:
        whole: transformers' class of the whole model, by name: a family's code is imported only
            when it is used.
        text: its class of the text tower by itself.
        image: its class of the image tower by itself.
        processor: its image processor with Pillow's resampling.
        text_parts: takes a text tower (and its projection, if that lies outside) apart.
        image_parts: takes an image tower apart likewise.
        projects_outside: the projections belong to the whole model, not to the towers.
        contrastive: trained with the loss that `pretrain` has.
    """

    whole: str
    text: str
    image: str
    processor: str
    text_parts: Callable[[Any, Any], TextTower]
    image_parts: Callable[[Any, Any], ImageTower]
    projects_outside: bool = False
    contrastive: bool = True


class _Projected:
    """A tower and its projection, which no class of transformers holds together."""

    def __init__(self, tower: Any, projection: nn.Linear) -> None:
        self._tower, self._projection = tower, projection

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tower in Hugging Face layout, the projection beside it."""
        self._tower.save_pretrained(folder)
        save_weights(self._projection, folder / PROJECTION)


class _Headed:
    """A tower whose last layer is read by itself; put back for saving."""

    def __init__(self, tower: Any) -> None:
        self._tower, self._head = tower, tower.head
        tower.head = nn.Identity()  # or its weights would stand in the encoder twice

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tower with its head in Hugging Face layout."""
        self._tower.head = self._head
        try:
            self._tower.save_pretrained(folder)
        finally:
            self._tower.head = nn.Identity()


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


def _clip_text(model: Any, _: None) -> TextTower:
    """CLIP: causal, read at [EOS]; the tower's own last normalisation, then a projection."""
    return TextTower(model.text_model, nn.Identity(), model.text_projection, model, causal=True)


def _clip_image(model: Any, _: None) -> ImageTower:
    return ImageTower(model.vision_model, model.visual_projection, model)


def _siglip_text(tower: Any, _: None) -> TextTower:
    """SigLIP: not causal; filled up with padding, which is looked at; read at the last place."""
    head = tower.head
    return TextTower(tower, nn.Identity(), head, _Headed(tower), fills=True)


def _siglip_image(tower: Any, _: None) -> ImageTower:
    """SigLIP: pooled by attention, and that is the embedding."""
    return ImageTower(tower, None, tower)


def _siglip2_image(tower: Any, _: None) -> ImageTower:
    return ImageTower(_NaFlex(tower), None, tower)


def _chinese_clip_text(tower: Any, projection: nn.Linear) -> TextTower:
    """Chinese-CLIP: a BERT, read at [CLS] without normalisation, then a projection."""
    tower.pooler = None  # made up by transformers where the tower was saved by itself
    hub_model = _Projected(tower, projection)
    return TextTower(tower, nn.Identity(), projection, hub_model, pooling="cls")


def _altclip_text(tower: Any, projection: nn.Linear) -> TextTower:
    """AltCLIP: an XLM-RoBERTa, read at <s>; normalised, transformed to CLIP's width, projected."""
    norm = nn.Sequential(tower.pre_LN, tower.transformation)
    return TextTower(tower.roberta, norm, projection, _Projected(tower, projection), pooling="cls")


def _projected_image(tower: Any, projection: nn.Linear) -> ImageTower:
    return ImageTower(tower, projection, _Projected(tower, projection))


#: By the `model_type` of the whole model; that of a tower ends in `_text_model`, `_vision_model`.
LAYOUTS = {
    "clip": Layout(
        "CLIPModel",
        "CLIPTextModelWithProjection",
        "CLIPVisionModelWithProjection",
        "CLIPImageProcessorPil",
        _clip_text,
        _clip_image,
    ),
    "siglip": Layout(
        "SiglipModel",
        "SiglipTextModel",
        "SiglipVisionModel",
        "SiglipImageProcessorPil",
        _siglip_text,
        _siglip_image,
        contrastive=False,
    ),
    "siglip2": Layout(
        "Siglip2Model",
        "Siglip2TextModel",
        "Siglip2VisionModel",
        "Siglip2ImageProcessorPil",
        _siglip_text,
        _siglip2_image,
        contrastive=False,
    ),
    "chinese_clip": Layout(
        "ChineseCLIPModel",
        "ChineseCLIPTextModel",
        "ChineseCLIPVisionModel",
        "ChineseCLIPImageProcessorPil",
        _chinese_clip_text,
        _projected_image,
        projects_outside=True,
    ),
    "altclip": Layout(
        "AltCLIPModel",
        "AltCLIPTextModel",
        "AltCLIPVisionModel",
        "CLIPImageProcessorPil",
        _altclip_text,
        _projected_image,
        projects_outside=True,
    ),
}
