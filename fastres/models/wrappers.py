"""What stands around a net: wrappers that call it, and forms of it that hold no modules any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

# Wrappers by class name, so that none has to be imported, and the attribute that holds the module inside.
_INSIDE = {
    "OptimizedModule": "_orig_mod",  # what torch.compile returns
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "ModelEmaV2": "module",  # timm's
    "ModelEmaV3": "module",
}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
_EAGER = "{} of type {}, which holds no modules of Python's; {} the original eager module"


def refuse_wrapper(model: Any, caller: str) -> None:
    """Raises TypeError where `model`, or a layer of it, wraps a net or is a form of one that `caller` can't look into,
    and says what to give instead."""
    if not isinstance(model, nn.Module):
        known = type(model).__name__ == "ExportedProgram"
        it_is = _EAGER.format("it is", "ExportedProgram", caller)
        raise TypeError(f"{caller}() takes an nn.Module, got {type(model).__name__}{': ' + it_is if known else ''}")
    refuse_sharded(model, caller)
    for path, module in model.named_modules():
        it_is = f"layer {path!r} is" if path else "the model is"
        if found := _names(module) & _INSIDE.keys():
            kind, inside, where = min(found), module, "model"
            while found:  # a wrapper may hold another one
                where += f".{_INSIDE[min(found)]}"
                inside = getattr(inside, _INSIDE[min(found)])
                found = _names(inside) & _INSIDE.keys()
            if path:
                advice = f"put the module inside in its place: {where.replace('model', 'layer', 1)}"
            else:
                advice = f"{caller} the module inside: {caller}({where})"
            raise TypeError(f"{it_is} a wrapper, {kind}; {advice}")
        if (form := compiled_form(module)) is not None:
            raise TypeError(_EAGER.format(it_is, form, caller))


def refuse_sharded(model: nn.Module, caller: str) -> None:
    """Raises TypeError where FSDP holds weights of `model`, which then can't be read or copied in one process."""
    for module in model.modules():
        if found := _names(module) & _SHARDED:
            raise TypeError(
                f"{min(found)} spreads the weights over processes; load the full state_dict "
                f"(torch.distributed.checkpoint.state_dict) into an ordinary net and {caller} that"
            )


def _names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def compiled_form(module: nn.Module) -> str | None:
    """What `module` is, where it is a program that was made of a net and has no modules left; None for other ones."""
    if isinstance(module, torch.jit.ScriptModule):
        return "ScriptModule"
    if type(module).__name__ == "UnflattenedModule":
        return "UnflattenedModule of torch.export"
    if isinstance(module, fx.GraphModule):
        operators = (node.target for node in module.graph.nodes if node.op == "call_function")
        if any(isinstance(target, torch._ops.OpOverload) for target in operators):
            return "graph of ATen operators (torch.export, make_fx)"
    return None
