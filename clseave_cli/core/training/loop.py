"""The training loop of every stage.

The loop knows no model. A stage gives it a module, a loss and a dev evaluation; the loop takes care
of batches, schedule, precision, early stopping, records, interruption and resumption.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clseave_cli.core.config import Schedule, TrainingConfig
from clseave_cli.core.files import write_json, writing
from clseave_cli.core.training import checkpoint
from clseave_cli.core.training.capture import Captured, CudaRecorder
from clseave_cli.core.training.device import autocast, deterministic, page_locked
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.sampling import epochs_to_95
from clseave_cli.core.training.tracking import tracker
from clseave_cli.errors import Interrupted, TrainingError
from clseave_cli.processes import ahead
from clseave_cli.progress import SILENT, Progress

_RECORDS_PER_EPOCH = 20  # in metrics.jsonl, plus one with dev metrics
_BATCHES_AHEAD = 3  # prepared while a step runs

Rows = npt.NDArray[np.intp]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Selection:
    """The dev metric that selects the checkpoint and stops the run early."""

    metric: str
    best: Literal["lowest", "highest"]

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value improves on another; None: there is none yet."""
        return than is None or (value < than if self.best == "lowest" else value > than)


@dataclass(frozen=True)
class Stage:
    """A training stage as the loop sees it."""

    name: str  # for records, such as `align`
    module: nn.Module  # with `requires_grad` where it is trained; ends with the selected weights
    num_examples: int  # N; examples are numbered 0 to N − 1
    #: Makes a batch from example numbers and nothing else, on the CPU, in another thread. The loop
    #: moves it to the device: a tensor, or dataclasses and tuples of tensors.
    prepare: Callable[[Rows], Any]
    #: The mean loss of a prepared batch, a differentiable scalar; with `metrics`, (1 + metrics,),
    #: their means after the loss. Every process returns that of the whole batch.
    loss: Callable[[Any], Tensor]
    evaluate: Callable[[], dict[str, float]]  # dev metrics; called in eval mode without gradients
    selection: Selection
    title: str = ""  # for progress and messages, such as `align de`; empty: the name
    #: The batches of an epoch, given its number and the previous dev metrics (empty before the
    #: first), as many as `batches` returns; None: `batches`.
    sample: Callable[[int, dict[str, float]], list[Rows]] | None = None
    #: Receives the last dev metrics on resumption, for an `evaluate` that compares epochs.
    resumed: Callable[[dict[str, float]], object] | None = None
    metrics: tuple[str, ...] = ()  # names of further training metrics, averaged like the loss
    #: Parameters that are trained while the others are frozen and have no optimiser state.
    trained_first: tuple[nn.Parameter, ...] = ()
    freeze_epochs: float = 0.0  # how long, from the start
    #: Learning-rate multipliers of submodules.
    rate_factors: dict[nn.Module, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.title or self.name


@dataclass(frozen=True)
class TrainingResult:
    """The contents of `summary.json`."""

    pairs: int  # examples trained on, repetitions included
    steps: int  # optimiser steps
    epochs: int  # completed
    wall_seconds: float  # in the loop, dev evaluation included
    pairs_per_second: float  # over the time spent in training steps
    peak_memory_bytes: int  # of the process, or of the GPU if one is used
    best_epoch: int  # whose weights were kept, counted from 1
    dev: dict[str, float]  # dev metrics of that epoch
    stopped_early: bool  # because patience ran out before the last epoch
    #: By language, the first epoch with 95 % of the final dev recall (`recall_at_10`).
    epochs_to_95: dict[str, int] = field(default_factory=dict)


def batches(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> list[Rows]:
    """The batches of an epoch: all examples in random order, in sizes that differ by at most one.

    A short last batch of a single example would have no batch statistics. The order depends on seed
    and epoch alone, so a resumed run repeats it.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return np.array_split(order, math.ceil(num_examples / batch_size))


def overall(dev: dict[str, float]) -> dict[str, float]:
    """The dev metrics without those of a part, which are named `metric/part`."""
    return {name: value for name, value in dev.items() if "/" not in name}


def train(
    stage: Stage,
    config: TrainingConfig,
    *,
    device: torch.device,
    folder: Path,
    progress: Progress = SILENT,
) -> TrainingResult:
    """Trains a stage, from a saved state if `config.resume` finds one.

    Writes `metrics.jsonl`, `summary.json` and, during training, `state-*` into `folder`.

    Raises:
        TrainingError: the loss, a weight, or the selecting dev metric is not finite.
        Interrupted: by Ctrl-C or SIGTERM, after saving the state.
        ClseaveError: the disk is full; the last good state is kept.
    """
    return _Loop(stage, config, device, folder, progress).run()


@dataclass(frozen=True)
class _Part:
    """A prepared part of a batch."""

    share: float  # of the batch
    is_first: bool
    examples: Any  # from the stage's `prepare`
    learning_rate: Tensor | None = None  # () float64; only the last part, which ends the step


@dataclass(eq=False)
class _Loop:
    stage: Stage
    config: TrainingConfig
    device: torch.device
    folder: Path
    progress: Progress

    def __post_init__(self) -> None:
        stage, config, device = self.stage, self.config, self.device
        self.processes = processes()
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, stage.rate_factors, config, device)
        self.autocast = autocast(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast.precision == "fp16")
        self.trainee = checkpoint.Trainee(stage.module, self.optimizer, self.scaler, device)
        self.train_part = self._capturing()
        self.steps_per_epoch = math.ceil(stage.num_examples / config.batch_size)
        self.last_epoch = min(config.epochs, config.stop_epoch or config.epochs)
        # The schedule spans all epochs, wherever the run stops.
        planned_steps = self.steps_per_epoch * config.epochs
        warmup_steps = round(config.warmup_fraction * planned_steps)
        self.rate_factor = partial(
            learning_rate_factor, total=planned_steps, warmup=warmup_steps, schedule=config.schedule
        )
        self.total_steps = self.steps_per_epoch * self.last_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        trained_first = {id(parameter) for parameter in stage.trained_first}
        self.freeze_steps = (
            round(stage.freeze_epochs * self.steps_per_epoch) if trained_first else 0
        )
        self.frozen_at_first = [p for p in self.parameters if id(p) not in trained_first]
        self.record_every = max(1, self.steps_per_epoch // _RECORDS_PER_EPOCH)
        self.state = checkpoint.LoopState()
        self.selected_weights: dict[str, Tensor] | None = None
        # Float64 sums on the device are exact enough, and only reading them waits for it.
        self.sums = torch.zeros(1 + len(stage.metrics), dtype=torch.float64, device=device)
        self.step_seconds, self.pairs_stepped = 0.0, 0
        self.started = self.saved_at = time.monotonic()
        self.metrics_path = self.folder / "metrics.jsonl"

    def run(self) -> TrainingResult:
        torch.manual_seed(self.config.seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config.resume:
            self._resume()
        self.processes.once(self._truncate_metrics)
        try:
            stopped_early = self._train()
        finally:
            # Graphs hold GPU memory and, in a reference cycle, this loop.
            self.optimizer.zero_grad(set_to_none=True)
            del self.train_part
        assert self.selected_weights is not None
        checkpoint.restore(self.stage.module, self.selected_weights)
        self.stage.module.eval()
        return self._finish(stopped_early)

    def _train(self) -> bool:
        """Trains all epochs; returns whether it stopped early."""
        title, first_step = str(self.stage), self.state.step + 1
        with (
            deterministic(self.device) as self.allow_nondeterminism,
            tracker(self.config, title, self.folder, first_step, self.progress) as self.show,
            _stop_signals() as stop_requested,
        ):
            if self.allow_nondeterminism is not None and self.state.relaxed:
                self.allow_nondeterminism()
            # A state saved after the last step still lacks its dev evaluation.
            while self.state.step < self.total_steps or self.state.batch:
                self._epoch(stop_requested)
                if self._end_epoch():
                    return True
        return False

    def _epoch(self, stop_requested: Callable[[], bool]) -> None:
        """Trains the rest of the current epoch."""
        state, config, num_examples = self.state, self.config, self.stage.num_examples
        if self.stage.sample is not None:
            epoch = self.stage.sample(state.epoch, state.last_dev or {})
        else:
            epoch = batches(num_examples, config.batch_size, seed=config.seed, epoch=state.epoch)
        remaining = epoch[state.batch : state.batch + self.total_steps - state.step]
        self.stage.module.train()
        title = f"{self.stage}: epoch {state.epoch + 1}/{self.last_epoch}"
        with self.progress.task(title, num_examples, "pairs", summary=False) as task:
            task.advance(state.num_seen)
            start = time.monotonic()
            for rows, parts in self._prepared(remaining):
                learning_rate = self._step(rows, parts)
                recorded = state.step % self.record_every == 0
                metrics = self._record_step(learning_rate) if recorded else {}
                self.step_seconds += time.monotonic() - start
                self.pairs_stepped += len(rows)
                task.advance(len(rows), **metrics)
                self._save_if_due(stop_requested)
                start = time.monotonic()

    def _prepared(self, remaining: list[Rows]) -> Iterator[tuple[Rows, list[_Part]]]:
        """Yields batches and their prepared parts; another thread works a few batches ahead."""

        def prepare(rows: Rows) -> list[_Part]:
            parts = np.array_split(rows, min(self.config.accumulation, len(rows)))
            return [
                page_locked(
                    _Part(len(part) / len(rows), number == 0, self.stage.prepare(part)), self.device
                )
                for number, part in enumerate(parts)
            ]

        with ThreadPoolExecutor(max_workers=1) as worker:
            yield from zip(
                remaining, ahead(worker, prepare, remaining, _BATCHES_AHEAD), strict=True
            )

    def _step(self, rows: Rows, parts: list[_Part]) -> float:
        """Takes one optimiser step on a batch; returns its learning rate."""
        learning_rate = self.config.learning_rate * self.rate_factor(self.state.step)
        if self.state.step == self.freeze_steps > 0:
            # The steps captured so far do not train the frozen parameters.
            self.train_part = self._capturing()
        rate = page_locked(torch.tensor(learning_rate, dtype=torch.float64), self.device)
        try:
            with self._frozen():
                for part in [*parts[:-1], replace(parts[-1], learning_rate=rate)]:
                    self.sums += self.train_part(part) * len(rows)
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"{self.stage}: batches of {self.config.batch_size} do not fit into the memory of "
                f"{self.device}; lower --batch-size, or raise --accumulation (now "
                f"{self.config.accumulation}) to compute a batch in parts."
            ) from None
        self.state.step += 1
        self.state.batch += 1
        self.state.num_seen += len(rows)
        self.state.pairs += len(rows)
        return learning_rate

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Freezes the parameters that are not trained at this step."""
        frozen = self.frozen_at_first if self.state.step < self.freeze_steps else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:  # so that saved states hold these weights, too
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _deterministically(self, compute: Callable[[], Result]) -> Result:
        """Calls a function with deterministic algorithms, or with others if it has none."""
        try:
            return compute()
        except RuntimeError as error:
            if (
                self.allow_nondeterminism is None
                or self.state.relaxed
                or "deterministic" not in str(error)
            ):
                raise
        self.allow_nondeterminism()
        self.state.relaxed = True
        self._note(
            f"an operation of this model has no deterministic algorithm on {self.device}; a "
            "resumed run ends in the same weights up to rounding."
        )
        return compute()

    def _train_part(self, part: _Part) -> Tensor:
        """Accumulates a part's gradient; after the last part, updates the weights.

        Returns:
            The part's share of the batch's mean loss and metrics.
        """
        means = self._deterministically(lambda: self._gradient(part))
        if part.learning_rate is not None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                updated = [parameter for parameter in self.parameters if parameter.grad is not None]
                if not all(parameter in self.optimizer.state for parameter in updated):
                    # Every replay would create its optimiser state again.
                    raise RuntimeError("a part of the model has no gradient in some batches")
            self.processes.average_gradients(self.parameters)
            self._update(part.learning_rate)
        return means

    def _gradient(self, part: _Part) -> Tensor:
        if part.is_first:
            # The graphs of several parts share one gradient, which must stay at its address.
            keeps_gradient = self.device.type == "cuda" and self.config.accumulation > 1
            self.optimizer.zero_grad(set_to_none=not keeps_gradient)
        with self.autocast():
            means = self.stage.loss(part.examples).reshape(-1)
        self.scaler.scale(means[0] * part.share).backward()  # type: ignore[no-untyped-call]
        return means.detach().double() * part.share

    def _update(self, learning_rate: Tensor) -> None:
        """Takes the optimiser's step with the accumulated gradients."""
        for group in self.optimizer.param_groups:
            # On a GPU it is a tensor, so that a captured step reads its current value.
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(learning_rate * group["factor"])
            else:
                group["lr"] = learning_rate.item() * group["factor"]
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _capturing(self) -> Captured[_Part]:
        """`_train_part`, to be captured anew."""
        return Captured(self._train_part, self.device, self._recorder(), self._note)

    def _recorder(self) -> CudaRecorder | None:
        """The recorder of CUDA graphs; None if steps cannot be captured."""
        if self.device.type != "cuda":
            return None
        if self.scaler.is_enabled():
            self._note("fp16 steps are not captured as CUDA graphs: the loss scale depends on "
                       "earlier gradients; bf16 steps are.")  # fmt: skip
            return None
        if self.processes.count > 1:
            self._note("steps of several processes are not captured as CUDA graphs.")
            return None
        return CudaRecorder(self.device)

    def _note(self, message: str) -> None:
        self.progress.note(f"{self.stage}: {message}")

    def _means(self) -> dict[str, float]:
        """The mean loss and metrics of this epoch so far."""
        means = (self.sums / self.state.num_seen).tolist()
        self._require_finite("the loss", means[0])
        return dict(zip(("loss", *self.stage.metrics), means, strict=True))

    def _require_finite_weights(self) -> None:
        # The loss comes from the weights before the step. The largest weight stands for all.
        largest = nn.utils.get_total_norm(self.parameters, norm_type=math.inf)
        self._require_finite("a weight", largest.item())

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.stage}: {name} is not finite at step {self.state.step}; lower "
                "--learning-rate, or use --precision fp32."
            )

    def _record_step(self, learning_rate: float) -> dict[str, float]:
        means, rate = self._means(), self._pairs_per_second()
        self._record({**means, "learning_rate": learning_rate, "pairs_per_second": rate})
        return {"loss": means["loss"], "pairs/s": round(rate)}

    def _pairs_per_second(self) -> float:
        return self.pairs_stepped / max(self.step_seconds, 1e-9)

    def _record(self, metrics: dict[str, Any]) -> None:
        if self.processes.rank > 0:
            return
        position = {"stage": self.stage.name, "step": self.state.step}
        entry = position | {"epoch": self.state.epoch + 1} | metrics
        with writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.show(entry)

    def _end_epoch(self) -> bool:
        """Evaluates and keeps the weights if they are selected; returns whether to stop early."""
        means = self._means()
        self._require_finite_weights()
        self.stage.module.eval()
        with torch.no_grad(), self.autocast():
            dev = self.processes.agree(self._deterministically(self.stage.evaluate))
        metric = self.stage.selection.metric
        value = dev[metric]
        self._require_finite(f"the dev metric {metric}", value)
        state = self.state
        state.last_dev = dev
        state.epochs_without_gain += 1
        is_better = self.stage.selection.better(value, state.best)
        if is_better:
            state.best, state.epochs_without_gain = value, 0
        if is_better or self.config.keep == "last":
            state.best_epoch, state.dev = state.epoch + 1, dev
            self.selected_weights = checkpoint.snapshot(self.stage.module)
        self._record({**means, "dev": dev})
        # Fits into 80 columns; metrics.jsonl has every dev metric.
        self._note(
            f"epoch {state.epoch + 1}/{self.last_epoch}: "
            f"loss {means['loss']:.4f} · dev {metric} {value:.4g} · "
            f"{self._pairs_per_second():.0f} pairs/s"
        )
        state.epoch += 1
        state.batch = state.num_seen = 0
        self.sums.zero_()
        patience = self.config.patience
        if patience is None or state.epochs_without_gain < patience:
            return False
        if state.step >= self.total_steps:
            return False
        self._note(
            f"stopped early: no better dev {metric} for {patience} epochs; "
            f"epoch {state.best_epoch} is kept."
        )
        return True

    def _save_if_due(self, stop_requested: Callable[[], bool]) -> None:
        minutes = (time.monotonic() - self.saved_at) / 60
        stopping, due = self.processes.any(
            stop_requested(), minutes >= self.config.checkpoint_minutes
        )
        if not (stopping or due):
            return
        # Never save a state that cannot be resumed.
        self._means()
        self._require_finite_weights()
        self.processes.once(self._save)
        self.saved_at = time.monotonic()
        if stopping:
            raise Interrupted(
                f"{self.stage}: stopped at step {self.state.step}, state saved in "
                f"{self.folder}; the same command with --resume continues from there."
            )

    def _save(self) -> None:
        self.state.sums = self.sums.tolist()
        self.state.seconds = time.monotonic() - self.started
        with writing(self.metrics_path), self.metrics_path.open("ab") as stream:
            # The state refers to these records, so they must reach the disk first.
            os.fsync(stream.fileno())
            self.state.metrics_bytes = stream.tell()
        checkpoint.save_state(self.folder, self.state, self.trainee, self.selected_weights)

    def _resume(self) -> None:
        loaded = checkpoint.load_state(self.folder, self.trainee)
        if loaded is None:
            self._note("no saved state to resume; starting afresh.")
            return
        self.state, self.selected_weights = loaded
        self.sums.copy_(torch.tensor(self.state.sums, dtype=torch.float64))
        self.started -= self.state.seconds
        if self.stage.resumed is not None and self.state.last_dev is not None:
            self.stage.resumed(self.state.last_dev)
        self._note(f"resuming at step {self.state.step}.")

    def _truncate_metrics(self) -> None:
        """Removes records written after the state that is resumed, and a partial one."""
        with writing(self.metrics_path), self.metrics_path.open("a+b") as stream:
            stream.seek(0)
            records = stream.read(self.state.metrics_bytes)
            stream.truncate(records.rfind(b"\n") + 1)

    def _finish(self, stopped_early: bool) -> TrainingResult:
        result = TrainingResult(
            pairs=self.state.pairs,
            steps=self.state.step,
            epochs=self.state.epoch,
            wall_seconds=time.monotonic() - self.started,
            pairs_per_second=self._pairs_per_second(),
            peak_memory_bytes=_peak_memory_bytes(self.device),
            best_epoch=self.state.best_epoch,
            dev=self.state.dev or {},
            stopped_early=stopped_early,
            epochs_to_95=self.processes.once(self._epochs_to_95),
        )
        self.processes.once(lambda: write_json(self.folder / "summary.json", asdict(result)))
        return result

    def _epochs_to_95(self) -> dict[str, int]:
        records = map(json.loads, self.metrics_path.read_text(encoding="utf-8").splitlines())
        return epochs_to_95([record["dev"] for record in records if "dev" in record])


def _optimizer(
    parameters: list[nn.Parameter],
    rate_factors: dict[nn.Module, float],
    config: TrainingConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    on_gpu, rate = device.type == "cuda", config.learning_rate
    factor_of = {id(p): factor for part, factor in rate_factors.items() for p in part.parameters()}
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys((1.0, *rate_factors.values())):
        members = [p for p in parameters if factor_of.get(id(p), 1.0) == factor]
        # Weight decay applies to matrices, not to biases and normalisation gains, as in CLIP.
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            params = [p for p in members if (p.ndim > 1) == is_matrix]
            lr = torch.tensor(rate, device=device) if on_gpu else rate
            groups.append({"params": params, "weight_decay": decay, "factor": factor, "lr": lr})
    return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=on_gpu)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a request to save and stop; a second signal stops at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def request(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    earlier = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def learning_rate_factor(step: int, *, total: int, warmup: int, schedule: Schedule) -> float:
    """The learning rate of a step, counted from 0, as a share of the peak.

    It rises linearly over `warmup` steps, the first of which is above zero; then it follows the
    schedule, which reaches zero after `total` steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
