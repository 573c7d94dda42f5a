"""Tests of records: bench/pytest_logs.py reads pytest's logs, and pages and pictures agree with bench/readme.py."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from conftest import pytest_report_header
from PIL import Image

import fastres
from fastres import experiments, picture

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
PICTURES = sorted(path.relative_to(ROOT).as_posix() for path in (BENCH / "records").rglob("*.svg"))
WHERE = {"date": "2026-11-26T14:13:20+00:00", "device": "NVIDIA H200", "torch": "2.11.0", "commit": "0317540999"}


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def proof() -> ModuleType:
    return importlib.import_module("pytest_logs")


@pytest.fixture
def readme() -> ModuleType:
    return importlib.import_module("readme")


def log(path: Path, *lines: str, where: dict[str, str] | None = None) -> Path:
    path.write_text("\n".join((f"tested on: {json.dumps(where or WHERE)}", *lines)) + "\n")
    return path


def row_of(text: str, start: str) -> list[str]:
    """Return the cells of the table row that starts with `start`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_this_run_says_where_it_runs(proof: ModuleType, tmp_path: Path) -> None:
    """pytest_logs.py can read the header that tests/conftest.py writes."""
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
    assert proof.main([str(first), str(again), "--record", str(record)]) == 1, "one test was never reached"
    text = record.read_text()
    assert row_of(text, "**all**") == ["**all**", "**12**", "**3**", "**0**", "**1**", "**8**"]
    assert "Failed first, passed after a mend:\n\n- `tests/test_a.py" in text
    assert text.endswith(f"\n{proof.BY_HAND}\n\nwritten by hand\n")
    assert proof.main([str(again), "--record", str(tmp_path)]) == 0
    assert (tmp_path / "nvidia-h200-tests.md").exists()


