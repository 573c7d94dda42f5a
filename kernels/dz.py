"""dz, the gradient of a convolution's output z: the operand that dgrad and wgrad share.

    dz[n, p, q, k] = c_g[k] dy[n, p, q, k] + c_z[k] z[n, p, q, k] + c_1[k]

dgrad and wgrad either read dz from memory, or compute it by this equation while they load dy and z. In the second case
dy is the gradient of the output of the BatchNorm after the convolution, and the coefficients come from the two sums of
BatchNorm's backward pass (`batch_norm.finish_backward`). Without z, dz is dy.
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
    """Return the tile of dz [pixels, channels] with the shape BLOCK, computed in fp32 and rounded to dy's dtype.

    n, row, col: the pixels, each of shape [pixels, 1] or BLOCK. channel, channel_valid: [channels]. inside: whether a
    pixel is inside the image, of the same shape as the pixels.

    TMA: dy and z are descriptors of [N, P, Q, K], and the tile is the box at (n0, row0, col0, k0). TMA returns zero
    outside the tensor. Otherwise dy and z are pointers, read where `inside`.
    PADDED: dz is set to zero where not `inside`. dy and z are zero there already, but c_1 is not.
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
        if PADDED:
            c_1 = tl.where(inside, c_1, 0.0)
        return (c_g * dy_tile.to(tl.float32) + (c_z * z_tile.to(tl.float32) + c_1)).to(dy_tile.dtype)


class DzOperands(NamedTuple):
    """The operands of dz besides dy, all None if dz is dy: z [N, P, Q, K] and the coefficients, fp32 [K]."""

    z: Tensor | None = None
    c_g: Tensor | None = None
    c_z: Tensor | None = None
    c_1: Tensor | None = None

    @property
    def operands(self) -> int:
        """The number of activations read to get dz: 1 (dy), or 2 (dy and z)."""
        return 1 + (self.z is not None)


def check_dz(
    dy: Tensor, problem: ConvProblem, bn_backward: tuple[Tensor, Tensor, Tensor, Tensor] | None, precision: str
) -> DzOperands:
    """Check dy [N, P, Q, K], bn_backward (z, c_g, c_z, c_1) and precision; return bn_backward as `DzOperands`.

    Raises ValueError for a wrong shape, dtype, layout or device and for an unknown precision.
    """
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
    """Return `tile` if given, otherwise the tile of the measured tables or the heuristic (`tables.backward_tile`).

    like: a tensor with the dtype and device of the operands. refusal: why TMA cannot serve, or None. operands: the
    number of tensors read for dz. more: the last argument of `tiles.dgrad_tiles` (epilogue) or `wgrad_tiles`
    (prologue). Raises ValueError if the given tile has a box and TMA cannot serve.
    """
    if tile is None:
        ieee = like.dtype == torch.float32 and precision == "ieee"
        tma = refusal is None and not ieee
        return backward_tile(pass_, problem, like.dtype, tma, gpu_of(like.device), ieee, operands, more)
    if tile.box is not None and refusal is not None:
        raise ValueError(f"a tile with a box is fetched by TMA, which is impossible here: {refusal}")
    return tile


def tiles_along(box: tuple[int, int, int] | None, pixels: int, N: int, rows: int, cols: int) -> tuple[int, int, int]:
    """Return the number of tiles along images, rows and columns.

    Without a box, a tile is `pixels` consecutive pixels and all tiles count along the first axis.
    """
    if box is None:
        return cdiv(N * rows * cols, pixels), 1, 1
    return cdiv(N, box[0]), cdiv(rows, box[1]), cdiv(cols, box[2])
