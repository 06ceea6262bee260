"""Content-addressed caches: image features and teacher embeddings, computed once.

A cache is a folder of immutable shards, one per burst of new vectors. Each shard is a safetensors
file of keys and vectors, named by the digest of its own bytes: a shard that does not match its name
is damaged, is removed, and what it held is computed again. Several processes may fill one cache;
at worst they do the same work twice. Sound shards are memory-mapped: vectors take room on the disk,
not in memory, until they are asked for.

Legend: N rows · U distinct items · D width of a vector · E width of a photo's features.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import Split, distinct
from clseave_cli.core.files import atomic_file, cache_root, file_digest
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.training.device import Autocast, on_device, page_locked
from clseave_cli.core.training.distribution import processes
from clseave_cli.errors import ClseaveError, DataError
from clseave_cli.processes import ahead, usable_cores
from clseave_cli.progress import SILENT, Progress, Task

#: A shard is written when so much waits for it, or when the last one is so old: what a crash costs
#: is little, and the files are few.
_SHARD_BYTES = 128 * 2**20
_SHARD_SECONDS = 60.0
_IMAGE_BATCH = {"cuda": 256, "cpu": 64}
#: Photos that a core decodes at a time: so few that all cores have work, even for a small split.
_DECODED_AT_ONCE = 32
#: So many groups of these are decoded while others are encoded: one for each core, within these
#: bounds. One is 19 MB of float32 at 224 × 224, and as much again for its photos while in work.
_FEWEST_AHEAD, _MOST_AHEAD = 4, 32
#: With fewer groups for each, starting processes takes longer than they save. An estimate.
_GROUPS_A_PROCESS = 4
#: Sentences tokenised at a time.
_SENTENCES_AT_ONCE = 65_536
_KEY_BYTES = 16
_MISSING = -1

#: (U,) records of 16 bytes.
Keys = npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of distinct items, and which of them each row of the data uses.

    Attributes:
        vectors: of U items.
        index: (N,) item per row of the data.
    """

    vectors: Vectors
    index: npt.NDArray[np.intp]

    def of_rows(self) -> Tensor:
        """(N, D) the vectors of all rows, in memory."""
        return self.vectors.rows(self.index)


@dataclass(frozen=True, eq=False)
class Sentences:
    """The distinct sentences of some rows as tokens, and which of them each row has.

    Attributes:
        tokens: U tokenised sentences.
        index: (N,) sentence per row.
    """

    tokens: TokenTable
    index: npt.NDArray[np.intp]


def tokenize_sentences(
    encoder: SentenceEncoder,
    sentences: Sequence[str],
    where: Callable[[int], str],
    progress: Progress = SILENT,
) -> Sentences:
    """Tokenises the sentences of N rows; those that are too long are cut, counted and told.

    Args:
        encoder: the encoder to tokenise for.
        sentences: N of them, repeats included.
        where: `file:line` of a row.
        progress: told about sentences that were cut.
    """
    texts, index = distinct(sentences)
    tokens = encoder.tokenize(texts)
    if tokens.num_truncated:
        first = int(np.argmax(tokens.truncated[index]))
        progress.note(
            f"{where(first)}: too long for the encoder, as are {tokens.num_truncated} distinct "
            f"sentences in all: cut to {encoder.max_tokens} tokens, the terminal token kept."
        )
    return Sentences(tokens, index)


def by_rows(
    compute: Callable[[Tensor, Tensor], Tensor],
    hypotheses: Tensor,
    photos: Features,
    rows_at_once: int,
) -> Tensor:
    """What a head says of N rows, (N, …); their photos are read from the disk a block at a time.

    Args:
        compute: gives (B, …) for (B, D) sentence embeddings and (B, E) photos.
        hypotheses: (N, D) sentence embeddings.
        photos: of the N rows.
        rows_at_once: B.
    """

    def block(start: int) -> Tensor:
        rows = slice(start, start + rows_at_once)
        premises = photos.vectors.rows(photos.index[rows]).to(hypotheses.device)
        return compute(hypotheses[rows], premises)

    return torch.cat([block(start) for start in range(0, len(hypotheses), rows_at_once)])


