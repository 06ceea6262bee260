"""Captions of images, in one language or in several that are parallel.

`captions_{split}.jsonl` holds the English ones, `captions_{split}.{lang}.jsonl` those of another
language. The k-th caption of an image translates its k-th caption in every other language.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clseave_cli.core.data.records import ENGLISH, is_language, require_language
from clseave_cli.core.data.rows import EXTENSIONS, BadRow, read_rows, require_text, split_name
from clseave_cli.errors import DataError


@dataclass(frozen=True, eq=False)
class Captions:
    """N images with their captions, in the order of first mention."""

    paths: dict[str, Path]  # the file of each language, by its code
    images: list[str]  # the N names, as the files give them
    where: list[str]  # `file:line` of the first mention of each image
    #: By language, the captions of each image; their number is the same in every language.
    texts: dict[str, list[list[str]]]

    def all_texts(self) -> Iterator[str]:
        """Every caption, language by language and image by image."""
        return (text for by_image in self.texts.values() for texts in by_image for text in texts)


def caption_languages(folder: Path, split: str) -> list[str]:
    """Codes of the languages that a split has captions in, English first, then by name.

    Raises:
        DataError: there are none.
    """
    codes = set()
    for path in folder.glob(f"captions_{split}.*"):
        name, ending = split_name(path)
        lang = name.removeprefix(f"captions_{split}").removeprefix(".") or ENGLISH
        if ending in EXTENSIONS and is_language(lang):
            codes.add(lang)
    if not codes:
        raise DataError(f"{folder}: no captions_{split}.jsonl; choose another --split or --data.")
    return sorted(codes, key=lambda lang: (lang != ENGLISH, lang))


def read_captions(folder: Path, split: str, languages: Sequence[str] = (ENGLISH,)) -> Captions:
    """Reads a split's captions in one or more languages.

    Raises:
        UsageError: a language is not a language code.
        DataError: a missing file, a bad row, or captions that are not parallel; names file and
            line.
    """
    for lang in languages:
        require_language(lang)
    paths = {lang: _path(folder, split, lang) for lang in languages}
    captions = {lang: _read(path) for lang, path in paths.items()}
    first = languages[0]
    for other in languages[1:]:
        _require_counterparts(captions, paths, first, other)
        _require_counterparts(captions, paths, other, first)
    images = list(captions[first])
    return Captions(
        paths,
        images,
        [f"{paths[first]}:{captions[first][name][0][0]}" for name in images],
        {
            lang: [[text for _, text in by_image[name]] for name in images]
            for lang, by_image in captions.items()
        },
    )


def _path(folder: Path, split: str, lang: str) -> Path:
    stems, advice = [f"captions_{split}.{lang}"], ""
    if lang == ENGLISH:
        stems.insert(0, f"captions_{split}")
    else:
        advice = f" `clseave translate --lang {lang} --field caption` creates it."
    paths = [folder / (stem + ending) for stem in stems for ending in EXTENSIONS]
    if existing := next((path for path in paths if path.is_file()), None):
        return existing
    raise DataError(
        f"{paths[0]}: no such file; expected lines such as "
        f'{{"image": "1.jpg", "caption": "two dogs run"}}.{advice}'
    )


#: Line and text of the captions of each image.
_ByImage = dict[str, list[tuple[int, str]]]


def _read(path: Path) -> _ByImage:
    captions: _ByImage = {}
    for line, row, _ in read_rows(path, ("image", "caption")):
        try:
            name = require_text(row, ("image",), "the image's name")
            text = require_text(row, ("caption",), "a sentence about it")
        except BadRow as bad:
            raise DataError.at(path, line, str(bad)) from None
        captions.setdefault(name, []).append((line, text))
    if not captions:
        raise DataError(f"{path}: no captions.")
    return captions


def _require_counterparts(
    captions: dict[str, _ByImage], paths: dict[str, Path], lang: str, other: str
) -> None:
    for name, texts in captions[lang].items():
        count = len(captions[other].get(name, ()))
        if count < len(texts):
            raise DataError.at(
                paths[lang],
                texts[count][0],
                f"caption {count + 1} of {name!r} has no counterpart in {paths[other].name}; the "
                "k-th caption of an image must translate its k-th in every other language.",
            )
