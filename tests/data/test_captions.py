"""Captions of several languages: they meet by image and place, or are refused by file and line."""

import pytest
from tiny_world import write_jsonl

from clseave_cli.core.data.captions import read_captions
from clseave_cli.errors import DataError, UsageError

ENGLISH = [("b", "two dogs"), ("a", "a cat"), ("b", "dogs run")]
GERMAN = [("a", "eine Katze"), ("b", "zwei Hunde"), ("b", "Hunde laufen")]


def _write(path, captions):
    return write_jsonl(path, [{"image": image, "caption": text} for image, text in captions])


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path / "captions_train.jsonl", ENGLISH)
    _write(tmp_path / "captions_train.de.jsonl", GERMAN)
    return tmp_path


def test_captions_meet_by_image_and_place_whatever_the_order_of_the_files(folder):
    captions = read_captions(folder, "train", ("en", "de"))
    assert captions.images == ["b", "a"]
    assert captions.texts["en"] == [["two dogs", "dogs run"], ["a cat"]]
    assert captions.texts["de"] == [["zwei Hunde", "Hunde laufen"], ["eine Katze"]]
    english = folder / "captions_train.jsonl"
    assert captions.where == [f"{english}:1", f"{english}:2"]
    assert captions.paths == {"en": english, "de": folder / "captions_train.de.jsonl"}
    # Any language may come first, and any be left out.
    assert read_captions(folder, "train", ("de",)).images == ["a", "b"]


@pytest.mark.parametrize(
    ("german", "message"),
    [
        (GERMAN[:2], r"\.jsonl:3: caption 2 of 'b' has no counterpart in captions_train\.de"),
        (GERMAN[1:], r"\.jsonl:2: caption 1 of 'a' has no counterpart in captions_train\.de"),
        ([*GERMAN, ("a", "x")], r"\.de\.jsonl:4: caption 2 of 'a' has no counterpart"),
        ([*GERMAN, ("c", "x")], r"\.de\.jsonl:4: caption 1 of 'c' has no counterpart"),
        ([*GERMAN, ("c", " ")], r"\.de\.jsonl:4: caption is empty"),
    ],
)
def test_what_is_not_parallel_is_refused_by_file_and_line(folder, german, message):
    _write(folder / "captions_train.de.jsonl", german)
    with pytest.raises(DataError, match=r"captions_train" + message):
        read_captions(folder, "train", ("en", "de"))


def test_a_missing_language_names_the_command_that_makes_it(folder):
    message = r"ja\.jsonl: no such file.*translate --lang ja --field capt"
    with pytest.raises(DataError, match=message):
        read_captions(folder, "train", ("en", "ja"))
    with pytest.raises(UsageError, match=r"--lang \.\./x: not a language code"):
        read_captions(folder, "train", ("../x",))
