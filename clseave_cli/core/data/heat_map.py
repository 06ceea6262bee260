"""Where a model looked at a photo, as a picture."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from clseave_cli.core.data.images import Preparation
from clseave_cli.core.files import atomic_file
from clseave_cli.errors import UsageError

#: Of the colours, the rest is the photo in grey.
_OPACITY = 0.6
#: From the least to the most attention; between them the colours are mixed.
_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_SCALE_HEIGHT, _TEXT_SIZE, _MARGIN = 12, 13, 6
#: What a file written here says of itself.
_SOFTWARE = "clseave"


def heat_map(
    photo: Image.Image,
    attention: npt.NDArray[np.float32],
    preparation: Preparation | None,
    longest_side: int = 480,
) -> Image.Image:
    """A photo in grey, coloured by where the model looked, above the scale of the colours.

    Args:
        photo: in RGB.
        attention: (G, G) shares of the cells, from the top left, that add up to 1.
        preparation: how the photo was cut for the model; None: the cells cover all of it.
        longest_side: of the photo as it is drawn, in pixels.
    """
    shrink = longest_side / max(photo.size)
    width, height = (max(1, round(shrink * side)) for side in photo.size)
    region = (0.0, 0.0, *photo.size) if preparation is None else preparation.region(photo.size)
    left, top, right, bottom = (round(shrink * edge) for edge in region)
    grey = photo.resize((width, height), Image.Resampling.BICUBIC).convert("L").convert("RGB")
    coloured, most = grey.copy(), float(attention.max())
    cells = Image.fromarray(_colours(attention / most))
    cells = cells.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.NEAREST)
    coloured.paste(cells, (left, top))
    even = f"share of attention (even: {100 / attention.size:.1f} %)"
    line = _SCALE_HEIGHT + _TEXT_SIZE + 3 * _MARGIN
    canvas = Image.new("RGB", (longest_side, height + line), "white")
    canvas.paste(Image.blend(grey, coloured, _OPACITY))
    scale = Image.fromarray(_colours(np.linspace(0, 1, canvas.width)[None]))
    scale = scale.resize((canvas.width, _SCALE_HEIGHT))
    white = Image.new("RGB", scale.size, "white")  # as if it lay over a pale photo
    canvas.paste(Image.blend(white, scale, _OPACITY), (0, height + _MARGIN))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT_SIZE)
    words = ("0 %", even, f"{100 * most:.1f} %")
    for place, anchor, text in zip((0, 0.5, 1), ("ls", "ms", "rs"), words, strict=True):
        at = (place * canvas.width, canvas.height - _MARGIN)
        pen.text(at, text, "black", font, anchor)
    return canvas


def _colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """(…, 3) colours of (…) values from 0 to 1."""
    steps = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(values, steps, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def png_uri(picture: Image.Image) -> str:
    """A picture inside its own address, so that a page needs no other file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def require_writable(target: Path) -> None:
    """Refuses a target of `write_png` that is not named as one, or is a file of something else.

    Raises:
        UsageError: says what is wrong with it.
    """
    if target.suffix.lower() != ".png":
        raise UsageError(f"{target}: expected a name that ends in .png.")
    if target.exists() and made_by(target) != _SOFTWARE:
        raise UsageError(f"{target}: is there already, and clseave did not write it.")


def made_by(path: Path) -> str | None:
    """What a PNG says it was made by; None where it says nothing, or is none."""
    try:
        with Image.open(path, formats=("PNG",)) as there:
            return there.info.get("Software")
    except Exception:  # whatever Pillow raises: it is not ours
        return None


def write_png(picture: Image.Image, target: Path, software: str = _SOFTWARE) -> None:
    """Writes a picture that says what it was made by, in place of an older one.

    Raises:
        ClseaveError: it cannot be written.
    """
    said = PngInfo()
    said.add_text("Software", software)
    with atomic_file(target) as stream:
        picture.save(stream, "PNG", pnginfo=said)
