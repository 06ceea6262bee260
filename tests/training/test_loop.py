import functools
import json
import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_task import Task
from tiny_world import Killed, Notes, flip_byte, full_disk, killed_at_step, metrics_of, read_jsonl
from torch import nn

from clseave_cli.core.training import checkpoint, loop
from clseave_cli.core.training.loop import Selection, batches, learning_rate_factor
from clseave_cli.errors import ClseaveError, Interrupted, ModelError, TrainingError


@pytest.mark.parametrize(("num_examples", "size"), [(1, 8), (8, 8), (9, 8), (100, 7), (64, 1)])
def test_an_epoch_covers_every_example_once_in_even_batches(num_examples, size):
    parts = batches(num_examples, size, seed=3, epoch=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_examples))
    lengths = [len(part) for part in parts]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return np.concatenate(batches(50, 8, seed=seed, epoch=epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 1) != order(0, 0) != order(1, 0) != order(0, 1)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # Four steps of warm-up: quarters up, then what is worked out by hand.
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 4, [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", 4, [0.25, 0.5, 0.75, 1, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ("linear", 0, [1, 2 / 3, 1 / 3]),
        ("cosine", 2, [0.5, 1]),  # nothing but warm-up
    ],
)
def test_rates_by_hand(schedule, warmup, expected):
    total = len(expected)
    rates = [learning_rate_factor(n, total=total, warmup=warmup, schedule=schedule)
             for n in range(total)]  # fmt: skip
    assert rates == pytest.approx(expected)


def test_a_tiny_batch_is_learnt_by_heart(tmp_path):
    task = Task(num_examples=8)
    result = task.run(tmp_path, epochs=150, batch_size=8, learning_rate=0.03, schedule="constant")
    assert result.dev["loss"] < 0.01
    assert (task.module(task.inputs).argmax(dim=1) == task.labels).all()


def test_every_epoch_sees_every_example_and_is_recorded_with_the_documented_keys(tmp_path):
    task = Task()
    result = task.run(tmp_path)
    for epoch in np.array_split(np.array(task.seen, dtype=object), 3):
        assert sorted(row for part in epoch for row in part) == list(range(20))
    assert (result.pairs, result.steps, result.epochs) == (60, 12, 3)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    steps = [record for record in records if "dev" not in record]
    epochs = [record for record in records if "dev" in record]
    for record in steps:
        assert list(record) == [
            "stage", "step", "epoch", "loss", "learning_rate", "pairs_per_second",
        ]  # fmt: skip
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert steps[0]["learning_rate"] == pytest.approx(0.01)  # one step of warm-up
    assert steps[-1]["learning_rate"] == pytest.approx(0.01 / 11)
    # The recorded loss is the mean so far this epoch.
    counts = [len(rows) for rows in task.seen[:4]]
    means = [np.average(task.losses[:n], weights=counts[:n]) for n in range(1, 5)]
    assert [record["loss"] for record in steps[:4]] == pytest.approx(means, rel=1e-6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) >= {
        "pairs", "epochs", "wall_seconds", "pairs_per_second", "peak_memory_bytes",
        "best_epoch", "dev",
    }  # fmt: skip
    assert summary["pairs"] == 60 and summary["dev"] == result.dev
    assert summary["peak_memory_bytes"] > 1 << 20


