"""May this call run fused? `serves` answers for a block or the stem, `serves_stages` for stages, `why_plain` in words.

The fused path takes a call only where it means the same as the modules called one by one: exactly the modules that each
role wants, no hook, no tracing, a plain tensor that the weights fit. Whether kernels exist for its dtype and device is
`dispatch`'s answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from fastres.ops import dispatch
from fastres.ops.shortcut import PadShortcut, is_traced


class Parts(NamedTuple):
    """The modules of one fusable call, by the role they play in it.

    Roles matter: users replace submodules (`maxpool = nn.Identity()`, a conv by two of lower rank), and the fused path
    may only take what means the same.
    """

    pairs: Sequence[tuple[nn.Module, nn.Module]]  # (conv, norm) in order
    acts: Sequence[nn.Module]  # where ReLU stands
    shortcut: nn.Module | None = None  # None: identity
    pool: nn.Module | None = None  # the stem's
    idle: Sequence[nn.Module | None] = ()  # optional layers that must be absent or nn.Identity


def serves(x: Tensor, parts: Parts) -> bool:
    """True where the fused path takes the call that `parts` would otherwise do one by one on x [N, C, H, W]."""
    if torch.compiler.is_compiling():  # Dynamo folds this: no guard, no graph break
        return False
    return why_plain(x, parts) is None


def why_plain(x: Tensor, parts: Parts) -> str | None:
    """The reason, in words, why `parts` run one by one on x; None where the fused path takes the call."""
    if (reason := _unfusable_call(x)) is not None:
        return reason
    dtype = dispatch.compute_dtype(x)
    reason = dispatch.why_unfused(dtype, x.device) or foreign(parts) or _watched(parts)
    if reason is not None:
        return reason
    device, own, channels = _wanted(parts)  # what the modules themselves refuse in PyTorch's own words
    if x.device != device:
        return f"the input is on {x.device}, the weights are on {device}"
    if dtype != own:
        return f"the input is {x.dtype}, the weights are {parts.pairs[0][0].weight.dtype}"
    return None if x.shape[1] == channels else f"the input has {x.shape[1]} channels, not {channels}"


def runs_stages() -> bool:
    """True where a fusion across the blocks of a stage may be in force: then ask `serves_stages`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    return dispatch.fuses_blocks()


def serves_stages(x: Tensor, stages: Sequence[Sequence[Any]]) -> int:
    """How many of `stages`, lists of blocks, counted from the first, `block.stages` may run one after the other on x. 0
    where no backward pass follows.

    Only blocks whose `forward` is this package's: a subclass with its own may do anything.
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
    """True where a backward pass through `modules`, run on x, has anything to do."""
    return x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())


def _is_ours(block: nn.Module) -> bool:
    return type(block).forward.__module__.startswith(f"{__package__.partition('.')[0]}.") and hasattr(block, "parts")


def foreign(parts: Parts) -> str | None:
    """The reason why no call of `parts` can run fused: one of them isn't exactly what its role wants. Else None."""
    wanted: list[tuple[nn.Module, tuple[type[nn.Module], ...]]] = []
    for conv, norm in parts.pairs:
        wanted += [(conv, (nn.Conv2d,)), (norm, (nn.BatchNorm2d,))]
    wanted += [(act, (nn.ReLU,)) for act in parts.acts]
    wanted += [(layer, (nn.Identity,)) for layer in parts.idle if layer is not None]
    if parts.pool is not None:
        wanted.append((parts.pool, (nn.MaxPool2d,)))
    for module, kinds in wanted:
        if type(module) not in kinds:
            return f"it contains {type(module).__name__} where {' or '.join(kind.__name__ for kind in kinds)} is served"
        if isinstance(module, nn.Conv2d) and (reason := _foreign_conv(module)):
            return reason
    return None if parts.shortcut is None else _foreign_shortcut(parts.shortcut)


def _foreign_shortcut(shortcut: nn.Module) -> str | None:
    if type(shortcut) is PadShortcut:
        return None
    modules: list[Any] = list(shortcut) if type(shortcut) is nn.Sequential else [shortcut]
    if [type(module) for module in modules] != [nn.Conv2d, nn.BatchNorm2d]:
        return f"its shortcut is {[type(module).__name__ for module in modules]}, not a Conv2d and a BatchNorm2d"
    return _foreign_conv(modules[0])


def _foreign_conv(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its convolution pads {conv.padding!r} with {conv.padding_mode!r}"
    if conv.bias is not None:
        return "its convolution has a bias before the BatchNorm"
    for name in ("stride", "padding", "dilation"):
        if len(set(getattr(conv, name))) > 1:
            return f"its convolution has {name} {getattr(conv, name)}"
    return None


def _wanted(parts: Parts) -> tuple[Any, ...]:
    """The device, compute dtype and channels that the first convolution wants of its input."""
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
    """True where a block that runs module by module ends in one pass, relu(y + pad_shortcut(x))."""
    if torch.compiler.is_compiling() or type(shortcut) is not PadShortcut or type(relu) is not nn.ReLU:
        return False
    return (_unfusable_call(x) or _watched(Parts((), [relu], shortcut))) is None


def serves_global_pool(x: Tensor, avgpool: nn.Module) -> bool:
    """True where a mean over the pixels of a channels_last x is all that calling `avgpool` does."""
    whole = type(avgpool) is nn.AdaptiveAvgPool2d and avgpool.output_size in (1, (1, 1))
    alone = whole and is_bare(avgpool) and not nn_module._has_any_global_hook()
    return alone and _unfusable_call(x) is None and x.is_contiguous(memory_format=torch.channels_last)


def _watched(parts: Parts) -> str | None:
    """Why calling the modules would do more than their class's `forward`, or on other than plain parameters."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    roots = [*(m for pair in parts.pairs for m in pair), *parts.acts, parts.shortcut, parts.pool, *parts.idle]
    for module in (m for root in roots if root is not None for m in root.modules()):
        if has_hooks(module):
            return f"a {type(module).__name__} in it carries a hook or a forward of its own"
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in (Tensor, nn.Parameter):
                return f"a {type(module).__name__} in it has a {type(parameter).__name__} as a parameter"
    return None


def has_hooks(module: nn.Module) -> bool:
    """True if calling `module` would run anything besides its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def pool_sizes(pool: nn.Module | None) -> tuple[int, int, int] | None:
    """(kernel, stride, pad) of a max pool that a kernel serves; None for any other module."""
    from fastres.kernels.problem import pool_refusal

    if type(pool) is not nn.MaxPool2d or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        return None
    kernel, stride, pad = pool.kernel_size, pool.stride, pool.padding
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(pad, int)):
        return None
    return (kernel, stride, pad) if pool_refusal(kernel, stride, pad) is None else None


def is_bare(module: nn.Module) -> bool:
    """True if calling `module` runs its class's `forward` and that alone, not compiled by `module.compile()`."""
    return not has_hooks(module) and module._compiled_call_impl is None
