"""Whatever the commands are given, they answer or refuse in one line.

A few inputs of each kind, always the same; tests/benchmarks/fuzz.py tries thousands.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz

NUM_COMMANDS = {
    "rows": 3, "pair": 20, "model": 8, "evaluate": 12, "align": 4, "translate": 8, "published": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Commands on a world and models of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEAVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sys, "argv", [])
        yield fuzz.Run(0, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_input_is_answered_or_refused_in_one_line(run, target):
    run.failures.clear()
    command, _ = fuzz.TARGETS[target]
    for _ in range(NUM_COMMANDS[target]):
        command(run)
    assert run.tried and not run.failures
