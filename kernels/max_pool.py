"""Max pools: `normalize_max_pool` for the stem in training, `max_pool` for nets with folded BatchNorm.

`normalize_max_pool` applies BatchNorm's scale and shift, ReLU and max pool in one pass over the net's largest tensor:

    a[n, p, q, k] = relu(scale[k] z[n, p, q, k] + shift[k])                      never stored
    y[n, u, v, k] = max over r, s of a[n, u stride - pad + r, v stride - pad + s, k]
    tap[n, u, v, k] = r kernel + s of that maximum

Among equal maxima the first wins. A NaN wins over numbers, and the last NaN over earlier ones, as in torch. `a` is
rounded to z's dtype before the comparison, as torch does.

Backward (`gather`, called by the kernels of `batch_norm`): each pixel visits the windows that contain it, at most 4 for
3x3 windows of stride 2, and sums dy over the windows whose maximum it is. There is no scatter, so equal inputs give
equal bits. A program works on blocks of stride x stride pixels, because the pixels of a block share their windows.

Layouts: z [N, P, Q, K], y and tap [N, U, V, K], all contiguous.
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
    """What the backward pass of a max pool needs: uint8 taps [N, U, V, K], and the size, stride and padding of the
    square window."""

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
    """Compute one tile of y, viewed as [M, K] with M = N U V, and, if tap is given, the same tile of tap.

    If scale and shift are None, z is pooled as it is.
    """
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
    """Return (row, exists), each [BM], for pixel (a, b) of each of BM blocks of SIDE x SIDE pixels.

    block: the numbers of these blocks [BM]. row: the pixel's row in the matrix [N P Q, K]. M blocks cover all images;
    those at the bottom and right edges may be incomplete, and then some of their pixels don't exist.
    """
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
    """Return the gradient of a max pool's input, fp32 [BM, BK], at pixel (a, b) of blocks of STRIDE x STRIDE pixels.

    Row r of window u = i + (a + PAD - r) / STRIDE covers pixel p = i STRIDE + a; the same holds for columns. Which taps
    can reach the pixel thus depends on a and b only, and the others are skipped at compile time.
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
    """Return y = max_pool(relu(scale z + shift)) and the tap of each maximum, both [N, U, V, K].

    z: [N, P, Q, K], contiguous, bfloat16, float16 or float32. scale, shift: fp32 [K].
    kernel, stride, pad: size, stride and padding of the square window, 1 <= kernel <= 15, 1 <= stride <= 4 and
    0 <= pad <= kernel / 2.
    taps: True if a backward pass follows. If False, the second result is None.

    y has the dtype of z. The taps are uint8: r kernel + s for row r and column s of the window. Equivalent to:

        a = F.relu(z * scale + shift).to(z.dtype)
        y = F.max_pool2d(a.permute(0, 3, 1, 2), kernel, stride, pad).permute(0, 2, 3, 1)

    Raises ValueError for other layouts, dtypes or window sizes, and if no window fits into the padded image.
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
    """Return the max pool of x as [N, U, V, K], for inference: it stores no taps.

    x: [N, P, Q, K], contiguous, bfloat16, float16 or float32. kernel, stride, pad: as for `normalize_max_pool`.

    Equivalent to, NaN included:

        y = F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, pad).permute(0, 2, 3, 1)

    Raises ValueError for the same reasons as `normalize_max_pool`.
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
    """Return (N, U, V, K), the shape of the pooled z.

    Raises ValueError if z is not [N, P, Q, K], if `pool_refusal` rejects the window, or if no window fits.
    """
    if z.dim() != 4:
        raise ValueError(f"the input of a max pool must be [N, P, Q, K], got shape {list(z.shape)}")
    if (reason := pool_refusal(kernel, stride, pad)) is not None:
        raise ValueError(reason)
    N, P, Q, K = z.shape
    U, V = ((size + 2 * pad - kernel) // stride + 1 for size in (P, Q))
    if U < 1 or V < 1:
        raise ValueError(f"a {kernel}x{kernel} window does not fit into {P}x{Q} pixels padded by {pad}")
    return N, U, V, K
