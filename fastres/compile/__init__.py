"""`torch.compile(model, backend="fastres")`, and `explain(model, example)`: what that backend makes of a net.

In Dynamo's torch-level graph, where `conv2d`, `batch_norm` and `relu` are still whole, chains

    conv -> BN [-> ReLU -> conv -> BN]... [-> + residual] [-> ReLU] [-> max pool]

and option-A shortcuts become the operators of `fastres.ops.operators` and `fastres.ops.shortcut`; the rest goes to
Inductor. Only operators are inserted, so that AOTAutograd's and Inductor's caches know the graph. What can't be matched
stays as it is, and `explain` gives the reason. BN -> ReLU and add -> ReLU alone are Inductor's (`operators` says why).
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fastres.models.wrappers import refuse_sharded
from fastres.ops import dispatch, ends
from fastres.ops.layout import wide
from fastres.ops.operators import conv_affine_act, conv_bn_act

__all__ = ["Explanation", "Finding", "backend", "explain"]

_log = logging.getLogger(__name__)
_aten = torch.ops.aten
_pad_shortcut = torch.ops.fastres.pad_shortcut.default
_pad_shortcut_add_relu = torch.ops.fastres.pad_shortcut_add_relu.default

REWRITES = {
    "auto": "where fastres's kernels run: on GPUs they serve, or what `fastres.backend` forces while compiling",
    "always": "on every device; without kernels the operators run PyTorch's own functions",
    "never": "nowhere: plain Inductor",
}


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What `torch.compile(..., backend="fastres")` calls for each graph.

    `mode` and `options` are Inductor's. Two options more: "fastres.rewrite", a key of `REWRITES` ("auto"), and
    "fastres.inner", the name of the backend that compiles the rewritten graph ("inductor"; another takes neither mode
    nor options). Raises ValueError for an unknown value or another option "fastres.*".
    """
    options = dict(options or {})
    when, inner = options.pop("fastres.rewrite", "auto"), options.pop("fastres.inner", "inductor")
    unknown = [name for name in options if name.startswith("fastres.")]
    if unknown or when not in REWRITES:
        accepted = f"fastres.rewrite ({', '.join(REWRITES)}), fastres.inner (the name of a backend)"
        raise ValueError(f"unknown option {', '.join(unknown) or f'fastres.rewrite={when!r}'}; accepted: {accepted}")
    if inner != "inductor" and (options or mode not in (None, "default")):
        raise ValueError(f"mode and options are Inductor's; fastres.inner={inner!r} takes neither")
    if when != "never":
        _log.info("%s", Explanation(tuple(rewrite(gm, example_inputs, always=when == "always")), 1))
    if inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(gm, list(example_inputs))


@dataclass(frozen=True)
class Finding:
    """One chain or layer of a graph and what became of it."""

    layer: str  # its first convolution's (or other operation's) module, by name where that is known
    pattern: str
    operator: str | None  # what it was rewritten to; None: it stays
    reason: str = ""  # why it stays

    @property
    def hit(self) -> bool:
        return self.operator is not None


@dataclass(frozen=True)
class Explanation:
    """What backend "fastres" makes of a net; `str()` of it is a table."""

    findings: tuple[Finding, ...]
    graphs: int
    graph_breaks: Mapping[str, int] = field(default_factory=dict)  # reason -> how often
    here: str | None = None  # why the rewriting is left out on this device; None where it is done

    @property
    def hits(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.hit)

    @property
    def misses(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.hit)

    def __str__(self) -> str:
        lines = [("layer", "pattern", "becomes")]
        lines += [(f.layer, f.pattern, f.operator or f"stays: {f.reason}") for f in self.findings]
        widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
        table = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in lines]
        head = f"{len(self.hits)} rewritten, {len(self.misses)} left, in {self.graphs} graph(s)"
        if self.here:
            head += f"; but not on this device: {self.here}"
        breaks = [f"graph break x{count}: {why}" for why, count in self.graph_breaks.items()]
        return "\n".join([head, *breaks, *table])


