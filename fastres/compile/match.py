"""Find the parts of a graph that fastres's operators can replace, and the reasons why other layers stay.

A pair is a convolution and its BatchNorm. A match is one or more pairs in a row with what follows the last of them.
"""

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
from fastres.compile.norms import Norm, norms, why_unlike
from fastres.ops import dispatch, ends

_CONV_ARGUMENTS = {"input": ..., "weight": ..., "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_POOL_ARGUMENTS, _PAD_ARGUMENTS = defaults(F.max_pool2d_with_indices), defaults(F.pad)
_MODE_SWITCH = "_(enter|exit)_(autocast|inference_mode)|_set_grad_enabled"
# In-place changes of a tensor's sizes, strides or autograd state. Its traced value shows only the state after them.
_RESHAPES = "(resize|resize_as|set|as_strided|(un)?squeeze|transpose|swapaxes|swapdims|t|detach|requires_grad)_"


@dataclass(frozen=True)
class Finding:
    """One match or layer of a graph, and whether it is rewritten."""

    layer: str  # path of the module of its first convolution (or other operation); else the node's name
    pattern: str  # for example "conv-BN-ReLU"
    operator: str | None  # the operator that replaces it; None if it stays as it is
    reason: str = ""  # why it stays as it is

    @property
    def hit(self) -> bool:
        return self.operator is not None


@dataclass(eq=False)
class Pair:
    """conv -> BN: the convolution, the tensors that it reads, its sizes, and the BatchNorm."""

    conv: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    geometry: list[int]  # stride, padding, dilation, groups
    norm: Norm

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.conv, *self.norm.nodes]


@dataclass(eq=False)
class Match:
    """Nodes that operators replace: pairs in a row and their end, that is, what follows the last BatchNorm.

    Ends are a ReLU, an addition with a ReLU, a ReLU with a max pool, or nothing (`fastres.ops.ends`).
    """

    pairs: list[Pair]  # in order; a projection's pair is the last
    nodes: list[fx.Node]  # all nodes that are replaced; the last one produces the result
    end: ends.End = field(default_factory=ends.Linear)
    residual: fx.Node | None = None  # for `ends.Join`: the other addend
    shortcut: list[fx.Node] = field(default_factory=list)  # option A's nodes

    @property
    def aside(self) -> list[fx.Node]:
        """The nodes of option A and of frozen BatchNorms' vectors. They are erased if nothing else reads them."""
        return [*self.shortcut, *(node for pair in self.pairs for node in pair.norm.vectors)]

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
        """The storages of the running statistics that the match updates."""
        return set().union(*(pair.norm.statistics for pair in self.pairs if pair.norm.training))

    @property
    def trains(self) -> bool:
        """Whether it uses batch statistics or needs gradients."""
        return any(pair.norm.training for pair in self.pairs) or value(self.last).requires_grad

    @property
    def pattern(self) -> str:
        return "-ReLU-".join(["conv-BN"] * (len(self.pairs) - self.end.projects)) + self.end.tail

    @property
    def operator(self) -> str:
        return "conv_bn_act" if self.trains else f"conv_affine_act x{len(self.pairs)}"


class PaddedSum(NamedTuple):
    """relu(y + option A's shortcut of x), whose ReLU is in no match. y may be any tensor, also a match's result."""

    y: fx.Node
    x: fx.Node
    stride: int
    shortcut: list[fx.Node]
    add: fx.Node
    relu: fx.Node


