"""Records of a GPU: bench/proof.py reads pytest's logs, README shows what bench/readme.py writes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import pytest_report_header

BENCH = Path(__file__).resolve().parent.parent / "bench"
WHERE = {"date": "2026-11-26T14:13:20+00:00", "device": "NVIDIA H200", "torch": "2.11.0", "commit": "0317540999"}


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def proof() -> ModuleType:
    return importlib.import_module("proof")


@pytest.fixture
def readme() -> ModuleType:
    return importlib.import_module("readme")


def log(path: Path, *lines: str, where: dict[str, str] | None = None) -> Path:
    path.write_text("\n".join((f"tested on: {json.dumps(where or WHERE)}", *lines)) + "\n")
    return path


def row_of(text: str, start: str) -> list[str]:
    """The cells of the table row that starts with `start`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_this_run_says_where_it_runs(proof: ModuleType, tmp_path: Path) -> None:
    """The header that tests/conftest.py writes is the one that proof.py reads."""
    run = proof.read(
        log(tmp_path / "x.log", pytest_report_header(), "1 worker [1 item]", "[gw0] [100%] PASSED tests/a.py::b ")
    )
    assert (run.where["torch"], run.items) == (torch.__version__, 1)


def test_the_last_result_counts(proof: ModuleType, tmp_path: Path) -> None:
    first = log(
        tmp_path / "first.log",
        "14 workers [5 items]",
        "[gw3] [ 20%] PASSED tests/test_a.py::test_one[(1, 2)-x] ",
        "[gw0] [ 40%] FAILED tests/test_a.py::test_two[{'PAD': 0}] ",
        "[gw0] [ 60%] PASSED tests/test_b.py::test_three ",
        "[gw0] [ 60%] ERROR tests/test_b.py::test_three ",
        "[gw1] [ 80%] SKIPPED tests/test_b.py::test_four ",
        'tests in files: {"tests/test_a.py": 3, "tests/test_b.py": 2, "tests/test_c.py": 7}',
    )
    again = log(
        tmp_path / "again.log",
        "collecting ... collected 9 items / 7 deselected / 2 selected",
        "tests/test_a.py::test_two[{'PAD': 0}] PASSED                 [ 50%]",
        "tests/test_b.py::test_three PASSED                           [100%]",
        'tests in files: {"tests/test_a.py": 1, "tests/test_b.py": 2}',
    )
    record = tmp_path / "record.md"
    assert proof.main([str(first), "--record", str(record)]) == 1
    text = record.read_text()
    assert row_of(text, "first")[3:] == ["5", "1", "2", "1", "1"]
    assert row_of(text, "tests/test_a.py")[1:] == ["3", "1", "1", "0", "1"]
    assert row_of(text, "tests/test_b.py")[1:] == ["2", "0", "1", "1", "0"]
    assert row_of(text, "tests/test_c.py")[1:] == ["7", "0", "0", "0", "7"]
    assert "Failed:\n\n- `tests/test_a.py::test_two[{'PAD': 0}]`\n- `tests/test_b.py::test_three`" in text

    record.write_text(text + f"\n{proof.BY_HAND}\n\nwritten by hand\n")
    assert proof.main([str(again), "--record", str(record)]) == 0
    assert proof.main([str(first), str(again), "--record", str(record)]) == 1, "a test was never reached"
    text = record.read_text()
    assert row_of(text, "**all**") == ["**all**", "**12**", "**3**", "**0**", "**1**", "**8**"]
    assert "Failed first, passed after a mend:\n\n- `tests/test_a.py" in text
    assert text.endswith(f"\n{proof.BY_HAND}\n\nwritten by hand\n")
    assert proof.main([str(again), "--record", str(tmp_path)]) == 0
    assert (tmp_path / "nvidia-h200-tests.md").exists()


