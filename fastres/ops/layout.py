"""Memory layouts of tensors inside the fused operations, and conversions to and from them.

A net's activations are [N, C, H, W] and its filters [K, C/groups, R, S]. Kernels take them as NHWC and KRSC, which is
a view if the memory format is channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNED = 128  # alignment in bytes of each weight in a shared allocation; TMA requires 16


class Geometry(NamedTuple):
    """Stride, padding, dilation and groups of a convolution; each size applies to both height and width."""

    stride: int = 1
    pad: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def both(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding and dilation as [height, width] lists, and groups, in the form that ATen's operators take."""
        return [self.stride] * 2, [self.pad] * 2, [self.dilation] * 2, self.groups


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and per-channel vectors for activations of `dtype`: float32, or float64 for
    float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nchw(x: Tensor) -> Tensor:
    """Return x [N, H, W, C] as a view [N, C, H, W], or filters [K, R, S, C] as a view [K, C, R, S]."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] as contiguous [N, H, W, C]: a view if x is channels_last, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x [N, C, H, W] as contiguous [N, H, W, C] in `dtype`: a view if x already is channels_last in `dtype`,
    else one copy."""
    return nhwc(x if x.dtype == dtype else x.to(dtype, memory_format=torch.channels_last))


def unaliased(out: Tensor) -> Tensor:
    """Return `nchw(out)` without marking it as a view for autograd.

    Autograd forbids in-place operations on a view that a custom function returns; callers must be able to use them.
    """
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return nchw(out)


def krsc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weight [K, C/groups, R, S] as contiguous [K, R, S, C/groups] in `dtype`, detached from autograd."""
    return nhwc(weight.detach().to(dtype))


def read_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return `krsc` of every weight.

    Weights that only change their dtype are cast together into one shared allocation, which takes one or a few launches
    on a GPU instead of one for each weight.
    """
    first, device = weights[0].dtype, weights[0].device  # kernels raise an error for weights on another device
    alike = [w for w in weights if w.dtype == first != dtype and w.device == device]
    cast = [w for w in alike if w.permute(0, 2, 3, 1).is_contiguous()]
    if len(cast) < 2:
        return [krsc(weight, dtype) for weight in weights]
    step = _ALIGNED // dtype.itemsize
    starts = [0, *accumulate(-(-w.numel() // step) * step for w in cast)]
    memory = torch.empty(starts[-1], dtype=dtype, device=cast[0].device)
    # Same strides as the weights: `_foreach_copy_` fuses copies only between tensors of equal strides.
    copies = [memory.as_strided(w.shape, w.stride(), start) for w, start in zip(cast, starts, strict=False)]
    torch._foreach_copy_(copies, [w.detach() for w in cast])
    found = {id(weight): copy for weight, copy in zip(cast, copies, strict=True)}
    return [nhwc(found[id(w)]) if id(w) in found else krsc(w, dtype) for w in weights]


def like_parameter(dw: Tensor, weight: Tensor) -> Tensor:
    """Return dw [K, R, S, C/groups] as a gradient [K, C/groups, R, S] with weight's dtype and exactly its strides, as
    DDP's gradient buckets require."""
    grad = nchw(dw)
    if grad.dtype == weight.dtype:
        if grad.stride() == weight.stride():
            return grad
        if all(n == 1 or a == b for n, a, b in zip(grad.shape, grad.stride(), weight.stride(), strict=True)):
            return grad.as_strided(weight.shape, weight.stride())  # they differ only in dimensions of size 1
    return torch.empty_like(weight, memory_format=torch.preserve_format).copy_(grad)


def cast_gradients(grads: list[Any], parameters: Sequence[Any]) -> list[Any]:
    """Cast each gradient in `grads` to its parameter's dtype; return the list, which is changed in place.

    A gradient or a parameter may be None. Gradients that already have the right dtype stay as they are. The others also
    get their parameter's strides, and are cast together, in one or a few launches on a GPU.
    """
    cast: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (grad, parameter) in enumerate(zip(grads, parameters, strict=True)):
        if grad is not None and grad.dtype != parameter.dtype:
            cast.setdefault((grad.dtype, parameter.dtype), []).append(i)
    for of_dtypes in cast.values():
        found = [torch.empty_like(parameters[i], memory_format=torch.preserve_format) for i in of_dtypes]
        torch._foreach_copy_(found, [grads[i] for i in of_dtypes])
        for i, grad in zip(of_dtypes, found, strict=True):
            grads[i] = grad
    return grads
