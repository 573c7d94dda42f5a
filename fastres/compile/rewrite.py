"""Replace the matches of `match` in a graph by fastres's operators."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fastres.compile.graph import is_known_float, value
from fastres.compile.layout import Layout
from fastres.compile.match import Finding, Match, Pair, search
from fastres.ops import ends
from fastres.ops.layout import wide
from fastres.ops.operators import conv_affine_act, conv_bn_act

_aten = torch.ops.aten
_pad_shortcut_add_relu = torch.ops.fastres.pad_shortcut_add_relu.default


def rewrite_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], *, always: bool) -> list[Finding]:
    """Rewrite `gm` in place. Return the findings about its matches and layers, in graph order."""
    graph, layout = gm.graph, Layout(gm.graph)
    matches, sums, findings = search(graph, example_inputs, always=always)
    replaced: set[fx.Node] = set()
    for match in matches:
        with graph.inserting_before(match.last):
            _put_operators(graph, match, layout)
        replaced.update(match.nodes, match.aside)
    for padded in sums:
        with graph.inserting_before(padded.relu):
            operands = layout.current(padded.y), layout.current(padded.x), padded.stride
            layout.replace(padded.relu, graph.call_function(_pad_shortcut_add_relu, operands))
        replaced.update((padded.relu, padded.add), padded.shortcut)
    for node in reversed(list(graph.nodes)):  # general dead-code elimination would also remove changes in place
        if not node.users and (node in replaced or (node.op == "call_method" and is_known_float(node))):
            graph.erase_node(node)
    layout.restore_where_it_matters()
    graph.lint()
    gm.recompile()
    return findings


def _put_operators(graph: fx.Graph, match: Match, layout: Layout) -> None:
    dtype = value(match.first).dtype
    x = layout.operand(match.x, dtype)
    residual = None if match.residual is None else layout.operand(match.residual, dtype)
    out = (_trained if match.trains else _inferred)(graph, match, x, residual)
    layout.gives_channels_last(layout.replace(match.last, out, dtype))


def _trained(graph: fx.Graph, match: Match, x: fx.Node, residual: fx.Node | None) -> fx.Node:
    """Insert one `conv_bn_act` for all pairs, and copy the running statistics that it returns into the model's."""
    pairs = match.pairs
    geometry = [size for pair in pairs for size in pair.geometry]
    eps, momenta = [pair.norm.eps for pair in pairs], [float(pair.norm.momentum) for pair in pairs]
    words = geometry, eps, momenta, [pair.norm.training for pair in pairs], match.end.word, list(match.end.sizes)
    parameters = [t for pair in pairs for t in (pair.weight, pair.norm.weight, _joint_bias(graph, pair))]
    running = [t for pair in pairs for t in pair.norm.running]
    results = graph.call_function(conv_bn_act, (x, parameters, running, residual, *words))
    out = graph.call_function(operator.getitem, (results, 0))
    if not match.moves:
        return out
    moved, at = graph.call_function(operator.getitem, (results, 1)), 0
    for pair in (pair for pair in pairs if pair.norm.training):
        for statistic, bias in zip(pair.norm.running, (pair.bias, None), strict=True):
            if statistic is None:
                continue
            size = value(statistic).numel()
            new = graph.call_function(_aten.slice.Tensor, (moved, 0, at, at + size))
            if bias is not None:  # the operator's batch mean does not include the convolution's bias
                bias = graph.call_function(_aten.detach.default, (bias,))
                new = graph.call_function(_aten.add.Tensor, (new, bias), {"alpha": pair.norm.momentum})
            graph.call_function(_aten.copy_.default, (statistic, new))
            at += size
    return out


def _joint_bias(graph: fx.Graph, pair: Pair) -> fx.Node | None:
    """Return the BatchNorm's bias with the convolution's bias b folded in: bias + scale b.

    With batch statistics b cancels, because the batch mean contains it. Then scale is 0. Adding 0 b gives b a gradient
    of exactly 0 (in eager it is rounding error around 0) and still propagates a NaN or infinity in b.
    """
    if pair.bias is None:
        return pair.norm.bias
    scale = 0.0 if pair.norm.training else _scale(graph, pair)
    share = graph.call_function(_aten.mul.Scalar if pair.norm.training else _aten.mul.Tensor, (pair.bias, scale))
    return share if pair.norm.bias is None else graph.call_function(_aten.add.Tensor, (pair.norm.bias, share))


def _inferred(graph: fx.Graph, match: Match, x: fx.Node, residual: fx.Node | None) -> fx.Node:
    """Insert one `conv_affine_act` for each pair, with the BatchNorm as scale and shift in the epilogue.

    Scale and shift are computed in the graph. They become constants if Inductor freezes the weights.
    """

    def step(pair: Pair, a: fx.Node, added: fx.Node | None, relu: bool) -> fx.Node:
        scale, shift = _scale_shift(graph, pair)
        return graph.call_function(conv_affine_act, (a, pair.weight, scale, shift, added, pair.geometry, relu))

    main, a = match.pairs, x
    if match.end.projects:
        *main, projection = main
        residual = step(projection, x, None, relu=False)
    elif isinstance(match.end, ends.Add):
        residual = x
    for pair in main[:-1]:
        a = step(pair, a, None, relu=True)
    if isinstance(match.end, ends.Pad):
        return graph.call_function(_pad_shortcut_add_relu, (step(main[-1], a, None, relu=False), x, match.end.stride))
    return step(main[-1], a, residual, relu=not isinstance(match.end, ends.Linear))


def _widened(graph: fx.Graph, pair: Pair, node: Any) -> fx.Node:
    """Return `node` upcast to float32 (float64 for a float64 convolution)."""
    dtype = wide(value(pair.conv).dtype)
    return node if value(node).dtype == dtype else graph.call_function(_aten.to.dtype, (node, dtype))


def _scale(graph: fx.Graph, pair: Pair) -> fx.Node:
    """Return scale = weight / sqrt(running_var + eps) in float32 (float64 for a float64 convolution)."""
    shifted = graph.call_function(_aten.add.Scalar, (_widened(graph, pair, pair.norm.running[1]), pair.norm.eps))
    rstd = graph.call_function(_aten.rsqrt.default, (shifted,))
    if pair.norm.weight is None:
        return rstd
    return graph.call_function(_aten.mul.Tensor, (rstd, _widened(graph, pair, pair.norm.weight)))


def _scale_shift(graph: fx.Graph, pair: Pair) -> tuple[fx.Node, fx.Node]:
    """Return `_scale` and shift = bias - (running_mean - conv's bias) scale."""
    scale, mean = _scale(graph, pair), _widened(graph, pair, pair.norm.running[0])
    if pair.bias is not None:
        mean = graph.call_function(_aten.sub.Tensor, (mean, _widened(graph, pair, pair.bias)))
    product = graph.call_function(_aten.mul.Tensor, (mean, scale))
    if pair.norm.bias is None:
        return scale, graph.call_function(_aten.neg.default, (product,))
    return scale, graph.call_function(_aten.sub.Tensor, (_widened(graph, pair, pair.norm.bias), product))
