"""What of a graph the operators can take: conv-BN pairs, the pattern that they match, and why others stay."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastres.compile.graph import (
    BN_ARGUMENTS,
    CONV,
    addends,
    arguments,
    calls,
    defaults,
    is_channels_last,
    is_relu,
    module_name,
    only_user,
    storage,
    storages,
    target_name,
    value,
    written_by,
)
from fastres.ops import dispatch, ends

_CONV_ARGUMENTS = {"input": ..., "weight": ..., "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_POOL_ARGUMENTS, _PAD_ARGUMENTS = defaults(F.max_pool2d_with_indices), defaults(F.pad)
_MODE_SWITCH = "_(enter|exit)_(autocast|inference_mode)|_set_grad_enabled"
# What changes a tensor's sizes, strides or place in the autograd graph: a graph records of it what it is at the end.
_RESHAPES = "(resize|resize_as|set|as_strided|(un)?squeeze|transpose|swapaxes|swapdims|t|detach|requires_grad)_"


@dataclass(frozen=True)
class Finding:
    """One match or layer of a graph and what became of it."""

    layer: str  # its first convolution's (or other operation's) module, by name where that is known
    pattern: str
    operator: str | None  # what it was rewritten to; None: it stays
    reason: str = ""  # why it stays

    @property
    def hit(self) -> bool:
        return self.operator is not None


@dataclass(eq=False)
class Pair:
    """conv -> BN: its nodes, the tensors it reads and its static sizes."""

    conv: fx.Node
    bn: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    bn_weight: fx.Node | None
    bn_bias: fx.Node | None
    running: tuple[fx.Node | None, fx.Node | None]  # mean, var
    geometry: list[int]
    training: bool
    momentum: float
    eps: float

    @property
    def statistics(self) -> set[int | None]:
        """The memory of its running statistics."""
        return {storage(t) for t in self.running if t is not None}


@dataclass(eq=False)
class Match:
    """Pairs (a projection's last), what ends them, and all nodes that an operator replaces; `last` gives the result."""

    pairs: list[Pair]
    nodes: list[fx.Node]
    end: ends.End = field(default_factory=ends.Linear)
    residual: fx.Node | None = None
    shortcut: list[fx.Node] = field(default_factory=list)  # what may be left without users

    @property
    def first(self) -> fx.Node:
        return self.pairs[0].conv

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def x(self) -> fx.Node:
        return self.pairs[0].x

    @property
    def moves(self) -> set[int | None]:
        """The memory of the running statistics that it moves."""
        return set().union(*(pair.statistics for pair in self.pairs if pair.training))

    @property
    def trains(self) -> bool:
        """Whether batches' statistics or gradients are wanted."""
        return any(pair.training for pair in self.pairs) or value(self.last).requires_grad

    @property
    def pattern(self) -> str:
        return "-ReLU-".join(["conv-BN"] * (len(self.pairs) - self.end.projects)) + self.end.tail

    @property
    def operator(self) -> str:
        return "conv_bn_act" if self.trains else f"conv_affine_act x{len(self.pairs)}"


class PaddedSum(NamedTuple):
    """relu(y + option A's shortcut of x), the end of a block whose y no match gives."""

    y: fx.Node
    x: fx.Node
    stride: int
    shortcut: list[fx.Node]
    add: fx.Node
    relu: fx.Node


def search(
    graph: fx.Graph, example_inputs: Sequence[Any], *, always: bool
) -> tuple[list[Match], list[PaddedSum], list[Finding]]:
    """What the operators take of `graph`, and what there is to say of its layers, in the graph's order; with `always`
    on devices without kernels, too. Placeholders without an example value are given theirs of `example_inputs`."""
    for node, example in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        node.meta.setdefault("example_value", example)  # DDP's parts of a graph come without
    order = {node: at for at, node in enumerate(graph.nodes)}
    findings: dict[fx.Node, Finding] = {}

    def tell(node: fx.Node, pattern: str, operator: str | None, reason: str = "") -> None:
        findings[node] = Finding(module_name(node), pattern, operator, reason)

    pairs, normed = [], set()
    why_nothing = _why_nothing(graph)
    for bn in graph.find_nodes(op="call_function", target=F.batch_norm):
        normed.add(arguments(bn, BN_ARGUMENTS)["input"])
        pair = _pair(bn)
        if isinstance(pair, Pair):
            if reason := why_nothing or _why_unserved(value(pair.conv), always):
                tell(pair.conv, "conv-BN", None, reason)
            else:
                pairs.append(pair)
        elif pair:
            tell(bn, "conv-BN", None, pair)
        elif any(map(is_relu, bn.users)):
            tell(bn, "BN-ReLU", None, "no convolution before it: Inductor makes the same passes")
        else:
            tell(bn, "BN", None, "no convolution before it")
    matches = []
    for match in _with_ends(_open_matches(pairs)):
        if reason := _obstacle(match.nodes, match.shortcut, match.moves, order):
            tell(match.first, match.pattern, None, reason)
        else:
            matches.append(match)
    while sharing := _sharing_statistics(graph, matches):
        matches = [match for match in matches if match not in sharing]
        for match in sharing:
            tell(match.first, match.pattern, None, "its running statistics are read or written elsewhere, too")
    for match in matches:
        if isinstance(match.end, ends.Pool) and not match.trains:  # it reads what the epilogue wrote, either way
            match.nodes.pop()
            match.end = ends.Relu()
        tell(match.first, match.pattern, match.operator)
    inside = {node for match in matches for node in match.nodes}
    sums = [] if why_nothing else _padded_sums(graph, inside, order, always)
    for padded in sums:
        tell(padded.relu, "pad-add-ReLU", "pad_shortcut_add_relu")
    for node in graph.nodes:
        if calls(node, *CONV) and node not in normed:
            tell(node, "conv", None, "no BatchNorm behind it")
        if is_relu(node) and node not in inside and node not in findings and addends(node.args[0]):
            tell(node, "add-ReLU", None, "outside a match: Inductor makes the same pass")
    return matches, sums, [findings[node] for node in order if node in findings]


def _why_nothing(graph: fx.Graph) -> str | None:
    """Why nothing in the graph can be rewritten; None where there is no reason."""
    modules = (getattr(node.target, "__module__", None) or "" for node in graph.nodes if node.op == "call_function")
    transforms = ("torch._functorch", "torch._C._functorch", "torch.autograd.forward")
    if any(module.startswith(transforms) for module in modules):
        return "the graph holds a torch.func transform or forward-mode differentiation"
    for node in graph.nodes:
        if node.op.startswith("call_") and re.match(rf"({_RESHAPES}|swap_tensors)(\.|$)", target_name(node)):
            return f"{node.name} changes in place what is known of a tensor"
    return None


def _why_unserved(z: Tensor, always: bool) -> str | None:
    if z.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in {z.dtype}"
    return None if always else dispatch.why_unfused(z.dtype, z.device)


def _number(sizes: Any) -> int | None:
    """The one int of a size given as an int or for both directions; None where it isn't one."""
    values = set(sizes) if isinstance(sizes, (tuple, list)) else {sizes}
    number = values.pop()
    return number if not values and isinstance(number, int) else None


def _pair(bn: fx.Node) -> Pair | str:
    """The pair that ends with `bn`, or why there is none."""
    norm = arguments(bn, BN_ARGUMENTS)
    if not calls(norm["input"], *CONV):
        return ""
    conv = arguments(norm["input"], _CONV_ARGUMENTS)
    z, y, x, weight = map(value, (norm["input"], bn, conv["input"], conv["weight"]))
    if not all(isinstance(t, Tensor) for t in (z, y, x, weight)):
        return "its shapes are unknown"
    if len(norm["input"].users) > 1:
        return "the convolution's output is used beside the BatchNorm"
    if z.dim() != 4:
        return "the input is no batch [N, C, H, W]"
    if any(isinstance(size, int) and size == 0 for size in z.shape):
        return "the batch is empty"
    sizes = ("stride", "padding", "dilation", "groups")
    geometry = [size for size in (_number(conv[name]) for name in sizes) if size is not None]
    if len(geometry) < len(sizes):
        words = ", ".join(f"{name} {conv[name]}" for name in sizes[:3])
        return f"the convolution has {words}; served: one number for both directions"
    if z.dtype != y.dtype:
        return f"the BatchNorm turns {z.dtype} into {y.dtype}"
    training, momentum, eps = norm["training"], norm["momentum"], norm["eps"]
    if not (isinstance(training, bool) and isinstance(momentum, (int, float)) and isinstance(eps, float)):
        return "the BatchNorm's momentum or mode is computed in the graph"
    running = (norm["running_mean"], norm["running_var"])
    if not training and None in running:
        return "the BatchNorm has no running statistics"
    tensors = conv["input"], conv["weight"], conv["bias"], norm["weight"], norm["bias"]
    return Pair(norm["input"], bn, *tensors, running, geometry, training, momentum, eps)


def _share_statistics(pairs: Sequence[Pair], another: Pair) -> bool:
    """Whether one BN moves running statistics that another reads or moves: in one call the order would be lost."""
    return any((pair.training or another.training) and pair.statistics & another.statistics for pair in pairs)


def _open_matches(pairs: Sequence[Pair]) -> list[Match]:
    """Pairs with nothing but a ReLU from one to the next; what follows the last is left open."""
    matches = []
    by_result: dict[Any, Match] = {}
    for pair in pairs:
        relu, match = pair.x, None
        if is_relu(relu) and only_user(relu) is pair.conv and only_user(relu.args[0]) is relu:
            match = by_result.get(relu.args[0])
        if match is None or _share_statistics(match.pairs, pair):
            match = Match([pair], [pair.conv, pair.bn])
            matches.append(match)
        else:
            match.pairs.append(pair)
            match.nodes += [relu, pair.conv, pair.bn]
        by_result[pair.bn] = match
    return matches


def _with_ends(matches: list[Match]) -> list[Match]:
    """Each match with what follows its last BN. Of two that meet in one addition the longer takes it."""
    by_result = {match.last: match for match in matches}
    projections: set[Match] = set()
    taken: set[fx.Node] = set()  # additions
    for match in sorted(matches, key=lambda match: -len(match.pairs)):
        if match in projections:
            continue
        user = only_user(match.last)
        after = only_user(user)
        if is_relu(user):
            match.nodes.append(user)
            match.end = ends.Relu()
            if sizes := _pool_sizes(after):
                match.nodes.append(after)
                match.end = ends.Pool(*sizes)
            continue
        operands = addends(user)
        if operands is None or not is_relu(after) or operands[0] is operands[1] or user in taken:
            continue
        addend = operands[1] if operands[0] is match.last else operands[0]
        y, added, z = map(value, (user, addend, match.last))
        if not added.dtype == y.dtype == z.dtype or not added.shape == y.shape == z.shape:
            continue
        branch = by_result.get(addend) if len(addend.users) == 1 else None
        if branch is not None and (len(branch.pairs) > 1 or _share_statistics(match.pairs, branch.pairs[0])):
            branch = None
        if set(written_by(user)) - {match.last} and branch is None:
            continue
        if branch is not None and branch.x is match.x:
            match.end = ends.Project()
            match.pairs += branch.pairs
            match.nodes += branch.nodes
            projections.add(branch)
        elif addend is match.x:
            match.end = ends.Add()
        elif (padded := _padded(addend)) is not None and padded[0] is match.x and value(match.x).dtype == z.dtype:
            _, stride, match.shortcut = padded
            match.end = ends.Pad(stride)
        else:
            match.end, match.residual = ends.Join(), addend
        match.nodes += [user, after]
        taken.add(user)
    return [match for match in matches if match not in projections]


def _pool_sizes(node: Any) -> tuple[int, int, int] | None:
    """(kernel, stride, pad) of a max pool that the stem's kernel does."""
    from fastres.kernels.problem import pool_refusal

    if not calls(node, F.max_pool2d, torch.max_pool2d):
        return None
    args = arguments(node, _POOL_ARGUMENTS)
    kernel, pad = _number(args["kernel_size"]), _number(args["padding"])
    stride = kernel if args["stride"] in (None, [], ()) else _number(args["stride"])
    if None in (kernel, pad, stride) or _number(args["dilation"]) != 1 or args["ceil_mode"] or args["return_indices"]:
        return None
    return (kernel, stride, pad) if pool_refusal(kernel, stride, pad) is None else None  # type: ignore[return-value]


def _padded(node: Any) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """(x, stride, nodes) of an option-A shortcut `node`: fastres's operator, or x[:, :, ::s, ::s] padded behind."""
    if calls(node, torch.ops.fastres.pad_shortcut.default):
        return node.args[0], node.args[1], [node]
    if not calls(node, F.pad, torch._C._nn.pad):
        return None
    x, sizes, mode, fill = arguments(node, _PAD_ARGUMENTS).values()
    zero = mode == "constant" and fill in (None, 0, 0.0)
    if not (zero and isinstance(sizes, (tuple, list)) and len(sizes) == 6 and list(sizes[:5]) == [0] * 5):
        return None
    if not (isinstance(sizes[5], int) and sizes[5] >= 0 and calls(x, operator.getitem)):
        return None
    whole, index = x.args
    stride: Any = getattr(index[-1], "step", None) if isinstance(index, tuple) and index else None
    every = slice(None, None, stride)
    served = isinstance(stride, int) and isinstance(value(whole), Tensor)
    return (whole, stride, [node, x]) if served and index == (slice(None), slice(None), every, every) else None


def _padded_sums(graph: fx.Graph, inside: set[fx.Node], order: Mapping[fx.Node, int], always: bool) -> list[PaddedSum]:
    """The graph's, but for those `inside` matches."""
    sums = []
    for relu in graph.nodes:
        add = relu.args[0] if is_relu(relu) and relu not in inside else None
        operands = addends(add)
        if not isinstance(add, fx.Node) or operands is None or len(add.users) > 1:
            continue
        for y, addend in (operands, operands[::-1]):
            padded, a, b = _padded(addend), value(y), value(addend)
            if padded is None or a.shape != b.shape or a.dtype != b.dtype:
                continue
            if a.stride() != value(relu).stride():
                continue  # the operator's result is laid out as y
            x, stride, shortcut = padded
            served = always or dispatch.why_unfused(a.dtype, a.device) is None
            if served and _obstacle([add, relu], shortcut, set(), order) is None and _is_its_own(graph, add):
                sums.append(PaddedSum(y, x, stride, shortcut, add, relu))
                break
    return sums


def _is_its_own(graph: fx.Graph, add: fx.Node) -> bool:
    """Whether `add` may go although it works in place: nothing but itself and its ReLU reads the memory it writes."""
    written = written_by(add)
    alone = {*written, add, *add.users}
    return all(node.op in ("call_function", "call_method") and len(node.users) == 1 for node in written) and all(
        node in alone or storage(node) != storage(target) for target in written for node in graph.nodes
    )


def _obstacle(
    nodes: Sequence[fx.Node], shortcut: Sequence[fx.Node], moves: set[int | None], order: Mapping[fx.Node, int]
) -> str | None:
    """Why `nodes` and `shortcut` can't become one where the last of `nodes` stands, such as a write in between into
    what they read; None where they can. moves: the memory of running statistics that they move."""
    result, all_nodes = value(nodes[-1]), [*nodes, *shortcut]
    if not (result.is_contiguous() or is_channels_last(result)):
        return "its result has strides of its own"
    reads = {storage(read) for node in all_nodes for read in node.all_input_nodes if read not in nodes}
    first, *_, last = sorted(order[node] for node in all_nodes)
    for node, at in order.items():
        if not first < at < last or node in all_nodes:
            continue
        if node.op == "call_function" and re.fullmatch(_MODE_SWITCH, target_name(node)):
            return "autocast or grad mode changes within it"
        written = [storages(target) for target in written_by(node)]
        if any(memory is None or memory & reads for memory in written):
            return f"{node.name} writes into what it reads"
        if any(storage(t) in moves for t in node.all_input_nodes):
            return f"{node.name} reads running statistics that it moves"
    return None


def _sharing_statistics(graph: fx.Graph, matches: Sequence[Match]) -> list[Match]:
    """Those whose running statistics something else uses. A BatchNorm outside all matches keeps them for its backward,
    and autograd refuses that a match then moves them; where something else writes into them, eager's backward reads
    what was written."""
    inside = {node for match in matches for node in match.nodes}
    staying = [node for node in graph.nodes if node not in inside]
    read = {storage(each) for node in staying for each in node.all_input_nodes}
    written = {storage(each) for node in staying for each in written_by(node)}
    return [match for match in matches if match.moves & read or any(p.statistics & written for p in match.pairs)]