def search(
    graph: fx.Graph, example_inputs: Sequence[Any], *, always: bool
) -> tuple[list[Match], list[PaddedSum], list[Finding]]:
    """Return (matches, padded sums, findings): all that operators can replace in `graph`, and what to report.

    There is a finding for each match and padded sum, and for each convolution, BatchNorm or add-ReLU outside them, in
    graph order. always: also match on devices without kernels. Placeholders without an example value get theirs from
    `example_inputs`.
    """
    for node, example in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        node.meta.setdefault("example_value", example)  # missing in the parts of a graph that DDP has split
    order = {node: at for at, node in enumerate(graph.nodes)}
    findings: dict[fx.Node, Finding] = {}

    def tell(node: fx.Node, pattern: str, operator: str | None, reason: str = "") -> None:
        findings[node] = Finding(module_name(node), pattern, operator, reason)

    pairs, normed, outputs = [], set(), set()
    why_nothing = _why_nothing(graph)
    for norm in norms(graph):
        normed.add(norm.input)
        outputs.add(norm.output)
        pair = _pair(norm)
        if isinstance(pair, Pair):
            if reason := why_nothing or _why_unserved(value(pair.conv), always):
                tell(pair.conv, "conv-BN", None, reason)
            else:
                pairs.append(pair)
        elif pair:
            tell(norm.output, "conv-BN", None, pair)
        elif any(map(is_relu, norm.output.users)):
            tell(norm.output, "BN-ReLU", None, "no convolution before it: Inductor makes the same passes over memory")
        else:
            tell(norm.output, "BN", None, "no convolution before it")
    matches = []
    for match in _with_ends(_open_matches(pairs)):
        if reason := _obstacle(match.nodes, match.aside, match.moves, order):
            tell(match.first, match.pattern, None, reason)
        else:
            matches.append(match)
    while sharing := _sharing_statistics(graph, matches):
        matches = [match for match in matches if match not in sharing]
        for match in sharing:
            reason = "its running statistics or frozen parameters are also read or written elsewhere"
            tell(match.first, match.pattern, None, reason)
    for match in matches:
        # In inference the pool is a pass over the epilogue's output in any case, so it stays a node.
        if isinstance(match.end, ends.Pool) and not match.trains:
            match.nodes.pop()
            match.end = ends.Relu()
        tell(match.first, match.pattern, match.operator)
    inside = {node for match in matches for node in match.nodes}
    sums = [] if why_nothing else _padded_sums(graph, inside, order, always)
    for padded in sums:
        tell(padded.relu, "pad-add-ReLU", "pad_shortcut_add_relu")
    for node in graph.nodes:
        if calls(node, *CONV) and node not in normed:
            tell(node, "conv", None, "no BatchNorm after it")
        after_sum = is_relu(node) and addends(node.args[0]) and node.args[0] not in outputs
        if after_sum and node not in inside and node not in findings:
            tell(node, "add-ReLU", None, "outside a match: Inductor makes the same pass over memory")
    return matches, sums, [findings[node] for node in order if node in findings]


def _why_nothing(graph: fx.Graph) -> str | None:
    """Return why nothing in the graph may be rewritten; None if there is no such reason."""
    modules = (getattr(node.target, "__module__", None) or "" for node in graph.nodes if node.op == "call_function")
    transforms = ("torch._functorch", "torch._C._functorch", "torch.autograd.forward")
    if any(module.startswith(transforms) for module in modules):
        return "the graph contains a torch.func transform or forward-mode differentiation"
    for node in graph.nodes:
        if node.op.startswith("call_") and re.match(rf"({_RESHAPES}|swap_tensors)(\.|$)", target_name(node)):
            return f"{node.name} changes a tensor's sizes, strides or autograd state in place"
    return None


def _why_unserved(z: Tensor, always: bool) -> str | None:
    """Return why a convolution with output z is not rewritten; None if it may be."""
    if z.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in {z.dtype}"
    return None if always else dispatch.why_unfused(z.dtype, z.device)


def _number(sizes: Any) -> int | None:
    """Return a size, one int or a list for height and width, as one int; None if the two differ or are no ints."""
    values = set(sizes) if isinstance(sizes, (tuple, list)) else {sizes}
    number = values.pop()
    return number if not values and isinstance(number, int) else None


def _pair(norm: Norm) -> Pair | str:
    """Return the pair that ends with `norm`, or the reason why there is none ("" if no convolution precedes `norm`)."""
    node = norm.input
    if not calls(node, *CONV):
        return ""
    conv = arguments(node, _CONV_ARGUMENTS)
    z, y, x, weight = map(value, (node, norm.output, conv["input"], conv["weight"]))
    if not all(isinstance(t, Tensor) for t in (z, y, x, weight)):
        return "its shapes are unknown"
    if len(node.users) > 1:
        return "the convolution's output has readers other than the BatchNorm"
    if z.dim() != 4:
        return "the input is not a batch [N, C, H, W]"
    if any(isinstance(size, int) and size == 0 for size in z.shape):
        return "the batch is empty"
    sizes = ("stride", "padding", "dilation", "groups")
    geometry = [size for size in (_number(conv[name]) for name in sizes) if size is not None]
    if len(geometry) < len(sizes):
        words = ", ".join(f"{name} {conv[name]}" for name in sizes[:3])
        return f"the convolution has {words}; supported: one number for both directions"
    # Only under autocast does a convolution change its weights' dtype. A frozen BatchNorm then returns that dtype.
    if z.dtype != y.dtype and not (norm.frozen and z.dtype != weight.dtype == y.dtype):
        return f"the BatchNorm converts {z.dtype} to {y.dtype}"
    training, momentum, eps = norm.training, norm.momentum, norm.eps
    if not (isinstance(training, bool) and isinstance(momentum, (int, float)) and isinstance(eps, float)):
        return "the BatchNorm's momentum or mode is computed in the graph"
    if not training and None in norm.running:
        return "the BatchNorm has no running statistics"
    if norm.frozen and (reason := why_unlike(norm, z)):
        return reason
    return Pair(node, conv["input"], conv["weight"], conv["bias"], geometry, norm)


