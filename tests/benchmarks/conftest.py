import pytest


def pytest_collection_modifyitems(config, items):
    """Leaves benchmarks out unless asked for with `-m benchmark`: they take minutes."""
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="a benchmark: run with -m benchmark")
    for item in items:
        if item.get_closest_marker("benchmark"):
            item.add_marker(skip)