def embed_rows(encoder: SentenceEncoder, sentences: Sentences) -> Tensor:
    """(N, D) float32 embeddings of the rows' sentences; several processes share the work out."""
    tokens = sentences.tokens
    shard = processes().shard(np.arange(len(tokens)))
    embeddings = processes().gather(
        lambda: torch.cat([part.float() for part in encoder.embed(tokens, sentences=shard)]),
        len(tokens),
    )
    return embeddings[torch.from_numpy(sentences.index)]


@dataclass(frozen=True, eq=False)
class Photos:
    """The files of N named images.

    Attributes:
        paths: where they are.
        where: `file:line` that first names each.
        keys: (N,) digests of their content.
    """

    paths: list[Path]
    where: list[str]
    keys: Keys

    @classmethod
    def named(cls, names: Sequence[str], where: list[str], images: ImageFolder) -> Photos:
        """Finds and reads images, and decodes none.

        Args:
            names: N names, as the data spell them.
            where: `file:line` that first names each.
            images: where to find them.

        Raises:
            DataError: an image is missing; the line that names it is in the message.
        """
        paths = [images.find(name, place) for name, place in zip(names, where, strict=True)]
        with ThreadPoolExecutor() as pool:
            digests = (bytes.fromhex(d)[:_KEY_BYTES] for d in pool.map(file_digest, paths))
            return cls(paths, where, packed_keys(digests))

    @classmethod
    def of(cls, split: Split, images: ImageFolder) -> Photos:
        """Every image that a split names, in the split's order.

        Raises:
            DataError: as `named`.
        """
        _, first = np.unique(split.image_index, return_index=True)
        # Rows without an image, if there are any, come before the others.
        rows = first[len(first) - len(split.image_names) :]
        where = [split.where(row) for row in rows]
        return cls.named(split.image_names, where, images)

    def digest(self) -> str:
        """One digest of what all of them show; their order counts."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=32).hexdigest()


def image_features(
    encoder: ImageEncoder,
    split: Split | str,
    photos: Photos,
    *,
    autocast: Autocast,
    progress: Progress = SILENT,
) -> Features:
    """The projected features of every row's image, from the cache where they are there.

    With the patches of each image (`ImageEncoder.patch_grid`) they are in half precision. Where
    blocks of the tower are trained, they are what the first of these reads (`ImageEncoder.states`),
    in half precision too.

    Args:
        encoder: the image tower, as it was loaded.
        split: N rows; or only its name, and every image is a row.
        photos: `Photos.of` the split.
        autocast: the arithmetic.
        progress: reports what is computed.

    Raises:
        DataError: an image is damaged; the line that names it is in the message.
    """
    name = split if isinstance(split, str) else split.name
    # Two names may stand for the same picture.
    keys, path_of_key, key_of_path = np.unique(photos.keys, return_index=True, return_inverse=True)

    def decode(item: int) -> Image:
        path = photos.paths[item]
        try:
            # The bytes that are decoded are those that the key stands for, or the cache would give
            # another photo's vector from now on.
            content = path.read_bytes()
            if packed_keys([_picture_key(content)])[0] != photos.keys[item]:
                raise DataError(f"{path}: replaced while it was being read; run the command again.")
            return open_image(content, str(path))
        except DataError as error:
            raise DataError(f"{photos.where[item]}: {error}") from None
        except OSError as error:
            raise DataError(f"{photos.where[item]}: {path}: {error.strerror}.") from None

    def pixels(items: list[int]) -> Tensor:
        # Preprocessed together: half the cost of one by one.
        return encoder.preprocess([decode(item) for item in items])

    grid, width = encoder.patch_grid, encoder.premise_width
    encode: Callable[[Tensor], Tensor] = encoder
    kind, dtype = (f"patches/{grid}", torch.float16) if grid else ("image", torch.float32)
    if encoder.num_trained:
        width, encode = encoder.states_width, encoder.states
        kind, dtype = f"states/{encoder.num_trained}", torch.float16
    folder = _folder(kind, encoder, autocast)

    def compute(missing: npt.NDArray[np.intp]) -> Iterator[Tensor]:
        items = path_of_key[missing].tolist()
        if dtype == torch.float16:
            length = encoder.state_width if encoder.num_trained else encoder.embedding_dim
            advice = "" if encoder.num_trained else "; --patch-grid makes them fewer"
            progress.note(
                f"{name}: {len(items):,} photos × {width // length} vectors × {length} × 2 "
                f"bytes = {len(items) * width * 2 / 1e9:.2f} GB into {folder}{advice}."
            )
        groups = [items[i : i + _DECODED_AT_ONCE] for i in range(0, len(items), _DECODED_AT_ONCE)]
        decoded = _decoded(pixels, groups, encoder.device)
        num_parts = max(1, _IMAGE_BATCH[encoder.device.type] // _DECODED_AT_ONCE)
        while parts := list(itertools.islice(decoded, num_parts)):
            batch = torch.cat([on_device(part, encoder.device) for part in parts])
            with torch.no_grad(), autocast():
                yield encode(batch).to(dtype).cpu()

    cache = VectorCache(folder, width, dtype)
    vectors = cache.get(keys, compute, f"{name}: image features", progress)
    return Features(
        vectors, key_of_path if isinstance(split, str) else key_of_path[split.image_index]
    )


def _decoded(
    pixels: Callable[[list[int]], Tensor], groups: list[list[int]], device: torch.device
) -> Iterator[Tensor]:
    """What `pixels` makes of each group of photos, in order; all cores work ahead.

    For a GPU they only decode and resize, and many photos keep processes busy: threads wait for
    each other's interpreter lock, and for that of the thread that starts kernels. 16 cores decode
    1,900 photos a second in threads and 3,000 in processes (docs/experiments.md, 2026-11-26).
    """

    def locked(group: list[int]) -> Tensor:
        return page_locked(pixels(group), device)

    num_workers = min(usable_cores(), _MOST_AHEAD)
    many = len(groups) > _GROUPS_A_PROCESS * num_workers
    if device.type == "cuda" and many and not multiprocessing.current_process().daemon:
        first, groups = locked(groups[0]), groups[1:]
        yield first
        # Each process has up to three results on the way.
        if _shared_bytes() >= 3 * first.nbytes * num_workers * processes().count:
            for part in _by_processes(_Groups(pixels, groups), num_workers):
                yield page_locked(part, device)
            return
    num_ahead = min(max(_FEWEST_AHEAD, usable_cores()), _MOST_AHEAD)
    with ThreadPoolExecutor(num_workers) as decoders:
        yield from ahead(decoders, locked, groups, num_ahead)


@dataclass(frozen=True)
class _Groups(Dataset[Tensor | Exception]):
    """Groups of photos, decoded; an error as it is, for a loader would rewrite its message."""

    pixels: Callable[[list[int]], Tensor]
    groups: list[list[int]]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> Tensor | Exception:
        try:
            return self.pixels(self.groups[number])
        except Exception as error:
            return error


def _by_processes(groups: _Groups, num_workers: int) -> Iterator[Tensor]:
    """Every group in order.

    Raises:
        ClseaveError: a process was killed.
    """
    loader = DataLoader(
        groups,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork",
        # Out of the group that Ctrl-C and SIGTERM go to: this process ends them.
        worker_init_fn=lambda _: os.setsid(),
        # Of its own: the seeds of its workers shall not move the one that trains.
        generator=torch.Generator(),
    )
    try:
        for made in loader:
            if isinstance(made, Exception):
                raise made
            yield made
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ClseaveError(
            "a process that decodes photos was killed, perhaps for want of memory; what was "
            "computed is kept. Run the command again."
        ) from None


def _shared_bytes() -> int:
    """How much memory processes can share; a container often has 64 MB. 0: none, as on Windows."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def premises_now(encoder: ImageEncoder, photos: Features) -> Features:
    """The features of photos by the tower as it is, in memory, where `photos` are states of it.

    Args:
        encoder: the image tower; one of which nothing is trained gives the photos as they are.
        photos: what `image_features` gave.
    """
    if not encoder.num_trained:
        return photos
    dtype = torch.float16 if encoder.patch_grid else torch.float32
    vectors = Vectors(len(photos.vectors), encoder.premise_width, dtype)
    size = _IMAGE_BATCH[encoder.device.type]
    for start in range(0, len(vectors), size):
        items = np.arange(start, min(start + size, len(vectors)))
        states = photos.vectors.rows(items).to(encoder.device)
        vectors.add(encoder.from_states(states).to(dtype).cpu(), items, items - start)
    return Features(vectors, photos.index)


