import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_world import Notes, png, write_jsonl

from clseave_cli.core.data.images import FORMATS, ImageFolder, open_image
from clseave_cli.core.data.records import read_split
from clseave_cli.errors import DataError

#: Pixels that Pillow takes.
_LIMIT = Image.MAX_IMAGE_PIXELS


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for name in ("1.jpg", "2.JPG", "3.png", "4.0.jpeg", "holiday.png", "party.2021.png"):
        Image.new("RGB", (4, 4), "red").save(root / name)
    (root / "notes.txt").write_text("not an image")
    (root / "5.jpg").mkdir()
    (root / "loop.jpg").symlink_to("loop.jpg")
    return ImageFolder(root)


@pytest.mark.parametrize("file", ["1.jpg", "2.JPG", "3.png", "4.0.jpeg", "party.2021.png"])
def test_an_image_is_found_with_or_without_extension(folder, file):
    stem = Path(file).stem
    for name in (file, stem, f"{stem}.jpg"):
        assert folder.find(name, "x:1") == folder.root / file


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "../images/1.jpg", "./1.jpg", "9", "notes.txt", "5.jpg",
     "1.jpg\0", "..", "", "loop.jpg", "holiday.2021"],
)  # fmt: skip
def test_a_name_is_looked_up_never_used_as_a_path(folder, name):
    with pytest.raises(DataError) as refusal:
        folder.find(name, "data.jsonl:7")
    assert str(refusal.value) == f"data.jsonl:7: image {name!r} is not in {folder.root}."


def test_the_folder_is_the_one_given_or_found(tmp_path):
    with pytest.raises(DataError, match=r"no image folder in it.*--images DIR"):
        ImageFolder.of(tmp_path, None)
    with pytest.raises(DataError, match="nowhere: no such image folder"):
        ImageFolder.of(tmp_path, tmp_path / "nowhere")
    (tmp_path / "flickr30k-images").mkdir()
    assert ImageFolder.of(tmp_path, None).root == tmp_path / "flickr30k-images"


def test_a_truncated_jpeg_is_refused(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    assert open_image(path).size == (64, 64)
    for length in (0, 1, 10, len(whole) // 3, len(whole) - 50):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"photo.jpg: damaged or not an image"):
            open_image(path)
        with pytest.raises(DataError, match=r"^upload 3: damaged"):
            open_image(whole[:length], "upload 3")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("<html>404</html>"), "damaged or not an image"),
        (lambda path: path.mkdir(), "damaged or not an image"),
        (lambda path: None, "no such image"),
        (lambda path: path.symlink_to(path.name), r"cannot be read \(Too many levels"),
        # Over twice Pillow's limit, and over once, where Pillow only warns.
        (lambda path: path.write_bytes(png(60_000, 60_000)), f"more pixels .* {_LIMIT}; scale"),
        (lambda path: path.write_bytes(png(10_000, 10_000)), f"more pixels .* {_LIMIT}; scale"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, make, message):
    make(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=rf"a\.jpg: {message}"):
        open_image(tmp_path / "a.jpg")


def test_an_image_stands_as_its_camera_meant_it(tmp_path):
    picture = Image.new("RGB", (20, 10), "white")
    picture.paste((255, 0, 0), (0, 0, 10, 10))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    picture.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0)
    assert upright.getpixel((5, 17)) == (255, 255, 255)


def test_16_bit_greys_keep_their_shades(tmp_path):
    shades = np.array([[0, 257, 0x7FFF, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    greys = np.asarray(open_image(tmp_path / "a.png"))
    assert greys.tolist() == [[[0] * 3, [1] * 3, [127] * 3, [255] * 3]]


def test_rows_without_their_image_are_counted_or_left_out(tmp_path, folder):
    def split(*images):
        row = {"sentence2": "x", "gold_label": "neutral"}
        rows = [row | {"pairID": str(n), "image": image} for n, image in enumerate(images)]
        write_jsonl(tmp_path / "train.jsonl", rows)
        return read_split(tmp_path, "train")

    missing = r"image '8' is not in .*; 2 of 4 images are missing, in 3 of 5 rows\. .* --skip-bad"
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {missing}"):
        folder.rows_with_image(split("1", "8", "3", "9", "8"), skip_bad=False)
    notes = Notes()
    some_missing = split("1", "8", "3", "9", "8")
    kept = folder.rows_with_image(some_missing, skip_bad=True, progress=notes)
    assert kept.pair_ids == ["0", "2"] and kept.image_names == ["1", "3"]
    assert "2 of 4 images are missing, in 3 of 5 rows; skipped." in notes.text
    assert folder.rows_with_image(kept, skip_bad=False) is kept
    with pytest.raises(DataError, match=r"2 of 2 images are missing"):
        folder.rows_with_image(split("8", "9"), skip_bad=True)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = open_image(_encoded(mode, "JPEG" if mode == "CMYK" else "PNG"), "x")
    assert image.mode == "RGB" and image.size == (5, 3)


def _encoded(mode, kind):
    stream = io.BytesIO()
    Image.new(mode, (5, 3)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_a_format_loads_no_other(kind):
    script = """
import sys
from clseave_cli.core.data.images import open_image
open_image(sys.stdin.buffer.read())
assert "PIL.TgaImagePlugin" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], input=_encoded("RGB", kind), check=True)
