"""What only a GPU can show of captured steps; about a minute on one. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch
from tiny_world import QUICK, Killed, Notes, read_jsonl, weights
from torch import nn
from torch.nn import functional

from clseave_cli.core.alignment import align
from clseave_cli.core.config import AlignConfig, FinetuneConfig, TrainingConfig
from clseave_cli.core.finetuning import finetune
from clseave_cli.core.models.clip_ve import EntailmentHead, HeadConfig
from clseave_cli.core.training import loop
from clseave_cli.core.training.capture import Captured, CudaRecorder
from clseave_cli.core.training.loop import Selection, Stage, train

CUDA = torch.device("cuda")
GPU = {**QUICK, "device": "cuda", "epochs": 8}


def finetuned(out, world, clip, notes=None, **more):
    config = FinetuneConfig(data=str(world), clip=str(clip), runs=out, **{**GPU, **more})
    finetune(config, notes or Notes())
    metrics = read_jsonl(out / "clip-ve/training/metrics.jsonl")
    return weights(out / "clip-ve"), [entry["loss"] for entry in metrics], metrics[-1]["dev"]


def aligned(out, world, trained, encoder, notes=None, **more):
    config = AlignConfig(
        data=str(world), teacher=trained / "clip-ve", lang=("de",), student=str(encoder), runs=out,
        **{**GPU, **more},
    )  # fmt: skip
    align(config, notes or Notes())
    return weights(out / "align-de")


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("is_guided", [False, True])
def test_captured_steps_have_the_losses_of_plain_ones(
    tmp_path, world, clip, plain_steps, is_guided, accumulation
):
    options = {"guided": world / "images", "guided_adapter": True} if is_guided else {}
    options |= {"accumulation": accumulation, "clip_norm": 1.0}
    _, captured, dev = finetuned(tmp_path / "captured", world, clip, **options)
    plain_steps()
    _, plain, plain_dev = finetuned(tmp_path / "plain", world, clip, **options)
    assert captured == pytest.approx(plain, rel=1e-3)
    assert dev["loss"] == pytest.approx(plain_dev["loss"], rel=1e-2)


@pytest.mark.parametrize("size", [(64, 512), (7, 512)])
def test_captured_gradients_and_batch_statistics_are_those_of_a_plain_step(size):
    torch.manual_seed(0)
    heads = [EntailmentHead(HeadConfig(dropout=0.0)).to(CUDA) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    batches = [(torch.randn(size), torch.randn(size)) for _ in range(5)]

    def step(head):
        def run(batch):
            head.zero_grad(set_to_none=False)
            loss = head(*batch).square().mean()
            loss.backward()
            return loss.detach().reshape(1)

        return run

    for parameter in (p for head in heads for p in head.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    captured = Captured(step(heads[0]), CUDA, CudaRecorder(CUDA), pytest.fail)
    plain = Captured(step(heads[1]), CUDA, None, pytest.fail)
    for batch in batches:
        assert captured(batch).item() == pytest.approx(plain(batch).item(), rel=1e-5)
        for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        for one, other in zip(heads[0].buffers(), heads[1].buffers(), strict=True):
            torch.testing.assert_close(one, other)
    assert len(captured._graphs) == 1


def test_dropout_differs_from_replay_to_replay_and_repeats_from_a_saved_state():
    dropped = Captured(
        lambda ones: functional.dropout(ones, 0.5), CUDA, CudaRecorder(CUDA), pytest.fail
    )
    ones = torch.ones(1000)
    for _ in range(2):
        dropped(ones)
    state = torch.cuda.get_rng_state(CUDA)
    first = [dropped(ones).clone() for _ in range(3)]
    torch.cuda.set_rng_state(state, CUDA)
    again = [dropped(ones).clone() for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("killed_at", [1, 5])  # before and after the first replay
def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path, world, trained, encoder, killed_at, monkeypatch
):
    whole = aligned(tmp_path / "whole", world, trained, encoder)
    step = loop._Loop._step

    def dying(run, *arguments):
        if run.state.step == killed_at:
            raise Killed
        return step(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Loop, "_step", dying)
        aligned(tmp_path / "killed", world, trained, encoder, checkpoint_minutes=0)
    assert aligned(tmp_path / "killed", world, trained, encoder, resume=True) == whole


def test_a_batch_of_a_new_shape_in_mid_run(tmp_path):
    """Ten epochs of one shape, with one batch that is longer than all others in the last."""
    layer = nn.Linear(4, 1).to(CUDA)
    lengths = [8] * 9 + [3]

    def prepare(rows):
        return torch.ones(lengths[int(rows[0])], 4)

    stage = Stage(
        name="shapes",
        module=layer,
        num_examples=10,
        prepare=prepare,
        loss=lambda batch: (layer(batch) - 1).square().mean(),
        evaluate=lambda: {"loss": (layer(torch.ones(1, 4, device=CUDA)) - 1).square().item()},
        selection=Selection("loss", "lowest"),
    )
    config = TrainingConfig(epochs=10, batch_size=1, learning_rate=1e-2, device="cuda")
    result = train(stage, config, device=CUDA, folder=tmp_path)
    assert result.steps == 100 and result.dev["loss"] < 0.1


def test_fp16_is_not_captured_and_says_so(tmp_path, world, clip):
    notes = Notes()
    finetuned(tmp_path, world, clip, notes, precision="fp16", epochs=1)
    assert sum("fp16 steps are not captured" in line for line in notes.lines) == 1


def test_what_cannot_be_captured_trains_plainly(tmp_path):
    layer = nn.Linear(4, 1).to(CUDA)

    def loss(batch):
        error = (functional.dropout(layer(batch), 0.1) - 1).square().mean()
        return error * (1 if error.item() >= 0 else -1)  # a number comes back to Python

    notes = Notes()
    stage = Stage(
        name="synchronous",
        module=layer,
        num_examples=6,
        prepare=lambda rows: torch.ones(2, 4),
        loss=loss,
        evaluate=lambda: {"loss": loss(torch.ones(2, 4, device=CUDA)).item()},
        selection=Selection("loss", "lowest"),
    )
    config = TrainingConfig(epochs=3, batch_size=1, learning_rate=1e-2, device="cuda")
    assert train(stage, config, device=CUDA, folder=tmp_path, progress=notes).steps == 18
    assert sum("not captured" in line for line in notes.lines) == 1
