"""Stages stopped and killed through the real command, and resumed: as if nothing had happened."""

import os
import signal
import subprocess
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
    stage_command,
    tree,
)


@pytest.fixture(scope="module", params=["finetune-ve", "align"])
def stage(request, tmp_path_factory, world, trained, clip, encoder):
    """A stage's command by runs folder, and what it makes uninterrupted."""
    from clseave_cli import main as program

    model = clip if request.param == "finetune-ve" else encoder

    def command(runs):
        return stage_command(
            request.param, world, trained, model, "--runs", runs, "--epochs", "4",
            "--batch-size", "4", "--learning-rate", "2e-3",
        )  # fmt: skip

    runs = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("sys.argv", ["clseave", *command(runs)])
        with pytest.raises(SystemExit) as end:
            program.main()
    assert not end.value.code
    (reference,) = runs.iterdir()
    return command, reference


@pytest.fixture
def attempt(stage, tmp_path):
    """The command, the folder it writes, and what has to be in there in the end."""
    command, reference = stage
    return command(tmp_path / "runs"), tmp_path / "runs" / reference.name, reference


def _steps(out):
    """Steps that an unfinished run has recorded."""
    metrics = out.with_name(out.name + ".partial") / "training" / "metrics.jsonl"
    return metrics.read_text().count('"learning_rate"') if metrics.exists() else 0


def _assert_same(reference, out):
    assert model_files(out) == model_files(reference)
    assert metrics_of(out / "training") == metrics_of(reference / "training")
    assert list(out.parent.iterdir()) == [out]


def test_a_run_stopped_and_killed_again_and_again_ends_in_the_same_weights(
    attempt, tmp_path, clseave
):
    """G6."""
    command, out, reference = attempt
    num_steps = len(
        [record for record in metrics_of(reference / "training") if "dev" not in record]
    )
    ends = (
        (signal.SIGKILL, 1),
        (signal.SIGTERM, num_steps // 4),
        (signal.SIGKILL, num_steps // 2),
        (signal.SIGINT, 3 * num_steps // 4),
        (signal.SIGKILL, num_steps),
    )
    for number, step in ends:
        # A stop saves the state by itself.
        saving = ["--checkpoint-minutes", "0"] if number == signal.SIGKILL else []
        process = CommandProcess(
            *command, "--resume", *saving, folder=tmp_path / str(step), before=slow_steps
        )
        process.wait_until(lambda step=step: _steps(out) >= step)
        process.signal(number)
        if number == signal.SIGKILL:
            # The last one may have come too late, which is a moment too.
            assert process.wait() in (-signal.SIGKILL, 0), process.stderr
            continue
        assert process.wait() == 130 and not out.exists()
        last_line = process.stderr.splitlines()[-1]
        assert last_line.startswith(f"clseave: {command[0]}")
        assert "the same command with --resume" in last_line
        assert number == signal.SIGTERM or "resuming at step" in process.stderr
        assert "Traceback" not in process.stderr
        code, _, err = clseave(*command)
        assert code == 2 and "there is an unfinished run; --resume continues it" in err
    code, _, err = clseave(*command, "--resume")
    assert code == 0, err
    _assert_same(reference, out)


def _hidden(runs):
    """What lies hidden in a runs folder, however deep; not what is in there again."""
    hidden = [path.relative_to(runs) for path in runs.rglob(".*") if path.suffix != ".lock"]
    return [
        path.as_posix()
        for path in hidden
        if not any(parent.name.startswith(".") for parent in path.parents)
    ]


@pytest.mark.parametrize("stage", ["align"], indirect=True)
def test_kills_while_something_is_written_do_not_fill_the_disk(attempt, tmp_path, clseave):
    """G4."""
    command, out, reference = attempt
    command = [*command, "--checkpoint-minutes", "0", "--resume"]
    for kill in (killed_while_saving, killed_while_publishing):
        process = CommandProcess(*command, folder=tmp_path / kill.__name__, before=kill)
        assert process.wait() == -signal.SIGKILL, process.stderr
        (left,) = _hidden(out.parent)
        assert ".clseave-" in left
    code, _, err = clseave(*command)
    assert code == 0, err
    _assert_same(reference, out)


def test_a_file_system_that_takes_no_more(attempt, tmp_path, clseave):
    command, out, reference = attempt
    process = CommandProcess(*command, folder=tmp_path / "outputs", before=small_files)
    assert process.wait() == 1 and not out.exists()
    errors = [line for line in process.stderr.splitlines() if line.startswith("clseave:")]
    assert len(errors) == 1 and f"{out}: the disk is full" in errors[0], process.stderr
    assert "Traceback" not in process.stderr
    code, _, err = clseave(*command, "--resume")
    assert code == 0, err
    _assert_same(reference, out)


@pytest.mark.parametrize("stage", ["align"], indirect=True)
def test_a_run_under_way_is_left_alone(attempt, tmp_path, refused):
    """G3."""
    command, out, reference = attempt
    command = [*command, "--checkpoint-minutes", "0"]
    process = CommandProcess(*command, folder=tmp_path / "outputs", before=slow_steps)
    process.wait_until(lambda: _steps(out) >= 5)
    process.signal(signal.SIGSTOP)  # which takes effect a little later
    state = ["ps", "-o", "state=", "-p", str(process.process.pid)]
    process.wait_until(lambda: "T" in subprocess.run(state, capture_output=True, text=True).stdout)
    for more in ([], ["--resume"]):
        before = tree(out.parent)
        error = refused(*command, *more)
        assert f"{out}: another process is writing it; let it end or stop" in error
        assert tree(out.parent) == before
    process.signal(signal.SIGCONT)
    assert process.wait() == 0, process.stderr
    _assert_same(reference, out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB; skips where we may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def test_a_disk_that_is_really_full(stage, small_disk, refused, monkeypatch, tmp_path):
    command, reference = stage
    (small_disk / "precious").write_text("older work")
    error = refused(*command(small_disk), "--checkpoint-minutes", "0")
    assert "the disk is full; existing files are untouched. Free some space" in error
    assert str(small_disk) in error
    assert (small_disk / "precious").read_text() == "older work"
    left = [path.name for path in small_disk.iterdir()]
    assert reference.name not in left and not any(name.startswith(".") for name in left)

    monkeypatch.setenv("CLSEAVE_CACHE", str(small_disk / "cache"))
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    error = refused(*command(tmp_path / "runs"))
    assert "the disk is full" in error and "cache" in error
