"""Test `tests/helpers/binary.py`, which inspects compiled kernels: it must find the faults that are built in here."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from binary import Binary, check, compile_kernel, record

pytestmark = pytest.mark.compiles


@triton.jit
def gemm_kernel(
    x_desc, w_desc, y_desc, steps,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    RELU: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y = x wᵀ. With RELU, y = relu(x) wᵀ: wgmma's first operand is then in registers (RS)."""
    tl.assume(steps > 0)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(steps):
        x = x_desc.load([0, k * BK])
        if RELU:
            x = tl.maximum(x.to(tl.float32), 0.0).to(x.dtype)
        acc = tl.dot(x, w_desc.load([0, k * BK]).T, acc)
        if WAIT:  # emits no instruction, but reads the accumulator and so waits for wgmma
            acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    y_desc.store([0, 0], acc.to(tl.bfloat16))


@triton.jit
def scale_kernel(x_ptr, y_ptr, size, factor, BLOCK: tl.constexpr):
    """Compute y = factor x."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(y_ptr + offsets, x * factor, mask=offsets < size)


def gemm(sm: int = 90, *, BM: int = 128, RELU: bool = False, WAIT: bool = False) -> Binary:
    return compile_kernel(
        gemm_kernel,
        {
            "x_desc": f"tensordesc<bf16[{BM}, 64]>",
            "w_desc": "tensordesc<bf16[128, 64]>",
            "y_desc": f"tensordesc<bf16[{BM}, 128]>",
            "steps": "i32",
        },
        {"BM": BM, "BN": 128, "BK": 64, "RELU": RELU, "WAIT": WAIT},
        sm=sm,
    )


def test_clean_wgmma() -> None:
    binary = gemm()
    check(binary, matrix="HGMMA", present=("UTMALDG", "UTMASTG"), loop_absent=("LDG", "LDS", "STS"), shared=227 * 1024)
    assert binary.matrix == {"HGMMA.64x128x16 SS": 8}
    assert binary.count("HGMMA", loop=True) == binary.opcodes(loop=True)["HGMMA"] == 8
    assert binary.count("HGMMA.BF16.F32") == 8
    assert binary.count("HGMMA.F16") == 0


def test_spill() -> None:
    binary = gemm(BM=256)
    assert binary.spill > 0
    assert binary.count("LDL", loop=True) > 0
    with pytest.raises(AssertionError, match=r"gemm_kernel for sm_90: \d+ B spilled.*ptxas: .*C7511"):
        check(binary)


def test_register_hazard() -> None:
    """Triton 3.6 overwrites the register operand of a wgmma in flight (triton#9433); waiting for wgmma avoids it."""
    binary = gemm(RELU=True)
    assert binary.matrix == {"HGMMA.64x128x16 RS": 8}
    with pytest.raises(AssertionError, match=r"hazard: instruction \d+, .* writes R\d+ while wgmma may read it"):
        check(binary)
    assert gemm(RELU=True, WAIT=True).hazards == ()


@pytest.mark.parametrize(("sm", "opcode"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_matrix_instruction_by_target(sm: int, opcode: str) -> None:
    check(gemm(sm), matrix=opcode)
    with pytest.raises(AssertionError, match="expected only HMMA"):
        check(gemm(sm), matrix="HMMA")


def scale(sm: int = 90, *, factor: str = "fp32", divisible: tuple[str, ...] | None = None) -> Binary:
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32", "factor": factor}
    return compile_kernel(scale_kernel, signature, {"BLOCK": 1024}, sm=sm, divisible=divisible)


def test_no_matrix_instruction() -> None:
    check(scale(), matrix="", absent=("LDL", "LDG.64"))
    with pytest.raises(AssertionError, match="matrix instructions none, expected only HGMMA"):
        check(scale(), matrix="HGMMA")


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_every_target(sm: int) -> None:
    binary = scale(sm, divisible=("x_ptr", "y_ptr", "size"))
    check(binary, registers=64, present=("LDG.128", "STG.128"))
    assert binary.sm == sm
    assert binary.loop == ()


def test_divisibility_decides_the_width() -> None:
    with pytest.raises(AssertionError, match=r"no LDG\.128 in it; STG x8 in it"):
        check(scale(), present=("LDG.128",), absent=("STG",))


def test_limits() -> None:
    with pytest.raises(AssertionError, match=r"\d+ registers, at most 8 allowed; \d+ B of shared memory, at most 0"):
        check(gemm(), registers=8, shared=0)


def test_arguments_are_named_once() -> None:
    with pytest.raises(ValueError, match=r"scale_kernel takes .*'factor'.* but"):
        compile_kernel(scale_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32"}, {"BLOCK": 1024})


def test_recorded_launch() -> None:
    """A launch recorded on meta tensors compiles with the types, divisibility and constants that a GPU would use."""
    x = torch.empty(4096, device="meta")
    with record() as launches:
        scale_kernel[(4,)](x, torch.empty_like(x), x.numel(), 2.0, BLOCK=1024, num_warps=8)
    (launch,) = launches
    assert launch.fn is scale_kernel
    assert launch.grid == (4,)
    binary = launch.compile(sm=80)
    check(binary, present=("LDG.128", "STG.128"))
    assert binary.count("LDG.128") == 1  # 1024 values, 8 warps, 4 each
