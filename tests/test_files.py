"""The user's files: what may be replaced, by whom, and what an interruption at any point leaves."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import struct
import sys
from pathlib import Path

import pytest
from tiny_world import CommandProcess, read_jsonl, tree, write_captions, write_jsonl

from clseave_cli.core import files
from clseave_cli.core.files import atomic_file, atomic_folder, locked_target, require_replaceable
from clseave_cli.errors import ClseaveError

QUICK = ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def writers(world, trained, clip, encoder, tmp_path):
    """Every command that writes a folder, without the folder: arguments, and the option for it."""
    captioned = write_captions(world, tmp_path / "captioned")
    shared = ["--runs", tmp_path / "runs", *QUICK]
    student = ["--lang", "de", "--student", encoder, "--teacher", trained / "clip-ve"]
    text = ["--data", world, *student]
    options = tmp_path / "curve.toml"
    options.write_text('epochs = 1\nbatch_size = 4\nresamples = 10\nprecision = "fp32"\n')
    return {
        "pretrain": ["pretrain", "--data", captioned, "--images", world / "images", "--image-size",
                     32, "--width", 32, "--layers", 1, "--heads", 2, "--embedding-dim", 16,
                     *shared, "--out"],
        "finetune-ve": ["finetune-ve", "--data", world, "--clip", clip, *shared, "--out"],
        "align": ["align", *text, *shared, "--out"],
        "autoencode": ["autoencode", *text, *shared, "--out"],
        "curve": ["curve", "--data", world, *student[:4], "--runs", trained, "--device",
                  "cpu", "--config", options, "--out"],
        "evaluate": ["evaluate", "--data", world, "--runs", trained, "--lang", "de", "--resamples",
                     10, "--device", "cpu", "--report"],
        "export": ["export", "--runs", trained, "--lang", "de", "--out"],
    }  # fmt: skip


WRITERS = ("pretrain", "finetune-ve", "align", "autoencode", "curve", "evaluate", "export")


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_of_something_else_is_refused_and_left_alone(
    writers, command, refused, tmp_path, trained, monkeypatch
):
    """G1: a folder of photos, one of models, a model of another stage, home, a full mount."""
    photos, models, home = tmp_path / "photos", tmp_path / "models", tmp_path / "home"
    for path in (photos / "images" / "a.jpg", photos / "rows.jsonl", home / "thesis.tex"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the user's")
    shutil.copytree(trained, models)
    monkeypatch.setenv("HOME", str(home))
    other = "align-de" if command == "finetune-ve" else "clip-ve"
    before = tree(photos), tree(models), (home / "thesis.tex").read_text()
    for out, words, code in (
        (photos, "already exists (with images, rows.jsonl) and is not", 2),
        (models, "already exists (with align-de, align-nl and 1 more) and is not", 2),
        (models / other, "already exists (with README.md, calibration.json and", 2),
        (home, "is the home directory, or contains it", 2),
        (tmp_path.parent, "is the home directory, or contains it", 2),
        (photos / "rows.jsonl", "is not a folder; choose another output.", 1),
    ):
        error = refused(*writers[command], out, code=code)
        if command == "curve" and "already" in words:  # it lies in a folder of many things
            assert error.startswith(f"clseave: {out}/") and "clseave did not write it" in error
        else:
            assert error.startswith(f"clseave: {out}: {words}")
        assert (tree(photos), tree(models), (home / "thesis.tex").read_text()) == before


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_of_the_same_kind_is_replaced_unless_a_file_of_the_users_is_in_it(
    writers, command, clseave, refused, tmp_path, monkeypatch
):
    """G2 and G5: nothing else is left beside it, and all may read what they may by the umask."""
    out = tmp_path / "results" / "out"
    out.mkdir(parents=True)  # an empty folder is no obstacle
    umask = os.umask(0o027)
    try:
        assert clseave(*writers[command], out)[0] == 0
        first = tree(out)
        (out / "notes.txt").write_text("the user's")
        error = refused(*writers[command], out, code=2)
        assert f"{out / 'notes.txt'}: clseave did not write it" in error
        assert {**first, "notes.txt": b"the user's"} == tree(out)
        (out / "notes.txt").unlink()
        (out.parent / "out.clseave-old").mkdir()
        code, _, err = clseave(*writers[command], out)
        assert code == 0, err
    finally:
        os.umask(umask)
    assert tree(out).keys() == first.keys()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.clseave-old"]
    for path in out.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("command", ["align", "evaluate", "export"])
def test_inputs_are_not_replaced_by_an_output_of_their_kind(
    writers, command, refused, clseave, tmp_path, monkeypatch, runs
):
    """G1: a model that is read, the working directory, a parent of either."""
    out = tmp_path / "kind" / "out"
    assert clseave(*writers[command], out)[0] == 0
    before = tree(out)
    monkeypatch.chdir(out)
    for place in (out, Path(), out.parent):
        assert "is the working directory, or contains it" in refused(
            *writers[command], place, code=2
        )
    monkeypatch.chdir(tmp_path)
    error = refused(*writers[command], out, "--runs", out, code=2)
    assert f"{out}: is --runs {out}, or contains it" in error
    assert tree(out) == before


def test_a_demo_leaves_a_folder_of_the_users_alone(refused, tmp_path):
    """G1."""
    for number, name in enumerate(("data", "report", "runs/clip", "runs/align-ja")):
        out = tmp_path / str(number)
        (out / name).mkdir(parents=True)
        (out / name / "thesis.tex").write_text("the user's")
        error = refused("demo", "--out", out, code=2)
        assert f"{out / name}: already exists (with thesis.tex) and is not" in error
        assert tree(out) == {f"{name}/thesis.tex": b"the user's"}


@pytest.mark.parametrize("command", ["align", "curve", "evaluate", "export"])
def test_one_process_a_target(writers, command, refused, tmp_path):
    """G3: the second one is told at once, and nothing is touched."""
    out = tmp_path / "out"
    with locked_target(out):
        before = tree(tmp_path)
        assert f"{out}: another process is writing it" in refused(*writers[command], out)
        assert tree(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_one_process_a_file(refused, tmp_path, trained, world, clseave):
    """G3: and a file of something else is not replaced by answers."""
    pairs, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    write_jsonl(pairs, [{"image": str(world / "images" / "test0.png"), "hypothesis": "A dog."}])
    arguments = ["predict", "--input", pairs, "--runs", trained, "--device", "cpu", "--output"]
    with locked_target(answers):
        assert f"{answers}: another process is writing it" in refused(*arguments, answers)
        assert "another process" in refused(*arguments, answers, "--resume")
    for _ in range(2):  # older answers are replaced
        assert clseave(*arguments, answers)[0] == 0
    assert len(read_jsonl(answers)) == 1 and len(list(tmp_path.iterdir())) == 2
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "holds no answers; choose another" in refused(*arguments, photo, code=2)
    assert photo.read_bytes() == b"\x89PNG\r\n\x1a\n"


def test_links_replace_neither_their_text_nor_anything_else(refused, data):
    """G2."""
    text = data / "text"
    text.write_text("a ||| b\n")
    before = tree(data)
    for option in ("--out", "--words"):
        for target, words in (
            (text, "is both input and output"),
            (data / "snli_ve_train.jsonl", "exists already with other content"),
            (data / "images" / "train0.png", "exists already with other content"),
        ):
            error = refused("word-align", "--input", text, option, target, code=2)
            assert f"{target}: {words}" in error
    assert tree(data) == before


def _without_privileges():
    """Permissions hold for root as well (capset(2): no capability is left)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


