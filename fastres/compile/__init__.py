"""`torch.compile(model, backend="fastres")`, and `explain(model, example)`: what that backend makes of a net.

In Dynamo's torch-level graph, where `conv2d`, `batch_norm` and `relu` are still whole, matches of the pattern

    conv -> BN [-> ReLU -> conv -> BN]... [-> + residual] [-> ReLU] [-> max pool]

and option-A shortcuts become the operators of `fastres.ops.operators` and `fastres.ops.shortcut`; the rest goes to
Inductor. Only operators are inserted, so that AOTAutograd's and Inductor's caches know the graph. What can't be matched
stays as it is, and `explain` gives the reason. BN -> ReLU and add -> ReLU alone are Inductor's (`operators` says why).
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
        _log.info("%s", Explanation(tuple(rewrite_graph(gm, example_inputs, always=when == "always")), 1))
    if inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)(gm, example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(inner)(gm, list(example_inputs))
