"""A step as a CUDA graph: captured once for each shape of batch, then replayed.

A training step on short sentences is a few thousand kernels of some microseconds each, and starting
them one by one from Python takes several times as long as running them. A graph starts them all at
once. It repeats what was captured to the letter: the same kernels on the same addresses. So a
batch is copied into the graph's tensors first, and what a step leaves for the next one (weights,
optimiser state, running statistics) must stay where it is. Random numbers move on from replay to
replay as they would without a graph, so a state saved in between holds all that the next step
needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from clseave_cli.core.training.placement import on_device, tensors_of

#: Shapes that are captured: a bound on what the driver keeps for graphs. Filled-up batches of one
#: size come in about ten, a batch in parts in three times as many.
_MOST_GRAPHS = 48
#: So many shapes of which none came twice, and no more is expected of this kind of batch.
_MOST_SINGLE_SHAPES = 256

Batch = TypeVar("Batch")


class CudaRecorder:
    """CUDA graphs that share one pool of memory: at any time only one of them is being run.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `work` without running it.

        Returns:
            What runs it again, and the tensor its result is written to each time.
        """
        graph = torch.cuda.CUDAGraph()
        # Another thread is locking pages for the next batches meanwhile, which is no part of this.
        mode = "thread_local"
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                result = work()
        except RuntimeError:
            # The generator still takes itself for a part of the recording; a copy does not.
            generator = torch.cuda.default_generators[self._stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, result

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Where recorded and plain work both run, in order with what comes before and after."""
        before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            before.wait_stream(self._stream)


@dataclasses.dataclass(frozen=True, eq=False)
class _Graph:
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class Captured(Generic[Batch]):
    """A function of a batch, replayed for batches of a shape that it has met before.

    A shape's first batch is computed plainly, which also sets up what libraries set up once; its
    second one is captured. The function must work on the device alone: no number may come back to
    Python, and what it changes must be changed in place.

    Args:
        function: of a batch on the device, to a tensor.
        device: where it computes.
        recorder: what captures; None: every batch is computed plainly.
        note: told, in one line, when the function turns out not to be capturable.
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
        self._met: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}

    @property
    def num_graphs(self) -> int:
        """How many shapes were captured."""
        return len(self._graphs)

    def __call__(self, batch: Batch) -> Tensor:
        """What the function makes of a batch, which may lie in page-locked memory.

        The result is overwritten by the next call.
        """
        recorder = self._recorder
        if recorder is None:
            return self._function(on_device(batch, self._device))
        with recorder.beside():
            shape = _shape(batch)
            graph = self._graphs.get(shape)
            if graph is None and shape in self._met and len(self._graphs) < _MOST_GRAPHS:
                graph = self._capture(recorder, batch)
                if graph is not None:
                    self._graphs[shape] = graph
            if graph is None:
                self._remember(shape)
                return self._function(on_device(batch, self._device))
            for copied, given in zip(graph.inputs, tensors_of(batch), strict=True):
                copied.copy_(given, non_blocking=True)
            graph.replay()
            return graph.result

    def _capture(self, recorder: CudaRecorder, batch: Batch) -> _Graph | None:
        # Outside of the recording, so that the copies are no part of it.
        copied = on_device(batch, self._device, copy=True)
        try:
            replay, result = recorder.capture(lambda: self._function(copied))
        except RuntimeError as error:
            self._give_up(str(error).splitlines()[0])
            return None
        return _Graph(tensors_of(copied), replay, result)

    def _remember(self, shape: Hashable) -> None:
        self._met.add(shape)
        if not self._graphs and len(self._met) > _MOST_SINGLE_SHAPES:
            self._give_up("hardly two batches have the same shape")

    def _give_up(self, reason: str) -> None:
        """From now on every batch is computed plainly; says why."""
        self._recorder = None
        self._graphs.clear()
        self._note(f"steps are not captured as CUDA graphs ({reason}); they run one by one.")


def _shape(batch: Any) -> Hashable:
    """What two batches have in common that one graph serves: all but the numbers in tensors."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape), batch.dtype
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        return type(batch), *map(_shape, parts)
    if isinstance(batch, tuple):
        return type(batch), *map(_shape, batch)
    return batch  # type: ignore[no-any-return]
