"""Captured steps, with a stand-in that records and repeats on a CPU as a CUDA graph does."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from tiny_task import CPU
from tiny_world import QUICK, Notes, killed_at_step, metrics_of, quick_align, weights
from torch import Tensor

from clseave_cli.core.config import FinetuneConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.training import loop
from clseave_cli.core.training.capture import Captured


class Replayer:
    """Repeats a function on the tensors it was captured with; counts what it does."""

    def __init__(self, refuses=""):
        self.refuses = refuses
        self.captures = self.replays = 0

    def capture(self, work):
        if self.refuses:
            raise RuntimeError(f"{self.refuses}\nand many lines more")
        self.captures += 1
        result = torch.empty(0, dtype=torch.float64)

        def replay():
            self.replays += 1
            value = work()
            result.resize_(value.shape).copy_(value)

        return replay, result

    def stream(self):
        return nullcontext()


@dataclass(frozen=True, eq=False)
class Batch:
    numbers: Tensor
    pair: tuple[Tensor, int]


def batch(*numbers, factor=1):
    return Batch(torch.tensor(numbers), (torch.ones(1), factor))


def weighted(inputs):
    ones, factor = inputs.pair
    return (inputs.numbers.sum() * factor * ones).double()


def test_a_graph_serves_all_batches_of_its_shape_with_their_own_numbers():
    recorder = Replayer()
    function = Captured(weighted, CPU, recorder, pytest.fail)
    inputs = [batch(1, 2), batch(3, 4), batch(5, 6), batch(7), batch(8), batch(1, 2, factor=2)]
    inputs += [batch(9, 9), batch(3), batch(4, 4, factor=2)]
    results = [function(one).item() for one in inputs]
    assert results == [weighted(one).item() for one in inputs]
    # Shapes (2, factor 1), (1, factor 1), (2, factor 2): the first of each is computed plainly.
    assert (recorder.captures, recorder.replays) == (3, len(inputs) - 3)
    assert len(function._graphs) == 3


def test_what_cannot_be_captured_runs_plainly_and_is_noted_once():
    notes = Notes()
    function = Captured(weighted, CPU, Replayer("operation not permitted"), notes.note)
    assert [function(batch(number)).item() for number in range(4)] == [0, 1, 2, 3]
    assert notes.lines == [
        "steps are not captured as CUDA graphs (operation not permitted); they run one by one."
    ]


def test_shapes_that_never_come_twice_end_the_attempt(monkeypatch):
    monkeypatch.setattr("clseave_cli.core.training.capture._MAX_SINGLE_SHAPES", 3)
    notes, recorder = Notes(), Replayer()
    function = Captured(weighted, CPU, recorder, notes.note)
    for length in (1, 2, 3, 4, 5, 6, 6):
        assert function(batch(*range(length))).item() == sum(range(length))
    assert recorder.captures == 0
    assert len(notes.lines) == 1 and "the same shape" in notes.text


@pytest.fixture
def recorder(monkeypatch):
    """The stand-in that captures the steps of every run."""
    recorder = Replayer()
    monkeypatch.setattr(loop._Loop, "_recorder", lambda self: recorder)
    return recorder


@pytest.mark.parametrize(("accumulation", "is_guided"), [(1, False), (2, False), (1, True)])
def test_finetune_ends_in_the_weights_of_plain_steps(
    tmp_path, world, clip, request, accumulation, is_guided
):
    options = {"epochs": 2, "clip_norm": 1.0, "accumulation": accumulation, **QUICK}
    if is_guided:
        options |= {"guided": world / "images", "guided_control": "shuffle"}

    def run(name):
        config = FinetuneConfig(data=str(world), clip=str(clip), runs=tmp_path / name, **options)
        folder = finetune(config).folder
        return weights(folder), metrics_of(folder / "training")

    plain = run("plain")
    recorder = request.getfixturevalue("recorder")
    assert run("captured") == plain
    assert recorder.replays > recorder.captures > 0


def test_align_resumes_in_mid_run_to_the_same_bits(tmp_path, trained, world, encoder, recorder):
    def run(name, **options):
        return quick_align(world, tmp_path / name, trained, encoder, "de", epochs=6, **options)

    whole = run("whole")
    assert recorder.replays
    with killed_at_step(4):
        run("killed", checkpoint_minutes=0)
    assert weights(run("killed", resume=True).folder) == weights(whole.folder)


@pytest.mark.parametrize("objective", ["mse", "contrastive"])
def test_batches_filled_up_train_as_others_do(
    tmp_path, trained, world, encoder, monkeypatch, recorder, objective
):
    """As on a GPU: few shapes, places and teacher embeddings behind the pairs'."""
    losses, options = {}, {"epochs": 4, "objective": objective}
    for filled in (False, True):
        monkeypatch.setattr(SentenceEncoder, "buckets_shapes", filled)
        runs, recorder.replays = tmp_path / str(filled), 0
        run = quick_align(world, runs, trained, encoder, "de", "nl", **options)
        losses[filled] = [entry["loss"] for entry in metrics_of(run.folder / "training")]
        assert recorder.replays
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
