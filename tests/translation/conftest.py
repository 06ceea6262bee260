"""What the translation tests share: servers on loopback."""

import pytest
from loopback import Loopback


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def google():
    with Loopback("google") as server:
        yield server


@pytest.fixture
def libre():
    with Loopback("libre") as server:
        yield server


@pytest.fixture(params=["google", "libre"])
def server(request):
    return request.getfixturevalue(request.param)
