"""Test that a compiled graph which PyTorch stored on disk serves only the version of fastres that compiled it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastres.ops import operators

ROOT = Path(__file__).parents[2]
# Compiles a pair with its backward. Prints hits and misses of AOTAutograd's cache, then of Inductor's.
COMPILE = """
import json, pathlib, torch, fastres
from torch import nn
from torch._dynamo.utils import counters

assert pathlib.Path(fastres.__file__).is_relative_to(pathlib.Path.cwd())
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
compiled = torch.compile(model, backend="fastres", options={"fastres.rewrite": "always"})
compiled(torch.ones(2, 3, 8, 8, requires_grad=True)).sum().backward()
outer, inner = counters["aot_autograd"], counters["inductor"]
found = outer["autograd_cache_hit"], outer["autograd_cache_miss"]
print(json.dumps([*found, inner["fxgraph_cache_hit"], inner["fxgraph_cache_miss"]]))
"""


@pytest.mark.extra  # three processes that compile
def test_another_version_of_fastres_reads_no_stored_graph(tmp_path: Path) -> None:
    """Neither AOTAutograd's cache nor Inductor's has the graph once a file that defines an operator has changed."""
    tree = tmp_path / "fastres"
    unread = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastres", tree, ignore=unread)
    for part in ("kernels", "csrc"):
        shutil.copytree(ROOT / part, tree / part, ignore=unread)
    own = {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def compiled() -> list[int]:
        command, environment = [sys.executable, "-c", COMPILE], {**os.environ, **own}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        found: list[int] = json.loads(done.stdout)
        return found

    assert compiled() == [0, 1, 0, 2]
    assert compiled() == [1, 0, 2, 0]
    with (tree / "ops" / "ends.py").open("a") as file:
        file.write("# another version\n")
    assert compiled() == [0, 1, 0, 2]


def test_an_operators_name_changes_with_each_file_that_defines_it(tmp_path: Path) -> None:
    files = [*Path(operators.__file__).parent.glob("*.py")]
    assert operators.digest(reversed(files)) == operators.OVERLOAD
    for operator in (operators.conv_bn_act, operators.conv_bn_act_backward, operators.conv_affine_act):
        assert operator.name().endswith(f".{operators.OVERLOAD}")
    copies = [Path(shutil.copy(file, tmp_path)) for file in files]
    names = {operators.digest(copies)}
    for file in copies:
        file.write_bytes(file.read_bytes() + b"\n")
        names.add(operators.digest(copies))
    assert len(names) == 1 + len(files)
