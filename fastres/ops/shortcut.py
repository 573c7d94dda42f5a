"""The zero-padded identity shortcut (option A; paper, section 3.3), alone and fused with the block's addition and ReLU.

    pad_shortcut(x, stride, channels)      every `stride`-th pixel of x, with zero channels appended
    pad_shortcut_add_relu(y, x, stride)    relu(y + pad_shortcut(x, stride, K)), y [N, K, P, Q]

Both are PyTorch operators. This file defines their schemas, fake implementations, autograd, vmap and an implementation
in ATen operators, which works on every device. csrc/ has faster CPU and CUDA kernels, which replace the ATen
implementation: `extension` builds and loads them at the first call with a tensor of that device. Derivatives of every
order and forward-mode AD work: each backward is itself an operator with a derivative, and the jvp is the forward
applied to the tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fastres.ops import extension, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_lib = torch.library.Library("fastres", "FRAGMENT")
for _schema in (
    "pad_shortcut(Tensor x, SymInt stride, SymInt channels) -> Tensor",
    "pad_shortcut_backward(Tensor grad, SymInt stride, SymInt C, SymInt H, SymInt W) -> Tensor",
    "pad_shortcut_add_relu(Tensor y, Tensor x, SymInt stride) -> Tensor",
    "pad_shortcut_add_relu_backward(Tensor grad, Tensor out, SymInt stride, SymInt C, SymInt H, SymInt W)"
    " -> (Tensor dy, Tensor dx)",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_pad = torch.ops.fastres.pad_shortcut.default
_pad_backward = torch.ops.fastres.pad_shortcut_backward.default
_add_relu = torch.ops.fastres.pad_shortcut_add_relu.default
_add_relu_backward = torch.ops.fastres.pad_shortcut_add_relu_backward.default
_mask = torch.ops.aten.threshold_backward.default  # (grad, out, 0): grad, but 0 where out <= 0


def pad_shortcut(x: Tensor, stride: int, channels: int) -> Tensor:
    """Return the option-A shortcut of x: every `stride`-th pixel, with zero channels appended.

    x [N, C, H, W] of float64, float32, bfloat16 or float16, any strides; stride >= 1; channels >= C. Returns
    [N, channels, ceil(H/stride), ceil(W/stride)] in x's dtype and memory format. Equivalent to:

        x = x[:, :, ::stride, ::stride]
        return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))

    Raises TypeError for another dtype, and ValueError for a wrong shape, stride or number of channels. Source: paper,
    section 3.3.
    """
    _check(x, stride, channels)
    return _call(_pad, _PadFunction, x, stride, channels)


def pad_shortcut_add_relu(y: Tensor, x: Tensor, stride: int) -> Tensor:
    """Return relu(y + pad_shortcut(x, stride, K)).

    The kernels in csrc/ compute it in one pass over memory, and its backward in another one. Only the output is saved
    for backward. y [N, K, ceil(H/stride), ceil(W/stride)] and x [N, C, H, W] have the same dtype (float64, float32,
    bfloat16 or float16) and device, and any strides; K >= C. Returns a tensor with y's shape, dtype and memory format.
    Equivalent to:

        return F.relu(y + pad_shortcut(x, stride, y.shape[1]))

    Raises TypeError for another dtype or different dtypes, and ValueError for a wrong shape, stride or device. Source:
    paper, equation 1 and section 3.3.
    """
    _check_pair(y, x, stride)
    return _call(_add_relu, _AddReluFunction, y, x, stride)


class PadShortcut(nn.Module):
    """Option A as the shortcut module of a block: `pad_shortcut`, [N, C, H, W] -> [N, channels, P, Q]. No parameters.

    Under scripting, tracing, `fx` and `torch.export` it runs in plain ATen operators, so that such graphs run without
    fastres.
    """

    def __init__(self, stride: int, channels: int) -> None:
        super().__init__()
        if stride < 1 or channels < 1:
            raise ValueError(f"stride and channels must be at least 1, got {stride} and {channels}")
        self.stride = stride
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript skips only a separate statement
            if not is_traced(x):
                return pad_shortcut(x, self.stride, self.channels)
        return reference.pad_shortcut(x, self.stride, self.channels)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, channels={self.channels}"


def is_traced(x: Any) -> bool:
    """Return True if fx, `jit.trace` or `torch.export` is recording the call: recordings must contain ATen ops only."""
    return isinstance(x, fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()


def _check(x: Tensor, stride: int, channels: int) -> None:
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"x is {str(x.dtype).removeprefix('torch.')}; accepted: {accepted}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [N, C, H, W], got {tuple(x.shape)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if channels < x.shape[1]:
        raise ValueError(f"channels must be at least x's {x.shape[1]} (the shortcut only appends), got {channels}")


def _check_pair(y: Tensor, x: Tensor, stride: int) -> None:
    if y.dim() != 4:
        raise ValueError(f"y must have 4 dimensions [N, K, P, Q], got {tuple(y.shape)}")
    if y.dtype != x.dtype:
        raise TypeError(f"y and x must have the same dtype, got {y.dtype} and {x.dtype}")
    if y.device != x.device:
        raise ValueError(f"y and x must be on the same device, got {y.device} and {x.device}")
    _check(x, stride, y.shape[1])
    N, _, H, W = x.shape
    expected = (N, y.shape[1], _ceil_div(H, stride), _ceil_div(W, stride))
    if y.shape != expected:
        raise ValueError(f"y must be {expected} for x {tuple(x.shape)} and stride {stride}, got {tuple(y.shape)}")


def _ceil_div(size: int, stride: int) -> int:
    return (size + stride - 1) // stride


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return ATen's `suggest_memory_format` of x, as csrc/shortcut.h does too: the results' strides must agree."""
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[d] * sizes[d]
    return torch.channels_last


