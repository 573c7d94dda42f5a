"""Tests of bench/gpu.py and bench/precompile.py.

A part that is killed, hangs or loses the CUDA context affects no other. Further tests are on tables, plans, the
archive, the rehearsal without a GPU, and compiling before a measurement.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
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

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module gpu in an empty checkout, on a machine where torch seems to see a GPU."""
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "ROOT", tmp_path / "checkout")
    (tmp_path / "checkout").mkdir()
    monkeypatch.delenv("FASTRES_CACHE_DIR", raising=False)
    monkeypatch.setattr(module, "find_fastres", lambda cache: {})
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module, "sees_gpu", lambda: True)
    return module


@pytest.fixture
def parts() -> ModuleType:
    return importlib.import_module("gpu_parts")


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], *options: str) -> int:
    """Run gpu.py with these parts, each some Python code or a `Part`, all of them in plan 1."""
    made = {name: code if isinstance(code, gpu.Part) else gpu.Part(["-c", code]) for name, code in given.items()}
    monkeypatch.setattr(gpu, "PARTS", made)
    monkeypatch.setattr(gpu, "PLANS", {1: gpu.PLANS[1].__class__("all", tuple(made), ())})
    return gpu.main([*options])


def status(out: Path, part: str) -> int:
    return json.loads((out / f"{part}.json").read_text())["status"]


def packed_files(archive: Path) -> set[str]:
    with tarfile.open(archive) as packed:
        return {member.name for member in packed if member.isfile()}


def gone(pid: int) -> bool:
    """Return whether the process ends within five seconds."""
    said = Path("/proc", str(pid), "status")
    for _ in range(50):
        if not said.exists() or "State:\tZ" in said.read_text():
            return True
        time.sleep(0.1)
    return False


