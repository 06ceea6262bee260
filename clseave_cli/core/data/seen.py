"""The photos and pairs that a model has seen, as digests in its folder: so that a test notices.

Seen is what a model was trained on, and what chose its checkpoint. A photo is seen if its name
(without extension) or its content is; a pair is a seen photo with a hypothesis that stood beside
it, in whatever file.

Legend: N rows of a split · P seen photos · R seen pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clseave_cli.core.data.records import Split, image_stem
from clseave_cli.errors import ModelError

#: Where in a model's folder; it does not count in the model's fingerprint.
SEEN_FILE = "training/seen.safetensors"

#: What `SeenRows.compare` says of a row.
UNSEEN, PHOTO_SEEN, PAIR_SEEN = 0, 1, 2

#: The first 8 bytes of BLAKE2b digests.
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class SeenRows:
    """What was seen.

    Attributes:
        names: (P,) digests of the photos' names without extension.
        contents: (P,) digests of their files; 0 where only the name was at hand.
        pairs: (R,) digests of a photo's name and a hypothesis.
    """

    names: Digests
    contents: Digests
    pairs: Digests

    @classmethod
    def of(cls, split: Split, contents: npt.NDArray[np.void] | None = None) -> SeenRows:
        """What a split shows; rows that name no photo are left out.

        Args:
            split: the rows.
            contents: digests of its photos, in its order; None: the photos are not read.
        """
        names = _digests(image_stem(name).encode() for name in split.image_names)
        read = np.zeros_like(names) if contents is None else _shortened(contents)
        return cls(names, read, _pairs(split, names, np.flatnonzero(split.image_index >= 0)))

    @classmethod
    def union(cls, parts: Sequence[SeenRows]) -> SeenRows:
        """What any of them has seen."""
        nothing = np.zeros(0, np.uint64)
        photos = [np.stack([part.names, part.contents], axis=1) for part in parts]
        names, contents = np.unique(np.concatenate([nothing.reshape(0, 2), *photos]), axis=0).T
        pairs = np.unique(np.concatenate([nothing, *(part.pairs for part in parts)]))
        return cls(names, contents, pairs)

    @classmethod
    def read(cls, folder: Path) -> SeenRows | None:
        """What the model in a folder has seen; None: an earlier version did not record it.

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
        tensors = {name: np.ascontiguousarray(digests) for name, digests in vars(self).items()}
        save_file(tensors, folder / SEEN_FILE)

    def compare(self, split: Split, contents: npt.NDArray[np.void]) -> npt.NDArray[np.int8]:
        """How much of each row was seen.

        Args:
            split: N rows; all of them have a photo.
            contents: as in `of`.

        Returns:
            (N,) `UNSEEN`, `PHOTO_SEEN` or `PAIR_SEEN`.
        """
        names = _digests(image_stem(name).encode() for name in split.image_names)
        # A photo under another name: pairs are kept by the name it was seen with.
        seen_as = dict(zip(self.contents.tolist(), self.names.tolist(), strict=True))
        read = _shortened(contents).tolist()
        other_names = np.array([seen_as.get(content, 0) for content in read], np.uint64)
        is_seen = np.isin(names, self.names) | (other_names > 0)
        rows = np.flatnonzero(is_seen[split.image_index])
        status = np.full(len(split), UNSEEN, np.int8)
        status[rows] = PHOTO_SEEN
        for name in (names, other_names):
            status[rows[np.isin(_pairs(split, name, rows), self.pairs)]] = PAIR_SEEN
        return status


def _pairs(split: Split, photos: Digests, rows: npt.NDArray[np.intp]) -> Digests:
    """The digests of some rows' pairs; `photos` are the digests of the split's photos' names."""
    of_photos = [photo.tobytes() for photo in photos]
    return _digests(
        of_photos[split.image_index[row]] + split.hypotheses[row].encode() for row in rows.tolist()
    )


def _digests(items: Iterable[bytes]) -> Digests:
    packed = bytearray()
    for item in items:
        packed += hashlib.blake2b(item, digest_size=8).digest()
    return np.frombuffer(packed, "<u8").astype(np.uint64)


def _shortened(contents: npt.NDArray[np.void]) -> Digests:
    """The first 8 bytes of longer digests."""
    return contents.view("<u8").reshape(len(contents), -1)[:, 0].astype(np.uint64)
