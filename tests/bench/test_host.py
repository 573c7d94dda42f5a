"""Tests of bench/host.py: every pass of every call is launched and timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import stub_cuda
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "host.py"


@pytest.mark.compiles
@pytest.mark.extra
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a driver")
@pytest.mark.skipif(stub_cuda.unbuildable() is not None, reason=str(stub_cuda.unbuildable()))
def test_every_pass_is_timed(tmp_path: Path) -> None:
    """The script runs in its own process, because it simulates a GPU until the process ends. In eval mode a block has
    one kernel per convolution."""
    file = tmp_path / "new" / "host.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rounds", "3", "--json", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {(row["call"], row["pass"]): row for row in json.loads(file.read_text())}
    assert len(rows) == len(done.stdout.splitlines()) - 1 == 15
    assert all(0 < row["min us"] <= row["median us"] for row in rows.values())
    launches = {key: row["launches"] for key, row in rows.items()}
    blocks = {"basic block": 2, "bottleneck": 3, "bottleneck, projection": 4}
    for name, convs in blocks.items():
        assert launches[name, "eval forward"] == convs
        assert launches[name, "backward"] > launches[name, "forward"] > convs
    assert launches["ResNet-50", "eval forward"] >= 53


def test_zero_rounds_are_refused() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--rounds", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--rounds must be at least 1" in done.stderr
