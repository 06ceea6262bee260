"""Pictures with sentences and what the model says of them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from clseave_cli.core.data.images import open_image
from clseave_cli.errors import DataError

#: Longest side of a picture in a report, in pixels: sharp at its size on the page on a fine screen.
THUMBNAIL_PIXELS = 480

# Drawings stay lossless (and small); photos do not.
_MOST_PNG_COLOURS = 256


@dataclass(frozen=True)
class GalleryEntry:
    """One hypothesis about a picture, and the verdict.

    Attributes:
        lang: language code of the hypothesis.
        hypothesis: the sentence, any text.
        label: gold label name.
        predicted: predicted label name.
        probabilities: of the labels, in the order of `LABELS`.
    """

    lang: str
    hypothesis: str
    label: str
    predicted: str
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class GalleryItem:
    """One picture (a file, or its encoded bytes) with everything said about it."""

    name: str
    image: Path | bytes
    entries: tuple[GalleryEntry, ...]


@dataclass(frozen=True)
class Gallery:
    """A section of the report that shows pictures."""

    title: str
    introduction: str
    items: tuple[GalleryItem, ...]


def most_confident_errors(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, images: npt.ArrayLike, count: int = 12
) -> npt.NDArray[np.int64]:
    """Rows where the model is wrong and surest of it, at most one a picture.

    Args:
        labels: (N,) int gold label ids.
        probabilities: (N, C).
        images: (N,) picture of each row.
        count: most rows to return.

    Returns:
        (≤ count,) int row numbers, the surest first.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    wrong = np.flatnonzero(p.argmax(axis=1) != np.asarray(labels))
    by_confidence = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]
    _, first_of_image = np.unique(np.asarray(images)[by_confidence], return_index=True)
    return by_confidence[np.sort(first_of_image)][:count]


@dataclass(frozen=True)
class Thumbnail:
    """A picture as the report carries it."""

    encoded: bytes
    extension: Literal["png", "jpg"]
    width: int
    height: int

    @property
    def data_uri(self) -> str:
        """The picture inside its own address, so that a page needs no other file."""
        kind = {"png": "image/png", "jpg": "image/jpeg"}[self.extension]
        return f"data:{kind};base64,{base64.b64encode(self.encoded).decode('ascii')}"


def thumbnail(image: Path | bytes) -> Thumbnail | None:
    """A picture scaled down for the page; None if it cannot be read."""
    try:
        picture = open_image(image)
    except DataError:
        return None
    drawing = picture.getcolors(_MOST_PNG_COLOURS) is not None
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "PNG" if drawing else "JPEG", quality=85, optimize=True)
    return Thumbnail(stream.getvalue(), "png" if drawing else "jpg", *picture.size)
