import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_world import Notes, tree

from clseave_cli.core import files
from clseave_cli.core.config import TrainingConfig
from clseave_cli.core.training.run import Run, finished_before, is_complete, require_writable
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
        for name in ("metrics.jsonl", "summary.json"):
            (run.folder / name).write_text("{}\n")
        run.publish(lambda aside: (aside / "model").write_text(text), "# card\n")


def _full(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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


def test_an_unfinished_run_is_neither_overwritten_nor_mixed(tmp_path):
    out = tmp_path / "model"
    _open(out)
    with pytest.raises(UsageError, match=r"unfinished run lies there; --resume continues"):
        _open(out)
    with pytest.raises(UsageError, match=r"was run with epochs = 10, not 3; resume with the same"):
        _open(out, resume=True, epochs=3)
    with pytest.raises(UsageError, match=r"was run with data = 'd1', not 'd2'"):
        _open(out, INPUTS | {"data": "d2"}, resume=True)
    _open(out, resume=True, device="cpu", checkpoint_minutes=1.0)


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_never_train_into_one_folder(tmp_path, resume):
    out = tmp_path / "model"
    with _run(out) as run:
        (run.folder / "state-00000001").mkdir()
        before = tree(tmp_path)
        with pytest.raises(
            ClseaveError, match=r"model.partial: another process is training there; let it end"
        ) as error:
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


def test_a_lock_of_a_run_just_published_counts_for_nothing(tmp_path, monkeypatch):
    out = tmp_path / "model"
    run = _run(out)
    flock = fcntl.flock

    def late(descriptor, how):
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "model.partial")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ClseaveError, match="another process is training there"):
        _publish(run)
    _publish(run)
    assert is_complete(out)


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unknown(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unknown)
    _open(tmp_path / "model")
    _publish(_run(tmp_path / "model", resume=True))
    assert is_complete(tmp_path / "model")


def _lay(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def test_what_kills_left_of_a_run_goes_when_it_is_resumed(tmp_path):
    out, other = tmp_path / "align-de", tmp_path / "align-de+nl.partial"
    partial, training = tmp_path / "align-de.partial", tmp_path / "align-de.partial" / "training"
    for name in ("align-de", "align-de+nl"):
        _open(tmp_path / name)
    _lay(
        training / "state-00000012" / "state.json",
        training / ".state-00000012.ABCD_123" / "a user's",
        training / ".state-00000012.abcd_1234" / "a user's",
        training / ".another.abcd_123",
        partial / ".align-de.old.abcd_123" / "align-de" / "the only copy",
        tmp_path / ".align-de.original" / "a user's",
        tmp_path / ".align-de.partial.original" / "training" / "a user's",
        tmp_path / ".align-de.partial.abcd_123",
        tmp_path / ".align-de+nl.partial.abcd_123" / "align-de+nl.partial" / "lock",
        other / ".align-de.abcd_123" / "config.json",
        other / ".align-de+nl.abcd_123" / "config.json",
        other / "training" / ".state-00000012.abcd_123" / "state.json",
    )
    kept = tree(tmp_path)
    _lay(
        training / ".state-00000012.abcd_123" / "state.json",
        training / ".summary.json.abcd_123",
        partial / ".align-de.abcd_123" / "text" / "config.json",
        tmp_path / ".align-de.partial.abcd_124" / "align-de.partial" / "lock",
    )
    (tmp_path / ".align-de.partial.abcd_125").mkdir()
    _open(out, resume=True)
    assert tree(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.glob(".align-de.partial.*")) == [
        ".align-de.partial.abcd_123",
        ".align-de.partial.original",
    ]


def test_a_refused_run_clears_nothing_up(tmp_path):
    out = tmp_path / "model"
    left = tmp_path / "model.partial" / "training" / ".state-00000012.abcd_123"
    with _run(out):
        _lay(left / "state.json")
        with pytest.raises(ClseaveError, match="another process"):
            _open(out, resume=True)
    with pytest.raises(UsageError):
        _open(out, seed=5, resume=True)
    assert left.exists()


def test_a_full_disk_keeps_the_old_model_and_the_unfinished_run(tmp_path, monkeypatch):
    out = tmp_path / "model"
    _publish(_run(out), "old")
    _open(out)
    run = _run(out, resume=True)
    monkeypatch.setattr(files.os, "fsync", _full)
    with pytest.raises(ClseaveError, match=r"model: the disk is full; what was there before is un"):
        _publish(run, "new")
    monkeypatch.undo()
    assert (out / "model").read_text() == "old"
    assert run.folder.is_dir() and not is_complete(out)
    _publish(run, "new")
    assert (out / "model").read_text() == "new" and is_complete(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_puts_the_old_model_back(tmp_path, monkeypatch):
    out = tmp_path / "model"
    _publish(_run(out), "old")
    run = _run(out)
    rename = Path.rename

    def fail(path, target):
        if Path(target) == out and ".old." not in path.parent.name:
            _full()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ClseaveError, match="the disk is full"):
        _publish(run, "new")
    monkeypatch.undo()
    assert (out / "model").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.partial"]


def test_a_kill_while_clearing_up_leaves_a_complete_model(tmp_path, monkeypatch):
    out = tmp_path / "model"
    rmtree = shutil.rmtree

    def killed(path, **more):
        if path.name.startswith(".model.partial."):
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


def test_where_a_model_cannot_lie_is_found_out_first(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ClseaveError, match=r"file: is a file; expected a folder"):
            require_writable(out)
    require_writable(tmp_path / "new" / "b")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ClseaveError, match="cannot be written"):
        _open(tmp_path / "model")