def explain(model: nn.Module, *example: Any, **kwargs: Any) -> Explanation:
    """What `torch.compile(model, backend="fastres")` would rewrite in `model(*example, **kwargs)`, what not, and why.

    Runs a copy of the model once, uncompiled, in its present mode and in the caller's grad and autocast modes; the
    model stays untouched. Raises TypeError if `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes an nn.Module, not {type(model).__name__}")
    refuse_sharded(model, "explain")
    twin = copy.deepcopy(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return twin(*args, **kwargs)

    # Dynamo keeps what it compiled with the code object: one of its own makes each explanation the first.
    call.__code__ = call.__code__.replace()
    from torch._dynamo.utils import counters

    found: list[Finding] = []
    graphs = []
    here: list[str | None] = []

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = fx.GraphModule(gm, copy.deepcopy(gm.graph)).forward
        tensors = [v for v in map(_value, gm.graph.nodes) if isinstance(v, Tensor) and v.is_floating_point()]
        here.extend(dispatch.why_unfused(v.dtype, v.device) for v in tensors[:1])
        found.extend(rewrite(gm, inputs, always=True))
        graphs.append(gm)
        return run

    before = Counter(counters["graph_break"])
    torch.compile(call, backend=record)(*example, **kwargs)
    breaks = Counter(counters["graph_break"]) - before
    return Explanation(tuple(found), len(graphs), dict(breaks), next(iter(here), None))


# Reading the graph.

_CONV = (torch.conv2d, F.conv2d)
_RELU = (F.relu, torch.relu, F.relu_, torch.relu_)
_ADD = (operator.add, operator.iadd, torch.add)
_CONV_ARGUMENTS = {"input": ..., "weight": ..., "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_BN_ARGUMENTS = {p.name: p.default for p in inspect.signature(F.batch_norm).parameters.values()}
_POOL_ARGUMENTS = {
    "input": ...,
    "kernel_size": ...,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
# Modules whose functions write into nothing but what their names (`relu_`) or arguments (`inplace`, `out`) tell; and
# names of the exceptions, which move statistics, renormalise a table, observe or draw noise.
_OPEN = (
    *("torch", "torch.functional", "torch.nn.functional", "_operator", "builtins", "math"),
    *(f"torch._C.{name}" for name in ("_nn", "_linalg", "_fft", "_special")),
)
_HIDDEN = "batch_norm|instance_norm|embedding|fake_quant|moving_avg|rrelu_with_noise|_cum(max|min)_helper|^_fused|^_amp"
_IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift"),
    *("irshift", "iconcat", "setitem", "delitem"),
)


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _bind(node: fx.Node, names: Mapping[str, Any]) -> dict[str, Any]:
    return {**names, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _is(node: Any, targets: Iterable[Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and any(node.target is t for t in targets)


def _is_method(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target in names


def _is_relu(node: Any) -> bool:
    return (_is(node, _RELU) or _is_method(node, "relu", "relu_")) and len(node.args) > 0


def _addends(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that `node` adds, if it does and nothing else."""
    if not (_is(node, _ADD) or _is_method(node, "add", "add_")) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(_value(a), Tensor) and isinstance(_value(b), Tensor) else None


def _tensors(tree: Any) -> list[fx.Node]:
    """The nodes in nested arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)
    return found


def _mutated(node: fx.Node) -> list[fx.Node]:
    """The tensors that `node` may write into. PyTorch's own functions say so by name, argument or schema; of anything
    else (higher-order operators, functions that a graph was allowed to hold) it is presumed of all it is given."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output") or not node.all_input_nodes:
        return []
    if _is(node, (F.batch_norm,)):
        args = _bind(node, _BN_ARGUMENTS)
        return [args[key] for key in ("running_mean", "running_var") if args["training"] and args[key] is not None]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    given = [each for each in node.all_input_nodes if each.op != "get_attr" or "example_value" in each.meta]
    if node.op == "call_function" and re.search(_HIDDEN, name):
        return given
    if isinstance(target, torch._ops.OpOverload):
        pairs = zip(target._schema.arguments, node.args, strict=False)
        written = [value for argument, value in pairs if argument.is_write]
        return _tensors([*written, *(node.kwargs.get(a.name) for a in target._schema.arguments if a.is_write)])
    module = getattr(target, "__module__", None)
    if node.op == "call_method":
        in_place = re.fullmatch(r".*[^_]_|__i(?!nvert|ndex|nt)\w+__|__setitem__", name) is not None
    elif node.op != "call_function" or module not in _OPEN:
        return given
    else:
        in_place = name in _IN_PLACE if module == "_operator" else re.fullmatch(r".*[^_]_", name) is not None
    if in_place or _given(node, "inplace"):
        return _tensors(node.args[:1] or node.kwargs)
    return _tensors(node.kwargs.get("out"))


def _given(node: fx.Node, name: str) -> Any:
    """What a Python function's argument `name` is given, by position or by name."""
    if not inspect.isfunction(node.target):
        return None
    parameters = list(inspect.signature(node.target).parameters)
    at = parameters.index(name) if name in parameters else len(node.args)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name)


def _storage(node: Any) -> int | None:
    """The memory of a tensor; None where it has none of its own, or isn't known."""
    value = _value(node)
    try:
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
    except NotImplementedError:  # such as a sparse tensor
        return None


def _storages(node: fx.Node) -> set[int] | None:
    """The memory of the tensors that `node` stands for; None where it isn't known."""
    if "example_value" not in node.meta:
        return None
    try:
        tensors = [t for t in tree_leaves(node.meta["example_value"]) if isinstance(t, Tensor)]
        return {t.untyped_storage()._cdata for t in tensors}
    except NotImplementedError:
        return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _same(sizes: Any) -> int | None:
    """The one int of a size given as an int or for both directions; None where it isn't one."""
    values = set(sizes) if isinstance(sizes, (tuple, list)) else {sizes}
    value = values.pop()
    return value if not values and isinstance(value, int) else None


