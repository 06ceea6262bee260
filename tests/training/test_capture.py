"""Captured steps, with a stand-in that records and repeats on a CPU as a CUDA graph does."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from tiny_world import QUICK, Notes, killed_at_step, read_jsonl, weights
from torch import Tensor, nn

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, FinetuneConfig, TrainingConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.training import loop
from clseave_cli.core.training.capture import Captured, Gradients

CPU = torch.device("cpu")


class Replayer:
    """Repeats a function on the tensors it was captured with; counts what it does."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.captures = self.replays = 0

    def capture(self, work):
        if self.refuses:
            raise RuntimeError(f"{self.refuses}\nand many lines more")
        self.captures += 1
        result = torch.empty(0, dtype=torch.float64)

        def replay():
            self.replays += 1
            made = work()
            result.resize_(made.shape).copy_(made)

        return replay, result

    def beside(self):
        return nullcontext()


@dataclass(frozen=True, eq=False)
class Batch:
    numbers: Tensor
    pair: tuple[Tensor, int]


def batch(*numbers: float, factor: int = 1) -> Batch:
    return Batch(torch.tensor(numbers), (torch.ones(1), factor))


def weighted(given: Batch) -> Tensor:
    ones, factor = given.pair
    return (given.numbers.sum() * factor * ones).double()


def test_a_graph_serves_all_batches_of_its_shape_with_their_own_numbers() -> None:
    recorder = Replayer()
    function = Captured(weighted, CPU, recorder, pytest.fail)
    given = [batch(1, 2), batch(3, 4), batch(5, 6), batch(7), batch(8), batch(1, 2, factor=2)]
    given += [batch(9, 9), batch(3), batch(4, 4, factor=2)]
    results = [function(one).item() for one in given]
    assert results == [weighted(one).item() for one in given]
    # Shapes (2, factor 1), (1, factor 1), (2, factor 2): the first of each is computed plainly.
    assert (recorder.captures, recorder.replays) == (3, len(given) - 3)
    assert function.num_graphs == 3


def test_the_batches_given_are_not_the_graphs_own_tensors() -> None:
    function = Captured(weighted, CPU, Replayer(), pytest.fail)
    given = [batch(1), batch(2), batch(3)]
    for one in given:
        function(one)
    assert [one.numbers.item() for one in given] == [1, 2, 3]


def test_what_cannot_be_captured_runs_plainly_and_is_said_once() -> None:
    notes: list[str] = []
    function = Captured(weighted, CPU, Replayer("operation not permitted"), notes.append)
    assert [function(batch(number)).item() for number in range(4)] == [0, 1, 2, 3]
    assert notes == [
        "steps are not captured as CUDA graphs (operation not permitted); they run one by one."
    ]


def test_shapes_that_never_come_twice_end_the_attempt(monkeypatch) -> None:
    monkeypatch.setattr("clseave_cli.core.training.capture._MOST_SINGLE_SHAPES", 3)
    notes: list[str] = []
    recorder = Replayer()
    function = Captured(weighted, CPU, recorder, notes.append)
    for length in range(1, 7):
        assert function(batch(*range(length))).item() == sum(range(length))
    function(batch(*range(6)))
    assert recorder.captures == 0
    assert len(notes) == 1 and "the same shape" in notes[0]


def test_gradients_stay_where_they_are_and_add_up() -> None:
    layer = nn.Linear(2, 1)
    gradients = Gradients(list(layer.parameters()))
    places, sums = set(), []
    for number, add in enumerate((False, True, False)):
        gradients.release()
        layer(torch.full((1, 2), float(number + 1))).sum().backward()
        gradients.collect(add=add)
        places.add((layer.weight.grad.data_ptr(), layer.bias.grad.data_ptr()))
        sums.append((layer.weight.grad[0, 0].item(), layer.bias.grad.item()))
    assert len(places) == 1
    assert sums == [(1, 1), (3, 2), (3, 1)]


def test_a_part_without_gradient_is_noticed() -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    gradients = Gradients([used, unused])
    used.sum().backward()
    gradients.collect(add=False)
    gradients.release()
    unused.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        gradients.collect(add=False)


