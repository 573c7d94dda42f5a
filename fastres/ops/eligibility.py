"""Decides whether a call may run fused: `serves` for a block or the stem, `serves_stages` for whole stages.

`why_plain` returns the reason if a block or stem may not.

A call may run fused only if the result is the same as calling its modules one by one. So every module must have exactly
the type that its role requires and have no hooks, nothing may trace or transform the call, and the input must be a
plain tensor that fits the weights. Whether kernels exist for a dtype and device is decided in `dispatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torchvision.ops import FrozenBatchNorm2d

from fastres.ops import dispatch
from fastres.ops.shortcut import PadShortcut, is_traced

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


class Parts(NamedTuple):
    """The modules of one block or stem, by role.

    Users may replace any submodule (`maxpool = nn.Identity()`, one convolution by two of lower rank). The role says
    which module types the fused path accepts in that place.
    """

    pairs: Sequence[tuple[nn.Module, nn.Module]]  # (conv, norm) in order of execution
    acts: Sequence[nn.Module]  # the activations, which must be ReLU
    shortcut: nn.Module | None = None  # None for the identity
    pool: nn.Module | None = None  # the stem's max pool
    idle: Sequence[nn.Module | None] = ()  # optional layers that must be absent or nn.Identity


def serves(x: Tensor, parts: Parts) -> bool:
    """Return True if the modules of `parts` may run fused on x [N, C, H, W] instead of one by one."""
    if torch.compiler.is_compiling():  # Dynamo folds this: no guard, no graph break
        return False
    return why_plain(x, parts) is None


def why_plain(x: Tensor, parts: Parts) -> str | None:
    """Return the reason why the modules of `parts` must run one by one on x [N, C, H, W]; None if they may run fused.

    Raises RuntimeError if `dispatch.backend` forces kernels that can't run on x's device or in its dtype.
    """
    if (reason := _unfusable_call(x)) is not None:
        return reason
    dtype = dispatch.compute_dtype(x)
    reason = dispatch.why_unfused(dtype, x.device) or foreign(parts) or _watched(parts)
    if reason is not None:
        return reason
    # For the inputs refused below the modules themselves raise PyTorch's errors.
    device, own, channels = _wanted(parts)
    if x.device != device:
        return f"the input is on {x.device}, the weights are on {device}"
    if dtype != own:
        return f"the input is {x.dtype}, the weights are {parts.pairs[0][0].weight.dtype}"
    return None if x.shape[1] == channels else f"the input has {x.shape[1]} channels, not {channels}"


def runs_stages() -> bool:
    """Return True if a fusion across blocks may apply, so that `serves_stages` is worth calling.

    False under `torch.compile`, while tracing, without gradients, and where those fusions are off.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    return dispatch.fuses_blocks()


def serves_stages(x: Tensor, stages: Sequence[Sequence[Any]]) -> int:
    """Return how many of the leading `stages` (lists of blocks) `block.stages` may run in sequence on x [N, C, H, W].

    0 if no backward pass can follow. A stage counts only if all of its blocks may run fused and take their `forward`
    from this package: an overridden `forward` may compute something else.
    """
    if not runs_stages() or dispatch.wants_reference() or torch._C._len_torch_dispatch_stack():
        return 0
    if not stages[0] or _unfusable_call(x):
        return 0
    dtype = dispatch.compute_dtype(x)
    if dispatch.why_unfused(dtype, x.device) or not wants_gradients(x, stages[0]):
        return 0
    channels = x.shape[1]
    for count, blocks in enumerate(stages):
        for block in blocks:
            if not (hasattr(block, "downsample") and _is_ours(block) and is_bare(block)):
                return count
            parts = block.parts()
            if foreign(parts) or _watched(parts) or (x.device, dtype, channels) != _wanted(parts):
                return count
            channels = parts.pairs[-1][0].out_channels
        if not blocks:
            return count
    return len(stages)


def wants_gradients(x: Tensor, modules: Sequence[nn.Module]) -> bool:
    """Return True if x or any parameter of `modules` requires a gradient."""
    return x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())


def _is_ours(block: nn.Module) -> bool:
    return type(block).forward.__module__.startswith(f"{__package__.partition('.')[0]}.") and hasattr(block, "parts")


