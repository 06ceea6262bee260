"""Captions of images, in one language or in several that are parallel.

`captions_{split}.jsonl` holds the English ones, `captions_{split}.{lang}.jsonl` those of another
language. The k-th caption of an image in one language translates its k-th in every other.
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
    """N images with their captions, in the order of first mention.

    Attributes:
        paths: the file of each language, by its code.
        images: the N names, as the files give them.
        where: `file:line` of the first mention of each image.
        texts: by language, the captions of each image; an image has as many in every language.
    """

    paths: dict[str, Path]
    images: list[str]
    where: list[str]
    texts: dict[str, list[list[str]]]

    def all_texts(self) -> Iterator[str]:
        """Every caption, language by language and image by image."""
        return (text for by_image in self.texts.values() for texts in by_image for text in texts)


def captions_path(folder: Path, split: str, lang: str) -> Path:
    """The file of a split's captions in a language.

    Raises:
        DataError: there is none.
    """
    stems = [f"captions_{split}"] if lang == ENGLISH else []
    stems.append(f"captions_{split}.{lang}")
    for name in (stem + ending for stem in stems for ending in EXTENSIONS):
        if (folder / name).is_file():
            return folder / name
    advice = (
        "" if lang == ENGLISH else f" `clseave translate --lang {lang} --field caption` makes it."
    )
    raise DataError(
        f"{folder / stems[0]}.jsonl: no such file; expected lines such as "
        f'{{"image": "1.jpg", "caption": "two dogs run"}}.{advice}'
    )


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
        UsageError: a language is no language code.
        DataError: a missing file, a bad row, or captions that are not parallel; names file and
            line.
    """
    for lang in languages:
        require_language(lang)
    paths = {lang: captions_path(folder, split, lang) for lang in languages}
    read = {lang: _read(path) for lang, path in paths.items()}
    first = read[languages[0]]
    for lang in languages[1:]:
        _require_parallel(paths[languages[0]], first, paths[lang], read[lang])
    return Captions(
        paths,
        list(first),
        [f"{paths[languages[0]]}:{captions[0][0]}" for captions in first.values()],
        {
            lang: [[text for _, text in by_image[n]] for n in first]
            for lang, by_image in read.items()
        },
    )


def _read(path: Path) -> dict[str, list[tuple[int, str]]]:
    """For each image, the line and text of its captions."""
    captions: dict[str, list[tuple[int, str]]] = {}
    for line, row, _ in read_rows(path, ("image", "caption")):
        try:
            name = require_text(row, ("image",), "the image's name")
            text = require_text(row, ("caption",), "a sentence about it")
        except BadRow as bad:
            raise DataError.at(path, line, str(bad)) from None
        captions.setdefault(name, []).append((line, text))
    if not captions:
        raise DataError(f"{path}: no captions in it.")
    return captions


def _require_parallel(
    path: Path,
    captions: dict[str, list[tuple[int, str]]],
    other_path: Path,
    others: dict[str, list[tuple[int, str]]],
) -> None:
    """Refuses two languages of which one has a caption that the other lacks.

    Raises:
        DataError: names the first such caption, by file and line.
    """
    for here, there, by_image, translated in (
        (path, other_path, captions, others),
        (other_path, path, others, captions),
    ):
        for name, of_image in by_image.items():
            count = len(translated.get(name, ()))
            if count < len(of_image):
                raise DataError.at(
                    here,
                    of_image[count][0],
                    f"caption {count + 1} of {name!r} has no counterpart in {there.name}; the k-th "
                    "caption of an image must translate its k-th in every other language.",
                )
