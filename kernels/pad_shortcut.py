"""The option-A shortcut (paper, section 3.3) on the way back: the gradient it carries joins the branch's.

    dx[n, p stride, q stride, c] += g[n, p, q, c]   for c < C,    g = dy where y > 0

On the way forward `batch_norm.normalize` reads x at those pixels itself. Layouts: dx [N, H, W, C], dy and y
[N, P, Q, K], contiguous. Each element of dx is touched once: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import check_shortcut
from .checks import check_tensor
from .launcher import launch, remembered
from .rows import REDUCED, WARPS, at, rows, strided_row, tile_of


@triton.jit(do_not_specialize=["M", "K_VECS", "P", "Q", "H", "W", "C_VECS"])
def pad_shortcut_backward_kernel(
    dx, dy, y, M, K_VECS, P, Q, H, W, C_VECS,
    STRIDE: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of the pixels of dy, in the channels that dx has."""
    K = K_VECS * VEC
    C = C_VECS * VEC
    row, channel = tile_of(tl.program_id(0), C, BM, BK)
    valid = (row < M)[:, None] & (channel < C)[None, :]
    g = tl.load(dy + at(row, channel, K), mask=valid, other=0.0).to(tl.float32)
    if y is not None:
        g = tl.where(tl.load(y + at(row, channel, K), mask=valid, other=0.0) <= 0, 0.0, g)
    target = dx + at(strided_row(row, P, Q, H, W, STRIDE), channel, C)
    g += tl.load(target, mask=valid, other=0.0).to(tl.float32)
    tl.store(target, g.to(dx.dtype.element_ty), mask=valid)


@remembered
def pad_shortcut_backward(dx: Tensor, dy: Tensor, *, stride: int, mask: Tensor | None = None) -> Tensor:
    """dx [N, H, W, C], the branch's gradient, with the shortcut's added in place; returns dx.

    dy [N, P, Q, K]: gradient of the block's output; mask: that output y (g = dy where y > 0), or None.
    Raises ValueError for tensors that do not fit together.
    """
    H, W, C = check_shortcut("dx", dx, dy, stride)
    check_tensor("mask", mask, tuple(dy.shape), dy)
    of_dy = rows("dy", dy, REDUCED, also=C)
    if of_dy.M:
        view = rows("dx", dx, REDUCED, also=of_dy.K)._replace(M=of_dy.M)
        launch(
            pad_shortcut_backward_kernel, (view.tiles,), dx=dx, dy=dy, y=mask, M=view.M, K_VECS=of_dy.K // view.VEC,
            P=dy.shape[1], Q=dy.shape[2], H=H, W=W, C_VECS=C // view.VEC, STRIDE=stride, VEC=view.VEC,
            BM=view.BM, BK=view.BK, num_warps=WARPS,
        )  # fmt: skip
    return dx
