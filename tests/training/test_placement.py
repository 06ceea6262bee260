"""Batches on their way to a device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.training.placement import on_device, page_locked


class _Named(NamedTuple):
    rows: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class _Nested:
    inner: _Named
    sentences: PackedBatch
    pair: tuple[Tensor, Tensor]
    missing: Tensor | None


def _batch():
    tokens = torch.arange(4).reshape(1, 4)
    return _Nested(
        _Named(torch.arange(3), 3),
        PackedBatch(tokens, tokens, tokens, tokens[0], ((1, 4),)),
        (torch.ones(2), torch.zeros(2)),
        None,
    )


def test_every_tensor_moves_and_the_rest_stays():
    moved = on_device(_batch(), torch.device("meta"))
    tensors = [moved.inner.rows, moved.sentences.input_ids, moved.sentences.terminals, *moved.pair]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(moved.inner, _Named) and moved.inner.count == 3
    assert moved.sentences.groups == ((1, 4),) and moved.missing is None


def test_for_a_cpu_nothing_is_copied():
    batch = _batch()
    assert on_device(page_locked(batch, torch.device("cpu")), torch.device("cpu")) is batch