def _layer(node: fx.Node) -> str:
    """The module that `node` comes from, as the model names it; where there is none, the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = re.sub(r"^L\['\w+'\](\.forward\.__self__)?\.?", "", list(stack.values())[-1][0])
    return re.sub(r"\._modules\['([^']*)'\]|\[['\"]?(\w+)['\"]?\]", r".\1\2", path) or node.name


@dataclass(eq=False)
class _Unit:
    """conv -> BN: its nodes, the tensors it reads and its static sizes."""

    conv: fx.Node
    bn: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    affine: tuple[fx.Node | None, fx.Node | None]
    running: tuple[fx.Node | None, fx.Node | None]
    geometry: list[int]
    training: bool
    momentum: float
    eps: float


def _unit(bn: fx.Node) -> _Unit | str:
    """The unit that ends with `bn`, or why there is none."""
    args = _bind(bn, _BN_ARGUMENTS)
    conv = args["input"]
    if not _is(conv, _CONV):
        return ""
    given = _bind(conv, _CONV_ARGUMENTS)
    z, y, x, weight = (_value(node) for node in (conv, bn, given["input"], given["weight"]))
    if not all(isinstance(t, Tensor) for t in (z, y, x, weight)):
        return "its shapes are unknown"
    if len(conv.users) > 1:
        return "the convolution's output is used beside the BatchNorm"
    if z.dim() != 4:
        return "the input is no batch [N, C, H, W]"
    if any(isinstance(size, int) and size == 0 for size in z.shape):
        return "the batch is empty"
    sizes = ("stride", "padding", "dilation", "groups")
    geometry = [size for size in (_same(given[name]) for name in sizes) if size is not None]
    if len(geometry) < len(sizes):
        said = ", ".join(f"{name} {given[name]}" for name in sizes[:3])
        return f"the convolution has {said}; served: one number for both directions"
    if z.dtype != y.dtype:
        return f"the BatchNorm turns {z.dtype} into {y.dtype}"
    training, momentum, eps = args["training"], args["momentum"], args["eps"]
    if not (isinstance(training, bool) and isinstance(momentum, (int, float)) and isinstance(eps, float)):
        return "the BatchNorm's momentum or mode is computed in the graph"
    running = (args["running_mean"], args["running_var"])
    affine = (args["weight"], args["bias"])
    if not training and None in running:
        return "the BatchNorm has no running statistics"
    return _Unit(
        conv, bn, given["input"], given["weight"], given["bias"], affine, running, geometry, training, momentum, eps
    )


def _padded(node: Any) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """(x, stride, nodes) of an option-A shortcut `node`: fastres's operator, or x[:, :, ::s, ::s] padded behind."""
    if _is(node, (_pad_shortcut,)):
        return node.args[0], node.args[1], [node]
    if not _is(node, (F.pad, torch._C._nn.pad)):
        return None
    x, sizes, mode, fill = _bind(node, {"input": None, "pad": None, "mode": "constant", "value": None}).values()
    zero = mode == "constant" and fill in (None, 0, 0.0)
    if not (zero and isinstance(sizes, (tuple, list)) and len(sizes) == 6 and list(sizes[:5]) == [0] * 5):
        return None
    if not (isinstance(sizes[5], int) and sizes[5] >= 0 and _is(x, (operator.getitem,))):
        return None
    if not (isinstance(x.args[1], tuple) and len(x.args[1]) == 4):
        return None
    *whole, h, w = x.args[1]
    full = all(isinstance(s, slice) and s == slice(None) for s in whole)
    strided = isinstance(h, slice) and h == w and h.start is None and h.stop is None and isinstance(h.step, int)
    if not (full and strided and isinstance(_value(x.args[0]), Tensor)):
        return None
    return x.args[0], h.step, [node, x]


# Matching.


@dataclass(eq=False)
class _Match:
    """A chain: its units (a projection's last), what ends it, and all nodes it replaces; `last` gives its result."""

    units: list[_Unit]
    nodes: list[fx.Node]
    end: ends.End = field(default_factory=ends.Linear)
    residual: fx.Node | None = None
    shortcut: list[fx.Node] = field(default_factory=list)  # what may be left without users

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def x(self) -> fx.Node:
        return self.units[0].x

    @property
    def reads(self) -> list[fx.Node]:
        tensors = [t for u in self.units for t in (u.x, u.weight, u.bias, *u.affine, *u.running)]
        inside = set(self.nodes)
        return [t for t in (*tensors, self.residual) if t is not None and t not in inside]

    @property
    def statistics(self) -> set[int | None]:
        """The memory of its running statistics."""
        return {_storage(t) for unit in self.units for t in unit.running if t is not None}

    @property
    def moves(self) -> set[int | None]:
        """The memory of the running statistics that it moves."""
        return {_storage(t) for unit in self.units if unit.training for t in unit.running if t is not None}

    @property
    def pattern(self) -> str:
        return "-ReLU-".join(["conv-BN"] * (len(self.units) - self.end.projects)) + self.end.tail

    @property
    def is_open(self) -> bool:
        """Whether nothing that follows the last BN has been found."""
        return isinstance(self.end, ends.Linear)