@pytest.mark.parametrize("accumulation", [2, 3, 50])
def test_accumulation_changes_nothing(tmp_path, accumulation):
    whole, parts = Task(), Task()
    whole.run(tmp_path / "whole", clip_norm=0.5)
    parts.run(tmp_path / "parts", clip_norm=0.5, accumulation=accumulation)
    assert len(parts.seen) > len(whole.seen)
    torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-4, atol=1e-6)
    losses, expected = (
        [record["loss"] for record in metrics_of(tmp_path / name)] for name in ("parts", "whole")
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_gradient_norm_is_clipped(tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(*arguments, **more):
        gradients = [parameter.grad for parameter in task.module.parameters()]
        norms.append(nn.utils.get_total_norm(gradients).item())
        return step(*arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip_norm in (None, 0.05):
        task = Task()
        task.run(tmp_path / str(clip_norm), epochs=1, batch_size=20, clip_norm=clip_norm)
    free, clipped = norms
    assert free > 0.05 and clipped == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("dev", "epochs", "best", "early"), [([1.0, 0.9, 0.95], 5, 2, True), ([1.0, 1.1], 2, 1, False)]
)
def test_patience_one_stops_at_the_first_rise(tmp_path, dev, epochs, best, early):
    """Running out of epochs is not stopping early."""
    task, notes = Task(), Notes()
    task.dev = list(dev)
    result = task.run(tmp_path, epochs=epochs, patience=1, progress=notes)
    assert result.stopped_early == early == ("stopped early: no better dev" in notes.text)
    assert (result.epochs, result.best_epoch) == (len(dev), best)


def test_selection_by_the_highest_metric():
    assert Selection("accuracy", "highest").better(0.5, None)
    assert Selection("accuracy", "highest").better(0.6, 0.5)
    assert not Selection("accuracy", "highest").better(0.5, 0.5)
    assert not Selection("loss", "lowest").better(0.5, 0.5)


def _lose_inputs(value, at):
    return lambda task, step: task.inputs.fill_(value) if step == at else None


def _lose_weights(task, step):
    if step == 4:
        next(task.module.parameters()).register_hook(lambda gradient: gradient * float("nan"))


#: One step an epoch: no loss is computed from the weights that this step leaves.
_ONE_STEP = {"epochs": 1, "batch_size": 20, "learning_rate": 1e39}


@pytest.mark.parametrize(
    ("lose", "options", "message", "kept"),
    [
        (_lose_inputs(float("nan"), at=6), {}, "the loss is not", 6),
        (_lose_inputs(float("inf"), at=3), {}, "the loss is not", 3),
        (_lose_weights, {}, "a weight is not", 4),  # in the step before a save
        (lambda task, step: None, _ONE_STEP, "a weight is not", 0),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, lose, options, message, kept):
    task = Task()
    task.steps.append(functools.partial(lose, task))
    with pytest.raises(
        TrainingError, match=f"^task de: {message} finite at step {kept + 1}; lower"
    ):
        task.run(tmp_path, checkpoint_minutes=0, **options)
    assert [state.name for state in tmp_path.glob("state-*")] == [f"state-{kept:08}"] * bool(kept)
    for state in tmp_path.glob("state-*"):
        weights = load_file(state / "module.safetensors")
        assert all(value.isfinite().all() for value in weights.values())
    records = read_jsonl(tmp_path / "metrics.jsonl") if kept else []
    assert all(np.isfinite(record["loss"]) for record in records)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dev_metric_that_is_not_finite_ends_the_run(tmp_path, value):
    task = Task()
    task.dev = [0.6, value, 0.4]
    message = "^task de: the dev metric loss is not finite at step 8;"
    with pytest.raises(TrainingError, match=message):
        task.run(tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [({"max_steps": 6}, 6, 2), ({"stop_epoch": 2}, 8, 2), ({"stop_epoch": 9}, 12, 3)],
)
def test_a_run_that_stops_before_its_last_epoch_keeps_the_schedule(
    tmp_path, uninterrupted, options, steps, epochs
):
    def step_records(records):
        return [record for record in records if "dev" not in record]

    task, resumed = _task(), _task()
    result = task.run(tmp_path / "whole", **options)
    assert (result.steps, result.epochs) == (steps, epochs)
    records = step_records(metrics_of(tmp_path / "whole"))
    assert records == step_records(uninterrupted[2])[:steps]
    _killed_after(5, _task(), tmp_path / "killed", **options)
    assert resumed.run(tmp_path / "killed", resume=True, **options).dev == result.dev
    assert torch.equal(resumed.weights, task.weights)


@pytest.mark.parametrize(("keep", "kept"), [("best", 2), ("last", 4)])
def test_which_weights_are_kept(tmp_path, keep, kept):
    """Patience counts from the best epoch either way, across a resumed run too."""
    task, weights = Task(), []
    task.dev = [3.0, 1.0, 2.0, 1.5, 0.5]
    task.at_epoch_end.append(lambda: weights.append(task.weights))
    options = {"epochs": 9, "patience": 2, "keep": keep}
    result = task.run(tmp_path / "whole", **options)
    assert (result.epochs, result.best_epoch, result.stopped_early) == (4, kept, True)
    assert result.dev == {"loss": [3.0, 1.0, 2.0, 1.5][kept - 1]}
    assert torch.equal(task.weights, weights[kept - 1]) and not torch.equal(*weights[1::2])
    assert not task.module.training
    killed = Task()
    killed.dev = [3.0, 1.0, 2.0]
    _killed_after(13, killed, tmp_path / "killed", **options)
    resumed = Task()
    resumed.dev = [1.5, 0.5]
    assert resumed.run(tmp_path / "killed", resume=True, **options).best_epoch == kept
    assert torch.equal(resumed.weights, task.weights)


# --- resuming ---


def _task():
    return Task(dropout=0.3)


def _killed_after(steps, task, folder, **options):
    """Runs a task until so many steps are done and saved; returns the state's folder."""
    with killed_at_step(steps + 1):
        task.run(folder, checkpoint_minutes=0, **options)
    (state,) = folder.glob("state-*")
    return state


def _assert_resumes(folder, uninterrupted, expected_note=""):
    """Asserts that a run, resumed, ends as the uninterrupted one."""
    task, notes = _task(), Notes()
    result = task.run(folder, notes, resume=True)
    reference, expected, records = uninterrupted
    assert expected_note in notes.text
    assert torch.equal(task.weights, reference.weights)
    assert (result.steps, result.pairs, result.dev) == (
        expected.steps, expected.pairs, expected.dev,
    )  # fmt: skip
    assert metrics_of(folder) == records
    return task


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    task = _task()
    return task, task.run(folder), metrics_of(folder)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 9])
def test_other_parameters_are_frozen_at_first(tmp_path, step):
    """For an epoch and a half of four steps each, whenever the run is interrupted."""
    whole, killed, resumed = tasks = [_task() for _ in range(3)]
    for task in tasks:
        task.trained_first, task.freeze_epochs = tuple(task.module[3].parameters()), 1.5
    first = whole.module[0].weight
    initial = first.detach().clone()

    def assert_frozen(done):
        assert first.requires_grad == (done >= 6)
        assert torch.equal(first, initial) == (done <= 6)

    whole.steps.append(assert_frozen)
    whole.run(tmp_path / "whole")
    assert first.requires_grad
    state = _killed_after(step, killed, tmp_path / "parts")
    assert len(load_file(state / "module.safetensors")) == 4
    moments = {name.split(".")[0] for name in load_file(state / "optimizer.safetensors")}
    assert len(moments) == (2 if step <= 6 else 4)
    resumed.run(tmp_path / "parts", resume=True)
    assert torch.equal(resumed.weights, whole.weights)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_states_hold_what_is_trained(tmp_path):
    whole, killed, resumed = tasks = [_task() for _ in range(3)]
    for task in tasks:
        task.module[0].requires_grad_(False)
    whole.run(tmp_path / "whole")
    state = _killed_after(9, killed, tmp_path / "parts")
    for name in ("module", "best"):
        assert set(load_file(state / f"{name}.safetensors")) == {"3.weight", "3.bias"}
    resumed.run(tmp_path / "parts", resume=True)
    assert torch.equal(resumed.weights, whole.weights)
    # Those of earlier versions hold everything.
    checkpoint.restore(resumed.module, Task().module.state_dict())
    for strange in ({"4.weight": torch.zeros(1)}, {"3.weight": resumed.module[3].weight}):
        with pytest.raises(RuntimeError, match="another module, which differs in"):
            checkpoint.restore(resumed.module, strange)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 8, 11])
