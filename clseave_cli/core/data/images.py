"""From an image's name to pixels. Names in data files are looked up, never used as paths."""

from __future__ import annotations

import errno
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import (
    Image,
    ImageOps,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  the one format of ours that Pillow would load all others for
)

from clseave_cli.core.data.records import IMAGE_EXTENSIONS, Parallel, Split, image_stem
from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT, Progress

_FOLDER_NAMES = ("images", "flickr30k-images", "flickr30k_images", "Images")
_Rows = TypeVar("_Rows", Split, Parallel)
#: What is decoded. Pillow knows more formats, some through other programs (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Preprocessing scales the short side up to the tower's input and the long side along with it: a
#: picture of 20,000 × 1 pixels would become one of 4,480,000 × 224.
_MOST_ELONGATED = 100


class ImageFolder:
    """The images of one folder, found by name with or without extension.

    Raises:
        DataError: the folder is not there.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such image folder; name it with --images DIR.")
        self.root = root
        # One listing, then dictionary look-ups: a name such as ../../x can only be "not found".
        self._by_name: dict[str, str] = {}
        try:
            with os.scandir(root) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{root}: cannot be read ({error.strerror}).") from None
        for entry in listed:
            if entry.name.lower().endswith(IMAGE_EXTENSIONS) and _is_file(entry):
                self._by_name[entry.name] = entry.name
                self._by_name.setdefault(image_stem(entry.name), entry.name)

    @classmethod
    def of(cls, data: Path, images: Path | None) -> ImageFolder:
        """The image folder given, or the one found inside the data folder.

        Raises:
            DataError: there is none.
        """
        if images is not None:
            return cls(images)
        for name in _FOLDER_NAMES:
            if (data / name).is_dir():
                return cls(data / name)
        looked = ", ".join(_FOLDER_NAMES)
        raise DataError(
            f"{data}: no image folder in it (looked for {looked}); name it with --images DIR."
        )

    def paths(self) -> list[Path]:
        """Every image, by name."""
        return [self.root / file for file in sorted(set(self._by_name.values()))]

    def get(self, name: str) -> Path | None:
        """The file of an image, by its name as a data file gives it; None: there is none."""
        file = self._by_name.get(name) or self._by_name.get(image_stem(name))
        return None if file is None else self.root / file

    def find(self, name: str, where: str) -> Path:
        """The file of an image.

        Args:
            name: as a data file gives it.
            where: `file:line` that asks for it, for the message.

        Raises:
            DataError: there is no such image.
        """
        path = self.get(name)
        if path is None:
            raise DataError(f"{where}: image {name!r} is not in {self.root}.")
        return path

    def rows_with_image(self, rows: _Rows, skip_bad: bool, progress: Progress = SILENT) -> _Rows:
        """The rows whose images are here.

        Args:
            rows: those that name no image stay.
            skip_bad: leave the others out, instead of refusing them.
            progress: told how many are left out.

        Raises:
            DataError: some are not here, or none is; says how many.
        """
        split = rows.target if isinstance(rows, Parallel) else rows
        is_missing = np.array([self.get(name) is None for name in split.image_names], dtype=bool)
        if not is_missing.any():
            return rows
        lacks = (split.image_index >= 0) & is_missing[split.image_index]
        first = int(np.argmax(lacks))
        name = split.image_names[split.image_index[first]]
        what = (
            f"{split.where(first)}: image {name!r} is not in {self.root}; {lacks.sum()} of "
            f"{len(split)} rows lack theirs, {is_missing.sum()} of {len(is_missing)} images"
        )
        if not skip_bad or lacks.all():
            advice = "" if lacks.all() else " --skip-bad leaves those rows out."
            raise DataError(f"{what}. Is --images DIR right?{advice}")
        progress.note(f"{what}. They are left out.")
        return rows.take(np.flatnonzero(~lacks))


def picture_name(key: str) -> str:
    """The name, without ending, of the picture that belongs to a key of the data: / becomes %2F."""
    return re.sub(r"[%/\0]", lambda match: f"%{ord(match[0]):02X}", key)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Decodes an image to RGB, upright as its camera meant it.

    Raises:
        DataError: missing, unreadable, damaged, truncated, larger than Pillow's safety limit, or
            far too long for its width.
    """
    label = name or (str(source) if isinstance(source, Path) else "the image")
    try:
        stream = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(stream, formats=FORMATS) as image:
            # Pillow refuses an image of twice its limit and warns of one above it; we refuse both.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            require_shape(image, label)
            ImageOps.exif_transpose(image, in_place=True)  # without another copy in memory
            return in_rgb(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{label}: no such image.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{label}: more pixels than the limit of {Image.MAX_IMAGE_PIXELS}; scale it down."
        ) from None
    # Pillow's decoders raise many kinds of errors on damaged input; each means the same to us.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ELOOP):
            raise DataError(f"{label}: cannot be read ({error.strerror}).") from None
        # This one says no more, but prints the stream with its address in memory.
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"{label}: damaged or not an image{why}.") from None


def require_shape(image: Image.Image, label: str) -> None:
    """Refuses a picture that preprocessing would blow up.

    Args:
        image: it need not be decoded yet.
        label: what the message calls it.

    Raises:
        DataError: one side is more than 100 times the other, or 0.
    """
    short, long = sorted(image.size)
    if long > _MOST_ELONGATED * short:
        raise DataError(
            f"{label}: {image.width} × {image.height} pixels; expected a picture whose long side "
            f"is at most {_MOST_ELONGATED} times the short one; crop it."
        )


def in_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB with 8 bits a channel; of 16-bit greys, Pillow alone would make white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


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
    def of(cls, processor: Any) -> Preparation | None:
        """The numbers of an image processor; None where it does something else as well, or less."""
        size = getattr(processor, "size", None)
        if size is None:
            return None
        crop = processor.crop_size if getattr(processor, "do_center_crop", False) else size
        steps = ("do_resize", "do_rescale", "do_normalize")
        if not (
            all(getattr(processor, step, False) for step in steps)
            and abs(processor.rescale_factor - 1 / 255) < 1e-9
            and crop is not None
            and crop["height"]
            and crop["width"]
        ):
            return None
        side = size["shortest_edge"]
        return cls(
            resize=(side,) if side else (size["height"], size["width"]),
            crop=(crop["height"], crop["width"]),
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            resample=int(processor.resample),
        )

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """(3, height, width) float32 pixels of an RGB image."""
        scaled = (self.cut(image).astype(np.float64) * (1 / 255)).astype(np.float32)
        normalised = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def cut(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """(height, width, 3) of an RGB image, resized and cut out, before any arithmetic.

        Pillow does it in C, while other threads go on.
        """
        size = self._size(image.size)
        resized = image.resize(size, Image.Resampling(self.resample))
        return np.asarray(resized.crop(self._box(size)))

    def region(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is cut out of a picture, in its own pixels.

        Args:
            size: width and height of the picture.
        """
        resized = self._size(size)
        scales = (size[0] / resized[0], size[1] / resized[1]) * 2
        left, top, right, bottom = (
            edge * scale for edge, scale in zip(self._box(resized), scales, strict=True)
        )
        return left, top, right, bottom

    def _box(self, resized: tuple[int, int]) -> tuple[int, int, int, int]:
        height, width = self.crop
        # Floor division and ceiling, as the processor rounds.
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        return left, top, left + width, top + height

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize[1], self.resize[0]
        short, long = sorted(size)
        longer = self.resize[0] * long // short
        return (self.resize[0], longer) if size[0] == short else (longer, self.resize[0])
