from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_httpserver import HTTPServer
from support import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with HTTPServer(threaded=True) as http:
        yield FakeServer(http)
        http.check_assertions()
