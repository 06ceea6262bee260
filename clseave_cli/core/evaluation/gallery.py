"""The report's galleries: photos with hypotheses and predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clseave_cli.core.data.heat_map import png_uri
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.languages import language_name
from clseave_cli.core.evaluation.metrics import probabilities
from clseave_cli.core.evaluation.outputs import Outputs
from clseave_cli.errors import DataError
from clseave_cli.labels import LABELS

#: Longest side of a photo in the report, in pixels, sharp on a high-density screen.
THUMBNAIL_PIXELS = 480


@dataclass(frozen=True)
class GalleryEntry:
    """A hypothesis about a photo, and the prediction."""

    lang: str  # language code of the hypothesis
    hypothesis: str
    label: str  # gold label
    predicted: str  # predicted label
    probabilities: tuple[float, ...]  # in the order of `LABELS`


@dataclass(frozen=True)
class GalleryItem:
    """A photo (a file, or its encoded bytes) with hypotheses."""

    name: str
    image: Path | bytes
    entries: tuple[GalleryEntry, ...]
    # Draws the attention of the first entry's model over the photo.
    draw_attention: Callable[[Image.Image], Image.Image] | None = None

    def heat_map(self) -> str | None:
        """The attention of the first entry's model as a `data:` URI; None if it has none."""
        if self.draw_attention is None:
            return None
        return png_uri(self.draw_attention(open_image(self.image)))


@dataclass(frozen=True)
class Gallery:
    """A section of the report that shows photos."""

    title: str
    introduction: str
    items: tuple[GalleryItem, ...]


def examples(outputs: Mapping[str, Outputs], images: ImageFolder) -> Gallery:
    """A few rows with the predictions of every language, all labels in turn."""
    first = next(iter(outputs.values()))
    pair_ids = first.split.pair_ids
    rows_by_id = [{id: row for row, id in enumerate(o.split.pair_ids)} for o in outputs.values()]
    shared = [row for row, id in enumerate(pair_ids) if all(id in rows for rows in rows_by_id)]
    chosen: dict[str, int] = {}
    # A fixed scattering: neighbouring rows tend to share a photo.
    for row in sorted(shared, key=lambda r: (r * 2654435761) % 2**32):
        name = str(first.images[row])
        if name not in chosen and first.split.labels[row] == len(chosen) % len(LABELS):
            chosen[name] = row
        if len(chosen) == 8:
            break
    items = []
    for name, row in chosen.items():
        rows = [rows[pair_ids[row]] for rows in rows_by_id]
        items.append(_item(name, images, list(zip(outputs.values(), rows, strict=True))))
    return Gallery(
        "The same photos in every language",
        "One hypothesis about each photo in every language, with the predictions.",
        tuple(items),
    )


def errors(outputs: Mapping[str, Outputs], images: ImageFolder) -> Gallery:
    """The most confident errors of every language."""
    count = 12 if len(outputs) == 1 else 3
    items = []
    for each in outputs.values():
        p = probabilities(each.logits)
        for row in most_confident_errors(each.split.labels, p, each.images, count).tolist():
            title = f"{language_name(each.split.lang)} · {each.images[row]}"
            items.append(_item(title, images, [(each, row)]))
    return Gallery(
        "The most confident errors",
        f"The wrong predictions with the highest probability: at most {count} a language, one a "
        "photo.",
        tuple(items),
    )


def _item(name: str, images: ImageFolder, rows: Sequence[tuple[Outputs, int]]) -> GalleryItem:
    """The photo of the first row, with the hypotheses of all."""
    entries = [
        GalleryEntry(
            lang=outputs.split.lang,
            hypothesis=outputs.split.hypotheses[row],
            label=LABELS[outputs.split.labels[row]],
            predicted=LABELS[int(outputs.logits[row].argmax())],
            probabilities=tuple(probabilities(outputs.logits[row : row + 1])[0].tolist()),
        )
        for outputs, row in rows
    ]
    first, row = rows[0]
    image = images.find(str(first.images[row]), first.split.where(row))
    return GalleryItem(name, image, tuple(entries), first.heat_map(row))


def most_confident_errors(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, images: npt.ArrayLike, count: int = 12
) -> npt.NDArray[np.int64]:
    """(≤ count,) wrong rows with the highest probability, at most one a photo.

    From (N,) gold label ids, (N, C) probabilities and the (N,) photo of each row.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    wrong = np.flatnonzero(p.argmax(axis=1) != np.asarray(labels))
    by_confidence = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]
    _, first_of_image = np.unique(np.asarray(images)[by_confidence], return_index=True)
    return by_confidence[np.sort(first_of_image)][:count]


def thumbnail(image: Path | bytes) -> tuple[str, int] | None:
    """A photo scaled down as a `data:` URI, and its width in pixels; None if unreadable."""
    try:
        picture = open_image(image)
    except DataError:
        return None
    # Drawings, which have few colours, stay lossless (and small).
    kind = "PNG" if picture.getcolors(256) is not None else "JPEG"
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, kind, quality=85, optimize=True)
    return data_uri(stream.getvalue(), kind), picture.width


def data_uri(encoded: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode('ascii')}"
