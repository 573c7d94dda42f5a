"""Reading Dynamo's graph: what its nodes call, with which arguments, what they write, and whose memory is whose."""

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
# Modules whose functions write into nothing but what their names (`relu_`) or arguments (`inplace`, `out`) tell; and
# names of the exceptions, which move statistics, renormalise a table, observe or draw noise.
_TELLING_MODULES = r"torch(\.functional|\.nn\.functional|\._C\._(nn|linalg|fft|special))?|_operator|builtins|math"
_SILENT = "batch_norm|instance_norm|embedding|fake_quant|moving_avg|rrelu_with_noise|_cum(max|min)_helper|^_fused|^_amp"
_IN_PLACE = {  # how names tell it
    "call_function": r".*[^_]_",
    "call_method": r".*[^_]_|__i(?!nvert|ndex|nt)\w+__|__setitem__",
    "operator": "i(add|sub|mul|truediv|floordiv|mod|pow|matmul|and|or|xor|[lr]shift|concat)|(set|del)item",
}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The names of its parameters, each with its default."""
    return {parameter.name: parameter.default for parameter in inspect.signature(function).parameters.values()}


BN_ARGUMENTS = defaults(F.batch_norm)


def value(node: Any) -> Any:
    """What `node` gave when the graph was traced; None where that isn't known, or `node` is none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def arguments(node: fx.Node, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What `node` gives its function's parameters. parameters: their names in order, each with its default."""
    return {**parameters, **dict(zip(parameters, node.args, strict=False)), **node.kwargs}


def argument(node: fx.Node, name: str) -> Any:
    """What `node` gives the parameter `name` of a Python function; None where that is left to its default."""
    if not inspect.isfunction(node.target):
        return None
    return arguments(node, dict.fromkeys(inspect.signature(node.target).parameters)).get(name)


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of them: functions, or methods by their names."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def is_relu(node: Any) -> bool:
    return calls(node, *RELU) and len(node.args) > 0


def addends(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that `node` adds, if it does and nothing else."""
    if not calls(node, *ADD) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(value(a), Tensor) and isinstance(value(b), Tensor) else None


def only_user(node: Any) -> Any:
    """The only node that reads `node`; None where there are more or none."""
    return next(iter(node.users)) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def module_name(node: fx.Node) -> str:
    """The module that `node` comes from, as the model names it; where there is none, the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = re.sub(r"^L\['\w+'\](\.forward\.__self__)?\.?", "", list(stack.values())[-1][0])
    return re.sub(r"\._modules\['([^']*)'\]|\[['\"]?(\w+)['\"]?\]", r".\1\2", path) or node.name


def nodes_in(tree: Any) -> list[fx.Node]:
    """The nodes in nested arguments."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(tree, nodes.append)
    return nodes


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that `node` may write into. PyTorch's own functions say so by name, argument or schema; of anything
    else (higher-order operators, functions that a graph was allowed to hold) it is presumed of all it is given."""
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
    """The memory of the tensors that `node` stands for; None where it isn't known."""
    try:
        tensors = [each for each in tree_leaves(node.meta["example_value"]) if isinstance(each, Tensor)]
        return {tensor.untyped_storage()._cdata for tensor in tensors}
    except (KeyError, NotImplementedError):  # not traced; or such as a sparse tensor
        return None


def storage(node: Any) -> int | None:
    """The memory of a tensor; None where it has none of its own, or isn't known."""
    memory = storages(node) if isinstance(value(node), Tensor) else None
    return memory.pop() if memory else None


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


class Memory:
    """What of a graph's memory is written into, and what the caller gets of it."""

    def __init__(self, graph: fx.Graph) -> None:
        targets = [storages(target) for node in graph.nodes for target in written_by(node)]
        self._written = {memory for target in targets if target is not None for memory in target}
        self._unknown = None in targets
        (output,) = graph.find_nodes(op="output")
        self._returned = Counter(map(storage, output.all_input_nodes))

    def is_observed(self, node: fx.Node) -> bool:
        """Whether it can be told from outside, or by a later reader, who shares the memory of `node`."""
        memory = storage(node)
        return self._unknown or memory in self._written or self._returned[memory] > 1
