"""Devices: what `--device` and `--precision` mean here, and moving batches to a GPU.

A plain copy waits until the GPU has finished its queue. A copy from pinned memory joins the queue,
and the next step can be queued behind it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from clseave_cli.core.config import Precision
from clseave_cli.errors import ClseaveError, UsageError
from clseave_cli.processes import local_rank

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Batch = TypeVar("Batch")


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for; under a launcher, `auto` gives each process a GPU.

    Raises:
        UsageError: no device has this name.
        ClseaveError: this machine has no such device.
    """
    rank = local_rank()
    if name != "auto":
        resolved = name
    elif not torch.cuda.is_available():
        resolved = "cpu"
    else:
        resolved = "cuda" if rank is None else f"cuda:{rank % torch.cuda.device_count()}"
    try:
        device = torch.device(resolved)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        # cuBLAS is deterministic only with a fixed workspace; it reads this once, when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ClseaveError(
                f"--device {name}: torch sees {count} CUDA devices; use --device cpu or auto."
            )
    return device


@contextmanager
def deterministic(device: torch.device) -> Iterator[Callable[[], None] | None]:
    """Restricts a GPU to deterministic algorithms within the block.

    PyTorch raises a RuntimeError for an operation that has none. A CPU's always are.

    Yields:
        A function that lifts the restriction; None if there is none.
    """
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        yield None
        return
    settings: Any = torch.utils.deterministic  # its stub lacks the attribute
    fill_memory = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It makes reads of uninitialised memory visible, and slows every operation down.
    settings.fill_uninitialized_memory = False
    try:
        yield lambda: torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill_memory


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What `auto` stands for: bf16 if the hardware has it, else fp16 on a GPU, fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without hardware support torch emulates bfloat16, several times slower than float32.
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if has_bf16 else "fp32"


@dataclass(frozen=True)
class Autocast:
    """A factory of autocast contexts."""

    precision: Precision  # never `auto`
    device_type: str  # cpu or cuda

    def __call__(self) -> torch.autocast:
        """A new context."""
        return torch.autocast(
            self.device_type,
            dtype=_TYPES.get(self.precision, torch.bfloat16),
            enabled=self.precision in _TYPES,
        )


def autocast(precision: Precision, device: torch.device) -> Autocast:
    """The autocast contexts for `--precision` on a device."""
    return Autocast(resolve_precision(precision, device), device.type)


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
