"""`--precision` on other machines, and batches on their way to a device."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from clseave_cli.core.models.packing import PackedBatch
from clseave_cli.core.training.device import (
    autocast,
    on_device,
    page_locked,
    resolve_precision,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_takes_bf16_on_processors_that_multiply_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize(("multiplied", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_what_the_gpu_multiplies_and_not_what_it_emulates(
    monkeypatch, multiplied, expected
):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or multiplied

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_precision("auto", GPU) == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_named_precision_is_that_of_matrix_products(monkeypatch, precision, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_precision(precision, CPU) == resolve_precision(precision, GPU) == precision
    with autocast(precision, CPU)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


class _Named(NamedTuple):
    rows: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class _Nested:
    inner: _Named
    sentences: PackedBatch
    pair: tuple[Tensor, Tensor]
    missing: Tensor | None


def test_every_tensor_moves_and_the_rest_stays():
    tokens = torch.arange(4).reshape(1, 4)
    batch = _Nested(
        _Named(torch.arange(3), 3),
        PackedBatch(tokens, tokens, tokens, tokens[0], ((1, 4),)),
        (torch.ones(2), torch.zeros(2)),
        None,
    )
    moved = on_device(batch, torch.device("meta"))
    tensors = [moved.inner.rows, moved.sentences.input_ids, moved.sentences.terminals, *moved.pair]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(moved.inner, _Named) and moved.inner.count == 3
    assert moved.sentences.groups == ((1, 4),) and moved.missing is None
    assert on_device(page_locked(batch, CPU), CPU) is batch  # nothing is copied