def _empty(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=_memory_format(like))


# Fake implementations: they give the shapes and strides of the results.


@torch.library.register_fake("fastres::pad_shortcut", lib=_lib)
def _pad_fake(x: Tensor, stride: int, channels: int) -> Tensor:
    _check(x, stride, channels)
    N, _, H, W = x.shape
    return _empty(x, N, channels, _ceil_div(H, stride), _ceil_div(W, stride))


@torch.library.register_fake("fastres::pad_shortcut_backward", lib=_lib)
def _pad_backward_fake(grad: Tensor, stride: int, C: int, H: int, W: int) -> Tensor:
    return _empty(grad, grad.shape[0], C, H, W)


@torch.library.register_fake("fastres::pad_shortcut_add_relu", lib=_lib)
def _add_relu_fake(y: Tensor, x: Tensor, stride: int) -> Tensor:
    _check_pair(y, x, stride)
    return _empty(y, *y.shape)


@torch.library.register_fake("fastres::pad_shortcut_add_relu_backward", lib=_lib)
def _add_relu_backward_fake(grad: Tensor, out: Tensor, stride: int, C: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    return _empty(out, *out.shape), _empty(out, out.shape[0], C, H, W)


# The ATen implementations. The first call with a CPU or CUDA tensor tries to load that device's kernel. If that
# succeeds, the dispatcher calls the kernel from then on.


def _pad_aten(x: Tensor, stride: int, channels: int) -> Tensor:
    _check(x, stride, channels)
    if extension.load(x.device.type):
        return _pad(x, stride, channels)
    out = _pad_fake(x, stride, channels)
    out[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
    out[:, x.shape[1] :] = 0
    return out


def _pad_backward_aten(grad: Tensor, stride: int, C: int, H: int, W: int) -> Tensor:
    if extension.load(grad.device.type):
        return _pad_backward(grad, stride, C, H, W)
    dx = _empty(grad, grad.shape[0], C, H, W).zero_()
    dx[:, :, ::stride, ::stride] = grad[:, :C]
    return dx


def _add_relu_aten(y: Tensor, x: Tensor, stride: int) -> Tensor:
    _check_pair(y, x, stride)
    if extension.load(x.device.type):
        return _add_relu(y, x, stride)
    out = _empty(y, *y.shape).copy_(y)
    out[:, : x.shape[1]] += x[:, :, ::stride, ::stride]
    return out.relu_()


def _add_relu_backward_aten(grad: Tensor, out: Tensor, stride: int, C: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    if extension.load(grad.device.type):
        return _add_relu_backward(grad, out, stride, C, H, W)
    dy = _empty(out, *out.shape).copy_(_mask(grad, out, 0))
    dx = _empty(out, out.shape[0], C, H, W).zero_()
    dx[:, :, ::stride, ::stride] = dy[:, :C]
    return dy, dx


# Autograd is registered on the Autograd key directly. `torch.library.register_autograd` does not support jvp: with it,
# an operator silently gives zero tangents.


class _PadFunction(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, below: Any, x: Tensor, stride: int, channels: int) -> Tensor:
        ctx.stride, ctx.channels, ctx.sizes = stride, channels, x.shape[1:]
        return below(x, stride, channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, _call(_pad_backward, _PadBackwardFunction, grad, ctx.stride, *ctx.sizes), None, None

    @staticmethod
    def jvp(ctx: Any, _below: None, x_t: Tensor, *_: None) -> Tensor:
        return _pad(x_t, ctx.stride, ctx.channels)


class _PadBackwardFunction(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, below: Any, grad: Tensor, stride: int, C: int, H: int, W: int) -> Tensor:
        ctx.stride, ctx.channels, ctx.sizes = stride, grad.shape[1], (C, H, W)
        return below(grad, stride, C, H, W)

    @staticmethod
    def backward(ctx: Any, dx_grad: Tensor) -> tuple[Any, ...]:
        return None, _pad(dx_grad, ctx.stride, ctx.channels), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _below: None, grad_t: Tensor, *_: None) -> Tensor:
        return _pad_backward(grad_t, ctx.stride, *ctx.sizes)


class _AddReluFunction(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, below: Any, y: Tensor, x: Tensor, stride: int) -> Tensor:
        out = below(y, x, stride)
        ctx.stride, ctx.sizes = stride, x.shape[1:]
        ctx.save_for_backward(out)
        ctx.save_for_forward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return None, _mask(grad, out, 0), None, None
        return None, *_call(_add_relu_backward, _AddReluBackwardFunction, grad, out, ctx.stride, *ctx.sizes), None

    @staticmethod
    def jvp(ctx: Any, _below: None, y_t: Tensor, x_t: Tensor, _stride: None) -> Tensor:
        (out,) = ctx.saved_tensors
        return _mask(y_t + _pad(x_t, ctx.stride, y_t.shape[1]), out, 0)


class _AddReluBackwardFunction(_SingleLevelFunction):
    """The backward of `pad_shortcut_add_relu`. It is linear in grad; its derivative with respect to `out`, which only
    selects elements, is zero."""

    @staticmethod
    def forward(
        ctx: Any, below: Any, grad: Tensor, out: Tensor, stride: int, C: int, H: int, W: int
    ) -> tuple[Tensor, Tensor]:
        ctx.stride, ctx.sizes = stride, (C, H, W)
        ctx.save_for_backward(out)
        ctx.save_for_forward(out)
        return below(grad, out, stride, C, H, W)

    @staticmethod
    def backward(ctx: Any, dy_grad: Tensor, dx_grad: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        grad_grad = _mask(dy_grad + _pad(dx_grad, ctx.stride, out.shape[1]), out, 0)
        return None, grad_grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, _below: None, grad_t: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        (out,) = ctx.saved_tensors
        return _add_relu_backward(grad_t, out, ctx.stride, *ctx.sizes)


def _autograd(op: Any, function: Any) -> Callable[..., Any]:
    """Return the kernel of `op` for the Autograd key.

    It applies `function` if a derivative may be needed; otherwise it redispatches to the next key directly.
    """

    def kernel(keyset: Any, *args: Any) -> Any:
        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        def below_this_level(*args: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # `apply` disabled both, for all levels
                return below(*args)

        if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(*args)
        if torch._C._are_functorch_transforms_active():  # here only for this level; lower levels apply `function`, too
            with enable_single_level_autograd_function():
                return function.apply(below_this_level, *args)
        return function.apply(below, *args)

    return kernel


def _call(op: Any, function: Any, *args: Any) -> Any:
    """Return op(*args), without going through the dispatcher's Python autograd kernel if the tensors are plain.

    Going through that kernel takes as long as computing a small shortcut.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or type(args[0]) is not Tensor
        or type(args[1]) not in (Tensor, int)  # the operators take one or two tensors, then ints
    ):
        return op(*args)

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return function.apply(below, *args)
    return below(*args)


# vmap: the mapped dimension is folded into the batch dimension.


def _fold(size: int, t: Tensor, dim: int | None) -> Tensor:
    return (t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)


def _vmap(op: Any, tensors: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        folded = [_fold(size, t, dim) for t, dim in zip(args[:tensors], in_dims[:tensors], strict=True)]
        out = op(*folded, *args[tensors:])
        if isinstance(out, tuple):
            return tuple(t.unflatten(0, (size, -1)) for t in out), (0,) * len(out)
        return out.unflatten(0, (size, -1)), 0

    return rule


for _op, _aten, _function, _tensors in (
    (_pad, _pad_aten, _PadFunction, 1),
    (_pad_backward, _pad_backward_aten, _PadBackwardFunction, 1),
    (_add_relu, _add_relu_aten, _AddReluFunction, 2),
    (_add_relu_backward, _add_relu_backward_aten, _AddReluBackwardFunction, 2),
):
    _lib.impl(_op, _aten, "CompositeExplicitAutograd")
    _lib.impl(_op, _autograd(_op, _function), "Autograd", with_keyset=True)
    torch.library.register_vmap(_op, _vmap(_op, _tensors), lib=_lib)
