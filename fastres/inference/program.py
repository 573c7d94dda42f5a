"""A plan bound to engines for one input shape, and how it runs: step by step, replayed as a CUDA graph, or compiled by
TorchScript."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres.inference.plan import (
    FUNCTIONS,
    INPUT,
    Aten,
    Chain,
    Conv,
    Convert,
    ModelTensor,
    Step,
    Value,
    borrows,
    mapped,
    overwritable,
    readers,
    unchained,
)
from fastres.ops import dispatch, eligibility, folded, onednn, quantised, reference
from fastres.ops.layout import nchw, nhwc
from fastres.ops.quantised import FLOAT8, Quantised
from fastres.ops.shortcut import PadShortcut

# How far the answer of a oneDNN graph may be from that of the steps, relative: roundings, no more.
_GRAPH_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
_GRAPH_LAYERS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, PadShortcut)
_GRAPH_FUNCTIONS = ("relu", "flatten", "mean", "max_pool2d", "adaptive_avg_pool2d")


@dataclass
class Bound:
    """A step with what computes it. call: the values it reads -> those it writes; shape and bytes are of the first of
    these; dies: values nobody reads later."""

    step: Step
    engine: str
    why: str
    call: Callable[..., Sequence[Any]]
    shape: tuple[int, ...] = ()
    bytes: int = 0
    dies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.reads, self.writes = self.step.reads, self.step.writes  # which a step computes each time


class Compiled(NamedTuple):
    """The first `steps` steps of a program as TorchScript: x [N, H, W, C] -> the value `writes`."""

    call: Callable[[Tensor], Tensor]
    steps: int
    writes: str
    form: str


class Program:
    """A plan bound to engines for one input shape; on a GPU also its CUDA graph with the static input and output, on a
    CPU also what TorchScript compiled of it.

    `run` keeps nothing between calls and may run in several threads at once; `replay` may not.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        output: str,
        weights: Mapping[str, folded.Folded],
        layers: Mapping[str, Any],
        dtype: torch.dtype,
        packings: onednn.Packings | None = None,
    ) -> None:
        """packings: what programs of the same weights share."""
        self.steps, self.output, self.dtype = steps, output, dtype
        self.weights, self.layers, self.packings = weights, layers, packings or onednn.Packings()
        self.unchained = unchained(steps)
        self.borrows = borrows(steps, output)
        self.overwritable = overwritable(self.unchained, output)
        self.bound: list[Bound] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled: Compiled | None = None
        self.why_not_compiled: str | None = None
        self.calls, self.specialised = 0, False
        self.shares_packings = False  # of int8 weights, made for another number of images

    def bind(self, x: Tensor) -> Tensor:
        """Choose every step's engine while computing the answer to x [N, H, W, C]."""
        unread = readers(self.unchained, self.output)
        values: dict[str, Any] = {INPUT: x}
        for step in self.steps:
            for bound in self._bind(step, values):
                for single in unchained([bound.step]):
                    unread.subtract(single.reads)
                bound.dies = tuple(name for name in values if unread[name] <= 0)
                self.bound.append(bound)
                for name in bound.dies:
                    del values[name]
        return self._answer(values[self.output])

    def run(self, x: Tensor, observer: Callable[[str, Any], None] | None = None) -> Tensor:
        """The answer to x [N, H, W, C]. observer: shown every value by name, while steps compute them one by one; later
        ones may overwrite it."""
        if self.compiled is not None and observer is None:
            return self._run_compiled(self.compiled, x)
        if observer is not None:
            observer(INPUT, x)
        return self._answer(self._run_steps({INPUT: x}, self.bound, self.output, observer))

    def _run_steps(
        self,
        values: dict[str, Any],
        steps: Sequence[Bound],
        wanted: str,
        observer: Callable[[str, Any], None] | None = None,
    ) -> Any:
        """The value `wanted`, from `values` by `steps`."""
        for bound in steps:
            for name, value in zip(bound.writes, bound.call(*map(values.get, bound.reads)), strict=True):
                values[name] = value
                if observer is not None:
                    observer(name, value)
            for name in bound.dies:
                values.pop(name, None)
        return values[wanted]

    def most_bytes(self) -> int:
        """What the values that are alive at once occupy at most, the input left out."""
        alive: dict[str, int] = {}
        most = 0
        for bound in self.bound:
            alive[bound.writes[0]] = bound.bytes
            most = max(most, sum(alive.values()))
            for name in bound.dies:
                alive.pop(name, None)
        return most

    def _answer(self, value: Any) -> Tensor:
        """`value` [N, H, W, C] as the caller's own, [N, C, H, W]: what the caller writes into it must reach neither the
        input nor the model's tensors."""
        answer = nchw(value) if value.dim() == 4 else value
        return answer.clone() if self.borrows else answer

    def specialise(self, x: Tensor, script: bool) -> None:
        """Do once what pays off only for a shape that comes back, that of x [N, H, W, C]: pack int8 weights for it
        alone, and let TorchScript compile the steps where `script`."""
        self.specialised = True
        if self.shares_packings:
            for bound in self.bound:
                if isinstance(bound.call, quantised.ByOneDNN):
                    bound.call = bound.call.another()
            self.shares_packings = False
        if script:
            self._compile(x)

    def _compile(self, x: Tensor) -> None:
        """Have later calls of `run` go through TorchScript, as a oneDNN graph or, in int8, step after step. It is used
        only if it answers x [N, H, W, C] as the steps do and is faster than they are."""
        int8 = [bound.call for bound in self.bound if isinstance(bound.call, quantised.ByOneDNN)]
        refusal = dispatch.why_not_scripted(torch.int8 if int8 else self.dtype)
        if refusal is None and any(not bound.engine.startswith(("onednn", "aten")) for bound in self.bound):
            refusal = "other engines are in the plan"
        if refusal is None and not int8:
            refusal = next((why for step in self.unchained if (why := self._why_no_graph(step)) is not None), None)
        if any(conv.copies for conv in int8):  # TorchScript isn't told that a copy will be written to
            refusal = "a residual is read again"
        if refusal is None:
            want = self.run(x)
            try:
                compiled = self._script_steps(x, int8) if int8 else self._script_graph(x)
                refusal = self._why_steps_serve(compiled, x, want, 0.0 if int8 else _GRAPH_DIFFERENCE[self.dtype])
            except Exception as error:  # whatever a compiler raises, the steps serve
                refusal = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
        if refusal is None:
            self.compiled = compiled
        else:
            self.why_not_compiled = refusal

    def _why_no_graph(self, step: Step) -> str | None:
        """The graph compiler gets what ResNets consist of and nothing else: of y + bn(y), where y is a convolution's
        output, it never returns."""
        layer = self._layer(step)
        if isinstance(step, Conv) or (layer is not None and type(layer) in _GRAPH_LAYERS):
            return None
        if isinstance(step, Aten) and layer is None and step.kind in _GRAPH_FUNCTIONS:
            return None
        return f"{step.name!r} is none of the steps that oneDNN's graph compiler is given"

    def _script_graph(self, x: Tensor) -> Compiled:
        def on_nhwc(x: Tensor) -> Tensor:
            y = self.definition(x)
            return nhwc(y) if y.dim() == 4 else y

        graph = onednn.graph(on_nhwc, _canonical(nchw(x)))
        return Compiled(lambda x: graph(_canonical(nchw(x))), len(self.bound), self.output, "as a oneDNN graph")

    def _script_steps(self, x: Tensor, int8: Sequence[quantised.ByOneDNN]) -> Compiled:
        """All steps before the first of oneDNN's in floating point: the layout of its weights is not TorchScript's."""
        steps = next((i for i, bound in enumerate(self.bound) if bound.engine == "onednn"), len(self.bound))
        head, rest = self.bound[:steps], self.bound[steps:]
        last = head[-1].writes[0]
        computed = {last, *(name for bound in rest for name in bound.writes)}
        if self.output not in computed or any(set(bound.reads) - computed for bound in rest):
            raise ValueError("more than one value goes from int8 to the rest")
        packed = [conv.packed for conv in int8]
        with quantised.ENGINE:
            script = onednn.script(lambda x: self._run_steps({INPUT: x}, head, last), x, packed)

        def with_engine(x: Tensor) -> Tensor:
            with quantised.ENGINE:
                return script(x)

        return Compiled(with_engine, steps, last, "step after step")

    def _why_steps_serve(self, compiled: Compiled, x: Tensor, want: Tensor, allowed: float) -> str | None:
        """Why the steps are better than `compiled`; None where they aren't."""
        difference = _relative_distance(self._run_compiled(compiled, x), want)
        if not difference <= allowed:
            return f"its answer is {difference:.1e} from that of the steps"
        together, one_by_one = _seconds([lambda: self._run_compiled(compiled, x), lambda: self.run(x)])
        if together <= one_by_one:
            return None
        return f"measured: {1e3 * together:.1f} ms, step by step {1e3 * one_by_one:.1f} ms"

    def _run_compiled(self, compiled: Compiled, x: Tensor) -> Tensor:
        values = {compiled.writes: compiled.call(x)}
        return self._answer(self._run_steps(values, self.bound[compiled.steps :], self.output))

    def definition(self, x: Tensor) -> Tensor:
        """The answer to x [N, C, H, W] in PyTorch's operations alone, which a tracer can record for any size: nothing
        is bound or kept. Not for plans with 8 bits."""
        values: dict[str, Any] = {INPUT: x}
        for step in self.unchained:
            inputs = [values[name] for name in step.reads]
            if isinstance(step, Conv):
                weights = self.weights[step.out]
                residual = inputs[1] if len(inputs) > 1 else None
                values[step.out] = reference.conv_bias_act(
                    inputs[0], residual, w=nchw(weights.w), bias=weights.bias, geometry=step.geometry, relu=step.relu
                )
            else:
                assert isinstance(step, Aten)
                values[step.out] = _call_aten(step, self._function(step), self.layers, inputs)
        y: Tensor = values[self.output]
        return y.clone() if self.borrows else y

    def capture(self, x: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        """Record `run` as a CUDA graph, after warming up on the stream `side`.

        Graphs may share `pool` (their intermediates then lie in the same memory) where all are captured on the same
        stream and each replay ends before the next begins.
        """
        self.x = x.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run(self.x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.y = self.run(self.x)
        self.graph = graph

    def replay(self, x: Tensor) -> Tensor:
        """The graph's answer to x [N, C, H, W], in memory of its own."""
        assert self.graph is not None
        self.x.copy_(x.permute(0, 2, 3, 1))
        self.graph.replay()
        return self.y.clone()

    def how_it_runs(self) -> str:
        if self.graph is not None:
            return "replayed as a CUDA graph"
        if self.compiled is not None:
            return f"by TorchScript, {self.compiled.form}"
        why = f" (not by TorchScript: {self.why_not_compiled})" if self.why_not_compiled else ""
        return f"one step after the other{why}"

    def table(self) -> str:
        rows = [("step", "layer", "what", "output", "engine", "why")]
        for i, bound in enumerate(self.bound):
            layer = self._layer(bound.step)
            what = _description(bound.step) if layer is None else type(layer).__name__
            rows.append((str(i), bound.step.name, what, str(list(bound.shape)), bound.engine, bound.why))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def _layer(self, step: Step) -> Any:
        """The module that `step` calls; None where it calls a function, whatever that is named."""
        return self.layers[step.name] if isinstance(step, Aten) and step.kind in ("module", "norm") else None

    def _function(self, step: Aten) -> Callable[..., Any]:
        layer = self._layer(step)
        return layer if layer is not None else FUNCTIONS[step.kind]

    def _bind(self, step: Step, values: dict[str, Any]) -> Iterator[Bound]:
        """`step`, or the three of a chain that doesn't run as one, bound and done: `values` holds their results."""
        why = self._why_chained(step, *(values[name] for name in step.reads)) if isinstance(step, Chain) else None
        for single in unchained([step]) if why is None else (step,):
            bound, results = self._bind_step(single, *(values[name] for name in single.reads))
            values.update(zip(single.writes, results, strict=True))
            if isinstance(results[0], Tensor):
                bound.shape = tuple(nchw(results[0]).shape if results[0].dim() == 4 else results[0].shape)
                bound.bytes = results[0].nbytes
            yield bound

    def _why_chained(self, step: Chain, x: Tensor, residual: Any) -> str | None:
        fits = isinstance(residual, Tensor) and residual.shape == (*x.shape[:3], step.expand.filter[0])
        return dispatch.why_chained(_problem(step.spatial, x), self.dtype, x.device) if fits else None

    def _bind_step(self, step: Step, *inputs: Any) -> tuple[Bound, Sequence[Any]]:
        if isinstance(step, Conv):
            return self._bind_conv(step, *inputs)
        if isinstance(step, Aten):
            return self._bind_layer(step, *inputs)
        if isinstance(step, Convert):
            convert = partial(step.grid.load, dtype=self.dtype) if step.back else step.grid.store
            bound = Bound(step, "aten", "between dtypes", partial(_as_values, convert))
        else:
            weights = tuple(self.weights[conv.out] for conv in step.convs)
            why = self._why_chained(step, *inputs)
            assert why is not None
            bound = Bound(step, "triton", why, partial(folded.by_chain, weights=weights))
        return bound, bound.call(*inputs)

    def _bind_layer(self, step: Aten, *inputs: Any) -> tuple[Bound, Sequence[Any]]:
        layer, library = self._layer(step), partial(_run_aten, step, self._function(step), self.layers)
        sizes = eligibility.pool_sizes(layer)

        def by_onednn() -> partial[Any]:
            w = self.packings.linear(step.name, layer.weight.detach(), *inputs)
            return partial(_as_values, onednn.linear, w=w, bias=layer.bias)

        engines: dict[Any, Callable[[], Any]] = {
            "triton": lambda: partial(_as_values, folded.by_pool, sizes=sizes),
            "onednn": by_onednn,
            "aten": lambda: library,
            torch.float32: lambda: partial(quantised.by_pool, library),
        }
        return _bind_candidate(step, dispatch.layer_engine(layer, sizes, inputs), engines, inputs)

    def _bind_conv(self, step: Conv, x: Tensor, residual: Any = None) -> tuple[Bound, Sequence[Tensor]]:
        problem, weights, added = _problem(step, x), self.weights[step.out], residual is not None
        alike = not added or getattr(residual, "shape", None) == (problem.N, problem.P, problem.Q, problem.K)
        if weights.w.dtype != torch.int8 and not alike:
            return self._bind_broadcasting(step, x, residual)
        static: dict[str, Any] = {"weights": weights, "geometry": step.geometry, "relu": step.relu}
        ours = {"precision": dispatch.precision(weights.w.dtype, x.device), **static}
        library = partial(_as_values, folded.by_library, **static)
        simulation = partial(_as_values, reference.conv_quantised, grids=step.quantised, dtype=self.dtype, **static)
        ones = partial(torch.ones, problem.K, device=x.device)
        engines: dict[Any, Callable[[], Any]] = {
            "triton": lambda: partial(_as_values, folded.by_triton, **ours, **self._scales(step.quantised)),
            "stem": lambda: partial(_as_values, folded.by_stem, **ours),
            "onednn": lambda: self._by_onednn(step, x),
            "onednn int8": lambda: self._by_onednn_int8(step, x),
            "cudnn fused": lambda: partial(_as_values, folded.by_cudnn, weights=weights, geometry=step.geometry),
            "cudnn + triton": lambda: partial(_as_values, folded.by_library_and_kernel, ones=ones(), **static),
            "cudnn": lambda: library,
            "aten": lambda: library,
            torch.float32: lambda: partial(simulation, wide=torch.float32),
            torch.float64: lambda: partial(simulation, wide=torch.float64),
        }
        candidate = dispatch.folded_engine(problem, weights.w.dtype, x.device, relu=step.relu, added=added, alike=alike)
        return _bind_candidate(step, candidate, engines, (x, residual) if added else (x,))

    def _scales(self, grids: Quantised | None) -> dict[str, Any]:
        """What our kernel is told of the grids that a convolution in float8 has."""
        if grids is None:
            return {}
        out = (1.0, self.dtype) if grids.out is None else (1 / grids.out.scale, FLOAT8)
        added = 1.0 if grids.residual is None else grids.residual.scale
        return {"residual_scale": added, "out_scale": out[0], "out_dtype": out[1]}

    def _by_onednn(self, step: Conv, x: Tensor) -> partial[Any]:
        weights, overwrite = self.weights[step.out], step.out in self.overwritable
        static: dict[str, Any] = {
            "bias": weights.bias,
            "geometry": step.geometry,
            "relu": step.relu,
            "overwrite": overwrite,
        }
        return partial(_as_values, onednn.conv, w=self.packings.conv(step.out, weights.w, step.geometry, x), **static)

    def _by_onednn_int8(self, step: Conv, x: Tensor) -> quantised.ByOneDNN:
        size, keep = (step.out, *x.shape[1:3]), step.out not in self.overwritable
        call: quantised.ByOneDNN | None = self.packings.int8.get(size)
        if call is not None:
            self.shares_packings = True
            return call
        static: dict[str, Any] = {"geometry": step.geometry, "relu": step.relu, "grids": step.quantised, "keep": keep}
        call = self.packings.int8[size] = quantised.ByOneDNN(self.weights[step.out], **static)
        return call

    def _bind_broadcasting(self, step: Conv, x: Tensor, residual: Any) -> tuple[Bound, Sequence[Tensor]]:
        """A convolution to which a number is added, or what has another shape than its output: in three passes."""
        if step.quantised is not None:
            raise ValueError(
                f"layer {step.name!r}: in float8, what is added to its output must have the output's shape"
            )
        alone, _ = self._bind_conv(replace(step, residual=None, relu=False), x)

        def call(x: Tensor, residual: Any) -> Sequence[Tensor]:
            (z,) = alone.call(x)
            y = nchw(z) + (nchw(residual) if isinstance(residual, Tensor) and residual.dim() == 4 else residual)
            return (nhwc(y.relu_() if step.relu else y),)

        bound = Bound(step, f"{alone.engine} + aten", f"{alone.why}; what is added has another shape", call)
        return bound, call(x, residual)


def _problem(conv: Conv, x: Tensor) -> Any:
    from fastres.kernels.problem import ConvProblem

    (k, r, s, c), (stride, pad, dilation, groups) = conv.filter, conv.geometry
    if x.dim() != 4 or x.shape[3] != c * groups:
        shape = list(nchw(x).shape if x.dim() == 4 else x.shape)
        raise ValueError(f"layer {conv.name!r} takes {c * groups} channels [N, {c * groups}, H, W], got {shape}")
    try:
        return ConvProblem(*x.shape, k, r, s, stride, pad, dilation, groups)
    except ValueError as error:
        raise ValueError(f"layer {conv.name!r}: {error}") from error


def _bind_candidate(
    step: Step, candidate: dispatch.Candidate, engines: Mapping[Any, Callable[[], Any]], inputs: Sequence[Any]
) -> tuple[Bound, Sequence[Any]]:
    """`step` bound to `candidate` or to what serves otherwise, and its results. engines: what makes the call, by the
    engine's name or the dtype in which it simulates 8 bits."""
    error = ""
    while True:
        otherwise = candidate.otherwise
        try:
            call = engines[candidate.wide or candidate.engine]()
            results = call(*inputs)
            break
        except RuntimeError as refusal:
            if otherwise is None or isinstance(refusal, torch.OutOfMemoryError):
                raise
            candidate, error = otherwise, str(refusal).splitlines()[0]
    why = candidate.why.replace("{error}", error)
    if candidate.timed and otherwise is not None:
        separate = engines[otherwise.engine]()
        faster, measured = _faster_fused(candidate.timed, call, separate, inputs)
        why += measured
        if not faster:
            return Bound(step, otherwise.engine, why, separate), separate(*inputs)
    return Bound(step, candidate.engine, why, call), results


_fused_times: dict[Any, list[float]] = {}  # what the two of `_faster_fused` took, by all that it may hang on


def _faster_fused(
    facts: tuple[Any, ...], fused: Callable[..., Any], separate: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[bool, str]:
    """Whether cuDNN's fused convolution, which serves, is as fast as the convolution and our pass, and what was
    measured, for the log. Measured once per process and `facts`; never in a capture, where the fused one is taken."""
    if facts not in _fused_times:
        if torch.cuda.is_current_stream_capturing() or not inputs[0].numel():
            return True, ""
        try:
            separate(*inputs)  # compiles, and has cuDNN choose
            _fused_times[facts] = _microseconds([partial(fused, *inputs), partial(separate, *inputs)], inputs[0].device)
        except (RuntimeError, ValueError) as error:  # of memory for one more tensor, too
            return True, f"; apart: {str(error).splitlines()[0]}"
    fused_us, separate_us = _fused_times[facts]
    return fused_us <= separate_us, f"; measured: fused {fused_us:.0f} us, apart {separate_us:.0f} us"


def _microseconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """What each call takes the GPU, the fastest of three, in turn. All have run before."""
    spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    with torch.cuda.device(device):
        torch.cuda._sleep(10**6)  # half a millisecond, in which the host gets ahead: its time is not measured
        for _ in range(3):
            for call, own in zip(calls, spans, strict=True):
                own.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                own[-1][0].record()
                call()
                own[-1][1].record()
        torch.cuda.current_stream().synchronize()
    return [1000 * min(start.elapsed_time(end) for start, end in own) for own in spans]


def _as_values(call: Callable[..., Tensor], *inputs: Tensor, **static: Any) -> tuple[Tensor]:
    return (call(*inputs, **static),)


def _run_aten(step: Aten, function: Callable[..., Any], layers: Mapping[str, Any], *inputs: Any) -> tuple[Any]:
    """A library operation on NCHW views of the values it reads."""
    views = [nchw(value) if isinstance(value, Tensor) and value.dim() == 4 else value for value in inputs]
    result = _call_aten(step, function, layers, views)
    return (nhwc(result) if isinstance(result, Tensor) and result.dim() == 4 else result,)


def _call_aten(step: Aten, function: Callable[..., Any], layers: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    """`function` with the arguments of `step`, the values it reads being `inputs`, NCHW where they are images."""
    values = dict(zip(step.reads, inputs, strict=True))

    def argument(leaf: Any) -> Any:
        if isinstance(leaf, ModelTensor):
            return layers[leaf.path]
        return values[leaf.name] if isinstance(leaf, Value) else leaf

    return function(*mapped(step.args, argument), **mapped(step.kwargs, argument))


def _canonical(x: Tensor) -> Tensor:
    """x [N, C, H, W], channels_last, with the strides that its shape gives: of a dimension of one they may be others,
    and a compiled graph would take them for another layout."""
    _, c, h, w = x.shape
    return x.as_strided(x.shape, (h * w * c, 1, w * c, c))


def _relative_distance(y: Tensor, want: Tensor) -> float:
    """The distance of the two over the length of `want`."""
    return float((y.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def _seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """What each call takes on a CPU, the faster of two, in turn. All have run before."""
    spans: list[list[float]] = [[] for _ in calls]
    for _ in range(2):
        for call, own in zip(calls, spans, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [min(own) for own in spans]


def _description(step: Step) -> str:
    if isinstance(step, Chain):
        return "chain: " + " -> ".join(_description(single) for single in step.convs)
    if not isinstance(step, Conv):
        return step.kind if isinstance(step, Aten) else "float8" if step.grid.dtype == FLOAT8 else "int8"
    k, r, s, c = step.filter
    stride, _, dilation, groups = step.geometry
    text = f"{r}x{s} {c * groups}->{k}"
    text += f" /{stride}" if stride > 1 else ""
    text += f" dilation {dilation}" if dilation > 1 else ""
    text += f" groups {groups}" if groups > 1 else ""
    return text + (" + residual" if step.residual else "") + (" + relu" if step.relu else "")
