"""The training loop of every stage: a step function in, a frozen result out.

The loop knows no model. It is given a module to train, a function from example numbers to a loss,
and a function that gives dev metrics; it does batching, schedule, precision, early stopping,
records, interruption and resumption.
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
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clseave_cli.core.config import Schedule, TrainingConfig
from clseave_cli.core.files import write_json, writing
from clseave_cli.core.training.capture import Captured, CudaRecorder
from clseave_cli.core.training.checkpoint import (
    LoopState,
    load_state,
    restore,
    save_state,
    snapshot,
)
from clseave_cli.core.training.distribution import processes
from clseave_cli.core.training.placement import page_locked
from clseave_cli.core.training.precision import autocast, deterministic
from clseave_cli.core.training.sampling import epochs_to_95
from clseave_cli.core.training.tracking import tracker
from clseave_cli.errors import Interrupted, TrainingError
from clseave_cli.processes import ahead
from clseave_cli.progress import SILENT, Progress

#: Records in metrics.jsonl per epoch, the one with the dev metrics apart.
_RECORDS_PER_EPOCH = 20

#: Batches prepared ahead of the step.
_BATCHES_AHEAD = 3

Rows = npt.NDArray[np.intp]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Selection:
    """The dev metric that chooses the checkpoint and stops the run."""

    metric: str
    best: Literal["lowest", "highest"]

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value is a gain."""
        if than is None:
            return True
        return value < than if self.best == "lowest" else value > than