def test_parts_leave_logs_summaries_and_an_archive(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, packed = tmp_path / "out", tmp_path / "there" / "all.tar.gz"
    save = "import os, pathlib; p = pathlib.Path(os.environ['FASTRES_CACHE_DIR']); (p / 'tables').mkdir(parents=True); "
    save += "(p / 'tables' / 'a.json').write_text('[]'); (p / 'built.so').write_text('x'); print('fine')"
    given = {"good": save, "bad": "print('no'); raise SystemExit(3)"}
    cache = ("--cache", str(out / "cache"))  # inside OUT, where it must not be packed
    assert run(gpu, monkeypatch, given, "--out", str(out), *cache, "--archive", str(packed)) == 1
    assert (out / "good.log").read_text() == "fine\n"
    assert (status(out, "good"), status(out, "bad")) == (0, 3)
    assert packed_files(packed) == {
        f"out/{name}" for name in ("good.log", "good.json", "bad.log", "bad.json", "tables/a.json")
    }


KILLED = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
HUNG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
print(child.pid, flush=True)
time.sleep(99)
"""
LOST = """
print("row 1", flush=True)
raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_a_part_that_dies_hangs_or_loses_its_context_affects_no_other(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, packed = tmp_path / "out", tmp_path / "all.tar.gz"
    given = {"killed": KILLED, "hung": gpu.Part(["-c", HUNG], 2), "lost": LOST, "last": "print('here')"}
    assert run(gpu, monkeypatch, given, "--plan", "1", "--out", str(out), "--archive", str(packed)) == 3
    assert [status(out, part) for part in given] == [-9, 124, 1, 0]
    assert "failed: killed (killed by signal 9), hung (out of time), lost (exit 1)" in capsys.readouterr().out
    assert (out / "killed.log").read_text() == "so far\n"
    assert gone(int((out / "hung.log").read_text()))
    assert json.loads((out / "lost.json").read_text())["tail"][-1].startswith("RuntimeError: CUDA error")
    assert (out / "last.log").read_text() == "here\n"
    assert packed_files(packed) == {f"out/{part}.{kind}" for part in given for kind in ("log", "json")}


def test_a_process_lost_within_a_part_does_not_end_the_part(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A part goes on after its worker processes die or hang, as in the bench and in tuning."""
    code = f"""
import importlib, sys
sys.path.insert(0, {str(BENCH)!r})
from worker import Worker, WorkerLost
for module, function, argument in (("os", "_exit", 7), ("time", "sleep", 99), ("builtins", "abs", -3)):
    with Worker(importlib.import_module, module) as there:
        try:
            print(there.ask(function, argument, seconds=2 if function == "sleep" else 60))
        except WorkerLost as error:
            print(error)
"""
    assert run(gpu, monkeypatch, {"rows": code}, "--out", str(tmp_path)) == 0
    died, hung, answered = (tmp_path / "rows.log").read_text().splitlines()
    assert died == "its process ended (exit status 7)"
    assert hung.startswith("no answer within 2 s")
    assert answered == "3"


def test_no_part_is_started_after_a_failed_proof(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = {"a": "raise SystemExit(1)", "proof": gpu.Part(["-c", "raise SystemExit(1)"], proof=True), "b": "0"}
    assert run(gpu, monkeypatch, given, "--out", str(tmp_path)) == 3
    assert "a (exit 1), proof (exit 1), b (not started: proof did not pass)" in capsys.readouterr().out
    assert not (tmp_path / "b.log").exists()
    assert run(gpu, monkeypatch, given, "--out", str(tmp_path), "--keep-going") == 2
    given["proof"] = gpu.Part(["-c", "0"], proof=True)
    assert run(gpu, monkeypatch, given, "--out", str(tmp_path)) == 1
    given["proof"] = gpu.Part(["-c", "0"], 9999, proof=True)
    assert run(gpu, monkeypatch, given, "--out", str(tmp_path), "--minutes", "30") == 3, (
        "a proof that was not started stops the parts after it as well"
    )


def test_a_part_without_enough_time_is_not_started(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = {"a": "0", "b": gpu.Part(["-c", "0"], 20)}
    assert run(gpu, monkeypatch, given, "--out", str(tmp_path), "--minutes", "0.5") == 1
    assert "failed: a (not started: 30 s are left, its limit is 480 s)" in capsys.readouterr().out
    assert status(tmp_path, "b") == 0
    monkeypatch.setattr(gpu, "PLANS", {1: type(gpu.PLANS[1])("some", ("b",), ("a",))})
    assert gpu.main(["--plan", "1", "--minutes", "0.5", "--out", str(tmp_path)]) == 0
    assert "== a (not started: " in capsys.readouterr().out
    for options in (["--jobs", "0"], ["--minutes", "0"], ["--plan", "1", "a"], ["c"], ["--tables", "/nowhere"]):
        with pytest.raises(SystemExit):
            gpu.main(options)


def test_without_a_gpu_no_part_is_started(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "sees_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run(gpu, monkeypatch, {"a": "0"}, "--out", str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "torch sees no CUDA GPU" in said
    assert "--rehearse" in said
    assert not (tmp_path / "out").exists()


RACE = """
========= Error: Race reported between Write access at dgrad_kernel+0x1a0 in dgrad.py:120
=========     and Read access at dgrad_kernel+0x2b0 in dgrad.py:131 [64 hazards]
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::elementwise_kernel<(int)128>(int)+0x90
PASSED tests/kernels/test_sanitized.py::test_kernel[wgrad_kernel, 3x3]"""


def test_a_part_under_a_sanitizer_counts_what_it_reports(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = f"import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], os.environ['WATCHED'] + {RACE!r})"
    part = {"watched": gpu.Part(["-c", code], watch=["env", "WATCHED=yes"])}
    assert run(gpu, monkeypatch, part, "--out", str(tmp_path)) == 0
    assert (tmp_path / "watched.log").read_text() == f"1 yes{RACE}\n"
    counts = {"dgrad_kernel": 2, "elementwise_kernel": 1}
    assert json.loads((tmp_path / "watched.json").read_text())["reported"] == counts
    assert f"== reported, lines by kernel: {json.dumps(counts)}" in capsys.readouterr().out
    part = {"watched": gpu.Part(["-c", code], watch=["no-such-sanitizer"])}
    assert run(gpu, monkeypatch, part, "--out", str(tmp_path)) == 1
    assert "failed: watched (no-such-sanitizer is not installed)" in capsys.readouterr().out


TUNED = """
import os, pathlib, time
table = pathlib.Path(os.environ["FASTRES_CACHE_DIR"], "tables", "this-gpu.json")
table.parent.mkdir(parents=True, exist_ok=True)
table.write_text("measured")
"""


@pytest.mark.parametrize("end", ["time.sleep(99)", "os.kill(os.getpid(), 9)", "raise SystemExit(1)"])
def test_a_table_is_saved_however_tuning_ended(
    end: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, packed = tmp_path / "out", tmp_path / "all.tar.gz"
    given = {"tune": gpu.Part(["-c", TUNED + end], 3)}
    assert run(gpu, monkeypatch, given, "--out", str(out), "--archive", str(packed)) == 1
    assert (out / "tables" / "this-gpu.json").read_text() == "measured"
    assert (tmp_path / "checkout/out/cache/tables/this-gpu.json").read_text() == "measured", (
        "the cache folder has it even if OUT is emptied"
    )
    assert "out/tables/this-gpu.json" in packed_files(packed)


def test_a_table_is_saved_when_the_program_is_terminated(tmp_path: Path) -> None:
    """The table is saved when the program gets SIGTERM, for example from an outer time limit."""
    end = "print(os.getpid(), flush=True); os.kill(os.getppid(), 15); time.sleep(99)"
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import gpu
gpu.PARTS = {{"tune": gpu.Part(["-c", {TUNED + end!r}])}}
gpu.sees_gpu, gpu.find_fastres = lambda: True, lambda cache: {{}}
gpu.main(sys.argv[1:])
"""
    options = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", "--archive", tmp_path / "all.tar.gz"]
    command = [sys.executable, "-c", code, *map(str, options)]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 143
    assert (tmp_path / "out" / "tables" / "this-gpu.json").read_text() == "measured"
    assert packed_files(tmp_path / "all.tar.gz") == {
        f"out/{n}" for n in ("tune.log", "tune.json", "tables/this-gpu.json")
    }
    assert gone(int((tmp_path / "out" / "tune.log").read_text()))


def table_of(gpu: str, *passes: str) -> str:
    fields = dict.fromkeys(("dtype", "problem", "winner", "tile", "on_load"))
    problems = [fields | {"pass": name} for name in passes]
    return json.dumps({"gpu": {"name": gpu, "sms": 1, "capability": [9, 0]}, "problems": problems})


def test_tables_of_an_earlier_machine_are_found(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Tables are read from OUT, from the folder given, and from out/ of the checkout.

    None replaces a table that exists, and files that aren't a GPU's tables, which would stop every part, are skipped.
    """
    out, cache = tmp_path / "out", tmp_path / "cache"
    folders = {"cache": cache / "tables", "out": out / "tables", "named": tmp_path / "named"}
    folders["checkout"] = tmp_path / "checkout" / "out" / "tables"
    for i, (name, folder) in enumerate(folders.items()):
        folder.mkdir(parents=True)
        for table in [*folders][: i + 1]:
            (folder / f"{table}.json").write_text(table_of("a GPU", name))
    refused = {"half": '{"gpu": ', "old": "[]", "none": table_of("a GPU"), "feigned": table_of("rehearsal", "p")}
    refused["lacking"] = table_of("a GPU", "p").replace("on_load", "loads")
    for name, text in refused.items():
        (folders["named"] / f"{name}.json").write_text(text)
    code = "import json, os, pathlib; p = pathlib.Path(os.environ['FASTRES_CACHE_DIR'], 'tables')\n"
    code += "for f in sorted(p.iterdir()): print(f'{f.stem}: ' + json.loads(f.read_text())['problems'][0]['pass'])"
    options = ("--out", str(out), "--cache", str(cache), "--tables", str(folders["named"]))
    assert run(gpu, monkeypatch, {"look": code}, *options) == 0
    assert (out / "look.log").read_text().splitlines() == [f"{name}: {name}" for name in sorted(folders)]
    said = capsys.readouterr().out.splitlines()
    brought = [line.split(" copied to ")[0].rpartition("/")[2] for line in said if " copied to " in line]
    assert brought == ["out.json", "named.json", "checkout.json"]
    stayed = {line.split(".json was not")[0].rpartition("/")[2] for line in said if "was not copied" in line}
    assert stayed == refused.keys()


def log_of_tests(*results: str) -> str:
    where = json.dumps({"date": "2026-01-01T00:00:00", "device": "GPU", "commit": "c"})
    lines = [f"tests/test_x.py::test_{i} {result} [ 50%]" for i, result in enumerate(results)]
    return "\n".join([f"tested on: {where}", f"collected {len(results)} items", *lines])


def test_bad_logs_do_not_prevent_the_record_of_tests(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A log without results is left out of the record. With a log that can't be combined with the others, the record
    stays as it is. Neither makes a part fail."""
    given = {
        "tests-early": "print('tested on: nothing'); raise SystemExit(1)",
        "tests-good": f"print({log_of_tests('PASSED', 'PASSED')!r})",
        "tests-bad": f"print({log_of_tests('PASSED', 'FAILED')!r}); raise SystemExit(1)",
    }
    assert run(gpu, monkeypatch, given, "--out", str(tmp_path)) == 2
    said = (tmp_path / "tests.md").read_text()
    assert "tests-early" not in said
    assert "| tests-good | 2026-01-01T00:00 | c | 2 | 2 | 0 |" in said
    assert "| tests-bad | 2026-01-01T00:00 | c | 2 | 1 | 1 |" in said
    other = log_of_tests("PASSED").replace("GPU", "another")
    assert run(gpu, monkeypatch, {"tests-other": f"print({other!r})"}, "--out", str(tmp_path)) == 0
    assert "tests.md is not updated" in capsys.readouterr().out
    assert (tmp_path / "tests.md").read_text() == said


def test_plans_fit_into_their_minutes(gpu: ModuleType, parts: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert sorted(parts.PLANS) == [*range(1, 8)]
    for number, plan in parts.PLANS.items():
        assert {*plan.parts, *plan.spare} <= parts.PARTS.keys()
        assert not set(plan.parts) & set(plan.spare)
        seconds = sum(parts.PARTS[part].seconds for part in plan.parts)
        assert seconds <= parts.PLAN_S <= 585
        assert gpu.main(["--plan", str(number), "--list"]) == 0
        said = capsys.readouterr().out
        assert f"--plan {number}: {plan.says}; {seconds} of {parts.PLAN_S} s" in said
        assert all(part in said for part in (*plan.parts, *plan.spare))
        assert f"--plan {number % 7 + 1}" not in said
    assert parts.PARTS[parts.PLANS[1].parts[1]].proof, "before the first number"
    assert gpu.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"--plan {number}" in said for number in parts.PLANS)
    assert all(f"\n{name} " in said for name in parts.PARTS)


class AskedError(Exception):
    pass


@pytest.fixture
def scripts() -> dict[str, argparse.ArgumentParser]:
    """The argument parsers of the scripts in bench/, by file, when they are about to parse."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        found.append(parser)
        raise AskedError

    names = ("run", "tune", "kernels", "timeline", "counters", "memory_bound", "hopper", "ablate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        for name in names:
            with pytest.raises(AskedError):
                importlib.import_module(name).main([])
    return {f"bench/{name}.py": parser for name, parser in zip(names, found, strict=True)}


def test_every_command_line_is_understood(gpu: ModuleType, parts: ModuleType, scripts: dict[str, Any]) -> None:
    """In each part's command, for a GPU and in a rehearsal, all backends, nets, files and options exist."""
    backends = importlib.import_module("backends")
    run = gpu.Run(Path("/o"), Path("/c"), None, 5, False, {})
    for name, part in parts.PARTS.items():
        command = gpu.command(part, run, 300)
        for names in (value for flag, value in itertools.pairwise(command) if flag == "--backend"):
            unknown = set(names.split(",")) - set(backends.BACKENDS)
            mode = command[command.index("--mode") + 1]
            refused = {n for n in names.split(",") if backends.BACKENDS[n].why_never("resnet50", mode)}
            assert not unknown | refused, name
        for nets in (value for flag, value in itertools.pairwise(command) if flag == "--net"):
            assert [families.usual_size(net) for net in nets.split(",")], name
        assert all((ROOT / word).exists() for word in command if word[0] != "-" and word.endswith(".py")), name
        if command[0] in scripts:
            scripts[command[0]].parse_args(command[1:])
        again = parts.rehearsed(command)
        assert all((ROOT / word).exists() for word in again if word[0] != "-" and word.endswith(".py")), name
        script, *arguments = again[1:] if again[0] == "bench/rehearse.py" else again
        if script in scripts and arguments[-1:] != ["--help"]:
            scripts[script].parse_args(arguments)


def test_tests_share_their_processes_and_measurements_run_alone(
    gpu: ModuleType, parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts with tests use pytest-xdist and pytest-timeout if they are installed. Measurements run alone."""
    run = gpu.Run(Path("/o"), Path("/c"), None, 5, False, {})
    for found in (True, False):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, found=found: found or None)
        tests = gpu.command(parts.PARTS["tests-nets"], run, 300)
        assert ("-n" in tests, "--timeout" in tests) == (found, found)
        assert "5" not in gpu.command(parts.PARTS["bench-infer-50"], run, 300)
    assert gpu.command(parts.PARTS["tune-50"], run, 300)[-4:] == ["--jobs", "5", "--seconds", "285"]
    assert "/o/record.json" in gpu.command(parts.PARTS["bench-train-50"], run, 300)
    of_tests = {name: part.command for name, part in parts.PARTS.items() if name.startswith("tests-")}
    assert all(command[: len(parts.PYTEST)] == parts.PYTEST for command in of_tests.values())
    assert parts.PYTEST[-2:] == ["-m", "not slow"]
    assert not any("extra" in word for command in of_tests.values() for word in command), "a GPU runs every case"


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """This interpreter with all packages except fastres, and with a pip that installs nothing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    (site,) = (tmp_path / "bare").glob("lib/python3*/site-packages")
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (site / "pip.py").write_text("raise SystemExit('error: externally-managed-environment')")
    return tmp_path / "bare" / "bin" / "python"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH")
def test_parts_find_the_checkout_if_it_cannot_be_installed(bare_python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FASTRES_CACHE_DIR")}

    def said(*arguments: str, **more: str) -> str:
        command = [str(bare_python), *arguments]
        done = subprocess.run(command, env=environment | more, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = said("bench/gpu.py", "--rehearse", "--out", str(tmp_path), "status")
    tree = tmp_path / "rehearsal" / "cache" / "tree"
    assert f"pip can't install fastres here (error: externally-managed-environment): the parts find it in {tree}" in out
    assert "versions:   fastres 0." in (tmp_path / "rehearsal" / "status.log").read_text()
    code = (
        "import fastres.csrc, fastres.kernels.fprop, torch._dynamo as d; print(d.lookup_backend('fastres').__module__)"
    )
    assert said("-c", code, PYTHONSAFEPATH="1", PYTHONPATH=str(tree)) == "fastres.compile\n"


def rehearse(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--rehearse", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== rehearsal: no GPU, nothing measured\n== failed: nothing" in done.stdout
    return done.stdout


def test_a_rehearsal_is_marked_as_one(tmp_path: Path) -> None:
    said = rehearse("--out", str(tmp_path), "--archive", str(tmp_path / "r.tar.gz"), "hopper")
    assert "hopper needs CUDA; only its command line is checked" in said
    assert {path.name for path in tmp_path.iterdir()} == {"rehearsal", "r.tar.gz"}
    assert "nothing measured" in json.loads((tmp_path / "rehearsal" / "hopper.json").read_text())["rehearsal"]
    assert packed_files(tmp_path / "r.tar.gz") == {"rehearsal/hopper.json", "rehearsal/hopper.log"}


@pytest.mark.slow
@pytest.mark.parametrize("plan", range(1, 8))
def test_every_plan_can_be_rehearsed(plan: int, parts: ModuleType, tmp_path: Path) -> None:
    """Runs all parts of a plan in order, as far as that is possible without a GPU."""
    rehearse("--plan", str(plan), "--minutes", "60", "--jobs", "2", "--out", str(tmp_path))
    out = tmp_path / "rehearsal"
    assert {path.stem for path in out.glob("*.log")} == {*parts.PLANS[plan].parts, *parts.PLANS[plan].spare}
    if plan == 2:
        (table,) = (out / "tables").iterdir()
        assert json.loads(table.read_text())["gpu"]["name"] == table.stem == "rehearsal"


@pytest.mark.slow
def test_every_part_with_tests_collects_some(parts: ModuleType) -> None:
    for name, part in parts.PARTS.items():
        if name.startswith("tests-"):
            command = [sys.executable, *part.command, "--collect-only", "-q"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}"


@triton.jit
def add_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at) + 1)


class Driver:
    """A Triton driver for a Hopper GPU that can compile but not launch."""

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


def test_compiling_in_processes_reports_errors(capfd: pytest.CaptureFixture) -> None:
    precompile = importlib.import_module("precompile")
    found = precompile.compile_all([(os.path.getsize, ("/nowhere",)), (os.getpid, ()), (os.getpid, ())], 2)
    assert len(found) == 1
    assert found[0].startswith("getsize('/nowhere',): FileNotFoundError")
