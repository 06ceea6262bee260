"""Pictures with sentences and what the models say of them: which are shown, and how small."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
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

#: Longest side of a picture in a report, in pixels: sharp at its size on the page on a fine screen.
THUMBNAIL_PIXELS = 480

_EXAMPLES = 8

# Pictures of errors: of a language alone, or of each of several.
_ERRORS_ALONE = 12
_ERRORS_EACH = 3

# Drawings stay lossless (and small); photos do not.
_MOST_PNG_COLOURS = 256


@dataclass(frozen=True)
class GalleryEntry:
    """One hypothesis about a picture, and the prediction."""

    lang: str  # language code of the hypothesis
    hypothesis: str  # the sentence, any text
    label: str  # gold label name
    predicted: str  # predicted label name
    probabilities: tuple[float, ...]  # of the labels, in the order of `LABELS`

    @classmethod
    def of(cls, outputs: Outputs, row: int) -> GalleryEntry:
        """A row of a system's outputs."""
        return cls(
            lang=outputs.split.lang,
            hypothesis=outputs.split.hypotheses[row],
            label=LABELS[outputs.split.labels[row]],
            predicted=LABELS[int(outputs.logits[row].argmax())],
            probabilities=tuple(probabilities(outputs.logits[row : row + 1])[0].tolist()),
        )


@dataclass(frozen=True)
class GalleryItem:
    """One picture (a file, or its encoded bytes) with everything said about it."""

    name: str
    image: Path | bytes
    entries: tuple[GalleryEntry, ...]
    # Where the model of the first entry looked: a function of the picture.
    looked: Callable[[Image.Image], Image.Image] | None = None

    def heat_map(self) -> str | None:
        """Where the model of the first entry looked, as a `data:` URI; None: it sees no parts."""
        return None if self.looked is None else png_uri(self.looked(open_image(self.image)))


@dataclass(frozen=True)
class Gallery:
    """A section of the report that shows pictures."""

    title: str
    introduction: str
    items: tuple[GalleryItem, ...]


def examples(outputs: Mapping[str, Outputs], images: ImageFolder) -> Gallery:
    """A few rows with what every language's model says of them, all labels in turn."""
    first = next(iter(outputs.values()))
    pair_ids = first.split.pair_ids
    places = [{id: row for row, id in enumerate(o.split.pair_ids)} for o in outputs.values()]
    everywhere = [row for row, id in enumerate(pair_ids) if all(id in place for place in places)]
    chosen: dict[str, int] = {}
    # Scattered over the file, always the same: rows beside each other tend to share a photo.
    for row in sorted(everywhere, key=lambda r: (r * 2654435761) % 2**32):
        name = str(first.images[row])
        if name not in chosen and first.split.labels[row] == len(chosen) % len(LABELS):
            chosen[name] = row
        if len(chosen) == _EXAMPLES:
            break
    items = []
    for name, row in chosen.items():
        rows = [place[pair_ids[row]] for place in places]
        entries = tuple(map(GalleryEntry.of, outputs.values(), rows))
        image = images.find(name, first.split.where(row))
        items.append(GalleryItem(name, image, entries, first.looked(row)))
    return Gallery(
        "The same pictures in every language",
        "One hypothesis about each picture in every language, with what the models predict.",
        tuple(items),
    )


def errors(outputs: Mapping[str, Outputs], images: ImageFolder) -> Gallery:
    """The most confident errors of every language."""
    count = _ERRORS_ALONE if len(outputs) == 1 else _ERRORS_EACH
    items = []
    for each in outputs.values():
        sure = probabilities(each.logits)
        rows = most_confident_errors(each.split.labels, sure, each.images, count)
        for row in rows.tolist():
            name = str(each.images[row])
            title = f"{language_name(each.split.lang)} · {name}"
            image = images.find(name, each.split.where(row))
            entries = (GalleryEntry.of(each, row),)
            items.append(GalleryItem(title, image, entries, each.looked(row)))
    return Gallery(
        "The most confident errors",
        f"Where the model of each language is wrong and surest of it: at most {count} a language, "
        "one a picture.",
        tuple(items),
    )


def most_confident_errors(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, images: npt.ArrayLike, count: int = 12
) -> npt.NDArray[np.int64]:
    """(≤ count,) rows where the model is wrong and surest of it, at most one a picture.

    From (N,) gold label ids, (N, C) probabilities and the (N,) picture of each row.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    wrong = np.flatnonzero(p.argmax(axis=1) != np.asarray(labels))
    by_confidence = wrong[np.argsort(-p[wrong].max(axis=1), kind="stable")]
    _, first_of_image = np.unique(np.asarray(images)[by_confidence], return_index=True)
    return by_confidence[np.sort(first_of_image)][:count]


def thumbnail(image: Path | bytes) -> tuple[str, int] | None:
    """A picture scaled down for the page, as a `data:` URI, and its width in pixels.

    None if it cannot be read.
    """
    try:
        picture = open_image(image)
    except DataError:
        return None
    kind = "PNG" if picture.getcolors(_MOST_PNG_COLOURS) is not None else "JPEG"
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, kind, quality=85, optimize=True)
    return data_uri(stream.getvalue(), kind), picture.width


def data_uri(encoded: bytes, kind: str) -> str:
    """A picture inside its own address, so that a page needs no other file."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded).decode('ascii')}"