def test_resuming_after_a_kill_is_as_if_it_had_not_happened(tmp_path, uninterrupted, step):
    _killed_after(step, _task(), tmp_path)
    torch.manual_seed(99)  # another process has another state of the generator
    assert len(_assert_resumes(tmp_path, uninterrupted).seen) == 12 - step


@pytest.mark.parametrize("max_steps", [None, 6])
def test_resuming_after_a_kill_in_the_last_dev_evaluation(tmp_path, max_steps):
    # All steps are done and saved, and the last epoch's weights may yet be the best.
    reference, killed, task = _task(), _task(), _task()
    result = reference.run(tmp_path / "whole", max_steps=max_steps)
    epochs = iter(range(result.epochs - 1))

    def kill():
        if next(epochs, None) is None:
            raise Killed

    killed.at_epoch_end.append(kill)
    with pytest.raises(Killed):
        killed.run(tmp_path / "killed", max_steps=max_steps, checkpoint_minutes=0)
    resumed = task.run(tmp_path / "killed", resume=True, max_steps=max_steps)
    assert task.seen == []
    assert (resumed.epochs, resumed.best_epoch, resumed.dev) == (
        result.epochs, result.best_epoch, result.dev,
    )  # fmt: skip
    assert torch.equal(task.weights, reference.weights)


