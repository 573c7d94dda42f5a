"""The bottleneck chain: three convolutions of an inference net in one kernel.

    hidden = relu(conv3x3(x) + shift2)                     [N, H, W, C]    never written to global memory
    out    = relu(conv1x1(hidden) + shift3 + residual)     [N, H, W, 4C]   the output of a bottleneck block
    mid    = relu(conv1x1(out) + shift1)                   [N, H, W, C]    the first convolution of the next block

As in FlashAttention, which chains two matrix products, a program takes its tile of pixels through all products. This
is possible because with folded BatchNorm no step in between needs a sum over all pixels, and as long as all channels
of the tile fit one program: C is 64 or 128 in the memory-bound stages of a ResNet. The kernel saves writing and reading
hidden, and reading out.

GEMM view as in `fprop`: channels on GEMM_M, pixels on GEMM_N. Each intermediate result is the second operand of the
next product, which wgmma reads from shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import check_product, check_tensor, tma_refusal
from .device_functions import box_origin, filter_tap, relu
from .launcher import empty, launch, remembered
from .problem import ConvProblem, cdiv
from .tiles import cover

CHANNELS = (16, 32, 64, 128)


class ChainTile(NamedTuple):
    """The sizes of the work of one program of `bottleneck_chain_kernel`.

    pixels: pixels per program. expanded: how many of out's 4C channels one step computes. BK: how many of x's C
    channels one step of the 3x3 convolution reads. warps: warps per program. stages: stages of the software pipeline.
    """

    pixels: int
    expanded: int
    BK: int
    warps: int
    stages: int


def chain_tile(C: int) -> ChainTile:
    """Return the default tile for C channels. For 64 and 128 channels it compiles without register spills for sm_90."""
    return ChainTile(128, 64, min(C, 64), 8 if C == 128 else 4, 2)


@triton.jit(do_not_specialize=["tiles_p", "tiles_q"])
def bottleneck_chain_kernel(
    x, w2, w3, w1, residual, out, mid, shift2, shift3, shift1, tiles_p, tiles_q,
    C: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute out and mid, all channels, for one box of TN x TH x TW pixels.

    TMA descriptors: x and mid [N, H, W, C], residual and out [N, H, W, 4C], w2 [C, 9C], w3 [4C, C], w1 [C, 4C].
    Pointers: shift2 and shift1 fp32 [C], shift3 fp32 [4C].
    """
    BN: tl.constexpr = TN * TH * TW
    n0, p0, q0 = box_origin(tl.program_id(0), tiles_p, tiles_q, TN, TH, TW)
    channel = tl.arange(0, C)

    hidden = tl.zeros((C, BN), tl.float32)
    for step in range(9 * (C // BK)):
        r, s, block = filter_tap(step, 3, 9)
        a = x.load([n0, p0 + r - 1, q0 + s - 1, block * BK]).reshape((BN, BK))
        hidden = tl.dot(w2.load([0, (r * 3 + s) * C + block * BK]), a.T, hidden)
    hidden = relu(hidden + tl.load(shift2 + channel)[:, None]).to(x.dtype)

    sums = tl.zeros((C, BN), tl.float32)
    for e0 in range(0, 4 * C, BE):
        wide = tl.dot(w3.load([e0, 0]), hidden)
        wide += tl.load(shift3 + e0 + tl.arange(0, BE))[:, None]
        wide += residual.load([n0, p0, q0, e0]).reshape((BN, BE)).T.to(tl.float32)
        wide = relu(wide).to(x.dtype)
        out.store([n0, p0, q0, e0], wide.T.reshape((TN, TH, TW, BE)))
        sums = tl.dot(w1.load([0, e0]), wide, sums)
    sums = relu(sums + tl.load(shift1 + channel)[:, None])
    mid.store([n0, p0, q0, 0], sums.to(x.dtype).T.reshape((TN, TH, TW, C)))


@remembered
def bottleneck_chain(
    x: Tensor,
    w2: Tensor,
    shift2: Tensor,
    w3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    w1: Tensor,
    shift1: Tensor,
    tile: ChainTile | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out [N, H, W, 4C] and mid [N, H, W, C]: the end of a bottleneck block and the start of the next.

    x: [N, H, W, C], the input of the block's 3x3 convolution, bfloat16 or float16, with C one of `CHANNELS`.
    residual: [N, H, W, 4C], the block's shortcut.
    w2 [C, 3, 3, C], w3 [4C, 1, 1, C]: the block's 3x3 and last convolution. w1 [C, 1, 1, 4C]: the first convolution of
    the next block. All have BatchNorm folded in and x's dtype.
    shift2 [C], shift3 [4C], shift1 [C]: their biases, fp32.
    tile: by default `chain_tile`'s.

    All tensors must be contiguous and on one device.

    Equivalent to, on NCHW views of activations and filters, for example w2.permute(0, 3, 1, 2):

        hidden = F.relu(F.conv2d(x, w2, shift2, padding=1))
        out = F.relu(F.conv2d(hidden, w3, shift3) + residual)
        mid = F.relu(F.conv2d(out, w1, shift1))

    The products are summed in fp32; hidden, out and mid are rounded to x's dtype.

    Raises ValueError if a tensor has another shape, dtype, device or layout, and if TMA can't serve the tensors.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x must be bfloat16 or float16, got {x.dtype}")
    check_product(x)
    if x.dim() != 4 or x.shape[3] not in CHANNELS:
        raise ValueError(f"x must be [N, H, W, C] with C one of {CHANNELS}, got shape {list(x.shape)}")
    N, H, W, C = x.shape
    wide = (N, H, W, 4 * C)
    shapes = {"x": (N, H, W, C), "w2": (C, 3, 3, C), "w3": (4 * C, 1, 1, C), "w1": (C, 1, 1, 4 * C), "residual": wide}
    for (name, shape), tensor in zip(shapes.items(), (x, w2, w3, w1, residual), strict=True):
        check_tensor(name, tensor, shape, x)
    for name, vector, length in (("shift2", shift2, C), ("shift3", shift3, 4 * C), ("shift1", shift1, C)):
        check_tensor(name, vector, (length,), x, torch.float32)
    if (reason := tma_refusal(ConvProblem(N, H, W, C, C, 3, 3, 1, 1), x, w2, w3, w1, residual)) is not None:
        raise ValueError(f"the bottleneck chain loads by TMA, which is impossible here: {reason}")
    pixels, BE, BK, warps, stages = tile or chain_tile(C)
    TN, TH, TW = cover(N, H, W, pixels)
    tiles_n, tiles_p, tiles_q = cdiv(N, TN), cdiv(H, TH), cdiv(W, TW)
    out, mid = (empty(shape, x.dtype, x.device) for shape in (wide, (N, H, W, C)))

    def boxes(tensor: Tensor, channels: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, [TN, TH, TW, channels])

    if out.numel():
        launch(
            bottleneck_chain_kernel, (tiles_n * tiles_p * tiles_q,),
            x=boxes(x, BK),
            w2=TensorDescriptor.from_tensor(w2.view(C, -1), [C, BK]),
            w3=TensorDescriptor.from_tensor(w3.view(4 * C, C), [BE, C]),
            w1=TensorDescriptor.from_tensor(w1.view(C, 4 * C), [C, BE]),
            residual=boxes(residual, BE),
            out=boxes(out, BE),
            mid=boxes(mid, C),
            shift2=shift2, shift3=shift3, shift1=shift1, tiles_p=tiles_p, tiles_q=tiles_q,
            C=C, TN=TN, TH=TH, TW=TW, BE=BE, BK=BK, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, mid
