"""Query Dynamo's graph: what a node calls, with which arguments, what it writes, and which nodes share memory."""

from __future__ import annotations

import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

CONV = (torch.conv2d, F.conv2d)
RELU = (F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
# In these modules a function's name (`relu_`) or arguments (`inplace`, `out`) show which tensors it writes into. The
# functions in `_SILENT` are exceptions: they update statistics, renormalise an embedding, observe, or draw noise.
_TELLING_MODULES = r"torch(\.functional|\.nn\.functional|\._C\._(nn|linalg|fft|special))?|_operator|builtins|math"
_SILENT = "batch_norm|instance_norm|embedding|fake_quant|moving_avg|rrelu_with_noise|_cum(max|min)_helper|^_fused|^_amp"
_IN_PLACE = {  # patterns of the names of in-place operations
    "call_function": r".*[^_]_",
    "call_method": r".*[^_]_|__i(?!nvert|ndex|nt)\w+__|__setitem__",
    "operator": "i(add|sub|mul|truediv|floordiv|mod|pow|matmul|and|or|xor|[lr]shift|concat)|(set|del)item",
}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameter names of `function` in order, each with its default, `Parameter.empty` if it has none."""
    return {parameter.name: parameter.default for parameter in inspect.signature(function).parameters.values()}


BN_ARGUMENTS = defaults(F.batch_norm)


def value(node: Any) -> Any:
    """Return the result that `node` had during tracing; None if it is unknown or `node` is not an fx.Node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def is_known_float(node: Any) -> bool:
    """Return whether `node` is a symbolic float whose value is known: with dynamic=True, one that a module holds."""
    return isinstance(number := value(node), torch.SymFloat) and number.node.has_hint()


def constant(number: Any) -> Any:
    """Return the value of a symbolic float, if it is known, and anything else as it is.

    Dynamo then guards on the value, as it does with stock backends for a float that an operator takes.
    """
    return float(value(number)) if is_known_float(number) else number


def arguments(node: fx.Node, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameter name -> the argument that `node` passes for it, or else its default.

    parameters: the parameter names of the node's function in order, each with its default.
    """
    return {**parameters, **dict(zip(parameters, node.args, strict=False)), **node.kwargs}


def argument(node: fx.Node, name: str) -> Any:
    """Return the argument that `node` passes for the parameter `name`.

    None if the node doesn't pass it, or if the node does not call a Python function.
    """
    if not inspect.isfunction(node.target):
        return None
    return arguments(node, dict.fromkeys(inspect.signature(node.target).parameters)).get(name)


def calls(node: Any, *targets: Any) -> bool:
    """Return whether `node` calls one of `targets`: functions, or names of methods."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def is_relu(node: Any) -> bool:
    return calls(node, *RELU) and len(node.args) > 0


def addends(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the two tensors that `node` adds; None if it is not a plain addition of two tensors."""
    return operands(node, *ADD)


def operands(node: Any, *targets: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the two tensors, its only arguments, on which `node` calls one of `targets`; None if there are none."""
    if not calls(node, *targets) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(value(a), Tensor) and isinstance(value(b), Tensor) else None


def only_user(node: Any) -> Any:
    """Return the node that reads `node`; None unless there is exactly one."""
    return next(iter(node.users)) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def module_name(node: fx.Node) -> str:
    """Return the path in the model of the module that `node` comes from; the node's name if there is no such module."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = re.sub(r"^L\['\w+'\](\.forward\.__self__)?\.?", "", list(stack.values())[-1][0])
    return re.sub(r"\._modules\['([^']*)'\]|\[['\"]?(\w+)['\"]?\]", r".\1\2", path) or node.name


def nodes_in(tree: Any) -> list[fx.Node]:
    """Return the nodes in nested arguments."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(tree, nodes.append)
    return nodes


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors `node` may write into.

    For PyTorch's own functions this follows from the name, an argument or the schema. Any other function, such as a
    higher-order operator or one allowed in the graph by the user, is assumed to write into all of its inputs.
    """
    target, name = node.target, target_name(node)
    if node.op in ("placeholder", "get_attr", "output") or not node.all_input_nodes:
        return []
    if calls(node, F.batch_norm):
        args = arguments(node, BN_ARGUMENTS)
        return [args[key] for key in ("running_mean", "running_var") if args["training"] and args[key] is not None]
    inputs = [each for each in node.all_input_nodes if each.op != "get_attr" or "example_value" in each.meta]
    if node.op == "call_function" and re.search(_SILENT, name):
        return inputs
    if isinstance(target, torch._ops.OpOverload):
        args = arguments(node, {each.name: None for each in target._schema.arguments})
        return nodes_in([args[each.name] for each in target._schema.arguments if each.is_write])
    module = getattr(target, "__module__", None) or ""
    if node.op != "call_method" and not (node.op == "call_function" and re.fullmatch(_TELLING_MODULES, module)):
        return inputs
    if re.fullmatch(_IN_PLACE["operator" if module == "_operator" else node.op], name) or argument(node, "inplace"):
        return nodes_in(node.args[:1] or node.kwargs)
    return nodes_in(node.kwargs.get("out"))


def storages(node: fx.Node) -> set[int] | None:
    """Return the ids of the storages of the tensors in the result of `node`; None if they are unknown."""
    try:
        tensors = [each for each in tree_leaves(node.meta["example_value"]) if isinstance(each, Tensor)]
        return {tensor.untyped_storage()._cdata for tensor in tensors}
    except (KeyError, NotImplementedError):  # no traced value, or a tensor without storage, such as a sparse one
        return None


def storage(node: Any) -> int | None:
    """Return the id of the storage of a tensor node; None if it is unknown or the node is not a single tensor."""
    memory = storages(node) if isinstance(value(node), Tensor) else None
    return memory.pop() if memory else None


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


class Memory:
    """Which storages of a graph are written into, and which are returned to the caller."""

    def __init__(self, graph: fx.Graph) -> None:
        targets = [storages(target) for node in graph.nodes for target in written_by(node)]
        self._written = {memory for target in targets if target is not None for memory in target}
        self._unknown = None in targets
        (output,) = graph.find_nodes(op="output")
        self._returned = Counter(map(storage, output.all_input_nodes))

    def is_observed(self, node: fx.Node) -> bool:
        """Return whether it matters which nodes share the memory of `node`.

        It does if that memory, or unknown memory, is written into, or if more than one result of the graph uses it.
        """
        memory = storage(node)
        return self._unknown or memory in self._written or self._returned[memory] > 1
