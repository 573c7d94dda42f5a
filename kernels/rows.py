"""The matrix view of an activation and its tiles, shared by the memory-bound kernels (BatchNorm, pools, shortcuts).

A channels-last activation [N, P, Q, K] is viewed as [M, K] with M = N P Q pixels. A program works on a tile of BM
pixels x BK channels. Neighbouring threads take neighbouring channels, so each thread moves up to 16 bytes per access if
8 divides K. Per-channel vectors (scale, shift, mean, ...) are fp32 [K], and all arithmetic is fp32.
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
    """The size of a tile: its number of elements BM * BK, and the maximum of BK."""

    elements: int
    channels: int


# For elementwise kernels, for reductions, which keep a sum per element of the tile, and for the windows of a max pool.
# Chosen on an H200 with the activations of ResNet-50; bench/memory_bound.py compares them with other sizes.
STREAMED, REDUCED, WINDOWED = Cut(2048, 128), Cut(2048, 64), Cut(1024, 64)
_MAX_ROWS = 2**31 - 2**14  # pixels are numbered in int32, elements in int64


class Rows(NamedTuple):
    """An activation viewed as [M, K] and cut into tiles of BM x BK.

    VEC, 8 or 1, divides K and so every row offset. Kernels take K as K / VEC and multiply it by the constant VEC, which
    tells Triton that vector accesses are aligned.
    """

    M: int
    K: int
    BM: int
    BK: int
    VEC: int

    @property
    def tiles(self) -> int:
        return cdiv(self.M, self.BM) * cdiv(self.K, self.BK)

    def chunks(self) -> tuple[int, int]:
        """Return (number of chunks, steps of BM pixels per chunk) of a reduction over the pixels.

        One program reduces one chunk for one tile of channels. The split depends on the sizes only, not on the GPU, so
        that equal inputs give equal bits on every GPU. M must be at least 1.
        """
        wanted = max(1, min(512, 1024 // cdiv(self.K, self.BK)))
        steps = cdiv(self.M, self.BM * wanted)
        return cdiv(self.M, self.BM * steps), steps


def rows(name: str, z: Tensor, cut: Cut, *, also: int = 0) -> Rows:
    """Return the matrix view of z [..., K] with tiles of at most the size `cut`.

    name: names z in error messages. also: the channel count of a second tensor that the kernel reads, as VEC must
    divide that too; 0 if there is none.

    Raises ValueError unless z is contiguous, bfloat16, float16 or float32, and has at least one channel and fewer than
    2**31 - 2**14 pixels.
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
    # Smaller tiles save registers: with VEC == 1 every value has its own address, and fp32 values take twice the space.
    share = 4 if VEC == 1 else 2 if z.element_size() > 2 else 1
    return Rows(M, K, cut.elements // share // BK, BK, VEC)


@triton.jit
def tile_of(pid, K, BM: tl.constexpr, BK: tl.constexpr):
    """Return the pixels [BM] and channels [BK] of program `pid`; neighbouring programs share their pixels."""
    tiles_k = tl.cdiv(K, BK)
    return pid // tiles_k * BM + tl.arange(0, BM), pid % tiles_k * BK + tl.arange(0, BK)


@triton.jit
def at(row, channel, K):
    """Return the int64 offsets [BM, BK] of elements (row, channel) in [M, K]."""
    return row.to(tl.int64)[:, None] * K + channel[None, :]


@triton.jit
def vector(pointer, channel, K):
    """Load one value per channel, as fp32 [1, BK]; zero beyond K."""
    return tl.load(pointer + channel, mask=channel < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def strided_row(row, P, Q, H, W, STRIDE: tl.constexpr):
    """Map row (n, p, q) of [N P Q, K] to row (n, p STRIDE, q STRIDE) of [N H W, C]."""
    n, p, q = unravel(row, P, Q)
    return (n * H + p * STRIDE) * W + q * STRIDE
