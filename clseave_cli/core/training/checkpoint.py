"""Training state on disk: everything the next step depends on, as safetensors and JSON.

A state is a folder `state-{step}`, written aside and renamed, with a digest per file. What is not
stored is derived: the order of the examples from seed, epoch and the dev metrics of the last one,
the learning rate from the step.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clseave_cli.core.files import atomic_folder, file_digest, json_digest, read_json, write_json
from clseave_cli.errors import ModelError

#: Name of a state's folder.
STATE = re.compile(r"state-\d+")


@dataclass
class LoopState:
    """Where the loop stands, apart from tensors.

    Attributes:
        step: optimiser steps done.
        pairs: examples trained on, repeats counted.
        epoch: epochs done.
        batch: batches of the current epoch done.
        best: the best dev metric so far.
        best_epoch: the epoch whose weights are kept, counted from 1.
        dev: all dev metrics of that epoch.
        last_dev: those of the last epoch done.
        epochs_without_gain: epochs since the best dev metric.
        sums: of the training loss and the stage's metrics over this epoch's examples.
        num_seen: examples seen this epoch.
        seconds: wall time of earlier sittings and this one.
        metrics_bytes: length of metrics.jsonl at this point.
        relaxed: whether something had no deterministic algorithm on the device.
    """

    step: int = 0
    pairs: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_epoch: int = 0
    dev: dict[str, float] | None = None
    last_dev: dict[str, float] | None = None
    epochs_without_gain: int = 0
    sums: list[float] = field(default_factory=list)
    num_seen: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    relaxed: bool = False


def save_state(
    folder: Path,
    state: LoopState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    best: dict[str, Tensor] | None,
    device: torch.device,
) -> None:
    """Writes `state-{step}` into `folder`, then removes older ones.

    Of random numbers, those of the CPU and of `device` are kept. Every process goes on from them,
    each on its own device, since between steps they are the same for all.
    """
    target = folder / f"state-{state.step:08d}"
    with atomic_folder(target) as aside:
        save_file(snapshot(module), aside / "module.safetensors")
        save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")
        save_file(_random_tensors(device), aside / "random.safetensors")
        if best is not None:
            save_file(best, aside / "best.safetensors")
        files = {path.name: file_digest(path) for path in sorted(aside.iterdir())}
        record = {**asdict(state), "scaler": scaler.state_dict(), "files": files}
        write_json(aside / "state.json", record | {"digest": json_digest(record)})
    for path in _states(folder):
        if path != target:
            shutil.rmtree(path)


def load_state(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> tuple[LoopState, dict[str, Tensor] | None] | None:
    """Restores the newest sound state into the given objects, and the random numbers of `device`.

    Returns:
        Where the loop stands and the weights kept so far; None if there is no state.

    Raises:
        ModelError: there are states, and none is sound.
    """
    states = sorted(_states(folder), reverse=True)
    for path in states:
        stored = _sound_record(path)
        if stored is None:
            continue
        restore(module, load_file(path / "module.safetensors"))
        _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        # Empty where the run scaled no loss so far: `auto` is another precision on another device.
        if scale := stored.pop("scaler"):
            scaler.load_state_dict(scale)
        best_path = path / "best.safetensors"
        best = load_file(best_path) if best_path.exists() else None
        _restore_random(load_file(path / "random.safetensors"), device)
        return LoopState(**stored), best
    if states:
        raise ModelError(
            f"{states[0]}: the saved training state is damaged; delete {folder.parent} and "
            "start the run again."
        )
    return None


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what training changes in a module, on the CPU: trained weights, and buffers."""
    frozen = _frozen(module)
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in module.state_dict().items()
        if name not in frozen
    }


def restore(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts a snapshot back; those of earlier versions hold frozen weights too.

    Raises:
        RuntimeError: it is of another module.
    """
    report = module.load_state_dict(weights, strict=False)
    if strange := {*report.missing_keys, *report.unexpected_keys} - _frozen(module):
        raise RuntimeError(f"the state is of another module, which differs in {min(strange)}")


def _frozen(module: nn.Module) -> set[str]:
    """Names of the weights that are not trained."""
    return {name for name, weight in module.named_parameters() if not weight.requires_grad}


def _states(folder: Path) -> list[Path]:
    return [path for path in folder.glob("state-*") if STATE.fullmatch(path.name)]


def _sound_record(path: Path) -> dict[str, Any] | None:
    """What a state says of itself; None if it, or a file that it lists, is damaged or missing."""
    try:
        record: dict[str, Any] = read_json(path / "state.json")
        intact = record.pop("digest") == json_digest(record)
        files = record.pop("files")
        intact &= all(file_digest(path / Path(name).name) == files[name] for name in files)
    except Exception:
        # Whatever is wrong with it, an unsound state is one we do not use.
        return None
    return record if intact else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _random_tensors(device: torch.device) -> dict[str, Tensor]:
    tensors = {"cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.random.set_rng_state(tensors["cpu"])
    # A run may go on on another device; one that was on the CPU keeps the GPU's seed.
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
