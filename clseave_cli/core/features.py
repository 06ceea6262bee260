"""Content-addressed caches: image features and teacher embeddings, computed once.

A cache is a folder of immutable shards. Each is a safetensors file of keys and vectors, named after
the digest of its bytes; one that does not match its name is damaged, so it is removed and its
vectors are computed again. Several processes may fill one cache; at worst they do the same work
twice. Shards are memory-mapped: vectors are read from the disk only when needed.

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
from torch.utils.data import DataLoader

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

#: A shard is written at this size or age, so that a crash loses little and files stay few.
_SHARD_BYTES = 128 * 2**20
_SHARD_SECONDS = 60.0
_IMAGE_BATCH = {"cuda": 256, "cpu": 64}
#: Photos in a group, which one core decodes: few, so that even a small split occupies all cores.
_DECODED_AT_ONCE = 32
#: Groups decoded ahead of the encoder: one per core, within these bounds. A group is 19 MB of
#: float32 at 224 × 224, and as much again while it is decoded.
_FEWEST_AHEAD, _MOST_AHEAD = 4, 32
#: With fewer groups per process, starting processes costs more than it saves. An estimate.
_GROUPS_A_PROCESS = 4
_SENTENCES_AT_ONCE = 65_536
_KEY_BYTES = 16
_MISSING = -1

#: (U,) records of 16 bytes.
Keys = npt.NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of U distinct items, and (N,) the item of each row of the data."""

    vectors: Vectors
    index: npt.NDArray[np.intp]

    def of_rows(self) -> Tensor:
        """(N, D) the vectors of all rows, in memory."""
        return self.vectors.rows(self.index)


@dataclass(frozen=True, eq=False)
class Sentences:
    """U distinct sentences as tokens, and (N,) the sentence of each row of the data."""

    tokens: TokenTable
    index: npt.NDArray[np.intp]


def tokenize_sentences(
    encoder: SentenceEncoder,
    sentences: Sequence[str],
    where: Callable[[int], str],
    progress: Progress = SILENT,
) -> Sentences:
    """Tokenises the sentences of N rows; notes truncated ones with `where`, a row's `file:line`."""
    texts, index = distinct(sentences)
    tokens = encoder.tokenize(texts)
    if tokens.num_truncated:
        first = int(np.argmax(tokens.truncated[index]))
        progress.note(
            f"{where(first)}: one of {tokens.num_truncated} distinct sentences that are too long "
            f"for the encoder; truncated to {encoder.max_tokens} tokens with the terminal token."
        )
    return Sentences(tokens, index)


def by_rows(
    compute: Callable[[Tensor, Tensor], Tensor],
    hypotheses: Tensor,
    photos: Features,
    rows_at_once: int,
) -> Tensor:
    """(N, …) outputs of a head for (N, D) hypotheses, with photos read from the disk in blocks.

    `compute` maps (B, D) sentence embeddings and (B, E) photos to (B, …).
    """

    def block(start: int) -> Tensor:
        rows = slice(start, start + rows_at_once)
        premises = photos.vectors.rows(photos.index[rows]).to(hypotheses.device)
        return compute(hypotheses[rows], premises)

    return torch.cat([block(start) for start in range(0, len(hypotheses), rows_at_once)])


def embed_rows(encoder: SentenceEncoder, sentences: Sentences) -> Tensor:
    """(N, D) float32 embeddings of the rows' sentences; all processes share the work."""
    tokens = sentences.tokens
    shard = processes().shard(np.arange(len(tokens)))
    embeddings = processes().gather(
        lambda: torch.cat([part.float() for part in encoder.embed(tokens, sentences=shard)]),
        len(tokens),
    )
    return embeddings[torch.from_numpy(sentences.index)]


@dataclass(frozen=True, eq=False)
class Photos:
    """The files of N named images."""

    paths: list[Path]
    where: list[str]  # `file:line` that first names each
    keys: Keys  # (N,) digests of their contents

    @classmethod
    def named(cls, names: Sequence[str], where: list[str], images: ImageFolder) -> Photos:
        """Finds images by their names in the data, and digests the files without decoding them.

        Raises:
            DataError: an image is missing; names the line.
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
        rows = first[len(first) - len(split.image_names) :]  # index -1, no image, is sorted first
        return cls.named(split.image_names, [split.where(row) for row in rows], images)

    def digest(self) -> str:
        """A digest of all contents in order."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=32).hexdigest()