def _chains(units: Sequence[_Unit]) -> list[_Match]:
    by_conv = {unit.conv: unit for unit in units}
    follows: dict[_Unit, tuple[fx.Node, _Unit]] = {}
    for unit in units:
        relu = _only_user(unit.bn)
        if relu is not None and _is_relu(relu):
            conv = _only_user(relu)
            after = by_conv.get(conv) if conv is not None else None
            if after is not None and after.x is relu:
                follows[unit] = (relu, after)
    chains = []
    seen: set[_Unit] = set()
    before = {after: unit for unit, (_, after) in follows.items()}
    for unit in units:
        if unit in seen or before.get(unit, unit) not in (unit, *seen):
            continue
        match = _Match([unit], [unit.conv, unit.bn])
        while unit in follows and not _share_statistics(match.units, follows[unit][1]):
            relu, unit = follows[unit]
            match.units.append(unit)
            match.nodes += [relu, unit.conv, unit.bn]
        seen.update(match.units)
        chains.append(match)
    return chains


def _share_statistics(units: Sequence[_Unit], other: _Unit) -> bool:
    """Whether one BN moves running statistics that another reads or moves: in one call the order would be lost."""

    def kept(unit: _Unit) -> set[int | None]:
        return {_storage(t) for t in unit.running if t is not None}

    return any((unit.training or other.training) and kept(unit) & kept(other) for unit in units)


def _finish(chains: list[_Match]) -> list[_Match]:
    """Each chain with what follows its last BN. Of two that meet in one addition the longer takes it."""
    by_result = {match.last: match for match in chains}
    taken: set[_Match] = set()
    added_by: set[fx.Node] = set()  # additions that a chain has taken
    for match in sorted(chains, key=lambda m: -len(m.units)):
        if match in taken or not match.is_open:
            continue
        user = _only_user(match.last)
        if user is not None and _is_relu(user):
            match.nodes.append(user)
            match.end = ends.Relu()
            pool = _only_user(user)
            if pool is not None and (sizes := _pool(pool)) is not None:
                match.nodes.append(pool)
                match.end = ends.Pool(*sizes)
            continue
        pair = _addends(user)
        relu = _only_user(user) if pair is not None and user is not None else None
        if pair is None or user is None or relu is None or not _is_relu(relu) or pair[0] is pair[1] or user in added_by:
            continue
        other = pair[1] if pair[0] is match.last else pair[0]
        y, added, z = (_value(node) for node in (user, other, match.last))
        if added.dtype != z.dtype or y.dtype != z.dtype or y.shape != z.shape:
            continue
        side = by_result.get(other)
        single = side is not None and side is not match and len(side.units) == 1 and side.is_open
        single = single and side is not None and not _share_statistics(match.units, side.units[0])
        if set(_mutated(user)) - {match.last} and not (single and len(other.users) == 1):
            continue
        if added.shape != z.shape:
            continue
        if single and side is not None and side.x is match.x and len(other.users) == 1 and side not in taken:
            match.end = ends.Project()
            match.units += side.units
            match.nodes += side.nodes
            taken.add(side)
        elif other is match.x:
            match.end = ends.Add()
        elif (padded := _padded(other)) is not None and padded[0] is match.x and _value(match.x).dtype == z.dtype:
            match.end, match.shortcut = ends.Pad(padded[1]), padded[2]
        else:
            match.end, match.residual = ends.Join(), other
        match.nodes += [user, relu]
        added_by.add(user)
    return [match for match in chains if match not in taken]


def _pool(node: fx.Node) -> tuple[int, int, int] | None:
    """(kernel, stride, pad) of a max pool that the stem's kernel does."""
    from fastres.kernels.problem import pool_refusal

    if not _is(node, (F.max_pool2d, torch.max_pool2d)):
        return None
    args = _bind(node, _POOL_ARGUMENTS)
    kernel, pad = _same(args["kernel_size"]), _same(args["padding"])
    stride = kernel if args["stride"] in (None, [], ()) else _same(args["stride"])
    if None in (kernel, pad, stride) or _same(args["dilation"]) != 1 or args["ceil_mode"] or args["return_indices"]:
        return None
    return (kernel, stride, pad) if pool_refusal(kernel, stride, pad) is None else None  # type: ignore[return-value]


def _obstacle(match: _Match, order: Mapping[fx.Node, int]) -> str | None:
    """Why `match` can't move to where its last node stands; None where it can."""
    result = _value(match.last)
    if not (result.is_contiguous() or _is_channels_last(result)):
        return "its result has strides of its own"
    reads = [*match.reads, *match.shortcut]
    return _between([*match.nodes, *match.shortcut], reads, match.moves, match.last, order)


