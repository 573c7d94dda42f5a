"""Convolutions in 8 bits, float8 on GPUs and int8 on CPUs: how numbers are stored, and the int8 engine, oneDNN.

Activations are NHWC-contiguous [N, H, W, C]. Weights are KRSC-contiguous [K, R, S, C/groups], with one scale per output
channel and no zero point. In int8, weights are integers from -127 to 127. Activations are integers from 0 to 255, in
tensors of dtype quint8, which carry their scale and zero point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastres.ops.folded import Folded
from fastres.ops.layout import Geometry, nchw, nhwc

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
_LEAST_RANGE = 1e-28  # a smaller range counts as empty: its scale would underflow in float32


@dataclass(frozen=True)
class Grid:
    """A quantisation grid: a stored 8-bit number q represents scale (q - zero).

    dtype: quint8, or float8_e4m3fn, for which zero is 0.
    """

    scale: float
    zero: int
    dtype: torch.dtype

    def store(self, x: Tensor) -> Tensor:
        """Return x in the grid's dtype: rounded to the grid, and clamped to its range."""
        if self.dtype == FLOAT8:
            return to_float8(x.float() / self.scale)
        return torch.quantize_per_tensor(x.float(), self.scale, self.zero, self.dtype)

    def load(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values that q represents, computed in float32 and rounded to `dtype`."""
        return ((q.float() * self.scale) if self.dtype == FLOAT8 else q.dequantize()).to(dtype)

    def units(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """Return q - zero in `dtype`: the values that q represents, divided by the scale."""
        return q.to(dtype) if self.dtype == FLOAT8 else q.int_repr().to(dtype) - self.zero

    def nearest(self, units: Tensor) -> Tensor:
        """Return the inverse of the method `units`: a tensor of the grid's dtype, rounded and clamped to its range."""
        return (
            to_float8(units) if self.dtype == FLOAT8 else as_quint8((units + self.zero).round_().clamp_(0, 255), self)
        )


@dataclass(frozen=True)
class Quantised:
    """The quantisation grids of an 8-bit convolution's tensors.

    residual: None without a residual. out: None if the output is in the net's floating-point dtype.
    """

    x: Grid
    residual: Grid | None
    out: Grid | None


def grid(low: float, high: float, dtype: torch.dtype) -> Grid:
    """Return the quantisation grid that covers 0 and the range from `low` to `high`.

    dtype: float8_e4m3fn or int8; activations in int8 are stored as quint8.
    """
    if dtype == FLOAT8:
        largest = max(-low, high)
        return Grid(largest / FLOAT8_MAX if largest > 0 else 1.0, 0, FLOAT8)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 if high - low > _LEAST_RANGE else 1.0
    return Grid(scale, round(-low / scale), torch.quint8)


def pack(w: Tensor, shift: Tensor | None, x: Grid) -> Folded:
    """Return `fold`'s result as `Folded` with w in 8 bits, int8 if x's grid is quint8, else float8_e4m3fn.

    w [K, C/groups, R, S], shift [K] or None. x: the quantisation grid of the input; its scale is multiplied into w's.
    """
    whole = x.dtype == torch.quint8
    largest = w.abs().amax((1, 2, 3))
    scale = torch.where(largest > 0, largest / (127 if whole else FLOAT8_MAX), 1.0)
    units = w / scale.view(-1, 1, 1, 1)
    small = units.round().to(torch.int8) if whole else to_float8(units)
    return Folded(nhwc(small), None if shift is None else shift.float(), None, (scale * x.scale).float())


def to_float8(x: Tensor) -> Tensor:
    """Return x in float8_e4m3fn, clamped to its range: a plain cast turns larger values into NaN."""
    return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def as_quint8(q: Tensor, grid: Grid) -> Tensor:
    """Return q, integers from 0 to 255 in any dtype, as a quint8 tensor with the scale and zero point of `grid`."""
    return torch._make_per_tensor_quantized_tensor(q.to(torch.uint8), grid.scale, grid.zero)


class ByOneDNN:
    """An int8 convolution [relu](scale conv(x, w) + shift + residual) as one oneDNN primitive.

    Calling it takes x and the residual as quint8 NHWC tensors, and returns a tuple with the output, quint8 NHWC.
    Several threads may call it at the same time. The operator overwrites the residual with the output; with `keep`, it
    overwrites a copy. The constructor or a call raises RuntimeError if oneDNN does not support the convolution.

    The packed weights must not be shared with another convolution: PyTorch stores the primitive of the first call in
    them, and another operator would use that primitive wrongly. A call with another shape looks up its own primitive,
    and packs the weights again each time if that primitive needs another format. Packing takes longer than several
    calls.
    """

    def __init__(self, weights: Folded, *, geometry: Geometry, relu: bool, grids: Quantised, keep: bool) -> None:
        assert weights.scale is not None
        assert grids.out is not None
        scale = weights.scale.double() / grids.x.scale
        w = torch._make_per_channel_quantized_tensor(
            nchw(weights.w), scale, torch.zeros(len(scale), dtype=torch.int64), 0
        )
        ops: Any = torch.ops.quantized
        with ENGINE:
            self.packed = ops.conv2d_prepack(w, weights.shift, *geometry.both)
        self.out = grids.out.scale, grids.out.zero
        self.copies = keep and grids.residual is not None
        self.alone = (ops.conv2d_relu if relu else ops.conv2d).new
        self.added = (ops.conv2d_add_relu if relu else ops.conv2d_add).default

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor]:
        if residual is None:
            return (nhwc(self.alone(nchw(x), self.packed, *self.out)),)
        total = nchw(residual.clone() if self.copies else residual)
        with ENGINE:  # these two operators check the engine when they are called, not only when they are packed
            return (nhwc(self.added(nchw(x), total, self.packed, *self.out)),)


class _Engine:
    """A context in which PyTorch's quantised engine is oneDNN.

    The engine is a global setting of the process. It is switched when the first thread enters, and restored when the
    last one leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.backends.quantized.engine
                torch.backends.quantized.engine = "onednn"
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.quantized.engine = self._before


ENGINE = _Engine()


def by_pool(pool: Callable[..., tuple[Tensor]], x: Tensor) -> tuple[Tensor]:
    """Return a tuple with the max pool of x, both quint8 with the same scale and zero point.

    pool: computes the max pool of the stored integers in float32.
    """
    (y,) = pool(x.int_repr().float())
    return (as_quint8(y, Grid(x.q_scale(), x.q_zero_point(), x.dtype)),)


@cache
def saturates() -> bool:
    """Return whether oneDNN's int8 convolution on this CPU saturates sums of two products at 16 bits.

    Its code for CPUs without VNNI does, which gives wrong results.
    """
    weights = Folded(torch.full((16, 1, 1, 64), 127, dtype=torch.int8), None, None, torch.ones(16))
    whole, out = Grid(1.0, 0, torch.quint8), Grid(127.0 * 64, 0, torch.quint8)
    call = ByOneDNN(weights, geometry=Geometry(), relu=False, grids=Quantised(whole, None, out), keep=False)
    (y,) = call(as_quint8(torch.full((1, 4, 4, 64), 255), whole))
    return bool((y.int_repr() != 255).any())
