"""Models as `predict` and `serve` see them: arrays in, arrays out, whatever computes.

Legend: B images or sentences · D embedding width · C labels (3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from clseave_cli.core.config import Precision
from clseave_cli.errors import ModelError

Floats = npt.NDArray[np.float32]

#: The longest side of an image tower's input that an exported folder may ask for.
_LONGEST_SIDE = 4096


class InferenceModel(Protocol):
    """An image tower, a sentence encoder per language, and the head.

    Attributes:
        sources: the folder of the model that reads each language, CLIP-VE's language first.
    """

    sources: dict[str, str]

    def prepare(self, image: Image.Image) -> Floats:
        """(3, height, width) pixels of a decoded RGB image. May be called from any thread."""
        ...

    def embed_images(self, pixels: Floats) -> Floats:
        """(B, D) embeddings of (B, 3, height, width) pixels."""
        ...

    def embed_sentences(
        self, lang: str, sentences: Sequence[str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(B, D) embeddings of B sentences, and (B,) which of them were cut at the limit."""
        ...

    def probabilities(self, hypotheses: Floats, premises: Floats) -> Floats:
        """(B, C) probabilities of the labels, from (B, D) sentence and image embeddings."""
        ...


def own_language(runs: Path) -> str:
    """The language CLIP-VE itself reads; an exported folder may lack it.

    Args:
        runs: as for `load_model`.

    Raises:
        ModelError: neither folder, or a damaged one.
    """
    from clseave_cli.core.prediction import onnx_model

    if onnx_model.is_exported(runs):
        return onnx_model.own_language(runs)
    from clseave_cli.core.models.clip_ve import source_language

    return source_language(runs / "clip-ve")


def load_model(
    runs: Path,
    languages: Sequence[str] | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    lasting: bool = True,
) -> InferenceModel:
    """Loads the models under `runs`, or a folder that `clseave export` wrote.

    A sentence encoder may be loaded only when its language is first asked for.

    Args:
        runs: either folder. For an exported one, torch is not imported.
        languages: that will be asked for; None: every one there is a model for.
        device: where torch computes.
        precision: how torch computes.
        lasting: for many answers. An exported folder is then compared with its digests, and its
            weights are arranged for this processor: seconds at the start, and a copy in memory,
            for faster answers. Otherwise only its manifest is checked, and a tower's weights leave
            memory when it has answered. Torch's models are always loaded to last.

    Raises:
        ClseaveError: no model for a language, a damaged one, a missing extra, no such device.
    """
    from clseave_cli.core.prediction import onnx_model

    if onnx_model.is_exported(runs):
        return onnx_model.OnnxModel.from_folder(runs, languages, lasting=lasting)
    from clseave_cli.core.prediction.torch_model import TorchModel

    return TorchModel.from_runs(runs, languages, device, precision)


@dataclass(frozen=True)
class Preparation:
    """What an image processor of CLIP's kind does, as numbers that fit into a JSON file.

    Attributes:
        resize: (height, width), or (shortest side,), which keeps the proportions.
        crop: (height, width) cut out of the middle; a smaller picture gets black edges.
        mean: of red, green and blue, on the scale from 0 to 1.
        std: likewise.
        resample: Pillow's number of the filter.
    """

    resize: tuple[int, ...]
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_manifest(cls, numbers: Any, folder: Path) -> Preparation:
        """What an exported folder says of it.

        Raises:
            ModelError: that cannot be, or would take too much memory.
        """
        try:
            preparation = cls(**numbers)
            sides = (*preparation.resize, *preparation.crop)
            sound = (
                len(preparation.resize) in (1, 2)
                and len(preparation.crop) == 2
                and all(isinstance(side, int) and 0 < side <= _LONGEST_SIDE for side in sides)
                and np.array([preparation.mean, preparation.std], np.float32).shape == (2, 3)
                and Image.Resampling(preparation.resample) is not None
            )
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ModelError(
                f"{folder}: `preparation` in config.json is damaged; expected sides of at most "
                f"{_LONGEST_SIDE} pixels; export it again."
            )
        return preparation

    def __call__(self, image: Image.Image) -> Floats:
        """(3, height, width) float32 pixels of an RGB image."""
        resized = image.resize(self._size(image), Image.Resampling(self.resample))
        height, width = self.crop
        # Floor division and ceiling, as the processor rounds.
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        cut = resized.crop((left, top, left + width, top + height))
        scaled = (np.asarray(cut, dtype=np.float64) * (1 / 255)).astype(np.float32)
        normalised = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize[1], self.resize[0]
        short, long = sorted(image.size)
        longer = self.resize[0] * long // short
        return (self.resize[0], longer) if image.width == short else (longer, self.resize[0])
