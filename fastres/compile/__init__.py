"""The backend of `torch.compile(model, backend="fastres")`, and `explain`, which shows what the backend rewrites.

The backend works on Dynamo's torch-level graph, where `conv2d`, `batch_norm` and `relu` are still single nodes. Matches
of the pattern

    conv -> BN [-> ReLU -> conv -> BN]... [-> + residual -> ReLU | -> ReLU [-> max pool]]

where BN is one such node or the arithmetic of a frozen BatchNorm (`norms`), become operators of
`fastres.ops.operators`, and relu(y + option-A shortcut) becomes an operator of `fastres.ops.shortcut`. All other nodes
go to Inductor unchanged, and `explain` gives the reason. BN -> ReLU and add -> ReLU without a convolution also stay,
because Inductor makes the same passes over memory. Only registered operators (ATen's and fastres's) are inserted, so
that AOTAutograd and Inductor can cache the compiled graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fastres.compile.explanation import Explanation, explain
from fastres.compile.match import Finding
from fastres.compile.rewrite import rewrite_graph

__all__ = ["REWRITES", "Explanation", "Finding", "backend", "explain"]

_log = logging.getLogger(__name__)

REWRITES = {
    "auto": "where fastres's kernels run: on supported GPUs, or as `fastres.backend` forces while compiling",
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
    """Rewrite one Dynamo graph and compile it. `torch.compile(..., backend="fastres")` calls this for each graph.

    Returns the compiled function. It computes what `gm` computes, up to rounding.

    mode, options: as for Inductor, with two more options. "fastres.rewrite" is a key of `REWRITES` (default "auto").
    "fastres.inner" is the name of the backend that compiles the rewritten graph (default "inductor"); another backend
    accepts no options and no mode but "default".

    Raises ValueError for an unknown value of "fastres.rewrite", for any other option "fastres.*", and for mode or
    options with another inner backend.
    """
    options = dict(options or {})
    when, inner = options.pop("fastres.rewrite", "auto"), options.pop("fastres.inner", "inductor")
    unknown = [name for name in options if name.startswith("fastres.")]
    if unknown or when not in REWRITES:
        accepted = f"fastres.rewrite ({', '.join(REWRITES)}), fastres.inner (the name of a backend)"
        raise ValueError(f"unknown option {', '.join(unknown) or f'fastres.rewrite={when!r}'}; accepted: {accepted}")
    if inner != "inductor" and (options or mode not in (None, "default")):
        raise ValueError(f"mode and options are for Inductor only; fastres.inner={inner!r} accepts neither")
    if when != "never":
        _log.info("%s", Explanation(tuple(rewrite_graph(gm, example_inputs, always=when == "always")), 1))
    if inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(gm, list(example_inputs))
