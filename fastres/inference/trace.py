"""`trace`: turn a model into the steps of a plan, from the graph that torch.fx records."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import type_before_parametrizations
from torchvision.ops import FrozenBatchNorm2d

from fastres.inference.plan import (
    ARITHMETIC,
    FUNCTIONS,
    INPUT,
    LAYERS,
    NORMS,
    SIZES,
    SPELLINGS,
    VIEWS,
    Aten,
    Conv,
    ModelTensor,
    Outputs,
    Pair,
    Place,
    Step,
    Value,
    leaves,
    mapped,
)
from fastres.ops import eligibility
from fastres.ops.layout import Geometry
from fastres.ops.shortcut import PadShortcut

_ABSENT = (nn.Identity, _DropoutNd)  # layers that do nothing in eval mode
_IN_PLACE = (
    *("relu_", "add_", "mul_", "sub_", "div_"),
    *(operator.iadd, operator.imul, operator.isub, operator.itruediv, torch.relu_),
)
_ACCEPTED = (
    "Conv2d, BatchNorm2d, ReLU, additions, "
    + ", ".join(kind.__name__ for kind in LAYERS)
    + ", Identity, dropout, and the functions "
    + ", ".join(sorted(FUNCTIONS))
)


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, operand: self.tracer.create_proxy("call_function", function, (self, operand), {})


class _Proxy(fx.Proxy):
    """A proxy that records x += y as in-place. torch.fx would record x = x + y, which is wrong if x has an alias."""

    __iadd__, __imul__ = _in_place(operator.iadd), _in_place(operator.imul)
    __isub__, __itruediv__ = _in_place(operator.isub), _in_place(operator.itruediv)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # record operations on buffers; otherwise they would run once, during the trace

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Return a function that calls the model on placeholders for its arguments without defaults, and these.

        torch.fx's own function would lose the types of the containers in the result; this one keeps it in `returned`.
        """
        image, *options = inspect.signature(self.root.forward).parameters.values()
        if image.kind is image.VAR_POSITIONAL:
            raise TypeError(f"forward takes *{image.name}")
        unfilled = [
            each.name
            for each in options
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]

        def call(model: nn.Module, x: fx.Proxy, *others: fx.Proxy) -> list[fx.Proxy]:
            self.returned = model.forward(x, **dict(zip(unfilled, others, strict=True)))
            return [leaf for leaf in leaves(self.returned) if isinstance(leaf, fx.Proxy)]

        placeholders = [self.create_proxy("placeholder", name, (), {}) for name in (image.name, *unfilled)]
        return call, [self.root, *placeholders]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in (PadShortcut, FrozenBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[list[Step], Outputs]:
    """Return the unmerged steps of `model`, which is in eval mode, and what it returns.

    The model's code runs without gradients, with a proxy as its first argument and the defaults of all other arguments.
    It may store proxies in the model, so pass a copy. Raises ValueError, with the name of the node or layer, for
    anything that a plan can't represent: hooks, control flow that depends on tensors, an unsupported operation, more
    than one input, results other than tensors and constants in dicts, lists and tuples, number or string attributes
    that a call changes, and tensors that are neither parameters nor buffers.
    """
    _refuse_hooks(model)
    before = _plain_attributes(model)
    tracer = _Tracer()
    try:
        with torch.no_grad():
            graph = tracer.trace(model)
    except Exception as error:  # the model's own code may raise anything on proxies
        reason = str(error).split(". ")[0]  # the first sentence; torch.fx adds long advice about proxies
        raise ValueError(
            "optimize() requires a model with one input tensor that torch.fx can trace; tracing "
            f"{type(model).__name__} failed ({reason}). In a detector, optimize the backbone: model.backbone = "
            "fastres.optimize(model.backbone). To run a ResNet inside any model on fused kernels, use "
            "fastres.convert(model)"
        ) from error
    if changed := before.items() - _plain_attributes(model).items():
        (path, name), _ = min(changed, key=repr)
        raise ValueError(f"{_layer(path)} changes its attribute {name!r} when it is called; a plan can't do that")
    translation = _Translation(model, graph)
    for node in graph.nodes:
        translation.translate(node)
    outputs = translation.outputs(tracer.returned)  # may add steps
    return translation.steps, outputs


def _layer(path: str) -> str:
    return f"layer {path!r}" if path else "the model"


def refuse_training(model: nn.Module) -> None:
    """Raise ValueError, with the name of the layer, if `model` or a part of it is in training mode."""
    training = [(path, module) for path, module in model.named_modules() if module.training]
    if training:
        path, module = next((p for p in training if isinstance(p[1], _BatchNorm)), training[0])
        raise ValueError(
            f"optimize() freezes a net for inference, but {_layer(path)} ({type(module).__name__}) is in training "
            "mode; call model.eval() after the last change to the model: modules that are added later start in "
            "training mode, parametrizations too"
        )


def _refuse_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if eligibility.has_hooks(module):
            raise ValueError(
                f"{_layer(path)} has a hook or a replaced forward, which a plan would never call; remove it first"
            )
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule):
            raise ValueError(
                f"{_layer(path)} ({type(module).__name__}) overrides __call__, which a plan would never call; "
                "move its code to forward"
            )
    if nn.modules.module._has_any_global_hook():
        raise ValueError("a global hook for all modules is registered, which a plan would never call; remove it first")


