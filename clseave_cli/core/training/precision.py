"""Devices and arithmetic: what `--device` and `--precision` mean on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clseave_cli.core.config import Precision
from clseave_cli.core.launch import local_rank
from clseave_cli.errors import ClseaveError, UsageError

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device a name means to this process: under a launcher, `auto` shares the GPUs out.

    Raises:
        UsageError: no device is called so.
        ClseaveError: there is no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = local_rank()
        return torch.device("cuda" if rank is None else f"cuda:{rank % torch.cuda.device_count()}")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ClseaveError(
                f"--device {name}: torch sees {count} CUDA devices here; use --device cpu or auto."
            )
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on a device: bfloat16 where the hardware multiplies it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_multiplies_bf16() else "fp32"


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


def _cpu_multiplies_bf16() -> bool:
    # torch also runs bfloat16 where it must emulate it, several times slower than float32.
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
