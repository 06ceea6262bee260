"""Content-addressed caches: image features and teacher embeddings, computed once.

A cache is a folder of immutable shards, one per burst of new vectors. Each shard is a safetensors
file of keys and vectors, named by the digest of its own bytes: a shard that does not match its name
is damaged, is removed, and what it held is computed again. Several processes may fill one cache;
at worst they do the same work twice.

Legend: N items · D width of a vector.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image
from safetensors.torch import load, save
from torch import Tensor

from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import Split, distinct
from clseave_cli.core.files import atomic_file, file_digest
from clseave_cli.core.models.encoders import ImageEncoder, SentenceEncoder
from clseave_cli.core.models.tokens import TokenTable
from clseave_cli.core.pipeline import ahead
from clseave_cli.core.progress import SILENT, Progress
from clseave_cli.core.training.precision import Autocast
from clseave_cli.errors import DataError

#: Vectors per shard: small enough to lose little at a crash, large enough to make few files.
_SHARD_VECTORS = 65_536
_IMAGE_BATCH = 64
#: Batches of images decoded while one is encoded.
_BATCHES_AHEAD = 4
_KEY_BYTES = 16


def cache_root() -> Path:
    """Where caches live: `CLSEAVE_CACHE`, or `~/.cache/clseave`."""
    return Path(os.environ.get("CLSEAVE_CACHE") or Path.home() / ".cache" / "clseave")


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of distinct items, and which of them each row of the data uses.

    Attributes:
        vectors: (U, D) float32.
        index: (N,) row of `vectors` per row of the data.
    """

    vectors: Tensor
    index: npt.NDArray[np.int64]


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
        longest = max(range(len(sentences)), key=lambda row: len(sentences[row]))
        progress.note(
            f"{where(longest)}: too long for the encoder, as are {tokens.num_truncated} distinct "
            f"hypotheses in all: cut to {encoder.max_tokens} tokens, the terminal token kept."
        )
    return Sentences(tokens, index)


def image_features(
    encoder: ImageEncoder,
    split: Split,
    images: ImageFolder,
    *,
    autocast: Autocast,
    progress: Progress = SILENT,
) -> Features:
    """The projected features of every image a split names, from the cache where they are there.

    Raises:
        DataError: an image is missing or damaged; the line that names it is in the message.
    """
    first_row = _first_rows(split)
    paths = [
        images.find(name, split.where(row))
        for name, row in zip(split.image_names, first_row, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        keys = [digest[: 2 * _KEY_BYTES] for digest in pool.map(file_digest, paths)]

    def decode(item: int) -> Image:
        try:
            return open_image(paths[item])
        except DataError as error:
            raise DataError(f"{split.where(first_row[item])}: {error}") from None

    def pixels(items: list[int]) -> Tensor:
        # Preprocessed together: half the cost of one by one.
        return encoder.preprocess([decode(item) for item in items])

    def compute(missing: list[int]) -> Iterator[Tensor]:
        batches = [missing[i : i + _IMAGE_BATCH] for i in range(0, len(missing), _IMAGE_BATCH)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as decoders:
            for batch in ahead(decoders, pixels, batches, _BATCHES_AHEAD):
                with torch.no_grad(), autocast():
                    yield encoder(batch.to(encoder.device)).float().cpu()

    cache = VectorCache(_folder("image", encoder, autocast), encoder.embedding_dim)
    vectors = cache.get(keys, compute, f"{split.name}: image features", progress)
    return Features(vectors, split.image_index.astype(np.int64))


def sentence_embeddings(
    encoder: SentenceEncoder,
    sentences: Sequence[str],
    *,
    autocast: Autocast,
    description: str,
    progress: Progress = SILENT,
) -> Features:
    """The embeddings of sentences by a frozen encoder, each distinct sentence computed once."""
    texts, index = distinct(sentences)
    keys = [hashlib.blake2b(t.encode(), digest_size=_KEY_BYTES).hexdigest() for t in texts]

    def compute(missing: list[int]) -> Iterator[Tensor]:
        tokens = encoder.tokenize([texts[i] for i in missing])
        with torch.no_grad(), autocast():
            for embeddings in encoder.embed(tokens):
                yield embeddings.float().cpu()

    cache = VectorCache(_folder("text", encoder, autocast), encoder.embedding_dim)
    vectors = cache.get(keys, compute, description, progress)
    return Features(vectors, index)


def _folder(kind: str, encoder: ImageEncoder | SentenceEncoder, autocast: Autocast) -> Path:
    """A folder per encoder and arithmetic: bfloat16 vectors are not float32 ones."""
    return cache_root() / kind / f"{encoder.digest()}-{autocast.precision}"


class VectorCache:
    """Vectors by content key, in one folder.

    Args:
        folder: a folder per kind of vector: its name must stand for everything that decides them.
        width: D; shards of another width are damaged.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self._folder = folder
        self._width = width

    def get(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Iterator[Tensor]],
        description: str,
        progress: Progress = SILENT,
    ) -> Tensor:
        """The vectors of N keys; what is not there is computed and kept.

        Args:
            keys: distinct hex digests, 16 bytes each.
            compute: yields the vectors of the given items in order, in batches of any size.
            description: what the progress bar says.
            progress: told about what is computed.

        Returns:
            (N, D) float32.
        """
        wanted = {bytes.fromhex(key): item for item, key in enumerate(keys)}
        vectors = torch.empty(len(keys), self._width)
        missing = np.ones(len(keys), dtype=bool)
        for shard_keys, shard_vectors in self._shards():
            hits = [(wanted[k], row) for row, k in enumerate(shard_keys) if k in wanted]
            if hits:
                items, rows = np.array(hits).T
                vectors[items] = shard_vectors[rows]
                missing[items] = False
        todo = np.flatnonzero(missing).tolist()
        if todo:
            with progress.task(description, total=len(todo)) as task:
                done = kept = 0
                for batch in compute(todo):
                    vectors[todo[done : done + len(batch)]] = batch
                    done += len(batch)
                    task.advance(len(batch))
                    if done - kept >= _SHARD_VECTORS or done == len(todo):
                        self._write([keys[i] for i in todo[kept:done]], vectors[todo[kept:done]])
                        kept = done
        return vectors

    def _shards(self) -> Iterator[tuple[list[bytes], Tensor]]:
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if hashlib.blake2b(content, digest_size=_KEY_BYTES).hexdigest() != path.stem:
                path.unlink(missing_ok=True)
                continue
            shard = load(content)
            packed = shard["keys"].numpy().tobytes()
            yield (
                [packed[i : i + _KEY_BYTES] for i in range(0, len(packed), _KEY_BYTES)],
                shard["vectors"],
            )

    def _write(self, keys: list[str], vectors: Tensor) -> None:
        packed = np.frombuffer(b"".join(map(bytes.fromhex, keys)), dtype=np.uint8)
        content = save(
            {
                "keys": torch.from_numpy(packed.reshape(-1, _KEY_BYTES).copy()),
                "vectors": vectors.contiguous(),
            }
        )
        name = hashlib.blake2b(content, digest_size=_KEY_BYTES).hexdigest()
        with atomic_file(self._folder / f"{name}.safetensors") as stream:
            stream.write(content)


def _first_rows(split: Split) -> npt.NDArray[np.intp]:
    """For every image of a split, the first row that names it."""
    _, first = np.unique(split.image_index, return_index=True)
    return first[-len(split.image_names) :] if split.image_names else first[:0]
