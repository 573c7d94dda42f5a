"""Memory formats. The operators give channels_last where the graph was traced with another: harmless to most of what
follows, but not to `view`, to `as_strided`, to the caller of the model, or to what is changed in place."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastres.compile.graph import ADD, CONV, RELU, Memory, argument, calls, is_channels_last, storage, value, written_by
from fastres.ops.operators import conv_affine_act, conv_bn_act

_aten = torch.ops.aten
_fastres = torch.ops.fastres
_OPERATORS = (conv_bn_act, conv_affine_act)
# What means the same in any memory format of a 4-D operand. Its 4-D result follows that format or may.
_ANY_FORMAT = (
    *CONV, *RELU, *ADD, operator.mul, operator.imul, torch.mul, F.batch_norm, F.max_pool2d, torch.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.silu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu,
    F.interpolate, torch.sigmoid, torch.cat, torch.mean, torch.sum, F.pad, torch._C._nn.pad,
    _fastres.pad_shortcut.default, _fastres.pad_shortcut_add_relu.default, "mul", "mul_", "sigmoid", "mean", "sum",
)  # fmt: skip


def _channels_last(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(_aten.contiguous.default, (node,), {"memory_format": torch.channels_last})


class Layout:
    """What replaced which node of a graph, and which nodes are channels_last where they were not when it was traced."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._replacements: dict[fx.Node, fx.Node] = {}
        self._results: set[fx.Node] = set()  # of operators that give channels_last
        self._changed: set[fx.Node] = set()

    def current(self, node: fx.Node) -> fx.Node:
        """`node`, or what stands in its place."""
        return self._replacements.get(node, node)

    def operand(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype` and channels_last: at most one copy, kept for backward."""
        node = self.current(node)
        if value(node).dtype != dtype:
            node = self._graph.call_function(_aten.to.dtype, (node, dtype))
        elif node in self._results or is_channels_last(value(node)):
            return node
        return _channels_last(self._graph, node)

    def replace(self, node: fx.Node, result: fx.Node) -> None:
        """`result` instead of `node`, with the value that was traced."""
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self._replacements[node] = result

    def gives_channels_last(self, result: fx.Node) -> None:
        self._results.add(result)
        _, c, h, w = value(result).shape
        if value(result).stride() != (
            h * w * c,
            1,
            w * c,
            c,
        ):  # one channel or pixel has both formats, but not both strides
            self._changed.add(result)

    def restore_where_it_matters(self) -> None:
        """Give the traced layout back to whatever might depend on it.

        What gives it back is a copy. While nothing writes into a value, a copy and the value are the same to all who
        read them. Where something does, or where two results share its memory, all readers must have the one or all
        the other.
        """
        memory = Memory(self._graph)
        for node in list(self._graph.nodes):
            if node in self._changed:
                self._restore(node, memory.is_observed(node))

    def _restore(self, root: fx.Node, observed: bool) -> None:
        """`root`: the first name of its memory. observed: whether it matters who shares that memory."""
        names, followers = [root], []
        dependents: dict[fx.Node, fx.Node] = {}  # each with the name that it reads
        for name in names:
            for user in name.users:
                reading = "ends" if user in self._results else _reading(user, root, observed)
                if reading == "depends":
                    dependents[user] = name
                elif reading == "names" and user not in names:
                    names.append(user)
                elif reading == "follows":
                    followers.append(user)
        all_or_none = observed or any(name is not root for name in dependents.values())
        if not dependents or not all_or_none:
            self._changed.update(followers)
        if not dependents:
            return
        readers = list(root.users if all_or_none else dependents)
        with self._graph.inserting_after(root):  # `contiguous` would leave what one channel or pixel has for strides
            copy = self._graph.call_function(_aten.clone.default, (root,), {"memory_format": torch.contiguous_format})
        copy.meta = dict(root.meta)
        for user in readers:
            operand = copy
            if calls(user, *_OPERATORS):  # reads what it read, in the format it works in
                with self._graph.inserting_before(user):
                    operand = _channels_last(self._graph, copy)
            user.replace_input_with(root, operand)


def _reading(user: fx.Node, root: fx.Node, observed: bool) -> str:
    """How `user` takes a value of `root`'s memory, which has another memory format than the graph was traced with:

    "names": gives the same memory another name, whatever the format; "follows": gives new memory, whose format may
    differ too; "ends": gives what is the same either way; "depends": anything else, and what isn't known.
    """
    result = value(user)
    put_in = "example_value" not in user.meta and calls(user, _aten.contiguous.default, _aten.to.dtype)
    if put_in or calls(user, *_OPERATORS):
        return "ends"  # the operators, and what prepares for them, give channels_last from any format
    if calls(user, getattr, "size", "dim"):
        return "depends" if isinstance(result, Tensor) else "ends"
    if not isinstance(result, Tensor) or isinstance(user.kwargs.get("out"), fx.Node):
        return "depends"
    shares = storage(user) == storage(root)
    if calls(user, torch.flatten, "flatten", "reshape"):
        whole = result.dim() == 2 and result.shape[0] == value(root).shape[0]  # [N, C H W]: rows in the traced order
        return "ends" if whole and not (shares and observed) else "depends"
    if calls(user, operator.getitem):
        return "names" if result.dim() == 4 and shares else "depends"
    idle = calls(user, F.dropout) and (argument(user, "training") is False or argument(user, "p") == 0)
    if not (idle or calls(user, *_ANY_FORMAT)):
        return "depends"  # a dropout at work as well: chance goes by the order in memory
    if shares:
        return "names"
    if any(storage(user) == storage(node) for node in written_by(user)):
        return "ends"  # written into other memory, whose format stays
    if calls(user, torch.mean, torch.sum, "mean", "sum"):
        return "ends"  # reductions give contiguous results
    return "follows" if result.dim() == 4 and result.is_contiguous() else "depends"
