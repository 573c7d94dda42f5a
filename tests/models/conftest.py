"""The fixture that the tests of nets share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nets import PATHS

import fastres


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the path that dispatch chooses, and with all supported calls on the fused entry points."""
    with fastres.backend(request.param):
        yield request.param