def _share_statistics(pairs: Sequence[Pair], another: Pair) -> bool:
    """Return whether `another` and one of `pairs` share running statistics that one of the two updates.

    Such pairs can't be in one match, because one operator call does not keep the order of the two accesses.
    """
    b = another.norm
    return any((a.training or b.training) and a.statistics & b.statistics for a in (pair.norm for pair in pairs))


def _open_matches(pairs: Sequence[Pair]) -> list[Match]:
    """Join consecutive pairs with only a ReLU between them into matches. `_with_ends` sets what follows each match."""
    matches = []
    by_result: dict[Any, Match] = {}
    for pair in pairs:
        relu, match = pair.x, None
        if is_relu(relu) and only_user(relu) is pair.conv and only_user(relu.args[0]) is relu:
            match = by_result.get(relu.args[0])
        if match is None or _share_statistics(match.pairs, pair):
            match = Match([pair], pair.nodes)
            matches.append(match)
        else:
            match.pairs.append(pair)
            match.nodes += [relu, *pair.nodes]
        by_result[pair.norm.output] = match
    return matches


def _with_ends(matches: list[Match]) -> list[Match]:
    """Add to each match what follows its last BatchNorm: ReLU, pool, or an addition and ReLU.

    If the results of two matches are added, the addition belongs to the match with more pairs. The other one becomes
    its projection, if it is a single pair with the same input.
    """
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
    """Return (kernel, stride, pad) if `node` is a max pool that the stem's kernel can compute, else None."""
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
    """Return (x, stride, nodes) if `node` is an option-A shortcut, else None.

    That is fastres's operator, or x[:, :, ::stride, ::stride] with zero channels appended by F.pad.
    """
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
    """Return the `PaddedSum`s of the graph whose ReLU is not `inside` a match."""
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
                continue  # the operator's result has the layout of y
            x, stride, shortcut = padded
            served = always or dispatch.why_unfused(a.dtype, a.device) is None
            if served and _obstacle([add, relu], shortcut, set(), order) is None and _is_its_own(graph, add):
                sums.append(PaddedSum(y, x, stride, shortcut, add, relu))
                break
    return sums


def _is_its_own(graph: fx.Graph, add: fx.Node) -> bool:
    """Return whether `add` may be removed even if it works in place.

    It may if only `add` and its ReLU read the memory that it writes into.
    """
    written = written_by(add)
    alone = {*written, add, *add.users}
    return all(node.op in ("call_function", "call_method") and len(node.users) == 1 for node in written) and all(
        node in alone or storage(node) != storage(target) for target in written for node in graph.nodes
    )


def _obstacle(
    nodes: Sequence[fx.Node], aside: Sequence[fx.Node], moves: set[int | None], order: Mapping[fx.Node, int]
) -> str | None:
    """Return why `nodes` and `aside` can't be replaced by one call at the place of the last of `nodes`.

    None if they can. A write in between into one of their inputs is such a reason. moves: the storages of the running
    statistics that they update.
    """
    result, all_nodes = value(nodes[-1]), [*nodes, *aside]
    if not (result.is_contiguous() or is_channels_last(result)):
        return "its result is neither contiguous nor channels_last"
    reads = {storage(read) for node in all_nodes for read in node.all_input_nodes if read not in nodes}
    first, *_, last = sorted(order[node] for node in all_nodes)
    for node, at in order.items():
        if not first < at < last or node in all_nodes:
            continue
        if node.op == "call_function" and re.fullmatch(_MODE_SWITCH, target_name(node)):
            return "autocast or grad mode changes within the match"
        written = [storages(target) for target in written_by(node)]
        if any(memory is None or memory & reads for memory in written):
            return f"{node.name} writes into an input of the match"
        if any(storage(t) in moves for t in node.all_input_nodes):
            return f"{node.name} reads running statistics that the match updates"
    return None


def _sharing_statistics(graph: fx.Graph, matches: Sequence[Match]) -> list[Match]:
    """Return the matches that must not be replaced because nodes outside all matches use their running statistics.

    These are the matches that update statistics which such a node reads, or use statistics which such a node writes.
    The same holds for a frozen BatchNorm's weight and bias.

    A BatchNorm outside the matches saves its running statistics for backward, and autograd raises an error if a match
    then updates them in place. If a node outside the matches writes into them, eager's backward reads the written
    values, but the match's backward would not.
    """
    inside = {node for match in matches for node in match.nodes}
    staying = [node for node in graph.nodes if node not in inside]
    read = {storage(each) for node in staying for each in node.all_input_nodes}
    written = {storage(each) for node in staying for each in written_by(node)}
    return [match for match in matches if match.moves & read or any(p.norm.fixed & written for p in match.pairs)]
