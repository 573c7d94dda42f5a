"""`explain`: report what the compile backend would rewrite in a model, without compiling it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.compile.graph import value
from fastres.compile.match import Finding, search
from fastres.models.wrappers import refuse_sharded
from fastres.ops import dispatch


@dataclass(frozen=True)
class Explanation:
    """What the backend "fastres" rewrites in a model and what it leaves. `str()` gives a table."""

    findings: tuple[Finding, ...]  # in the order of the graphs
    graphs: int  # number of graphs that Dynamo makes of the model
    graph_breaks: Mapping[str, int] = field(default_factory=dict)  # reason -> number of breaks
    here: str | None = None  # why nothing is rewritten on this device; None if the backend does rewrite here

    @property
    def hits(self) -> tuple[Finding, ...]:
        """The findings that are rewritten."""
        return tuple(finding for finding in self.findings if finding.hit)

    @property
    def misses(self) -> tuple[Finding, ...]:
        """The findings that stay as they are."""
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
    """Return what `torch.compile(model, backend="fastres")` would rewrite, what it would leave, and why.

    example, kwargs: the arguments of one call of the model, for example images [N, C, H, W]. A copy of the model runs
    once with them, uncompiled, in the model's present mode (training or eval) and in the caller's grad and autocast
    modes. The model is not changed.

    Returns an `Explanation`: `print(explain(model, images))` shows a table with one line for each match or layer. The
    matches are those of "fastres.rewrite"="always"; `here` says why the default "auto" rewrites none of them on this
    device.

    Raises TypeError if `model` is not an `nn.Module` or is sharded by FSDP.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain() takes an nn.Module, got {type(model).__name__}")
    refuse_sharded(model, "explain")
    twin = copy.deepcopy(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return twin(*args, **kwargs)

    # Dynamo caches compiled code by code object. With a new code object nothing is cached from an earlier explanation.
    call.__code__ = call.__code__.replace()
    from torch._dynamo.utils import counters

    graphs: list[fx.GraphModule] = []
    findings: list[Finding] = []
    refusals: list[str | None] = []  # one for each graph that computes in floating point

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        tensors = [v for v in map(value, gm.graph.nodes) if isinstance(v, Tensor) and v.is_floating_point()]
        refusals.extend(dispatch.why_unfused(v.dtype, v.device) for v in tensors[:1])
        findings.extend(search(gm.graph, inputs, always=True)[-1])
        return gm.forward

    before = Counter(counters["graph_break"])
    torch.compile(call, backend=record)(*example, **kwargs)
    breaks = Counter(counters["graph_break"]) - before
    return Explanation(tuple(findings), len(graphs), dict(breaks), next(iter(refusals), None))