def _without_shared_statistics(graph: fx.Graph, matches: Sequence[_Match]) -> tuple[list[_Match], list[_Match]]:
    """(matches, those left out). Left out is a chain whose running statistics something else uses: a BatchNorm outside
    all chains keeps them for its backward, and autograd refuses that the chain then moves them; and where something
    else writes into them, eager's backward reads what was written."""
    kept, left = list(matches), list[_Match]()
    while True:
        inside = {node for match in kept for node in match.nodes}
        staying = [node for node in graph.nodes if node not in inside]
        read = {_storage(given) for node in staying for given in node.all_input_nodes}
        written = {_storage(given) for node in staying for given in _mutated(node)}
        apart = [match for match in kept if match.moves & read or match.statistics & written]
        if not apart:
            return kept, left
        left += apart
        kept = [match for match in kept if match not in apart]


def _between(
    mine: Sequence[fx.Node],
    read: Sequence[fx.Node],
    moves: set[int | None],
    last: fx.Node,
    order: Mapping[fx.Node, int],
) -> str | None:
    """What stands between the nodes `mine` and changes what they read or how: why they can't all move to `last`.

    moves: the memory of running statistics that they move.
    """
    reads, first = {_storage(node) for node in read}, min(order[node] for node in mine)
    for node, at in order.items():
        if not first < at < order[last] or node in mine:
            continue
        if _is_switch(node):
            return "autocast or grad mode changes within it"
        written = [_storages(target) for target in _mutated(node)]
        if any(storages is None or storages & reads for storages in written):
            return f"{node.name} writes into what it reads"
        if any(_storage(t) in moves for t in node.all_input_nodes):
            return f"{node.name} reads running statistics that it moves"
    return None


def _is_switch(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in (
        "_enter_autocast",
        "_exit_autocast",
        "_set_grad_enabled",
        "_enter_inference_mode",
        "_exit_inference_mode",
    )


# What changes a tensor's sizes, strides or place in the autograd graph: a graph records of it what it is at the end.
_RESHAPES_IN_PLACE = (
    *("resize_", "resize_as_", "set_", "as_strided_", "squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_"),
    *("t_", "detach_", "requires_grad_", "swap_tensors"),
)


def _why_nothing(graph: fx.Graph) -> str | None:
    """Why nothing in the graph can be rewritten; None where there is no reason."""
    if _transforms(graph):
        return "the graph holds a torch.func transform or forward-mode differentiation"
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op.startswith("call_") and name.split(".")[0] in _RESHAPES_IN_PLACE:
            return f"{node.name} changes in place what is known of a tensor"
    return None


def _transforms(graph: fx.Graph) -> bool:
    """Whether the graph itself differentiates or maps (`torch.func`, forward mode)."""
    modules = (getattr(n.target, "__module__", None) or "" for n in graph.nodes if n.op == "call_function")
    return any(
        name.startswith(("torch._functorch", "torch._C._functorch", "torch.autograd.forward")) for name in modules
    )


def rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any], *, always: bool) -> list[Finding]:
    """Rewrite `gm` in place; returns what was found, in the graph's order."""
    graph = gm.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, example_inputs, strict=False):
        node.meta.setdefault("example_value", value)  # DDP's parts of a graph come without
    order = {node: at for at, node in enumerate(graph.nodes)}
    found: list[tuple[int, Finding]] = []

    def miss(node: fx.Node, pattern: str, reason: str) -> None:
        found.append((order[node], Finding(_layer(node), pattern, None, reason)))

    units = []
    whole = _why_nothing(graph)
    for node in graph.nodes:
        if not _is(node, (F.batch_norm,)):
            continue
        unit = _unit(node)
        if isinstance(unit, _Unit):
            if reason := whole or _unserved(unit, always):
                miss(unit.conv, "conv-BN", reason)
            else:
                units.append(unit)
        elif unit:
            miss(node, "conv-BN", unit)
        elif any(map(_is_relu, node.users)):
            miss(node, "BN-ReLU", "no convolution before it: Inductor makes the same passes")
        else:
            miss(node, "BN", "no convolution before it")
    matches = []
    for match in _finish(_chains(units)):
        if reason := _obstacle(match, order):
            miss(match.units[0].conv, match.pattern, reason)
        else:
            matches.append(match)
    matches, shared = _without_shared_statistics(graph, matches)
    for match in shared:
        miss(match.units[0].conv, match.pattern, "its running statistics are read or written elsewhere, too")
    normed = {_bind(node, _BN_ARGUMENTS)["input"] for node in graph.nodes if _is(node, (F.batch_norm,))}
    for node in graph.nodes:
        if _is(node, _CONV) and node not in normed:
            miss(node, "conv", "no BatchNorm behind it")
    inside = {node for match in matches for node in match.nodes}
    ends = _pad_ends(graph, inside, order, always) if whole is None else []
    for node in graph.nodes:
        if _is_relu(node) and node not in inside and _addends(node.args[0]) and node not in [e[-1] for e in ends]:
            miss(node, "add-ReLU", "outside a chain: Inductor makes the same pass")
    layout = _Layout()
    for match in matches:
        became = _replace(graph, match, layout)
        found.append((order[match.units[0].conv], Finding(_layer(match.units[0].conv), match.pattern, became)))
    for y, x, stride, dead, add, relu in ends:
        found.append((order[relu], Finding(_layer(relu), "pad-add-ReLU", "pad_shortcut_add_relu")))
        with graph.inserting_before(relu):
            out = graph.call_function(_pad_shortcut_add_relu, (layout.now(y), layout.now(x), stride))
        _take_over(graph, out, relu, [add, relu], dead)
    layout.settle(graph)
    graph.lint()
    gm.recompile()
    return [finding for _, finding in sorted(found, key=lambda pair: pair[0])]


