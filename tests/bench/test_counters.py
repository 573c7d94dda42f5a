"""Tests of bench/counters.py: it reads ncu's output, and every launch gets its own layer or none."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import PERCENT, PRINTED_2

from fastres.kernels import problem, tables, tiles

BENCH = Path(__file__).resolve().parents[2] / "bench"
H200 = problem.H200, tiles.H200
METRICS = [
    "dram__bytes_read.sum", "dram__bytes_write.sum", "gpc__cycles_elapsed.max", "gpu__time_duration.sum",
    "lts__t_bytes.sum", "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
]  # fmt: skip
UNITS = ["byte", "byte", "cycle", "nsecond", "byte", "%", "%", "%"]
NUMBERS = ["3,000,000", "1000000", "3,600", "2,000", "8000000", "40.5", "60", "n/a"]
LABELS = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
LABELS += ["Block Size", "Grid Size", "Device", "CC"]


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules, imported as in `python bench/counters.py`, with the shipped tables."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("FASTRES_CACHE_DIR", os.devnull + "/none")
    tables.forget_tables()
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("counters", "predict")})
    tables.forget_tables()


def written(launches: Sequence[tuple[str, Sequence[int]]], numbers: Sequence[str] = NUMBERS) -> str:
    """Return what ncu 2025.3 writes for launches (kernel's name, grid), each with the same numbers."""

    def line(values: Sequence[str]) -> str:
        return ",".join(f'"{value}"' for value in values)

    said = ["==PROF== Connected to process 1234 (/usr/bin/python3.12)"]
    said += [
        f'==PROF== Profiling "{name[:20]}" - {i}: 0%....50%....100% - 2 passes' for i, (name, _) in enumerate(launches)
    ]
    rows = [line([*LABELS, *METRICS]), line([""] * len(LABELS) + UNITS)]
    for i, (name, grid) in enumerate(launches):
        shape = f"({', '.join(map(str, (*grid, 1, 1)[:3]))})"
        where = [str(i), "1234", "python3.12", "127.0.0.1", name, "1", "7", "(128, 1, 1)", shape, "0", "9.0"]
        rows.append(line([*where, *numbers]))
    return "\n".join([*said, "==PROF== Disconnected from process 1234", *rows, ""])


CUDNN = {
    "dgrad": "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn",
    "wgrad": "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_64x64>(T1::Params)",
    "infer": "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_cudnn",
}
CUDNN["fprop"] = CUDNN["infer"]


def as_on_a_gpu(launches: Sequence[Any]) -> list[tuple[str, Sequence[int]]]:
    """Return the names and grids that a GPU would run for a recorded step, with typical names for the library's
    kernels. Copies are not kernels."""
    found: list[tuple[str, Sequence[int]]] = []
    for one in launches:
        if one.ours:
            found.append((one.kernel, one.grid))
        elif one.flops:
            found.append((CUDNN.get(one.pass_, "nvjet_hsh_128x64_64x8_2x1_v_bz_TNT"), (132,)))
        elif one.kernel not in ("copy_", "clone", "as_strided_"):
            name = f"void at::native::vectorized_elementwise_kernel<4, at::native::{one.kernel}<float>>(int, T2)"
            found.append((name, (9, 2, 3)))
    return found


def test_numbers_are_read_in_their_units(bench: SimpleNamespace) -> None:
    parse = bench.counters.parse
    (one,) = parse(written([("void at::native::reduce_kernel<512, 1, at::native::R<float>>(T3)", (4, 5))]))
    assert (one.kernel, one.grid) == ("at::native::reduce_kernel", (4, 5, 1))
    right = {"us": 2.0, "dram_read_mb": 3.0, "dram_write_mb": 1.0, "l2_mb": 8.0, "tensor_pct": 60.0, "issue_pct": 40.5}
    assert one.values == pytest.approx({**right, "mhz": 3600.0}), "n/a is left out"
    abbreviated = written([("k", (1,))]).replace("nsecond", "us").replace('"byte"', '"Mbyte"')
    assert parse(abbreviated)[0].values["us"] == 2000.0
    assert parse(abbreviated)[0].values["dram_write_mb"] == 1e6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission to access GPU Performance Counters", "ERR_NVGPUCTRPERM"),
        (written([]), "no kernel was counted"),
        (written([("k", (1,))], ["1"] * 3 + ["n/a"] + ["1"] * 4), "has no time: 'n/a'"),
        (written([("k", (1,))]).replace("nsecond", "fortnight"), "unknown unit: 'fortnight'"),
        (written([("k", (1,))]).replace("gpu__time", "cpu__time"), "has no gpu__time_duration.sum"),
    ],
)
def test_output_without_counts_is_refused(text: str, said: str, bench: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=said):
        bench.counters.parse(text)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_every_launch_gets_its_layer(mode: str, bench: SimpleNamespace) -> None:
    launches = bench.predict.step(50, 256, mode, torch.bfloat16, "fastres")
    rows = bench.counters.label(bench.counters.parse(written(as_on_a_gpu(launches))), launches, *H200)
    ours = [row for row in rows if row.counted.kernel in {one.kernel for one in launches if one.ours}]
    assert [row.launches for row in ours] == [(one,) for one in launches if one.ours]
    convolutions = [row for row in rows if "cudnn" in row.counted.name]
    assert [row.launches[0] for row in convolutions] == [
        one for one in launches if one.flops and one.layer and not one.ours
    ]
    assert all(row.launches for row in rows) or mode == "infer"
    lines = bench.counters.grouped(rows, problem.H200)
    assert sum(line["count"] for line in lines) == len(rows)
    assert sum(line["us"] for line in lines) == pytest.approx(2.0 * len(rows))
    lost = [line["lost_us"] for line in lines]
    assert lost == sorted(lost, reverse=True)
    for line in lines:
        if line["floor_us"] != "":
            assert line["lost_us"] == pytest.approx(line["us"] - line["floor_us"], abs=PRINTED_2)
        assert (line["mhz"], line["tensor_pct"], line["warps_pct"]) == (1800.0, 60.0, "")
        assert line["dram_pct"] == pytest.approx(100 * 2e12 / 4.3e12, abs=PERCENT)