def test_files_without_results_and_logs_of_two_machines_are_refused(
    proof: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = "1 worker [1 item]", "[gw0] [100%] PASSED tests/test_a.py::test_one "
    bare, empty = tmp_path / "bare.log", log(tmp_path / "empty.log", result[0])
    bare.write_text("\n".join(result) + "\n")
    here, there = (log(tmp_path / f"{name}.log", *result, where=WHERE | {"device": name}) for name in ("here", "there"))
    told = [
        ([bare], "is not a log of"),
        ([empty], "is not a log of"),
        ([here, there], "there ran with device there"),
    ]
    for arguments, message in told:
        with pytest.raises(SystemExit):
            proof.main(list(map(str, arguments)))
        assert message in capsys.readouterr().err


def test_lost_results_are_failures(proof: ModuleType, tmp_path: Path) -> None:
    """The exit status is 1 for a file that can't be collected, a run that was killed, and a failure that is skipped
    later, with logs in any order."""
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


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pages_show_their_records(page: str, readme: ModuleType) -> None:
    text = (ROOT / page).read_text()
    sources = readme.shown()
    assert sources.keys() == {"cuda", "cpu"}
    assert readme.pages(sources)[page] == text
    for link in re.findall(r"\]\(([^)]+)\)", "".join(readme.inside(text, name, page) for name in readme.PAGES[page])):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_s_tables_are_narrow(readme: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    for name in readme.PAGES["README.md"]:
        lines = readme.inside(text, name, "README.md").splitlines()
        assert all(line.count("|") <= 7 if line.startswith("|") else len(line) <= 120 for line in lines)


@pytest.mark.parametrize("name", PICTURES)
def test_committed_pictures_are_what_their_scripts_draw(name: str, readme: ModuleType) -> None:
    """Pictures must be identical byte by byte with the matplotlib of constraints.txt. Other versions may lay them out
    differently."""
    matplotlib = pytest.importorskip("matplotlib")
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip(f"constraints.txt has another matplotlib than {matplotlib.__version__}")
    known = readme.pictures(readme.shown())
    if name in known:
        kind, source = known[name]
        drawn = picture.encode(importlib.import_module("plot").drawn(kind, ROOT / source), "svg")
    else:
        path = ROOT / name
        with (path.parent / experiments.drawn_from(path.stem)).open(newline="") as table:
            drawn = experiments.draw(path.stem, list(csv.DictReader(table)))
    assert drawn == (ROOT / name).read_bytes(), f"{name}: python bench/readme.py, or experiment --redraw"


def test_every_picture_of_the_records_is_committed(readme: ModuleType) -> None:
    assert readme.pictures(readme.shown()).keys() <= {*PICTURES}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_readable_in_both_modes(name: str) -> None:
    """In dark mode every text changes its colour, and colours that don't change have enough contrast on both
    backgrounds."""
    text = (ROOT / name).read_text()
    style = text.partition("@media (prefers-color-scheme: dark)")[2].partition("</style>")[0]
    assert all(f'[style*="{part}: {light}"]{{{part}: {dark} !important}}' in style
               for light, dark in picture.DARK.items() for part in ("fill", "stroke"))  # fmt: skip
    body = text.partition("</style>")[2]
    words = re.findall(r"<text style=\"([^\"]*)\"", body)
    assert words
    assert {re.findall("fill: (#[0-9a-f]{6})", look)[0] for look in words} <= {picture.INK, picture.FAINT}
    assert len(body) < 100_000
    for colour in {*re.findall("#[0-9a-f]{6}", body)} - picture.DARK.keys():
        for card in (picture.CARD, picture.DARK[picture.CARD]):
            assert contrast(colour, card) >= 3, (colour, card)


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_same_picture_gives_the_same_bytes(kind: str) -> None:
    """Encoding a picture twice gives the same bytes. A PNG is opaque and white in its corners."""
    pytest.importorskip("matplotlib")

    def drawn() -> bytes:
        with picture.style():
            figure = picture.figure(3, 2)
            figure.subplots().plot([1, 3, 2], "o-", color=picture.OURS, label="line")
        return picture.encode(figure, kind)

    assert drawn() == drawn()
    if kind == "png":
        image = Image.open(io.BytesIO(drawn())).convert("RGBA")
        corners = {image.getpixel((x, y)) for x in (0, image.width - 1) for y in (0, image.height - 1)}
        assert corners == {(255, 255, 255, 255)}


def test_ink_stands_out_from_its_card() -> None:
    for name, least in ((picture.INK, 7), (picture.FAINT, 4.5)):
        assert contrast(name, picture.CARD) >= least
        assert contrast(picture.DARK[name], picture.DARK[picture.CARD]) >= least
    for colour in (picture.OURS, picture.PEER, *picture.SERIES):
        assert min(contrast(colour, card) for card in (picture.CARD, picture.DARK[picture.CARD])) >= 3


def contrast(a: str, b: str) -> float:
    """Return the contrast of two colours as the Web Content Accessibility Guidelines define it: 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", [name for name in PICTURES if "experiment" not in name])
def test_no_text_covers_another(name: str, readme: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text overlaps another or leaves the picture, by the bounding boxes of all texts."""
    text = pytest.importorskip("matplotlib.text").Text
    kind, source = readme.pictures(readme.shown())[name]
    figure = importlib.import_module("plot").drawn(kind, ROOT / source)
    figure.draw_without_rendering()
    drawn: dict[Any, None] = {}
    monkeypatch.setattr(text, "draw", lambda self, renderer: drawn.setdefault(self))
    figure.draw_without_rendering()
    boxes = [(one.get_text(), text.get_window_extent(one)) for one in drawn if one.get_visible() and one.get_text()]
    assert len(boxes) > 10
    for i, (words, box) in enumerate(boxes):
        assert figure.bbox.contains(*box.min), words
        assert figure.bbox.contains(*box.max), words
        assert not [other for other, its in boxes[:i] if box.padded(-1).overlaps(its.padded(-1))], words


@pytest.mark.parametrize(("depth", "part", "recomputed"), [(18, 0.63, 0.57), (34, 0.67, 0.55), (50, 0.79, 0.60)])
def test_fastres_saves_fewer_bytes_for_backward_than_stock(depth: int, part: float, recomputed: float) -> None:
    """fastres saves at most `part` of the bytes of stock, and `recomputed` with recomputation. The committed table has
    the same counts.

    Stock saves every convolution's output and the activations between them. fastres saves only the former and, unless
    it recomputes them, the blocks' outputs.
    """
    memory = importlib.import_module("memory")
    row = memory.row(depth, 224)
    assert row["fastres"] <= part * row["pytorch"]
    assert row["recompute"] <= recomputed * row["pytorch"]
    with (ROOT / "bench" / "records" / "memory.csv").open(newline="") as file:
        committed = {int(line["depth"]): line for line in csv.DictReader(file)}
    assert {name: int(value) for name, value in committed[depth].items()} == row


@pytest.mark.parametrize(("norms", "part"), [("eval", 0.43), ("frozen", 0.31), ("detector", 0.35)])
@pytest.mark.parametrize("depth", [18, 50])
def test_frozen_norms_save_a_fraction_of_stocks_bytes(depth: int, norms: str, part: float) -> None:
    """Only what the convolutions read, and the outputs of blocks. The committed table has the same numbers."""
    row = importlib.import_module("memory").frozen_row(depth, 224, norms)
    assert row["fastres"] <= part * row["pytorch"]
    with (ROOT / "bench" / "records" / "memory-frozen.csv").open(newline="") as file:
        committed = {(int(line["depth"]), line["norms"]): line for line in csv.DictReader(file)}
    assert committed[depth, norms] == {name: str(value) for name, value in row.items()}


def test_frozen_norms_save_what_a_count_by_hand_says() -> None:
    """fastres with FrozenBatchNorm2d, ResNet-18, in elements of a 224 x 224 image of two bytes each.

    The image; the pool's output and its taps (one byte each); for each of 8 blocks the activation between its
    convolutions and its output; the average.
    """
    maps = [64 * 56**2 >> s for s in range(4)]
    elements = 3 * 224**2 + maps[0] + sum(2 * 2 * size for size in maps) + 512
    assert importlib.import_module("memory").per_image(fastres, 18, 224, "frozen") == 2 * elements + maps[0]


def test_saved_bytes_are_those_counted_by_hand() -> None:
    """The saved bytes of eager PyTorch's ResNet-18 agree with a count by hand.

    The count, in elements of a 224 x 224 image: the image; the stem's convolution, its activation and the pool's
    indices (8 bytes each); for each of 8 blocks both convolutions, the activation between them and the block's output;
    3 projections; the average. The pool's output is the first block's input.
    """
    stem, maps = 64 * 112**2, [64 * 56**2 >> s for s in range(4)]
    elements = 3 * 224**2 + 2 * stem + maps[0] + sum(2 * 4 * size for size in maps) + sum(maps[1:]) + 512
    assert importlib.import_module("memory").per_image(torchvision.models, 18, 224) == 2 * elements + 8 * maps[0]


def row(mode: str, backend: str, img_s: float, **other: Any) -> dict[str, Any]:
    fields = {"net": "resnet50", "mode": mode, "batch": 256, "dtype": "bf16", "size": 224, "latency_ms": 2.5}
    fields |= {"backend": backend, "ours": "fastres" in backend, "status": "ok", "img_s": img_s}
    return fields | {"window_img_s": [img_s] * 7} | other


def test_a_table_compares_what_was_measured(readme: ModuleType) -> None:
    rows = [row("train", *one) for one in (("eager-channels-last", 100.0), ("inductor", 200.0), ("fastres", 150.0))]
    rows += [row("train", "fastres-graph", 300.0), row("train", "timm", 900.0, status="wrong")]
    rows += [row("infer", "eager-channels-last", 10.0, batch=1, latency_ms=5.0)]
    rows += [row("infer", "fastres-optimize", 30.0, batch=1)]
    rows += [row("train", "fastres", 150.0, dtype="fp16"), row("train", "fastres", 150.0, batch=2)]
    versions = {"torch": "2.11.0", "triton": "3.6.0", "cudnn": "91900"}
    record = {"created": "2026-11-26", "environment": {"device": "cuda", "name": "H", "versions": versions}}

    def lines(*more: Any) -> dict[str, list[str]]:
        text = readme.summary_of_gpu(record | {"rows": [*rows, *more]}, "bench/records/h.json")
        assert "cuDNN 9.19.0." in text
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "batch" in line]
        return {first: rest for first, *rest in cells}

    want = ["100", "200 torch.compile", "**300** fastres, step in a CUDA graph", "1.50", "3.00"]
    alone = ["10.0 (5.00 ms)", "", "**30.0 (2.50 ms)** fastres.optimize", "", "3.00"]
    training = "ResNet-50 training, bf16, batch 256"
    assert lines() == {training: want, "ResNet-50 inference, bf16, batch 1": alone}, (
        "eager PyTorch is not also listed as the best peer"
    )
    assert lines(row("train", "fastres-fp8", 900.0, agreement=0.9))[training] == want
    noisy = row("train", "max-autotune", 201.0, status="noisy")
    assert lines(noisy)[training] == ["100", "", "**300** fastres, step in a CUDA graph", "", "3.00"]
    shown = {one["backend"] for one in importlib.import_module("plot").chosen({"rows": [*rows, noisy]})}
    assert {"max-autotune", "fastres-graph", "eager-channels-last"} <= shown, "no other row is shown as the best peer"
    assert not {"inductor", "timm"} & shown
    with pytest.raises(ValueError, match=r"README\.md lacks the line <!-- results: bench/readme\.py -->"):
        readme.written("no marks", "results", "text", "README.md")


def of_a_cpu() -> dict[str, Any]:
    """Return a small record of a CPU: inference at two batch sizes."""
    dtypes = {"eager-channels-last": "fp32", "onnxruntime": "fp32", "onnxruntime-int8": "int8"}
    dtypes |= {"fastres-optimize": "fp32", "fastres-optimize-bf16": "bf16", "fastres-optimize-int8": "int8"}
    rates = {1: (30, 50, 150, 51, 88, 156), 16: (40, 60, 200, 60, 90, 190)}
    rows = [
        row("infer", name, float(rate), batch=batch, dtype="fp32", arithmetic=dtype)
        | {"img_s_min": rate - 1.0, "img_s_max": rate + 1.0, "first_call_s": 1.5}
        for batch, found in rates.items()
        for (name, dtype), rate in zip(dtypes.items(), found, strict=True)
    ]
    rows[4]["status"] = "noisy"
    where = {"device": "cpu", "name": "Quiet CPU", "threads": 2}
    where["versions"] = dict.fromkeys(("torch", "fastres", "onnxruntime"), "1.2")
    flops = [{"net": "resnet50", "variant": "", "paper": None, "ours": 4.09, "beside": "ResNet-50"}]
    code = {"commit": "a", "dirty": False, "sources": "b"}
    made = {"schema": "fastres.bench/3", "created": "2026-11-27", "code": code, "options": {}}
    return made | {"environment": where, "flops": flops, "rows": rows}


def test_the_pages_of_a_cpu_compare_each_dtype_with_the_best_peer(
    readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each dtype is compared with eager PyTorch and with the best peer in it, and noisy rows are left out. A record
    given as an argument replaces the one that is shown."""
    folder = tmp_path / "bench" / "records"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (folder / "cpu.json").write_text(json.dumps(of_a_cpu()))
    for table in (readme.MEMORY, readme.FROZEN):
        shutil.copy(ROOT / table, folder)
    for page, blocks in readme.PAGES.items():
        marks = [f"<!-- {name}: bench/readme.py -->\nold\n<!-- /{name} -->\n" for name in blocks]
        (tmp_path / page).write_text(f"before\n{''.join(marks)}after\n")
    monkeypatch.setattr(readme.records, "ROOT", tmp_path)
    for arguments in ([str(folder / "cpu.json")], []):  # the second time, the page links to the record
        assert readme.main(arguments) == 0
        text = (tmp_path / "README.md").read_text()
        assert row_of(text, "eager PyTorch, fp32")[1:] == ["30.0", "40.0"]
        first, second = (f"**{rate}** ({a} x eager, {b} x ONNX Runtime)" for rate, a, b in
                         (("51.0", "1.70", "1.02"), ("60.0", "1.50", "1.00")))  # fmt: skip
        assert row_of(text, "`fastres.optimize`, fp32")[1:] == [first, second]
        assert row_of(text, "`fastres.optimize`, bf16")[1:] == ["", "**90.0** (2.25 x eager)"]
        want = "**156** (5.20 x eager, 1.04 x ONNX Runtime in int8)"
        assert row_of(text, "`fastres.optimize`, int8")[1] == want
        assert text.startswith("before\n<!-- results: bench/readme.py -->\nold\n<!-- /results -->\n"), "no GPU's record"
        assert text.endswith("<!-- /memory -->\nafter\n")
        full = (tmp_path / "docs" / "benchmarks.md").read_text()
        noisy = "| **`fastres-optimize-bf16`** | bf16 | 88.0 (noisy) | 87.0 to 89.0 | 2.50 | 1.5 |  |  |"
        assert noisy in full
        drawn = (folder / "cpu.svg").read_text()
        for ratio, times in (("1.04", "5.20"), ("0.95", "4.75")):
            assert f">{ratio} x best int8 peer, {times} x fp32 eager<" in drawn
        assert ">onnxruntime-int8<" in (folder / "cpu-compile.svg").read_text()
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(SystemExit):
        readme.main([])
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == full


def test_a_cpus_record_without_inference_is_refused(readme: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"bench/records/x\.json has no inference rows"):
        readme.summary_of_cpu({"rows": []}, "bench/records/x.json")


def test_files_that_cannot_be_drawn_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plot, table = importlib.import_module("plot"), ROOT / "bench" / "records" / "nvidia-h200-kernels-50.csv"
    doubled = tmp_path / "fp32.csv"
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    with doubled.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(line | {"roofline": 2 * float(line["roofline"])} for line in lines)
    cut, empty = tmp_path / "cut.csv", tmp_path / "empty.csv"
    cut.write_text("depth,size,pytorch,fastres,recompute\n18,224,11892736,7376896,6624256\n34,224,169103")
    empty.touch()
    told = [
        ([doubled, tmp_path / "a.svg", "roofline"], "is not that of an NVIDIA H200 in 16 bits"),
        ([tmp_path / "no.json", tmp_path / "a.svg"], "No such file"),
        ([table, tmp_path / "a.svg"], "is not a record"),
        ([table, tmp_path / "a.gif", "roofline"], "a name that ends in .png, .svg, .pdf"),
        (
            [table, tmp_path / "a.svg", "memory"],
            "kernels-50.csv is not a table of this kind: it lacks depth, size, pytorch",
        ),
        ([cut, tmp_path / "a.svg", "memory"], "cut.csv is not a table of this kind: it lacks fastres, recompute"),
        ([empty, tmp_path / "a.svg", "roofline"], "empty.csv is not a table of this kind: it lacks rows"),
    ]
    for arguments, message in told:
        with pytest.raises(SystemExit):
            plot.main(list(map(str, arguments)))
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.svg").exists()


def test_a_picture_s_folder_is_made(tmp_path: Path) -> None:
    target = tmp_path / "out" / "memory.png"
    assert importlib.import_module("plot").main([str(ROOT / "bench/records/memory.csv"), str(target), "memory"]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_pictures_need_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = [str(ROOT / "bench/records/memory.csv"), str(tmp_path / "a.svg"), "memory"]
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("plot").main(arguments)
    assert stopped.value.code == 2
    assert "matplotlib" in capsys.readouterr().err


def test_hopper_asks_every_question_in_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`main` starts a process for each question, prints its line and writes the table. GPU and processes are
    stand-ins."""
    hopper, started = importlib.import_module("hopper"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(hopper, "head", lambda: "questions\n")
    monkeypatch.setattr(hopper.subprocess, "Popen", lambda command, **_: started.append(command[-1]))
    monkeypatch.setattr(hopper, "line_of", lambda child, name: (f"{name} | yes | 1", 0))
    assert hopper.main(["--markdown", str(tmp_path / "answers.md")]) == 0
    assert started == list(hopper.QUESTIONS)
    assert (tmp_path / "answers.md").read_text().splitlines() == [
        "questions",
        *(f"| {name} | yes | 1 |" for name in hopper.QUESTIONS),
    ]
    assert capsys.readouterr().out.splitlines() == [f"{name} | yes | 1" for name in hopper.QUESTIONS]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("timeline", "no CUDA GPU"),
        ("memory_bound", "no CUDA GPU"),
        ("hopper", "needs a CUDA GPU of compute capability 9.0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_scripts_for_a_gpu_refuse_to_run_without_one(script: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(script).main([])
    assert message in capsys.readouterr().err


def test_every_pass_is_timed_with_every_tile_shape() -> None:
    """Each pass is timed with every tile shape and number of warps, first with the shipped ones, which are restored
    afterwards."""
    memory_bound, norm = importlib.import_module("memory_bound"), importlib.import_module("fastres.kernels.batch_norm")
    before = norm.STREAMED, norm.REDUCED, norm.WINDOWED, norm.WARPS
    seen: list[Any] = []

    def time(call: Any) -> float:
        seen.append((norm.STREAMED, norm.REDUCED, norm.WINDOWED, norm.WARPS))
        return 1.0 + (seen[-1][-1] == 8)

    for name, _, _ in memory_bound.PLACES:
        seen.clear()
        text = memory_bound.line((name, 8, 16), 1, torch.float32, torch.device("cpu"), time)
        kind = memory_bound.work(name, 1, 8, 16, torch.float32, torch.device("cpu"))[1]
        assert seen[0] == before, "the shipped shape comes first"
        assert (
            len(set(seen))
            == len(seen)
            == len({*memory_bound.CUTS[kind], before[list(memory_bound.CUTS).index(kind)]}) * 2
        )
        assert "fastest: 1.0 (" in text
    assert before == (norm.STREAMED, norm.REDUCED, norm.WINDOWED, norm.WARPS)


def test_kernels_have_short_names() -> None:
    short = importlib.import_module("timeline").short
    assert short("void at::native::add<float, int<2>>(float*, (anonymous namespace)::T)") == "at::native::add"
    assert short("dgrad_kernel") == "dgrad_kernel"


def test_losses_of_a_written_table_are_sorted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kernels = importlib.import_module("kernels")
    table = tmp_path / "table.csv"
    lines = ["dgrad,1x1,last,4,100,0,0,0.5,80,0.8,cudnn", "wgrad,3x3,inner,1,300,0,0,0.5,900,3,triton"]
    table.write_text("\n".join([",".join(kernels.COLUMNS), *lines]) + "\n")
    assert kernels.main(["--losses", str(table)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["150.0", "us", "wgrad"]  # 300 - 0.5 x 300
    assert second.split()[:3] == ["120.0", "us", "dgrad"]  # 4 (80 - 0.5 x 100)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda record: record.pop("created"), "created is missing"),
        (lambda record: record.update(rows=None), "rows is missing"),
        (lambda record: record["environment"].pop("name"), r"environment\.name is missing"),
        (lambda record: record["rows"].append(1), "is not a row"),
        (lambda record: record["rows"][0].update(img_s="fast"), "row 0 lacks img_s"),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, damage: Any, said: str) -> None:
    records = importlib.import_module("record")
    record = records.read(BENCH / "records" / "cpu-epyc.json")
    damage(record)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"record\.json is a damaged record: .*{said}"):
        records.read(path)


def test_deeply_nested_json_is_not_a_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"record\.json is not a record"):
        importlib.import_module("record").read(path)
