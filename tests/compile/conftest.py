"""Each test compiles anew."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh(one_thread: None) -> None:
    torch._dynamo.reset()
