"""The static plan of a net for inference: which steps, in which order, on which values. No tensor is touched here.

`trace` reads a model's graph (torch.fx) into steps; `fuse` merges conv, BN, residual and ReLU into one step; `quantise`
puts 8 bits between the convolutions; `fuse_chains` marks where three convolutions of a bottleneck may run as one. Every
step names the values it reads and writes; each value is written once (what works in place in the model writes a new
value here), so steps may move freely between their inputs and their first reader.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import type_before_parametrizations
from torchvision.ops import FrozenBatchNorm2d

from fastres.ops import eligibility
from fastres.ops.layout import Geometry
from fastres.ops.quantised import FLOAT8, Grid, Quantised, grid
from fastres.ops.shortcut import PadShortcut

INPUT = "input"

_ABSENT = (nn.Identity, _DropoutNd)  # in eval mode
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_BY_PIXELS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, PadShortcut)
_POINTWISE = (nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid)
_MODULES = (*_BY_PIXELS, *_POINTWISE, nn.Linear, nn.BatchNorm1d, nn.Conv1d, nn.Flatten, nn.Softmax, nn.GroupNorm)
# The functions and methods a traced net may call: name here -> (what computes it on NCHW values, its spellings).
_TABLE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "relu": (lambda input, inplace=False: F.relu(input), (F.relu, torch.relu, torch.relu_, "relu", "relu_")),
    "add": (operator.add, (operator.add, operator.iadd, torch.add, "add", "add_")),
    "mul": (operator.mul, (operator.mul, operator.imul, torch.mul, "mul", "mul_")),
    "sub": (operator.sub, (operator.sub, operator.isub, torch.sub, "sub", "sub_")),
    "div": (operator.truediv, (operator.truediv, operator.itruediv, torch.div, "div", "div_")),
    "sigmoid": (torch.sigmoid, (torch.sigmoid, F.sigmoid, "sigmoid")),
    "mean": (torch.mean, (torch.mean, "mean")),
    "normalize": (F.normalize, (F.normalize,)),
    "squeeze": (torch.squeeze, (torch.squeeze, "squeeze")),
    "flatten": (torch.flatten, (torch.flatten, "flatten")),
    "reshape": (
        lambda input, *shape, **named: input.reshape(*(shape or named.values())),
        (torch.reshape, "reshape", "view"),
    ),
    "expand_as": (Tensor.expand_as, ("expand_as",)),
    "size": (Tensor.size, ("size",)),
    "getattr": (getattr, (getattr,)),
    "getitem": (operator.getitem, (operator.getitem,)),
    "pad": (F.pad, (F.pad,)),
    "max_pool2d": (F.max_pool2d, (F.max_pool2d, torch.max_pool2d)),
    "avg_pool2d": (F.avg_pool2d, (F.avg_pool2d,)),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, (F.adaptive_avg_pool2d,)),
    "conv2d": (F.conv2d, (F.conv2d,)),
    "group_norm": (F.group_norm, (F.group_norm,)),
}
FUNCTIONS = {name: function for name, (function, _) in _TABLE.items()}
_KINDS = {spelling: name for name, (_, spellings) in _TABLE.items() for spelling in spellings}
_ARITHMETIC = ("add", "mul", "sub", "div")
_IN_PLACE = (
    *("relu_", "add_", "mul_", "sub_", "div_"),
    *(operator.iadd, operator.imul, operator.isub, operator.itruediv, torch.relu_),
)
# What may give a view of what it is given: functions by name here, modules by class.
_MAY_SHARE = ("flatten", "squeeze", "reshape", "expand_as", "getitem", nn.Flatten, PadShortcut)
_ACCEPTED = (
    "Conv2d, BatchNorm2d, ReLU, additions, "
    + ", ".join(kind.__name__ for kind in _MODULES)
    + ", Identity, dropout, and the functions "
    + ", ".join(sorted(FUNCTIONS))
)


@dataclass(frozen=True)
class Value:
    """A step's argument that another step wrote."""

    name: str


