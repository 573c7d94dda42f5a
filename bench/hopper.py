"""Check on the hardware what the kernels assume of a Hopper GPU, its driver and Triton, or may assume in the future.

    python bench/hopper.py --markdown out/hopper.md
    python bench/hopper.py --question halo

oob: which value TMA fills in outside a tensor with padding="nan", and whether `fma.oob.relu` turns it into the zero of
    a padding.
strides: whether the driver accepts the views of kernels/stem.py (overlapping windows) and kernels/fprop.py (5-D pairs).
halo: whether wgmma's second operand may start at any swizzle atom (8 rows, 1 KiB) of shared memory.
register-operand: whether a wgmma reads registers that are already overwritten (triton#9433), and what the wait in wgrad
    that prevents it costs.
l2: the bandwidth from L2 to the multiprocessors, next to that of memory and the rate of a large matmul.

Prints a line `question | answer | figures` for each. Every question has its own process and 40 seconds. An exception
becomes its answer. All processes compile at the same time and then time one after the other. The exit status is the
number of failures. Needs a CUDA GPU of compute capability 9.0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia import hopper
from triton.testing import do_bench
from triton.tools.tensor_descriptor import TensorDescriptor

Answer = tuple[str, str]  # a sentence, and the figures that support it
Ready = Callable[[], object]  # returns when nothing else runs on the GPU

DEVICE, BF16 = "cuda", torch.bfloat16
LIMIT_S = 40


@triton.jit
def oob_kernel(x, loaded, result, scale, shift, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store the box of x at (row, col) as loaded, and relu(scale x + shift) of it, which is 0 where x is the fill
    value."""
    box = x.load([row, col])
    c = tl.arange(0, COLS)[None, :]
    at = tl.arange(0, ROWS)[:, None] * COLS + c
    fma: tl.constexpr = "fma.rn.oob.relu.bf16x2 $0, $1, $2, $3;"
    operands = [box, tl.load(scale + c), tl.load(shift + c)]
    y = tl.inline_asm_elementwise(fma, "=r,r,r,r", operands, dtype=tl.bfloat16, is_pure=True, pack=2)
    tl.store(loaded + at, box)
    tl.store(result + at, y)


def oob(ready: Ready) -> Answer:
    """Ask what TMA fills in outside a tensor, and whether it becomes 0."""
    rows, cols, top, left = 20, 48, 4, 8  # a box [32, 64] leaves the tensor on all four sides
    x = torch.randn(rows, cols).to(BF16)
    nans = [0x7FC0, 0xFFC0, 0x7F81, 0x7FFF, 0xFFFF]
    x.view(torch.int16)[3, : len(nans)] = torch.tensor(nans).to(torch.int16)
    scale, shift = torch.randn(64).to(BF16), torch.ones(64, dtype=BF16)
    loaded, result = (torch.empty(32, 64, dtype=BF16, device=DEVICE) for _ in range(2))
    box = TensorDescriptor.from_tensor(x.to(DEVICE), [32, 64], padding="nan")
    oob_kernel[(1,)](box, loaded, result, scale.to(DEVICE), shift.to(DEVICE), -top, -left, ROWS=32, COLS=64)
    loaded, result = loaded.cpu(), result.cpu()

    outside = torch.ones(32, 64, dtype=torch.bool)
    outside[top : top + rows, left : left + cols] = False
    fill = (loaded.view(torch.int16)[outside].int() & 0xFFFF).unique().tolist()
    zero = bool((result.view(torch.int16)[outside] == 0).all())
    inside = result[~outside].view(rows, cols)
    same = torch.equal(loaded[~outside].view(torch.int16), x.view(torch.int16).flatten())
    want = (scale[left : left + cols].double() * x.double() + 1).relu()
    right = bool(((inside.double() - want).abs() <= 2**-8 * want)[~x.isnan()].all())
    stay = inside[3, : len(nans)].isnan().tolist()
    kept = ", ".join(f"{bits:#x}" for bits, is_nan in zip(nans, stay, strict=True) if is_nan)
    answer = f"outside {'exactly 0' if zero else 'NOT all 0'}, inside {'right' if right and same else 'WRONG'}"
    answer += f", NaN 0x7fc0 {'stays NaN' if stay[0] else 'is LOST'}"
    return answer, f"fill {' '.join(map(hex, fill[:8]))}; NaN stays NaN for {kept or 'none'} of {len(nans)} payloads"


