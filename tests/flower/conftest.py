"""All tests of the Flower layer may create messages, and read the log."""

import pytest
from federation import prepare


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)
