"""Several processes, one training: who does what, and how they agree.

`torchrun` and `accelerate launch` start one command several times and number the copies. Every
process reads the same data and holds the same weights. The sentences (or images) of a batch are
shared out to be encoded, and the embeddings gathered; what follows is computed by every process on
the whole batch. So the loss of 2 × 64 is the loss of 1 × 128, with batch statistics, weights of
pairs and contrastive comparisons included, and no stage has to mind how many processes there are.

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

#: Others may wait this long for one that downloads or writes; a dead one is noticed at once.
_PATIENCE = timedelta(hours=2)
#: Gradients are sent in pieces of at most this many numbers, or of one parameter.
_PIECE = 16_000_000

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The processes that work on this command, seen from one of them.

    Attributes:
        rank: this one's number.
        count: P; with 1, every method does the plain thing.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_rank_0(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def shard(self, items: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """This process's part of N items: a run of them, all runs in order of rank.

        With fewer items than processes, those left over take the first item too: every process
        then takes the same steps. `gather` drops what came of it.
        """
        if self.count == 1 or not len(items):
            return items
        shard = np.array_split(items, self.count)[self.rank]
        return shard if len(shard) else items[:1]

    def gather(self, encode: Callable[[], Tensor], num_items: int) -> Tensor:
        """The embeddings of all items, each computed by one process.

        Args:
            encode: embeds this process's `shard`, (≤ N, D).
            num_items: N.

        Returns:
            (N, D), the same on every process; float32 where there are several. Gradients flow
            back into each process's shard, and are whole after `average_gradients`.

        Raises:
            TrainingError: another process ended.
        """
        if self.count == 1:
            return encode()
        with self._random_by_rank():
            part = encode().float()
        gathered: Tensor = _Gather.apply(part, num_items, self)  # type: ignore[no-untyped-call]
        return gathered

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over processes.

        Raises:
            TrainingError: another process ended.
        """
        if self.count == 1:
            return
        for piece in _pieces([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in piece])
            with _connected():
                distributed.all_reduce(flat)
            flat /= self.count
            means = torch.split(flat, [gradient.numel() for gradient in piece])
            for gradient, mean in zip(piece, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def once(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on the first process, while the others wait.

        Raises:
            ClseaveError: it was raised there; every process raises it.
        """
        if self.count == 1:
            return function()
        outcome: Result | ClseaveError | None = None
        if self.is_rank_0:
            try:
                outcome = function()
            except ClseaveError as error:
                outcome = error
        outcome = self.agree(outcome)
        if isinstance(outcome, ClseaveError):
            raise outcome
        return outcome  # type: ignore[return-value]

    def agree(self, value: Result) -> Result:
        """The first process's value, on all of them.

        Raises:
            TrainingError: another process ended.
        """
        if self.count == 1:
            return value
        holder = [value]
        with _connected():
            distributed.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in some process.

        Raises:
            TrainingError: another process ended.
        """
        if self.count == 1:
            return flags
        # On the CPU: a step must not wait for the GPU to learn that nobody wants to stop.
        numbers = torch.tensor(flags, dtype=torch.int32)
        with _connected():
            distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
        return tuple(bool(number) for number in numbers.tolist())

    def wait(self) -> None:
        """Returns when every process has come here.

        Raises:
            TrainingError: another process ended.
        """
        self.any(False)

    @contextmanager
    def _random_by_rank(self) -> Iterator[None]:
        """Each process draws its own dropout, while the common random numbers stay in step.

        Those move on only if the block drew some: behind an encoder without dropout, the head's
        dropout is that of a run in one process.
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
    """The processes that this one belongs to; meets the others when first called.

    Raises:
        TrainingError: they cannot be reached.
    """
    count = process_count()
    if count == 1:
        return Processes()
    with _connected():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device((local_rank() or 0) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=_PATIENCE)
    atexit.register(distributed.destroy_process_group)
    return Processes(process_rank(), count)


class _Gather(torch.autograd.Function):
    """(n, D) on each process → (N, D) on all.

    Every process computes the same loss from the result. The gradient of its own shard is
    multiplied by P, so that the mean over processes sums the shards, and leaves as it is the
    gradient of what every process computed in full.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, num_items: int, among: Processes) -> Tensor:
        sizes = [len(shard) for shard in np.array_split(np.empty(num_items), among.count)]
        ctx.start, ctx.size = sum(sizes[: among.rank]), sizes[among.rank]
        ctx.num_computed, ctx.count = len(part), among.count
        padded = part.new_zeros(max(sizes), part.shape[1])
        padded[: ctx.size] = part[: ctx.size]
        parts = [torch.empty_like(padded) for _ in sizes]
        with _connected():
            distributed.all_gather(parts, padded)
        return torch.cat([shard[:size] for shard, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (whole,) = gradients
        part = whole.new_zeros(ctx.num_computed, whole.shape[1])
        part[: ctx.size] = whole[ctx.start : ctx.start + ctx.size] * ctx.count
        return part, None, None


def _random_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _pieces(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    piece: list[Tensor] = []
    for gradient in gradients:
        if piece and sum(g.numel() for g in piece) + gradient.numel() > _PIECE:
            yield piece
            piece = []
        piece.append(gradient)
    if piece:
        yield piece


@contextmanager
def _connected() -> Iterator[None]:
    """Turns a broken connection into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"process {process_rank()} of {process_count()} cannot reach the others "
            f"({reason[:160]}): one of them failed or was killed, see its own message or the "
            "launcher's. The last saved state is kept; the same command with --resume goes on."
        ) from error