def _plain_attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the number and string attributes of all modules, keyed by (path of the module, attribute name)."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str))
    }


def _unsupported(node: fx.Node, what: str) -> ValueError:
    return ValueError(f"optimize() does not support {what} (node {node.name!r}); it accepts {_ACCEPTED}")


class _Translation:
    """Translates the nodes of a graph to steps, in order.

    A step always writes a new value, so in-place operations are translated by renaming: from there on, all nodes that
    are the changed tensor itself mean the new value. A node that only shares memory with the tensor, as a view does,
    still means the old value, so it is an error if such a node is read later. `reshape` counts as a view, because
    whether it copies depends on the memory format.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.meaning: dict[fx.Node, Any] = {}  # node -> the Value, ModelTensor or number that it means
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._tensors = {name for name, _ in tensors}
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._names: dict[fx.Node, set[fx.Node]] = {}  # node -> nodes that are the same tensor; no entry for numbers
        self._memory: dict[fx.Node, set[fx.Node]] = {}  # node -> nodes that may share its memory

    def translate(self, node: fx.Node) -> None:
        """Append the step of `node`, if it needs one, and set its entry in `meaning`."""
        if node.op == "output":
            return
        args, kwargs = (
            mapped(tree, lambda v: self.meaning[v] if isinstance(v, fx.Node) else v)
            for tree in (node.args, node.kwargs)
        )
        if node.op == "placeholder":
            if Value(INPUT) not in self.meaning.values():
                self.meaning[node] = Value(INPUT)
            elif node.users:
                raise ValueError(f"optimize() requires a model with one input, this model also reads {node.target!r}")
            self._is_new(node)
        elif node.op == "get_attr":
            if node.target not in self._tensors:
                raise _unsupported(
                    node, "a tensor that is neither a parameter nor a buffer (see Module.register_buffer)"
                )
            self.meaning[node] = ModelTensor(str(node.target))
            self._is_new(node)
        else:
            self._append(node, args, kwargs)

    def outputs(self, returned: Any) -> Outputs:
        """Return what the model returns, given its result on proxies. All nodes must have been translated."""
        found: list[set[fx.Node]] = []  # the nodes that are the same tensor, for each tensor

        def placed(leaf: Any) -> Any:
            if isinstance(leaf, fx.Proxy) and leaf.node in self._names:
                same = self._names[leaf.node]
                if same not in found:
                    found.append(same)
                return Place(found.index(same))
            if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                what = "a size or number computed from tensors" if isinstance(leaf, fx.Proxy) else type(leaf).__name__
                raise self._refusal(what)
            return leaf

        structure = mapped(returned, placed)
        if not found:
            raise self._refusal("no tensor")
        return Outputs(tuple(self._output(min(same, key=self._position.__getitem__)) for same in found), structure)

    def _refusal(self, what: str) -> ValueError:
        return ValueError(
            "optimize() requires a model that returns a tensor, or dicts, lists and tuples of tensors (other items may "
            f"be None, numbers and strings); {type(self.model).__name__} returns {what}"
        )

    def _output(self, node: fx.Node) -> str:
        """Return the name of the value that `node` means; for a tensor of the model, append a step that returns it."""
        meaning = self.meaning[node]
        if isinstance(meaning, ModelTensor):
            self.steps.append(Aten(meaning.path, "getitem", (meaning, ...), node.name))
            return node.name
        return str(meaning.name)

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
        self.meaning[node] = args[0] if step is None else Value(node.name)
        tensors = [read for read in node.all_input_nodes if read in self._names]
        if kind in SIZES or not tensors:
            return
        operand = tensors[0]
        if in_place and operand in (*node.args[:1], node.kwargs.get("input")):
            self._write_into(node, operand)
        elif step is None and node.target != "contiguous":
            self._is_same(node, operand)
        else:
            self._is_new(node)
            if step is None or kind in (*VIEWS, nn.Flatten, PadShortcut):
                self._may_share(node, tensors)

    def _is_new(self, node: fx.Node) -> None:
        self._names[node], self._memory[node] = {node}, {node}

    def _is_same(self, node: fx.Node, tensor: fx.Node) -> None:
        self._names[node], self._memory[node] = self._names[tensor], self._memory[tensor]
        self._names[node].add(node)
        self._memory[node].add(node)

    def _may_share(self, node: fx.Node, tensors: Iterable[fx.Node]) -> None:
        memory = self._memory[node].union(*(self._memory[tensor] for tensor in tensors))
        self._memory |= dict.fromkeys(memory, memory)

    def _write_into(self, node: fx.Node, operand: fx.Node) -> None:
        """Record that `node` changes `operand` in place.

        Raises ValueError if that also changes a tensor of the model, or a view that is read later.
        """
        for sharer in self._memory[operand]:
            if sharer.op == "get_attr":
                raise _unsupported(node, f"{_label(node)}() that writes into the model's own {sharer.target!r}")
        for sharer in self._memory[operand] - self._names[operand]:
            if any(self._position[user] > self._position[node] for user in sharer.users):
                why = f"{sharer.name!r} may share its memory and is read later"
                raise _unsupported(node, f"{_label(node)}() that writes into {operand.name!r}: {why}")
        self._is_same(node, operand)
        self.meaning |= dict.fromkeys(self._names[operand], Value(node.name))


def _of_module(node: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> tuple[Step | None, bool]:
    """Return the step of a call of `module` (None if it does nothing) and whether it works in place."""
    kind, path, out = type_before_parametrizations(module), str(node.target), node.name
    if not args:
        raise _unsupported(node, f"layer {path!r} called with keyword arguments only")
    if issubclass(kind, _ABSENT):
        return None, False
    if kind is nn.Conv2d:
        if not isinstance(args[0], Value):
            raise _unsupported(node, "a convolution of a constant")
        k, c, r, s = module.weight.shape  # type: ignore[misc]
        geometry = _geometry(node, module)  # type: ignore[arg-type]
        return Conv(Pair(path), args[0].name, out, geometry, (k, r, s, c)), False
    in_place = bool(getattr(module, "inplace", False))
    if kind is nn.ReLU:
        return Aten(path, "relu", args, out), in_place
    if kind in (*NORMS, nn.BatchNorm1d) and module.running_mean is None:
        raise ValueError(f"layer {path!r} uses batch statistics; optimize() requires running statistics")
    if kind in NORMS:
        return Aten(path, "norm", args, out), False
    if kind in LAYERS:
        selects = kind is nn.MaxPool2d and not module.return_indices
        return Aten(path, "module", args, out, kwargs, selects), in_place
    raise _unsupported(node, f"layer {path!r}, a {kind.__name__}")


def _of_function(node: fx.Node, args: Any, kwargs: Any) -> tuple[Step | None, bool]:
    """Return the step of a call of a function or method (None if it does nothing) and whether it works in place."""
    target, label = node.target, _label(node)
    if target == "contiguous" or (target is F.dropout and _dropout_is_off(args, kwargs)):
        return None, False
    kind = SPELLINGS.get(target)
    if kind is None:
        raise _unsupported(node, f"{label}()")
    odd = (kind in ARITHMETIC and (kwargs or len(args) != 2)) or (kind == "getattr" and args[1] != "shape")
    if odd or kwargs.get("out") is not None:
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
            f"layer {str(node.target)!r} (node {node.name!r}): optimize() requires convolutions whose stride, zero "
            f"padding and dilation are the same number for height and width, got {conv}"
        )
    stride, pad, dilation = (int(v[0]) for v in sizes)
    return Geometry(stride, pad, dilation, conv.groups)