def strides(ready: Ready) -> Answer:
    """Ask whether the driver accepts the kernels' views and the convolutions on them are exact."""
    from fastres.kernels.fprop import conv_fprop
    from fastres.kernels.problem import ConvProblem
    from fastres.kernels.stem import conv_stem, pack_filters, pack_images, stem_columns
    from fastres.kernels.tiles import fprop_tiles, stem_tiles

    def windows(x: Tensor, w: Tensor) -> Tensor:
        problem = ConvProblem(2, 64, 64, 3, 64, 7, 7, stride=2, pad=3)
        tile = stem_tiles(stem_columns(problem), 2, tma=True)[0]
        return conv_stem(pack_images(x, problem, BF16), pack_filters(nhwc(w)), problem, tile=tile)

    def pairs(x: Tensor, w: Tensor) -> Tensor:
        problem = ConvProblem(2, 64, 64, 64, 64, 3, 3, stride=2, pad=1)
        tile = fprop_tiles(problem, 2, tma=True)[0]
        return conv_fprop(nhwc(x), nhwc(w), problem, tile=tile)

    found = {}
    for name, conv, C, R in (("overlapping windows", windows, 3, 7), ("5-D pairs", pairs, 64, 3)):
        x, w = (torch.randint(-1, 2, (n, C, size, size)).to(BF16) for n, size in ((2, 64), (64, R)))
        want = F.conv2d(x.double(), w.double(), stride=2, padding=R // 2)  # exact in bf16 as well
        try:
            y = conv(x.to(DEVICE), w.to(DEVICE)).double().cpu()
            found[name] = "convolution exact" if torch.equal(y, nhwc(want)) else "accepted, convolution WRONG"
        except Exception as error:  # the other view is still tried
            found[name] = f"failed with {brief(error)}"
    good = set(found.values()) == {"convolution exact"}
    return "both accepted and right" if good else "NOT both right", "; ".join(map(": ".join, found.items()))


def nhwc(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


@contextmanager
def waiting(on: bool) -> Iterator[None]:
    """Within the context, run wgrad as shipped, or without the wait for wgmma."""
    from fastres.kernels import launcher, wgrad

    def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if "WAIT" in arguments:
            arguments["WAIT"] &= on
        launcher.launch(kernel, grid, **arguments)

    launcher.forget()
    with patch.object(wgrad, "launch", launch):
        yield
    launcher.forget()


def register_operand(ready: Ready) -> Answer:
    """Ask whether wgrad is right with and without the wait for wgmma, and what the wait costs."""
    from fastres.kernels.problem import ConvProblem
    from fastres.kernels.tiles import H200, wgrad_tiles
    from fastres.kernels.wgrad import conv_wgrad

    problem, runs = ConvProblem(256, 28, 28, 256, 128), 50

    def dyadic(*shape: int) -> Tensor:  # exact values, so that no rounding decides a ReLU
        return (torch.randn(shape, device=DEVICE).clamp(-4, 4) * 8).round() / 8

    dy, z = torch.randn(problem.N, 28, 28, problem.K, device=DEVICE).to(BF16), dyadic(problem.N, 28, 28, problem.K)
    x, scale, shift = dyadic(problem.N, 28, 28, problem.C), 2.0 ** dyadic(problem.C).sign(), dyadic(problem.C)
    c_g, c_z, c_1 = torch.rand(problem.K, device=DEVICE) + 0.5, dyadic(problem.K) / 4, dyadic(problem.K)
    dz = (c_g.double() * dy + c_z.double() * z + c_1).view(-1, problem.K)
    a = F.relu(scale * x + shift).view(-1, problem.C)
    want = dz.T @ a.double()

    def error(dw: Tensor) -> float:  # the largest over several results, or NaN
        return ((dw.reshape(-1, *want.shape).to(BF16).double() - want).abs().max() / want.abs().max()).item()

    stock = error(dz.to(BF16).T @ a.to(BF16))
    z, x = z.to(BF16), x.to(BF16)
    tiles = wgrad_tiles(problem, 2, True, H200, False, 2, True)
    programs = list({replace(tile, splits=1): tile for tile in reversed(tiles)}.values())[::-1][:4]

    def run(tile: Any) -> Tensor:
        options: dict[str, Any] = {"bn_backward": (z, c_g, c_z, c_1), "prologue": (scale, shift), "tile": tile}
        return conv_wgrad(dy, x, problem, **options)

    texts, broken, ms = [], [], {}
    for on in (True, False):
        with waiting(on):
            results = torch.stack([run(tile) for tile in programs for _ in range(runs)])
        bits = results.view(len(programs), runs, -1).view(torch.int32)
        differ, worst = int((bits != bits[:, :1]).any(2).sum()), error(results)
        broken.append(differ > 0 or not worst <= 4 * stock)
        texts.append(f"{differ} of {len(results)} runs differ, largest error {worst:.2e}")
    ready()
    for on in (True, False):
        with waiting(on):
            for tile in programs:
                ms[tile, on] = do_bench(lambda tile=tile: run(tile), warmup=10, rep=40, return_mode="median")
    shipped, bare = ("WRONG" if wrong else "right" for wrong in broken)
    times = ", ".join(f"{t.BM}x{t.BN} {1e3 * ms[t, True]:.1f} / {1e3 * ms[t, False]:.1f} us" for t in programs)
    figures = f"as shipped {texts[0]}; without {texts[1]}; PyTorch's in bf16 {stock:.2e}; with / without: {times}"
    return f"as shipped {shipped}, without the wait {bare}", figures


@gluon.jit
def halo_kernel(x, w, out):
    """Compute out[p] [64, 64] = w times the transpose of rows 8 p to 8 p + 63 of x [160, 64], for program p.

    The rows are a window of shared memory, which has them in atoms of 8 rows.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    atoms = gl.allocate_shared_memory(gl.bfloat16, [20, 8, 64], layout)
    filters = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, (20 * 8 + 64) * 64 * 2)
    tma.async_copy_global_to_shared(w, [0, 0], barrier, filters)
    for i in gl.static_range(20):
        tma.async_copy_global_to_shared(x, [8 * i, 0], barrier, atoms.index(i))
    mbarrier.wait(barrier, 0)
    p = gl.program_id(0)
    window = atoms.index(p)._reinterpret(gl.bfloat16, [64, 64], layout).permute([1, 0])
    acc = warpgroup_mma(filters, window, gl.zeros((64, 64), gl.float32, mma))
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
    gl.store(out + (p * 64 + row[:, None]) * 64 + col[None, :], acc)


def halo(ready: Ready) -> Answer:
    """Ask whether the window may start at any atom."""
    layout = gl.NVMMASharedLayout(128, 16, 2)
    x, w = torch.randn(160, 64, device=DEVICE).to(BF16), torch.eye(64, device=DEVICE, dtype=BF16)
    out = torch.empty(13, 64, 64, device=DEVICE)
    boxes = [hopper.TensorDescriptor.from_tensor(t, [n, 64], layout) for t, n in ((x, 8), (w, 64))]
    halo_kernel[(13,)](*boxes, out, num_warps=4)
    exact = [p for p in range(13) if torch.equal(out[p], x[8 * p : 8 * p + 64].T.float())]
    return "at any atom" if len(exact) == 13 else "NOT at any atom", f"of p0 from 0 to 12 exact: {exact}"


@gluon.jit
def l2_kernel(x, cycles, boxes, steps, STAGES: gl.constexpr):
    """Fetch `steps` of x's boxes [128, 64] in every program, STAGES at a time, without reading them, and store the
    clock cycles that this took.

    A program has one warp, which issues and waits.
    """
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, 64], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    pid = gl.program_id(0)
    first = pid * boxes // gl.num_programs(0)
    clock: gl.constexpr = "mov.u64 $0, %clock64;"
    start = gl.inline_asm_elementwise(clock, "=l", [], dtype=gl.int64, is_pure=False, pack=1)
    for step in range(steps + STAGES):
        barrier = full.index(step % STAGES)
        mbarrier.wait(barrier, (step // STAGES + 1) & 1, pred=step >= STAGES)
        mbarrier.expect(barrier, 128 * 64 * 2, pred=step < steps)
        row = (first + step) % boxes * 128
        tma.async_copy_global_to_shared(x, [row, 0], barrier, ring.index(step % STAGES), pred=step < steps)
    end = gl.inline_asm_elementwise(clock, "=l", [], dtype=gl.int64, is_pure=False, pack=1)
    gl.store(cycles + pid, end - start)


def l2(ready: Ready) -> Answer:
    """Measure the bandwidth from L2, and for comparison a copy of 1 GiB and a matmul."""
    box_bytes, boxes, steps, per_sm = 128 * 64 * 2, 1024, 2048, 2
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    x = torch.randn(boxes * 128, 64, device=DEVICE).to(BF16)  # 16 MiB
    cycles = torch.empty(per_sm * sms, dtype=torch.int64, device=DEVICE)
    box = hopper.TensorDescriptor.from_tensor(x, [128, 64], gl.NVMMASharedLayout(128, 16, 2))

    ms = partial(do_bench, warmup=25, rep=100, return_mode="median")
    fetch = partial(l2_kernel[(per_sm * sms,)], box, cycles, boxes, steps, STAGES=6, num_warps=1)
    fetch()
    source, target = torch.ones(2, 2**30, dtype=torch.uint8, device=DEVICE)
    a, b = torch.randn(2, 8192, 8192, device=DEVICE).to(BF16)
    ready()
    t = ms(fetch)
    took, moved = cycles.double().mean().item(), per_sm * steps * box_bytes
    rate, copied = 1e-9 * sms * moved / t, 2e-9 * 2**30 / ms(lambda: target.copy_(source))
    flops = 2e-9 * 8192**3 / ms(lambda: torch.mm(a, b))
    clock = f"by %clock64, which ran at {1e-6 * took / t:.2f} GHz"
    figures = (
        f"{moved / took:.1f} bytes per SM and cycle ({clock}; TMA; {per_sm} programs per SM, 6 boxes of 16 KiB each)"
    )
    return f"{rate:.2f} TB/s from L2, {copied:.2f} TB/s copying 1 GiB, matmul {flops:.0f} TFLOP/s", figures


QUESTIONS = {"oob": oob, "strides": strides, "halo": halo, "register-operand": register_operand, "l2": l2}


def brief(error: Exception) -> str:
    """Return the error in one line that fits into a Markdown table."""
    return " ".join([f"{type(error).__name__}:", *str(error).replace("|", "/").split()])[:400]


def line_of(child: subprocess.Popen, name: str) -> tuple[str, int]:
    """Return a question's line and exit status from its process. The process times nothing before it gets the line that
    `communicate` sends."""
    why = "stopped"
    try:
        out, err = child.communicate("\n", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        why = f"stopped after {LIMIT_S} s"
    sys.stderr.write(err)
    found = [text for text in out.splitlines() if text.startswith(f"{name} | ")]
    return found[0] if found else f"{name} | no answer | {why}, exit status {child.returncode}", child.returncode


def head() -> str:
    """Return the beginning of the Markdown file of answers."""
    import record as records  # imports the whole bench, which the questions' processes don't need

    where, code = records.environment(torch.device("cuda", torch.cuda.current_device())), records.code()
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "triton"))
    versions += f", driver {(where['gpu'] or {}).get('driver_version')}"
    title = f"# `bench/hopper.py` on {where['name']}"
    what = f"{versions}; {records.now()}; commit {code['commit']}"
    return f"{title}\n\n{what}\n\n| question | answer | figures |\n|---|---|---|\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the answers to FILE")
    parser.add_argument("--question", choices=QUESTIONS, help="ask only this question, in this process")
    parser.add_argument("--wait", action="store_true", help="read a line from stdin before timing anything")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("the questions are about Hopper: this script needs a CUDA GPU of compute capability 9.0")
    if options.question:
        try:
            answer = QUESTIONS[options.question](sys.stdin.readline if options.wait else lambda: None)
        except Exception as error:
            traceback.print_exc()
            answer = "failed", brief(error)
        print(options.question, *answer, sep=" | ", flush=True)
        return int(answer[0] == "failed")
    command = [sys.executable, __file__, "--wait", "--question"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    children = {name: subprocess.Popen([*command, name], text=True, **pipes) for name in QUESTIONS}
    table, failed = head(), 0
    for name, child in children.items():
        text, status = line_of(child, name)
        print(text, flush=True)
        table += f"| {text} |\n"
        failed += status != 0
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(table)
    return failed


if __name__ == "__main__":
    sys.exit(main())
