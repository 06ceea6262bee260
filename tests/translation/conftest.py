"""What the translation tests share: a memory of their own, and servers on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Loopback


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def google() -> Iterator[Loopback]:
    with Loopback("google") as server:
        yield server


@pytest.fixture
def libre() -> Iterator[Loopback]:
    with Loopback("libre") as server:
        yield server
