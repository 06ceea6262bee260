import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(skip)


@pytest.fixture
def plain_steps(monkeypatch):
    """A function that makes every later training run its steps one by one."""
    from clseave_cli.core.training import loop

    return lambda: monkeypatch.setattr(loop._Loop, "_recorder", lambda run: None)
