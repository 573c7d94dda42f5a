"""Which implementation runs. The only place that decides it.

`serves` answers a block's or the stem's question "does the fused path take this call?"; `why_plain` answers the same
question in words. `backend` forces one implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

BACKENDS = {
    "auto": "the fastest implementation known for each call",
    "reference": "plain PyTorch, functional, through the same entry points as the fused kernels",
}

# What the fused path understands; anything else (a foreign norm layer, a parametrised conv, SyncBatchNorm) is run by
# its own `forward`.
_KNOWN = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Sequential)

_forced: ContextVar[str] = ContextVar("fastres_backend", default="auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every fusable call runs on the implementation `name`, a key of `BACKENDS`.

    Holds for the current thread (or async task) only. Raises ValueError for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(map(repr, BACKENDS))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def serves(x: Tensor, *modules: nn.Module) -> bool:
    """True where the fused path takes the call that `modules` would otherwise do one by one on x [N, C, H, W]."""
    if torch.compiler.is_compiling():  # Dynamo folds this: no guard, no graph break
        return False
    return why_plain(x, *modules) is None


def why_plain(x: Tensor, *modules: nn.Module) -> str | None:
    """The reason, in words, why these modules run one by one on x; None where the fused path takes the call."""
    if _forced.get() == "auto":
        return "no fused kernel for this device"
    return _unfusable_call(x) or _unfusable_modules(*modules)


def _unfusable_call(x: Tensor) -> str | None:
    if isinstance(x, fx.Proxy) or torch.jit.is_tracing():
        return "the net is being traced"
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is active"
    return None


def _unfusable_modules(*modules: nn.Module) -> str | None:
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    for module in (m for root in modules for m in root.modules()):
        kind = type(module).__name__
        if has_hooks(module):
            return f"a {kind} in it carries a hook"
        if type(module) not in _KNOWN:
            return f"it contains a {kind}"
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"its convolution pads with {module.padding_mode!r}, not zeros"
    return None


def has_hooks(module: nn.Module) -> bool:
    """True if calling `module` would run anything besides its `forward`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