@dataclass(frozen=True)
class Attr:
    """A step's argument that is a tensor of the model, by its path."""

    path: str


@dataclass(frozen=True)
class Aten:
    """A step done by the library, on NCHW views: the module `name`, or a key of `FUNCTIONS`."""

    name: str
    kind: str  # "module", "norm" (a BN that follows no convolution), or the key of FUNCTIONS
    args: tuple[Any, ...]
    out: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    selects: bool = False  # a max pool: each number of its output is one of its input's

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(v.name for v in leaves((self.args, self.kwargs)) if isinstance(v, Value)))

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Unit:
    """A convolution and the BN folded into it (None: none), as paths in the model."""

    conv: str
    norm: str | None = None


@dataclass(frozen=True)
class Conv:
    """out = [relu](conv(x, w) + shift + residual), w and shift as folded from `unit`.

    absorbed: the projection on the residual whose shift is added here, so that there it needs no pass of its own
    (`bare`).
    """

    unit: Unit
    x: str
    out: str
    geometry: Geometry
    filter: tuple[int, int, int, int]  # K, R, S, C/groups
    residual: str | None = None
    relu: bool = False
    absorbed: Unit | None = None
    bare: bool = False
    quantised: Quantised | None = None

    @property
    def name(self) -> str:
        return self.unit.conv

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Convert:
    """out = x stored on `grid`, or what x stored there means where `back`."""

    x: str
    out: str
    grid: Grid
    back: bool = False

    @property
    def name(self) -> str:
        return "dequantise" if self.back else "quantise"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Chain:
    """Three convolutions that one kernel may do: 3x3 -> 1x1 expand + residual -> the next block's 1x1 reduce, each with
    ReLU. Its meaning is the three steps in order."""

    spatial: Conv
    expand: Conv
    reduce: Conv

    @property
    def parts(self) -> tuple[Conv, Conv, Conv]:
        return self.spatial, self.expand, self.reduce

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    @property
    def reads(self) -> tuple[str, ...]:
        assert self.expand.residual is not None
        return self.spatial.x, self.expand.residual

    @property
    def writes(self) -> tuple[str, ...]:
        return self.expand.out, self.reduce.out


Step = Aten | Conv | Convert | Chain


