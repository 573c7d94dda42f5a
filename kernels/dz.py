"""dz, the gradient at a convolution's output z, as dgrad and wgrad read it: stored, or computed while they load.

    dz[n, p, q, k] = c_g[k] dy + c_z[k] z + c_1[k]

dy is then the gradient behind BatchNorm, and the coefficients follow from the sums of BatchNorm's backward
(`batch_norm`). Without z, dz is dy.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_product, check_tensor, check_vectors, gpu_of
from .problem import FLOATS, ConvProblem, cdiv
from .tables import backward_tile
from .tiles import Tile


@triton.jit
def load_dz(
    dy, z, c_g, c_z, c_1, n0, row0, col0, k0, n, row, col, channel, channel_valid, inside, P, Q, K,
    BLOCK: tl.constexpr, TMA: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The tile dz [pixels, channels] in dy's dtype, of shape BLOCK, at the pixels (n, row, col), each [pixels, 1] or
    like the tile; fp32 inside.

    TMA: dy, z are descriptors of [N, P, Q, K], read as the box with the corner (n0, row0, col0, k0), which is zero
    where it leaves the tensor. Otherwise they are pointers, read where `inside`. PADDED: dz is zero where not inside,
    which c_1 alone would not be.
    """
    at = ((n * P + row) * Q + col) * K + channel[None, :]
    readable = inside & channel_valid[None, :]
    dy_tile = dy.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(dy + at, mask=readable, other=0.0)
    if z is None:
        return dy_tile
    else:
        z_tile = z.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(z + at, mask=readable, other=0.0)
        c_g = tl.load(c_g + channel, mask=channel_valid, other=0.0)[None, :]
        c_z = tl.load(c_z + channel, mask=channel_valid, other=0.0)[None, :]
        c_1 = tl.load(c_1 + channel, mask=channel_valid, other=0.0)[None, :]
        if PADDED:  # dy and z are zero there already
            c_1 = tl.where(inside, c_1, 0.0)
        return (c_g * dy_tile.to(tl.float32) + (c_z * z_tile.to(tl.float32) + c_1)).to(dy_tile.dtype)


class DzOperands(NamedTuple):
    """The tensors of dz, by `load_dz`'s names: z [N, P, Q, K], the coefficients fp32 [K]."""

    z: Tensor | None = None
    c_g: Tensor | None = None
    c_z: Tensor | None = None
    c_1: Tensor | None = None

    @property
    def operands(self) -> int:
        """Tensors read for dz, dy among them."""
        return 1 + (self.z is not None)


def check_dz(
    dy: Tensor, problem: ConvProblem, bn_backward: tuple[Tensor, Tensor, Tensor, Tensor] | None, precision: str
) -> DzOperands:
    """What dz is computed from besides dy. ValueError where something doesn't fit."""
    if dy.dtype not in FLOATS:
        raise ValueError(f"dy must be bfloat16, float16 or float32, got {dy.dtype}")
    load = DzOperands(*(bn_backward or ()))
    for name, tensor in (("dy", dy), ("bn_backward's z", load.z)):
        check_tensor(name, tensor, problem.y_shape, dy)
    check_vectors(problem.K, dy, c_g=load.c_g, c_z=load.c_z, c_1=load.c_1)
    check_product(dy, precision)
    return load


def choose_tile(
    tile: Tile | None,
    pass_: Literal["dgrad", "wgrad"],
    problem: ConvProblem,
    like: Tensor,
    refusal: str | None,
    precision: str,
    operands: int,
    more: int,
) -> Tile:
    """`tile` if it is given and can run, else the best known. more: the last argument of `tiles.dgrad_tiles` or
    `wgrad_tiles`."""
    if tile is None:
        ieee = like.dtype == torch.float32 and precision == "ieee"
        tma = refusal is None and not ieee
        return backward_tile(pass_, problem, like.dtype, tma, gpu_of(like.device), ieee, operands, more)
    if tile.box is not None and refusal is not None:
        raise ValueError(f"a tile with a box is fetched by TMA, which is impossible here: {refusal}")
    return tile


def tiles_along(box: tuple[int, int, int] | None, pixels: int, N: int, rows: int, cols: int) -> tuple[int, int, int]:
    """Tiles along N, rows and columns; all along the first where a tile is `pixels` consecutive ones."""
    if box is None:
        return cdiv(N * rows * cols, pixels), 1, 1
    return cdiv(N, box[0]), cdiv(rows, box[1]), cdiv(cols, box[2])
