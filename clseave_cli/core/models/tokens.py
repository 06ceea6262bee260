"""Sentences as token ids, each ending in the terminal token that its embedding is read at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from clseave_cli.errors import DataError, ModelError


# Its name and fields are part of cache keys (`SentenceEncoder.states_digest`).
@dataclass(frozen=True)
class Filling:
    """Padding that is part of the sentence, because the encoder attends to it.

    SigLIP was trained on texts padded to the limit, without a mask.
    """

    token_id: int
    side: Literal["left", "right"]

    def __call__(self, ids: list[int], num_tokens: int) -> list[int]:
        """The ids, padded to `num_tokens`."""
        padding = [self.token_id] * (num_tokens - len(ids))
        return padding + ids if self.side == "left" else ids + padding


@dataclass(frozen=True, eq=False)
class TokenTable:
    """N tokenised sentences, stored flat: sentence i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: npt.NDArray[np.int32]  # of all sentences, special tokens included
    offsets: npt.NDArray[np.int64]  # (N + 1,)
    truncated: npt.NDArray[np.bool_]  # (N,) whether it was longer than the encoder's limit

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def concatenate(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """The sentences of several tables, in order."""
        lengths = np.concatenate([np.diff(table.offsets) for table in tables])
        return cls(
            np.concatenate([table.ids for table in tables]),
            np.append(0, np.cumsum(lengths)),
            np.concatenate([table.truncated for table in tables]),
        )

    @property
    def num_truncated(self) -> int:
        """Number of truncated sentences."""
        return int(self.truncated.sum())

    def lengths(self, sentences: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Token counts of these sentences."""
        return self.offsets[sentences + 1] - self.offsets[sentences]


@dataclass(frozen=True, eq=False)
class Trimmed:
    """The part of an encoder's vocabulary that was kept."""

    kept: npt.NDArray[np.int64]  # (K,) ascending old ids; their indices are the new ones
    num_tokens: int  # size of the whole table of word vectors
    encoder: str  # name of the encoder that has it


def require_usable(backend: Tokenizer, source: str | Path) -> None:
    """Raises ModelError for a tokenizer that fails on some texts, as without an unknown token."""
    try:
        backend.encode_batch_fast(["a", "犬\U0010fffd"])
    except Exception as error:  # the library raises plain ones
        raise ModelError(f"{source}: cannot be loaded (tokenizer.json: {error}).") from None


def tokenize(
    backend: Tokenizer,
    sentences: Sequence[str],
    *,
    max_tokens: int,
    terminal_id: int,
    filling: Filling | None = None,
) -> TokenTable:
    """Tokenises sentences; truncated ones keep their terminal token.

    Args:
        backend: a tokenizer that appends the terminal token; its settings are changed.
        sentences: N texts. Special tokens spelled out in them are ordinary text.
        max_tokens: longest sentence, terminal token included.
        terminal_id: the token that every sentence must end in ([SEP], [EOS]).
        filling: pads each sentence to `max_tokens`.

    Raises:
        DataError: a sentence does not end in the terminal token.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    parts: list[npt.NDArray[np.int32]] = []
    lengths = np.empty(len(sentences), dtype=np.int64)
    truncated = np.zeros(len(sentences), dtype=bool)
    for start in range(0, len(sentences), 8192):
        chunk = list(sentences[start : start + 8192])
        flat: list[int] = []
        for offset, encoding in enumerate(backend.encode_batch_fast(chunk)):
            ids = encoding.ids
            if not ids or ids[-1] != terminal_id:
                raise DataError(
                    f"the tokenizer does not end {chunk[offset][:60]!r} in its terminal token "
                    f"(id {terminal_id}); a CLIP or BERT tokenizer does."
                )
            if len(ids) > max_tokens:
                ids = [*ids[: max_tokens - 1], terminal_id]
                truncated[start + offset] = True
            if filling is not None:
                ids = filling(ids, max_tokens)
            flat.extend(ids)
            lengths[start + offset] = len(ids)
        parts.append(np.array(flat, dtype=np.int32))
    ids_flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    return TokenTable(ids_flat, np.append(0, np.cumsum(lengths)), truncated)
