"""Trackers: the same numbers as metrics.jsonl, nothing else, and never a reason to stop."""

import sys
import types

import pytest
from tiny_task import Task
from tiny_world import Notes, read_jsonl

from clseave_cli.core.config import TrainingConfig
from clseave_cli.core.training import tracking
from clseave_cli.core.training.run import Run
from clseave_cli.errors import ClseaveError

SECRET = "hunter2"


def _train(folder, progress, **options):
    """Two epochs of two steps: six records."""
    defaults = {"epochs": 2, "batch_size": 4, "runs": folder / SECRET}
    return Task(num_examples=8).run(folder, progress, **(defaults | options))


class _Service:
    """Stands for the packages wandb and trackio, whose calls are alike."""

    def __init__(self, monkeypatch, name, fails_at=()):
        self.fails_at = fails_at
        self.calls, self.logged = [], []
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name, origin="here")
        module.init, module.Settings = self.init, dict
        monkeypatch.setitem(sys.modules, name, module)

    def _call(self, name):
        self.calls.append(name)
        sys.stdout.write(f"{name}: how chatty\n")
        if name in self.fails_at:
            raise RuntimeError("network is down\nand more")

    def init(self, **arguments):
        self.arguments = arguments
        self._call("init")
        return self

    def log(self, numbers, step):
        self._call("log")
        self.logged.append((step, numbers))

    def finish(self):
        self._call("finish")


@pytest.fixture(params=["wandb", "trackio"])
def name(request):
    return request.param


def _expected(folder):
    """What metrics.jsonl says, as step and flat numbers."""
    for record in read_jsonl(folder / "metrics.jsonl"):
        dev = {f"dev/{key}": value for key, value in record.pop("dev", {}).items()}
        step = record.pop("step")
        assert record.pop("stage") == "task"
        yield step, record | dev


def test_a_tracker_gets_the_metrics_of_the_record_and_numbers_only(
    tmp_path, monkeypatch, name, capsys
):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    service = _Service(monkeypatch, name)
    _train(tmp_path, Notes(), tracker=name)
    assert service.logged == list(_expected(tmp_path)) and len(service.logged) == 6
    assert service.calls[0] == "init" and service.calls[-1] == "finish"
    assert service.arguments["name"] == "task de"
    assert capsys.readouterr().out == ""  # standard output is the command's own
    assert service.arguments["config"]["learning_rate"] == 0.01
    assert all(isinstance(value, int | float) for value in service.arguments["config"].values())
    assert SECRET not in repr((service.arguments, service.logged))


@pytest.mark.parametrize(
    ("moments", "num_logged"), [(["init"], 0), (["log", "finish"], 1), (["finish"], 6)]
)
def test_a_tracker_that_fails_ends_nothing(tmp_path, monkeypatch, name, moments, num_logged):
    service, notes = _Service(monkeypatch, name, fails_at=moments), Notes()
    result = _train(tmp_path, notes, tracker=name)
    assert result.steps == 4 and len(read_jsonl(tmp_path / "metrics.jsonl")) == 6
    assert [line for line in notes.lines if "--tracker" in line] == [
        f"--tracker {name}: failed (network is down); the run continues without it; "
        "metrics.jsonl has everything."
    ]
    assert service.calls.count("log") == num_logged


def test_a_tracker_is_closed_when_the_run_fails(tmp_path, monkeypatch, name):
    service = _Service(monkeypatch, name)
    with pytest.raises(ClseaveError):
        _train(tmp_path, Notes(), tracker=name, learning_rate=1e30, schedule="constant", epochs=9)
    assert service.calls[-1] == "finish"


def test_a_missing_package_is_refused_before_the_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClseaveError, match=rf"^--tracker {name}: .*install -e '\.\[{name}\]"):
        Run("task", tmp_path / "model", TrainingConfig(tracker=name), {})
    assert list(tmp_path.iterdir()) == []


def test_another_tracker_is_no_other_run(tmp_path, monkeypatch, name):
    _Service(monkeypatch, name)
    for options in ({}, {"resume": True, "tracker": name}):
        with Run("task", tmp_path / "model", TrainingConfig(**options), {}):
            pass


def test_tensorboard_events_are_kept_with_the_model(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notes = Notes()
    with Run("task", tmp_path / "model", TrainingConfig(tracker="tensorboard"), {}) as run:
        _train(run.folder, notes, tracker="tensorboard")
        assert not [line for line in notes.lines if "--tracker" in line]
        run.publish(lambda aside: None, "# card\n")
    training = tmp_path / "model" / "training"
    events = EventAccumulator(str(training / tracking.TENSORBOARD_FOLDER))
    events.Reload()
    steps, expected = zip(*_expected(training), strict=True)
    shown = events.Scalars("loss")
    assert [event.step for event in shown] == list(steps)
    assert [event.value for event in shown] == pytest.approx([each["loss"] for each in expected])
    dev = [each["dev/loss"] for each in expected if "dev/loss" in each]
    assert [event.value for event in events.Scalars("dev/loss")] == pytest.approx(dev)
