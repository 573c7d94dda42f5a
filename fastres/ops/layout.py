"""How tensors lie in memory inside the fused operations, and their way in and out.

A net's tensors are [N, C, H, W] and its filters [K, C/groups, R, S]; kernels take them as NHWC and KRSC, which is a
view where the memory format is channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNED = 128  # bytes; TMA wants 16


class Geometry(NamedTuple):
    """Stride, pad, dilation and groups of a convolution, the same in both directions of the image."""

    stride: int = 1
    pad: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def both(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, pad and dilation for either direction, and groups, as ATen's operators take them."""
        return [self.stride] * 2, [self.pad] * 2, [self.dilation] * 2, self.groups


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and per-channel vectors that accompany activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nchw(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W], a view; also [K, R, S, C] -> [K, C, R, S]."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], contiguous: a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, C, H, W] as [N, H, W, C], contiguous, in `dtype`: a view where it is that already, else one pass over
    memory."""
    return nhwc(x if x.dtype == dtype else x.to(dtype, memory_format=torch.channels_last))


def unaliased(out: Tensor) -> Tensor:
    """`nchw(out)` that is no view to autograd: what a custom function returns must be open to in-place operations."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return nchw(out)


def krsc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [K, C/groups, R, S] as [K, R, S, C/groups], contiguous, in `dtype`, without autograd."""
    return nhwc(weight.detach().to(dtype))


def read_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`krsc` of every weight; those that only change their dtype share one memory, and on a GPU a launch or few."""
    first, device = weights[0].dtype, weights[0].device  # what is elsewhere is refused by the kernel that reads it
    alike = [w for w in weights if w.dtype == first != dtype and w.device == device]
    cast = [w for w in alike if w.permute(0, 2, 3, 1).is_contiguous()]
    if len(cast) < 2:
        return [krsc(weight, dtype) for weight in weights]
    step = _ALIGNED // dtype.itemsize
    starts = [0, *accumulate(-(-w.numel() // step) * step for w in cast)]
    memory = torch.empty(starts[-1], dtype=dtype, device=cast[0].device)
    # Strides like the weights', as one kernel copies only between such.
    copies = [memory.as_strided(w.shape, w.stride(), start) for w, start in zip(cast, starts, strict=False)]
    torch._foreach_copy_(copies, [w.detach() for w in cast])
    found = {id(weight): copy for weight, copy in zip(cast, copies, strict=True)}
    return [nhwc(found[id(w)]) if id(w) in found else krsc(w, dtype) for w in weights]


def like_parameter(dw: Tensor, weight: Tensor) -> Tensor:
    """dw KRSC as a gradient [K, C, R, S] of weight's dtype with exactly its strides (DDP's buckets want that)."""
    grad = nchw(dw)
    if grad.dtype == weight.dtype:
        if grad.stride() == weight.stride():
            return grad
        if all(n == 1 or a == b for n, a, b in zip(grad.shape, grad.stride(), weight.stride(), strict=True)):
            return grad.as_strided(weight.shape, weight.stride())  # a 1x1 has two names for one order
    return torch.empty_like(weight, memory_format=torch.preserve_format).copy_(grad)


def cast_gradients(grads: list[Any], parameters: Sequence[Any]) -> list[Any]:
    """The gradients of parameters (each a tensor or None), with their dtypes; those that change theirs get the
    parameters' strides, too, and on a GPU a launch or few do it."""
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