def image_features(
    encoder: ImageEncoder,
    split: Split | str,
    photos: Photos,
    *,
    autocast: Autocast,
    progress: Progress = SILENT,
) -> Features:
    """The projected features of every row's image, cached.

    With patches (`ImageEncoder.patch_grid`), they are in half precision. If blocks of the tower are
    trained, they are instead the inputs of the first such block (`ImageEncoder.states`), also in
    half precision. If `split` is only a name, each photo is a row.

    Raises:
        DataError: an image is damaged; names the line.
    """
    name = split if isinstance(split, str) else split.name
    # The same picture may have two names.
    keys, path_of_key, key_of_path = np.unique(photos.keys, return_index=True, return_inverse=True)

    def decode(item: int) -> Image:
        path = photos.paths[item]
        try:
            content = path.read_bytes()
            # If the file has changed since, its vector would be cached under the old key.
            digest = hashlib.blake2b(content, digest_size=32).digest()  # as `file_digest`
            if packed_keys([digest[:_KEY_BYTES]])[0] != photos.keys[item]:
                raise DataError(f"{path}: replaced while it was being read; run the command again.")
            return open_image(content, str(path))
        except DataError as error:
            raise DataError(f"{photos.where[item]}: {error}") from None
        except OSError as error:
            raise DataError(f"{photos.where[item]}: {path}: {error.strerror}.") from None

    def pixels(items: list[int]) -> Tensor:
        # Preprocessing a group costs half as much as one by one.
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
            advice = "" if encoder.num_trained else "; --patch-grid reduces their number"
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
    index = key_of_path if isinstance(split, str) else key_of_path[split.image_index]
    return Features(vectors, index)


def _decoded(
    pixels: Callable[[list[int]], Tensor], groups: list[list[int]], device: torch.device
) -> Iterator[Tensor]:
    """`pixels` of each group of photos, in order, decoded ahead on all cores.

    For a GPU, many photos are decoded in processes: threads compete for the interpreter lock with
    each other and with the one that launches kernels. 16 cores decode 1,900 photos a second in
    threads and 3,000 in processes (docs/experiments.md, 2026-11-26).
    """

    def locked(group: list[int]) -> Tensor:
        return page_locked(pixels(group), device)

    num_workers = min(usable_cores(), _MOST_AHEAD)
    many = len(groups) > _GROUPS_A_PROCESS * num_workers
    if device.type == "cuda" and many and not multiprocessing.current_process().daemon:
        first, groups = locked(groups[0]), groups[1:]
        yield first
        # Each process may hold three results.
        if _shared_bytes() >= 3 * first.nbytes * num_workers * processes().count:
            for part in _by_processes(pixels, groups, num_workers):
                yield page_locked(part, device)
            return
    num_ahead = min(max(_FEWEST_AHEAD, usable_cores()), _MOST_AHEAD)
    with ThreadPoolExecutor(num_workers) as decoders:
        yield from ahead(decoders, locked, groups, num_ahead)


def _by_processes(
    pixels: Callable[[list[int]], Tensor], groups: list[list[int]], num_workers: int
) -> Iterator[Tensor]:
    def decode(group: list[int]) -> Tensor | Exception:
        try:
            return pixels(group)
        except Exception as error:
            return error  # if raised, the loader would rewrite its message

    loader: Iterable[Tensor | Exception] = DataLoader(
        groups,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=decode,
        num_workers=num_workers,
        multiprocessing_context="fork",
        # Outside the process group that receives Ctrl-C and SIGTERM: this process ends them.
        worker_init_fn=lambda _: os.setsid(),
        # Seeding the workers must not advance the generator used in training.
        generator=torch.Generator(),
    )
    try:
        for part in loader:
            if isinstance(part, Exception):
                raise part
            yield part
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ClseaveError(
            "a process that decodes photos was killed, perhaps for lack of memory; finished "
            "features are saved. Run the command again."
        ) from None


