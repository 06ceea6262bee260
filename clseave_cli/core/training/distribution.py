"""Training in several processes.

`torchrun` and `accelerate launch` start one command several times and number the copies. Every
process reads the same data and holds the same weights. Each encodes its shard of a batch's
sentences (or images), an all-gather collects the embeddings, and every process computes the rest on
the whole batch. So the loss of 2 × 64 equals that of 1 × 128, including batch statistics, pair
weights and contrastive negatives, and a stage need not know how many processes there are.

Legend: P processes · N items · D embedding width.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from clseave_cli.errors import ClseaveError, TrainingError
from clseave_cli.processes import local_rank, process_count, process_rank

#: How long the others wait for one that downloads or writes; a dead one is noticed at once.
_TIMEOUT = timedelta(hours=2)
#: Gradients are averaged in buckets of at most this many numbers, or of one parameter.
_BUCKET_SIZE = 16_000_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that run this command, as one of them sees them.

    Every method that communicates raises a TrainingError if another process has ended.
    """

    rank: int = 0  # this process's number
    count: int = 1  # P; with 1, no method communicates

    def shard(self, items: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """This process's slice of N items, in order of rank.

        With fewer items than processes, the spare ones take the first item, so that every process
        takes the same steps. `gather` drops the duplicates.
        """
        if self.count == 1 or not len(items):
            return items
        shard = np.array_split(items, self.count)[self.rank]
        return shard if len(shard) else items[:1]

    def gather(self, encode: Callable[[], Tensor], num_items: int) -> Tensor:
        """The (N, D) embeddings of all items, each computed by one process (an all-gather).

        `encode` embeds this process's `shard`. The result is the same on every process; float32
        with several. Gradients flow back into each process's shard, and are complete after
        `average_gradients`.
        """
        if self.count == 1:
            return encode()
        with self._random_by_rank():
            part = encode().float()
        gathered: Tensor = _Gather.apply(part, num_items, self)  # type: ignore[no-untyped-call]
        return gathered

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over processes."""
        if self.count == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with _connection_errors():
                distributed.all_reduce(flat)
            flat /= self.count
            means = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, mean in zip(bucket, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def once(self, function: Callable[[], Result]) -> Result:
        """Calls `function` on rank 0, and returns its result on every process.

        Raises:
            ClseaveError: `function` raised it; every process raises it.
        """
        if self.count == 1:
            return function()
        outcome: Result | ClseaveError | None = None
        if self.rank == 0:
            try:
                outcome = function()
            except ClseaveError as error:
                outcome = error
        outcome = self.agree(outcome)
        if isinstance(outcome, ClseaveError):
            raise outcome
        return outcome  # type: ignore[return-value]

    def agree(self, value: Result) -> Result:
        """Broadcasts the value of rank 0."""
        if self.count == 1:
            return value
        values = [value]
        with _connection_errors():
            distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process sets it."""
        if self.count == 1:
            return flags
        # On the CPU: a step must not wait for the GPU to learn that no process wants to stop.
        numbers = torch.tensor(flags, dtype=torch.int32)
        with _connection_errors():
            distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
        return tuple(bool(number) for number in numbers.tolist())

    def wait(self) -> None:
        """Returns once every process has called it."""
        self.any(False)

    @contextmanager
    def _random_by_rank(self) -> Iterator[None]:
        """Gives each process different dropout, and leaves the shared generator in the same state.

        The shared generator advances only if the block draws: after an encoder without dropout, the
        head's dropout is that of a run in one process.
        """
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(1 << 62, ()).item()) + self.rank)
            before = _random_states(devices)
            yield
            drew = not all(map(torch.equal, before, _random_states(devices)))
        if drew:
            torch.randint(1, ())


@functools.cache
def processes() -> Processes:
    """The group that this process belongs to; the first call connects to the others.

    Raises:
        TrainingError: they cannot be reached.
    """
    count = process_count()
    if count == 1:
        return Processes()
    with _connection_errors():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device((local_rank() or 0) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=_TIMEOUT)
    atexit.register(distributed.destroy_process_group)
    return Processes(process_rank(), count)


class _Gather(torch.autograd.Function):
    """(n, D) on each process → (N, D) on all.

    Every process computes the same loss from the result. The gradient of a shard is multiplied by
    P, so that the mean over processes adds the shards up, and leaves the gradients of what every
    process computes in full unchanged.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, num_items: int, group: Processes) -> Tensor:
        sizes = [len(shard) for shard in np.array_split(np.empty(num_items), group.count)]
        ctx.start, ctx.size = sum(sizes[: group.rank]), sizes[group.rank]
        ctx.num_computed, ctx.count = len(part), group.count
        padded = part.new_zeros(max(sizes), part.shape[1])
        padded[: ctx.size] = part[: ctx.size]
        parts = [torch.empty_like(padded) for _ in sizes]
        with _connection_errors():
            distributed.all_gather(parts, padded)
        return torch.cat([shard[:size] for shard, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        part = gradient.new_zeros(ctx.num_computed, gradient.shape[1])
        part[: ctx.size] = gradient[ctx.start : ctx.start + ctx.size] * ctx.count
        return part, None, None


def _random_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > _BUCKET_SIZE:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turns a broken connection into a TrainingError of one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"process {process_rank()} of {process_count()} cannot reach the others "
            f"({reason[:160]}): one of them failed or was killed; see its message or the "
            "launcher's. The last saved state is kept; the same command with --resume continues."
        ) from error
