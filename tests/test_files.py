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
    """Commands that write a folder or a file, each up to the option that names it."""
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
        "predict": ["predict", "--input", os.devnull, "--runs", trained, "--output"],
    }  # fmt: skip


WRITERS = ("pretrain", "finetune-ve", "align", "autoencode", "curve", "evaluate", "export")


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_of_something_else_or_in_use_is_refused_and_left_alone(
    writers, command, refused, tmp_path, trained, monkeypatch
):
    """G1: a folder of photos, one of models, a model of another stage, home, a full mount; G3."""
    photos, models, home = tmp_path / "photos", tmp_path / "models", tmp_path / "home"
    for path in (photos / "images" / "a.jpg", photos / "rows.jsonl", home / "thesis.tex"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the user's")
    shutil.copytree(trained, models)
    monkeypatch.setenv("HOME", str(home))
    other = "align-de" if command == "finetune-ve" else "clip-ve"

    def users_files():
        return {name: text for name, text in tree(tmp_path).items() if ".cache/" not in name}

    before = users_files()
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
        assert users_files() == before
    with locked_target(tmp_path / "out"):
        error = refused(*writers[command], tmp_path / "out")
        assert f"{tmp_path / 'out'}: another process is writing it" in error
        assert users_files().keys() == {*before, ".out.lock"}
    assert users_files() == before and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_of_the_same_kind_is_replaced_unless_it_is_in_use_or_has_a_file_of_the_users(
    writers, command, clseave, refused, tmp_path, monkeypatch
):
    """G1, G2, G5: nothing else is left beside it, and all may read what they may by the umask."""
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
        with monkeypatch.context() as patch:
            patch.chdir(out)
            for place in (out, Path(), out.parent):
                error = refused(*writers[command], place, code=2)
                assert "is the working directory, or contains it" in error
        if command in ("align", "evaluate", "export"):
            error = refused(*writers[command], out, "--runs", out, code=2)
            assert f"{out}: is --runs {out}, or contains it" in error
        assert tree(out) == first
        (out.parent / "out.clseave-old").mkdir()
        code, _, err = clseave(*writers[command], out)
        assert code == 0, err
    finally:
        os.umask(umask)
    assert tree(out).keys() == first.keys()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.clseave-old"]
    for path in out.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_demo_leaves_a_folder_of_the_users_alone(refused, tmp_path):
    """G1."""
    for number, name in enumerate(("data", "report", "runs/clip", "runs/align-ja")):
        out = tmp_path / str(number)
        (out / name).mkdir(parents=True)
        (out / name / "thesis.tex").write_text("the user's")
        error = refused("demo", "--out", out, code=2)
        assert f"{out / name}: already exists (with thesis.tex) and is not" in error
        assert tree(out) == {f"{name}/thesis.tex": b"the user's"}


def test_one_process_a_file(writers, refused, tmp_path, world, clseave):
    """G3: and a file of something else is not replaced by answers."""
    folder = tmp_path / "answers"
    folder.mkdir()
    answers, pairs = folder / "answers.jsonl", tmp_path / "pairs.jsonl"
    write_jsonl(pairs, [{"image": str(world / "images" / "test0.png"), "hypothesis": "A dog."}])
    arguments = [*writers["predict"][:-1], "--input", pairs, "--device", "cpu", "--output"]
    with locked_target(answers):
        assert f"{answers}: another process is writing it" in refused(*arguments, answers)
        assert "another process" in refused(*arguments, answers, "--resume")
    for _ in range(2):  # older answers are replaced
        assert clseave(*arguments, answers)[0] == 0
    assert len(read_jsonl(answers)) == 1 and list(folder.iterdir()) == [answers]
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
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(writers, command, tmp_path):
    """G1: in one line, with no file read."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    arguments = map(str, [*writers[command], closed / "out"])
    process = CommandProcess(*arguments, folder=tmp_path / "outputs", before=_without_privileges)
    assert process.wait() == 1, process.stderr
    assert f"{closed / 'out'}: cannot be written (Permission denied)" in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "loop", "loop/x"])
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_an_impossible_place_is_refused(writers, command, refused, tmp_path, place):
    (tmp_path / "loop").symlink_to("loop")
    error = refused(*writers[command], tmp_path / place)
    assert "cannot be written (" in error or "is not a folder" in error


def test_a_user_without_a_home_learns_what_to_set(monkeypatch, refused, writers, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CLSEAVE_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    error = refused(*writers["finetune-ve"], tmp_path / "out")
    assert "no home directory for caches; set CLSEAVE_CACHE to a folder" in error


# --- interruptions ---


def _write(target, text="new"):
    with atomic_folder(target) as folder:
        (folder / "a").write_text(text)


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
        _write(target)
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return tracer.left > 0


@pytest.fixture(params=[True, False], ids=["swap", "no swap"])
def swaps(request, monkeypatch):
    """Whether folders are swapped, as on Linux, or the file system cannot do that."""
    if not request.param:
        monkeypatch.setattr(files, "_swapped", lambda *_: False)
    return request.param


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("swaps")
def test_ctrl_c_at_any_instruction_keeps_the_old_folder_or_the_new(tmp_path):
    """G4."""
    target, number, contents = tmp_path / "model", 0, set()
    done = False
    while not done:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        _write(target, "old")
        done = _traced(target, _Tracer(number, _interrupt))
        contents.add((target / "a").read_text())
        with locked_target(target):
            pass
        assert tree(tmp_path).keys() == {"model/a"}, number
    assert contents == {"old", "new"} and number > 300


def test_a_kill_at_any_line_is_made_good_by_the_next_run(tmp_path, swaps):
    """G4: with the swap, the old folder or the new one stands there even before that run."""
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
    folder = tmp_path / "disk" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "model").symlink_to(folder)
    _write(tmp_path / "model")
    assert (folder / "a").read_text() == "new" and (tmp_path / "model").is_symlink()
    assert list(folder.parent.iterdir()) == [folder]


def test_files_have_the_modes_of_the_umask(tmp_path):
    """G5."""
    umask = os.umask(0o007)
    try:
        _write(tmp_path / "folder")
        with atomic_file(tmp_path / "file") as stream:
            stream.write(b"new")
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o770, "a": 0o660, "file": 0o660}


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
