"""Tests of the bench's command line on tiny configurations, and that wrong rows are reported as wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cases import relative_error
from covering import extra
from fake_cuda import FakeCuda
from tolerances import EXACT_GRADIENTS, RATE, REPLAYED, REPLAYED_16, ROUNDING
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.cuda_graph import WARM_UPS
from fastres.models import families
from fastres.ops import dispatch, quantised

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
MODULES = (
    "advice",
    "backends",
    "contest",
    "measure",
    "photos",
    "plot",
    "record",
    "run",
    "runtimes",
    "stock_nets",
    "worker",
)
PAPER_NETS = ["paper-18-A", "paper-18-C", "paper-50-A", "paper-50-B", "plain-18", "cifar-8", "cifar-plain-8"]
PAPER_NETS += ["cifar-stem-18"]
FEW = ["--batch", "2", "--seconds", "0.05", "--device", "cpu"]
TINY = ["--net", "cifar-8", *FEW]
RESNET = ["--depth", "18", "--size", "64", *FEW]  # prints the paper's FLOPs table and can run every peer


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The bench's modules by name, imported as in `python bench/run.py`: from their folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in MODULES}
    # Sources may be edited while the tests run. How --resume handles a change has its own test.
    monkeypatch.setattr(modules["record"], "_digest", lambda: "sha256:0")
    # Windows take milliseconds here, while other tests run.
    monkeypatch.setattr(modules["measure"], "NOISY", float("inf"))
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)  # small steps only get slower with threads, above all while other tests run
    yield SimpleNamespace(**modules)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["mode"], row["backend"]): row for row in json.loads(path.read_text())["rows"]}


def documented(heading: str) -> set[str]:
    """Return the fields that bench/records/README.md lists in the table after `heading`."""
    text = (BENCH / "records" / "README.md").read_text().split(heading, 1)[1]
    table = re.search(r"\n((?:\|.*\n)+)", text).group(1)  # type: ignore[union-attr]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def check_schema(record: dict[str, Any]) -> None:
    """Check that the record of a CPU and its rows have exactly the fields in their README, and some of the values."""
    assert record.keys() == documented("## Schema")
    assert record["schema"] == "fastres.bench/3"
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    for name in ("seconds", "windows", "inputs", "seed"):
        assert isinstance(record["options"][name], (int, float))
    base, measured = documented("### A row"), documented("A row that was measured")
    for row in record["rows"]:
        optional = {"reason"} if row["status"] != "ok" else set()
        expected = base - {"reason"} | optional
        if row["status"] in ("ok", "wrong", "noisy"):
            expected |= measured - (set() if row["ours"] else {"path"})
            assert len(row["window_img_s"]) == record["options"]["windows"]
            assert 0 < row["img_s_min"] <= row["img_s"] <= row["img_s_max"]
            assert row["warm_up_s"] > row["first_call_s"] > 0
            assert row["latency_ms"] > 0
            for name in ("peak_reserved_mib", "host_ms", "joules_per_image"):
                assert row[name] is None, "a CPU run reports nothing about a GPU"
            assert row["reference"] == "float64"
        assert row.keys() == expected


def test_the_script_writes_table_record_and_picture(tmp_path: Path) -> None:
    """Runs the script in its own process: it prints the FLOPs table, measures both modes, and writes record and
    picture."""
    path, picture = tmp_path / "new" / "r.json", tmp_path / "r.png"
    command = [sys.executable, str(BENCH / "run.py"), *RESNET, "--backend", "eager,timm,fastres"]
    done = subprocess.run(
        [*command, "--json", str(path), "--plot", str(picture)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"ResNet-50 +3\.8 +3\.858 +\+1\.5 %", done.stdout)
    assert "On a GPU the defaults would be" in done.stdout
    assert re.search(r"resnet18, infer, batch 2, fp32, 64x64", done.stdout)
    record = json.loads(path.read_text())
    check_schema(record)
    assert [(row["mode"], row["backend"]) for row in record["rows"]] == [
        (mode, backend) for mode in ("infer", "train") for backend in ("eager", "timm", "fastres")
    ]
    for row in record["rows"]:
        assert row["status"] in ("ok", "noisy"), row
        assert row["error"] <= row["error_allowed"]
        assert row["error_p95"] is None if row["mode"] == "infer" else row["error_p95"] <= row["error_p95_allowed"]
        if row["ours"]:
            assert re.fullmatch(r"plain path in 9 of 9 blocks: .*cpu.*", row["path"]), "a CPU has no fused path"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert list(path.parent.iterdir()) == [path], "no temporary file stays"


def test_the_flops_table_holds_the_papers_figures_and_ours(bench: SimpleNamespace) -> None:
    table = bench.run.flops_table(("resnet50",))
    counts = {row["net"]: (row["paper"], round(row["ours"], 3)) for row in table if row["paper"] is not None}
    assert counts == {
        "VGG-19": (19.6, 19.632),
        "ResNet-18": (1.8, 1.795),
        "ResNet-34": (3.6, 3.644),
        "ResNet-50": (3.8, 3.858),
        "ResNet-101": (7.6, 7.570),
        "ResNet-152": (11.3, 11.282),
    }
    measured = {row["net"]: (round(row["ours"], 2), row["beside"]) for row in table if row["paper"] is None}
    assert measured == {
        f"resnet{depth}": (ours, f"ResNet-{depth}")
        for depth, ours in ((18, 1.81), (34, 3.66), (50, 4.09), (101, 7.80), (152, 11.51))
    }


def test_the_flops_table_compares_other_nets_with_the_papers(bench: SimpleNamespace) -> None:
    """The paper's table is listed first if it has the family and depth of any net; otherwise the nets are alone."""
    table = bench.run.flops_table(("paper-34-B", "plain-18"))
    assert {"net": "plain-18", "paper": 1.8}.items() <= table[1].items()
    assert [(row["net"], row["beside"]) for row in table[-2:]] == [
        ("paper-34-B", "ResNet-34"),
        ("plain-18", "plain-18"),
    ]
    assert [row["ours"] for row in bench.run.flops_table(("resnet34",)) if row["net"] == "resnet34"] == [
        pytest.approx(table[-2]["ours"])
    ]
    for name, ours in (("cifar-20", 0.041), ("resnext50_32x4d", 4.230)):
        (row,) = bench.run.flops_table((name,))
        assert (row["net"], row["paper"], row["beside"], round(row["ours"], 3)) == (name, None, None, ours)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--depth", "51"], "invalid choice"),
        (["--net", "resnet51"], "unknown model 'resnet51'; accepted: resnet18, "),
        (["--net", "cifar-20,cifar-12"], "depth 12 is not 6n+2"),
        (["--net", "plain-18-A"], "family plain has no choice of shortcut"),
        (["--net", "cifar-20", "--depth", "18"], "not allowed with argument"),
        (["--mode", "test"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--backend", "eager,tensorrt"], "unknown backend 'tensorrt'; accepted: eager, "),
        (["--backend", "cudagraphs", "--device", "cpu"], "it needs a cuda device"),
        (["--backend", "fastres-graph", "--device", "cpu"], "it needs a cuda device"),
        (["--backend", "eager-graph", "--device", "cpu"], "it needs a cuda device"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N: got tpu"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N: got meta"),
        (["--device", "cuda:99"], "CUDA device(s) here"),
        (["--batch", "0"], "--batch must be whole numbers of at least 1, separated by commas: got 0"),
        (["--batch", "4,"], "--batch must be whole numbers of at least 1, separated by commas: got 4,"),
        (["--size", "31"], "--size must be at least 32: got 31"),
        (["--seconds", "nan"], "--seconds must be greater than 0: got nan"),
        (["--resume"], "name it with --json FILE"),
        (["--plot", "picture.doc"], "ends in .png"),
        (["--plot", "r.svg", "--json", "r.svg"], "--json and --plot must name different files: both name r.svg"),
        (["--batch", "1", "--size", "32", "--mode", "train"], "a single value per channel"),
    ],
)
def test_impossible_requests_are_refused(
    arguments: list[str], said: str, bench: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.run.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_help_names_every_default(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: argparse.ArgumentParser, arguments: list[str] | None) -> None:
        raise LookupError(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", refuse)
    with pytest.raises(LookupError) as found:
        bench.run.parse([])
    options = found.value.args[0]._actions
    assert len(options) > 10
    for action in options:
        assert action.nargs == 0 or "default: " in (action.help or ""), action.option_strings


def test_a_run_stopped_before_anything_is_measured_says_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def stopped(plan: Any, record: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.run, "run", stopped)
    assert bench.run.main([*TINY, "--json", str(tmp_path / "r.json")]) == 130
    assert capsys.readouterr().err.endswith("\nstopped\n")


def test_a_closed_stdout_ends_the_run_quietly() -> None:
    read, closed = os.pipe()
    os.close(read)
    with os.fdopen(closed, "w") as sink:
        command = [sys.executable, str(BENCH / "run.py"), *TINY]
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_record_is_neither_replaced_nor_lost(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "r.json"
    ask = [*TINY, "--mode", "infer", "--json", str(path), "--backend", "eager,fastres"]
    window, windows = bench.measure.Row.window, []

    def interrupted(row: Any) -> float:
        windows.append(row.backend)
        if len(windows) == 6:
            raise KeyboardInterrupt
        return window(row)

    monkeypatch.setattr(bench.measure.Row, "window", interrupted)
    assert bench.run.main(ask) == 130
    assert f"stopped; {path} holds what was measured; continue it with --resume" in capsys.readouterr().err
    eager, ours = (bench.backends.BACKENDS[name] for name in ("eager", "fastres"))
    assert windows == [ours, eager, eager, ours, ours, eager], "rows take turns, and neither always follows the other"
    for row in rows_of(path).values():
        assert (row["status"], row["reason"]) == ("unfinished", "the run ended after 2 of 7 windows")
        assert (len(row["window_img_s"]), row["finished"]) == (2, None)
    with pytest.raises(SystemExit):
        bench.run.main(ask)
    assert f"{path} exists: continue it with --resume, or name another" in capsys.readouterr().err


def test_a_gpu_without_bf16_names_what_it_has(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.run, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(SystemExit):
        bench.run.main(["--dtype", "bf16"])
    assert "Old GPU does not support bf16; use --dtype fp16 or fp32" in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit):
        bench.run.main([*TINY, "--plot", "r.png"])
    assert "matplotlib is not installed: pip install 'fastres[bench]'" in capsys.readouterr().err


class StraightReLU(nn.Module):
    """A ReLU with a right forward and a wrong backward: gradients also pass where the output is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (x.relu() - x).detach()


def test_wrong_outputs_are_not_ranked(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def wrong_forward(name: str) -> nn.Module:
        model = bench.stock_nets.net(name)
        model.layer2[0].bn2.eps = 1e-2
        return model

    def wrong_backward(name: str) -> nn.Module:
        model = bench.stock_nets.net(name)
        model.layer3[0].relu = StraightReLU()
        return model

    entry = bench.backends.Backend
    monkeypatch.setitem(bench.backends.BACKENDS, "wrong-forward", entry(wrong_forward, "", ours=True))
    monkeypatch.setitem(bench.backends.BACKENDS, "wrong-backward", entry(wrong_backward, ""))
    path = tmp_path / "r.json"
    names = "eager-channels-last,wrong-forward,wrong-backward"
    status = bench.run.main([*TINY, "--backend", names, "--json", str(path), "--plot", str(tmp_path / "r.svg")])
    assert status == 1, "a wrong row of ours fails the run"
    found = {key: row["status"] for key, row in rows_of(path).items()}
    assert found[("infer", "eager-channels-last")] == found[("train", "eager-channels-last")] == "ok"
    assert found[("infer", "wrong-forward")] == "wrong"
    assert found[("infer", "wrong-backward")] == "ok"
    assert found[("train", "wrong-backward")] == "wrong"
    record = json.loads(path.read_text())
    check_schema(record)
    ranked = {key[-1] for key in bench.record.ratios(record["rows"]) if key[1] == "train"}
    assert "wrong-backward" not in ranked
    printed = capsys.readouterr().out
    assert re.search(r"wrong-backward .*WRONG", printed)
    assert re.search(r"wrong-backward: error.* is .*; at most .* is allowed", printed)
    assert "wrong" in (tmp_path / "r.svg").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_gradients_that_are_zero_are_wrong(
    dtype: torch.dtype, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one gradient in ten is zero, the median over the parameters doesn't show it, but the 95th percentile does. A
    row whose gradients are NaN is wrong as well."""
    case = bench.backends.Case("cifar-8", "train", 4, dtype, 32, torch.device("cpu"))
    inputs = bench.photos.batches(bench.measure.INPUTS, 4, 32, seed=0)
    data = bench.measure.prepare(case, bench.backends.shared_weights(case.net, inputs, 0), inputs, 0)
    eager, gradients = bench.backends.BACKENDS["eager"], bench.measure.Train.gradients
    assert bench.measure.measure(eager, case, data, 0.01, 1)["status"] == "ok"

    def some_zero(step: Any) -> dict[str, torch.Tensor]:
        return {name: g * (i % 10 > 0) for i, (name, g) in enumerate(gradients(step).items())}

    monkeypatch.setattr(bench.measure.Train, "gradients", some_zero)
    row = bench.measure.measure(eager, case, data, 0.01, 1)
    assert row["status"] == "wrong"
    assert row["error"] <= row["error_allowed"]
    assert row["reason"].startswith("error_p95 is 1; at most 0.")
    monkeypatch.setattr(
        bench.measure.Train, "gradients", lambda step: {n: g * torch.nan for n, g in gradients(step).items()}
    )
    row = bench.measure.measure(eager, case, data, 0.01, 1)
    assert (row["status"], row["error"], row["error_p95"]) == ("wrong", None, None)


@pytest.mark.parametrize(("baseline", "mode"), [(0.0, "infer"), (0.0, "train"), (0.9, "infer"), (0.9, "train")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_excuses_an_unrelated_output(
    baseline: float, mode: str, dtype: torch.dtype, bench: SimpleNamespace
) -> None:
    """Whatever the error of eager PyTorch, the limit is below 1, which is the relative error of an output of zeros."""
    limit = bench.measure.allowed(baseline, dtype, torch.device("cpu"), mode)
    assert 0 < limit < 1


def test_a_row_that_fails_does_not_stop_the_others(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raises(error: Exception) -> Any:
        def net(name: str) -> nn.Module:
            model = bench.stock_nets.net(name)
            model.forward = lambda x: (_ for _ in ()).throw(error)
            return model

        return bench.backends.Backend(net, "")

    table = bench.backends.BACKENDS
    monkeypatch.setitem(table, "large", raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")))
    monkeypatch.setitem(table, "broken", raises(RuntimeError("no such kernel\nmore")))
    path = tmp_path / "r.json"
    ask = [*TINY, "--mode", "infer", "--json", str(path), "--resume"]
    assert bench.run.main([*ask, "--backend", "large,broken,fastres"]) == 0
    found = rows_of(path)
    check_schema(json.loads(path.read_text()))
    assert found["infer", "large"]["status"] == "out of memory"
    assert found["infer", "broken"]["status"] == "failed"
    assert found["infer", "broken"]["reason"] == "RuntimeError: no such kernel"
    assert found["infer", "fastres"]["status"] == "ok"

    monkeypatch.setitem(table, "broken", table["eager"])
    assert bench.run.main([*ask, "--backend", "large,broken,fastres"]) == 0
    again = rows_of(path)
    assert again["infer", "broken"]["status"] == "ok", "--resume tries failed rows again"
    assert again["infer", "fastres"] == found["infer", "fastres"], "and leaves the others alone"


def test_a_reference_that_runs_out_of_memory_is_reported(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.measure, "prepare", full)
    path = tmp_path / "r.json"
    assert bench.run.main([*TINY, "--mode", "infer", "--backend", "eager", "--json", str(path)]) == 1
    row = rows_of(path)["infer", "eager"]
    assert (row["status"], row["reason"][:38]) == ("out of memory", "eager PyTorch, the reference, runs out")


def test_resume_fills_one_record(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []
    prepare = bench.measure.Row.prepare

    def count(row: Any, data: Any) -> dict[str, Any]:
        measured.append((row.case.mode, row.case.batch))
        return prepare(row, data)

    monkeypatch.setattr(bench.measure.Row, "prepare", count)
    path = tmp_path / "r.json"
    ask = [*TINY, "--mode", "infer", "--json", str(path), "--resume"]
    assert bench.run.main([*ask, "--backend", "eager"]) == 0
    first = rows_of(path)["infer", "eager"]
    assert bench.run.main([*ask, "--backend", "eager,fastres"]) == 0
    assert measured == [("infer", 2)] * 2
    assert rows_of(path)["infer", "eager"] == first
    assert bench.run.main([*ask, "--backend", "eager", "--batch", "3"]) == 0
    assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == [2, 2, 3]
    assert bench.run.main([*ask, "--backend", "eager", "--batch", "3,1,5"]) == 0
    assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == [2, 2, 3, 1, 5]
    assert bench.plot.main([str(path), str(tmp_path / "two-batches.png")]) == 0


def test_rows_that_cannot_be_compared_begin_a_new_record(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A new record begins, and the reasons are printed. A later run continues the record that matches it, and no other
    record changes."""
    paths = [tmp_path / name for name in ("r.json", "r-2.json", "r-3.json", "r-4.json")]
    ask = [*TINY, "--mode", "infer", "--backend", "eager", "--json", str(paths[0]), "--resume"]
    paths[0].write_text('{"schema": "fastres.bench/1"}')
    paths[1].write_text('{"schema"')
    before = [path.read_text() for path in paths[:2]]
    assert bench.run.main(ask) == 0
    said = capsys.readouterr().out
    assert re.search(r"r\.json can't be compared with new ones.*schema 'fastres\.bench/1'", said, re.DOTALL)
    assert "is not a record" in said
    assert f"New rows go to {paths[2]}.\n" in said
    assert f"record: {paths[2]}" in said
    monkeypatch.setattr(bench.record, "_digest", lambda: "sha256:1")
    assert bench.run.main([*ask, "--seconds", "0.07"]) == 0
    said = capsys.readouterr().out
    assert "code.sources: sha256:0 then, sha256:1 now" in said.replace("  sources", "  code.sources")
    assert "options.seconds: 0.05 then, 0.07 now" in said
    assert bench.run.main([*ask, "--seconds", "0.07", "--batch", "3"]) == 0
    assert [path.read_text() for path in paths[:2]] == before
    assert [[row["batch"] for row in json.loads(path.read_text())["rows"]] for path in paths[2:]] == [[2], [2, 3]]


def test_a_write_that_fails_leaves_the_record(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    bench.record.write({"rows": []}, path)
    with pytest.raises(ValueError, match="JSON"):
        bench.record.write({"rows": [float("nan")]}, path)
    assert json.loads(path.read_text()) == {"rows": []}
    assert list(tmp_path.iterdir()) == [path]


def row_of(backend: str, *img_s: float, status: str = "ok", batch: int = 1, began: str | None = None) -> dict[str, Any]:
    case = {"net": "resnet50", "mode": "infer", "batch": batch, "dtype": "bf16", "size": 224}
    row = case | {"backend": backend, "ours": backend == "fastres", "status": status, "img_s": statistics.median(img_s)}
    return row | {"window_img_s": list(img_s), "began": began}


def test_ratios_compare_rows_of_one_case(bench: SimpleNamespace) -> None:
    rows = [
        row_of("a", 90, 100, 110),
        row_of("b", 50),
        row_of("c", 900, status="wrong"),
        row_of("d", 80, status="noisy"),
    ]
    rows += [row_of("fastres", 140, 150, 165), row_of("fastres", 70, batch=2)]
    found = {key[-1]: ratio for key, ratio in bench.record.ratios(rows).items()}
    assert found.keys() == {"a", "b", "fastres"}
    assert found["fastres"] == (1.5, 140 / 110, 165 / 90)
    assert found["b"] == (0.5, 50 / 110, 50 / 90)
    assert bench.record.ratios([*rows, row_of("e", 101, status="noisy")]).keys() == set(), "which is the best?"


def test_ratios_compare_rows_of_one_dtype(bench: SimpleNamespace) -> None:
    """The best peer of a row computes in the same dtype, while all rows are compared with eager PyTorch in the case's
    dtype."""
    rows = [row_of(f"peer-{dtype}", rate) | {"arithmetic": dtype} for dtype, rate in (("bf16", 100), ("int8", 300))]
    rows += [row_of("eager-channels-last", 50) | {"arithmetic": "bf16"}]
    rows += [row_of("fastres", 330) | {"arithmetic": "int8"}]
    rows += [row_of("fastres-fp8", 400) | {"agreement": 0.9, "ours": True}]  # from an old record
    found = {key[-1]: ratio.value for key, ratio in bench.record.ratios(rows).items()}
    assert found == {"peer-bf16": 1, "peer-int8": 1, "eager-channels-last": 0.5, "fastres": 1.1}, "float8 has no peer"
    found = {key[-1]: ratio.value for key, ratio in bench.record.ratios(rows, to_eager=True).items()}
    assert found == {"peer-bf16": 2, "peer-int8": 6, "eager-channels-last": 1, "fastres": 6.6, "fastres-fp8": 8}
    printed = bench.run.render_rows([row | {"reason": "not drawn"} for row in rows])
    assert re.search(r"\nfastres +int8 ", printed)


def advised(backend: str, *img_s: float, mode: str = "infer", **other: Any) -> dict[str, Any]:
    row = row_of(backend, *img_s) | {"mode": mode, "dtype": "fp32", "ours": backend.startswith("fastres")}
    return row | {"arithmetic": "fp32", "path": "plain path"} | other


def test_the_advice_names_the_fastest_row_or_says_that_there_is_none(bench: SimpleNamespace) -> None:
    """Only rows that are ok count, and the text says so if a peer is faster or if nothing is faster than eager
    PyTorch."""
    int8 = {"arithmetic": "int8", "agreement": 0.75, "agreement_images": 64}
    rows = [advised("eager-channels-last", 32), advised("onnxruntime", 55), advised("fastres-optimize", 52)]
    rows += [advised("fastres-optimize-int8", 160, **int8), advised("onnxruntime-int8", 150, **int8)]
    rows += [advised("fastres-optimize-bf16", 900, status="wrong", arithmetic="bf16")]
    rows += [advised(name, 10, mode="train") for name in ("eager-channels-last", "fastres")]
    assert bench.advice.advice(rows) == (
        "What to use on this machine for resnet50, batch 1, fp32, 224x224. Inference: fastres.optimize(model, "
        "dtype=torch.int8, calibration=batches), 160 img/s, 5.00 x eager PyTorch in channels_last (75.0 % of 64 "
        "images get the same class). Without calibration: fastres.optimize(model), 52 img/s, 1.62 x eager PyTorch in "
        "channels_last, but 0.95 x onnxruntime. Training: fastres runs PyTorch's own operations here, at 1.00 x the "
        "speed of eager PyTorch."
    )
    slow = [advised("eager-channels-last", 32, 33), advised("fastres-optimize", 32, 34)]
    assert "nothing is reliably faster than eager PyTorch" in bench.advice.advice(slow)
    fused = [advised("eager-channels-last", 10, mode="train")]
    fused += [advised("fastres-graph", 18, mode="train", path="fused in 16 of 17 blocks")]
    assert "Training: fastres.graphed(step, model, optimizer), 18 img/s, 1.80 x eager" in bench.advice.advice(fused)
    for lost in ("wrong", "noisy"):
        (eager, ours) = ({**row, "status": lost} for row in slow)
        assert "img/s" not in bench.advice.advice([eager, slow[1]])
        assert "img/s" not in bench.advice.advice([slow[0], ours])


def test_every_backend_of_ours_says_how_to_use_it(bench: SimpleNamespace) -> None:
    assert all(bool(backend.use) == backend.ours for backend in bench.backends.BACKENDS.values())


def test_a_slowdown_of_all_rows_changes_no_ratio(bench: SimpleNamespace) -> None:
    """Windows that were measured in turns are compared pairwise. Without turns, the wide interval shows the
    uncertainty."""
    peer, ours = (100, 50, 10), (151, 75, 14.8)
    turns = [row_of("a", *peer, began="now"), row_of("fastres", *ours, began="now")]
    assert bench.record.ratio(turns[1], turns[0]) == pytest.approx((1.5, 1.48, 1.51))
    apart = row_of("fastres", *ours, began="later")
    assert bench.record.ratio(apart, turns[0]) == pytest.approx((1.5, 0.148, 15.1))


def test_a_row_whose_windows_spread_is_not_ranked(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """On a busy machine the row is marked as noisy, the run succeeds, and --resume measures the row again."""
    monkeypatch.setattr(bench.measure, "NOISY", 0.1)
    busy = [True]

    def window(row: Any) -> float:
        row.n = getattr(row, "n", 0) + 1
        slowed = busy[0] and row.backend is bench.backends.BACKENDS["eager"] and row.n % 2
        return 0.1 if slowed else 0.01

    monkeypatch.setattr(bench.measure.Row, "window", window)
    path, picture = tmp_path / "r.json", tmp_path / "r.svg"
    ask = [*TINY, "--mode", "infer", "--backend", "eager,fastres", "--json", str(path), "--resume"]
    assert bench.run.main([*ask, "--plot", str(picture)]) == 0
    found = rows_of(path)
    assert found["infer", "eager"]["status"] == "noisy"
    assert found["infer", "fastres"]["status"] == "ok"
    check_schema(json.loads(path.read_text()))
    printed = capsys.readouterr().out
    assert re.search(r"\neager +\S+ +20 noisy +20\.\.200", printed)
    assert "the middle half of the windows spans 900 % of the median; the limit is 10 %" in printed
    assert "noisy" in picture.read_text()
    assert not bench.record.ratios([*found.values()])
    with monkeypatch.context() as broken:
        broken.setattr(bench.measure.Row, "window", lambda row: 1 / 0)
        assert bench.run.main(ask) == 0
        assert rows_of(path) == found, "a retry that fails costs nothing"
    busy[0] = False
    assert bench.run.main(ask) == 0
    assert rows_of(path)["infer", "eager"]["status"] == "ok"
    (ratio,) = (r for key, r in bench.record.ratios([*rows_of(path).values()]).items() if key[-1] == "fastres")
    assert ratio == (1, 1, 1)


def test_photographs_differ_and_are_reproducible(bench: SimpleNamespace) -> None:
    first, second = bench.photos.batches(2, 3, 48, seed=1)
    again = bench.photos.batches(2, 3, 48, seed=1)
    assert first.shape == (3, 3, 48, 48)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, bench.photos.batches(1, 3, 48, seed=2)[0])
    images = [*first, *second]
    assert all(image.std() > 0.1 for image in images)
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_each_device_gets_the_backends_that_run_on_it(bench: SimpleNamespace) -> None:
    table, choose = bench.backends.BACKENDS, bench.backends.by_default
    idle = {
        "infer": {name for name, backend in table.items() if backend.graph},
        "train": {name for name, backend in table.items() if backend.freeze or backend.dtype},
    }
    assert {"fastres-optimize-int8", "onnxruntime", "eager-channels-last-bf16"} <= idle["train"]
    for names in idle.values():
        names |= set(bench.backends.EXPERIMENTS)
    for mode in ("infer", "train"):
        served = [name for name, backend in table.items() if backend.needs != "cpu"]
        assert choose(torch.device("cuda"), "resnet50", mode) == [name for name in served if name not in idle[mode]]
        for device in ("cuda", "cpu"):
            for net in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "cifar-110", "paper-34-A"):
                chosen = choose(torch.device(device), net, mode)
                assert {"eager-channels-last", "fastres"} <= set(chosen) <= set(table) - idle[mode]
                graphed = (device, mode) == ("cuda", "train")
                assert ("eager-graph" in chosen) == ("fastres-graph" in chosen) == graphed
                assert all(table[name].needs in (None, device) for name in chosen)
                assert net in families.BUILDERS or not any(table[name].only_torchvision for name in chosen)
    ours = {"fastres", "fastres-optimize", "fastres-optimize-bf16", "fastres-optimize-int8"}
    chosen = set(choose(torch.device("cpu"), "resnet50", "infer")) - {"openvino"}  # it is only there if it is installed
    assert chosen == ours | {"eager", "inductor", "onnxruntime", "onnxruntime-int8"} | {
        "eager-channels-last",
        "eager-channels-last-bf16",
    }
    assert choose(torch.device("cpu"), "resnet50", "train") == ["eager-channels-last", "fastres"]


def test_a_switched_net_has_its_fusion_on_in_each_forward(bench: SimpleNamespace) -> None:
    net, seen = bench.backends.switched("overlap", "cifar-8"), []
    assert net.state_dict().keys() == bench.stock_nets.net("cifar-8").state_dict().keys()
    net.conv1.register_forward_hook(lambda *_: seen.append(dispatch._fusions.get().overlap))
    for _ in range(2):
        net(torch.zeros(2, 3, 32, 32))
    assert seen == [True, True]
    assert not dispatch._fusions.get().overlap


def test_a_backend_that_cannot_run_says_why(bench: SimpleNamespace) -> None:
    table, case = bench.backends.BACKENDS, bench.backends.Case
    cuda = case("cifar-20", "train", 2, torch.float32, 32, torch.device("cuda"))
    infer, cpu = dataclasses.replace(cuda, mode="infer"), dataclasses.replace(cuda, device=torch.device("cpu"))
    for name in ("eager-graph", "fastres-graph"):
        assert table[name].why_not(cuda) is None
        assert table[name].why_not(infer) == "it runs training only"
        assert table[name].why_not(cpu) == "it needs a cuda device"
    assert table["fastres-optimize"].why_not(cuda) == "it runs inference only"
    assert table["timm"].why_not(cuda) == "timm has no cifar-20"


def test_other_nets_have_their_own_size_and_share_a_record(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With --net, each net has its usual image size, and --plot can draw several nets from one record."""
    path, picture = tmp_path / "r.json", tmp_path / "r.svg"
    ask = [*FEW, "--json", str(path), "--resume"]
    assert bench.run.main([*ask, "--net", "cifar-8", "--backend", "eager,timm,fastres"]) == 0
    assert bench.run.main([*ask, "--net", "cifar-plain-8,cifar-8", "--mode", "train", "--plot", str(picture)]) == 0
    record = json.loads(path.read_text())
    check_schema(record)
    found = {(row["net"], row["mode"], row["backend"]): row["status"] for row in record["rows"]}
    first = {(mode, name) for mode in ("infer", "train") for name in ("eager", "timm", "fastres")}
    assert {key[1:] for key in found if key[0] == "cifar-8"} == first | {("train", "eager-channels-last")}
    assert {key[2] for key in found if key[0] == "cifar-plain-8"} == {"eager-channels-last", "fastres"}
    assert all(status == ("not available" if key[2] == "timm" else "ok") for key, status in found.items()), found
    assert {row["size"] for row in record["rows"]} == {32}
    assert [row["net"] for row in record["flops"]] == ["cifar-8", "cifar-plain-8"]
    printed = capsys.readouterr().out
    assert "VGG" not in printed, "the paper has no FLOPs of its CIFAR nets"
    assert re.search(r"cifar-8, train, batch 2, fp32, 32x32", printed)
    assert "timm: timm has no cifar-8" in printed
    drawn = picture.read_text()
    assert all(f">{net} training, fp32, batch 2, 32x32<" in drawn for net in ("cifar-8", "cifar-plain-8"))
    assert ">cifar-8: 0.01·10⁹ multiply-adds an image<" in drawn

    plan = bench.run.parse(["--net", "cifar-20,resnet18", "--batch", "1", "--mode", "train", "--device", "cpu"])
    assert {(case.net, case.size) for case, _ in plan.rows} == {("cifar-20", 32), ("resnet18", 224)}


class Namespaces(TorchDispatchMode):
    """Collects the namespaces of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["resnet18", *(extra(net) if net in ("paper-18-C", "paper-50-A") else net for net in PAPER_NETS)]
)
def test_peers_run_no_fastres_code(name: str, bench: SimpleNamespace) -> None:
    """Peers run only PyTorch's operators, and give the same gradients as our net with the same state_dict."""
    peers = {
        backend.net for backend in bench.backends.BACKENDS.values() if not (backend.ours or backend.only_torchvision)
    }
    assert peers == {bench.stock_nets.net}
    theirs, ours = bench.stock_nets.net(name).double(), families.named(name).double()
    assert not [m for m in theirs.modules() if type(m).__module__.startswith("fastres")]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    if not name.startswith("cifar"):
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    y = torch.tensor([1, 3])
    with bench.backends.watched_paths() as answers, Namespaces() as operators:
        nn.functional.cross_entropy(theirs(x), y).backward()
    assert not answers
    assert operators.found <= {"aten", "prim", "prims"}
    nn.functional.cross_entropy(ours(x), y).backward()
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < EXACT_GRADIENTS, key


def test_the_peers_shortcut_keeps_channels_last(bench: SimpleNamespace) -> None:
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    shortcut = bench.stock_nets.net("cifar-8").layer2[0].downsample
    assert shortcut(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shortcut(x)[:, :16], x[:, :, ::2, ::2])
    assert not shortcut(x)[:, 16:].any()


def stepper(bench: SimpleNamespace, name: str, device: str, dtype: torch.dtype, **changes: Any) -> Any:
    """Return a training step of the backend `name` on the smallest CIFAR net."""
    case = bench.backends.Case("cifar-8", "train", 4, dtype, 32, torch.device(device))
    inputs = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    weights = bench.backends.shared_weights(case.net, inputs, 0)
    labels = [torch.tensor([i, 1, 2, 3]) for i in range(4)]
    backend = dataclasses.replace(bench.backends.BACKENDS[name], **changes)
    return bench.measure.Train(backend, case, bench.measure.Data(weights, inputs, labels))


def follow(eager: Any, graphed: Any, **tolerance: float) -> None:
    """Check that five steps give the same losses, parameters, running statistics and momenta, and a further step the
    same gradients."""
    for i in range(5):
        torch.testing.assert_close(graphed(i), eager(i), **tolerance)
    expected = eager.model.state_dict() | {f"momentum of {name}": m for name, m in eager.momenta.items()}
    found = graphed.model.state_dict() | {f"momentum of {name}": m for name, m in graphed.momenta.items()}
    torch.testing.assert_close(found, expected, **tolerance)
    assert all(p.grad is None for p in graphed.model.parameters())
    torch.testing.assert_close(graphed.gradients(), eager.gradients(), **tolerance)


def test_a_graphed_row_trains_as_the_eager_one(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs against a stand-in for CUDA graphs, which also shows that the graph is recorded once, before anything is
    timed."""
    fake_cuda = FakeCuda(monkeypatch)
    graphed = stepper(bench, "fastres-graph", "cpu", torch.float32)
    # The graph reads the learning rate in float32, the eager step in float64.
    follow(stepper(bench, "fastres", "cpu", torch.float32), graphed, rtol=ROUNDING, atol=RATE)
    assert len(fake_cuda.modes) == 1
    assert WARM_UPS + 1 <= 1 + bench.measure.WARM_UPS


def test_a_float8_row_is_compared_with_its_definition(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float8 row may have twice the error of PyTorch with the same quantised values, and may differ from it by that
    error. It reports how many classes agree with eager PyTorch's. A peer has no limit."""
    case = bench.backends.Case("cifar-8", "infer", 4, torch.bfloat16, 32, torch.device("cpu"))
    inputs = bench.photos.batches(bench.measure.INPUTS, 4, 32, seed=0)
    data = bench.measure.prepare(case, bench.backends.shared_weights(case.net, inputs, 0), inputs, 0)
    simulated = dataclasses.replace(bench.backends.BACKENDS["fastres-optimize-fp8"], needs=None)
    assert simulated.quantises
    assert simulated.why_not(case) is None
    with fastres.backend("reference"):
        row = bench.measure.measure(simulated, case, data, 0.05, 1)
        assert row["status"] == "ok", row
        assert 0 < row["error"] == row["error_of_eager"] < row["error_allowed"] == min(0.5, 2 * row["error"])
        assert data.baseline["error"] < row["error"]
        assert 0.5 <= row["agreement"] <= 1
        assert row["agreement_images"] == bench.measure.JUDGED
        peer = bench.measure.measure(dataclasses.replace(simulated, ours=False), case, data, 0.05, 1)
        assert (peer["status"], peer["error_allowed"]) == ("ok", None), "how a peer quantises is its own choice"
        assert (peer["error"], peer["agreement"]) == (row["error"], row["agreement"])
        definition = bench.measure.Infer.definition
        errors, _ = definition(bench.measure.Infer(simulated, case, data))
        for departure in (1.1 * errors["error"], float("nan")):
            monkeypatch.setattr(bench.measure.Infer, "definition", lambda step, d=departure: (errors, d))
            row = bench.measure.measure(simulated, case, data, 0.05, 1)
            assert row["status"] == "wrong"
            assert f"scores differ by {departure:.2g} from PyTorch's with the same quantised values" in row["reason"]


def test_a_row_in_another_dtype_has_its_own_limit(bench: SimpleNamespace) -> None:
    """The limit comes from eager PyTorch's error in the row's dtype, but predicted classes are compared with eager's in
    the case's dtype."""
    case = bench.backends.Case("cifar-8", "infer", 4, torch.float32, 32, torch.device("cpu"))
    inputs = bench.photos.batches(bench.measure.INPUTS, 4, 32, seed=0)
    data = bench.measure.prepare(case, bench.backends.shared_weights(case.net, inputs, 0), inputs, 0)
    table = bench.backends.BACKENDS
    wide, low, ours = (
        bench.measure.measure(table[name], case, data, 0.05, 1)
        for name in ("eager", "eager-channels-last-bf16", "fastres-optimize-bf16")
    )
    assert wide["status"] == low["status"] == ours["status"] == "ok"
    assert (wide["agreement"], wide["agreement_images"]) == (None, None)
    assert low["error_of_eager"] == ours["error_of_eager"] > 100 * wide["error_of_eager"]
    assert low["error"] > 100 * wide["error_allowed"]
    assert 0.5 < low["agreement"] <= 1
    data.classes = (data.classes + 1) % 10
    assert bench.measure.measure(table["eager-channels-last-bf16"], case, data, 0.05, 1)["agreement"] < 0.5


def test_onnxruntime_answers_as_eager(bench: SimpleNamespace) -> None:
    """ONNX Runtime and, where it is installed, OpenVINO give eager PyTorch's scores in fp32, and ONNX Runtime's int8
    scores are close to them.

    ONNX Runtime has as many threads as PyTorch. They stop spinning after a call, so that they leave the cores to
    others.
    """
    pytest.importorskip("onnxruntime")
    case = bench.backends.Case("cifar-8", "infer", 4, torch.float32, 32, torch.device("cpu"))
    inputs = bench.photos.batches(bench.measure.INPUTS, 4, 32, seed=0)
    data = bench.measure.prepare(case, bench.backends.shared_weights(case.net, inputs, 0), inputs, 0)
    steps = {}
    for name in ("eager", "onnxruntime", "openvino", "onnxruntime-int8"):
        if bench.backends.BACKENDS[name].why_not_here(case.device) is None:
            steps[name] = bench.measure.Infer(bench.backends.BACKENDS[name], case, data)
    right, *found = (step(1) for step in steps.values())
    limit = bench.measure.allowed(data.baseline["error"], case.dtype, case.device, case.mode)
    if "onnxruntime-int8" in steps:
        assert limit < relative_error(found.pop(), right) < 0.1
    assert all(relative_error(scores, right) < limit for scores in found)
    options = steps["onnxruntime"].call.session.get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_cpu_without_the_instructions_refuses_such_rows(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench.backends.Case("resnet50", "infer", 4, torch.float32, 224, torch.device("cpu"))
    for name in dispatch._ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(quantised, "saturates", lambda: False)
    reasons = {"int8": "this CPU has no AVX512-VNNI", "bf16": "this CPU has neither AVX512-BF16 nor AMX"}
    asked = ("_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for has in (True, False):
        for name in asked:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
        for name, backend in bench.backends.BACKENDS.items():
            if backend.needs != "cpu" or backend.packages:
                continue
            reason = reasons.get(backend.arithmetic(case))
            why = backend.why_not(case)
            assert why is None if has or reason is None else why.startswith(reason), name
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    for name in ("fastres-optimize-bf16", "fastres-optimize-int8"):
        assert "ONEDNN_MAX_CPU_ISA=AVX2" in bench.backends.BACKENDS[name].why_not(case)


def test_all_missing_packages_are_named(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = bench.backends.BACKENDS["onnxruntime"].why_not_here(torch.device("cpu"))
    assert reason == "not installed: pip install onnx onnxscript onnxruntime"


def test_a_peer_quantises_fp32(bench: SimpleNamespace) -> None:
    """ONNX Runtime can't quantise bfloat16, so it gets the net in fp32. Our int8 gets it in the case's dtype."""
    case = bench.backends.Case("resnet18", "infer", 2, torch.bfloat16, 64, torch.device("cpu"))
    table = bench.backends.BACKENDS
    assert table["onnxruntime-int8"].own(case).dtype == torch.float32
    assert table["fastres-optimize-int8"].own(case).dtype == torch.bfloat16


def test_no_row_is_right_without_an_error_of_eager(bench: SimpleNamespace) -> None:
    """Eager PyTorch's own error may be NaN, in fp16 or in a deep plain net. The row is then wrong, and stores no
    NaN."""
    case = bench.backends.Case("cifar-8", "infer", 2, torch.float32, 32, torch.device("cpu"))
    inputs = bench.photos.batches(bench.measure.INPUTS, 2, 32, seed=0)
    data = bench.measure.prepare(case, bench.backends.shared_weights(case.net, inputs, 0), inputs, 0)
    data.baseline = {"error": float("nan")}
    row = bench.measure.measure(bench.backends.BACKENDS["eager"], case, data, 0.05, 1)
    assert (row["status"], row["reason"]) == ("wrong", "eager PyTorch's own error, which sets the limit, is NaN")
    assert row["error_of_eager"] is None
    json.dumps(row, allow_nan=False)


def test_float8_needs_a_gpu_that_has_it(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.backends.Case("resnet50", "infer", 4, torch.bfloat16, 224, torch.device("cuda"))
    entry = bench.backends.BACKENDS["fastres-optimize-fp8"]
    for capability, said in (((8, 0), "float8 needs compute capability 8.9"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert entry.why_not(case) == said
    assert entry.why_not(dataclasses.replace(case, device=torch.device("cpu"))) == "it needs a cuda device"
    assert entry.why_not(dataclasses.replace(case, mode="train")) == "it runs inference only"


@pytest.mark.parametrize(("reading", "joules"), [("500.00", 5.0), ("[N/A]", None)])
def test_energy_per_image_is_power_divided_by_speed(reading: str, joules: float | None, bench: SimpleNamespace) -> None:
    row = {"status": "ok", "img_s": 100.0, "window_img_s": [100.0] * 7}
    assert bench.measure.settled(row | {"clocks": {"power.draw": reading}})["joules_per_image"] == joules
    assert bench.measure.settled(row | {"clocks": None})["joules_per_image"] is None


def test_power_is_read_while_the_load_lasts(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi averages over a second, so the steps must begin before that second and end after its answer."""
    did: list[str] = []

    def answer(device: torch.device, *fields: str) -> dict[str, str]:
        did.append("asked")
        time.sleep(0.3)
        did.append("answered")
        return dict.fromkeys(fields, "1")

    def step(i: int) -> None:
        did.append("step")
        time.sleep(0.02)

    monkeypatch.setattr(bench.measure, "synchronize", lambda device: None)
    monkeypatch.setattr(bench.measure, "nvidia_smi", answer)
    start = time.perf_counter()
    clocks = bench.measure.clocks_under_load(step, 0.02, torch.device("cuda"))
    assert time.perf_counter() - start > 1.5
    assert clocks["power.draw"] == "1"
    asked, answered = did.index("asked"), did.index("answered")
    assert min(did[:asked].count("step"), did[asked:answered].count("step")) > 5
    assert did[answered:].count("step") <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ours", [True, False])
def test_a_graphed_step_follows_the_eager_one(ours: bool, dtype: torch.dtype, bench: SimpleNamespace) -> None:
    names = ("fastres", "fastres-graph") if ours else ("eager-channels-last", "eager-graph")
    eager, graphed = (stepper(bench, name, "cuda", dtype) for name in names)
    # The kernels are the same, except where a library chooses others during the recording. Steps amplify that
    # difference in rounding.
    tolerance = REPLAYED if dtype == torch.float32 else REPLAYED_16
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        follow(eager, graphed, rtol=tolerance, atol=tolerance)


def test_lost_layouts_are_noted(bench: SimpleNamespace) -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    for layout, said in ((torch.contiguous_format, ["1 of 1 weight gradients lost channels_last"]), (None, [])):
        gradient = torch.randn(4, 4, 3, 3).contiguous(memory_format=layout or torch.channels_last)
        step = SimpleNamespace(model=conv, gradients=lambda g=gradient: conv.weight.backward(g))
        assert bench.measure.lost_layouts(step) == said


class Unsteady(nn.Linear):
    """A linear layer that breaks the graph and needs another graph in each of its first calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        self.calls = min(self.calls + 1, 2)
        return super().forward(x) * (self.calls > 0)


def test_compiled_rows_count_graphs_breaks_and_recompiles(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def unsteady(name: str) -> nn.Module:
        model = bench.stock_nets.net(name)
        model.fc = Unsteady(64, 10)
        return model

    entry = bench.backends.Backend(unsteady, "", compile={"backend": "eager"})
    monkeypatch.setitem(bench.backends.BACKENDS, "unsteady", entry)
    path, picture = tmp_path / "r.json", tmp_path / "compile.svg"
    ask = [*TINY, "--mode", "infer", "--json", str(path)]
    with pytest.raises(SystemExit):
        bench.run.main([*ask, "--backend", "aot-eager,cudagraphs"])
    assert bench.run.main([*ask, "--backend", "eager,aot-eager,unsteady"]) == 0
    check_schema(json.loads(path.read_text()))
    counts = {
        name: tuple(row[field] for field in ("graphs", "graph_breaks", "recompiles", "kernels_per_step"))
        for (_, name), row in rows_of(path).items()
    }
    assert counts["eager"] == (None,) * 4
    assert counts["aot-eager"] == (1, 0, 0, None)
    graphs, breaks, recompiles, _ = counts["unsteady"]
    assert graphs > 1
    assert breaks > 0
    assert recompiles > 0
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    head = next(line for line in lines if line[:2] == ["backend", "first call s"])
    printed = dict(zip(head, next(line for line in lines if line[0] == "unsteady"), strict=False))
    assert [printed[name] for name in ("graphs", "breaks", "recompiles")] == [*map(str, (graphs, breaks, recompiles))]
    assert "kernels" not in head, "no row has any on a CPU"
    assert bench.plot.main([str(path), str(picture), "compile"]) == 0
    drawn = picture.read_text()
    assert all(name in drawn for name in (*counts, "first call, s", "img/s"))
    with pytest.raises(ValueError, match="no row"):
        bench.plot.compile_times({"rows": [], "environment": {}})


def test_transposed_layouts_are_noted(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a profiler's events, cuDNN's transposing kernels are counted, with their share of the GPU's time. CPU events
    and annotations don't count."""

    def event(name: str, time: float, on: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
        device = getattr(torch.autograd.DeviceType, on)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, device_time_total=time)

    straight = [event("sm90_xmma_fprop", 60), event("Memcpy DtoD", 15), event("aten::conv2d", 9, on="CPU")]
    straight.append(event("step", 75, annotation=True))
    turned = [event("void cudnn::ops::nchwToNhwcKernel", 20), event("cudnn::nhwcToNchwKernel", 5)]

    def profiler(events: list[SimpleNamespace]) -> Any:
        return lambda **_: contextlib.nullcontext(SimpleNamespace(events=lambda: events))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.profiler, "profile", profiler(straight))
    assert bench.measure.profiled(lambda i: None) == (2, [])
    monkeypatch.setattr(torch.profiler, "profile", profiler(straight + turned))
    notes = ["cuDNN transposes layouts in 2 kernels, 25 % of the GPU's time"]
    assert bench.measure.profiled(lambda i: None) == (4, notes)


@pytest.mark.slow
def test_every_backend_of_this_device_runs(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert bench.run.main([*RESNET, "--backend", "all", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    check_schema(record)
    assert {row["status"] for row in record["rows"]} == {"ok", "not available"}


@pytest.mark.slow
def test_a_run_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    """After SIGTERM there is no process and no temporary data, and the record has what was measured."""
    path = tmp_path / "r.json"
    ask = ["--net", "cifar-8", "--batch", "2", "--seconds", "20", "--device", "cpu", "--mode", "infer", "--isolate"]
    command = [sys.executable, str(BENCH / "run.py"), *ask, "--backend", "eager,fastres", "--json", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if path.exists() and any("window_img_s" in row for row in json.loads(path.read_text())["rows"]):
            break
        time.sleep(0.1)
    running.terminate()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 143, said
    assert f"stopped; {path} holds what was measured" in said
    assert not [*tmp_path.glob("fastres-bench-*")]
    for _ in range(100):  # multiprocessing's helper process ends a moment later
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process is still running")
    assert {row["status"] for row in rows_of(path).values()} == {"unfinished"}
