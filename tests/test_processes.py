"""Work done ahead, and on how many cores."""

from __future__ import annotations

import os

import pytest

from clseave_cli.processes import usable_cores


def test_usable_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 1


@pytest.mark.parametrize(("counted", "usable"), [(8, 8), (None, 1)])
def test_without_affinity_they_are_those_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, counted: int | None, usable: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert usable_cores() == usable
