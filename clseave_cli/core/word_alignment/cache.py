"""Links that were found before. A file per text, named by what decides it and by its own digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from clseave_cli.core.files import atomic_file, cache_root, file_digest
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.word_alignment.links import Links

_DIGEST_BYTES = 16


def cached_links(key: str, compute: Callable[[], Links]) -> Links:
    """The links kept under a key, or else computed and kept.

    A damaged file is not believed: it is computed and written anew. Of several processes the first
    one does all this, and tells the others.

    Args:
        key: stands for everything that decides them.
        compute: finds them.

    Raises:
        ClseaveError: the disk is full.
    """
    return processes().once(lambda: _find(cache_root() / "words", key, compute))


def _find(folder: Path, key: str, compute: Callable[[], Links]) -> Links:
    for path in folder.glob(f"{key}.*.safetensors"):
        if path.suffixes[0] == f".{file_digest(path, _DIGEST_BYTES)}":
            kept = load_file(path)
            return Links(kept["words"], kept["sure"], kept["offsets"])
        path.unlink(missing_ok=True)
    links = compute()
    # Its strides would be lost: safetensors keeps bytes in the order they lie in.
    words = np.ascontiguousarray(links.words)
    content = save({"words": words, "sure": links.sure, "offsets": links.offsets})
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
    with atomic_file(folder / f"{key}.{digest}.safetensors") as stream:
        stream.write(content)
    return links