def test_what_is_no_log_or_another_machines(proof: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = "1 worker [1 item]", "[gw0] [100%] PASSED tests/test_a.py::test_one "
    bare, empty = tmp_path / "bare.log", log(tmp_path / "empty.log", result[0])
    bare.write_text("\n".join(result) + "\n")
    here, there = (log(tmp_path / f"{name}.log", *result, where=WHERE | {"device": name}) for name in ("here", "there"))
    told = [([bare], "is no log of"), ([empty], "is no log of"), ([here, there], "there ran with device there")]
    for arguments, message in told:
        with pytest.raises(SystemExit):
            proof.main(list(map(str, arguments)))
        assert message in capsys.readouterr().err


def test_what_was_lost_is_no_success(proof: ModuleType, tmp_path: Path) -> None:
    """A file that can't be collected, a run that was killed, a failure that is skipped later; logs in any order."""
    broken = log(
        tmp_path / "broken.log",
        "collecting ... collected 1 item / 1 error",
        "tests/test_a.py::test_one PASSED [100%]",
        "ERROR tests/test_b.py - ImportError: no such thing",
    )
    assert proof.main([str(broken)]) == 1
    run = proof.read(broken)
    assert run.results["tests/test_b.py"] == "failed"
    assert row_of(proof.render([run]), "tests/test_a.py")[1:] == ["unknown", "1", "0", "0", "unknown"]
    assert row_of(proof.render([run]), "**all**")[1:] == ["**unknown**", "**1**", "**1**", "**0**", "**unknown**"]
    killed = log(tmp_path / "killed.log", "1 worker [2 items]", "\x1b[32m[gw0] [ 50%] PASSED tests/a.py::b \x1b[0m")
    assert proof.missing(proof.read(killed)) == 1
    assert proof.main([str(killed)]) == 1
    run = "1 worker [1 item]", "[gw0] [100%] {} tests/a.py::b "
    later = log(tmp_path / "later.log", run[0], run[1].format("SKIPPED"), where=WHERE | {"date": "2026-11-27"})
    failed = log(tmp_path / "failed.log", run[0], run[1].format("FAILED"))
    assert proof.main([str(later), str(failed)]) == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_readme_shows_its_record(device: str, readme: ModuleType) -> None:
    records, text = importlib.import_module("record"), readme.README.read_text()
    named = text.partition(readme.MARKS[device][0])[2].partition("](")[2].partition(")")[0]
    picture = records.ROOT / named
    assert picture.exists()
    record = records.read(picture.with_suffix(".json"))
    assert readme.written(text, readme.block(record, Path(named)), device) == text


def row(mode: str, backend: str, img_s: float, **other: Any) -> dict[str, Any]:
    fields = {"net": "resnet50", "mode": mode, "batch": 256, "dtype": "bf16", "size": 224, "latency_ms": 2.5}
    fields |= {"backend": backend, "ours": "fastres" in backend, "status": "ok", "img_s": img_s}
    return fields | {"window_img_s": [img_s] * 7} | other


def test_a_table_compares_what_was_measured(readme: ModuleType) -> None:
    rows = [row("train", *one) for one in (("eager-channels-last", 100.0), ("inductor", 200.0), ("fastres", 150.0))]
    rows += [row("train", "fastres-graph", 300.0), row("train", "timm", 900.0, status="wrong")]
    rows += [row("infer", "eager-channels-last", 10.0, batch=1, latency_ms=5.0)]
    rows += [row("infer", "fastres-optimize", 30.0, batch=1)]
    text = readme.table({"rows": rows})
    want = ["150", "300 (`fastres-graph`)", "200 (`inductor`)", "100", "1.50", "3.00"]
    assert row_of(text, "ResNet-50 training, bf16, batch 256")[1:] == want
    alone = ["", "2.50 ms (`fastres-optimize`)", "", "5.00 ms", "", "2.00"]
    assert row_of(text, "ResNet-50 inference, bf16, batch 1")[1:] == alone, "one peer is best of nothing"
    float8 = row("train", "fastres-fp8", 900.0, agreement=0.9)
    assert row_of(readme.table({"rows": [*rows, float8]}), "ResNet-50 training, bf16, batch 256")[1:] == want
    noisy = row("train", "max-autotune", 201.0, status="noisy")
    unsure = ["150", "300 (`fastres-graph`)", "", "100", "", "3.00"]
    assert row_of(readme.table({"rows": [*rows, noisy]}), "ResNet-50 training, bf16, batch 256")[1:] == unsure
    with pytest.raises(ValueError, match="lacks the line"):
        readme.written("no marks", text)


def of_a_cpu() -> dict[str, Any]:
    """A small record: inference at two batches."""
    dtypes = {"eager-channels-last": "fp32", "onnxruntime": "fp32", "onnxruntime-int8": "int8"}
    dtypes |= {"fastres-optimize": "fp32", "fastres-optimize-bf16": "bf16", "fastres-optimize-int8": "int8"}
    rates = {1: (30, 50, 150, 51, 88, 156), 16: (40, 60, 200, 60, 90, 190)}
    rows = [
        row("infer", name, float(rate), batch=batch, dtype="fp32", arithmetic=dtype)
        | {"img_s_min": rate - 1.0, "img_s_max": rate + 1.0}
        for batch, found in rates.items()
        for (name, dtype), rate in zip(dtypes.items(), found, strict=True)
    ]
    rows[4]["status"] = "noisy"
    where = {"device": "cpu", "name": "Quiet CPU", "threads": 2}
    where["versions"] = dict.fromkeys(("torch", "fastres", "onnxruntime"), "1.2")
    flops = [{"net": "resnet50", "variant": "", "paper": None, "ours": 4.09, "beside": "ResNet-50"}]
    made = {"schema": "fastres.bench/3", "created": "2026-11-27", "code": {"commit": "a", "dirty": False}}
    return made | {"environment": where, "flops": flops, "rows": rows}


def test_a_table_of_a_cpu(readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dtype beside eager PyTorch and beside the best peer in it; what is noisy stays out."""
    begin, end = readme.MARKS["cpu"]
    page, record = tmp_path / "README.md", tmp_path / "cpu.json"
    page.write_text(f"before\n{begin}old\n{end}after\n")
    record.write_text(json.dumps(of_a_cpu()))
    monkeypatch.setattr(readme, "README", page)
    monkeypatch.setattr(readme.records, "ROOT", tmp_path)
    assert readme.main([str(record)]) == 0
    text = page.read_text()
    want = ["30", "51", "1.70", "1.02 (`onnxruntime`)", "", "", "", "156", "5.20", "1.04 (`onnxruntime-int8`)"]
    assert row_of(text, "ResNet-50 inference, batch 1")[1:] == want
    assert row_of(text, "ResNet-50 inference, batch 16")[4:8] == ["1.00 (`onnxruntime`)", "90", "2.25", ""]
    assert text.startswith(f"before\n{begin}![Quiet CPU")
    assert text.endswith(f"(cpu.json).\n{end}after\n")
    drawn = (tmp_path / "cpu.svg").read_text()
    for ratio, times in (("1.04", "5.20"), ("0.95", "4.75")):
        assert f"int8  ({ratio} x best peer, {times} x eager)" in drawn


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("timeline", "no CUDA GPU"),
        ("passes", "no CUDA GPU"),
        ("hopper", "needs a CUDA GPU of compute capability 9.0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(script: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(script).main([])
    assert message in capsys.readouterr().err


def test_every_pass_is_timed_by_every_cut() -> None:
    """What is in force while a pass is timed is what its line says; afterwards what was before."""
    passes, norm = importlib.import_module("passes"), importlib.import_module("fastres.kernels.batch_norm")
    before = norm.STREAMED, norm.REDUCED, norm.WINDOWED, norm.WARPS
    seen: list[Any] = []

    def time(call: Any) -> float:
        seen.append((norm.STREAMED, norm.REDUCED, norm.WINDOWED, norm.WARPS))
        return 1.0 + (seen[-1][-1] == 8)

    for name, _, _ in passes.PLACES:
        seen.clear()
        text = passes.line((name, 8, 16), 1, torch.float32, torch.device("cpu"), time)
        kind = passes.work(name, 1, 8, 16, torch.float32, torch.device("cpu"))[1]
        assert seen[0] == before, "the shipped cut first"
        assert len(set(seen)) == len(seen) == len({*passes.CUTS[kind], before[list(passes.CUTS).index(kind)]}) * 2
        assert "fastest: 1.0 (" in text
    assert before == (norm.STREAMED, norm.REDUCED, norm.WINDOWED, norm.WARPS)


def test_short_names_of_kernels() -> None:
    short = importlib.import_module("timeline").short
    assert short("void at::native::add<float, int<2>>(float*, (anonymous namespace)::T)") == "at::native::add"
    assert short("dgrad_kernel") == "dgrad_kernel"


def test_losses_of_a_written_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kernels = importlib.import_module("kernels")
    table = tmp_path / "table.csv"
    lines = ["dgrad,1x1,last,4,100,0,0,0.5,80,0.8,cudnn", "wgrad,3x3,inner,1,300,0,0,0.5,900,3,triton"]
    table.write_text("\n".join([",".join(kernels.COLUMNS), *lines]) + "\n")
    assert kernels.main(["--losses", str(table)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["150.0", "us", "wgrad"]  # 300 - 0.5 x 300
    assert second.split()[:3] == ["120.0", "us", "dgrad"]  # 4 (80 - 0.5 x 100)