@dataclass(frozen=True)
class Stage:
    """What is trained, as the loop sees it.

    Attributes:
        name: goes into records, such as `align`.
        module: its parameters with `requires_grad` are trained; it is left with the kept weights.
        num_examples: N; examples are numbered 0 to N − 1.
        prepare: gathers what some examples need, on the CPU, ahead of time in another thread; it
            depends on their numbers alone. Tensors, or data classes and tuples of them: the loop
            brings them to the device.
        loss: the mean loss of prepared examples, a scalar that can be differentiated; of several
            processes, each gives that of all examples (`distribution`). Where `metrics` are named,
            their means stand behind it: (1 + metrics,).
        evaluate: dev metrics; called with the module in eval mode and gradients off.
        selection: which of them chooses the checkpoint.
        title: goes into progress and messages, such as `align de`; otherwise the name.
        sample: the batches of an epoch, from its number and the dev metrics after the one before
            (none before the first); as many as `batches` makes of `num_examples`. None: `batches`.
        resumed: given the last dev metrics when a saved state is resumed, for an `evaluate` that
            looks at the epoch before.
        metrics: what else is recorded of the training examples, averaged as the loss is.
        alone: parameters that are trained by themselves at first; the others have no gradient then,
            and no optimiser state.
        alone_epochs: for so many epochs.
        factors: parts of the module that are trained at another learning rate, and by what it is
            multiplied there.
    """

    name: str
    module: nn.Module
    num_examples: int
    prepare: Callable[[Rows], Any]
    loss: Callable[[Any], Tensor]
    evaluate: Callable[[], dict[str, float]]
    selection: Selection
    title: str = ""
    sample: Callable[[int, dict[str, float]], list[Rows]] | None = None
    resumed: Callable[[dict[str, float]], object] | None = None
    metrics: tuple[str, ...] = ()
    alone: tuple[nn.Parameter, ...] = ()
    alone_epochs: float = 0.0
    factors: dict[nn.Module, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.title or self.name


@dataclass(frozen=True)
class TrainingResult:
    """How a run went; also `summary.json`.

    Attributes:
        pairs: examples trained on, repeats counted.
        steps: optimiser steps.
        epochs: epochs done.
        wall_seconds: time in the loop, dev evaluation included.
        pairs_per_second: `pairs` over the time spent in training steps.
        peak_memory_bytes: largest memory of the process, or of the GPU where one is used.
        best_epoch: the epoch whose weights were kept, counted from 1.
        dev: its dev metrics.
        stopped_early: whether patience ran out before the last epoch.
        epochs_to_95: of several languages, the epoch in which each first had 95 % of the dev recall
            (`recall_at_10`) that it had after the last.
    """

    pairs: int
    steps: int
    epochs: int
    wall_seconds: float
    pairs_per_second: float
    peak_memory_bytes: int
    best_epoch: int
    dev: dict[str, float]
    stopped_early: bool
    epochs_to_95: dict[str, int] = field(default_factory=dict)


def batches(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> list[Rows]:
    """The batches of one epoch: all examples in random order, in parts that differ by at most one.

    Even parts instead of a short last batch: a single left-over example would have no batch
    statistics. The order depends on seed and epoch alone, so any step can be found again.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return np.array_split(order, math.ceil(num_examples / batch_size))


def overall(dev: dict[str, float]) -> dict[str, float]:
    """The dev metrics of the whole; those of a part are named `metric/part`."""
    return {name: value for name, value in dev.items() if "/" not in name}


def train(
    stage: Stage,
    config: TrainingConfig,
    *,
    device: torch.device,
    folder: Path,
    progress: Progress = SILENT,
) -> TrainingResult:
    """Trains a stage to its end, from a saved state where `config.resume` finds one.

    Writes `metrics.jsonl`, `summary.json` and, while under way, `state-*` into `folder`.

    Raises:
        TrainingError: the loss, a weight, or the dev metric that chooses is no longer finite.
        Interrupted: Ctrl-C or SIGTERM; the state was saved first.
        ClseaveError: the disk is full; the last good state is kept.
    """
    return _Loop(stage, config, device, folder, progress).run()


@dataclass(frozen=True)
class _Part:
    """Some examples of a batch, prepared.

    Attributes:
        share: how much of the batch they are.
        is_first: no part of the batch comes before.
        examples: what the stage's `prepare` made of them.
        learning_rate: () float64, of the optimiser step that follows the last part.
    """

    share: float
    is_first: bool
    examples: Any
    learning_rate: Tensor | None = None


class _Loop:
    def __init__(
        self,
        stage: Stage,
        config: TrainingConfig,
        device: torch.device,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.stage, self.config, self.device = stage, config, device
        self.folder, self.progress = folder, progress
        self.processes = processes()
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, stage.factors, config, device)
        self.autocast = autocast(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast.precision == "fp16")
        self.captured = self._captured()
        self.steps_per_epoch = math.ceil(stage.num_examples / config.batch_size)
        self.last_epoch = min(config.epochs, config.stop_epoch or config.epochs)
        # The schedule is that of all epochs, wherever the run stops.
        self.planned_steps = self.steps_per_epoch * config.epochs
        self.warmup_steps = round(config.warmup_fraction * self.planned_steps)
        self.total_steps = self.steps_per_epoch * self.last_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.alone_steps = round(stage.alone_epochs * self.steps_per_epoch) if stage.alone else 0
        alone = {id(parameter) for parameter in stage.alone}
        self.frozen_at_first = [p for p in self.parameters if id(p) not in alone]
        self.record_every = max(1, self.steps_per_epoch // _RECORDS_PER_EPOCH)
        self.state = LoopState()
        self.kept_weights: dict[str, Tensor] | None = None
        # Summed on the device in float64: exact enough, and reading it is the only wait.
        self.sums = torch.zeros(1 + len(stage.metrics), dtype=torch.float64, device=device)
        self.step_seconds = 0.0
        self.pairs_stepped = 0
        self.earlier_seconds = 0.0
        self.started = self.saved_at = time.monotonic()
        self.metrics_path = folder / "metrics.jsonl"

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
            # Graphs hold the GPU's memory and, in a circle, this run.
            self.optimizer.zero_grad(set_to_none=True)
            del self.captured
        assert self.kept_weights is not None
        restore(self.stage.module, self.kept_weights)
        self.stage.module.eval()
        return self._finish(stopped_early)

    def _train(self) -> bool:
        """All epochs; True when patience ran out."""
        stopped_early = False
        with (
            deterministic(self.device) as self.relax,
            tracker(
                self.config,
                title=str(self.stage),
                folder=self.folder,
                first_step=self.state.step + 1,
                progress=self.progress,
            ) as self.show,
            _stop_signals() as stop_requested,
        ):
            if self.relax is not None and self.state.relaxed:
                self.relax()
            # A state saved after the very last step has an epoch that is still to be ended.
            while (self.state.step < self.total_steps or self.state.batch) and not stopped_early:
                self._epoch(stop_requested)
                stopped_early = self._end_epoch()
        return stopped_early

    def _epoch(self, stop_requested: Callable[[], bool]) -> None:
        """The rest of the current epoch."""
        state = self.state
        todo = self._batches()[state.batch : state.batch + self.total_steps - state.step]
        self.stage.module.train()
        title = f"{self.stage}: epoch {state.epoch + 1}/{self.last_epoch}"
        with self.progress.task(title, self.stage.num_examples, "pairs", summary=False) as task:
            task.advance(state.num_seen)
            begin = time.monotonic()
            for rows, parts in self._prepared(todo):
                learning_rate = self._step(rows, parts)
                recorded = state.step % self.record_every == 0
                metrics = self._record_step(learning_rate) if recorded else {}
                self.step_seconds += time.monotonic() - begin
                self.pairs_stepped += len(rows)
                task.advance(len(rows), **metrics)
                self._save_if_due(stop_requested)
                begin = time.monotonic()

    def _batches(self) -> list[Rows]:
        """All batches of the current epoch."""
        state, config = self.state, self.config
        if self.stage.sample is not None:
            return self.stage.sample(state.epoch, state.last_dev or {})
        return batches(
            self.stage.num_examples, config.batch_size, seed=config.seed, epoch=state.epoch
        )

    def _prepared(self, todo: list[Rows]) -> Iterator[tuple[Rows, list[_Part]]]:
        """Batches with their parts prepared, a few ahead of the step that uses them."""

        def prepare(rows: Rows) -> list[_Part]:
            parts = np.array_split(rows, min(self.config.accumulation, len(rows)))
            return [
                page_locked(
                    _Part(len(part) / len(rows), number == 0, self.stage.prepare(part)), self.device
                )
                for number, part in enumerate(parts)
            ]

        with ThreadPoolExecutor(max_workers=1) as worker:
            yield from zip(todo, ahead(worker, prepare, todo, _BATCHES_AHEAD), strict=True)

    def _step(self, rows: Rows, parts: list[_Part]) -> float:
        """One optimiser step on a batch; returns its learning rate."""
        learning_rate = self.config.learning_rate * learning_rate_factor(
            self.state.step,
            total=self.planned_steps,
            warmup=self.warmup_steps,
            schedule=self.config.schedule,
        )
        if self.state.step == self.alone_steps > 0:
            # What was captured so far trains a part of the parameters.
            self.captured = self._captured()
        rate = page_locked(torch.tensor(learning_rate, dtype=torch.float64), self.device)
        try:
            with self._frozen():
                for part in [*parts[:-1], replace(parts[-1], learning_rate=rate)]:
                    self.sums += self.captured(part) * len(rows)
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"{self.stage}: the memory of {self.device} is too small for batches of "
                f"{self.config.batch_size}; lower --batch-size, or raise --accumulation "
                f"(now {self.config.accumulation}) to compute a batch in parts."
            ) from None
        self.state.step += 1
        self.state.batch += 1
        self.state.num_seen += len(rows)
        self.state.pairs += len(rows)
        return learning_rate

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """A backward pass without what is frozen at first, as the number of the step says."""
        frozen = self.frozen_at_first if self.state.step < self.alone_steps else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:  # states and kept weights hold all that will be trained
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _repeatable(self, compute: Callable[[], Result]) -> Result:
        """What a function computes, by deterministic algorithms unless there are none for it."""
        try:
            return compute()
        except RuntimeError as error:
            if self.relax is None or self.state.relaxed or "deterministic" not in str(error):
                raise
        self.relax()
        self.state.relaxed = True
        self.progress.note(
            f"{self.stage}: something in this model has no deterministic algorithm on "
            f"{self.device}; a run that was resumed ends in the same weights up to rounding."
        )
        return compute()

    def _work(self, part: _Part) -> Tensor:
        """Adds a part's gradient to that of the parts before; after the last, updates the weights.

        Returns:
            The part's share of the batch's mean loss, and of the stage's metrics.
        """
        means = self._repeatable(lambda: self._gradient(part))
        if part.learning_rate is not None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                updated = [parameter for parameter in self.parameters if parameter.grad is not None]
                if not all(parameter in self.optimizer.state for parameter in updated):
                    # Every replay would make its optimiser state anew.
                    raise RuntimeError("a part of the model has no gradient in some batches")
            self.processes.average_gradients(self.parameters)
            self._update(part.learning_rate)
        return means

    def _gradient(self, part: _Part) -> Tensor:
        if part.is_first:
            # The graphs of several parts share one gradient, which must stay where it is.
            stays = self.device.type == "cuda" and self.config.accumulation > 1
            self.optimizer.zero_grad(set_to_none=not stays)
        with self.autocast():
            means = self.stage.loss(part.examples).reshape(-1)
        self.scaler.scale(means[0] * part.share).backward()  # type: ignore[no-untyped-call]
        return means.detach().double() * part.share

    def _update(self, learning_rate: Tensor) -> None:
        """The optimiser's step, from the gradients that lie there."""
        for group in self.optimizer.param_groups:
            # On a GPU a tensor, whose number a captured step reads anew each time.
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(learning_rate * group["factor"])
            else:
                group["lr"] = learning_rate.item() * group["factor"]
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _captured(self) -> Captured[_Part]:
        """Steps that are captured from now on, where they can be."""
        return Captured(self._work, self.device, self._recorder(), self._note)

    def _recorder(self) -> CudaRecorder | None:
        """What captures steps, where they can be captured."""
        if self.device.type != "cuda":
            return None
        if self.scaler.is_enabled():
            self._note("fp16 steps are not captured as CUDA graphs: the loss is scaled by what "
                       "earlier gradients were; bf16 steps are.")  # fmt: skip
            return None
        if self.processes.count > 1:
            self._note("steps shared by several processes are not captured as CUDA graphs.")
            return None
        return CudaRecorder(self.device)

    def _note(self, message: str) -> None:
        self.progress.note(f"{self.stage}: {message}")

    def _means(self) -> dict[str, float]:
        """The loss and the stage's metrics, of this epoch's examples so far."""
        means = (self.sums / self.state.num_seen).tolist()
        self._require_finite("the loss", means[0])
        return dict(zip(("loss", *self.stage.metrics), means, strict=True))

    def _require_finite_weights(self) -> None:
        # The loss is that of the weights before the step. The largest one says it of all, at once.
        largest = nn.utils.get_total_norm(self.parameters, norm_type=math.inf)
        self._require_finite("a weight", largest.item())

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.stage}: {name} is not finite at step {self.state.step}; lower "
                "--learning-rate, or use --precision fp32."
            )

    def _record_step(self, learning_rate: float) -> dict[str, float]:
        metrics = {
            **self._means(),
            "learning_rate": learning_rate,
            "pairs_per_second": self.pairs_stepped / max(self.step_seconds, 1e-9),
        }
        self._record(metrics)
        return {"loss": metrics["loss"], "pairs/s": round(metrics["pairs_per_second"])}

    def _record(self, metrics: dict[str, Any]) -> None:
        if not self.processes.is_rank_0:
            return
        entry = {
            "stage": self.stage.name,
            "step": self.state.step,
            "epoch": self.state.epoch + 1,
            **metrics,
        }
        with writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.show(entry)

    def _end_epoch(self) -> bool:
        """Evaluates, keeps the weights, closes the epoch; True when patience runs out."""
        means = self._means()
        self._require_finite_weights()
        self.stage.module.eval()
        with torch.no_grad(), self.autocast():
            dev = self.processes.agree(self._repeatable(self.stage.evaluate))
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
            self.kept_weights = snapshot(self.stage.module)
        self._record({**means, "dev": dev})
        # One line of 80 columns; metrics.jsonl has every dev metric.
        self.progress.note(
            f"{self.stage}: epoch {state.epoch + 1}/{self.last_epoch}: "
            f"loss {means['loss']:.4f} · dev {metric} {value:.4g} · "
            f"{self.pairs_stepped / max(self.step_seconds, 1e-9):.0f} pairs/s"
        )
        state.epoch += 1
        state.batch = state.num_seen = 0
        self.sums.zero_()
        patience = self.config.patience
        stops = (
            patience is not None
            and state.epochs_without_gain >= patience
            and state.step < self.total_steps
        )
        if stops:
            self.progress.note(
                f"{self.stage}: stopped early: no better dev {metric} for {patience} epochs; "
                f"epoch {state.best_epoch} is kept."
            )
        return stops

    def _save_if_due(self, stop_requested: Callable[[], bool]) -> None:
        stopping, due = self.processes.any(
            stop_requested(),
            time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes,
        )
        if not (stopping or due):
            return
        # Never keep a state that is already lost.
        self._means()
        self._require_finite_weights()
        self.processes.once(self._save)
        self.saved_at = time.monotonic()
        if stopping:
            raise Interrupted(
                f"{self.stage}: stopped at step {self.state.step}, state saved in "
                f"{self.folder}; the same command with --resume goes on from there."
            )

    def _save(self) -> None:
        self.state.sums = self.sums.tolist()
        self.state.seconds = self._seconds()
        with writing(self.metrics_path), self.metrics_path.open("ab") as stream:
            # The state counts on these records: they must be on the disk before it is.
            os.fsync(stream.fileno())
            self.state.metrics_bytes = stream.tell()
        save_state(
            self.folder,
            self.state,
            self.stage.module,
            self.optimizer,
            self.scaler,
            self.kept_weights,
            self.device,
        )

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def _resume(self) -> None:
        loaded = load_state(
            self.folder, self.stage.module, self.optimizer, self.scaler, self.device
        )
        if loaded is None:
            self.progress.note(f"{self.stage}: no saved state to resume; starting afresh.")
            return
        self.state, self.kept_weights = loaded
        self.sums.copy_(torch.tensor(self.state.sums, dtype=torch.float64))
        self.earlier_seconds = self.state.seconds
        if self.stage.resumed is not None and self.state.last_dev is not None:
            self.stage.resumed(self.state.last_dev)
        self.progress.note(f"{self.stage}: resuming at step {self.state.step}.")

    def _truncate_metrics(self) -> None:
        """Forgets records written after the state that the run continues from, and a torn one."""
        with writing(self.metrics_path), self.metrics_path.open("a+b") as stream:
            stream.seek(0)
            kept = stream.read(self.state.metrics_bytes)
            stream.truncate(kept.rfind(b"\n") + 1)

    def _finish(self, stopped_early: bool) -> TrainingResult:
        result = TrainingResult(
            pairs=self.state.pairs,
            steps=self.state.step,
            epochs=self.state.epoch,
            wall_seconds=self._seconds(),
            pairs_per_second=self.pairs_stepped / max(self.step_seconds, 1e-9),
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
    factors: dict[nn.Module, float],
    config: TrainingConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    on_gpu, rate = device.type == "cuda", config.learning_rate
    factor_of = {id(p): factor for part, factor in factors.items() for p in part.parameters()}
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys((1.0, *factors.values())):
        ours = [p for p in parameters if factor_of.get(id(p), 1.0) == factor]
        # Weight decay pulls matrices; biases and normalisation gains are left alone, as in CLIP.
        for is_matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            params = [p for p in ours if (p.ndim > 1) == is_matrix]
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
    """Turns Ctrl-C and SIGTERM into a request to save and stop; a second one stops at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def request(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate_factor(step: int, *, total: int, warmup: int, schedule: Schedule) -> float:
    """The share of the peak learning rate used in a step.

    Args:
        step: 0-based optimiser step.
        total: optimiser steps that the schedule is planned for.
        warmup: steps over which the rate rises linearly; the first already moves.
        schedule: the fall afterwards, to zero just after the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
