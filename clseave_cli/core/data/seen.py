"""The photos and pairs that a model has seen, recorded as digests in its folder.

A model has seen what it was trained on, and what chose its checkpoint. A photo is seen if its name
(without extension) or its content is; a pair is seen if one of its photos had this hypothesis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import Split, image_stem
from clseave_cli.errors import DataError, ExtraMissing, ModelError

#: Path in a model's folder; not part of the model's fingerprint.
SEEN_FILE = "training/seen.safetensors"

#: Values of `SeenRows.compare`.
UNSEEN, PHOTO_SEEN, PAIR_SEEN = 0, 1, 2

#: The first 8 bytes of BLAKE2b digests.
Digests = npt.NDArray[np.uint64]


class SeenRows(NamedTuple):
    """Digests of P photos and R pairs."""

    #: (P, 2) digests of names without extension, and of contents; 0: not read.
    photos: Digests = np.zeros((0, 2), np.uint64)
    pairs: Digests = np.zeros(0, np.uint64)  # (R,) digests of a photo's name and a hypothesis

    @classmethod
    def of(cls, split: Split, contents: npt.NDArray[np.void] | None = None) -> SeenRows:
        """The photos and pairs of a split; `contents` are digests of its photos, if they are read.

        Rows that name no photo are ignored.
        """
        photos = cls.of_photos(split.image_names, contents).photos
        return cls(photos, _pairs(split, photos[:, 0], np.flatnonzero(split.image_index >= 0)))

    @classmethod
    def of_photos(
        cls, names: Sequence[str], contents: npt.NDArray[np.void] | None = None
    ) -> SeenRows:
        """Photos without pairs; `contents` as in `of`."""
        stems = _digests(image_stem(name).encode() for name in names)
        files = np.zeros_like(stems)
        if contents is not None:
            files = contents.view(np.uint64).reshape(len(stems), -1)[:, 0]
        return cls(np.stack([stems, files], axis=1))

    @classmethod
    def union(cls, parts: Sequence[SeenRows]) -> SeenRows:
        """Everything in any of the parts."""
        photos, pairs = zip(cls(), *parts, strict=True)
        return cls(np.unique(np.concatenate(photos), axis=0), np.unique(np.concatenate(pairs)))

    @classmethod
    def read(cls, folder: Path) -> SeenRows | None:
        """The record in a model's folder; None: it has none.

        Raises:
            ModelError: the record is damaged.
        """
        path = folder / SEEN_FILE
        if not path.is_file():
            return None
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise ModelError(f"{path}: damaged ({error}); copy the model folder again.") from None

    def write(self, folder: Path) -> None:
        """Writes the record into a model's folder, which has a subfolder `training`."""
        save_file(self._asdict(), folder / SEEN_FILE)

    def compare(self, split: Split, contents: npt.NDArray[np.void]) -> npt.NDArray[np.int8]:
        """(N,) `UNSEEN`, `PHOTO_SEEN` or `PAIR_SEEN` for N rows that all have a photo.

        `contents` as in `of`.
        """
        photos = SeenRows.of_photos(split.image_names, contents)
        names, files = photos.photos.T
        # Pairs of a renamed photo are recorded under the name it was seen with.
        seen_names = {content: name for name, content in self.photos.tolist()}
        other_names = np.array([seen_names.get(file, 0) for file in files.tolist()], np.uint64)
        rows = np.flatnonzero(self.has(photos)[split.image_index])
        status = np.full(len(split), UNSEEN, np.int8)
        status[rows] = PHOTO_SEEN
        for each in (names, other_names):
            status[rows[np.isin(_pairs(split, each, rows), self.pairs)]] = PAIR_SEEN
        return status

    def has(self, others: SeenRows) -> npt.NDArray[np.bool_]:
        """(P,) whether each photo of `others`, whose contents must be read, is among these."""
        (names, files), (seen_names, seen_files) = others.photos.T, self.photos.T
        is_file = np.isin(files, seen_files) & (files > 0)
        return np.asarray(np.isin(names, seen_names) | is_file)

    def near_duplicates(
        self, photos: Sequence[Path], images: ImageFolder, most_bits: int
    ) -> npt.NDArray[np.bool_]:
        """(P,) whether photos look like seen ones in the folder `images`: rescaled, say.

        Their perceptual hashes differ in up to `most_bits` of 64 bits.

        Raises:
            ExtraMissing: imagehash is not installed.
            DataError: no seen photo is in the folder, or one is damaged.
        """
        paths = images.paths()
        names = _digests(image_stem(path.name).encode() for path in paths)
        rows = np.flatnonzero(np.isin(names, self.photos[:, 0]))
        if not len(rows):
            raise DataError(
                f"{images.root}: has none of the photos that the models saw in training, so "
                "--near-duplicates cannot compare with them; choose their folder with --images."
            )
        seen = _perceptual_hashes([paths[row] for row in rows])
        hashes = _perceptual_hashes(photos)
        return np.array([np.bitwise_count(seen ^ h).min() <= most_bits for h in hashes], dtype=bool)


def seen_before(model: str | None) -> list[SeenRows]:
    """The record of the model that training starts from, if there is one."""
    record = None if model is None else SeenRows.read(Path(model))
    return [] if record is None else [record]


def _perceptual_hashes(paths: Sequence[Path]) -> Digests:
    """(P,) hashes that differ little for similar pictures (imagehash's `phash`)."""
    try:
        from imagehash import phash
    except ImportError:
        raise ExtraMissing(
            "--near-duplicates needs imagehash; run: pip install -e '.[duplicates]'."
        ) from None
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda path: int(str(phash(open_image(path))), 16), paths)
        return np.fromiter(hashes, np.uint64, len(paths))


def _pairs(split: Split, names: Digests, rows: npt.NDArray[np.intp]) -> Digests:
    photos = [name.tobytes() for name in names]
    return _digests(
        photos[split.image_index[row]] + split.hypotheses[row].encode() for row in rows.tolist()
    )


def _digests(items: Iterable[bytes]) -> Digests:
    packed = b"".join(hashlib.blake2b(item, digest_size=8).digest() for item in items)
    return np.frombuffer(packed, np.uint64)