def convs(step: Step) -> tuple[Conv, ...]:
    """The convolutions that `step` does."""
    return step.parts if isinstance(step, Chain) else (step,) if isinstance(step, Conv) else ()


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists, dicts and slices."""
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, Mapping):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """`tree` with `function` applied to its leaves."""
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(mapped(item, function) for item in tree)
    if isinstance(tree, Mapping):
        return {key: mapped(item, function) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(item, function) for item in (tree.start, tree.stop, tree.step)))
    return function(tree)


class _Proxy(fx.Proxy):
    """fx writes x += y as x = x + y; here it stays what it is, because other names may stand for x."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or what is computed of buffers, or written into them, is done once, in tracing

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in (PadShortcut, FrozenBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[list[Step], str]:
    """The steps of `model` in eval mode, one by one, and the name of the value it returns.

    The model's code is run without gradients, on a stand-in for its first argument and the defaults of the others; what
    it keeps stays with it, so give a copy. Raises ValueError, naming the node or layer, for what a plan can't hold:
    hooks, training mode, control flow that depends on tensors, an operation that isn't listed, more than one input or
    output, numbers and strings that a call changes, tensors that are neither parameters nor buffers.
    """
    _refuse_training(model)
    _refuse_hooks(model)
    before = _plain_attributes(model)
    try:
        first, *others = inspect.signature(model.forward).parameters.values()
        if first.kind is first.VAR_POSITIONAL:
            raise TypeError(f"forward takes *{first.name}")
        defaults = {each.name: each.default for each in others if each.default is not each.empty}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of defaults that fx can't write assertions for
            graph = _Tracer().trace(model, concrete_args=defaults)
    except Exception as error:  # whatever the model's own code raises on proxies
        reason = str(error).split(". ")[0]  # torch.fx goes on about its proxies
        raise ValueError(
            f"optimize() takes a model of one tensor to one tensor that torch.fx can trace, {type(model).__name__} is "
            f"none ({reason}); a ResNet inside it, as a detector's backbone, runs fused after fastres.convert(model)"
        ) from error
    if changed := before.items() - _plain_attributes(model).items():
        (path, name), _ = min(changed, key=repr)
        raise ValueError(f"{_layer(path)} changes its attribute {name!r} when it is called; a plan would not")
    _erase_assertions(graph)
    translation = _Translation(model, graph)
    for node in graph.nodes:
        translation.translate(node)
    output = translation.env[next(node for node in graph.nodes if node.op == "output")]
    if not isinstance(output, Value):
        raise ValueError(f"optimize() takes a model that returns one tensor, {type(model).__name__} returns {output!r}")
    return translation.steps, output.name


def _layer(path: str) -> str:
    return f"layer {path!r}" if path else "the model"


def _refuse_training(model: nn.Module) -> None:
    training = [(path, module) for path, module in model.named_modules() if module.training]
    if training:
        path, module = next((p for p in training if isinstance(p[1], _BatchNorm)), training[0])
        raise ValueError(
            f"optimize() freezes a net for inference, but {_layer(path)} ({type(module).__name__}) is in training "
            "mode; call model.eval() after the last change: what is added later, parametrizations too, starts in "
            "training mode"
        )


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if eligibility.has_hooks(module):
            raise ValueError(
                f"{_layer(path)} carries a hook or a forward of its own, which a plan would never call; remove it first"
            )
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            raise ValueError(
                f"{_layer(path)} ({type(module).__name__}) has a __call__ of its own, which a plan would never call; "
                "let forward do it"
            )
    if nn.modules.module._has_any_global_hook():
        raise ValueError("a hook for all modules is registered, which a plan would never call; remove it first")


def _plain_attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The numbers and strings that the modules hold, by the module's path and the attribute's name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str))
    }


def _erase_assertions(graph: fx.Graph) -> None:
    """fx asserts that arguments with a default are given it; an optimized net takes none."""
    for node in reversed(graph.nodes):
        if node.target in (torch._assert, fx._symbolic_trace._assert_is_none):
            compared = node.args[0]
            graph.erase_node(node)
            if isinstance(compared, fx.Node) and compared.op == "call_function" and not compared.users:
                graph.erase_node(compared)


def _unsupported(node: fx.Node, what: str) -> ValueError:
    return ValueError(f"optimize() has no step for {what} (node {node.name!r}); it accepts {_ACCEPTED}")


