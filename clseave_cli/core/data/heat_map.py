"""Heat maps of where a model looked at a photo."""

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

#: Opacity of the colours over the grey photo.
_OPACITY = 0.6
#: From least to most attention, interpolated in between.
_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_SCALE_HEIGHT, _TEXT_SIZE, _MARGIN = 12, 13, 6
#: The `Software` of PNG files written here.
_SOFTWARE = "clseave"


def heat_map(
    photo: Image.Image,
    attention: npt.NDArray[np.float32],
    preparation: Preparation | None,
    longest_side: int = 480,
) -> Image.Image:
    """A grey photo, coloured by where the model looked, with the colour scale below.

    `attention` has (G, G) shares of cells, from the top left, that add up to 1. The cells cover
    what `preparation` cropped (None: all) of the RGB photo. `longest_side` is in pixels.
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
    legend_height = _SCALE_HEIGHT + _TEXT_SIZE + 3 * _MARGIN
    canvas = Image.new("RGB", (longest_side, height + legend_height), "white")
    canvas.paste(Image.blend(grey, coloured, _OPACITY))
    scale = Image.fromarray(_colours(np.linspace(0, 1, canvas.width)[None]))
    scale = scale.resize((canvas.width, _SCALE_HEIGHT))
    white = Image.new("RGB", scale.size, "white")  # as over a pale photo
    canvas.paste(Image.blend(white, scale, _OPACITY), (0, height + _MARGIN))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT_SIZE)
    even = f"share of attention (even: {100 / attention.size:.1f} %)"
    for x, anchor, text in ((0, "ls", "0 %"), (0.5, "ms", even), (1, "rs", f"{100 * most:.1f} %")):
        pen.text((x * canvas.width, canvas.height - _MARGIN), text, "black", font, anchor)
    return canvas


def _colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """(…, 3) colours of (…) values in [0, 1]."""
    steps = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(values, steps, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def png_uri(picture: Image.Image) -> str:
    """A picture as a data URI, so that a page needs no other file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def require_writable(target: Path) -> None:
    """Refuses a target of `write_png` that is not named `.png`, or that clseave did not write.

    Raises:
        UsageError: says what is wrong.
    """
    if target.suffix.lower() != ".png":
        raise UsageError(f"{target}: expected a name that ends in .png.")
    if target.exists() and png_software(target) != _SOFTWARE:
        raise UsageError(f"{target}: already exists, and clseave did not write it.")


def png_software(path: Path) -> str | None:
    """The `Software` that a PNG file names; None if it names none or is not a PNG."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("Software")
    except Exception:  # Pillow raises many kinds for damaged files
        return None


def write_png(picture: Image.Image, target: Path, software: str = _SOFTWARE) -> None:
    """Writes or replaces a PNG file that names the software it comes from.

    Raises:
        ClseaveError: it cannot be written.
    """
    info = PngInfo()
    info.add_text("Software", software)
    with atomic_file(target) as stream:
        picture.save(stream, "PNG", pnginfo=info)
