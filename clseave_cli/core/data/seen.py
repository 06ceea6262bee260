"""The photos and pairs that a model has seen, as digests in its folder, so that a test notices.

Seen is what a model was trained on, and what chose its checkpoint. A photo is seen if its name
(without extension) or its content is; a pair is a seen photo with a hypothesis that stood beside
it, in whatever file.
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

#: Where in a model's folder; it does not count in the model's fingerprint.
SEEN_FILE = "training/seen.safetensors"

#: What `SeenRows.compare` says of a row.
UNSEEN, PHOTO_SEEN, PAIR_SEEN = 0, 1, 2

#: The first 8 bytes of BLAKE2b digests.
Digests = npt.NDArray[np.uint64]


class SeenRows(NamedTuple):
    """Digests of P photos and R pairs.

    Attributes:
        photos: (P, 2) of a name without extension, and of the file; 0 where that was not read.
        pairs: (R,) of a photo's name and a hypothesis.
    """

    photos: Digests = np.zeros((0, 2), np.uint64)
    pairs: Digests = np.zeros(0, np.uint64)

    @classmethod
    def of(cls, split: Split, contents: npt.NDArray[np.void] | None = None) -> SeenRows:
        """What a split shows; rows that name no photo are left out.

        Args:
            split: the rows.
            contents: digests of its photos, in its order; None: they are not read.
        """
        photos = cls.of_photos(split.image_names, contents).photos
        return cls(photos, _pairs(split, photos[:, 0], np.flatnonzero(split.image_index >= 0)))

    @classmethod
    def of_photos(
        cls, names: Sequence[str], contents: npt.NDArray[np.void] | None = None
    ) -> SeenRows:
        """Photos by themselves, with the digests of their contents if they are read."""
        stems = _digests(image_stem(name).encode() for name in names)
        read = np.zeros_like(stems)
        if contents is not None:
            read = contents.view(np.uint64).reshape(len(stems), -1)[:, 0]
        return cls(np.stack([stems, read], axis=1))

    @classmethod
    def union(cls, parts: Sequence[SeenRows]) -> SeenRows:
        """What any of them has seen."""
        photos = np.unique(np.concatenate([cls().photos, *(part.photos for part in parts)]), axis=0)
        return cls(photos, np.unique(np.concatenate([cls().pairs, *(p.pairs for p in parts)])))

    @classmethod
    def read(cls, folder: Path) -> SeenRows | None:
        """What the model in a folder has seen; None: its folder has no record.

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
        """Writes the record into a model's folder, which has a folder `training`."""
        save_file(self._asdict(), folder / SEEN_FILE)

    def compare(self, split: Split, contents: npt.NDArray[np.void]) -> npt.NDArray[np.int8]:
        """(N,) `UNSEEN`, `PHOTO_SEEN` or `PAIR_SEEN`, for N rows that all have a photo.

        Args:
            split: the rows.
            contents: as in `of`.
        """
        photos = SeenRows.of_photos(split.image_names, contents)
        names, read = photos.photos.T
        # A photo under another name: pairs are kept by the name it was seen with.
        seen_as = {content: name for name, content in self.photos.tolist()}
        other_names = np.array([seen_as.get(content, 0) for content in read.tolist()], np.uint64)
        rows = np.flatnonzero(self.has(photos)[split.image_index])
        status = np.full(len(split), UNSEEN, np.int8)
        status[rows] = PHOTO_SEEN
        for name in (names, other_names):
            status[rows[np.isin(_pairs(split, name, rows), self.pairs)]] = PAIR_SEEN
        return status

    def has(self, others: SeenRows) -> npt.NDArray[np.bool_]:
        """(P,) which of the other's photos, whose contents are read, are among these."""
        by_name, by_content = (
            np.isin(column, recorded)
            for column, recorded in zip(others.photos.T, self.photos.T, strict=True)
        )
        return by_name | (by_content & (others.photos[:, 1] > 0))

    def near_duplicates(
        self, photos: Sequence[Path], images: ImageFolder, most_bits: int
    ) -> npt.NDArray[np.bool_]:
        """(P,) whether photos look like one that was seen: scaled, say, or saved again.

        Args:
            photos: P files.
            images: where photos that were seen are found, by their names.
            most_bits: by how many of 64 bits two perceptual hashes may differ.

        Raises:
            ExtraMissing: imagehash is not installed.
            DataError: no photo that was seen is there, or one is damaged.
        """
        there = images.paths()
        names = _digests(image_stem(path.name).encode() for path in there)
        rows = np.flatnonzero(np.isin(names, self.photos[:, 0]))
        if not len(rows):
            raise DataError(
                f"{images.root}: none of the photos that the models saw in training is there, so "
                "--near-duplicates has nothing to compare with; name their folder with --images."
            )
        seen = _perceptual_hashes([there[row] for row in rows])
        hashes = _perceptual_hashes(photos)
        return np.array([np.bitwise_count(seen ^ h).min() <= most_bits for h in hashes], dtype=bool)


def seen_before(model: str | None) -> list[SeenRows]:
    """What a model of our own had seen that a training starts from; nothing where none is named."""
    record = None if model is None else SeenRows.read(Path(model))
    return [] if record is None else [record]


def _perceptual_hashes(paths: Sequence[Path]) -> Digests:
    """(P,) hashes that are alike where pictures are (imagehash's `phash`)."""
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