def test_records_that_were_lost_are_not_replaced_by_anything(tmp_path, uninterrupted):
    _killed_after(5, _task(), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # as a power cut may leave it
    _task().run(tmp_path, resume=True)
    records = uninterrupted[2]
    assert metrics_of(tmp_path) == records[:3] + records[6:]


def test_the_records_are_on_the_disk_before_the_state_is(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(ClseaveError, match="the disk is full"):
        Task().run(tmp_path, checkpoint_minutes=0)
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]


def _fake_gpus(monkeypatch, *numbers):
    """The random states of GPUs, as one process sees them, for what asks torch for them."""
    states = [torch.tensor([number], dtype=torch.uint8) for number in numbers]

    def index(gpu):
        return gpu if isinstance(gpu, int) else torch.device(gpu).index

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu: states[index(gpu)])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, gpu: states.__setitem__(index(gpu), state)
    )
    return states


def test_every_process_goes_on_with_the_random_numbers_of_the_first_ones_gpu(tmp_path, monkeypatch):
    # The first process has used its GPU, number 0, and never that of the second.
    module = nn.Linear(2, 2)
    trained = module, torch.optim.AdamW(module.parameters()), torch.amp.GradScaler("cpu")
    _fake_gpus(monkeypatch, 7, 0)
    first = checkpoint.Trainee(*trained, torch.device("cuda:0"))
    checkpoint.save_state(tmp_path, checkpoint.LoopState(step=1), first, None)
    for gpu, expected in enumerate(([7, 2], [1, 7])):
        states = _fake_gpus(monkeypatch, 1, 2)
        checkpoint.load_state(tmp_path, checkpoint.Trainee(*trained, torch.device("cuda", gpu)))
        assert [int(state) for state in states] == expected


@pytest.fixture
def strict(monkeypatch):
    """Algorithms are deterministic until the restriction is lifted, as on a GPU."""

    @contextmanager
    def deterministic(device):
        torch.use_deterministic_algorithms(True)
        try:
            yield lambda: torch.use_deterministic_algorithms(False)
        finally:
            torch.use_deterministic_algorithms(False)

    monkeypatch.setattr(loop, "deterministic", deterministic)


def _has_none(*_):
    """Stands for something that has no deterministic algorithm."""
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("task_backward does not have a deterministic implementation")


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_run_without_a_deterministic_algorithm_goes_on_and_notes_it_once(
    tmp_path, strict, uninterrupted, step
):
    """The attempt draws random numbers, so there is one in a run, resumed or not."""
    failing, whole, killed, resumed = tasks = [_task() for _ in range(4)]
    failing.steps.append(_has_none)
    notes = Notes()
    failing.run(tmp_path / "failing", notes)
    assert notes.text.count("no deterministic algorithm") == 1
    assert torch.equal(failing.weights, uninterrupted[0].weights)
    for task in tasks[1:]:
        task.module.register_forward_hook(_has_none)
    whole.run(tmp_path / "whole")
    _killed_after(step, killed, tmp_path / "killed")
    notes = Notes()
    resumed.run(tmp_path / "killed", notes, resume=True, checkpoint_minutes=0)
    assert "resuming at step" in notes.text and "no deterministic" not in notes.text
    assert torch.equal(resumed.weights, whole.weights)


