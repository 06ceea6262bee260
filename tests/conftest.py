"""Fixtures of many tests: an empty cache, no network, and tiny models made once."""

from __future__ import annotations

import os

# Before anything imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
import sys
from pathlib import Path

import pytest
import tiny_world

_REPOSITORY = Path(__file__).parents[1]

# Background jobs of a shell ignore Ctrl-C, which many tests are about.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """An empty feature cache for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLSEAVE_CACHE", str(folder))
    monkeypatch.delenv("CLSEAVE_RUNS", raising=False)
    return folder


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Skips fsync: only a power cut shows the difference, and a busy disk is slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def assets():
    """Real data beside the checkout; skips the test if there is none."""
    folder = _REPOSITORY.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("no shared/assets beside the checkout")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny SNLI-VE folder; read-only."""
    return tiny_world.write_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="session")
def clip(tmp_path_factory, world):
    """A tiny untrained CLIP folder; read-only."""
    return tiny_world.write_clip(tmp_path_factory.mktemp("clip"), tiny_world.sentences(world))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, world):
    """A tiny untrained BERT folder; read-only."""
    return tiny_world.write_encoder(tmp_path_factory.mktemp("encoder"), tiny_world.sentences(world))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, world, clip, encoder):
    """CLIP-VE with a pooled head, and students of de and nl; read-only."""
    base = tmp_path_factory.mktemp("trained")
    runs = base / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(base / "cache"))
        tiny_world.train_teacher(world, runs, clip)
        for lang in ("de", "nl"):
            tiny_world.quick_align(world, runs, runs, encoder, lang, epochs=2)
    return runs


@pytest.fixture
def data(tmp_path, world):
    """A copy of the tiny world, to be changed."""
    return shutil.copytree(world, tmp_path / "data")


@pytest.fixture
def runs(tmp_path, trained):
    """A copy of the trained models, to be changed."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def clseave(monkeypatch, capsys):
    """Runs `clseave …` through `main`; returns exit code, stdout and stderr."""
    from clseave_cli import main as command

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clseave", *map(str, arguments)])
        monkeypatch.setattr(command, "_debug", False)
        capsys.readouterr()
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(clseave):
    """Runs a command that must fail with one line on stderr; returns that line."""

    def run(*arguments, code=1):
        ended, out, err = clseave(*arguments)
        lines = err.splitlines()
        errors = [line for line in lines if line.startswith("clseave: ")]
        assert ended == code, err
        assert len(errors) == 1 and lines[-1] == errors[0], err
        assert "Traceback" not in err and "internal error" not in err
        assert out == ""
        return errors[0]

    return run
