"""How many processes there are, which this one is, and how many cores it may use."""

import os

import pytest

from clseave_cli.processes import local_rank, process_count, process_rank, usable_cores


@pytest.mark.parametrize(
    ("affinity", "counted", "usable"), [({3}, 8, 1), (None, 8, 8), (None, None, 1)]
)
def test_usable_cores_are_those_of_the_process_or_of_the_machine(
    monkeypatch, affinity, counted, usable
):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert usable_cores() == usable


@pytest.mark.parametrize(
    ("environment", "expected"),
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
def test_a_launcher_sets_several_variables(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (process_count(), process_rank(), local_rank()) == expected
