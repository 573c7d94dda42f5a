"""Handle the memory formats of rewritten values.

fastres's operators return channels_last tensors where the traced graph may have had another memory format. Most nodes
that follow accept any format. A copy in the traced format is needed before `view` and `as_strided`, for results that
the caller gets, and for tensors that are changed in place.
"""

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
# Functions whose result does not depend on the memory format of a 4-D operand. A 4-D result may follow that format.
_ANY_FORMAT = (
    *CONV, *RELU, *ADD, operator.mul, operator.imul, torch.mul, F.batch_norm, F.max_pool2d, torch.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.silu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu,
    F.interpolate, torch.sigmoid, torch.cat, torch.mean, torch.sum, F.pad, torch._C._nn.pad,
    _fastres.pad_shortcut.default, _fastres.pad_shortcut_add_relu.default, "mul", "mul_", "sigmoid", "mean", "sum",
)  # fmt: skip


def _channels_last(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(_aten.contiguous.default, (node,), {"memory_format": torch.channels_last})


class Layout:
    """Tracks the nodes that were replaced, and the nodes whose memory format may differ from the traced one."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._replacements: dict[fx.Node, fx.Node] = {}
        self._results: set[fx.Node] = set()  # results of operators, always channels_last
        self._changed: set[fx.Node] = set()  # nodes whose memory format may differ from the traced one
        self._casts: dict[fx.Node, tuple[fx.Node, torch.dtype]] = {}  # cast -> (an operator's result, its dtype)

    def current(self, node: fx.Node) -> fx.Node:
        """Return the replacement of `node`, or `node` itself if it was not replaced."""
        return self._replacements.get(node, node)

    def operand(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Return `node` in `dtype` and channels_last, inserting a cast or a copy if needed."""
        node = operand = self.current(node)
        if value(node).dtype != dtype:
            operand = self._graph.call_function(_aten.to.dtype, (node, dtype))
        if node in self._results or (node is operand and is_channels_last(value(node))):
            return operand
        return _channels_last(self._graph, operand)

    def replace(self, node: fx.Node, result: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        """Replace all uses of `node` by `result`, or by its cast if `node` has another dtype; return the replacement.

        It inherits the metadata of `node` (its traced value). dtype: that of `result`, if it may be another.
        """
        if dtype is not None and dtype != value(node).dtype:
            cast = self._graph.call_function(_aten.to.dtype, (result, value(node).dtype))
            self._casts[cast] = result, dtype
            result = cast
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self._replacements[node] = result
        return result

    def gives_channels_last(self, result: fx.Node) -> None:
        """Register `result` as an operator's output, which is channels_last in any case."""
        self._results.add(result)
        _, c, h, w = value(result).shape
        # Compare strides: a tensor with one channel or one pixel has both memory formats, but not both strides.
        if value(result).stride() != (h * w * c, 1, w * c, c):
            self._changed.add(result)

    def restore_where_it_matters(self) -> None:
        """Insert copies in the traced memory format before all nodes that may depend on it.

        As long as nothing writes into a value, its readers can't distinguish it from a copy, so only the dependent
        readers get one. If something does write into the value, or if two results of the graph share its memory, either
        all readers must use the copy or none.
        """
        memory = Memory(self._graph)
        for cast in self._casts:
            if not memory.is_observed(cast):
                self._undo(cast)
        for node in list(self._graph.nodes):
            if node in self._changed:
                self._restore(node, memory.is_observed(node))

    def _undo(self, cast: fx.Node) -> None:
        """Let operators that cast `cast` back read the result itself, and erase `cast` if nothing else reads it."""
        result, dtype = self._casts[cast]
        for user in list(cast.users):
            if _is_put_in(user) and user.args[1] == dtype:
                user.replace_all_uses_with(result)
                self._graph.erase_node(user)
        if not cast.users:
            self._changed.discard(cast)
            self._graph.erase_node(cast)

    def _restore(self, root: fx.Node, observed: bool) -> None:
        """Insert a copy after `root`, a result whose format changed, if a reader depends on the traced format.

        observed: whether it matters which nodes share the memory of `root` (`Memory.is_observed`).
        """
        names, followers = [root], []  # names: all nodes that share the memory of `root`
        dependents: dict[fx.Node, fx.Node] = {}  # dependent node -> the name that it reads
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
        with self._graph.inserting_after(root):  # not `contiguous`: it keeps the strides of a single channel or pixel
            copy = self._graph.call_function(_aten.clone.default, (root,), {"memory_format": torch.contiguous_format})
        copy.meta = dict(root.meta)
        for user in readers:
            operand = copy
            # An operator gets the same values in channels_last, the format it works in.
            if calls(user, *_OPERATORS) or _is_put_in(user):
                with self._graph.inserting_before(user):
                    operand = _channels_last(self._graph, copy)
            user.replace_input_with(root, operand)


def _is_put_in(user: fx.Node) -> bool:
    """Return whether `user` is a cast or copy of an operand that `Layout.operand` has inserted."""
    return "example_value" not in user.meta and calls(user, _aten.contiguous.default, _aten.to.dtype)


def _reading(user: fx.Node, root: fx.Node, observed: bool) -> str:
    """Return how `user` reacts to a value in the memory of `root`, whose memory format differs from the traced one.

    - "names": its result shares the memory of `root` and is correct in any format.
    - "follows": its result is a new tensor that may follow the new format.
    - "ends": its result is the same in either format.
    - "depends": anything else, or unknown.
    """
    result = value(user)
    if _is_put_in(user) or calls(user, *_OPERATORS):
        return "ends"  # an operator returns channels_last for any input; inserted casts and copies only feed operators
    if calls(user, getattr, "size", "dim"):
        return "depends" if isinstance(result, Tensor) else "ends"
    if not isinstance(result, Tensor) or isinstance(user.kwargs.get("out"), fx.Node):
        return "depends"
    shares = storage(user) == storage(root)
    if calls(user, torch.flatten, "flatten", "reshape"):
        whole = result.dim() == 2 and result.shape[0] == value(root).shape[0]  # [N, C H W]: the order is always NCHW
        return "ends" if whole and not (shares and observed) else "depends"
    if calls(user, operator.getitem):
        return "names" if result.dim() == 4 and shares else "depends"
    idle = calls(user, F.dropout) and (argument(user, "training") is False or argument(user, "p") == 0)
    if not (idle or calls(user, *_ANY_FORMAT)):
        return "depends"  # also an active dropout: its random mask follows the order in memory
    if shares:
        return "names"
    if any(storage(user) == storage(node) for node in written_by(user)):
        return "ends"  # it writes into other memory, whose format does not change
    if calls(user, torch.mean, torch.sum, "mean", "sum"):
        return "ends"  # reductions return contiguous results
    return "follows" if result.dim() == 4 and result.is_contiguous() else "depends"
