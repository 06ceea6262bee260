"""From image names to pixels. Names in data files are looked up, never used as paths."""

from __future__ import annotations

import errno
import io
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import (
    Image,
    ImageOps,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  otherwise Pillow would load all its plugins to find this one
)

from clseave_cli.core.data.records import IMAGE_EXTENSIONS, Parallel, Split, image_stem
from clseave_cli.errors import DataError
from clseave_cli.progress import SILENT, Progress

_FOLDER_NAMES = ("images", "flickr30k-images", "flickr30k_images", "Images")
_Rows = TypeVar("_Rows", Split, Parallel)
#: Formats to decode. Pillow supports more, some through other programs (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Highest ratio of the sides. Preprocessing scales the short side to the tower's input, so 20,000 ×
#: 1 pixels would become 4,480,000 × 224.
_MAX_ASPECT_RATIO = 100


class ImageFolder:
    """The images of one folder, found by name with or without extension.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such image folder; choose it with --images DIR.")
        self.root = root
        # After one listing, names are only looked up: ../../x is simply not found.
        self._by_name: dict[str, str] = {}
        try:
            with os.scandir(root) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{root}: cannot be read ({error.strerror}).") from None
        for entry in entries:
            with suppress(OSError):  # a link to itself
                if entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                    self._by_name[entry.name] = entry.name
                    self._by_name.setdefault(image_stem(entry.name), entry.name)

    @classmethod
    def of(cls, data: Path, images: Path | None) -> ImageFolder:
        """The image folder `images`, or else the one inside the data folder.

        Raises:
            DataError: there is none.
        """
        if images is not None:
            return cls(images)
        for name in _FOLDER_NAMES:
            if (data / name).is_dir():
                return cls(data / name)
        raise DataError(
            f"{data}: no image folder in it (looked for {', '.join(_FOLDER_NAMES)}); choose it "
            "with --images DIR."
        )

    def paths(self) -> list[Path]:
        """Every image, by name."""
        return [self.root / file for file in sorted(set(self._by_name.values()))]

    def get(self, name: str) -> Path | None:
        """The file of an image that a data file names; None: there is none."""
        file = self._by_name.get(name) or self._by_name.get(image_stem(name))
        return None if file is None else self.root / file

    def find(self, name: str, where: str) -> Path:
        """The file of an image that `where` (`file:line`) names.

        Raises:
            DataError: there is no such image.
        """
        path = self.get(name)
        if path is None:
            raise DataError(f"{where}: image {name!r} is not in {self.root}.")
        return path

    def rows_with_image(self, rows: _Rows, skip_bad: bool, progress: Progress = SILENT) -> _Rows:
        """The rows whose image is in the folder, or that name none; `skip_bad` skips the others.

        Raises:
            DataError: images are missing (with `skip_bad`: all of them); says how many.
        """
        split = rows.target if isinstance(rows, Parallel) else rows
        is_missing = np.array([self.get(name) is None for name in split.image_names], dtype=bool)
        if not is_missing.any():
            return rows
        is_bad = (split.image_index >= 0) & is_missing[split.image_index]
        first = int(np.argmax(is_bad))
        name = split.image_names[split.image_index[first]]
        message = (
            f"{split.where(first)}: image {name!r} is not in {self.root}; {is_missing.sum()} of "
            f"{len(is_missing)} images are missing, in {is_bad.sum()} of {len(split)} rows"
        )
        if not skip_bad or is_bad.all():
            advice = "" if is_bad.all() else " --skip-bad skips those rows."
            raise DataError(f"{message}. Is --images DIR right?{advice}")
        progress.note(f"{message}; skipped.")
        return rows.take(np.flatnonzero(~is_bad))


def picture_name(key: str) -> str:
    """The file name, without extension, of the picture for a data key: / becomes %2F."""
    return re.sub(r"[%/\0]", lambda match: f"%{ord(match[0]):02X}", key)


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Decodes an image to RGB, upright according to its EXIF orientation.

    Raises:
        DataError: missing, unreadable, damaged, truncated, larger than Pillow's safety limit, or
            too elongated.
    """
    label = name or (str(source) if isinstance(source, Path) else "the image")
    try:
        stream = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(stream, formats=FORMATS) as image:
            # Pillow only warns up to twice its limit.
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
    # On damaged input, Pillow's decoders raise errors of many kinds.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ELOOP):
            raise DataError(f"{label}: cannot be read ({error.strerror}).") from None
        # The message of this one is only the stream's address in memory.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"{label}: damaged or not an image{reason}.") from None


def require_shape(image: Image.Image, label: str) -> None:
    """Refuses an image, decoded or not, that preprocessing would enlarge enormously.

    Raises:
        DataError: one side is more than 100 times the other, or 0.
    """
    short, long = sorted(image.size)
    if long > _MAX_ASPECT_RATIO * short:
        raise DataError(
            f"{label}: {image.width} × {image.height} pixels; expected a picture whose long side "
            f"is at most {_MAX_ASPECT_RATIO} times the short one; crop it."
        )


def in_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB, including 16-bit grey, which Pillow alone would turn white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True)
class Preparation:
    """The steps of a CLIP-like image processor, as numbers for a JSON file."""

    resize: tuple[int, ...]  # (height, width), or (shortest side,), which keeps the aspect ratio
    #: (height, width) of the centre crop; a smaller picture is padded with black.
    crop: tuple[int, int]
    mean: tuple[float, float, float]  # of red, green and blue, between 0 and 1
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC  # the filter, as Pillow numbers it

    @classmethod
    def of(cls, processor: Any) -> Preparation | None:
        """The numbers of an image processor; None if its steps are different ones."""
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
        """(height, width, 3) of an RGB image, resized and cropped, before any arithmetic.

        Pillow releases the interpreter lock meanwhile.
        """
        size = self._size(image.size)
        resized = image.resize(size, Image.Resampling(self.resample))
        return np.asarray(resized.crop(self._box(size)))

    def region(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge of the crop in an image of this width and height."""
        resized = self._size(size)
        x_scale, y_scale = size[0] / resized[0], size[1] / resized[1]
        left, top, right, bottom = self._box(resized)
        return left * x_scale, top * y_scale, right * x_scale, bottom * y_scale

    def _box(self, resized: tuple[int, int]) -> tuple[int, int, int, int]:
        height, width = self.crop
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2  # rounded as by CLIP
        return left, top, left + width, top + height

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        if len(self.resize) == 2:
            return self.resize[1], self.resize[0]
        short, long = sorted(size)
        longer = self.resize[0] * long // short
        return (self.resize[0], longer) if size[0] == short else (longer, self.resize[0])