def foreign(parts: Parts) -> str | None:
    """Return why `parts` can never run fused, whatever the input: a module has the wrong type or unsupported settings.

    None if every module fits its role. Hooks are not checked here.
    """
    wanted: list[tuple[nn.Module, tuple[type[nn.Module], ...]]] = []
    for conv, norm in parts.pairs:
        wanted += [(conv, (nn.Conv2d,)), (norm, NORMS)]
    wanted += [(act, (nn.ReLU,)) for act in parts.acts]
    wanted += [(layer, (nn.Identity,)) for layer in parts.idle if layer is not None]
    if parts.pool is not None:
        wanted.append((parts.pool, (nn.MaxPool2d,)))
    for module, kinds in wanted:
        if type(module) not in kinds:
            return f"it contains {type(module).__name__} where {' or '.join(k.__name__ for k in kinds)} is expected"
        if isinstance(module, nn.Conv2d) and (reason := _foreign_conv(module)):
            return reason
    return None if parts.shortcut is None else _foreign_shortcut(parts.shortcut)


def _foreign_shortcut(shortcut: nn.Module) -> str | None:
    if type(shortcut) is PadShortcut:
        return None
    modules: list[Any] = list(shortcut) if type(shortcut) is nn.Sequential else [shortcut]
    if len(modules) != 2 or type(modules[0]) is not nn.Conv2d or type(modules[1]) not in NORMS:
        return f"its shortcut is {[type(module).__name__ for module in modules]}, not a Conv2d and a BatchNorm"
    return _foreign_conv(modules[0])


def _foreign_conv(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its convolution has padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
    if conv.bias is not None:
        return "its convolution has a bias before the BatchNorm"
    for name in ("stride", "padding", "dilation"):
        if len(set(getattr(conv, name))) > 1:
            return f"its convolution has {name} {getattr(conv, name)}"
    return None


def _wanted(parts: Parts) -> tuple[Any, ...]:
    """Return the device, compute dtype and number of channels that the first convolution requires of its input."""
    conv: Any = parts.pairs[0][0]
    return conv.weight.device, dispatch.compute_dtype(conv.weight), conv.in_channels


def _unfusable_call(x: Tensor) -> str | None:
    if is_traced(x):
        return "the net is being traced"
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if x.dim() != 4 or x.numel() == 0:
        return "the input is not a non-empty [N, C, H, W] batch"
    return None


def serves_pad_end(x: Tensor, relu: nn.Module, shortcut: nn.Module) -> bool:
    """Return True if a block that runs module by module may end in one fused operator, relu(y + pad_shortcut(x)).

    x [N, C, H, W]: the block's input. relu, shortcut: the block's last activation and its shortcut module.
    """
    if torch.compiler.is_compiling() or type(shortcut) is not PadShortcut or type(relu) is not nn.ReLU:
        return False
    return (_unfusable_call(x) or _watched(Parts((), [relu], shortcut))) is None


def serves_global_pool(x: Tensor, avgpool: nn.Module) -> bool:
    """Return True if `avgpool(x)` is only a mean over the pixels of x [N, C, H, W], and x is channels_last."""
    whole = type(avgpool) is nn.AdaptiveAvgPool2d and avgpool.output_size in (1, (1, 1))
    alone = whole and is_bare(avgpool) and not nn_module._has_any_global_hook()
    return alone and _unfusable_call(x) is None and x.is_contiguous(memory_format=torch.channels_last)


def _watched(parts: Parts) -> str | None:
    """Return why calling the modules would run more than their class's `forward`, or which parameter is not a plain
    tensor; None if neither applies."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    roots = [*(m for pair in parts.pairs for m in pair), *parts.acts, parts.shortcut, parts.pool, *parts.idle]
    for module in (m for root in roots if root is not None for m in root.modules()):
        if has_hooks(module):
            return f"a {type(module).__name__} in it has a hook or a replaced forward"
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in (Tensor, nn.Parameter):
                return f"a {type(module).__name__} in it has a {type(parameter).__name__} as a parameter"
        frozen = type(module) is FrozenBatchNorm2d
        if frozen and (module.running_mean.requires_grad or module.running_var.requires_grad):
            return "a FrozenBatchNorm2d in it has running statistics that require a gradient"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return True if `module` has hooks of its own (global ones don't count), or a `forward` set on the instance.

    In both cases calling it runs more than, or something other than, its class's `forward`.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def pool_sizes(pool: nn.Module | None) -> tuple[int, int, int] | None:
    """Return (kernel, stride, pad) of `pool` if it is a max pool that our kernels support, else None."""
    from fastres.kernels.problem import pool_refusal

    if type(pool) is not nn.MaxPool2d or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        return None
    kernel, stride, pad = pool.kernel_size, pool.stride, pool.padding
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(pad, int)):
        return None
    return (kernel, stride, pad) if pool_refusal(kernel, stride, pad) is None else None


def is_bare(module: nn.Module) -> bool:
    """Return True if calling `module` runs only its class's `forward`: it has no hooks and isn't compiled.

    Compiled means by `module.compile()`. Global module hooks are not checked here.
    """
    return not has_hooks(module) and module._compiled_call_impl is None
