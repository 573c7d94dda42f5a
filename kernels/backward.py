"""What dgrad and wgrad share: BatchNorm's backward applied to a tile of dy on load, and the launchers' checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Tile
from .problem import ConvProblem

interpreted = triton.knobs.runtime.interpret  # inline assembly isn't interpreted


@triton.jit
def bn_backward_tile(
    dy,
    z,
    mask,
    p,
    q,
    r,
    scale,
    shift,
    channel,
    channel_valid,
    pixel_valid,
    BN_BACKWARD: tl.constexpr,
    MASK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dz [pixels, channels] in dy's dtype from tiles of dy, z and the mask; fp32 inside.

    MASK: 0 none, 1 the sign of the `mask` tile, 2 the sign of scale z + shift. Written as "zero where <= 0", so that NaN
    passes as in torch. PADDED: zero where not pixel_valid.
    """
    g = dy.to(tl.float32)
    if MASK == 1:
        g = tl.where(mask <= 0, 0.0, g)
    if MASK == 2:
        scale = tl.load(scale + channel, mask=channel_valid, other=0.0)
        shift = tl.load(shift + channel, mask=channel_valid, other=0.0)
        g = tl.where(z.to(tl.float32) * scale[None, :] + shift[None, :] <= 0, 0.0, g)
    if BN_BACKWARD:
        p = tl.load(p + channel, mask=channel_valid, other=0.0)
        q = tl.load(q + channel, mask=channel_valid, other=0.0)
        r = tl.load(r + channel, mask=channel_valid, other=0.0)
        g = p[None, :] * g + (q[None, :] * z.to(tl.float32) + r[None, :])
        if PADDED:
            g = tl.where(pixel_valid, g, 0.0)
    return g.to(dy.dtype)


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
    BN_BACKWARD: tl.constexpr,
    MASK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The tile dz [pixels, channels], BLOCK its shape, of the pixels (n, row, col), each broadcastable to it.

    TMA: dy, z, mask are descriptors [N, P, Q, K], read as the box with the corner (n0, row0, col0, k0), which is zero
    where it leaves the tensor. Otherwise they are pointers, read where `inside`.
    """
    z_tile = None
    mask_tile = None
    if TMA:
        dz = dy.load([n0, row0, col0, k0]).reshape(BLOCK)
        if BN_BACKWARD or MASK == 2:
            z_tile = z.load([n0, row0, col0, k0]).reshape(BLOCK)
        if MASK == 1:
            mask_tile = mask.load([n0, row0, col0, k0]).reshape(BLOCK)
    else:
        at = ((n * P + row) * Q + col) * K + channel[None, :]
        readable = inside & channel_valid[None, :]
        dz = tl.load(dy + at, mask=readable, other=0.0)
        if BN_BACKWARD or MASK == 2:
            z_tile = tl.load(z + at, mask=readable, other=0.0)
        if MASK == 1:
            mask_tile = tl.load(mask + at, mask=readable, other=0.0)
    if BN_BACKWARD or MASK > 0:
        dz = bn_backward_tile(
            dz, z_tile, mask_tile, p, q, r, scale, shift, channel, channel_valid, inside, BN_BACKWARD, MASK, PADDED
        )
    return dz


class BnBackward(NamedTuple):
    """The tensors behind dz = p g + q z + r, g = dy where the mask is > 0. kind: `MASK` of the kernels."""

    z: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    mask: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def kind(self) -> int:
        return 1 if self.mask is not None else 2 if self.scale is not None else 0

    @property
    def computed(self) -> bool:
        """True where dz isn't dy itself."""
        return self.z is not None or self.mask is not None

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
        raise ValueError(f"filters {tuple(filter_shape)} with groups={groups} want {c_group * groups} channels, x has {C}")
    problem = ConvProblem(N, H, W, C, K, R, S, stride, pad, dilation, groups)
    if dy.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dy must be bfloat16, float16 or float32, got {dy.dtype}")
    check_tensor("dy", dy, (N, problem.P, problem.Q, K), dy)
    return problem


def check_tensor(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`tensor`, if there is one, is contiguous, has `shape`, `dtype` (default: like's) and lives with `like`."""
    if tensor is None:
        return
    dtype = dtype or like.dtype
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, dy on {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(shape)}")


def tma_refusal(problem: ConvProblem, *tensors: Tensor | None) -> str | None:
    """Why the boxes of the tensor memory accelerator can't carry this problem, or None where they can."""
    present = [t for t in tensors if t is not None]
    device, itemsize = present[0].device, present[0].element_size()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "it needs compute capability 9.0"
    if problem.groups > 1:
        return f"groups={problem.groups}"
    for name in ("C", "K"):
        if getattr(problem, name) * itemsize % 16:
            return f"{name}={getattr(problem, name)} channels are no multiple of 16 bytes"
    if any(t.data_ptr() % 16 for t in present if t.device.type != "meta"):
        return "a tensor doesn't start at a multiple of 16 bytes"
    return None


def choose(tile: Tile | None, heuristic: Callable[[bool], Tile], refusal: str | None) -> Tile:
    """`tile` if it is given and can run, else heuristic(tma)."""
    if tile is None:
        return heuristic(refusal is None)
    if tile.box is not None and refusal is not None:
        raise ValueError(f"a tile with a box is fetched by TMA, which is impossible here: {refusal}")
    return tile


def operand(
    tensor: Tensor | None,
    shape: tuple[int, ...],
    block: tuple[int, ...] | None,
    at: tuple[slice, ...] = (),
) -> Any:
    """`tensor` viewed as `shape`, there indexed by `at`: as a TMA descriptor with `block`, or as it is for block None."""
    if tensor is None:
        return None
    view = tensor.view(shape)[at]
    return view if block is None else TensorDescriptor.from_tensor(view, list(block))


def pixel_tiles(box: tuple[int, int, int] | None, pixels: int, N: int, rows: int, cols: int) -> tuple[int, int, int]:
    """Tiles along N, rows and columns; all along the first where a tile is `pixels` consecutive ones."""
    if box is None:
        return triton.cdiv(N * rows * cols, pixels), 1, 1
    return triton.cdiv(N, box[0]), triton.cdiv(rows, box[1]), triton.cdiv(cols, box[2])


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H200's for a device that is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