@pytest.mark.parametrize("command", ["align", "evaluate", "export", "predict"])
def test_a_folder_that_may_not_be_written_is_told_before_the_work(
    writers, command, tmp_path, trained, monkeypatch
):
    """G1: in one line, with no file read."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    answers = ["predict", "--input", "/dev/null", "--runs", trained, "--output"]
    arguments = writers.get(command, answers)
    process = CommandProcess(
        *map(str, [*arguments, closed / "out"]),
        folder=tmp_path / "said",
        before=_without_privileges,
    )
    assert process.wait() == 1, process.stderr
    assert f"{closed / 'out'}: cannot be written (Permission denied)" in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "loop", "loop/x"])
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_an_impossible_place_is_told(writers, command, refused, tmp_path, trained, place):
    (tmp_path / "loop").symlink_to("loop")
    answers = ["predict", "--input", "/dev/null", "--runs", trained, "--output"]
    error = refused(*writers.get(command, answers), tmp_path / place)
    assert "cannot be written (" in error or "is not a folder" in error


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, refused, world, clip, tmp_path):
    monkeypatch.delenv("CLSEAVE_CACHE")
    monkeypatch.setattr(Path, "home", _no_home)
    error = refused("finetune-ve", "--data", world, "--clip", clip, "--runs", tmp_path)
    assert "no home directory for caches; set CLSEAVE_CACHE to a folder" in error


def _no_home():
    raise RuntimeError("Could not determine home directory.")


# --- interruptions ---


def _write(target, text):
    with atomic_folder(target) as folder:
        (folder / "a").write_text(text)


def _no_swap(*_):
    return False


class _Tracer:
    """Does something at the n-th instruction of `core/files.py` in a block."""

    def __init__(self, number, act, *, lines=False):
        self.left, self._act, self._lines = number, act, lines

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != files.__file__:
            return None
        frame.f_trace_opcodes = not self._lines
        if event == ("line" if self._lines else "opcode"):
            self.left -= 1
            if self.left == 0:
                self._act()
        return self


def _interrupt():
    raise KeyboardInterrupt


def _traced(target, tracer):
    """Whether a new folder came before the tracer acted."""
    sys.settrace(tracer)
    try:
        _write(target, "new")
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return tracer.left > 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("swaps", [True, False])
def test_ctrl_c_at_any_instruction_keeps_the_old_folder_or_the_new(tmp_path, monkeypatch, swaps):
    """G4: with the swap of Linux, and on file systems without it."""
    if not swaps:
        monkeypatch.setattr(files, "_swapped", _no_swap)
    target, number, interrupted = tmp_path / "model", 0, set()
    done = False
    while not done:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        _write(target, "old")
        done = _traced(target, _Tracer(number, _interrupt))
        interrupted.add((target / "a").read_text())
        with locked_target(target):
            pass
        assert tree(tmp_path).keys() == {"model/a"}, number
    assert interrupted == {"old", "new"} and number > 300


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_at_any_line_is_made_good_by_the_next_run(tmp_path, monkeypatch, swaps):
    """G4: with the swap, the old folder or the new one stands there even before that run."""
    if not swaps:
        monkeypatch.setattr(files, "_swapped", _no_swap)
    target, number, missing, status = tmp_path / "model", 0, 0, 9
    while status:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        _write(target, "old")
        child = os.fork()
        if not child:
            done = _traced(target, _Tracer(number, lambda: os._exit(9), lines=True))
            os._exit(0 if done else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        missing += not target.exists()
        with locked_target(target):
            assert (target / "a").read_text() in ("old", "new"), number
        assert tree(tmp_path).keys() == {"model/a"}, number
    assert number > 30 and bool(missing) != swaps


def test_a_failed_write_leaves_nothing(tmp_path):
    """G4."""
    for write in (atomic_file, atomic_folder):
        with pytest.raises(KeyboardInterrupt), write(tmp_path / "x"):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    _write(tmp_path / "model", "new")
    assert (tmp_path / "disk" / "model" / "a").read_text() == "new"
    assert (tmp_path / "model").is_symlink() and len(list((tmp_path / "disk").iterdir())) == 1


def test_files_have_the_modes_of_the_umask(tmp_path):
    """G5."""
    umask = os.umask(0o007)
    try:
        _write(tmp_path / "folder", "new")
        with atomic_file(tmp_path / "file") as stream:
            stream.write(b"new")
    finally:
        os.umask(umask)
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("folder", "folder/a", "file")
    ]
    assert modes == [0o770, 0o660, 0o660]


# --- locks ---


def test_a_lock_goes_with_its_process_and_leaves_nothing(tmp_path):
    """G3: what killed processes left unfinished goes as well, and nothing of others."""
    others = (".x.original", ".x.clseave-original", ".y.clseave-0123abcd", ".y.lock")
    for name in (*others, ".x.clseave-0123abcd"):
        (tmp_path / name).touch()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked_target(tmp_path / "x"):
            os.write(writing, b"!")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(ClseaveError, match="x: another process"), locked_target(tmp_path / "x"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked_target(tmp_path / "x"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == set(others)


@pytest.mark.parametrize("again", ["removed", "replaced"])
def test_a_lock_that_its_holder_has_just_removed_counts_for_nothing(tmp_path, monkeypatch, again):
    """G3."""
    flock, path = fcntl.flock, tmp_path / ".x.lock"

    def late(descriptor, how):
        monkeypatch.undo()
        path.unlink()
        if again == "replaced":
            path.touch()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked_target(tmp_path / "x"), pytest.raises(ClseaveError), locked_target(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, number):
    """G3: what is unfinished there may be another process's."""

    def unknown(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unknown)
    (tmp_path / ".x.clseave-0123abcd").touch()
    with locked_target(tmp_path / "x"), locked_target(tmp_path / "x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".x.clseave-0123abcd"]


def test_what_marks_a_kind_must_be_an_object(tmp_path):
    """G1: whatever a marker holds, it is no traceback."""
    kind = files.Kind("a thing", r"mark\.json", "mark.json", lambda mark: mark.get("kind") == "x")
    for content in ("", "[]", "[" * 100_000, '{"kind": 1}', "\xff"):
        (tmp_path / "mark.json").write_text(content, encoding="latin-1")
        with pytest.raises(ClseaveError, match="is not a thing"):
            require_replaceable(tmp_path, kind)
    (tmp_path / "mark.json").write_text(json.dumps({"kind": "x"}))
    require_replaceable(tmp_path, kind)
