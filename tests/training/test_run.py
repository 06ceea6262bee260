import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_world import Notes, full_disk, tree

from clseave_cli.core import files
from clseave_cli.core.config import FinetuneConfig, TrainingConfig
from clseave_cli.core.files import require_replaceable
from clseave_cli.core.training.run import (
    UNFINISHED,
    Run,
    finished_before,
    is_complete,
    model_kind,
)
from clseave_cli.errors import ClseaveError, UsageError

INPUTS = {"data": "d1", "clip": "c1"}


def _run(out, inputs=INPUTS, **options):
    return Run("stage", out, TrainingConfig(**options), inputs)


def _open(*arguments, **options):
    """Opens a run and leaves it unfinished."""
    with _run(*arguments, **options):
        pass


def _publish(run, text="weights"):
    with run:
        _publish_in(run, text)


def _publish_in(run, text):
    for name in ("metrics.jsonl", "summary.json"):
        (run.folder / name).write_text("{}\n")

    def save(folder):
        (folder / "model").write_text(text)
        (folder / "config.json").write_text('{"files": {"model": "digest"}}')

    run.publish(save, "# card\n")


def test_a_run_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    out = tmp_path / "runs" / "model"
    with _run(out, seed=3) as run:
        assert not out.exists() and run.folder.is_dir()
        assert not is_complete(out)
    _publish(_run(out, seed=3, resume=True))
    assert is_complete(out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert (out / "model").read_text() == "weights"
    assert (out / "README.md").read_text() == "# card\n"
    record = json.loads((out / "training" / "run.json").read_text())
    assert record["options"]["seed"] == 3 and record["inputs"] == INPUTS
    assert set(record["versions"]) >= {"clseave", "torch", "transformers"}


def test_an_unfinished_run_is_neither_overwritten_nor_mixed(tmp_path, monkeypatch):
    """G6: a folder by another name is the same folder."""
    out = tmp_path / "model"
    _open(out)
    with pytest.raises(UsageError, match=r"there is an unfinished run; --resume continues"):
        _open(out)
    with pytest.raises(UsageError, match=r"was run with epochs = 10, not 3; resume with the same"):
        _open(out, resume=True, epochs=3)
    with pytest.raises(UsageError, match=r"was run with data = 'd1', not 'd2'"):
        _open(out, INPUTS | {"data": "d2"}, resume=True)
    _open(out, resume=True, device="cpu", checkpoint_minutes=1.0)

    def start(data, **options):
        with Run("stage", tmp_path / "run", FinetuneConfig(data=data, **options), INPUTS):
            pass

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    start("data")
    for name in ("data/", "./data", f"{tmp_path}/data"):
        start(name, resume=True)
    with pytest.raises(UsageError, match="was run with data = 'data', not 'd'"):
        start("d", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_never_train_into_one_folder(tmp_path, resume):
    """G3."""
    out = tmp_path / "model"
    with _run(out) as run:
        (run.folder / "state-00000001").mkdir()
        before = tree(tmp_path)
        message = r"model: another process is writing it; let it end"
        with pytest.raises(ClseaveError, match=message) as error:
            _open(out, resume=resume)
        assert error.value.exit_code == 1
        assert tree(tmp_path) == before and (run.folder / "state-00000001").is_dir()
        _open(tmp_path / "model2")
        _publish(_run(tmp_path / "mode"))
    _open(out, resume=True)


def test_a_run_that_ends_by_an_error_is_resumed_at_once(tmp_path):
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt) as kept, _run(out):
        raise KeyboardInterrupt
    with pytest.raises(UsageError) as refused:
        _open(out, INPUTS | {"data": "d2"}, resume=True)
    _open(out, resume=True)
    assert kept.tb and refused.tb  # they hold the frames, and with them the runs


def _touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_what_kills_left_of_a_run_goes_when_it_is_resumed(tmp_path):
    """G4: and nothing of another run, or of the user's."""
    out, training = tmp_path / "align-de", tmp_path / "align-de.partial" / "training"
    for name in ("align-de", "align-de+nl"):
        _open(tmp_path / name)
    _touch(
        training / "state-00000012" / "state.json",
        tmp_path / ".align-de.original" / "a user's",
        tmp_path / ".align-de.clseave-original" / "a user's",
        tmp_path / ".align-de+nl.clseave-abcd1234" / "config.json",
        tmp_path / "align-de+nl.partial" / "training" / ".state-00000012.clseave-abcd1234" / "x",
    )
    kept = tree(tmp_path)
    _touch(
        training / ".state-00000012.clseave-abcd1234" / "state.json",
        training / ".summary.json.clseave-abcd1234",
        tmp_path / ".align-de.clseave-abcd1234" / "text" / "config.json",
        tmp_path / ".align-de.partial.clseave-abcd1234" / "training" / "run.json",
        tmp_path / ".align-de.lock",
    )
    with pytest.raises(UsageError):
        _open(out, seed=5, resume=True)
    assert (training / ".summary.json.clseave-abcd1234").exists()
    _open(out, resume=True)
    assert tree(tmp_path) == kept


@pytest.mark.parametrize("place", ["notes.txt", "training/notes.txt"])
@pytest.mark.parametrize("folder", ["model", "model.partial"])
def test_a_file_of_the_users_is_named_and_kept(tmp_path, folder, place):
    """G2: before the work, and before the model is put in place."""
    out, notes = tmp_path / "model", tmp_path / folder / place
    message = rf"{folder}/{place}: clseave did not write it"
    _publish(_run(out))
    with _run(out) as run:
        _touch(notes)
        kind = UNFINISHED if folder.endswith(".partial") else model_kind("stage")
        with pytest.raises(UsageError, match=message):
            require_replaceable(tmp_path / folder, kind)
        with pytest.raises(UsageError, match=message):
            _publish_in(run, "new")
    assert notes.exists() and (out / "model").read_text() == "weights"
    notes.unlink()
    _publish(_run(out, resume=True), "new")
    assert (out / "model").read_text() == "new"


def test_a_resumed_run_goes_on_with_its_number_of_threads(tmp_path, monkeypatch):
    """G6: another number adds up in another order, and ends in other weights."""
    numbers = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    _open(tmp_path / "model")
    numbers.append(1)
    with _run(tmp_path / "model", resume=True):
        assert numbers[-1] == 3
    assert numbers[-1] == 1


def test_a_full_disk_keeps_the_old_model_and_the_unfinished_run(tmp_path, monkeypatch):
    """G4."""
    out = tmp_path / "model"
    _publish(_run(out), "old")
    _open(out)
    run = _run(out, resume=True)
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(ClseaveError, match=r"model: the disk is full; existing files are un"):
        _publish(run, "new")
    monkeypatch.undo()
    assert (out / "model").read_text() == "old"
    assert run.folder.is_dir() and not is_complete(out)
    _publish(run, "new")
    assert (out / "model").read_text() == "new" and is_complete(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kill_while_clearing_up_leaves_a_complete_model(tmp_path, monkeypatch):
    out = tmp_path / "model"
    rmtree = shutil.rmtree

    def killed(path, **more):
        if Path(path).name.startswith(".model.partial."):
            raise KeyboardInterrupt
        rmtree(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            _publish(_run(out))
    assert is_complete(out) and len(list(tmp_path.iterdir())) == 2
    notes = Notes()
    assert finished_before(out, notes) and notes.lines == [f"{out}: already complete."]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not finished_before(tmp_path / "other", notes)