def sentence_embeddings(
    encoder: SentenceEncoder,
    sentences: Sequence[str],
    *,
    autocast: Autocast,
    description: str,
    progress: Progress = SILENT,
) -> Vectors:
    """The embeddings of U distinct sentences by a frozen encoder, from the cache where there."""
    keys = packed_keys(
        hashlib.blake2b(sentence.encode(), digest_size=_KEY_BYTES).digest()
        for sentence in sentences
    )

    def compute(missing: npt.NDArray[np.intp]) -> Iterator[Tensor]:
        for start in range(0, len(missing), _SENTENCES_AT_ONCE):
            chunk = missing[start : start + _SENTENCES_AT_ONCE]
            tokens = encoder.tokenize([sentences[i] for i in chunk])
            with torch.no_grad(), autocast():
                for embeddings in encoder.embed(tokens):
                    yield embeddings.float().cpu()

    cache = VectorCache(_folder("text", encoder, autocast), encoder.embedding_dim)
    return cache.get(keys, compute, description, progress)


def _folder(kind: str, encoder: ImageEncoder | SentenceEncoder, autocast: Autocast) -> Path:
    """A folder per encoder and arithmetic: bfloat16 vectors are not float32 ones."""
    return cache_root() / kind / f"{encoder.digest()}-{autocast.precision}"


