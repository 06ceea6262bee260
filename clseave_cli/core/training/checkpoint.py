"""Training states on disk: everything the next step depends on, as safetensors and JSON.

A state is a folder `state-{step}`, written aside and renamed, with a digest of each file. The rest
is derived: the order of the examples from seed, epoch and the last dev metrics, the learning rate
from the step.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clseave_cli.core.files import atomic_folder, file_digest, json_digest, read_json, write_json
from clseave_cli.errors import ModelError

STATE = re.compile(r"state-\d+")  # the name of a state's folder


@dataclass
class LoopState:
    """The loop's progress, apart from tensors. Names are keys of `state.json`."""

    step: int = 0  # optimiser steps completed
    pairs: int = 0  # examples trained on, repetitions included
    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch completed
    best: float | None = None  # the best dev metric so far
    best_epoch: int = 0  # the epoch whose weights are kept, counted from 1
    dev: dict[str, float] | None = None  # all dev metrics of that epoch
    last_dev: dict[str, float] | None = None  # those of the last completed epoch
    epochs_without_gain: int = 0  # since the best dev metric
    #: Sums of the training loss and the stage's metrics over this epoch's examples.
    sums: list[float] = field(default_factory=list)
    num_seen: int = 0  # examples of this epoch
    seconds: float = 0.0  # wall time, over all resumptions
    metrics_bytes: int = 0  # length of metrics.jsonl
    relaxed: bool = False  # whether some operation has no deterministic algorithm


class Trainee(NamedTuple):
    """What a step changes."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device  # its random state


def save_state(
    folder: Path, state: LoopState, trainee: Trainee, best: dict[str, Tensor] | None
) -> None:
    """Writes `state-{step}` into `folder`, then removes older ones.

    The random states of the CPU and of the device are saved. Between steps they are the same in
    all processes, so each resumes from them on its device.
    """
    module, optimizer, scaler, device = trainee
    target = folder / f"state-{state.step:08d}"
    with atomic_folder(target) as aside:
        save_file(snapshot(module), aside / "module.safetensors")
        save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")
        random = {"cpu": torch.random.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        save_file(random, aside / "random.safetensors")
        if best is not None:
            save_file(best, aside / "best.safetensors")
        files = {path.name: file_digest(path) for path in sorted(aside.iterdir())}
        record = {**asdict(state), "scaler": scaler.state_dict(), "files": files}
        write_json(aside / "state.json", record | {"digest": json_digest(record)})
    for path in _states(folder):
        if path != target:
            shutil.rmtree(path)


def load_state(folder: Path, trainee: Trainee) -> tuple[LoopState, dict[str, Tensor] | None] | None:
    """Restores the newest intact state into the trainee.

    Returns:
        The loop's progress and the weights kept so far; None if there is no state.

    Raises:
        ModelError: all states are damaged.
    """
    module, optimizer, scaler, device = trainee
    states = sorted(_states(folder), reverse=True)
    for path in states:
        stored = _intact_record(path)
        if stored is None:
            continue
        restore(module, load_file(path / "module.safetensors"))
        _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        # Empty if the loss was not scaled so far: `auto` may be another precision on this device.
        if scale := stored.pop("scaler"):
            scaler.load_state_dict(scale)
        best_path = path / "best.safetensors"
        best = load_file(best_path) if best_path.exists() else None
        random = load_file(path / "random.safetensors")
        torch.random.set_rng_state(random["cpu"])
        # A run may resume on another device; one from the CPU keeps the GPU's seed.
        if device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], device)
        return LoopState(**stored), best
    if states:
        raise ModelError(
            f"{states[0]}: the saved training state is damaged; delete {folder.parent} and "
            "start the run again."
        )
    return None


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies what training changes in a module, trained weights and buffers, to the CPU."""
    frozen = _frozen(module)
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in module.state_dict().items()
        if name not in frozen
    }


def restore(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads a snapshot; those of earlier versions hold frozen weights too.

    Raises:
        RuntimeError: it belongs to another module.
    """
    report = module.load_state_dict(weights, strict=False)
    if mismatch := {*report.missing_keys, *report.unexpected_keys} - _frozen(module):
        raise RuntimeError(f"the state is of another module, which differs in {min(mismatch)}")


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, weight in module.named_parameters() if not weight.requires_grad}


def _states(folder: Path) -> list[Path]:
    return [path for path in folder.glob("state-*") if STATE.fullmatch(path.name)]


def _intact_record(path: Path) -> dict[str, Any] | None:
    """The contents of `state.json`; None if it, or a file that it lists, is damaged or missing."""
    try:
        record: dict[str, Any] = read_json(path / "state.json")
        intact = record.pop("digest") == json_digest(record)
        files = record.pop("files")
        intact &= all(file_digest(path / Path(name).name) == files[name] for name in files)
    except Exception:  # whatever is wrong, the state cannot be used
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
