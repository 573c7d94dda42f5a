"""Tests of bench/layers_cpu.py: each convolution of the plan is matched with the same convolution in ONNX Runtime."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from covering import extra

import fastres

BENCH = Path(__file__).resolve().parents[2] / "bench"
pytest.importorskip("onnxruntime")


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("layers_cpu")


def test_the_table_has_every_convolution_and_the_sum(
    layers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The table has every convolution of the net with both times, and the totals."""
    file = tmp_path / "new" / "layers.csv"
    assert layers.main(["--depth", "18", "--size", "32", "--csv", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "resnet18, batch 1, fp32, 32x32" in printed
    head, *rows = csv.reader(file.open())
    assert head == layers.COLUMNS
    convs = {name for name, m in fastres.resnet18().named_modules() if isinstance(m, torch.nn.Conv2d)}
    both = {row[0]: row[1:] for row in rows if row[1] and row[2]}
    assert both.keys() == convs | {"all"}
    for side in (1, 2):
        assert sum(int(row[side] or 0) for row in rows[:-1]) == pytest.approx(int(rows[-1][side]), abs=len(rows))
    assert all(name in printed for name in ("ours: fc", "ONNX Runtime: Gemm", "layer4.0.downsample.0"))


@pytest.mark.parametrize("dtype", ["fp32", extra("int8")])
def test_convolutions_are_matched_with_onnxruntimes(layers: ModuleType, dtype: str, tmp_path: Path) -> None:
    """Convolutions are matched by channels and heights, then by their order in the net.

    A projection may run before or after the other convolutions of its block, and may have the shape of one of them.
    """
    net = fastres.resnet50().eval()
    images = torch.rand(1, 3, 32, 32)
    fast = fastres.optimize(net, images)
    run = getattr(layers.runtimes, {"fp32": "onnxruntime", "int8": "onnxruntime_int8"}[dtype])
    call = run(net, [images], tmp_path / "profile")
    for _ in range(2):
        call(images)
    nodes = layers.nodes(Path(call.session.end_profiling()))
    mine = layers.ours(fast, images, layers.steps(fast, images, 1))
    marked = [t._replace(microseconds=float(i)) for i, t in enumerate(sorted(mine, key=lambda t: t.order))]
    pairs = [line for line in layers.matched(marked, nodes) if None not in line]
    assert len(pairs) == 53
    times = {node.microseconds for node in nodes if node.place}
    assert {line[2] for line in pairs} == times
    place = {t.name: t.place for t in mine}
    assert place["layer1.0.conv3"] == place["layer1.0.downsample.0"]
    twins = [t for t in nodes if t.place == place["layer1.0.conv3"]]
    first, second = sorted(twins, key=lambda t: t.order)[:2]
    found = {name: theirs for name, _, theirs in pairs}
    assert found["layer1.0.conv3"] == first.microseconds
    assert found["layer1.0.downsample.0"] == second.microseconds
    with pytest.raises(ValueError, match="are not those of the plan"):
        layers.matched(mine[1:], nodes)


def test_impossible_arguments_are_refused(
    layers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    for arguments, said in ((["--dtype", "int8"], "no AVX512-VNNI"), (["--batch", "0"], "--batch must be at least 1")):
        with pytest.raises(SystemExit):
            layers.main(arguments)
        assert said in capsys.readouterr().err