class _Translation:
    """A graph's nodes as steps, in order.

    Steps write new values, so what a net changes in place is followed by name: every name of the tensor stands for the
    new value from there on. What only shares its memory (a view, or what may be one: whether `reshape` copies depends
    on the memory format) would go on standing for the old one, so nobody may read it later.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.env: dict[fx.Node, Any] = {}  # what a node stands for
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._tensors = {name for name, _ in tensors}
        self._order = {node: at for at, node in enumerate(graph.nodes)}
        self._names: dict[fx.Node, set[fx.Node]] = {}  # the nodes that are the same tensor; numbers have none
        self._memory: dict[fx.Node, set[fx.Node]] = {}  # the nodes that may share its memory

    def translate(self, node: fx.Node) -> None:
        """Append the step of `node`, if it needs one, and enter what it yields in `env`."""
        args, kwargs = (
            mapped(tree, lambda v: self.env[v] if isinstance(v, fx.Node) else v) for tree in (node.args, node.kwargs)
        )
        if node.op == "output":
            self.env[node] = args[0]
        elif node.op == "placeholder":
            if Value(INPUT) not in self.env.values():
                self.env[node] = Value(INPUT)
            elif node.users:
                raise ValueError(f"optimize() takes a model with one input, this one also reads {node.target!r}")
            self._is_new(node)
        elif node.op == "get_attr":
            if node.target not in self._tensors:
                raise _unsupported(
                    node, "a tensor that is neither a parameter nor a buffer; see Module.register_buffer"
                )
            self.env[node] = Attr(str(node.target))
            self._is_new(node)
        else:
            self._append(node, args, kwargs)

    def _append(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        kind: Any
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            kind, (step, in_place) = type(module), _of_module(node, module, args, kwargs)
        else:
            step, in_place = _of_function(node, args, kwargs)
            kind = step.kind if isinstance(step, Aten) else None
        if step is not None:
            self.steps.append(step)
        self.env[node] = args[0] if step is None else Value(node.name)
        tensors = [given for given in node.all_input_nodes if given in self._names]
        if kind in ("size", "getattr") or not tensors:
            return
        operand = tensors[0]
        if in_place and operand in (*node.args[:1], node.kwargs.get("input")):
            self._change(node, operand)
        elif step is None and node.target != "contiguous":
            self._is_also(node, operand)
        else:
            self._is_new(node)
            if step is None or kind in _MAY_SHARE:
                self._shares(node, tensors)

    def _is_new(self, node: fx.Node) -> None:
        self._names[node], self._memory[node] = {node}, {node}

    def _is_also(self, node: fx.Node, tensor: fx.Node) -> None:
        self._names[node], self._memory[node] = self._names[tensor], self._memory[tensor]
        self._names[node].add(node)
        self._memory[node].add(node)

    def _shares(self, node: fx.Node, tensors: Iterable[fx.Node]) -> None:
        memory = self._memory[node].union(*(self._memory[tensor] for tensor in tensors))
        self._memory |= dict.fromkeys(memory, memory)

    def _change(self, node: fx.Node, operand: fx.Node) -> None:
        """`node` writes into `operand`."""
        later = self._order[node]
        for other in self._memory[operand]:
            if other.op == "get_attr":
                raise _unsupported(node, f"{_label(node)}() that writes into the model's own {other.target!r}")
        for other in self._memory[operand] - self._names[operand]:
            if any(self._order[user] > later for user in other.users):
                why = f"{other.name!r} may share its memory and is read later"
                raise _unsupported(node, f"{_label(node)}() that writes into {operand.name!r}: {why}")
        self._is_also(node, operand)
        self.env |= dict.fromkeys(self._names[operand], Value(node.name))


def _of_module(node: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> tuple[Step | None, bool]:
    kind, path, out = type_before_parametrizations(module), str(node.target), node.name
    if not args:
        raise _unsupported(node, f"layer {path!r} called with keywords only")
    if issubclass(kind, _ABSENT):
        return None, False
    if kind is nn.Conv2d:
        if not isinstance(args[0], Value):
            raise _unsupported(node, "a convolution of a constant")
        k, c, r, s = module.weight.shape  # type: ignore[misc]
        geometry = _geometry(node, module)  # type: ignore[arg-type]
        return Conv(Unit(path), args[0].name, out, geometry, (k, r, s, c)), False
    in_place = bool(getattr(module, "inplace", False))
    if kind is nn.ReLU:
        return Aten(path, "relu", args, out), in_place
    if kind in (*_NORMS, nn.BatchNorm1d) and module.running_mean is None:
        raise ValueError(f"layer {path!r} takes its statistics from the batch; optimize() needs running statistics")
    if kind in _NORMS:
        return Aten(path, "norm", args, out), False
    if kind in _MODULES:
        selects = kind is nn.MaxPool2d and not module.return_indices
        return Aten(path, "module", args, out, kwargs, selects), in_place
    raise _unsupported(node, f"layer {path!r}, a {kind.__name__}")


def _of_function(node: fx.Node, args: Any, kwargs: Any) -> tuple[Step | None, bool]:
    target, label = node.target, _label(node)
    if target == "contiguous" or (target is F.dropout and _dropout_is_off(args, kwargs)):
        return None, False
    kind = _KINDS.get(target)
    if kind is None:
        raise _unsupported(node, f"{label}()")
    if (kind in _ARITHMETIC and (kwargs or len(args) != 2)) or (kind == "getattr" and args[1] != "shape"):
        raise _unsupported(node, f"{label}() with {kwargs or args[1:]!r}")
    in_place = target in _IN_PLACE or bool(kwargs.get("inplace", False)) or (target is F.relu and args[1:] == (True,))
    selects = kind == "max_pool2d" and len(args) < 7 and not kwargs.get("return_indices", False)
    return Aten(node.name, kind, args, node.name, kwargs, selects), in_place


def _label(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _dropout_is_off(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("training", args[2] if len(args) > 2 else True) is False


def _geometry(node: fx.Node, conv: nn.Conv2d) -> Geometry:
    sizes = [conv.stride, conv.padding, conv.dilation]
    if conv.padding_mode != "zeros" or any(isinstance(v, str) or len(set(v)) != 1 for v in sizes):
        raise ValueError(
            f"layer {str(node.target)!r} (node {node.name!r}): optimize() takes convolutions whose stride, zero "
            f"padding and dilation are the same number for height and width, got {conv}"
        )
    stride, pad, dilation = (int(v[0]) for v in sizes)
    return Geometry(stride, pad, dilation, conv.groups)


def readers(steps: Iterable[Step], output: str) -> Counter[str]:
    """How many steps read each value; the caller reads the output."""
    count = Counter(name for step in steps for name in step.reads)
    count[output] += 1
    return count


def overwritable(steps: Sequence[Step], output: str) -> set[str]:
    """The convolutions, by what they write, that may write it over their residual: a step wrote that which always
    takes memory of its own, nothing may share it, and nobody reads it afterwards."""
    owned = {step.out for step in steps if not isinstance(step, Chain) and not _may_share(step)} - {output}
    for step in steps:
        if _may_share(step):
            owned -= set(step.reads)
    last = {name: step for step in steps for name in step.reads}
    found = (step for step in steps if isinstance(step, Conv) and step.residual in owned and step.x != step.residual)
    return {step.out for step in found if last[step.residual] is step}  # type: ignore[index]


def _may_share(step: Step) -> bool:
    """Whether what `step` writes may share the memory of what it reads."""
    return isinstance(step, Aten) and step.kind in (*_MAY_SHARE, "module") and not step.selects


def by_image(steps: Iterable[Step], model: nn.Module) -> bool:
    """Whether every step is known to treat each image of a batch by itself, so that a batch may be cut."""
    flat: set[str] = set()  # values that may have lost dimensions: then a number of one no longer tells which it is
    for step in steps:
        if not isinstance(step, Aten):
            if flat & set(step.reads):  # a residual that broadcasts
                return False
            continue
        layer = model.get_submodule(step.name) if step.kind in ("module", "norm") else None
        if not _by_image(step, model, layer, bool(flat & set(step.reads))):
            return False
        if step.kind in ("flatten", "mean") or isinstance(layer, nn.Flatten) or flat & set(step.reads):
            flat.add(step.out)
    return True


def _is_one_for_all(attr: Attr, model: nn.Module) -> bool:
    """Whether a tensor of the model, met by a batch of images, is the same for each of them."""
    owner, _, name = attr.path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), name)
    return tensor.dim() < 4 or (tensor.dim() == 4 and len(tensor) == 1)


def _by_image(step: Aten, model: nn.Module, layer: nn.Module | None, flat: bool) -> bool:
    attrs = [leaf for leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, Attr)]
    meets = step.kind in _ARITHMETIC and step.reads  # of a tensor of the model alone there is one, however many images
    if attrs and not (meets and all(_is_one_for_all(attr, model) for attr in attrs)):
        return False
    rest, named = step.args[1:], step.kwargs
    if isinstance(layer, nn.Flatten):
        return layer.start_dim > 0
    if layer is not None:
        images = isinstance(layer, (*_NORMS, *_BY_PIXELS)) and not flat
        return images or isinstance(layer, (nn.Linear, nn.BatchNorm1d, *_POINTWISE))
    if step.kind == "flatten":
        first = rest[0] if rest else named.get("start_dim", 0)
        return isinstance(first, int) and first > 0
    if step.kind == "mean":
        dims = [*leaves(rest[0] if rest else named.get("dim"))]
        return not flat and all(isinstance(dim, int) and dim > 0 for dim in dims)
    if step.kind in ("relu", "sigmoid"):
        return True
    return step.kind in (*_ARITHMETIC, "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d") and not flat


def borrows(steps: Iterable[Step], output: str) -> bool:
    """Whether `output` may be a view of the input or of a tensor of the model, with nothing computed on the way."""
    names = {INPUT}
    for step in steps:
        if isinstance(step, Aten) and step.kind in (*_MAY_SHARE, "module"):
            given = leaves((step.args, step.kwargs))
            if any(isinstance(each, Attr) or (isinstance(each, Value) and each.name in names) for each in given):
                names.add(step.out)
    return output in names


def fuse(steps: Sequence[Step], output: str, *, absorb: bool = True) -> list[Step]:
    """Merge BN, the addition of a residual and ReLU into the convolution before them, where nobody else reads it.

    absorb: the shift of a projection is added by the convolution that adds the projection. That saves a pass, but
    widens the range of what the projection writes.
    """
    uses = readers(steps, output)
    plan: dict[str, Step] = {}
    for step in steps:
        for old, new in _merges(step, plan, uses) if isinstance(step, Aten) else ():
            del plan[old]
            step = new
            break
        plan[step.writes[0]] = step  # a merged convolution moves to where its last part stood
    return _absorb_shifts(list(plan.values()), output) if absorb else list(plan.values())


def _merges(step: Aten, plan: Mapping[str, Step], uses: Counter[str]) -> Iterator[tuple[str, Conv]]:
    """The ways to merge `step`: (the value no longer written, the merged convolution)."""
    if step.kind not in ("norm", "relu", "add"):
        return
    for i, arg in enumerate(step.args):
        conv = plan.get(arg.name) if isinstance(arg, Value) and uses[arg.name] == 1 else None
        if not isinstance(conv, Conv) or conv.relu:
            continue
        if step.kind == "relu":
            yield conv.out, replace(conv, relu=True, out=step.out)
        elif step.kind == "norm":
            if conv.unit.norm is None and conv.residual is None:
                yield conv.out, replace(conv, unit=Unit(conv.name, step.name), out=step.out)
        elif conv.residual is None and isinstance(step.args[1 - i], Value) and step.args[1 - i] != arg:
            yield conv.out, replace(conv, residual=step.args[1 - i].name, out=step.out)


def _absorb_shifts(steps: list[Step], output: str) -> list[Step]:
    """conv(x) + b, added to another convolution's output as its residual: that one adds b, along with its own shift."""
    uses, plan = readers(steps, output), {step.writes[0]: step for step in steps}
    for step in steps:
        if isinstance(step, Conv) and step.residual is not None and uses[step.residual] == 1:
            projection = plan.get(step.residual)
            if isinstance(projection, Conv) and not projection.relu and projection.residual is None:
                if projection.filter[0] != step.filter[0]:
                    continue  # one of them broadcasts
                plan[projection.out] = replace(projection, bare=True)
                plan[step.out] = replace(step, absorbed=projection.unit)
    return list(plan.values())


