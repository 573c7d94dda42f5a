"""bench/gpu.py's parts, time and archive; compiling ahead of a measurement."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fastres.models import families

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "ensure_installed", lambda: None)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module, "sees_gpu", lambda: True)
    return module


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, parts: dict[str, str], *options: str) -> int:
    monkeypatch.setattr(gpu, "PARTS", {name: ["-c", code] for name, code in parts.items()})
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    return gpu.main()


def test_parts_leave_logs_summaries_and_an_archive(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, packed = tmp_path / "out", tmp_path / "all.tar.gz"
    save = "import os, pathlib; p = pathlib.Path(os.environ['FASTRES_CACHE_DIR']); (p / 'tables').mkdir(parents=True); "
    save += "(p / 'tables' / 'a.json').write_text('[]'); (p / 'built.so').write_text('x'); print('fine')"
    monkeypatch.delenv("FASTRES_CACHE_DIR", raising=False)
    parts = {"good": save, "bad": "print('no'); raise SystemExit(3)"}
    assert run(gpu, monkeypatch, parts, "--out", str(out), "--archive", str(packed)) == 1
    assert (out / "good.log").read_text() == "fine\n"
    assert json.loads((out / "bad.json").read_text())["status"] == 3
    with tarfile.open(packed) as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {f"out/{name}" for name in ("good.log", "good.json", "bad.log", "bad.json", "cache/tables/a.json")}


def test_time_ends_a_part_and_what_it_started(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    )
    code += "\nprint(child.pid, flush=True); time.sleep(99)"
    monkeypatch.setattr(gpu, "LIMIT_S", 2)
    assert run(gpu, monkeypatch, {"slow": code}, "--out", str(tmp_path)) == 1
    assert json.loads((tmp_path / "slow.json").read_text())["status"] == 124
    status = Path("/proc", (tmp_path / "slow.log").read_text().strip(), "status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("a process that the part started runs on")


def test_what_does_not_fit_is_not_begun(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(gpu, monkeypatch, {"a": "0", "b": "0"}, "--out", str(tmp_path), "--minutes", "0.5") == 2
    assert "failed: a (not begun), b (not begun)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, {}, "--jobs", "0")


def test_without_a_gpu_nothing_is_called_a_success(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "sees_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run(gpu, monkeypatch, {"a": "0"}, "--out", str(tmp_path / "out"))
    assert "torch sees no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_under_a_sanitizer(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    part = {"watched": "import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], os.environ['WATCHED'])"}
    monkeypatch.setattr(gpu, "SANITIZED", {"watched": ["env", "WATCHED=yes"]})
    assert run(gpu, monkeypatch, part, "--out", str(tmp_path)) == 0
    assert (tmp_path / "watched.log").read_text() == "1 yes\n"
    monkeypatch.setattr(gpu, "SANITIZED", {"watched": ["no-such-sanitizer"]})
    assert run(gpu, monkeypatch, part, "--out", str(tmp_path)) == 1
    assert "failed: watched (no-such-sanitizer is not installed)" in capsys.readouterr().out


def test_commands(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share their processes with the plugins that are there; measurements run alone."""
    backends = importlib.import_module("backends")
    for found in (True, False):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=found: found or None)
        tests = gpu.command("tests-nets", Path("/o"), 5, 300)
        assert ("-n" in tests, "--timeout" in tests) == (found, found)
        assert "5" not in gpu.command("bench-infer-50", Path("/o"), 5, 300)
    assert gpu.command("tune-50", Path("/o"), 5, 300)[-4:] == ["--jobs", "5", "--seconds", "285"]
    assert "/o/record.json" in gpu.command("bench-train-50", Path("/o"), 1, 300)
    tests = {part: command[len(gpu.PYTEST) :] for part, command in gpu.PARTS.items() if part.startswith("tests-")}
    assert all(gpu.PARTS[part] == [*gpu.PYTEST, *rest] for part, rest in tests.items())
    assert gpu.PYTEST[-2:] == ["-m", "not slow"]
    assert not any("extra" in word for rest in tests.values() for word in rest), "a GPU runs every case"
    for part, command in gpu.PARTS.items():
        for names in (value for flag, value in itertools.pairwise(command) if flag == "--backend"):
            unknown = set(names.split(",")) - set(backends.BACKENDS)
            mode = command[command.index("--mode") + 1]
            refused = {n for n in names.split(",") if backends.BACKENDS[n].why_never("resnet50", mode)}
            assert not unknown | refused, part
        for nets in (value for flag, value in itertools.pairwise(command) if flag == "--net"):
            assert [families.usual_size(net) for net in nets.split(",")], part
        assert all((BENCH.parent / word).exists() for word in command if word[0] != "-" and word.endswith(".py")), part


@triton.jit
def add_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at) + 1)


class Driver:
    """A Hopper GPU that compiles and can't launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a missing GPU")
def test_compiling_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    precompile = importlib.import_module("precompile")
    loaded: list[Any] = []
    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", lambda kernel: loaded.append(kernel))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    x = torch.empty(64, device="meta")
    with precompile.compiling():
        add_kernel[(1,)](x, x, BLOCK=64)
    assert [kernel.metadata.name for kernel in loaded] == ["add_kernel"]
    assert precompile.compile_all([(print, ("x",))], 1) == []


def test_compiling_in_processes_says_what_failed(capfd: pytest.CaptureFixture) -> None:
    precompile = importlib.import_module("precompile")
    found = precompile.compile_all([(os.path.getsize, ("/nowhere",)), (os.getpid, ()), (os.getpid, ())], 2)
    assert len(found) == 1
    assert found[0].startswith("getsize('/nowhere',): FileNotFoundError")