def test_another_error_of_a_step_is_not_swallowed(tmp_path, strict):
    def fail(_):
        raise RuntimeError("shapes do not match")

    task = Task()
    task.steps.append(fail)
    with pytest.raises(RuntimeError, match="shapes"):
        task.run(tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resuming_in_mixed_precision(tmp_path, precision):
    def overflowing():
        task = _task()

        def overflow(gradient):
            # Once, in step 3: the step is left out, and fp16's scale goes down for good.
            return gradient * float("inf") if len(task.seen) == 3 and precision == "fp16" else None

        task.module[0].weight.register_hook(overflow)
        task.module[3].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
        return task

    def scaler(folder):
        return json.loads((folder / "state-00000012" / "state.json").read_text())["scaler"]

    types = set()
    options = {"precision": precision, "checkpoint_minutes": 0}
    whole, resumed = overflowing(), overflowing()
    whole.run(tmp_path / "whole", **options)
    _killed_after(5, overflowing(), tmp_path / "killed", precision=precision)
    resumed.seen = whole.seen[:5]
    resumed.run(tmp_path / "killed", resume=True, **options)
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert torch.equal(resumed.weights, whole.weights)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert scaler(tmp_path / "killed") == scaler(tmp_path / "whole")
    if precision == "fp16":
        assert scaler(tmp_path / "whole")["scale"] == 2.0**15
        assert scaler(tmp_path / "whole")["_growth_tracker"] == 9
        assert whole.weights.isfinite().all()


def test_a_stop_signal_saves_and_says_how_to_go_on(tmp_path, uninterrupted):
    task = _task()
    task.steps.append(lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped at step 5, state saved in .*--resume"):
        task.run(tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000005"]
    _assert_resumes(tmp_path, uninterrupted)
    assert Interrupted("").exit_code == 130


def test_resuming_where_nothing_was_saved_starts_afresh(tmp_path, uninterrupted):
    _assert_resumes(tmp_path, uninterrupted, "no saved state to resume; starting afresh")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def interrupt_twice(step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    task = Task()
    task.steps.append(interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        task.run(tmp_path)
    assert len(task.seen) == 2


@pytest.fixture
def two_states(tmp_path):
    """The states of steps 5 and 6, as a kill between writing one and removing the other leaves."""
    folder, kept = tmp_path / "run", tmp_path / "kept"
    task, state = _task(), folder / "state-00000005"
    task.steps.append(lambda step: shutil.copytree(state, kept) if step == 5 else None)
    assert _killed_after(6, task, folder).name == "state-00000006"
    return kept.rename(state).parent


@pytest.mark.parametrize("file", ["module", "optimizer", "random", "best", "state", "missing"])
def test_of_two_states_the_sound_one_is_used(two_states, uninterrupted, file):
    state = two_states / "state-00000006"
    if file == "state":
        # Still JSON, but not what was saved.
        text = (state / "state.json").read_text()
        assert '"step": 6' in text
        (state / "state.json").write_text(text.replace('"step": 6', '"step": 7'))
    elif file == "missing":
        (state / "optimizer.safetensors").unlink()
    else:
        flip_byte(state / f"{file}.safetensors")
    _assert_resumes(two_states, uninterrupted, "resuming at step 5")


def test_a_damaged_state_alone_is_refused(two_states):
    for path in two_states.glob("state-*/module.safetensors"):
        flip_byte(path)
    with pytest.raises(ModelError, match=r"state-00000006: the saved training state is damaged"):
        _task().run(two_states, resume=True)


# --- a full disk ---


def test_a_full_disk_while_saving_keeps_the_last_good_state(tmp_path, monkeypatch, uninterrupted):
    def fill(step):
        if step == 5:
            monkeypatch.setattr(checkpoint, "write_json", full_disk)

    task = _task()
    task.steps.append(fill)
    with pytest.raises(ClseaveError, match=r"state-00000006: the disk is full.*same command again"):
        task.run(tmp_path, checkpoint_minutes=0)
    assert [path.name for path in tmp_path.glob("*state-*")] == ["state-00000005"]
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    _assert_resumes(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        # As safetensors says it.
        (SafetensorError("I/O error: No space left on device (os error 28)"), ClseaveError,
         "the disk is full"),
        (ValueError("a mistake of ours"), ValueError, "a mistake of ours"),
    ],
)  # fmt: skip
def test_only_a_full_disk_is_called_full(tmp_path, monkeypatch, error, raised, message):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(raised, match=message):
        Task().run(tmp_path, checkpoint_minutes=0)
    assert raised is ValueError or not list(tmp_path.glob("*state-*"))


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_goes_on_where_auto_means_another_precision(tmp_path, before, after):
    _killed_after(6, Task(), tmp_path, precision=before)
    assert Task().run(tmp_path, resume=True, precision=after).steps == 12
