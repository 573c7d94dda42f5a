"""Helpers for tests of the compile backend: small nets, their rewritten graphs, and a comparison with eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from cases import relative_error
from timm.layers import FrozenBatchNormAct2d
from tolerances import EXACT
from torch import Tensor, fx, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from fastres.compile import Finding
from fastres.compile.rewrite import rewrite_graph

ALWAYS = {"fastres.rewrite": "always", "fastres.inner": "aot_eager"}


def conv_bn(c: int, k: int, side: int = 3, stride: int = 1, norm: Any = nn.BatchNorm2d, **kwargs: Any) -> nn.Sequential:
    conv = nn.Conv2d(c, k, side, stride, side // 2, bias=kwargs.pop("bias", False), **kwargs)
    bn = norm(k)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return nn.Sequential(conv, bn)


def tiny(block: type[nn.Module] = BasicBlock, net: Any = torchvision.models.ResNet, **kwargs: Any) -> nn.Module:
    return net(block, [2, 1, 1, 1], num_classes=5, **kwargs)


def drawn(model: nn.Module) -> nn.Module:
    """Draw the parameters and statistics of all frozen BatchNorms of `model`, and return it."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d):
            for name, low, high in (("weight", 0.5, 1.2), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3)):
                nn.init.uniform_(getattr(module, name), low, high)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def pairs_in(findings: Sequence[Finding]) -> int:
    """Return how many convolutions are inside the matches of `findings`."""
    hits = [finding.pattern for finding in findings if finding.hit]
    return sum(pattern.count("conv-BN") + ("project" in pattern) for pattern in hits)


class Case(nn.Module):
    """A module with a few conv-BN pairs and a `body(x, *pairs)` that uses them."""

    def __init__(self, body: Callable[..., Tensor], *pairs: nn.Module) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(pairs)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, *self.pairs)


def rewritten(
    module: nn.Module, *inputs: Tensor, always: bool = True, dynamic: bool | None = None
) -> tuple[fx.Graph, list[Finding]]:
    kept: list[Any] = []

    def record(gm: fx.GraphModule, examples: list[Any]) -> Any:
        run = fx.GraphModule(gm, copy.deepcopy(gm.graph)).forward
        kept.append((gm.graph, rewrite_graph(gm, examples, always=always)))
        return run

    torch.compile(copy.deepcopy(module), backend=record, fullgraph=True, dynamic=dynamic)(*inputs)
    return kept[0]


def outcome(model: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> dict[str, Any]:
    """Return the output, gradients and buffers after one forward and backward of `module`, by name.

    model: the module itself, or a compiled form of it.
    """
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    y = model(*inputs)
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape))
    grads = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": inputs[0].grad, **grads, **dict(module.named_buffers())}


def check(
    module: nn.Module,
    *inputs: Tensor,
    train: bool = True,
    tolerance: float = EXACT,
    options: Any = ALWAYS,
    zero: Sequence[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """Assert that compiling does not change the module's results, gradients and buffers; return the compiled copy.

    Values may differ by `tolerance`, relative to the largest; strides and dtypes must be equal. zero: names of
    gradients that are exactly zero in the compiled module and only rounding error in eager mode.
    """
    module.train(train)
    twin = copy.deepcopy(module)
    want = outcome(module, module, *inputs)
    got = outcome(torch.compile(twin, backend="fastres", options=options, **kwargs), twin, *inputs)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        if name in zero:
            assert torch.equal(got[name], torch.zeros_like(value)), name
            assert value.abs().max() < tolerance, name
        else:
            assert relative_error(got[name].double(), value.double()) < tolerance, name
        assert got[name].stride() == value.stride(), name
        assert got[name].dtype == value.dtype, name
    return twin
