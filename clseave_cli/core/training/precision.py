"""Devices and arithmetic: what `--device` and `--precision` mean on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clseave_cli.core.config import Precision
from clseave_cli.errors import ClseaveError, UsageError
from clseave_cli.processes import local_rank

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device a name means to this process: under a launcher, `auto` shares the GPUs out.

    Raises:
        UsageError: no device is called so.
        ClseaveError: there is no such device here.
    """
    rank = local_rank()
    if name != "auto":
        chosen = name
    elif not torch.cuda.is_available():
        chosen = "cpu"
    else:
        chosen = "cuda" if rank is None else f"cuda:{rank % torch.cuda.device_count()}"
    try:
        device = torch.device(chosen)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        # cuBLAS repeats itself to the bit only with a fixed workspace; it asks once, at its start.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ClseaveError(
                f"--device {name}: torch sees {count} CUDA devices here; use --device cpu or auto."
            )
    return device


@contextmanager
def deterministic(device: torch.device) -> Iterator[Callable[[], None] | None]:
    """Within the block, a GPU uses only algorithms that give the same bits every time.

    PyTorch raises a RuntimeError where it has none. A CPU's give them anyway.

    Yields:
        What allows the others again; None where nothing was forbidden.
    """
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        yield None
        return
    settings: Any = torch.utils.deterministic  # whose type does not know what it holds
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Meant to show who reads memory that nobody wrote; it costs time in every operation.
    settings.fill_uninitialized_memory = False
    try:
        yield lambda: torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = filled


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on a device: bfloat16 where the hardware multiplies it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # torch also runs bfloat16 where it must emulate it, several times slower than float32.
    capabilities = torch.cpu.get_capabilities()
    multiplies = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if multiplies else "fp32"


@dataclass(frozen=True)
class Autocast:
    """Makes the context that matrix products run in.

    Attributes:
        precision: never `auto`.
        device_type: `cpu` or `cuda`.
    """

    precision: Precision
    device_type: str

    def __call__(self) -> torch.autocast:
        """A fresh context."""
        return torch.autocast(
            self.device_type,
            dtype=_TYPES.get(self.precision, torch.bfloat16),
            enabled=self.precision in _TYPES,
        )


def autocast(precision: Precision, device: torch.device) -> Autocast:
    """What `--precision` means on a device."""
    return Autocast(resolve_precision(precision, device), device.type)