Change = Callable[[list[tuple[str, Sequence[int]]], int], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda seen, i: seen.pop(i), "was .*, but .* was recorded"),
        (lambda seen, i: seen.insert(i, seen[i]), "was .*, but .* was recorded|launches of ours were counted"),
        (lambda seen, i: seen.__setitem__(i, (seen[i][0], (7, 7, 7))), r"\(7, 7, 7\), but "),
        (lambda seen, i: seen.__delitem__(slice(i, None)), r"launches of ours were counted, but \d+ were recorded"),
    ],
    ids=["one less", "one more", "another grid", "broken off"],
)
def test_another_step_gets_no_layers(
    change: Change, said: str, bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launches = bench.predict.step(50, 256, "train", torch.bfloat16, "fastres")
    seen = as_on_a_gpu(launches)
    change(seen, next(i for i in range(200, 300) if seen[i][0] == "dgrad_kernel"))
    counted = bench.counters.parse(written(seen))
    with pytest.raises(ValueError, match=said):
        bench.counters.label(counted, launches, *H200)
    log, table = tmp_path / "log", tmp_path / "table.csv"
    log.write_text(written(seen))
    assert bench.counters.main(["--read", str(log), "--csv", str(table)]) == 0
    assert "rows have neither layers nor predictions" in capsys.readouterr().out
    rows = [*csv.DictReader(table.open())]
    assert {row["layer"] + row["pass"] + row["predicted_us"] + row["floor_us"] for row in rows} == {""}
    assert sum(int(row["count"]) for row in rows) == len(seen)


def test_a_kernel_of_the_library_between_two_of_ours_gets_its_layer(bench: SimpleNamespace) -> None:
    launches = bench.predict.step(50, 256, "train", torch.bfloat16, "fastres")
    i = next(i for i, one in enumerate(launches) if one.kernel == "convolution_wgrad" and not launches[i + 1].ours)
    wgrad, dgrad = pair = launches[i : i + 2]
    assert dgrad.kernel == "convolution_dgrad"

    def labels(names: Sequence[str], operators: Sequence[Any]) -> list[str]:
        counted = [bench.counters.Counted(name, (1,), {"us": 10.0 * (k + 1)}) for k, name in enumerate(names)]
        rows = [*bench.counters.library(counted, operators)]
        assert [row.counted for row in rows] == counted
        return [",".join(one.pass_ for one in row.launches) + f" {row.share:.2f}" for row in rows]

    aside, reduction = "void cudnn::ops::nchwToNhwcKernel<float>()", "void cutlass::splitK_reduce_kernel<float>()"
    assert labels([aside, CUDNN["wgrad"]], [wgrad]) == ["wgrad 0.33", "wgrad 0.67"], "both kernels share one operator"
    both = [CUDNN["wgrad"], reduction, CUDNN["dgrad"]]
    assert labels(both, pair) == ["wgrad 1.00", " 1.00", "dgrad 1.00"], "a reduction could belong to either"
    assert labels(both[::-1], pair) == [" 1.00"] * 3, "the names contradict the order"
    assert labels([CUDNN["wgrad"]] * 2 + [CUDNN["dgrad"]], pair) == [" 1.00"] * 3, "one operator has two kernels"
    cast, workspace = (
        "void at::native::unrolled_elementwise_kernel<float>()",
        "a::xmma__5x_cudnn::init_device_workspace",
    )
    assert labels([CUDNN["wgrad"], cast], [wgrad]) == ["wgrad 1.00", " 1.00"], "a cast is not part of a convolution"
    assert labels([workspace, CUDNN["wgrad"], CUDNN["dgrad"]], pair) == [" 1.00", "wgrad 1.00", "dgrad 1.00"]
    assert labels([aside], []) == [" 1.00"]


def test_a_table_is_read_again_without_a_gpu(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launches = bench.predict.step(50, 256, "train", torch.bfloat16, "fastres")
    log, table = tmp_path / "log", tmp_path / "folder" / "table.csv"
    log.write_text(written(as_on_a_gpu(launches)))
    assert bench.counters.main(["--read", str(log), "--csv", str(table)]) == 0
    said = capsys.readouterr().out
    assert "at most 2 passes of ncu per kernel" in said
    assert "0 kernels belong to no known layer" in said
    rows = [*csv.DictReader(table.open())]
    assert {"fprop", "dgrad", "wgrad", "norm", "pytorch"} == {row["pass"] for row in rows}
    model = bench.predict.rows([one for one in launches if one.kernel != "copy_"], *H200)
    predicted = sum(row.predicted_us for row in model)
    assert sum(float(row["predicted_us"]) for row in rows) == pytest.approx(predicted, abs=1), "each is rounded"


def test_ncu_is_asked_only_for_metrics_that_it_has(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ncu is a script here, which lacks one metric and writes the arguments that it gets to the log."""
    ncu = tmp_path / "ncu"
    listed = [one.split(".")[0] for one in METRICS if not one.startswith("lts")]
    lines = ["Device NVIDIA H200 (GH100)", *(f"{name}   Counter   unit   # of it" for name in listed)]
    ncu.write_text(
        f"#!{sys.executable}\nimport json, sys\nif '--query-metrics' in sys.argv:\n    print({chr(10).join(lines)!r})\n"
        "else:\n    open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = tmp_path / "out" / "log"
    bench.counters.count(log, "kernel", ["--mode", "infer"])
    command = json.loads(log.read_text())
    wanted = [one for one in bench.counters.METRICS.values() if not one.startswith("lts")]
    assert command[command.index("--metrics") + 1].split(",") == wanted
    assert command[-5:] == [sys.executable, bench.counters.__file__, "--step", "--mode", "infer"]
    ncu.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="ncu failed with status 3"):
        bench.counters.count(log, "kernel", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_refuses_to_run(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "counters.py", "--csv", tmp_path / "x.csv"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("error: no CUDA GPU: this script reads its counters")
