"""Copies batches to a GPU without waiting for it.

A plain copy waits until the GPU has finished its queue. A copy from pinned memory joins the queue,
and the next step can be queued behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def page_locked(batch: Batch, device: torch.device) -> Batch:
    """Copies a batch to page-locked (pinned) memory if `device`, where it will go, is a GPU.

    A batch is a tensor, or a dataclass or tuple that may hold tensors and other values.
    """
    if device.type == "cpu":
        return batch
    with torch.cuda.device(device):  # in a new thread, the first GPU is current
        return _map_tensors(batch, Tensor.pin_memory)


def on_device(batch: Batch, device: torch.device, *, copy: bool = False) -> Batch:
    """Moves a batch, best a `page_locked` one, to a device; `copy` always makes new tensors."""
    if device.type == "cpu" and not copy:
        return batch
    return _map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True, copy=copy))


def tensors_of(batch: object) -> list[Tensor]:
    """All tensors of a batch, in the same order for every batch of one structure."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _map_tensors(batch, collect)
    return tensors


def _map_tensors(value: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _map_tensors(getattr(value, field.name), function)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        items = (_map_tensors(item, function) for item in value)
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)  # type: ignore[return-value]
    return value
