"""Work done ahead, and on how many cores."""

from __future__ import annotations

import os

import pytest

from clseave_cli.processes import local_rank, process_count, process_rank, usable_cores


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


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (1, 0, None)),
        ({"RANK": "1"}, (1, 0, None)),
        ({"RANK": "1", "LOCAL_RANK": "1"}, (1, 0, None)),
        ({"WORLD_SIZE": "2"}, (1, 0, None)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (2, 1, None)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (4, 3, 1)),
        ({"RANK": "one", "WORLD_SIZE": "4"}, (1, 0, None)),
    ],
)
def test_a_launcher_sets_several_variables(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    wanted: tuple[int, int, int | None],
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process_count(), process_rank(), local_rank()) == wanted
