"""The house's rules: who may import whom, that none do so in a circle, and what `import fastres` costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A floor may import itself and the floors below it. `kernels` knows torch and triton, the ground only Python.
FLOORS = ["face", "models", "ops", "kernels", "ground"]


def modules() -> dict[str, Path]:
    """Import name -> file of all that is shipped."""
    found = {}
    for folder, package in ((ROOT / "fastres", "fastres"), (ROOT / "kernels", "fastres.kernels")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


def floor(module: str) -> str:
    """fastres.models.x -> models; paths and capability are the ground; everything else in fastres is the face."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    return {"csrc": "kernels", "paths": "ground", "capability": "ground"}.get(room, room if room in FLOORS else "face")


def imports(file: Path, module: str) -> Iterator[str]:
    """Absolute names of all that the file imports, at whatever depth, type-checking blocks included."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def target(name: str, known: dict[str, Path]) -> str:
    """The module that an import's name means: itself, or the one whose member it is."""
    return name if name in known else name.rpartition(".")[0]


def violations(module: str, file: Path, known: dict[str, Path]) -> list[str]:
    wrong = []
    for name in imports(file, module):
        root = name.split(".")[0]
        if root in ("bench", "tests", "kernels", "csrc"):
            wrong.append(f"{module} imports {name}")
        elif root == "fastres":
            ours = target(name, known)
            if FLOORS.index(floor(ours)) < FLOORS.index(floor(module)):
                wrong.append(f"{module} imports {name}, a floor above")
            # `problem` is arithmetic on sizes; everything that runs is reached through ops
            if floor(module) == "face" and floor(ours) == "kernels" and ours != "fastres.kernels.problem":
                wrong.append(f"{module} imports {name}, past ops")
        elif root not in sys.stdlib_module_names:
            if floor(module) == "kernels" and root not in ("torch", "triton"):
                wrong.append(f"{module} imports {name}; kernels know torch and triton only")
            if floor(module) == "ground":
                wrong.append(f"{module} imports {name}; the ground knows Python only")
    return wrong


def test_who_may_import_whom() -> None:
    known = modules()
    assert {"fastres", "fastres.models.resnet", "fastres.ops.dispatch", "fastres.paths"} <= known.keys()
    assert [line for module, file in known.items() for line in violations(module, file, known)] == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("fastres.ops.x", "from fastres.models import resnet"),
        ("fastres.ops.x", "def f():\n    import fastres.inference"),
        ("fastres.models.x", "from tests.cases import y"),
        ("fastres.kernels.x", "from fastres.ops import dispatch"),
        ("fastres.kernels.x", "from ..ops.dispatch import serves"),
        ("fastres.kernels.x", "import torchvision"),
        ("fastres.paths", "import torch"),
        ("fastres.paths", "from fastres.kernels import problem"),
        ("fastres.inference.optimized", "from fastres.kernels import fprop"),
    ],
)
def test_a_wrong_import_is_found(module: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(code)
    assert violations(module, file, modules())


def circle(known: dict[str, Path]) -> list[str]:
    """Modules of which each imports the next and the last is the first; none where there is no such circle.

    An import counts wherever it stands, in functions and type-checking blocks too. The packages around the module that
    it names run with it, and do not count.
    """
    graph = {module: {target(name, known) for name in imports(file, module)} for module, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # graphlib's order is the imported first
    return []


def test_none_import_in_a_circle() -> None:
    assert " imports ".join(circle(modules())) == ""


@pytest.mark.parametrize(
    "codes",
    [
        {"fastres.a": "import fastres.b", "fastres.b": "from fastres.a import f"},
        {"fastres.a": "from . import b", "fastres.b": "def f():\n    from fastres import a"},
        {"fastres.a": "if TYPE_CHECKING:\n    from .b import B", "fastres.b": "import fastres.a as ours"},
        {"fastres.a": "import fastres.b", "fastres.b": "import fastres.c", "fastres.c": "from fastres.a import *"},
        {"fastres": "from fastres.a import f", "fastres.a": "def f():\n    from fastres import g"},
    ],
)
def test_a_circle_is_found(codes: dict[str, str], tmp_path: Path) -> None:
    known = {module: tmp_path / f"{module}.py" for module in codes}
    for module, file in known.items():
        file.write_text(codes[module])
    found = circle(known)
    assert found[0] == found[-1]
    assert sorted(found[1:]) == sorted(codes)


def _import() -> tuple[list[str], bool, float]:
    """What `import fastres` loads beyond torchvision, whether CUDA has started then, and the seconds it took."""
    code = """
import json, sys, time, torchvision
theirs, begin = set(sys.modules), time.perf_counter()
import fastres
seconds = time.perf_counter() - begin
import torch
print(json.dumps([sorted(set(sys.modules) - theirs), torch.cuda.is_initialized(), seconds]))
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def test_import_starts_nothing_and_loads_little_in_little_time() -> None:
    """In at most 0.2 s more than torchvision's import; measured in the process, behind it, and the least of several
    runs."""
    new, cuda, best = _import()
    assert not cuda
    parts = tuple(f"fastres.{part}" for part in ("kernels", "timm", "csrc", "train", "evaluate", "weights", "cli"))
    assert not [name for name in new if name.startswith(parts)]
    flop_counter = {"torch.utils.flop_counter", "torch.utils.module_tracker"}  # a millisecond; formulas stand in it
    foreign = {name.split(".")[0] for name in set(new) - flop_counter} - set(sys.stdlib_module_names)
    assert foreign <= {"fastres"}, sorted(new)
    end = time.monotonic() + 60
    while best > 0.2 and time.monotonic() < end:
        best = min(best, _import()[-1])
    assert best <= 0.2, f"import fastres costs {best:.2f} s more than import torchvision"
