"""Sentences as token rows of fixed shape: many short ones in a row, or one a row.

Hypotheses average a dozen tokens; padded batches and small matrices waste most of the machine.
Packing lays several sentences side by side in a row, restarts positions at each, and masks
attention to within a sentence, so that every embedding is the one the sentence alone would get.

Legend: B sentences · R rows · T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.errors import DataError

#: Segment id of the unused end of a row.
_UNUSED = -1


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokenised sentences, stored flat: sentence i is `ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        ids: int32 token ids of all sentences, special tokens included.
        offsets: (N + 1,) int64.
        num_truncated: sentences that were longer than the encoder reads.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    num_truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def concatenate(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """The sentences of several tables, one after another."""
        lengths = np.concatenate([np.diff(table.offsets) for table in tables])
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(
            np.concatenate([table.ids for table in tables]),
            offsets,
            sum(table.num_truncated for table in tables),
        )

    def lengths(self, sentences: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Token counts of the given sentences."""
        return self.offsets[sentences + 1] - self.offsets[sentences]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sentences in R rows of T tokens.

    Attributes:
        input_ids: (R, T) int64.
        positions: (R, T) int64, counted from 0 within each sentence.
        segments: (R, T) int64, which sentence of its row a token belongs to; -1 unused.
        terminals: (B,) int64, where each sentence's last token stands in the flattened rows.
    """

    input_ids: Tensor
    positions: Tensor
    segments: Tensor
    terminals: Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on another device."""
        return PackedBatch(
            *(
                part.to(device, non_blocking=True)
                for part in (self.input_ids, self.positions, self.segments, self.terminals)
            )
        )

    def attention_mask(self, causal: bool) -> Tensor:
        """(R, 1, T, T) bool: True where a query token may look at a key token.

        Unused tokens look at each other, so that no row of the softmax is empty.
        """
        mask = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return mask.tril() if causal else mask


def tokenize(
    tokenizer: Any, sentences: Sequence[str], *, max_tokens: int, terminal_id: int
) -> TokenTable:
    """Tokenises sentences, keeping the terminal token of those that are too long.

    Args:
        tokenizer: a fast tokenizer of transformers that appends the terminal token.
        sentences: N texts. Special tokens spelled out in them are read as ordinary text.
        max_tokens: longest sentence the encoder reads, terminal token included.
        terminal_id: the token that every sentence must end in ([SEP], [EOS]).

    Raises:
        DataError: a sentence does not end in the terminal token.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    parts: list[npt.NDArray[np.int32]] = []
    lengths = np.empty(len(sentences), dtype=np.int64)
    num_truncated = 0
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
                num_truncated += 1
            flat.extend(ids)
            lengths[start + offset] = len(ids)
        parts.append(np.array(flat, dtype=np.int32))
    offsets = np.zeros(len(sentences) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids_flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    return TokenTable(ids_flat, offsets, num_truncated)


def pack(
    tokens: TokenTable, sentences: npt.NDArray[np.intp], *, row_tokens: int | None, pad_id: int
) -> PackedBatch:
    """Lays sentences into rows: longest first, each into the first row with room.

    Args:
        tokens: the tokenised sentences.
        sentences: (B,) which of them, in the order their embeddings shall have.
        row_tokens: T; a longer sentence widens the rows to its length. None: one sentence a row,
            the plain padded layout.
        pad_id: token id of unused places.
    """
    lengths = tokens.lengths(sentences)
    longest = int(lengths.max())
    width = longest if row_tokens is None else max(row_tokens, longest)
    if row_tokens is None:
        rows = np.arange(len(sentences))
        starts = np.zeros(len(sentences), dtype=np.int64)
        segments_of = np.zeros(len(sentences), dtype=np.int64)
        num_rows = len(sentences)
    else:
        rows, starts, segments_of, num_rows = _first_fit(lengths, width)
    input_ids = np.full(num_rows * width, pad_id, dtype=np.int64)
    positions = np.zeros(num_rows * width, dtype=np.int64)
    segments = np.full(num_rows * width, _UNUSED, dtype=np.int64)
    # Where every token of every sentence goes, computed for the whole batch at once.
    first = rows * width + starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(first, lengths) + within
    input_ids[places] = tokens.ids[np.repeat(tokens.offsets[sentences], lengths) + within]
    positions[places] = within
    segments[places] = np.repeat(segments_of, lengths)
    shape = (num_rows, width)
    return PackedBatch(
        torch.from_numpy(input_ids.reshape(shape)),
        torch.from_numpy(positions.reshape(shape)),
        torch.from_numpy(segments.reshape(shape)),
        torch.from_numpy(first + lengths - 1),
    )


def _first_fit(
    lengths: npt.NDArray[np.int64], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """First-fit decreasing: row, start within the row, and ordinal in the row of each sentence."""
    rows = np.empty(len(lengths), dtype=np.int64)
    starts = np.empty(len(lengths), dtype=np.int64)
    ordinals = np.empty(len(lengths), dtype=np.int64)
    used: list[int] = []
    count: list[int] = []
    first_open = 0
    shortest = int(lengths.min())
    for sentence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sentence])
        row = first_open
        while row < len(used) and used[row] + length > width:
            row += 1
        if row == len(used):
            used.append(0)
            count.append(0)
        rows[sentence], starts[sentence], ordinals[sentence] = row, used[row], count[row]
        used[row] += length
        count[row] += 1
        while first_open < len(used) and used[first_open] + shortest > width:
            first_open += 1
    return rows, starts, ordinals, len(used)
