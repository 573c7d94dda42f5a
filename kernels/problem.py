"""The sizes of one convolution, the GEMMs of its three passes, and their memory traffic and roofline.

Names follow CUTLASS: x [N, H, W, C], w [K, R, S, C/groups], y [N, P, Q, K]. The passes are fprop, y = conv(x, w);
dgrad, dx = conv_transpose(dy, w); and wgrad, dw = corr(x, dy). Sizes are in elements and times in microseconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

# "infer": fprop of inference, with BatchNorm, residual and ReLU in its epilogue. "chain": the three convolutions of the
# kernel in `chain`; their problem is that of the 3x3.
Pass = Literal["infer", "fprop", "dgrad", "wgrad", "chain"]


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up.

    triton.cdiv takes 2 us on the host, and a training step needs this a thousand times.
    """
    return -(-a // b)


FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # operands' dtypes; `chain` and `persistent` need 16 bits


class Gemm(NamedTuple):
    """The sizes of a GEMM, [m, k] by [k, n].

    fprop and dgrad: m output channels of the pass, n pixels, k (tap, channel) pairs. wgrad: m filters, n (tap, channel)
    pairs, k pixels.
    """

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Device:
    """The peak rates of a GPU, measured or specified: memory bandwidth in bytes/s and 16-bit tensor-core FLOP/s."""

    name: str
    bandwidth: float
    flops_16bit: float


H200 = Device("NVIDIA H200", bandwidth=4.3e12, flops_16bit=790e12)


@dataclass(frozen=True)
class ConvProblem:
    """The sizes of a 2-D convolution with zero padding.

    Stride, padding and dilation are the same along H and W. Raises ValueError if no convolution has these sizes.
    """

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int = 1
    S: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("N", "H", "W"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("C", "K", "R", "S", "stride", "dilation", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.pad < 0:
            raise ValueError(f"pad must be >= 0, got {self.pad}")
        if self.C % self.groups or self.K % self.groups:
            raise ValueError(f"groups={self.groups} must divide C={self.C} and K={self.K}")
        if self.P < 1 or self.Q < 1:
            raise ValueError(f"the {self.R}x{self.S} filter is larger than the padded input: {self}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # cached, because every call of a launcher looks up its problem
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @staticmethod
    @lru_cache(maxsize=4096, typed=True)
    def of(x_shape: tuple[int, ...], w_shape: tuple[int, ...], *geometry: int, **named: int) -> ConvProblem:
        """Return the problem of filters w [K, R, S, C/groups] on x [N, H, W, C].

        geometry: stride, pad, dilation and groups, in this order or by name. Raises ValueError if the shapes and the
        geometry do not fit together.
        """
        if len(x_shape) != 4 or len(w_shape) != 4:
            expected = "x must be [N, H, W, C] and w [K, R, S, C/groups]"
            raise ValueError(f"{expected}, got {list(x_shape)} and {list(w_shape)}")
        (*images, C), (K, R, S, channels) = x_shape, w_shape
        problem = ConvProblem(*images, C, K, R, S, *geometry, **named)
        if channels * problem.groups != C:
            wanted = channels * problem.groups
            raise ValueError(
                f"w {list(w_shape)} with groups={problem.groups} requires x with {wanted} channels, got {C}"
            )
        return problem

    @cached_property
    def P(self) -> int:
        return (self.H + 2 * self.pad - self.dilation * (self.R - 1) - 1) // self.stride + 1

    @cached_property
    def Q(self) -> int:
        return (self.W + 2 * self.pad - self.dilation * (self.S - 1) - 1) // self.stride + 1

    @cached_property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.H, self.W, self.C

    @cached_property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.R, self.S, self.C // self.groups

    @cached_property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.P, self.Q, self.K

    @cached_property
    def pixels(self) -> int:
        """N P Q, the number of output pixels, that is, of values per channel in BatchNorm's statistics."""
        return self.N * self.P * self.Q

    @property
    def pointwise(self) -> bool:
        """Whether this is a 1x1 convolution with stride 1 and no padding: a plain GEMM, except for groups."""
        return self.R == self.S == self.stride == 1 and self.pad == 0

    def gemm(self, pass_: Pass) -> Gemm:
        """Return the GEMM sizes of one group."""
        c, k = self.C // self.groups, self.K // self.groups
        taps = self.R * self.S
        if pass_ in ("infer", "fprop"):
            return Gemm(k, self.pixels, taps * c)
        if pass_ == "dgrad":
            return Gemm(c, self.N * self.H * self.W, taps * k)
        return Gemm(k, taps * c, self.pixels)

    @property
    def multiply_adds(self) -> int:
        """The number of multiply-adds, which is the same for fprop, dgrad and wgrad."""
        return self.pixels * self.K * self.R * self.S * (self.C // self.groups)

    @property
    def x_numel(self) -> int:
        return self.N * self.H * self.W * self.C

    @property
    def y_numel(self) -> int:
        return self.pixels * self.K

    @property
    def w_numel(self) -> int:
        return self.K * self.R * self.S * (self.C // self.groups)

    def min_bytes(self, itemsize: int, residual: bool = False) -> int:
        """Return the bytes that a pass must move: x, y and w once each, and a residual [N, P, Q, K] if there is one.

        This is the same for every pass: it reads two of the three tensors and writes the third.
        """
        return itemsize * (self.x_numel + self.y_numel * (2 if residual else 1) + self.w_numel)

    def roofline_us(self, itemsize: int, device: Device = H200, residual: bool = False) -> float:
        """Return the roofline time in microseconds, the longer of compute time and memory time.

        The FLOP/s of `device` apply to 16 bits. They are doubled for an itemsize of 1 (FP8) and halved for 4 (TF32).
        """
        compute = 2 * self.multiply_adds / (device.flops_16bit * 2 / itemsize)
        return 1e6 * max(compute, self.min_bytes(itemsize, residual) / device.bandwidth)

    @property
    def int32_safe(self) -> bool:
        """Whether all element offsets fit into int32. Otherwise kernels must compute them in int64."""
        return max(self.x_numel, self.y_numel, self.w_numel) < 2**31


def pool_refusal(kernel: int, stride: int, pad: int) -> str | None:
    """Return the reason why no kernel serves a max pool of kernel x kernel windows, or None if one does.

    A tap, the index of the maximum within its window, is stored in a byte. The backward kernel is unrolled over
    stride x stride pixels.
    """
    if 1 <= kernel <= 15 and 1 <= stride <= 4 and 0 <= 2 * pad <= kernel:
        return None
    return (
        "a max pool requires 1 <= kernel <= 15, 1 <= stride <= 4 and 0 <= pad <= kernel / 2, "
        f"got kernel={kernel}, stride={stride} and pad={pad}"
    )


def model_problems(model: nn.Module, shape: tuple[int, int, int, int]) -> Counter[ConvProblem]:
    """Return the convolutions that `model` runs on an input of `shape` [N, C, H, W], with their counts.

    They are in the order of their first call.

    Runs a forward pass, which computes nothing if the model is on the meta device. Raises ValueError for a convolution
    whose stride, padding or dilation differs between the axes, or whose padding is a string.
    """
    problems: Counter[ConvProblem] = Counter()

    def count(conv: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        N, C, H, W = inputs[0].shape
        if isinstance(conv.padding, str) or any(
            len({*pair}) > 1 for pair in (conv.stride, conv.padding, conv.dilation)
        ):
            raise ValueError(
                f"stride, padding and dilation must be numbers that are the same along both axes, got {conv}"
            )
        R, S = conv.kernel_size
        sizes = conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups
        problems[ConvProblem(N, H, W, C, conv.out_channels, R, S, *sizes)] += 1

    hooks = [m.register_forward_pre_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        parameter = next(model.parameters())
        with torch.no_grad():
            model(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    return problems