def fuse_chains(steps: Sequence[Step], output: str) -> list[Step]:
    """Merge 3x3 -> 1x1 expand + residual -> next 1x1 reduce into a `Chain` wherever the three follow each other."""
    uses = readers(steps, output)
    plan = {step.writes[0]: step for step in steps}
    for reduce in steps:
        expand = plan.get(reduce.x) if isinstance(reduce, Conv) else None
        spatial = plan.get(expand.x) if isinstance(expand, Conv) else None
        if not (isinstance(reduce, Conv) and isinstance(expand, Conv) and isinstance(spatial, Conv)):
            continue
        if uses[spatial.out] == 1 and _chains(spatial, expand, reduce):
            del plan[spatial.out], plan[reduce.out]
            plan[expand.out] = Chain(spatial, expand, reduce)  # where the expansion stood: its residual is there
    return list(plan.values())


def _chains(spatial: Conv, expand: Conv, reduce: Conv) -> bool:
    c = spatial.filter[0]
    return (
        (spatial.filter, spatial.geometry) == ((c, 3, 3, c), Geometry(pad=1))
        and (expand.filter, expand.geometry) == ((4 * c, 1, 1, c), Geometry())
        and (reduce.filter, reduce.geometry) == ((c, 1, 1, 4 * c), Geometry())
        and spatial.residual is None
        and expand.residual is not None
        and reduce.residual is None
        and all(conv.relu and conv.quantised is None for conv in (spatial, expand, reduce))
    )


