"""What dgrad and wgrad share: dz, computed from dy while loading, and the launchers' view of their arguments.

    dz[n, p, q, k] = p[k] dy + q[k] z + r[k]

is the gradient at a convolution's output z, dy the one behind BatchNorm; p, q, r follow from the sums of BatchNorm's
backward. Without z, dz is dy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import cdiv, check_product, check_tensor, gpu_of
from .problem import ConvProblem
from .tables import backward_tile
from .tiles import Tile


@triton.jit
def load_dz(
    dy,
    z,
    p,
    q,
    r,
    n0,
    row0,
    col0,
    k0,
    n,
    row,
    col,
    channel,
    channel_valid,
    inside,
    P,
    Q,
    K,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The tile dz [pixels, channels] in dy's dtype, of shape BLOCK, at the pixels (n, row, col), each [pixels, 1] or
    like the tile; fp32 inside.

    TMA: dy, z are descriptors of [N, P, Q, K], read as the box with the corner (n0, row0, col0, k0), which is zero
    where it leaves the tensor. Otherwise they are pointers, read where `inside`. PADDED: dz is zero where not inside,
    which r alone would not be.
    """
    at = ((n * P + row) * Q + col) * K + channel[None, :]
    readable = inside & channel_valid[None, :]
    dy_tile = dy.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(dy + at, mask=readable, other=0.0)
    if z is None:
        return dy_tile
    else:
        z_tile = z.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(z + at, mask=readable, other=0.0)
        p = tl.load(p + channel, mask=channel_valid, other=0.0)[None, :]
        q = tl.load(q + channel, mask=channel_valid, other=0.0)[None, :]
        r = tl.load(r + channel, mask=channel_valid, other=0.0)[None, :]
        if PADDED:  # dy and z are zero there already
            r = tl.where(inside, r, 0.0)
        return (p * dy_tile.to(tl.float32) + (q * z_tile.to(tl.float32) + r)).to(dy_tile.dtype)


class BnBackward(NamedTuple):
    """The tensors of dz, by `load_dz`'s names."""

    z: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None

    @property
    def operands(self) -> int:
        """Tensors read for dz, dy among them."""
        return 1 + (self.z is not None)

    @staticmethod
    def check(dy: Tensor, bn_backward: tuple[Tensor, Tensor, Tensor, Tensor] | None) -> BnBackward:
        load = BnBackward(*(bn_backward or ()))
        check_tensor("bn_backward's z", load.z, tuple(dy.shape), dy)
        for name, tensor in (("p", load.p), ("q", load.q), ("r", load.r)):
            check_tensor(f"bn_backward's {name}", tensor, (dy.shape[3],), dy, torch.float32)
        return load


def conv_problem(
    dy: Tensor,
    filter_shape: Sequence[int],
    x_shape: Sequence[int],
    stride: int,
    pad: int,
    dilation: int,
    groups: int,
    precision: str,
) -> ConvProblem:
    """The problem whose output gradient is dy [N, P, Q, K]; ValueError where shapes, dtype or layout don't fit."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f'precision must be "ieee" or "tf32", got {precision!r}')
    if len(x_shape) != 4:
        raise ValueError(f"x must have shape [N, H, W, C], got {tuple(x_shape)}")
    if len(filter_shape) != 4:
        raise ValueError(f"the filters must have shape [K, R, S, C/groups], got {tuple(filter_shape)}")
    N, H, W, C = x_shape
    K, R, S, c_group = filter_shape
    if c_group * groups != C:
        raise ValueError(
            f"filters {tuple(filter_shape)} with groups={groups} want {c_group * groups} channels, x has {C}"
        )
    problem = ConvProblem(N, H, W, C, K, R, S, stride, pad, dilation, groups)
    if dy.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dy must be bfloat16, float16 or float32, got {dy.dtype}")
    check_tensor("dy", dy, (N, problem.P, problem.Q, K), dy)
    check_product(dy)
    return problem


def choose_tile(
    tile: Tile | None,
    pass_: Literal["dgrad", "wgrad"],
    problem: ConvProblem,
    like: Tensor,
    refusal: str | None,
    precision: str,
    operands: int,
    other: int,
) -> Tile:
    """`tile` if it is given and can run, else the best known."""
    if tile is None:
        ieee = like.dtype == torch.float32 and precision == "ieee"
        tma = refusal is None and not ieee
        return backward_tile(pass_, problem, like.dtype, tma, gpu_of(like.device), ieee, operands, other)
    if tile.box is not None and refusal is not None:
        raise ValueError(f"a tile with a box is fetched by TMA, which is impossible here: {refusal}")
    return tile


def operand(
    tensor: Tensor | None,
    shape: tuple[int, ...],
    block: tuple[int, ...] | None,
    at: tuple[slice, ...] = (),
) -> Any:
    """`tensor` viewed as `shape`, there indexed by `at`; with a block, as a TMA descriptor of such boxes."""
    if tensor is None:
        return None
    view = tensor.view(shape)[at]
    return view if block is None else TensorDescriptor.from_tensor(view, list(block))


def pixel_tiles(box: tuple[int, int, int] | None, pixels: int, N: int, rows: int, cols: int) -> tuple[int, int, int]:
    """Tiles along N, rows and columns; all along the first where a tile is `pixels` consecutive ones."""
    if box is None:
        return cdiv(N * rows * cols, pixels), 1, 1
    return cdiv(N, box[0]), cdiv(rows, box[1]), cdiv(cols, box[2])
