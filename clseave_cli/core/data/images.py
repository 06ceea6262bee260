"""Finding and decoding images. Names from data files are looked up, never used as paths."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

from PIL import (
    Image,
    ImageOps,
    WebPImagePlugin,  # noqa: F401  the one format of ours that Pillow would load all others for
)

from clseave_cli.core.data.records import image_stem
from clseave_cli.errors import DataError

_FOLDER_NAMES = ("images", "flickr30k-images", "flickr30k_images", "Images")
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
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
            raise DataError(f"{root}: no such image folder; --images DIR says where they are.")
        self.root = root
        # One listing, then dictionary look-ups: a name such as ../../x can only be "not found".
        self._by_name: dict[str, str] = {}
        with os.scandir(root) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.lower().endswith(_EXTENSIONS) and entry.is_file():
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
            f"{data}: no image folder in it (looked for {looked}); --images DIR says where."
        )

    def find(self, name: str, where: str) -> Path:
        """The file of an image.

        Args:
            name: as a data file gives it.
            where: `file:line` that asks for it, for the message.

        Raises:
            DataError: there is no such image.
        """
        found = self._by_name.get(name) or self._by_name.get(image_stem(name))
        if found is None:
            raise DataError(f"{where}: image {name!r} is not in {self.root}.")
        return self.root / found


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Decodes an image to RGB, upright as its camera meant it.

    Raises:
        DataError: missing, damaged, truncated, larger than Pillow's safety limit, or far too long
            for its width.
    """
    label = name or (str(source) if isinstance(source, Path) else "image")
    try:
        stream = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(stream, formats=FORMATS) as image:
            # Pillow refuses an image of twice its limit and warns of one above it; we refuse both.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            require_shape(image, label)
            ImageOps.exif_transpose(image, in_place=True)  # without another copy in memory
            return image.convert("RGB")
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
        raise DataError(f"{label}: damaged or not an image ({error}).") from None


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
