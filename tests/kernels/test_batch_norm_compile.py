"""Compile the memory-bound kernels for each GPU generation and check instructions and registers of the binaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from binary import Binary, check, record
from covering import covered, each
from torch import Tensor

from fastres.kernels import batch_norm
from fastres.kernels.batch_norm import Pool
from fastres.kernels.max_pool import max_pool
from fastres.kernels.pad_shortcut import pad_shortcut_backward

pytestmark = pytest.mark.compiles

N, P, Q = 32, 28, 28


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(K: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return, by name, calls that launch each kernel with each set of options, for activations of K channels."""
    z = meta(N, P, Q, K, dtype=dtype)
    half = meta(N, 2 * P, 2 * Q, max(1, K // 2), dtype=dtype)
    pooled = meta(N, P // 2, Q // 2, K, dtype=dtype)
    pool = Pool(meta(N, P // 2, Q // 2, K, dtype=torch.uint8), 3, 2, 1)
    quarter = meta(N, P // 4, Q // 4, K, dtype=dtype)
    wide = Pool(meta(N, P // 4, Q // 4, K, dtype=torch.uint8), 4, 4, 0)
    v = meta(K)
    affine, four = (v, v), (z, v, v, v)
    bn = batch_norm
    return {
        "statistics": lambda: bn.statistics(z),
        "normalize": lambda: bn.normalize(z, v, v, relu=False),
        "normalize relu": lambda: bn.normalize(z, v, v, relu=True),
        "normalize add relu": lambda: bn.normalize(z, v, v, relu=True, residual=z),
        "normalize project relu": lambda: bn.normalize(
            z, v, v, relu=True, residual=z, residual_scale=v, residual_shift=v
        ),
        "normalize pad relu": lambda: bn.normalize(z, v, v, relu=True, residual=half, residual_stride=2),
        "normalize max pool": lambda: bn.normalize_max_pool(z, v, v),
        "max pool": lambda: max_pool(z),
        "reduce": lambda: bn.backward_reduce(z, z, v),
        "reduce, mask y": lambda: bn.backward_reduce(z, z, v, mask=z),
        "reduce, mask z": lambda: bn.backward_reduce(z, z, v, mask=affine),
        "reduce, project": lambda: bn.backward_reduce(z, z, v, mask=z, projection=(z, v)),
        "reduce, pool": lambda: bn.backward_reduce(pooled, z, v, mask=affine, pool=pool),
        "apply": lambda: bn.backward_apply(z, *four),
        "apply, mask y": lambda: bn.backward_apply(z, *four, mask=z),
        "apply, mask z": lambda: bn.backward_apply(z, *four, mask=affine),
        "apply, project": lambda: bn.backward_apply(z, *four, mask=z, projection=four),
        "apply, pool": lambda: bn.backward_apply(pooled, *four, mask=affine, pool=pool),
        "reduce, wide pool": lambda: bn.backward_reduce(quarter, z, v, mask=affine, pool=wide),
        "apply, wide pool": lambda: bn.backward_apply(quarter, *four, mask=affine, pool=wide),
        "apply, given statistics": lambda: bn.backward_apply(z, z, v, None, None, mask=z),
        "pad backward": lambda: pad_shortcut_backward(half, z, stride=2, mask=z),
    }


def finishing_calls(parameters: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return calls of the last stage of the reductions, which doesn't depend on the dtype of activations."""
    v, w = meta(64), meta(64, dtype=parameters)
    bn = batch_norm
    return {
        "finish statistics": lambda: bn.finish_statistics(
            meta(600, 3, 64),
            w,
            w,
            1e-5,
            running_mean=w,
            running_var=w,
            momentum=0.1,
            counter=torch.empty((), dtype=torch.int64, device="meta"),
        ),
        "finish statistics, bare": lambda: bn.finish_statistics(meta(9, 3, 64), None, None, 1e-5),
        "running statistics": lambda: bn.running_statistics(w, w, w, w, 1e-5),
        "finish backward": lambda: bn.finish_backward(meta(600, 2, 64), w, v, v, 100, batch_statistics=True),
        "finish backward, bare": lambda: bn.finish_backward(meta(9, 2, 64), None, v, v, 100, batch_statistics=False),
    }


def compiled(call: Callable[[], Any], sm: int) -> list[Binary]:
    with record() as launches:
        call()
    assert launches
    return [launch.compile(sm) for launch in launches]


def hold(name: str, K: int, dtype: torch.dtype, sm: int) -> None:
    """Assert that a kernel has no spills or atomics and at most 128 registers (16 warps fit on a multiprocessor).

    If 8 divides K, all accesses must be 16 bytes per thread, except for a max pool's taps (one byte per channel) and
    the few partials that a reduction writes.
    """
    (binary,) = compiled(calls(K, dtype)[name], sm)
    check(binary, registers=128, matrix="", absent=FORBIDDEN)
    if K % 8:
        return
    check(binary, present=("LDG.128",), absent=("LDG.U8", "LDG.U16", "STG.U8", "STG.U16"))
    narrow = {op: binary.count(op) - binary.count(f"{op}.128") for op in ("LDG", "STG")}
    assert "pool" in name or not narrow["LDG"], f"{name}: {narrow} narrow accesses"
    if binary.name not in ("statistics_kernel", "backward_reduce_kernel"):
        check(binary, present=("STG.128",))
        assert "max pool" in name or not narrow["STG"], f"{name}: {narrow} narrow accesses"


FORBIDDEN = ("LDL", "STL", "ATOM", "ATOMG", "RED", "REDG")
NAMES = list(calls(64, torch.bfloat16))
# Every call is compiled for Hopper. Outside the slow sweeps, only these, which keep the most values in registers, are
# compiled for other GPUs.
HEAVY = [
    "statistics",
    "normalize max pool",
    "max pool",
    "reduce, project",
    "reduce, pool",
    "apply, project",
    "apply, pool",
]


@pytest.mark.parametrize("name", NAMES)
def test_hopper(name: str) -> None:
    hold(name, 64, torch.bfloat16, 90)


@covered(by=each, name=HEAVY, sm=[80, 100])
def test_other_generations(name: str, sm: int) -> None:
    hold(name, 64, torch.bfloat16, sm)


@covered(by=each, name=HEAVY, layout=[(64, torch.float32), (24, torch.float16), (5, torch.bfloat16)])
def test_other_layouts(name: str, layout: tuple[int, torch.dtype]) -> None:
    hold(name, *layout, 90)


@pytest.mark.parametrize("name", list(finishing_calls(torch.float32)))
def test_last_stage(name: str) -> None:
    for binary in compiled(finishing_calls(torch.float32)[name], 90):
        check(binary, registers=128, matrix="", absent=FORBIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [64, 16, 5])
@pytest.mark.parametrize("name", NAMES)
def test_sweep(name: str, K: int, dtype: torch.dtype, sm: int) -> None:
    hold(name, K, dtype, sm)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [89, 120])
@pytest.mark.parametrize("name", NAMES)
def test_sweep_of_smaller_gpus(name: str, sm: int) -> None:
    hold(name, 64, torch.float16, sm)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 100])
@pytest.mark.parametrize("name", list(finishing_calls(torch.float32)))
def test_last_stage_sweep(name: str, sm: int) -> None:
    for binary in compiled(finishing_calls(torch.bfloat16)[name], sm):
        check(binary, registers=128, matrix="", absent=FORBIDDEN)