class Vectors:
    """(U, D) vectors that stay on disk, memory-mapped, until they are asked for.

    Args:
        count: U.
        width: D.
        dtype: of the numbers.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.width, self.dtype = width, dtype
        self._shards: list[Tensor] = []
        self._shard_of = np.full(count, _MISSING, dtype=np.int32)
        self._row_of = np.zeros(count, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._shard_of)

    def rows(self, items: npt.NDArray[np.integer[Any]]) -> Tensor:
        """(n, D) the vectors of the given items, in memory."""
        vectors = torch.empty(len(items), self.width, dtype=self.dtype)
        shard_of, row_of = self._shard_of[items], self._row_of[items]
        for number in np.unique(shard_of):
            places = np.flatnonzero(shard_of == number)
            # By torch, which lets other threads go on while the disk is read; numpy does not.
            rows = torch.from_numpy(row_of[places])
            vectors[torch.from_numpy(places)] = self._shards[number][rows]
        return vectors

    def all(self) -> Tensor:
        """(U, D) all of them, in memory."""
        return self.rows(np.arange(len(self)))

    def missing(self) -> npt.NDArray[np.intp]:
        """The items that no shard holds yet."""
        return np.flatnonzero(self._shard_of == _MISSING)

    def add(self, shard: Tensor, items: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> None:
        """Says that a mapped shard holds some items, in the given rows of it."""
        self._shard_of[items] = len(self._shards)
        self._row_of[items] = rows
        self._shards.append(shard)


class VectorCache:
    """Vectors by content key, in one folder.

    Args:
        folder: a folder per kind of vector: its name must stand for everything that decides them.
        width: D; shards of another width are damaged.
        dtype: of the numbers.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype = torch.float32) -> None:
        self._folder = folder
        self._width, self._dtype = width, dtype

    def get(
        self,
        keys: Keys,
        compute: Callable[[npt.NDArray[np.intp]], Iterator[Tensor]],
        description: str,
        progress: Progress = SILENT,
    ) -> Vectors:
        """The vectors of U distinct keys; what is not there is computed and kept.

        Several processes (`torchrun`) share the work out. An error or an interruption in between
        loses nothing of what was computed before it.

        Args:
            keys: (U,) see `packed_keys`.
            compute: yields the vectors of the given items in order, in batches of any size.
            description: what the progress bar says.
            progress: reports what is computed.

        Raises:
            ClseaveError: the disk is full, or does not keep what is written.
        """
        vectors = Vectors(len(keys), self._width, self._dtype)
        if not len(keys):
            return vectors
        order = np.argsort(keys)
        mapped: set[Path] = set()
        self._find(vectors, keys, order, mapped)
        # The second time only what another process was to compute and is not there: it was
        # damaged at once, or lies on a disk that this one does not see.
        for shard in (processes().shard, lambda items: items):
            processes().wait()
            todo = shard(vectors.missing())
            if len(todo):
                with progress.task(description, total=len(todo)) as task:
                    self._compute(keys, todo, compute, task)
            processes().wait()
            self._find(vectors, keys, order, mapped)
        if len(vectors.missing()):
            raise ClseaveError(
                f"{self._folder}: what was just written there cannot be read back; is the folder "
                "being emptied, or the disk damaged? CLSEAVE_CACHE names another."
            )
        return vectors

    def _compute(
        self,
        keys: Keys,
        todo: npt.NDArray[np.intp],
        compute: Callable[[npt.NDArray[np.intp]], Iterator[Tensor]],
        task: Task,
    ) -> None:
        done = 0
        # Vectors wait together with their items: an interruption may come between any two lines.
        waiting: list[tuple[npt.NDArray[np.intp], Tensor]] = []
        written_at = time.monotonic()

        def write() -> None:
            if waiting:
                items, vectors = zip(*waiting, strict=True)
                self._write(keys[np.concatenate(items)], torch.cat(vectors))
                waiting.clear()

        try:
            for batch in compute(todo):
                waiting.append((todo[done : done + len(batch)], batch))
                done += len(batch)
                task.advance(len(batch))
                full = sum(vectors.nbytes for _, vectors in waiting) >= _SHARD_BYTES
                if full or time.monotonic() - written_at >= _SHARD_SECONDS:
                    write()
                    written_at = time.monotonic()
        finally:
            # At the end, and at Ctrl-C or a damaged image too: what is computed stays computed.
            write()

    def _find(
        self, vectors: Vectors, keys: Keys, order: npt.NDArray[np.intp], mapped: set[Path]
    ) -> None:
        """Notes what the shards hold that are not mapped yet; removes damaged ones."""
        for path in sorted(self._folder.glob("*.safetensors")):
            if path in mapped:
                continue
            try:
                said = path.stat()
                if _shard_digest(path, said.st_size, said.st_mtime_ns) != path.stem:
                    path.unlink(missing_ok=True)
                    continue
                shard = load_file(path)
            except (DataError, OSError):
                continue  # another process removed it
            if shard["vectors"].shape != (len(shard["keys"]), self._width):
                path.unlink(missing_ok=True)
                continue
            mapped.add(path)
            shard_keys = _as_keys(shard["keys"].numpy())
            places = np.searchsorted(keys, shard_keys, sorter=order)
            places[places == len(keys)] = 0
            items = order[places]
            rows = np.flatnonzero(keys[items] == shard_keys)
            if len(rows):
                vectors.add(shard["vectors"], items[rows], rows)

    def _write(self, keys: Keys, vectors: Tensor) -> None:
        content = save(
            {
                "keys": torch.from_numpy(keys.view(np.uint8).reshape(-1, _KEY_BYTES)),
                "vectors": vectors.contiguous(),
            }
        )
        name = hashlib.blake2b(content, digest_size=_KEY_BYTES).hexdigest()
        with atomic_file(self._folder / f"{name}.safetensors") as stream:
            stream.write(content)


@functools.lru_cache(maxsize=1024)
def _shard_digest(path: Path, size: int, modified_ns: int) -> str:
    """The digest of a file's bytes: a shard is read through once, not once a language."""
    return file_digest(path, _KEY_BYTES)


def _picture_key(content: bytes) -> bytes:
    """The key of a picture, the beginning of `file_digest`."""
    return hashlib.blake2b(content, digest_size=32).digest()[:_KEY_BYTES]


def packed_keys(digests: Iterable[bytes]) -> Keys:
    """Keys of `VectorCache.get`, from digests of 16 bytes each."""
    packed = bytearray()
    for digest in digests:  # not joined: a list of millions of them would be larger than the result
        packed += digest
    return _as_keys(np.frombuffer(packed, dtype=np.uint8))


def _as_keys(content: npt.NDArray[np.uint8]) -> Keys:
    return np.ascontiguousarray(content).reshape(-1).view(f"V{_KEY_BYTES}")
