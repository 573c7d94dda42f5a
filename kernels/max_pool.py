"""Max pools: the stem's end, BatchNorm's scale and shift, ReLU and max pool in one pass over the net's largest tensor,
and `max_pool` alone, for nets whose BatchNorm is folded.

    a[n, p, q, k] = relu(scale[k] z[n, p, q, k] + shift[k])                      never stored
    y[n, u, v, k] = max over r, s of a[n, u stride - pad + r, v stride - pad + s, k]
    tap[n, u, v, k] = r kernel + s of that maximum, the first of equals; NaN wins (the last one, as in torch)

Backward (`gather`, used by `batch_norm`): each pixel looks at the windows that contain it, at most 4 for a 3x3 window
of stride 2, and adds up dy of those whose maximum it is. No scatter, so the same bits every time. A program goes
through blocks of stride x stride pixels, whose windows are the same few.

Layouts: z [N, P, Q, K], y and tap [N, U, V, K], contiguous. Compared is `a` rounded to z's dtype, as torch would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_vectors
from .device_functions import relu, unravel
from .launcher import empty, launch, remembered
from .problem import pool_refusal
from .rows import WARPS, WINDOWED, Rows, at, rows, tile_of, vector


class Pool(NamedTuple):
    """What a max pool leaves for its backward: uint8 taps [N, U, V, K] and the sizes of its square window."""

    tap: Tensor
    kernel: int
    stride: int
    pad: int


@triton.jit(do_not_specialize=["M", "K_VECS", "P", "Q", "U", "V"])
def max_pool_kernel(
    z, scale, shift, y, tap, M, K_VECS, P, Q, U, V,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of y, seen as [M, K] with M = N U V, and of tap where there is one; without scale and shift of
    max_pool(z)."""
    K = K_VECS * VEC
    row, channel = tile_of(tl.program_id(0), K, BM, BK)
    if scale is not None:
        slope, offset = vector(scale, channel, K), vector(shift, channel, K)
    n, u, v = unravel(row, U, V)
    top = u * STRIDE - PAD
    left = v * STRIDE - PAD
    best = tl.full((BM, BK), float("-inf"), tl.float32)
    if tap is not None:
        best_tap = tl.zeros((BM, BK), tl.int32)
    for r in tl.static_range(KERNEL):
        for s in tl.static_range(KERNEL):
            p, q = top + r, left + s
            inside = ((row < M) & (p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None]
            pixel = (n * P + p) * Q + q
            value = tl.load(z + at(pixel, channel, K), mask=inside & (channel < K)[None, :], other=0.0).to(tl.float32)
            if scale is not None:
                value = relu(value * slope + offset).to(z.dtype.element_ty).to(tl.float32)
            if tap is None:
                value = tl.where(inside, value, float("-inf"))
                best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                better = inside & ((value > best) | (value != value))
                best = tl.where(better, value, best)
                best_tap = tl.where(better, r * KERNEL + s, best_tap)
    valid = (row < M)[:, None] & (channel < K)[None, :]
    tl.store(y + at(row, channel, K), best.to(y.dtype.element_ty), mask=valid)
    if tap is not None:
        tl.store(tap + at(row, channel, K), best_tap.to(tl.uint8), mask=valid)


@triton.jit
def block_pixel(block, M, P, Q, a: tl.constexpr, b: tl.constexpr, SIDE: tl.constexpr):
    """Row in [N P Q, K] of pixel (a, b) of blocks of SIDE x SIDE pixels [BM], and whether there is such a pixel; M
    blocks cover the images."""
    if SIDE == 1:
        return block, block < M
    else:
        n, i, j = unravel(block, tl.cdiv(P, SIDE), tl.cdiv(Q, SIDE))
        p, q = i * SIDE + a, j * SIDE + b
        return (n * P + p) * Q + q, (block < M) & (p < P) & (q < Q)


@triton.jit
def gather(
    dy, tap, block, channel, valid, K, P, Q, U, V, a: tl.constexpr, b: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The max pool's input gradient, fp32 [BM, BK], at pixels (a, b) of blocks of STRIDE x STRIDE pixels.

    Row r of window u = i + (a + PAD - r) / STRIDE reaches pixel p = i STRIDE + a, likewise columns: a and b alone
    decide which taps reach the pixel.
    """
    n, i, j = unravel(block, tl.cdiv(P, STRIDE), tl.cdiv(Q, STRIDE))
    g = tl.zeros(valid.shape, tl.float32)
    for r in tl.static_range(KERNEL):
        for s in tl.static_range(KERNEL):
            if (a + PAD - r) % STRIDE == 0 and (b + PAD - s) % STRIDE == 0:
                u = i + (a + PAD - r) // STRIDE
                v = j + (b + PAD - s) // STRIDE
                inside = ((u >= 0) & (u < U) & (v >= 0) & (v < V))[:, None] & valid
                window = at((n * U + u) * V + v, channel, K)
                hit = tl.load(tap + window, mask=inside, other=255) == r * KERNEL + s
                g += tl.where(hit, tl.load(dy + window, mask=inside, other=0.0).to(tl.float32), 0.0)
    return g


@remembered
def normalize_max_pool(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    kernel: int = 3,
    stride: int = 2,
    pad: int = 1,
    taps: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y = max_pool(relu(scale z + shift)) of z [N, P, Q, K], and the uint8 tap of each maximum, both [N, U, V, K].

    scale, shift: fp32 [K]. y has z's dtype (bf16, fp16, fp32). taps: whether a backward will want them; without, the
    second result is None. Equivalent to `reference.stem` after its convolution.
    Raises ValueError for other layouts or dtypes, an empty output, and sizes beyond `check_pool`.
    """
    view = rows("z", z, WINDOWED)
    shape = check_pool(z, kernel, stride, pad)
    check_vectors(view.K, z, scale=scale, shift=shift)
    y = empty(shape, z.dtype, z.device)
    tap = empty(shape, torch.uint8, z.device) if taps else None
    _launch(view, z, scale, shift, y, tap, kernel, stride, pad)
    return y, tap


@remembered
def max_pool(x: Tensor, *, kernel: int = 3, stride: int = 2, pad: int = 1) -> Tensor:
    """max_pool(x) [N, U, V, K] of x [N, P, Q, K] (bf16, fp16, fp32), for inference: it stores no taps.

    Equivalent to `torch.max_pool2d`, NaN included. Raises ValueError as `normalize_max_pool` does.
    """
    view = rows("x", x, WINDOWED)
    y = empty(check_pool(x, kernel, stride, pad), x.dtype, x.device)
    _launch(view, x, None, None, y, None, kernel, stride, pad)
    return y


def _launch(
    view: Rows,
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    tap: Tensor | None,
    kernel: int,
    stride: int,
    pad: int,
) -> None:
    (_, P, Q, K), (N, U, V, _) = z.shape, y.shape
    view = view._replace(M=N * U * V)
    if y.numel():
        launch(
            max_pool_kernel, (view.tiles,), z=z, scale=scale, shift=shift, y=y, tap=tap,
            M=view.M, K_VECS=K // view.VEC, P=P, Q=Q, U=U, V=V,
            KERNEL=kernel, STRIDE=stride, PAD=pad, VEC=view.VEC, BM=view.BM, BK=view.BK, num_warps=WARPS,
        )  # fmt: skip


def check_pool(z: Tensor, kernel: int, stride: int, pad: int) -> tuple[int, int, int, int]:
    """(N, U, V, K), the shape of the pooled z. Raises ValueError unless z is [N, P, Q, K], `pool_refusal` has nothing
    against the sizes and the window fits at least once."""
    if z.dim() != 4:
        raise ValueError(f"what is pooled must be [N, P, Q, K], got shape {list(z.shape)}")
    if (reason := pool_refusal(kernel, stride, pad)) is not None:
        raise ValueError(reason)
    N, P, Q, K = z.shape
    U, V = ((size + 2 * pad - kernel) // stride + 1 for size in (P, Q))
    if U < 1 or V < 1:
        raise ValueError(f"a {kernel}x{kernel} window does not fit into {P}x{Q} pixels padded by {pad}")
    return N, U, V, K
