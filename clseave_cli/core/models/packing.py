"""Sentences as token rows: many short ones per row, or one per row in groups of similar length.

Hypotheses average a dozen tokens, so padded batches and small matrices would waste most of the
machine. Packing puts several sentences into a row, restarts positions at each and masks attention
to within a sentence, so that every embedding is the one the sentence would get alone. For an
encoder that cannot do that, sentences of similar length are computed together to save padding.

Legend: B sentences · R rows · T tokens in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clseave_cli.core.models.tokens import TokenTable

#: Segment id of the unused end of a row.
_UNUSED = -1


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sentences in R rows of T tokens; all tensors are int64."""

    input_ids: Tensor  # (R, T)
    positions: Tensor  # (R, T) counted from 0 within each sentence
    segments: Tensor  # (R, T) which of the B sentences a token belongs to; -1 unused
    terminals: Tensor  # (B,) the index of each sentence's last token in the flattened rows
    #: Consecutive rows that are computed together: how many, and how many of their T places they
    #: use; empty: all rows, all places.
    groups: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on another device."""
        tensors = (self.input_ids, self.positions, self.segments, self.terminals)
        ids, positions, segments, ends = (part.to(device, non_blocking=True) for part in tensors)
        return PackedBatch(ids, positions, segments, ends, self.groups)

    def parts(self) -> Iterator[PackedBatch]:
        """Yields each group of rows, cut to the places it uses and without terminals."""
        start = 0
        for num_rows, width in self.groups:
            places = slice(start, start + num_rows), slice(0, width)
            grids = (self.input_ids, self.positions, self.segments)
            ids, positions, segments = (grid[places] for grid in grids)
            yield PackedBatch(ids, positions, segments, self.terminals[:0])
            start += num_rows

    @property
    def starts(self) -> Tensor:
        """(B,) int64, the index of each sentence's first token in the flattened rows."""
        return self.terminals - self.positions.flatten()[self.terminals]

    def attention_mask(self, causal: bool, window: int | None = None) -> Tensor:
        """(R, 1, T, T) bool: True where a query token may attend to a key token.

        Unused tokens attend to each other, so that no row of the softmax is empty. `window` is the
        largest distance in tokens.
        """
        mask = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        if window is not None:
            mask = mask.tril(window).triu(-window)
        return mask.tril() if causal else mask

    def padding_mask(self) -> Tensor:
        """(R, T) int64: 1 on tokens, 0 on unused places, as transformers models expect it."""
        return (self.segments != _UNUSED).long()


def pack(
    tokens: TokenTable,
    sentences: npt.NDArray[np.intp],
    *,
    row_tokens: int | None,
    pad_id: int,
    call_tokens: float = math.inf,
    bucket_limit: int | None = None,
    places: int | None = None,
) -> PackedBatch:
    """Packs sentences into rows: longest first, each into the first row with room.

    Args:
        tokens: the tokenised sentences.
        sentences: (B,) the ones to pack, in the order of their embeddings.
        row_tokens: T; a longer sentence widens the rows to its length. None: one sentence per row,
            the plain padded layout, in groups of similar length.
        pad_id: token id of unused places.
        call_tokens: the padding that a further group must save.
        bucket_limit: pads packed rows to few distinct numbers and lengths, up to this length.
        places: pads the terminals to this number; those after the first B are meaningless.
    """
    lengths = tokens.lengths(sentences)
    longest = int(lengths.max())
    groups: list[tuple[int, int]] = []
    if row_tokens is None:
        width, num_rows = longest, len(sentences)
        order = np.argsort(-lengths, kind="stable")
        rows = np.empty(len(sentences), dtype=np.int64)
        rows[order] = np.arange(len(sentences))
        starts = np.zeros(len(sentences), dtype=np.int64)
        groups = _groups(lengths[order], call_tokens)
    else:
        width = max(row_tokens, longest)
        if bucket_limit is not None:
            width = min(math.ceil(width / row_tokens) * row_tokens, bucket_limit)
        rows, starts, num_rows = _first_fit(lengths, width)
        if bucket_limit is not None:
            # Sixteen sizes between any two powers of two.
            step = max(1, (1 << (num_rows.bit_length() - 1)) // 16)
            num_rows = math.ceil(num_rows / step) * step
    input_ids = np.full(num_rows * width, pad_id, dtype=np.int64)
    positions = np.zeros(num_rows * width, dtype=np.int64)
    segments = np.full(num_rows * width, _UNUSED, dtype=np.int64)
    # The index of every token of every sentence.
    first = rows * width + starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(first, lengths) + within
    input_ids[at] = tokens.ids[np.repeat(tokens.offsets[sentences], lengths) + within]
    positions[at] = within
    segments[at] = np.repeat(np.arange(len(sentences)), lengths)
    terminals = first + lengths - 1
    if places is not None:
        terminals = np.pad(terminals, (0, places - len(sentences)))
    shape = (num_rows, width)
    return PackedBatch(
        torch.from_numpy(input_ids.reshape(shape)),
        torch.from_numpy(positions.reshape(shape)),
        torch.from_numpy(segments.reshape(shape)),
        torch.from_numpy(terminals),
        tuple(groups) if len(groups) > 1 else (),
    )


def _groups(lengths: npt.NDArray[np.int64], call_tokens: float) -> list[tuple[int, int]]:
    """Number and width of rows to compute together, given their lengths, longest first.

    Rows are split in two as long as that saves more than `call_tokens` of padding.
    """
    # A cut before a row makes it and all that follow as narrow as it is.
    saved = (lengths[0] - lengths) * np.arange(len(lengths), 0, -1)
    cut = int(saved.argmax())
    if saved[cut] <= call_tokens:
        return [(len(lengths), int(lengths[0]))]
    return _groups(lengths[:cut], call_tokens) + _groups(lengths[cut:], call_tokens)


def _first_fit(
    lengths: npt.NDArray[np.int64], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """First-fit decreasing: each sentence's row and start in it, and the number of rows."""
    rows = np.empty(len(lengths), dtype=np.int64)
    starts = np.empty(len(lengths), dtype=np.int64)
    used: list[int] = []
    first_open = 0
    shortest = int(lengths.min())
    for sentence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sentence])
        row = first_open
        while row < len(used) and used[row] + length > width:
            row += 1
        if row == len(used):
            used.append(0)
        rows[sentence], starts[sentence] = row, used[row]
        used[row] += length
        while first_open < len(used) and used[first_open] + shortest > width:
            first_open += 1
    return rows, starts, len(used)
