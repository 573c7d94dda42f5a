"""What passes over activations share: the view of an activation as a matrix, and its tiles.

An NHWC-contiguous activation [N, P, Q, K] is read as [M, K], M = N P Q pixels of K channels. A program works on
BM pixels x BK channels, its threads side by side along the channels, so that each moves 16 bytes at a time where 8
divides K.
Vectors per channel (scale, shift, mean, ...) are fp32 [K]; all arithmetic is fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .device_functions import unravel
from .problem import FLOATS, cdiv

WARPS = 4


class Cut(NamedTuple):
    """How a tile is cut: its elements, and the most channels it spans."""

    elements: int
    channels: int


# Kernels that touch each element once; that keep sums per element; that look at the windows of a pool. Chosen on an
# H200 at the activations of ResNet-50; bench/memory_bound.py asks again.
STREAMED, REDUCED, WINDOWED = Cut(2048, 128), Cut(2048, 64), Cut(1024, 64)
_MAX_ROWS = 2**31 - 2**14  # pixels are numbered in int32, elements in int64


class Rows(NamedTuple):
    """An activation as [M, K], cut into tiles of BM x BK; VEC divides K and every row offset."""

    M: int
    K: int
    BM: int
    BK: int
    VEC: int

    @property
    def tiles(self) -> int:
        return cdiv(self.M, self.BM) * cdiv(self.K, self.BK)

    def chunks(self) -> tuple[int, int]:
        """How a reduction over pixels is split, from the sizes alone so that equal inputs give equal bits on every GPU:
        the number of chunks, each one program per tile of channels, and the steps of BM pixels in a chunk."""
        wanted = max(1, min(512, 1024 // cdiv(self.K, self.BK)))
        steps = cdiv(self.M, self.BM * wanted)
        return cdiv(self.M, self.BM * steps), steps


def rows(name: str, z: Tensor, cut: Cut, *, also: int = 0) -> Rows:
    """The matrix view of z [..., K], its tiles cut by `cut`. `also`: another channel count that offsets hold.

    Raises ValueError unless z is contiguous, bf16, fp16 or fp32, and has channels and fewer than 2**31 - 2**14 pixels.
    """
    if z.dtype not in FLOATS:
        raise ValueError(f"{name} must be bfloat16, float16 or float32, got {z.dtype}")
    if z.dim() < 2 or z.shape[-1] < 1:
        raise ValueError(f"{name} must be [..., K] with K >= 1, got shape {tuple(z.shape)}")
    if not z.is_contiguous():
        raise ValueError(f"{name} must be contiguous with channels last, got strides {z.stride()} of {tuple(z.shape)}")
    K = z.shape[-1]
    M = z.numel() // K
    if M >= _MAX_ROWS:
        raise ValueError(f"{name} has {M} pixels, at most {_MAX_ROWS - 1} are supported")
    BK = min(triton.next_power_of_2(K), cut.channels)
    VEC = 8 if K % 8 == also % 8 == 0 else 1
    share = 4 if VEC == 1 else 2 if z.element_size() > 2 else 1  # an address for each value; twice the registers
    return Rows(M, K, cut.elements // share // BK, BK, VEC)


@triton.jit
def tile_of(pid, K, BM: tl.constexpr, BK: tl.constexpr):
    """Pixels [BM] and channels [BK] of a program; neighbours share pixels."""
    tiles_k = tl.cdiv(K, BK)
    return pid // tiles_k * BM + tl.arange(0, BM), pid % tiles_k * BK + tl.arange(0, BK)


@triton.jit
def at(row, channel, K):
    """Offsets of elements (row, channel) in [M, K], 64 bits wide."""
    return row.to(tl.int64)[:, None] * K + channel[None, :]


@triton.jit
def vector(pointer, channel, K):
    """One value per channel, fp32 [1, BK]."""
    return tl.load(pointer + channel, mask=channel < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def strided_row(row, P, Q, H, W, STRIDE: tl.constexpr):
    """Row of [N, H, W, C] for the pixel n P Q + p Q + q: n, p STRIDE, q STRIDE."""
    n, p, q = unravel(row, P, Q)
    return (n * H + p * STRIDE) * W + q * STRIDE
