"""Bringing prepared batches to a GPU without waiting for it.

A plain copy to a GPU first waits for all that it has been given to do. From page-locked memory the
copy only stands in line behind it, and the step after it can be queued meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def page_locked(batch: Batch, device: torch.device) -> Batch:
    """A batch in memory that a GPU can read by itself; for a CPU the batch as it is.

    Args:
        batch: a tensor, or data classes and tuples of tensors and other things.
        device: where it will go.
    """
    if device.type == "cpu":
        return batch
    with torch.cuda.device(device):  # another thread's is the first one
        return _with_tensors(batch, Tensor.pin_memory)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device that computes with it.

    Args:
        batch: as for `page_locked`, which should have been there before.
        device: where to.
    """
    if device.type == "cpu":
        return batch
    return _with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _with_tensors(value: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            field.name: _with_tensors(getattr(value, field.name), change)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple):
        items = (_with_tensors(item, change) for item in value)
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)  # type: ignore[return-value]
    return value