def _shared_bytes() -> int:
    """Free shared memory, often 64 MB in a container; 0: none, as on Windows."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def premises_now(encoder: ImageEncoder, photos: Features) -> Features:
    """Current features, in memory, of photos from `image_features`; unchanged if not trained."""
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
    """The embeddings of U distinct sentences by a frozen encoder, cached."""
    keys = packed_keys(
        hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest() for text in sentences
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
    """A folder per encoder and arithmetic: bfloat16 vectors differ from float32 ones."""
    return cache_root() / kind / f"{encoder.digest()}-{autocast.precision}"


class Vectors:
    """(U, D) vectors in memory-mapped shards; U is `count`, D is `width`."""

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
            # Unlike NumPy, torch lets other threads run while the disk is read.
            rows = torch.from_numpy(row_of[places])
            vectors[torch.from_numpy(places)] = self._shards[number][rows]
        return vectors

    def missing(self) -> npt.NDArray[np.intp]:
        """The items in no shard yet."""
        return np.flatnonzero(self._shard_of == _MISSING)

    def add(self, shard: Tensor, items: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> None:
        """Registers a memory-mapped shard that holds the items in the given rows."""
        self._shard_of[items] = len(self._shards)
        self._row_of[items] = rows
        self._shards.append(shard)


class VectorCache:
    """Vectors by content key, in one folder.

    The folder's name must identify everything that the vectors depend on, except their keys.
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
        """The vectors of U distinct keys; missing ones are computed and cached.

        Several processes (`torchrun`) share the work. Vectors computed before an error or an
        interruption are saved. `compute` yields the vectors of the given items in order, in
        batches of any size.

        Raises:
            ClseaveError: the disk is full, or written shards cannot be read back.
        """
        vectors = Vectors(len(keys), self._width, self._dtype)
        if not len(keys):
            return vectors
        order = np.argsort(keys)
        mapped: set[Path] = set()
        self._find(vectors, keys, order, mapped)
        # In the second round, each process computes what it still misses of the others' work:
        # shards that were damaged at once, or are on a disk that this process does not see.
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
                f"{self._folder}: shards just written cannot be read back; is the folder being "
                "emptied, or the disk damaged? Set CLSEAVE_CACHE to use another folder."
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
        # Vectors with their items: an interruption may come between any two lines.
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
            write()  # also after Ctrl-C or a damaged image

    def _find(
        self, vectors: Vectors, keys: Keys, order: npt.NDArray[np.intp], mapped: set[Path]
    ) -> None:
        """Maps new shards and registers what they hold; removes damaged ones."""
        for path in sorted(self._folder.glob("*.safetensors")):
            if path in mapped:
                continue
            try:
                status = path.stat()
                is_sound = _shard_digest(path, status.st_size, status.st_mtime_ns) == path.stem
                shard = load_file(path) if is_sound else {}
            except (DataError, OSError):
                continue  # another process removed it
            if not shard or shard["vectors"].shape != (len(shard["keys"]), self._width):
                path.unlink(missing_ok=True)
                continue
            mapped.add(path)
            shard_keys = _as_keys(shard["keys"].numpy())
            # The place of each key among the sorted ones; not all are requested.
            positions = np.searchsorted(keys, shard_keys, sorter=order)
            items = order[np.minimum(positions, len(keys) - 1)]
            rows = np.flatnonzero(keys[items] == shard_keys)
            if len(rows):
                vectors.add(shard["vectors"], items[rows], rows)

    def _write(self, keys: Keys, vectors: Tensor) -> None:
        key_bytes = torch.from_numpy(keys.view(np.uint8).reshape(-1, _KEY_BYTES))
        content = save({"keys": key_bytes, "vectors": vectors.contiguous()})
        name = hashlib.blake2b(content, digest_size=_KEY_BYTES).hexdigest()
        with atomic_file(self._folder / f"{name}.safetensors") as stream:
            stream.write(content)


@functools.lru_cache(maxsize=1024)
def _shard_digest(path: Path, size: int, modified_ns: int) -> str:
    """The digest of a shard, which is read once, not once a language."""
    return file_digest(path, _KEY_BYTES)


def packed_keys(digests: Iterable[bytes]) -> Keys:
    """Keys for `VectorCache.get`, from digests of 16 bytes."""
    packed = bytearray()
    for digest in digests:  # `join` would first make a list of millions, larger than the result
        packed += digest
    return _as_keys(np.frombuffer(packed, dtype=np.uint8))


def _as_keys(content: npt.NDArray[np.uint8]) -> Keys:
    return np.ascontiguousarray(content).reshape(-1).view(f"V{_KEY_BYTES}")