def _unserved(unit: _Unit, always: bool) -> str | None:
    z = _value(unit.conv)
    if z.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in {z.dtype}"
    return None if always else dispatch.why_unfused(z.dtype, z.device)


def _pad_ends(
    graph: fx.Graph, inside: set[fx.Node], order: Mapping[fx.Node, int], always: bool
) -> list[tuple[Any, ...]]:
    """(y, x, stride, shortcut's nodes, add, relu) of option-A block ends that belong to no chain."""
    ends = []
    for relu in graph.nodes:
        add = relu.args[0] if _is_relu(relu) and relu not in inside else None
        pair = _addends(add)
        if not isinstance(add, fx.Node) or pair is None or len(add.users) > 1:
            continue
        for y, other in (pair, pair[::-1]):
            padded, a, b = _padded(other), _value(y), _value(other)
            if padded is None or a.shape != b.shape or a.dtype != b.dtype:
                continue
            if a.stride() != _value(relu).stride() or not (a.is_contiguous() or _is_channels_last(a)):
                continue  # the operator's result is laid out as y
            x, stride, shortcut = padded
            served = always or dispatch.why_unfused(a.dtype, a.device) is None
            moved = _between([*shortcut, add], [x, y, *shortcut], set(), relu, order)
            if served and moved is None and _is_its_own(graph, add):
                ends.append((y, x, stride, shortcut, add, relu))
                break
    return ends


def _is_its_own(graph: fx.Graph, add: fx.Node) -> bool:
    """Whether `add` may go although it works in place: nothing but itself and its ReLU reads the memory it writes."""
    written = _mutated(add)
    alone = {*written, add, *add.users}
    return all(node.op in ("call_function", "call_method") and len(node.users) == 1 for node in written) and all(
        node in alone or _storage(node) != _storage(target) for target in written for node in graph.nodes
    )


# Replacing.


def _take_over(
    graph: fx.Graph, out: fx.Node, last: fx.Node, nodes: Sequence[fx.Node], shortcut: Sequence[fx.Node] = ()
) -> None:
    """`out` instead of `last`; erase what it replaces. (No general dead-code elimination: in-place nodes look dead.)"""
    out.meta = {key: value for key, value in last.meta.items() if key != "example_value"}
    out.meta["example_value"] = _value(last)
    last.replace_all_uses_with(out)
    for node in (*reversed(nodes), *shortcut):
        if not node.users:
            graph.erase_node(node)


def _replace(graph: fx.Graph, match: _Match, layout: _Layout) -> str:
    """Put the operators where the chain's last node stands; returns which."""
    training = any(unit.training for unit in match.units) or _value(match.last).requires_grad
    if isinstance(match.end, ends.Pool) and not training:  # the pool reads what the epilogue wrote, either way
        match.nodes.pop()
        match.end = ends.Relu()
    dtype = _value(match.units[0].conv).dtype
    with graph.inserting_before(match.last):
        x = layout.input(graph, match.x, dtype)
        residual = None if match.residual is None else layout.input(graph, match.residual, dtype)
        out = (_trained if training else _inferred)(graph, match, x, residual)
    last = match.last
    _take_over(graph, out, last, match.nodes, match.shortcut)
    layout.made(last, out)
    return "conv_bn_act" if training else f"conv_affine_act x{len(match.units)}"


def _trained(graph: fx.Graph, match: _Match, x: fx.Node, residual: fx.Node | None) -> fx.Node:
    units = match.units
    geometry = [size for unit in units for size in unit.geometry]
    eps, momenta = [unit.eps for unit in units], [float(unit.momentum) for unit in units]
    words = geometry, eps, momenta, [unit.training for unit in units], match.end.word, list(match.end.sizes)
    parameters = [t for unit in units for t in (unit.weight, unit.affine[0], _beta(graph, unit))]
    running = [t for unit in units for t in unit.running]
    call = graph.call_function(conv_bn_act, (x, parameters, running, residual, *words))
    out = graph.call_function(operator.getitem, (call, 0))
    homes = [
        (home, bias, unit.momentum)
        for unit in units
        if unit.training
        for home, bias in zip(unit.running, (unit.bias, None), strict=True)
        if home is not None
    ]
    if homes:
        moved, at = graph.call_function(operator.getitem, (call, 1)), 0
        for home, bias, momentum in homes:
            size = _value(home).numel()
            new = graph.call_function(_aten.slice.Tensor, (moved, 0, at, at + size))
            if bias is not None:  # the operator saw the batch's mean without it
                bias = graph.call_function(_aten.detach.default, (bias,))
                new = graph.call_function(_aten.add.Tensor, (new, bias), {"alpha": momentum})
            graph.call_function(_aten.copy_.default, (home, new))
            at += size
    return out


