"""Two processes train together: the run of one process, written once, safe to kill."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import metrics_of, model_files, stage_command, start_team, write_captions

from clseave_cli.core.files import locked_target
from clseave_cli.core.training.distribution import Processes, processes

NAMES = {"finetune-ve": "clip-ve", "align": "align-de+nl", "pretrain": "clip"}


@pytest.fixture
def stage(request, world, trained, clip, encoder, tmp_path):
    """A stage's name and command."""
    name = request.param
    more = ["--head", "pooled", "--accumulation", "2"] if name == "finetune-ve" else []
    return name, stage_command(
        name, world, trained, encoder if name == "align" else clip, "--runs", tmp_path / "runs",
        "--epochs", "6", "--batch-size", "5", "--learning-rate", "1e-4", "--clip-norm", "0.5",
        *more,
    )  # fmt: skip


def _ended(team, *expected_codes):
    """Asserts how the processes end; returns their stderr."""
    codes = [process.wait() for process in team]
    outputs = [process.stderr for process in team]
    assert codes == list(expected_codes), outputs
    return outputs


def _assert_close(folder, reference):
    actual, expected = metrics_of(folder / "training"), metrics_of(reference / "training")
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        # An epoch agrees to rounding; then Adam and BatchNorm make more of it, as much as the
        # processor's rounding gives them to begin with.
        tolerance = {1: 1e-5, 2: 1e-4}.get(one["epoch"], 0.03)
        # Where the loss is lowest it hardly changes, so the temperature agrees less.
        fitted = [record.get("dev", {}).pop("temperature", 1.0) for record in (one, other)]
        assert fitted[0] == pytest.approx(fitted[1], rel=max(tolerance, 1e-3))
        assert one.pop("dev", {}) == pytest.approx(other.pop("dev", {}), rel=tolerance)
        assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=tolerance)
        # Of two dozen rows one may lie on the edge between two labels.
        flips = 0.1 if tolerance > 1e-4 else 0.0
        accuracy = one.pop("accuracy", 0.0)
        assert accuracy == pytest.approx(other.pop("accuracy", 0.0), rel=1e-6, abs=flips)
        assert one == other
    for path in sorted(reference.rglob("*.safetensors")):
        for name, expected_value in load_file(path).items():
            if name.endswith(("k_proj.bias", "key.bias")):
                continue  # a softmax does not see it: its gradient is nothing but rounding
            got = load_file(folder / path.relative_to(reference))[name]
            if not expected_value.is_floating_point():
                assert got.equal(expected_value), name
                continue
            # Adam divides by the gradient's size: where that is next to nothing, rounding decides.
            # A weight moves by up to 3e-3 in this run; BatchNorm's means are of the features' size.
            most = 5e-3 if "running" in name else 1e-3
            assert (got - expected_value).abs().max() < most, name
            assert (got - expected_value).abs().float().mean() < most / 10, name


def _wait_for_state(process, out, step):
    training = out.with_name(out.name + ".partial") / "training"
    process.wait_until(
        lambda: any(path.name >= f"state-{step:08d}" for path in training.glob("state-*"))
    )


