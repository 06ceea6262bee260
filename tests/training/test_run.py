import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from clseave_cli.core import files
from clseave_cli.core.config import TrainingConfig
from clseave_cli.core.training.run import Run, is_complete, require_writable
from clseave_cli.errors import ClseaveError, UsageError

INPUTS = {"data": "d1", "clip": "c1"}


def _run(out, inputs=INPUTS, **options):
    return Run("stage", out, TrainingConfig(**options), inputs)


def _publish(run, text="weights"):
    for name in ("metrics.jsonl", "summary.json"):
        (run.folder / name).write_text("{}\n")
    run.publish(lambda aside: (aside / "model").write_text(text), "# card\n")


def _full(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    out = tmp_path / "runs" / "model"
    run = _run(out, seed=3)
    assert not out.exists() and run.folder.is_dir()
    assert not is_complete(out)
    _publish(run)
    assert is_complete(out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert (out / "model").read_text() == "weights"
    assert (out / "README.md").read_text() == "# card\n"
    record = json.loads((out / "training" / "run.json").read_text())
    assert record["options"]["seed"] == 3 and record["inputs"] == INPUTS
    assert set(record["versions"]) >= {"clseave", "torch", "transformers"}


def test_an_unfinished_run_is_neither_overwritten_nor_mixed(tmp_path):
    out = tmp_path / "model"
    _run(out)
    with pytest.raises(UsageError, match=r"unfinished run lies there; --resume continues"):
        _run(out)
    with pytest.raises(UsageError, match=r"was run with epochs = 10, not 3; resume with the same"):
        _run(out, resume=True, epochs=3)
    with pytest.raises(UsageError, match=r"was run with data = 'd1', not 'd2'"):
        _run(out, INPUTS | {"data": "d2"}, resume=True)
    _run(out, resume=True, device="cpu", checkpoint_minutes=1.0)


def test_a_full_disk_keeps_the_old_model_and_the_unfinished_run(tmp_path, monkeypatch):
    out = tmp_path / "model"
    _publish(_run(out), "old")
    run = _run(out)
    monkeypatch.setattr(files.os, "fsync", _full)
    with pytest.raises(ClseaveError, match=r"model: the disk is full; what was there before is un"):
        _publish(run, "new")
    monkeypatch.undo()
    assert (out / "model").read_text() == "old"
    assert run.folder.is_dir() and not is_complete(out)
    _publish(_run(out, resume=True), "new")
    assert (out / "model").read_text() == "new" and is_complete(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rename_that_fails_puts_the_old_model_back(tmp_path, monkeypatch):
    out = tmp_path / "model"
    _publish(_run(out), "old")
    run = _run(out)
    rename = Path.rename

    def fail(path, target):
        if Path(target) == out and path.parent == out.parent:
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
    run = _run(out)

    def killed(_path, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: (
            None if ignore_errors else killed(path)
        ))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            _publish(run)
    assert is_complete(out)


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
        _run(tmp_path / "model")