def _beta(graph: fx.Graph, unit: _Unit) -> fx.Node | None:
    """BN's bias with the convolution's, b, in it: bias + scale b.

    A batch's mean takes b away again: there scale is 0, which gives b the gradient 0 (eager's is rounding around it)
    and lets b's NaN or infinity through.
    """
    beta = unit.affine[1]
    if unit.bias is None:
        return beta
    scale = 0.0 if unit.training else _scale(graph, unit)
    share = graph.call_function(_aten.mul.Scalar if unit.training else _aten.mul.Tensor, (unit.bias, scale))
    return share if beta is None else graph.call_function(_aten.add.Tensor, (beta, share))


def _inferred(graph: fx.Graph, match: _Match, x: fx.Node, residual: fx.Node | None) -> fx.Node:
    """Every BN as scale and shift in its convolution's epilogue: constants where Inductor freezes the weights."""

    def unit(u: _Unit, a: fx.Node, added: fx.Node | None, relu: bool) -> fx.Node:
        scale, shift = _scale_shift(graph, u)
        return graph.call_function(conv_affine_act, (a, u.weight, scale, shift, added, u.geometry, relu))

    main, a = match.units, x
    if match.end.projects:
        *main, side = main
        residual = unit(side, x, None, relu=False)
    elif isinstance(match.end, ends.Add):
        residual = x
    for u in main[:-1]:
        a = unit(u, a, None, relu=True)
    if isinstance(match.end, ends.Pad):
        return graph.call_function(_pad_shortcut_add_relu, (unit(main[-1], a, None, relu=False), x, match.end.stride))
    return unit(main[-1], a, residual, relu=not match.is_open)


def _widened(graph: fx.Graph, unit: _Unit, node: fx.Node) -> fx.Node:
    dtype = wide(_value(unit.conv).dtype)
    return node if _value(node).dtype == dtype else graph.call_function(_aten.to.dtype, (node, dtype))


def _scale(graph: fx.Graph, unit: _Unit) -> fx.Node:
    """scale = weight rstd of the running statistics, in fp32 (fp64 for fp64)."""
    var, gamma = unit.running[1], unit.affine[0]
    assert var is not None
    shifted = graph.call_function(_aten.add.Scalar, (_widened(graph, unit, var), unit.eps))
    rstd = graph.call_function(_aten.rsqrt.default, (shifted,))
    return rstd if gamma is None else graph.call_function(_aten.mul.Tensor, (rstd, _widened(graph, unit, gamma)))


def _scale_shift(graph: fx.Graph, unit: _Unit) -> tuple[fx.Node, fx.Node]:
    """`_scale` and shift = bias - (mean - conv's bias) scale."""
    mean, beta, scale = unit.running[0], unit.affine[1], _scale(graph, unit)
    assert mean is not None
    mean = _widened(graph, unit, mean)
    if unit.bias is not None:
        mean = graph.call_function(_aten.sub.Tensor, (mean, _widened(graph, unit, unit.bias)))
    product = graph.call_function(_aten.mul.Tensor, (mean, scale))
    if beta is None:
        return scale, graph.call_function(_aten.neg.default, (product,))
    return scale, graph.call_function(_aten.sub.Tensor, (_widened(graph, unit, beta), product))


# Memory formats. The operators give channels_last where the graph was traced with another: harmless to most of what
# follows, but not to `view`, to `as_strided`, to the caller of the model, or to what is changed in place.

# What means the same in any memory format of a 4-D operand. Its 4-D result follows that format or may.
_ANY_FORMAT = (
    *_CONV, *_RELU, *_ADD, operator.mul, operator.imul, torch.mul, F.batch_norm, F.max_pool2d, torch.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.silu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu,
    F.interpolate, torch.sigmoid, torch.cat, torch.mean, torch.sum, F.pad, torch._C._nn.pad, _pad_shortcut,
    _pad_shortcut_add_relu,
)  # fmt: skip
_ANY_FORMAT_METHODS = ("relu", "relu_", "add", "add_", "mul", "mul_", "sigmoid", "mean", "sum")
_TO_CHANNELS_LAST: dict[str, Any] = {"memory_format": torch.channels_last}


def _is_channels_last(value: Any) -> bool:
    return bool(value.is_contiguous(memory_format=torch.channels_last))


