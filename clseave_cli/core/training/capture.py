"""Training steps as CUDA graphs: captured once for each batch shape, then replayed.

A training step on short sentences is a few thousand kernels of a few microseconds each; launching
them one by one from Python takes several times as long as running them. A graph launches them all
at once. It replays exactly what was captured: the same kernels on the same addresses. So each batch
is first copied into the graph's tensors, and what one step leaves for the next (weights, optimiser
state, running statistics) must stay at its address. Random numbers advance from replay to replay as
they would without a graph, so a state saved in between holds all that the next step needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from clseave_cli.core.training.device import on_device, tensors_of

#: Limits the memory that the driver keeps for graphs. Padded batches of one size come in about ten
#: shapes, accumulated ones in three times as many.
_MAX_GRAPHS = 48
#: After this many shapes without a repetition, capturing is given up.
_MAX_SINGLE_SHAPES = 256

Batch = TypeVar("Batch")


class CudaRecorder:
    """Records CUDA graphs that share one memory pool; only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `work` without running it.

        Returns:
            A function that replays it, and the tensor that each replay writes its result to.
        """
        graph = torch.cuda.CUDAGraph()
        # Another thread pins memory for the next batches, which must not invalidate the capture.
        mode = "thread_local"
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                result = work()
        except RuntimeError:
            # The generator still believes that it is being captured; a clone does not.
            generator = torch.cuda.default_generators[self._stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, result

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The stream for captured and eager work, ordered with the work before and after it."""
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)


@dataclasses.dataclass(frozen=True, eq=False)
class _Graph:
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class Captured(Generic[Batch]):
    """A function of a batch that is captured once for each batch shape, then replayed.

    The first batch of a shape runs eagerly, which also initialises libraries; the second is
    captured. The function must run on the device alone: it must return no number to Python, and
    change tensors in place.

    Args:
        function: maps a batch on the device to a tensor.
        device: where it computes.
        recorder: captures it; None: every batch runs eagerly.
        note: receives one line if the function cannot be captured.
    """

    def __init__(
        self,
        function: Callable[[Batch], Tensor],
        device: torch.device,
        recorder: CudaRecorder | None,
        note: Callable[[str], None],
    ) -> None:
        self._function = function
        self._device = device
        self._recorder = recorder
        self._note = note
        self._shapes: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """The function of a batch, best in pinned memory; the next call overwrites the result."""
        recorder = self._recorder
        if recorder is None:
            return self._function(on_device(batch, self._device))
        with recorder.stream():
            shape = _shape(batch)
            graph = self._graphs.get(shape)
            if graph is None and shape in self._shapes and len(self._graphs) < _MAX_GRAPHS:
                graph = self._capture(recorder, batch)
                if graph is not None:
                    self._graphs[shape] = graph
            if graph is None:
                self._shapes.add(shape)
                if not self._graphs and len(self._shapes) > _MAX_SINGLE_SHAPES:
                    self._give_up("almost no two batches have the same shape")
                return self._function(on_device(batch, self._device))
            for target, source in zip(graph.inputs, tensors_of(batch), strict=True):
                target.copy_(source, non_blocking=True)
            graph.replay()
            return graph.result

    def _capture(self, recorder: CudaRecorder, batch: Batch) -> _Graph | None:
        # Before the capture, so that it does not include the copies.
        inputs = on_device(batch, self._device, copy=True)
        try:
            replay, result = recorder.capture(lambda: self._function(inputs))
        except RuntimeError as error:
            self._give_up(str(error).splitlines()[0])
            return None
        return _Graph(tensors_of(inputs), replay, result)

    def _give_up(self, reason: str) -> None:
        """Runs every further batch eagerly."""
        self._recorder = None
        self._graphs.clear()
        self._note(f"steps are not captured as CUDA graphs ({reason}); they run one by one.")


def _shape(batch: Any) -> Hashable:
    """Equal for batches that differ only in the values of their tensors."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        return type(batch), *map(_shape, parts)
    if isinstance(batch, tuple):
        return type(batch), *map(_shape, batch)
    return batch  # type: ignore[no-any-return]