def quantise(
    steps: Sequence[Step], output: str, ranges: Mapping[str, tuple[float, float]], dtype: torch.dtype
) -> tuple[list[Step], str]:
    """The plan with convolutions in `dtype`, float8_e4m3fn or int8, and the name of its output.

    In int8 every convolution reads and writes 8 bits, and a max pool between two of them passes them on. In float8
    every ungrouped convolution but the net's first reads float8 and writes it where one reads it next. All else stays
    as it was, with a `Convert` between. ranges: the ends between which the numbers of each value lie.
    """
    grids = {name: grid(*ends, dtype) for name, ends in ranges.items()}
    first = next(step for step in steps if isinstance(step, Conv))
    eligible = {
        step.out
        for step in steps
        if isinstance(step, Conv) and (dtype != FLOAT8 or (step is not first and step.geometry.groups == 1))
        # what has no range is a number, or not an image, that broadcasts
        if all(name in grids for name in step.reads)
    }
    wanted = {name for step in steps if step.writes[0] in eligible for name in step.reads}
    small = wanted & eligible if dtype == FLOAT8 else set(eligible)  # stored in 8 bits by what computes them
    for step in steps:
        if (
            isinstance(step, Aten)
            and step.selects
            and dtype != FLOAT8
            and step.reads  # not of a tensor of the model
            and {*step.reads} <= small
            and step.out in wanted
        ):
            small.add(step.out)
            grids[step.out] = grids[step.reads[0]]
    plan: dict[str, Step] = {}
    suffix = "float8" if dtype == FLOAT8 else "int8"

    def narrow(name: str) -> str:
        if name in small:
            return name
        plan.setdefault(f"{name}:{suffix}", Convert(name, f"{name}:{suffix}", grids[name]))
        return f"{name}:{suffix}"

    def wide(name: str) -> str:
        if name not in small:
            return name
        plan.setdefault(f"{name}:wide", Convert(name, f"{name}:wide", grids[name], back=True))
        return f"{name}:wide"

    def widened(value: Any) -> Any:
        return Value(wide(value.name)) if isinstance(value, Value) else value

    for step in steps:
        if isinstance(step, Aten) and step.out not in small:
            step = replace(step, args=mapped(step.args, widened), kwargs=mapped(step.kwargs, widened))
        elif isinstance(step, Conv):
            take = narrow if step.out in eligible else wide
            if step.out in eligible:
                out = grids[step.out] if step.out in small else None
                residual = None if step.residual is None else grids[step.residual]
                step = replace(step, quantised=Quantised(grids[step.x], residual, out))
            step = replace(step, x=take(step.x), residual=None if step.residual is None else take(step.residual))
        plan[step.writes[0]] = step
    output = wide(output)
    return list(plan.values()), output