class _Layout:
    """What replaced which node, and which are channels_last now where they were not when the graph was traced."""

    def __init__(self) -> None:
        self._instead: dict[fx.Node, fx.Node] = {}
        self._ours: set[fx.Node] = set()
        self._changed: set[fx.Node] = set()

    def input(self, graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype` and channels_last: at most one copy, kept for backward."""
        node = self.now(node)
        value = _value(node)
        if value.dtype != dtype:
            node = graph.call_function(_aten.to.dtype, (node, dtype))
        elif node in self._ours or _is_channels_last(value):
            return node
        return graph.call_function(_aten.contiguous.default, (node,), _TO_CHANNELS_LAST)

    def now(self, node: fx.Node) -> fx.Node:
        """`node`, or what stands in its place."""
        return self._instead.get(node, node)

    def made(self, last: fx.Node, node: fx.Node) -> None:
        self._instead[last] = node
        self._ours.add(node)
        value = _value(node)
        _, c, h, w = value.shape
        if value.stride() != (h * w * c, 1, w * c, c):  # one channel or pixel has both formats, but not both strides
            self._changed.add(node)

    def settle(self, graph: fx.Graph) -> None:
        """Give the traced layout back to whatever might depend on it.

        What gives it back is a copy. While nothing writes into a value, a copy and the value are the same to all who
        read them. Where something does, or where two results share its memory, all readers must have the one or all
        the other.
        """
        if not self._changed:
            return
        memory = _Memory(graph)
        for node in list(graph.nodes):
            if node in self._changed:
                self._settle(graph, node, memory.is_observed(node))

    def _settle(self, graph: fx.Graph, root: fx.Node, observed: bool) -> None:
        """`root`: the first name of its memory. observed: whether it matters who shares that memory."""
        names, fresh = [root], []
        depend: dict[fx.Node, fx.Node] = {}
        for name in names:
            for user in name.users:
                reading = "ends" if user in self._ours else _reading(user, root, observed)
                if reading == "depends":
                    depend[user] = name
                elif reading == "names" and user not in names:
                    names.append(user)
                elif reading == "follows":
                    fresh.append(user)
        if not depend:
            self._changed.update(fresh)
            return
        if observed or any(name is not root for name in depend.values()):
            depend = dict.fromkeys(root.users, root)
        else:
            self._changed.update(fresh)
        with graph.inserting_after(root):  # `contiguous` would leave what one channel or pixel has for strides
            back = graph.call_function(_aten.clone.default, (root,), {"memory_format": torch.contiguous_format})
        back.meta = dict(root.meta)
        for user in depend:
            given = back
            if _is(user, (conv_bn_act, conv_affine_act)):  # reads what it read, in the format it works in
                with graph.inserting_before(user):
                    given = graph.call_function(_aten.contiguous.default, (back,), _TO_CHANNELS_LAST)
            user.replace_input_with(root, given)


def _reading(user: fx.Node, root: fx.Node, observed: bool) -> str:
    """How `user` takes a value of `root`'s memory, which has another memory format than the graph was traced with:

    "names": gives the same memory another name, whatever the format; "follows": gives new memory, whose format may
    differ too; "ends": gives what is the same either way; "depends": anything else, and what isn't known.
    """
    value = _value(user)
    put_in = "example_value" not in user.meta and _is(user, (_aten.contiguous.default, _aten.to.dtype))
    if put_in or _is(user, (conv_bn_act, conv_affine_act)):
        return "ends"  # the operators, and what prepares for them, give channels_last from any format
    if _is(user, (getattr,)) or _is_method(user, "size", "dim"):
        return "depends" if isinstance(value, Tensor) else "ends"
    if not isinstance(value, Tensor) or isinstance(user.kwargs.get("out"), fx.Node):
        return "depends"
    shares = _storage(user) == _storage(root)
    if _is(user, (torch.flatten,)) or _is_method(user, "flatten", "reshape"):
        whole = value.dim() == 2 and value.shape[0] == _value(root).shape[0]  # [N, C H W]: rows in the traced order
        return "ends" if whole and not (shares and observed) else "depends"
    if _is(user, (operator.getitem,)):
        return "names" if value.dim() == 4 and shares else "depends"
    idle = _is(user, (F.dropout,)) and (_given(user, "training") is False or _given(user, "p") == 0)
    if not (idle or _is(user, _ANY_FORMAT) or _is_method(user, *_ANY_FORMAT_METHODS)):
        return "depends"  # a dropout at work as well: chance goes by the order in memory
    if shares:
        return "names"
    if any(_storage(user) == _storage(node) for node in _mutated(user)):
        return "ends"  # written into other memory, whose format stays
    if _is(user, (torch.mean, torch.sum)) or _is_method(user, "mean", "sum"):
        return "ends"  # reductions give contiguous results
    return "follows" if value.dim() == 4 and value.is_contiguous() else "depends"


class _Memory:
    """What of a graph's memory is written into, and what the caller gets of it."""

    def __init__(self, graph: fx.Graph) -> None:
        output = next(node for node in graph.nodes if node.op == "output")
        self._written: set[int] = set()
        self._unknown = False
        for node in graph.nodes:
            for target in _mutated(node):
                storages = _storages(target)
                self._written |= storages or set()
                self._unknown |= storages is None
        self._returned = Counter(map(_storage, output.all_input_nodes))

    def is_observed(self, node: fx.Node) -> bool:
        """Whether it can be told from outside, or by a later reader, who shares the memory of `node`."""
        storage = _storage(node)
        return self._unknown or storage in self._written or self._returned[storage] > 1
