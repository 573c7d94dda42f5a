"""Find the BatchNorms of a graph: calls of `batch_norm`, and frozen ones, which are written out in arithmetic.

A frozen BatchNorm of torchvision, timm, Detectron2 or DETR is, with each vector viewed as [1, C, 1, 1],

    scale = weight * (running_var + eps).rsqrt()
    y = x * scale + (bias - running_mean * scale)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastres.compile.graph import ADD, BN_ARGUMENTS, arguments, calls, constant, operands, storage, value, written_by
from fastres.ops.layout import wide

_ADD, _SUB = (operator.add, torch.add, "add"), (operator.sub, torch.sub, "sub")
_MUL, _MUL_IN_PLACE = (operator.mul, torch.mul, "mul"), (operator.imul, "mul_")
_RSQRT = (torch.rsqrt, "rsqrt")
_VIEWS = (torch.reshape, torch.unsqueeze, "reshape", "view", "unsqueeze", "to", "float")


@dataclass(eq=False)
class Norm:
    """A BatchNorm: the nodes that it reads, its constants, and the nodes that compute it."""

    input: Any
    running: tuple[fx.Node | None, fx.Node | None]  # mean, var
    weight: fx.Node | None
    bias: fx.Node | None
    training: Any
    momentum: Any
    eps: Any
    nodes: list[fx.Node]  # from the first that reads the input to the output
    vectors: list[fx.Node] = field(default_factory=list)  # those that compute a frozen one's scale and shift

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def frozen(self) -> bool:
        return bool(self.vectors)

    @property
    def statistics(self) -> set[int | None]:
        """The storages of the running statistics."""
        return {storage(t) for t in self.running if t is not None}

    @property
    def fixed(self) -> set[int | None]:
        """The storages that nothing may write into, before or after the BatchNorm.

        Autograd raises an error if weight or bias of `batch_norm` change before backward. It raises none for a frozen
        BatchNorm, which reads them only once, to compute scale and shift.
        """
        return self.statistics | ({storage(self.weight), storage(self.bias)} if self.frozen else set())


def norms(graph: fx.Graph) -> Iterator[Norm]:
    """Yield the BatchNorms of `graph` in its order."""
    for node in graph.nodes:
        if calls(node, F.batch_norm):
            x, mean, var, weight, bias, training, momentum, eps = arguments(node, BN_ARGUMENTS).values()
            yield Norm(x, (mean, var), weight, bias, training, constant(momentum), constant(eps), [node])
        elif (norm := _frozen(node)) is not None:
            yield norm


def why_unlike(norm: Norm, z: Tensor) -> str | None:
    """Return why a frozen BatchNorm of a convolution's output z can't run as a BatchNorm in eval mode; else None."""
    vectors = [value(t) for t in (*norm.running, norm.weight, norm.bias)]
    if any(len(node.users) > 1 for node in norm.nodes[:-1]):
        return "a value inside the frozen BatchNorm has other readers"
    if not all(t.dim() == 1 and t.is_contiguous() for t in vectors):
        return "the frozen BatchNorm's parameters and statistics are not contiguous vectors [C]"
    if {t.dtype for t in vectors} not in ({z.dtype}, {wide(z.dtype)}):
        return f"the frozen BatchNorm computes in {value(norm.vectors[0]).dtype}, the convolution in {z.dtype}"
    if value(norm.output).requires_grad and any(value(t).requires_grad for t in norm.running):
        return "the frozen BatchNorm's running statistics require gradients"
    return None


def _frozen(output: fx.Node) -> Norm | None:
    """Return the frozen BatchNorm whose last node is `output`; None if `output` is anything else."""
    for product, shift in _orders(operands(output, *ADD)):
        for x, scale in _orders(operands(product, *_MUL, *_MUL_IN_PLACE)):
            if value(x).dim() != 4 or not all(_is_per_channel(t, value(x).shape[1]) for t in (scale, shift)):
                continue
            parts = _parts(scale, shift)
            if parts is None or {*written_by(product), *written_by(output)} - {x, product}:
                continue
            *leaves, eps = parts
            vectors = _between([scale, shift], leaves)
            # An operation on vectors broadcasts nothing if its result has C elements like its operands.
            if all(value(node).numel() == value(scale).numel() for node in (*leaves, *vectors)):
                mean, var, weight, bias = leaves
                return Norm(x, (mean, var), weight, bias, False, 0.0, eps, [product, output], vectors)
    return None


def _parts(scale: fx.Node, shift: fx.Node) -> tuple[Any, ...] | None:
    """Return (running mean, running variance, weight, bias, eps) of a frozen BatchNorm with `scale` and `shift`.

    None if they are computed in another way.
    """
    scale = _unviewed(scale)
    bias, product = operands(_unviewed(shift), *_SUB) or (None, None)
    for mean, factor in _orders(operands(_unviewed(product), *_MUL)):
        for weight, rstd in _orders(operands(scale, *_MUL)):
            var, eps = _shifted(_unviewed(rstd))
            if _unviewed(factor) is scale and var is not None:
                return *map(_unviewed, (mean, var, weight, bias)), eps
    return None


def _shifted(rstd: fx.Node) -> tuple[fx.Node | None, float]:
    """Return (var, eps) if `rstd` is the reciprocal square root of var + eps; else (None, 0.0)."""
    if calls(rstd, *_RSQRT) and len(rstd.args) == 1 and not rstd.kwargs:
        total = _unviewed(rstd.args[0])
        if calls(total, *_ADD) and len(total.args) == 2 and not total.kwargs:
            for var, eps in _orders(total.args):
                if isinstance(value(var), Tensor) and isinstance(eps := constant(eps), float):
                    return var, eps
    return None, 0.0


def _orders(two: Any) -> list[Any]:
    """Return both orders of two operands; none if there are no operands."""
    return [] if two is None else [two, two[::-1]]


def _is_per_channel(node: fx.Node, channels: Any) -> bool:
    """Return whether the tensor of `node` is [C, 1, 1] or [1, C, 1, 1] with C = channels, no size of them symbolic."""
    shape = tuple(value(node).shape)
    fixed = all(isinstance(size, int) for size in (channels, *shape))  # comparing a symbolic size would fix it
    return fixed and shape in ((channels, 1, 1), (1, channels, 1, 1))


def _seen(node: Any) -> Any:
    """Return the tensor whose values `node` only shows in another shape, in the same order; None if it does more.

    A cast is a view in this sense if it changes nothing.
    """
    whole = calls(node, *_VIEWS)
    if calls(node, operator.getitem):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = all(each is None or each is ... or each == slice(None) for each in index)
    seen = next(iter(node.args), None) if whole else None
    a, b = value(node), value(seen)
    known = isinstance(a, Tensor) and isinstance(b, Tensor)
    return seen if known and (a.dtype, a.device) == (b.dtype, b.device) else None


def _unviewed(node: Any) -> Any:
    """Return the tensor that `node` shows through any number of views; `node` itself if it is no view."""
    while (seen := _seen(node)) is not None:
        node = seen
    return node


def _between(roots: Sequence[fx.Node], leaves: Sequence[fx.Node]) -> list[fx.Node]:
    """Return `roots` and the tensors that they are computed from, up to `leaves`, which are not included."""
    nodes = list(dict.fromkeys(roots))
    for node in nodes:
        inputs = node.all_input_nodes if _seen(node) is None else [_seen(node)]
        nodes += [each for each in inputs if isinstance(value(each), Tensor) and each not in (*leaves, *nodes)]
    return nodes
