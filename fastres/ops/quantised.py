"""Convolutions in 8 bits, float8 on GPUs and int8 on CPUs: how numbers are stored, and what computes with them.

Activations are NHWC-contiguous [N, H, W, C]. Weights are KRSC-contiguous, with one scale per output channel and no zero
point. In int8 weights are whole numbers from -127 to 127, activations whole numbers from 0 to 255 in tensors of dtype
quint8, which carry their scale and zero point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastres.ops.folded import Folded
from fastres.ops.layout import Geometry, nchw, nhwc

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
_LEAST_RANGE = 1e-28  # a range below it is none: its scale would leave float32


@dataclass(frozen=True)
class Grid:
    """The numbers that 8 bits can stand for: a stored q means scale (q - zero). dtype: float8_e4m3fn (zero is 0) or
    quint8."""

    scale: float
    zero: int
    dtype: torch.dtype

    def store(self, x: Tensor) -> Tensor:
        """x rounded to the grid, what lies beyond its ends at the nearest of them."""
        if self.dtype == FLOAT8:
            return to_float8(x.float() / self.scale)
        return torch.quantize_per_tensor(x.float(), self.scale, self.zero, self.dtype)

    def load(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """What q stands for, computed in float32."""
        return ((q.float() * self.scale) if self.dtype == FLOAT8 else q.dequantize()).to(dtype)

    def units(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """q - zero: what q stands for, divided by the scale."""
        return q.to(dtype) if self.dtype == FLOAT8 else q.int_repr().to(dtype) - self.zero

    def nearest(self, units: Tensor) -> Tensor:
        """The tensor that stores the numbers nearest to units, which are as of `units`."""
        return (
            to_float8(units) if self.dtype == FLOAT8 else as_quint8((units + self.zero).round_().clamp_(0, 255), self)
        )


@dataclass(frozen=True)
class Quantised:
    """How a convolution of 8 bits finds its tensors and leaves its output; `out` None: in the net's own dtype."""

    x: Grid
    residual: Grid | None
    out: Grid | None


def grid(low: float, high: float, dtype: torch.dtype) -> Grid:
    """The grid of `dtype`, float8_e4m3fn or int8, that spans 0 and all from `low` to `high`."""
    if dtype == FLOAT8:
        largest = max(-low, high)
        return Grid(largest / FLOAT8_MAX if largest > 0 else 1.0, 0, FLOAT8)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 if high - low > _LEAST_RANGE else 1.0
    return Grid(scale, round(-low / scale), torch.quint8)


def pack(w: Tensor, shift: Tensor | None, x: Grid) -> Folded:
    """`fold`'s result with w in 8 bits, for inputs on the grid x, whose scale goes into that of w."""
    whole = x.dtype == torch.quint8
    largest = w.abs().amax((1, 2, 3))
    scale = torch.where(largest > 0, largest / (127 if whole else FLOAT8_MAX), 1.0)
    units = w / scale.view(-1, 1, 1, 1)
    small = units.round().to(torch.int8) if whole else to_float8(units)
    return Folded(nhwc(small), None if shift is None else shift.float(), None, (scale * x.scale).float())


def to_float8(x: Tensor) -> Tensor:
    """x in float8, what exceeds its range at its largest number (a plain cast would give NaN)."""
    return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def as_quint8(q: Tensor, grid: Grid) -> Tensor:
    """The tensor that stores q, whole numbers from 0 to 255 in any dtype."""
    return torch._make_per_tensor_quantized_tensor(q.to(torch.uint8), grid.scale, grid.zero)


class ByOneDNN:
    """Computes [relu](scale conv(x, w) + shift + residual) as one primitive of oneDNN.

    It may run in several threads at once. The operator writes the sum over the residual; where `keep`, over a copy of
    it. Raises RuntimeError, here or when it is called, where oneDNN doesn't serve it.

    The packed weights belong to this convolution alone. PyTorch keeps the primitive of the first call in them; another
    operator would use it wrongly. A call with another shape looks its own primitive up, and packs the weights each time
    if that primitive wants another format. `another` packs once more, for a first call of its own; packing takes
    longer than several calls.
    """

    def __init__(self, weights: Folded, *, geometry: Geometry, relu: bool, grids: Quantised, keep: bool) -> None:
        self.another = partial(ByOneDNN, weights, geometry=geometry, relu=relu, grids=grids, keep=keep)
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
        with ENGINE:  # which these two operators ask for when they are called, too
            return (nhwc(self.added(nchw(x), total, self.packed, *self.out)),)


class _Engine:
    """A context in which PyTorch's quantised engine, which all threads share, is oneDNN: from the first thread that
    enters to the last that leaves."""

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
    """A max pool of a quint8 tensor by one of float32."""
    (y,) = pool(x.int_repr().float())
    return (as_quint8(y, Grid(x.q_scale(), x.q_zero_point(), x.dtype)),)


@cache
def saturates() -> bool:
    """Whether oneDNN's int8 convolution on this CPU loses sums of two products that leave 16 bits, as its code for CPUs
    without VNNI does."""
    weights = Folded(torch.full((16, 1, 1, 64), 127, dtype=torch.int8), None, None, torch.ones(16))
    whole, out = Grid(1.0, 0, torch.quint8), Grid(127.0 * 64, 0, torch.quint8)
    call = ByOneDNN(weights, geometry=Geometry(), relu=False, grids=Quantised(whole, None, out), keep=False)
    (y,) = call(as_quint8(torch.full((1, 4, 4, 64), 255), whole))
    return bool((y.int_repr() != 255).any())
