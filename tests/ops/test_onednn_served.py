"""`dispatch.why_no_onednn`: the conditions under which oneDNN's convolutions are used on a CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fastres.ops import dispatch, quantised

_NARROW = (torch.bfloat16, torch.float16, torch.int8, torch.qint8, torch.quint8)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a CPU that meets all conditions."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    monkeypatch.setattr(quantised, "saturates", lambda: False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def _lacks(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    def take(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:
            monkeypatch.setattr(torch.cpu, name, lambda: False)

    return take


@pytest.mark.parametrize("dtype", [torch.float32, *_NARROW], ids=str)
def test_a_cpu_with_everything_is_served(able: None, dtype: torch.dtype) -> None:
    assert dispatch.why_no_onednn(dtype) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(able: None, dtype: torch.dtype) -> None:
    assert str(dtype) in (dispatch.why_no_onednn(dtype) or "")


@pytest.mark.parametrize("dtype", [torch.float32, *_NARROW], ids=str)
def test_without_onednn_nothing_is_served(able: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert "enabled is False" in (dispatch.why_no_onednn(dtype) or "")
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        assert "aarch64" in (dispatch.why_no_onednn(dtype) or "")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in (dispatch.why_no_onednn(dtype) or "")


@pytest.mark.parametrize(
    ("dtype", "take", "word"),
    [
        (torch.bfloat16, _lacks("_is_avx512_bf16_supported", "_is_amx_tile_supported"), "AMX"),
        (torch.int8, _lacks("_is_vnni_supported"), "VNNI"),
        (torch.quint8, _lacks("_is_vnni_supported"), "saturate"),
        (torch.int8, lambda monkeypatch: monkeypatch.setattr(quantised, "saturates", lambda: True), "saturates"),
        (
            torch.float16,
            lambda monkeypatch: monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False),
            "float16",
        ),
    ],
    ids=["bf16", "int8", "quint8", "int8 saturates", "fp16"],
)
def test_a_cpu_without_the_instructions_refuses_the_dtype(
    able: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    take: Callable[[pytest.MonkeyPatch], None],
    word: str,
) -> None:
    take(monkeypatch)
    assert word in (dispatch.why_no_onednn(dtype) or "")
    assert dispatch.why_no_onednn(torch.float32) is None


@pytest.mark.parametrize("has", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bf16_needs_avx512_bf16_or_amx(able: None, monkeypatch: pytest.MonkeyPatch, has: str) -> None:
    _lacks(*({"_is_avx512_bf16_supported", "_is_amx_tile_supported"} - {has}))(monkeypatch)
    assert dispatch.why_no_onednn(torch.bfloat16) is None


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_limited_onednn_serves_float32_only(able: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "AVX2")
    assert dispatch.why_no_onednn(torch.float32) is None
    for dtype in _NARROW:
        assert f"{name}=AVX2" in (dispatch.why_no_onednn(dtype) or "")


_SUM = """
import torch
torch.backends.quantized.engine = "onednn"
weights = torch.full((32, 64, 3, 3), 127, dtype=torch.int8)
ones, none = torch.full((32,), 1 / 127).double(), torch.zeros(32).long()
packed = torch.ops.quantized.conv2d_prepack(
    torch._make_per_channel_quantized_tensor(weights, ones, none, 0), None, [1, 1], [1, 1], [1, 1], 1
)
x = torch.quantize_per_tensor(torch.ones(1, 64, 8, 8), 1 / 255, 0, torch.quint8)
print(torch.ops.quantized.conv2d(x, packed, 576 / 255, 0).dequantize()[0, 0, 4, 4].item())
"""


@pytest.mark.skipif(dispatch.why_no_onednn(torch.int8) is not None, reason="needs a CPU that serves int8")
def test_a_limited_onednn_sums_int8_wrongly() -> None:
    """The largest possible sum of 576 products is exact with VNNI, and saturates if oneDNN may not use VNNI."""

    def result(**limit: str) -> float:
        run = subprocess.run([sys.executable, "-c", _SUM], env=os.environ | limit, capture_output=True, text=True)
        return float(run.stdout)

    assert result() == pytest.approx(576)
    assert result(ONEDNN_MAX_CPU_ISA="AVX2") < 400
