"""Backward pass of the option-A shortcut (paper, section 3.3): add its share of dx to that of the block's branch.

    dx[n, p stride, q stride, c] += g[n, p, q, c]   for c < C,    g = 0 where y <= 0, else dy

The forward pass is part of `batch_norm.normalize`, which reads x at these pixels. Layouts: dx [N, H, W, C], dy and y
[N, P, Q, K], all contiguous. One thread updates each element of dx, without atomics, so equal inputs give equal bits.
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
    """Add one tile of g to dx: BM of the M = N P Q pixels of dy, BK of the C channels of dx."""
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
    """Add the gradient of an option-A shortcut to dx in place, and return dx.

    dx: [N, H, W, C], the gradient of the block's input through its branch; bfloat16, float16 or float32.
    dy: [N, P, Q, K], the gradient of the block's output, with P = ceil(H / stride), Q = ceil(W / stride) and K >= C.
    mask: the block's output y, like dy, whose ReLU masks dy; or None if dy is masked already.
    All tensors are contiguous and have one dtype.

    Equivalent to:

        g = dy if mask is None else torch.where(mask <= 0, 0, dy)
        dx[:, ::stride, ::stride] += g[..., : dx.shape[-1]]

    Raises ValueError for a wrong shape, dtype, layout or device.

    Source: paper, section 3.3, option A.
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
