"""The stem's end: BatchNorm's scale and shift, ReLU and max pool in one pass over the net's largest tensor.

    a[n, p, q, k] = relu(scale[k] z[n, p, q, k] + shift[k])                      never stored
    y[n, u, v, k] = max over r, s of a[n, u stride - pad + r, v stride - pad + s, k]
    tap[n, u, v, k] = r kernel + s of that maximum, the first of equals; NaN wins (the last one, as in torch)

Backward (`gather`, used by `batch_norm`): each pixel looks at the windows that contain it, at most 4 for a 3x3 window
of stride 2, and adds up dy of those whose maximum it is. No scatter, so the same bits every time.

Layouts: z [N, P, Q, K], y and tap [N, U, V, K], contiguous. Compared is `a` rounded to z's dtype, as torch would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import WARPS, WINDOWED, at, check_vectors, rows, tile_of, vector
from .replay import empty, launch, remembered
from .tile import relu, unravel


class Pool(NamedTuple):
    """What a max pool leaves for its backward: uint8 taps [N, U, V, K] and the sizes of its square window."""

    tap: Tensor
    kernel: int
    stride: int
    pad: int


@triton.jit(do_not_specialize=["M", "K_VECS", "P", "Q", "U", "V"])
def normalize_max_pool_kernel(
    z, scale, shift, y, tap, M, K_VECS, P, Q, U, V,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of y and tap, seen as [M, K] with M = N U V."""
    K = K_VECS * VEC
    row, channel = tile_of(tl.program_id(0), K, BM, BK)
    slope, offset = vector(scale, channel, K), vector(shift, channel, K)
    n, u, v = unravel(row, U, V)
    top = u * STRIDE - PAD
    left = v * STRIDE - PAD
    best = tl.full((BM, BK), float("-inf"), tl.float32)
    best_tap = tl.zeros((BM, BK), tl.int32)
    for r in tl.static_range(KERNEL):
        for s in tl.static_range(KERNEL):
            p, q = top + r, left + s
            inside = ((row < M) & (p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None]
            pixel = (n * P + p) * Q + q
            value = tl.load(z + at(pixel, channel, K), mask=inside & (channel < K)[None, :], other=0.0)
            value = relu(value.to(tl.float32) * slope + offset).to(z.dtype.element_ty).to(tl.float32)
            better = inside & ((value > best) | (value != value))
            best = tl.where(better, value, best)
            best_tap = tl.where(better, r * KERNEL + s, best_tap)
    valid = (row < M)[:, None] & (channel < K)[None, :]
    tl.store(y + at(row, channel, K), best.to(y.dtype.element_ty), mask=valid)
    tl.store(tap + at(row, channel, K), best_tap.to(tl.uint8), mask=valid)


@triton.jit
def gather(
    dy, tap, row, channel, valid, K, P, Q, U, V,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The max pool's input gradient at pixels `row` of [N, P, Q], fp32 [BM, BK]."""
    n, p, q = unravel(row, P, Q)
    p += PAD
    q += PAD
    g = tl.zeros(valid.shape, tl.float32)
    for i in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for j in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            u, v = p // STRIDE - i, q // STRIDE - j
            r, s = p - u * STRIDE, q - v * STRIDE
            inside = (r < KERNEL) & (s < KERNEL) & (u >= 0) & (u < U) & (v >= 0) & (v < V)
            inside = inside[:, None] & valid
            source = at((n * U + u) * V + v, channel, K)
            hit = tl.load(tap + source, mask=inside, other=255).to(tl.int32) == (r * KERNEL + s)[:, None]
            g += tl.where(hit & inside, tl.load(dy + source, mask=inside, other=0.0).to(tl.float32), 0.0)
    return g


@remembered
def normalize_max_pool(
    z: Tensor, scale: Tensor, shift: Tensor, *, kernel: int = 3, stride: int = 2, pad: int = 1
) -> tuple[Tensor, Tensor]:
    """y = max_pool(relu(scale z + shift)) of z [N, P, Q, K], and the uint8 tap of each maximum, both [N, U, V, K].

    scale, shift: fp32 [K]. y has z's dtype (bf16, fp16, fp32). Equivalent to `reference.stem` after its convolution.
    Raises ValueError for other layouts or dtypes, an empty output, and sizes beyond `check_pool`.
    """
    view = rows("z", z, WINDOWED)
    shape = check_pool(z, kernel, stride, pad)
    check_vectors(view.K, z, scale=scale, shift=shift)
    y, tap = empty(shape, z.dtype, z.device), empty(shape, torch.uint8, z.device)
    if y.numel():
        _, P, Q, K = z.shape
        N, U, V, _ = shape
        view = view._replace(M=N * U * V)
        launch(
            normalize_max_pool_kernel, (view.tiles,), z=z, scale=scale, shift=shift, y=y, tap=tap,
            M=view.M, K_VECS=K // view.VEC, P=P, Q=Q, U=U, V=V,
            KERNEL=kernel, STRIDE=stride, PAD=pad, VEC=view.VEC, BM=view.BM, BK=view.BK, num_warps=WARPS,
        )  # fmt: skip
    return y, tap


def check_pool(z: Tensor, kernel: int, stride: int, pad: int) -> tuple[int, int, int, int]:
    """(N, U, V, K), the shape of the pooled z. Raises ValueError unless z is [N, P, Q, K], 1 <= kernel <= 15,
    stride >= 1, 0 <= pad <= kernel / 2 and the window fits at least once."""
    if z.dim() != 4:
        raise ValueError(f"z must be [N, P, Q, K] for a pool, got shape {list(z.shape)}")
    if not (1 <= kernel <= 15 and stride >= 1 and 0 <= 2 * pad <= kernel):
        raise ValueError(
            f"1 <= kernel <= 15, stride >= 1 and 0 <= pad <= kernel / 2 are needed, got {kernel}, {stride} and {pad}"
        )
    N, P, Q, K = z.shape
    U, V = ((size + 2 * pad - kernel) // stride + 1 for size in (P, Q))
    if U < 1 or V < 1:
        raise ValueError(f"a {kernel}x{kernel} window does not fit into {P}x{Q} pixels padded by {pad}")
    return N, U, V, K
