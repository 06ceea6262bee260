"""From a decoded photo to the image tower's pixels, with Pillow and NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]


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
