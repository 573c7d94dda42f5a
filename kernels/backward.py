"""What dgrad and wgrad share: dz, computed from dy while loading, and the launchers' view of their arguments.

    dz[n, p, q, k] = p[k] g + q[k] z + r[k],   g = dy where the mask is > 0

is the gradient at a convolution's output z, dy the one behind BatchNorm (and ReLU); p, q, r follow from the sums of
BatchNorm's backward. Each part is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Tile, backward_tile
from .launch import check_tensor, gpu_of
from .problem import ConvProblem


@triton.jit
def load_dz(
    dy,
    z,
    mask,
    p,
    q,
    r,
    scale,
    shift,
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

    TMA: dy, z, mask are descriptors of [N, P, Q, K], read as the box with the corner (n0, row0, col0, k0), which is
    zero where it leaves the tensor. Otherwise they are pointers, read where `inside`. dy counts where mask is > 0, or
    for a scale where scale z + shift is. PADDED: dz is zero where not inside, which r alone would not be.
    """
    at = ((n * P + row) * Q + col) * K + channel[None, :]
    readable = inside & channel_valid[None, :]
    dy_tile = dy.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(dy + at, mask=readable, other=0.0)
    if z is None and mask is None:
        return dy_tile

    g = dy_tile.to(tl.float32)
    if mask is not None:
        sign = mask.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(mask + at, mask=readable, other=0.0)
        g = tl.where(sign <= 0, 0.0, g)  # not "where > 0": a NaN must pass, as in torch
    if z is not None:
        z_tile = z.load([n0, row0, col0, k0]).reshape(BLOCK) if TMA else tl.load(z + at, mask=readable, other=0.0)
        z_tile = z_tile.to(tl.float32)
        if scale is not None:
            scale = tl.load(scale + channel, mask=channel_valid, other=0.0)[None, :]
            shift = tl.load(shift + channel, mask=channel_valid, other=0.0)[None, :]
            g = tl.where(z_tile * scale + shift <= 0, 0.0, g)
        p = tl.load(p + channel, mask=channel_valid, other=0.0)[None, :]
        q = tl.load(q + channel, mask=channel_valid, other=0.0)[None, :]
        r = tl.load(r + channel, mask=channel_valid, other=0.0)[None, :]
        if PADDED:  # g and z are zero there already
            r = tl.where(inside, r, 0.0)
        g = p * g + (q * z_tile + r)
    return g.to(dy_tile.dtype)


class BnBackward(NamedTuple):
    """The tensors of dz, by `load_dz`'s names."""

    z: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    mask: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def operands(self) -> int:
        """Tensors read for dz, dy among them."""
        return 1 + (self.z is not None) + (self.mask is not None)

    @staticmethod
    def check(
        dy: Tensor,
        bn_backward: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        dy_mask: Tensor | tuple[Tensor, Tensor] | None,
    ) -> BnBackward:
        z, p, q, r = bn_backward or (None, None, None, None)
        pair = isinstance(dy_mask, tuple)
        if pair and bn_backward is None:
            raise ValueError("dy_mask=(scale, shift) masks by the sign of scale z + shift and so needs bn_backward")
        scale, shift = dy_mask if pair else (None, None)
        mask = None if pair else dy_mask
        check_tensor("bn_backward's z", z, tuple(dy.shape), dy)
        check_tensor("dy_mask", mask, tuple(dy.shape), dy)
        for name, tensor in zip(("p", "q", "r"), (p, q, r), strict=True):
            check_tensor(f"bn_backward's {name}", tensor, (dy.shape[3],), dy, torch.float32)
        for name, tensor in (("scale", scale), ("shift", shift)):
            check_tensor(f"dy_mask's {name}", tensor, (dy.shape[3],), dy, torch.float32)
        return BnBackward(z, p, q, r, mask, scale, shift)


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
        return triton.cdiv(N * rows * cols, pixels), 1, 1
    return triton.cdiv(N, box[0]), triton.cdiv(rows, box[1]), triton.cdiv(cols, box[2])
