"""Detect wrappers around a net (such as DataParallel) and compiled forms of a net, which have no modules any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

# Wrapper class -> attribute with the wrapped module. Classes are named, so that their packages need not be imported.
_INSIDE = {
    "OptimizedModule": "_orig_mod",  # what torch.compile returns
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "ModelEmaV2": "module",  # timm's
    "ModelEmaV3": "module",
}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
_EAGER = "{} of type {}, which has no Python modules; {} the original eager module"


def refuse_wrapper(model: Any, caller: str) -> None:
    """Raise TypeError if `model` or one of its layers is a wrapper or a compiled form, which `caller` can't look into.

    The message says what to pass instead. caller: the name of the function, for the message.
    """
    if not isinstance(model, nn.Module):
        known = type(model).__name__ == "ExportedProgram"
        it_is = _EAGER.format("it is", "ExportedProgram", caller)
        raise TypeError(f"{caller}() takes an nn.Module, got {type(model).__name__}{': ' + it_is if known else ''}")
    refuse_sharded(model, caller)
    for path, module in model.named_modules():
        it_is = f"layer {path!r} is" if path else "the model is"
        if found := _names(module) & _INSIDE.keys():
            kind, inside, where = min(found), module, "model"
            while found:  # a wrapper may contain another wrapper
                where += f".{_INSIDE[min(found)]}"
                inside = getattr(inside, _INSIDE[min(found)])
                found = _names(inside) & _INSIDE.keys()
            if path:
                advice = f"replace it by the module inside: {where.replace('model', 'layer', 1)}"
            else:
                advice = f"{caller} the module inside: {caller}({where})"
            raise TypeError(f"{it_is} a wrapper, {kind}; {advice}")
        if (form := compiled_form(module)) is not None:
            raise TypeError(_EAGER.format(it_is, form, caller))


def refuse_sharded(model: nn.Module, caller: str) -> None:
    """Raise TypeError if FSDP shards weights of `model`: a single process then can't read or copy them."""
    for module in model.modules():
        if found := _names(module) & _SHARDED:
            raise TypeError(
                f"{min(found)} spreads the weights over processes; load the full state_dict "
                f"(torch.distributed.checkpoint.state_dict) into an ordinary net and {caller} that"
            )


def _names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def compiled_form(module: nn.Module) -> str | None:
    """Return the kind of a compiled or exported program, which has no modules of the original net; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "ScriptModule"
    if type(module).__name__ == "UnflattenedModule":
        return "UnflattenedModule of torch.export"
    if isinstance(module, fx.GraphModule):
        operators = (node.target for node in module.graph.nodes if node.op == "call_function")
        if any(isinstance(target, torch._ops.OpOverload) for target in operators):
            return "graph of ATen operators (torch.export, make_fx)"
    return None
