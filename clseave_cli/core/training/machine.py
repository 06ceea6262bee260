"""Examines this installation and machine: versions, devices, extras, speed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from clseave_cli.processes import thread_policy, usable_cores
from clseave_cli.version import __version__

_PACKAGES = (
    "torch", "transformers", "tokenizers", "huggingface_hub", "onnxruntime", "numpy", "pillow",
)  # fmt: skip
#: For each extra, its purpose and the modules it installs.
EXTRAS = {
    "check": ("check reads HTML and Markdown", ("lxml", "markdown_it")),
    "langid": ("--lang auto, and warnings about the language", ("lingua",)),
    "onnx": ("export, and predict without torch", ("onnx", "onnxruntime")),
    "serve": ("serve", ("fastapi", "uvicorn", "python_multipart")),
    "segment": (
        "words of Japanese, Chinese, Korean and Thai",
        ("sudachipy", "rjieba", "mecab", "pythainlp"),
    ),
    "ctranslate2": ("faster translate", ("ctranslate2",)),
    "diffusers": ("illustrate with a text-to-image model", ("diffusers",)),
    "distributed": ("training in several processes", ("accelerate",)),
    "lora": ("finetune-ve --lora", ("peft",)),
    "duplicates": ("evaluate --near-duplicates", ("imagehash",)),
    "tensorboard": ("--tracker tensorboard", ("tensorboard",)),
    "wandb": ("--tracker wandb", ("wandb",)),
    "trackio": ("--tracker trackio", ("trackio",)),
}
#: The matrix product in which an encoder of BERT's size spends most of its time, for a batch of 16
#: packed rows.
_ROWS, _WIDTH, _INNER = 2048, 768, 3072


@dataclass(frozen=True)
class Machine:
    """The result of `examine`."""

    versions: dict[str, str]  # of clseave, Python and packages; `-` for a missing one
    devices: list[str]  # that torch can use
    threads: str  # how many compute, and how they wait
    missing: dict[str, list[str]]  # modules that are not installed, by key of `EXTRAS`
    speed: dict[str, float]  # billions of operations a second, by device and precision


def examine(seconds: float = 5.0) -> Machine:
    """Examines the machine; measures its speed for some seconds, 0: not at all."""
    versions = {"clseave": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "-"
    missing = {
        name: [module for module in modules if importlib.util.find_spec(module) is None]
        for name, (_, modules) in EXTRAS.items()
    }
    devices, products = _devices()
    if not seconds:
        products = {}
    speed = {name: _rate(product, seconds / len(products)) for name, product in products.items()}
    return Machine(versions, devices, thread_policy(), missing, speed)


def _devices() -> tuple[list[str], dict[str, Callable[[], object]]]:
    """The devices, and a matrix product for each precision worth comparing."""
    cpu = f"cpu ({usable_cores()} cores)"
    try:
        import torch
    except ModuleNotFoundError:
        left, right = (np.ones(shape, np.float32) for shape in ((_ROWS, _WIDTH), (_WIDTH, _INNER)))
        return [cpu], {"cpu fp32": partial(_multiply, left, right)}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    products: dict[str, Callable[[], object]] = {}
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    for device in names[:1] or ["cpu"]:
        for name, dtype in dtypes.items():
            if device != "cpu" or name != "fp16":
                a = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=device)
                b = torch.ones(_WIDTH, _INNER, dtype=dtype, device=device)
                products[f"{device} {name}"] = partial(_multiply, a, b)
    cards = [f"{name} ({torch.cuda.get_device_name(name)})" for name in names]
    return [cpu, *cards], products


def _multiply(left: Any, right: Any) -> object:
    return (left @ right)[0, 0].item()  # reading a number waits for the GPU


def _rate(product: Callable[[], object], seconds: float) -> float:
    """Billions of operations a second, without the first product, which warms up."""
    product()
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        product()
        count += 1
    return count * 2 * _ROWS * _WIDTH * _INNER / elapsed / 1e9
