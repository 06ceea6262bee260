"""Stages stopped and killed through the real command, and resumed: as if nothing had happened."""

import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from tiny_world import (
    CommandProcess,
    killed_while_publishing,
    killed_while_saving,
    metrics_of,
    model_files,
    slow_steps,
    small_files,
    tree,
)


def _arguments(stage, world, runs, trained, clip, encoder):
    shared = [
        "--data", world, "--runs", runs, "--epochs", "4", "--batch-size", "4", "--device", "cpu",
        "--precision", "fp32", "--learning-rate", "2e-3",
    ]  # fmt: skip
    if stage == "finetune-ve":
        arguments = ["finetune-ve", "--clip", clip, *shared, "--patience", "9"]
    else:
        arguments = ["align", "--lang", "de", "--lang", "nl", "--student", encoder, *shared]
        arguments += ["--teacher", trained / "clip-ve"]
    return [str(argument) for argument in arguments]


_NAMES = {"finetune-ve": "clip-ve", "align": "align-de+nl"}


@pytest.fixture(scope="module", params=["finetune-ve", "align"])
def stage(request, tmp_path_factory, world, trained, clip, encoder):
    """A stage's name, its arguments by runs folder, and what the uninterrupted run gives."""
    from clseave_cli import main as command

    runs = tmp_path_factory.mktemp("uninterrupted")

    def arguments(runs):
        return _arguments(request.param, world, runs, trained, clip, encoder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(runs / "cache"))
        patch.setattr("sys.argv", ["clseave", *arguments(runs)])
        with pytest.raises(SystemExit) as end:
            command.main()
    assert not end.value.code
    return request.param, arguments, runs / _NAMES[request.param]


def _steps(out):
    """Steps that an unfinished run has recorded."""
    metrics = out.with_name(out.name + ".partial") / "training" / "metrics.jsonl"
    if not metrics.exists():
        return 0
    text = metrics.read_text()
    return text.count('"learning_rate"')


def _wait_for_steps(process, out, number):
    deadline = time.monotonic() + 60
    while _steps(out) < number and process.alive:
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.005)


def _assert_same(reference, out):
    assert model_files(out) == model_files(reference)
    assert metrics_of(out / "training") == metrics_of(reference / "training")
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_as_if_uninterrupted(stage, number, tmp_path, clseave):
    """G6."""
    name, arguments, reference = stage
    out = tmp_path / "runs" / _NAMES[name]
    command = arguments(tmp_path / "runs")
    process = CommandProcess(*command, folder=tmp_path / "said", before=slow_steps)
    _wait_for_steps(process, out, 5)
    process.signal(number)
    assert process.wait() == 130
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"clseave: {name}") and "the same command with --resume" in last
    assert "Traceback" not in process.stderr
    assert not out.exists()

    code, _, err = clseave(*command)
    assert code == 2 and "an unfinished run lies there; --resume continues it" in err
    code, _, err = clseave(*command, "--resume")
    assert code == 0, err
    assert "resuming at step" in err
    _assert_same(reference, out)


def test_a_run_killed_again_and_again_ends_in_the_same_weights(stage, tmp_path, clseave):
    """G6."""
    name, arguments, reference = stage
    out = tmp_path / "runs" / _NAMES[name]
    command = [*arguments(tmp_path / "runs"), "--checkpoint-minutes", "0", "--resume"]
    last = len([r for r in metrics_of(reference / "training") if "dev" not in r])
    for kill, steps in enumerate((1, last // 2, last)):
        process = CommandProcess(*command, folder=tmp_path / str(kill), before=slow_steps)
        _wait_for_steps(process, out, steps)
        process.signal(signal.SIGKILL)
        # The last one may have come too late, which is a moment too.
        assert process.wait() in (-signal.SIGKILL, 0), process.stderr
    code, _, err = clseave(*command)
    assert code == 0, err
    _assert_same(reference, out)


def _hidden(runs):
    """What lies hidden in a runs folder, however deep; not what is in there again."""
    return [
        path.relative_to(runs).as_posix()
        for path in runs.rglob(".*")
        if path.suffix != ".lock"
        and not any(parent.name.startswith(".") for parent in path.relative_to(runs).parents)
    ]


@pytest.mark.parametrize("stage", ["align"], indirect=True)
def test_kills_while_something_is_written_do_not_fill_the_disk(stage, tmp_path, clseave):
    """G4."""
    name, arguments, reference = stage
    out = tmp_path / "runs" / _NAMES[name]
    command = [*arguments(tmp_path / "runs"), "--checkpoint-minutes", "0", "--resume"]
    for kill in (killed_while_saving, killed_while_publishing):
        process = CommandProcess(*command, folder=tmp_path / kill.__name__, before=kill)
        assert process.wait() == -signal.SIGKILL, process.stderr
        (left,) = _hidden(out.parent)
        assert ".clseave-" in left
    code, _, err = clseave(*command)
    assert code == 0, err
    _assert_same(reference, out)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("stage", ["align"], indirect=True)
def test_a_run_under_way_is_left_alone(stage, tmp_path, refused):
    """G3."""
    name, arguments, reference = stage
    out = tmp_path / "runs" / _NAMES[name]
    command = [*arguments(tmp_path / "runs"), "--checkpoint-minutes", "0"]
    process = CommandProcess(*command, folder=tmp_path / "said", before=slow_steps)
    _wait_for_steps(process, out, 5)
    process.signal(signal.SIGSTOP)
    for more in ([], ["--resume"]):
        before = tree(out.parent)
        error = refused(*command, *more)
        assert f"{out}: another process is writing it; let it end or stop" in error
        assert tree(out.parent) == before
    process.signal(signal.SIGCONT)
    assert process.wait() == 0, process.stderr
    _assert_same(reference, out)


def test_a_file_system_that_takes_no_more(stage, tmp_path, clseave):
    name, arguments, reference = stage
    out = tmp_path / "runs" / _NAMES[name]
    command = arguments(tmp_path / "runs")
    process = CommandProcess(*command, folder=tmp_path / "said", before=small_files)
    assert process.wait() == 1
    errors = [line for line in process.stderr.splitlines() if line.startswith("clseave:")]
    assert len(errors) == 1 and f"{out}: the disk is full" in errors[0], process.stderr
    assert "Traceback" not in process.stderr
    assert not out.exists()
    code, _, err = clseave(*command, "--resume")
    assert code == 0, err
    _assert_same(reference, out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB; skips where we may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def test_a_disk_that_is_really_full(stage, small_disk, refused):
    name, arguments, _ = stage
    out = small_disk / _NAMES[name]
    (small_disk / "precious").write_text("older work")
    error = refused(*arguments(small_disk), "--checkpoint-minutes", "0")
    assert "the disk is full; what was there before is untouched. Free some space" in error
    assert str(small_disk) in error
    assert (small_disk / "precious").read_text() == "older work"
    assert not out.exists()
    left = [path.name for path in small_disk.iterdir() if path.name.startswith(".")]
    assert left == []


def test_a_cache_on_a_full_disk(stage, small_disk, refused, monkeypatch, tmp_path):
    _, arguments, _ = stage
    filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
    with suppress(OSError):
        while os.write(filler, b"x" * 4096):
            pass
    os.close(filler)
    monkeypatch.setenv("CLSEAVE_CACHE", str(small_disk / "cache"))
    error = refused(*arguments(tmp_path / "runs"))
    assert "the disk is full" in error and "cache" in error