@pytest.mark.parametrize("stage", ["finetune-ve", "align"], indirect=True)
def test_two_processes_train_as_one_and_end_together(stage, tmp_path, clseave, cache):
    name, arguments = stage
    out = tmp_path / "runs" / NAMES[name]
    code, _, err = clseave(*arguments, "--out", tmp_path / "alone")
    assert code == 0, err
    shards = sorted(path.name for path in cache.rglob("*.safetensors"))
    for path in cache.rglob("*.safetensors"):
        path.unlink()

    with locked_target(out):
        team = start_team(*arguments, "--resume", folder=tmp_path / "refused")
        for output in _ended(team, 1, 1):
            assert "another process is writing it" in output.splitlines()[-1], output

    outputs = _ended(start_team(*arguments, folder=tmp_path / "outputs"), 0, 0)
    assert "epoch 6/6" in outputs[0] and outputs[1] == ""
    _assert_close(out, tmp_path / "alone")
    assert list((tmp_path / "runs").iterdir()) == [out]
    # Each vector was computed by one of the two.
    kept = sum(len(load_file(path)["keys"]) for path in cache.rglob("*.safetensors"))
    assert kept == {"finetune-ve": 12, "align": 5 + 4}[name]
    assert len(shards) >= 2

    # Killed, with a state on disk: the other one says so and ends; told to stop: both save.
    reference = model_files(out), metrics_of(out / "training")
    out = tmp_path / "again"
    again = [*arguments, "--out", str(out), "--resume", "--checkpoint-minutes", "0"]
    team = start_team(*again, folder=tmp_path / "killed")
    _wait_for_state(team[0], out, 2)
    team[1].signal(signal.SIGKILL)
    outputs = _ended(team, 1, -signal.SIGKILL)
    errors = [line for line in outputs[0].splitlines() if line.startswith("clseave")]
    assert len(errors) == 1 and "process 0 of 2 cannot reach the others" in errors[0], outputs
    assert "Traceback" not in outputs[0] and not out.exists()

    team = start_team(*again, folder=tmp_path / "stopped")
    _wait_for_state(team[0], out, 6)
    team[1].signal(signal.SIGTERM)
    assert "state saved in" in _ended(team, 130, 130)[0]

    outputs = _ended(start_team(*again, folder=tmp_path / "resumed"), 0, 0)
    assert "resuming at step" in outputs[0]
    assert (model_files(out), metrics_of(out / "training")) == reference


@pytest.mark.parametrize("more", [(), ("--guided-control", "shuffle")], ids=["plain", "guided"])
@pytest.mark.parametrize("stage", ["pretrain"], indirect=True)
def test_contrastive_loss_sees_the_embeddings_of_all(stage, more, tmp_path, world, clseave):
    name, arguments = stage
    data, images = write_captions(world, tmp_path / "captions"), str(world / "images")
    arguments = [*arguments, "--data", str(data), "--images", images, *more]
    arguments += ["--guided", images] if more else []
    code, _, err = clseave(*arguments, "--out", tmp_path / "alone")
    assert code == 0, err
    _ended(start_team(*arguments, folder=tmp_path / "outputs"), 0, 0)
    _assert_close(tmp_path / "runs" / NAMES[name], tmp_path / "alone")


@pytest.mark.parametrize("num_items", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_cover_everything_in_order(num_items, count):
    items = np.arange(10, 10 + num_items)
    shares = [Processes(rank, count).shard(items) for rank in range(count)]
    assert all(len(share) for share in shares) or not num_items
    assert np.concatenate(shares)[:num_items].tolist() == items.tolist()


def test_without_a_launcher_nothing_changes():
    alone = Processes()
    value = torch.ones(2, 3, requires_grad=True)
    assert alone.gather(lambda: value, 2) is value
    assert alone.any(True, False) == (True, False)
    assert alone.once(lambda: 5) == 5


def test_an_incomplete_launcher_is_an_error(monkeypatch, refused, world, clip, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    processes.cache_clear()
    error = refused("finetune-ve", "--data", world, "--clip", clip, "--runs", tmp_path)
    assert "cannot reach the others" in error and "MASTER_ADDR" in error


@pytest.mark.parametrize("command", ["demo", "evaluate", "predict", "compare"])
def test_commands_for_one_process_say_so(monkeypatch, refused, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    more = {"predict": ["x.jpg", "x"], "compare": ["a", "b"]}.get(command, [])
    error = refused(command, *more, code=2)
    assert error == f"clseave: {command}: runs in one process; start it without a launcher."


@pytest.mark.parametrize("stage", ["align"], indirect=True)
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        # --multi_gpu is what makes it start several; without a GPU they compute on the CPU.
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_the_launchers_start_it(stage, launcher, tmp_path):
    pytest.importorskip(launcher[0].partition(".")[0])
    _, arguments = stage
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "clseave_cli", *arguments, "--max-steps", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # One of the two writes and speaks; the teacher's sentences were shared out.
    assert len(re.findall(r"align de\+nl: epoch 1/\d+: loss", done.stderr)) == 1
    assert load_file(tmp_path / "runs" / "align-de+nl" / "projection.safetensors")