@pytest.fixture
def replayed(monkeypatch):
    """Every run captures its steps, with the stand-in."""
    made: list[Replayer] = []

    def recorder(run):
        made.append(Replayer())
        return made[-1]

    monkeypatch.setattr(loop._Run, "_recorder", recorder)
    return made


@pytest.mark.parametrize("accumulation", [1, 2])
def test_finetune_ends_in_the_weights_of_plain_steps(
    tmp_path, world, clip, monkeypatch, accumulation
):
    def run(name):
        out = tmp_path / name
        finetune(
            FinetuneConfig(
                data=str(world), clip=str(clip), runs=out, epochs=2, clip_norm=1.0,
                accumulation=accumulation, **QUICK,
            )
        )  # fmt: skip
        losses = [entry["loss"] for entry in read_jsonl(out / "clip-ve/training/metrics.jsonl")]
        return weights(out / "clip-ve"), losses

    plain, plain_losses = run("plain")
    recorder = Replayer()
    monkeypatch.setattr(loop._Run, "_recorder", lambda self: recorder)
    captured, losses = run("captured")
    assert recorder.replays > recorder.captures > 0
    assert losses == plain_losses
    assert captured == plain


def test_align_resumes_in_mid_run_to_the_same_bits(tmp_path, trained, world, encoder, replayed):
    shared = {
        "data": str(world), "teacher": trained / "clip-ve", "lang": ("de",),
        "student": str(encoder), "epochs": 6, **QUICK,
    }  # fmt: skip
    align(AlignConfig(runs=tmp_path / "whole", **shared))
    assert sum(recorder.replays for recorder in replayed)
    with killed_at_step(4):
        align(AlignConfig(runs=tmp_path / "killed", checkpoint_minutes=0, **shared))
    align(AlignConfig(runs=tmp_path / "killed", resume=True, **shared))
    assert weights(tmp_path / "killed/align-de") == weights(tmp_path / "whole/align-de")


@pytest.mark.parametrize("objective", ["mse", "contrastive"])
def test_batches_filled_up_train_as_others_do(
    tmp_path, trained, world, encoder, monkeypatch, replayed, objective
):
    """As on a GPU: few shapes, places and teacher embeddings behind the pairs'."""
    shared = {
        "data": str(world), "teacher": trained / "clip-ve", "lang": ("de", "nl"), "epochs": 4,
        "student": str(encoder), "objective": objective, **QUICK,
    }  # fmt: skip
    losses = {}
    for filled in (False, True):
        monkeypatch.setattr(SentenceEncoder, "few_shapes", filled)
        out = tmp_path / str(filled)
        align(AlignConfig(runs=out, **shared))
        metrics = read_jsonl(out / "align-de+nl/training/metrics.jsonl")
        losses[filled] = [entry["loss"] for entry in metrics]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert all(recorder.replays for recorder in replayed)


def test_batches_that_leave_parameters_without_gradient_run_plainly(tmp_path, monkeypatch):
    """An optimiser leaves those parameters alone, whatever their momentum: no step is captured."""

    def trained(name):
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])

        def loss(batch):
            used = layers if batch[0, 0] < 4 else layers[:1]
            return torch.stack([(layer(batch) - 1).square().mean() for layer in used]).sum()

        stage = loop.Stage(
            name="uneven",
            module=layers,
            num_examples=8,
            prepare=lambda rows: torch.full((1, 2), float(rows[0])),
            loss=loss,
            evaluate=lambda: {"loss": 0.0},
            selection=loop.Selection("loss", "lowest"),
        )
        config = TrainingConfig(
            epochs=3, batch_size=1, learning_rate=1e-2, weight_decay=0.1, device="cpu"
        )
        notes = Notes()
        loop.train(stage, config, device=CPU, folder=tmp_path / name, progress=notes)
        return layers.state_dict(), notes.text

    plain, _ = trained("plain")
    monkeypatch.setattr(loop._Run, "_recorder", lambda run: Replayer())
    captured, said = trained("captured")
    assert all(torch.equal(plain[name], captured[name]) for name in plain)
    assert said.count("steps are not captured") == 1 and "no gradient" in said
