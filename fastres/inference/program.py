"""Bind a plan to engines for one input shape, and run it: step by step, as a CUDA graph, or compiled by TorchScript.

An engine is the implementation that computes a step: one of fastres's kernels, cuDNN, oneDNN or ATen.
"""

from __future__ import annotations

import copy
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
    Outputs,
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

# Largest relative difference allowed between a oneDNN graph and the single steps: only rounding errors.
_GRAPH_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
_GRAPH_LAYERS = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, PadShortcut)
_GRAPH_FUNCTIONS = ("relu", "flatten", "mean", "max_pool2d", "adaptive_avg_pool2d")


@dataclass
class Bound:
    """A step bound to an engine."""

    step: Step
    engine: str
    why: str  # the reason for the engine
    call: Callable[..., Sequence[Any]]  # the values that the step reads -> the values that it writes
    shape: tuple[int, ...] = ()  # of the first value written, as NCHW
    bytes: int = 0  # of the first value written
    dies: tuple[str, ...] = ()  # values that no later step reads, dropped after this step

    def __post_init__(self) -> None:
        self.reads, self.writes = self.step.reads, self.step.writes  # stored, because a step's property recomputes them


class Compiled(NamedTuple):
    """The first `steps` steps of a program, compiled by TorchScript: x [N, H, W, C] -> the values `writes`."""

    call: Callable[[Tensor], Sequence[Tensor]]
    steps: int
    writes: Sequence[str]
    form: str  # how the compiled steps run, as `Program.how_it_runs` words it, e.g. "as a oneDNN graph"


class Program:
    """A plan bound to engines for one input shape.

    On a GPU it may also have a CUDA graph with a static input and outputs, on a CPU a version that TorchScript
    compiled. Several threads may call `run` at the same time, because it stores nothing between calls. Calls of
    `replay` must not overlap, because they share the static input and outputs.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        outputs: Outputs,
        weights: Mapping[str, folded.Folded],
        layers: Mapping[str, Any],
        dtype: torch.dtype,
        packings: onednn.Packings | None = None,
    ) -> None:
        """weights: the folded weights of each convolution, by the name of its output.

        layers: the modules and model tensors of ATen steps, by path. dtype: of all values that are not quantised.
        packings: oneDNN's packed weights, which all programs with the same weights share; None to start without any.
        """
        self.steps, self.outputs, self.dtype = steps, outputs, dtype
        self.weights, self.layers, self.packings = weights, layers, packings or onednn.Packings()
        self.unchained = unchained(steps)
        self.borrows = borrows(steps, outputs)
        self.overwritable = overwritable(self.unchained, outputs)
        self.bound: list[Bound] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled: Compiled | None = None
        self.why_not_compiled: str | None = None
        self.prepared = False
        self.shared: dict[Any, Bound] = {}

    def unbound(self) -> Program:
        """Return a program of the same plan that is not bound yet."""
        program = copy.copy(self)
        program.bound = []
        return program

    def bind(self, x: Tensor, prepared: bool = False, shared: dict[Any, Bound] | None = None) -> list[Tensor]:
        """Return the outputs for x [N, H, W, C] as `run` does, and choose an engine for every step on the way.

        prepared: do all work that pays off only if inputs with x's shape come often. On a GPU, engines are timed where
        `dispatch` leaves that open. On a CPU, weights are packed in the format that oneDNN wants for this shape.

        shared: steps bound by other programs of the same plan, under the same settings of the process. Those that serve
        inputs of any size are used again, and new ones are added.
        """
        self.prepared, self.shared = prepared, {} if shared is None else shared
        unread = readers(self.unchained, self.outputs)
        values: dict[str, Any] = {INPUT: x}
        for step in self.steps:
            for bound in self._bind(step, values):
                for single in unchained([bound.step]):
                    unread.subtract(single.reads)
                bound.dies = tuple(name for name in values if unread[name] <= 0)
                self.bound.append(bound)
                for name in bound.dies:
                    del values[name]
        return self._answers([values[name] for name in self.outputs.names])

    def run(self, x: Tensor, observer: Callable[[str, Any], None] | None = None) -> list[Tensor]:
        """Return the outputs for x [N, H, W, C], as NCHW those of four dimensions.

        observer: called as observer(name, value) for the input and the outputs of the steps. The program then runs step
        by step. A later step may overwrite a value that the observer has seen.
        """
        if self.compiled is not None and observer is None:
            return self._run_compiled(self.compiled, x)
        if observer is not None:
            observer(INPUT, x)
        return self._answers(self._run_steps({INPUT: x}, self.bound, self.outputs.names, observer))

    def _run_steps(
        self,
        values: dict[str, Any],
        steps: Sequence[Bound],
        wanted: Sequence[str],
        observer: Callable[[str, Any], None] | None = None,
    ) -> list[Any]:
        """Run `steps` on `values` and return the values `wanted`. Values are dropped after their last use."""
        for bound in steps:
            for name, value in zip(bound.writes, bound.call(*map(values.get, bound.reads)), strict=True):
                values[name] = value
                if observer is not None:
                    observer(name, value)
            for name in bound.dies:
                values.pop(name, None)
        return [values[name] for name in wanted]

    def most_bytes(self) -> int:
        """Return the peak size in bytes of the values that are alive at the same time.

        The input and the second output of a chain are not counted.
        """
        alive: dict[str, int] = {}
        most = 0
        for bound in self.bound:
            alive[bound.writes[0]] = bound.bytes
            most = max(most, sum(alive.values()))
            for name in bound.dies:
                alive.pop(name, None)
        return most

    def _answers(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs as the caller gets them: [N, H, W, C] as [N, C, H, W] views, other shapes as they are."""
        return self._owned([nchw(value) if value.dim() == 4 else value for value in values])

    def _owned(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs with those cloned that may share memory with the input, the model or another output.

        The caller may write into all of them.
        """
        return [y.clone() if borrows else y for y, borrows in zip(outputs, self.borrows, strict=True)]

    def compile(self, x: Tensor) -> None:
        """Compile the steps by TorchScript, as a oneDNN graph or, in int8, as the same steps.

        Later calls of `run` use the result, if for x [N, H, W, C] it gives the same outputs as the steps (up to
        `_GRAPH_DIFFERENCE`) and is at least as fast. Otherwise `why_not_compiled` is set to the reason.
        """
        int8 = [bound.call for bound in self.bound if isinstance(bound.call, quantised.ByOneDNN)]
        refusal = dispatch.why_not_scripted(torch.int8 if int8 else self.dtype)
        if refusal is None and any(not bound.engine.startswith(("onednn", "aten")) for bound in self.bound):
            refusal = "the plan uses engines other than oneDNN and ATen"
        if refusal is None and not int8:
            refusal = next((why for step in self.unchained if (why := self._why_no_graph(step)) is not None), None)
        if any(conv.copies for conv in int8):  # TorchScript does not know that the operator writes into the copy
            refusal = "a convolution must not overwrite its residual"
        if refusal is None:
            want = self.run(x)
            try:
                compiled = self._script_steps(x, int8) if int8 else self._script_graph(x)
                refusal = self._why_steps_serve(compiled, x, want, 0.0 if int8 else _GRAPH_DIFFERENCE[self.dtype])
            except Exception as error:  # whatever the compiler raises, running step by step still works
                refusal = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
        if refusal is None:
            self.compiled = compiled
        else:
            self.why_not_compiled = refusal

    def _why_no_graph(self, step: Step) -> str | None:
        """Return why `step` must not go to oneDNN's graph compiler; None if it may.

        The compiler gets only operations that ResNets use. On others it may hang: for y + bn(y), where y is the output
        of a convolution, it never returns.
        """
        layer = self._layer(step)
        if isinstance(step, Conv) or (layer is not None and type(layer) in _GRAPH_LAYERS):
            return None
        if isinstance(step, Aten) and layer is None and step.kind in _GRAPH_FUNCTIONS:
            return None
        return f"{step.name!r} is not a step that oneDNN's graph compiler may take"

    def _script_graph(self, x: Tensor) -> Compiled:
        def on_nhwc(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(nhwc(y) if y.dim() == 4 else y for y in self.definition(x))

        graph = onednn.graph(on_nhwc, _canonical(nchw(x)))
        names = self.outputs.names
        return Compiled(lambda x: graph(_canonical(nchw(x))), len(self.bound), names, "as a oneDNN graph")

    def _script_steps(self, x: Tensor, int8: Sequence[quantised.ByOneDNN]) -> Compiled:
        """Compile the steps before the first floating-point step that runs on oneDNN.

        TorchScript can't store the weights of such a step, because they have oneDNN's own layout.
        """
        steps = next((i for i, bound in enumerate(self.bound) if bound.engine == "onednn"), len(self.bound))
        head, rest = self.bound[:steps], self.bound[steps:]
        read = {*self.outputs.names, *(name for bound in rest for name in bound.reads)}
        kept = [name for bound in head for name in bound.writes if name in read]
        packed = [conv.packed for conv in int8]
        with quantised.ENGINE:
            script = onednn.script(lambda x: tuple(self._run_steps({INPUT: x}, head, kept)), x, packed)

        def with_engine(x: Tensor) -> Sequence[Tensor]:
            with quantised.ENGINE:
                return script(x)

        return Compiled(with_engine, steps, kept, "step by step")

    def _why_steps_serve(self, compiled: Compiled, x: Tensor, want: Sequence[Tensor], allowed: float) -> str | None:
        """Return why running step by step is better than `compiled`; None if it is not.

        want: the outputs for x when running step by step. allowed: the largest accepted relative difference between an
        output of the two.
        """
        got = self._run_compiled(compiled, x)
        differences = [_relative_distance(y, right) for y, right in zip(got, want, strict=True)]
        if wrong := [f"{difference:.1e}" for difference in differences if not difference <= allowed]:
            return f"its output differs from that of the steps by {wrong[0]}"
        together, one_by_one = _seconds([lambda: self._run_compiled(compiled, x), lambda: self.run(x)])
        if together <= one_by_one:
            return None
        return f"measured {1e3 * together:.1f} ms, step by step {1e3 * one_by_one:.1f} ms"

    def _run_compiled(self, compiled: Compiled, x: Tensor) -> list[Tensor]:
        values = {INPUT: x, **dict(zip(compiled.writes, compiled.call(x), strict=True))}
        return self._answers(self._run_steps(values, self.bound[compiled.steps :], self.outputs.names))

    def definition(self, x: Tensor) -> list[Tensor]:
        """Return the outputs for x [N, C, H, W], computed by PyTorch operations only.

        Nothing is bound or stored, so a tracer can record it for any input size. Plans with 8-bit convolutions are not
        supported.
        """
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
        return self._owned([values[name] for name in self.outputs.names])

    def capture(self, x: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        """Capture `run(x)`, x [N, H, W, C], as a CUDA graph, after a warm-up on the side stream `side`.

        Graphs may share `pool`, so that their intermediate values use the same memory, if all are captured on the same
        stream and each replay ends before the next one begins.
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

    def replay(self, x: Tensor) -> list[Tensor]:
        """Replay the graph on x [N, C, H, W] and return copies of its outputs."""
        assert self.graph is not None
        self.x.copy_(x.permute(0, 2, 3, 1))
        self.graph.replay()
        return [y.clone() for y in self.y]

    def how_it_runs(self) -> str:
        """Return in words how a call runs: as a CUDA graph, by TorchScript, or step by step."""
        if self.graph is not None:
            return "replayed as a CUDA graph"
        if self.compiled is not None:
            return f"by TorchScript, {self.compiled.form}"
        why = f" (not by TorchScript: {self.why_not_compiled})" if self.why_not_compiled else ""
        return f"step by step{why}"

    def table(self) -> str:
        """Return a table with one row per step: number, layer, operation, output shape, engine, and why that engine."""
        rows = [("step", "layer", "operation", "output", "engine", "why")]
        for i, bound in enumerate(self.bound):
            layer = self._layer(bound.step)
            what = _description(bound.step) if layer is None else type(layer).__name__
            rows.append((str(i), bound.step.name, what, str(list(bound.shape)), bound.engine, bound.why))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    def _layer(self, step: Step) -> Any:
        """Return the module that `step` calls; None if it calls a function, even one with the name of a module."""
        return self.layers[step.name] if isinstance(step, Aten) and step.kind in ("module", "norm") else None

    def _function(self, step: Aten) -> Callable[..., Any]:
        layer = self._layer(step)
        return layer if layer is not None else FUNCTIONS[step.kind]

    def _bind(self, step: Step, values: dict[str, Any]) -> Iterator[Bound]:
        """Bind and run `step`, add its results to `values`, and yield the bound step.

        A chain that does not run as one kernel yields three bound steps, one for each of its convolutions.
        """
        why = self._why_chained(step, *(values[name] for name in step.reads)) if isinstance(step, Chain) else None
        for single in unchained([step]) if why is None else (step,):
            bound, results = self._bind_step(single, *(values[name] for name in single.reads))
            values.update(zip(single.writes, results, strict=True))
            if isinstance(results[0], Tensor):
                bound.shape = tuple(nchw(results[0]).shape if results[0].dim() == 4 else results[0].shape)
                bound.bytes = results[0].nbytes
            yield bound

    def _why_chained(self, step: Chain, x: Tensor, residual: Any) -> str | None:
        """Return the reason for running the chain as one kernel; None if it runs as three convolutions."""
        fits = isinstance(residual, Tensor) and residual.shape == (*x.shape[:3], step.expand.filter[0])
        return dispatch.why_chained(_problem(step.spatial, x), self.dtype, x.device) if fits else None

    def _bind_step(self, step: Step, *inputs: Any) -> tuple[Bound, Sequence[Any]]:
        """Return `step` bound to an engine, and its results for `inputs`."""
        key = None if self.prepared else self._shared_key(step, inputs)
        if known := None if key is None else self.shared.get(key):
            try:
                results = known.call(*inputs)
            except RuntimeError:  # bind it alone, which takes another engine or says what is wrong
                return self._bind_alone(step, *inputs)
            return Bound(step, known.engine, known.why, known.call), results
        bound, results = self._bind_alone(step, *inputs)
        if key is not None and (bound.engine.startswith("onednn") or not isinstance(step, Conv)):
            self.shared[key] = bound
        return bound, results

    def _shared_key(self, step: Step, inputs: Sequence[Any]) -> Any:
        """Return a key that is equal for inputs, of any size, that the same bound step serves; None if there is none.

        On a GPU there is none, because the engine depends on the size.
        """
        if not all(isinstance(x, Tensor) and x.device.type == "cpu" and x.numel() for x in inputs):
            return None
        if not isinstance(step, Conv):
            return step.writes, tuple((x.dtype, x.dim(), x.shape[:1] == (1,)) for x in inputs)
        x = inputs[0]
        wanted = onednn.format_for(x, step.filter, step.geometry, self.weights[step.out].w.dtype)
        if len(inputs) > 1:
            problem = _problem(step, x)
            if inputs[1].shape != (problem.N, problem.P, problem.Q, problem.K):
                return None
        return None if wanted is None else (step.out, x.shape[3:], wanted)

    def _bind_alone(self, step: Step, *inputs: Any) -> tuple[Bound, Sequence[Any]]:
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
            w = self.packings.linear(step.name, layer.weight.detach(), inputs[0], self.prepared)
            return partial(_as_values, onednn.linear, w=w, bias=layer.bias)

        engines: dict[Any, Callable[[], Any]] = {
            "triton": lambda: partial(_as_values, folded.by_pool, sizes=sizes),
            "onednn": by_onednn,
            "aten": lambda: library,
            torch.float32: lambda: partial(quantised.by_pool, library),
        }
        return _bind_candidate(step, dispatch.layer_engine(layer, sizes, inputs), engines, inputs, self.prepared)

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
        return _bind_candidate(step, candidate, engines, (x, residual) if added else (x,), self.prepared)

    def _scales(self, grids: Quantised | None) -> dict[str, Any]:
        """Return the arguments of fastres's kernel that describe the quantisation grids of a float8 convolution.

        {} for None, a convolution that is not quantised.
        """
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
        w = self.packings.conv(step.out, weights.w, step.geometry, x, self.prepared)
        return partial(_as_values, onednn.conv, w=w, **static)

    def _by_onednn_int8(self, step: Conv, x: Tensor) -> quantised.ByOneDNN:
        keep = step.out not in self.overwritable
        static: dict[str, Any] = {"geometry": step.geometry, "relu": step.relu, "grids": step.quantised, "keep": keep}
        pack = partial(quantised.ByOneDNN, self.weights[step.out], **static)
        call: quantised.ByOneDNN = self.packings.int8(step.out, pack, step.filter, step.geometry, x, self.prepared)
        return call

    def _bind_broadcasting(self, step: Conv, x: Tensor, residual: Any) -> tuple[Bound, Sequence[Tensor]]:
        """Bind a convolution whose residual is a number or has another shape than its output.

        The convolution, the addition and the ReLU run as three passes. Raises ValueError in float8.
        """
        if step.quantised is not None:
            raise ValueError(f"layer {step.name!r}: in float8, the residual must have the shape of the layer's output")
        alone, _ = self._bind_conv(replace(step, residual=None, relu=False), x)

        def call(x: Tensor, residual: Any) -> Sequence[Tensor]:
            (z,) = alone.call(x)
            y = nchw(z) + (nchw(residual) if isinstance(residual, Tensor) and residual.dim() == 4 else residual)
            return (nhwc(y.relu_() if step.relu else y),)

        bound = Bound(step, f"{alone.engine} + aten", f"{alone.why}; the residual has another shape", call)
        return bound, call(x, residual)


def _problem(conv: Conv, x: Tensor) -> Any:
    from fastres.kernels.problem import ConvProblem

    (k, r, s, c), (stride, pad, dilation, groups) = conv.filter, conv.geometry
    if x.dim() != 4 or x.shape[3] != c * groups:
        shape = list(nchw(x).shape if x.dim() == 4 else x.shape)
        raise ValueError(
            f"layer {conv.name!r} requires an input with {c * groups} channels [N, {c * groups}, H, W], got {shape}"
        )
    try:
        return ConvProblem(*x.shape, k, r, s, stride, pad, dilation, groups)
    except ValueError as error:
        raise ValueError(f"layer {conv.name!r}: {error}") from error


def _bind_candidate(
    step: Step,
    candidate: dispatch.Candidate,
    engines: Mapping[Any, Callable[[], Any]],
    inputs: Sequence[Any],
    prepared: bool,
) -> tuple[Bound, Sequence[Any]]:
    """Return `step` bound to `candidate` or to one of its fallbacks, and its results for `inputs`.

    A fallback is taken if the candidate raises RuntimeError, or if it is timed and found slower. Out-of-memory errors
    are not caught. prepared: whether the two may be timed now, rather than only used if they have been.

    engines: functions that build the call. The key is the engine's name or, if the step simulates 8 bits, the dtype in
    which it computes.
    """
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
        faster, measured = _faster_fused(candidate.timed, call, separate, inputs, prepared)
        why += measured
        if not faster:
            return Bound(step, otherwise.engine, why, separate), separate(*inputs)
    return Bound(step, candidate.engine, why, call), results


_fused_times: dict[Any, list[float]] = {}  # `facts` of `_faster_fused` -> microseconds of [fused, separate]
_MOST_FUSED_TIMES = 4096  # then the oldest is dropped


def _faster_fused(
    facts: tuple[Any, ...],
    fused: Callable[..., Any],
    separate: Callable[..., Any],
    inputs: Sequence[Tensor],
    time_now: bool,
) -> tuple[bool, str]:
    """Return whether cuDNN's fused convolution is at least as fast as separate passes, and the measured times as text.

    fused: the convolution with shift, residual and ReLU in one call. separate: the convolution, then a pass for these.
    facts: everything that the times may depend on; each `facts` is timed once per process. Nothing is timed without
    `time_now`, during a capture, for an empty input, or if `separate` fails: the result is then True.
    """
    if facts not in _fused_times:
        if not time_now or torch.cuda.is_current_stream_capturing() or not inputs[0].numel():
            return True, ""
        if len(_fused_times) >= _MOST_FUSED_TIMES:
            del _fused_times[next(iter(_fused_times))]
        try:
            separate(*inputs)  # compile the kernel and let cuDNN choose its algorithm before the timing
            _fused_times[facts] = _microseconds([partial(fused, *inputs), partial(separate, *inputs)], inputs[0].device)
        except (RuntimeError, ValueError) as error:  # also if memory for one more tensor is missing
            return True, f"; separate: {str(error).splitlines()[0]}"
    fused_us, separate_us = _fused_times[facts]
    return fused_us <= separate_us, f"; measured: fused {fused_us:.0f} us, separate {separate_us:.0f} us"


def _microseconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Return the GPU time of each call in microseconds: the fastest of three runs, with the calls interleaved.

    Each call must have run before, so that nothing is compiled during the timing.
    """
    spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    with torch.cuda.device(device):
        torch.cuda._sleep(10**6)  # about half a millisecond, so that the host runs ahead and its time is not measured
        for _ in range(3):
            for call, own in zip(calls, spans, strict=True):
                own.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
                own[-1][0].record()
                call()
                own[-1][1].record()
        torch.cuda.current_stream().synchronize()
    return [1000 * min(start.elapsed_time(end) for start, end in own) for own in spans]


def _as_values(call: Callable[..., Tensor], *inputs: Tensor, **static: Any) -> tuple[Tensor]:
    """Return the result of `call` in a tuple, because a bound step returns a tuple of the values that it writes."""
    return (call(*inputs, **static),)


def _run_aten(step: Aten, function: Callable[..., Any], layers: Mapping[str, Any], *inputs: Any) -> tuple[Any]:
    """Run a PyTorch operation on NCHW views of 4-D inputs; return a tuple with its result, as NHWC if it is 4-D."""
    views = [nchw(value) if isinstance(value, Tensor) and value.dim() == 4 else value for value in inputs]
    result = _call_aten(step, function, layers, views)
    return (nhwc(result) if isinstance(result, Tensor) and result.dim() == 4 else result,)


def _call_aten(step: Aten, function: Callable[..., Any], layers: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    """Call `function` with the arguments of `step`. inputs: the values that it reads, images as NCHW."""
    values = dict(zip(step.reads, inputs, strict=True))

    def argument(leaf: Any) -> Any:
        if isinstance(leaf, ModelTensor):
            return layers[leaf.path]
        return values[leaf.name] if isinstance(leaf, Value) else leaf

    return function(*mapped(step.args, argument), **mapped(step.kwargs, argument))


def _canonical(x: Tensor) -> Tensor:
    """Return a view of x [N, C, H, W], channels_last, with exactly the strides that follow from its shape.

    Where a dimension has size 1 its stride is arbitrary, and a compiled graph would treat that as another layout.
    """
    _, c, h, w = x.shape
    return x.as_strided(x.shape, (h * w * c, 1, w * c, c))


def _relative_distance(y: Tensor, want: Tensor) -> float:
    """Return |y - want| / |want| in the Euclidean norm, computed in float64."""
    return float((y.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def _seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the wall time of each call on a CPU in seconds: the faster of two runs, with the calls interleaved.

    Each call must have run before, so that nothing is compiled during the timing.
    """
    spans: list[list[float]] = [[] for _ in calls]
    for _ in range(2):
        for call, own in zip(calls, spans, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [min(own) for own in spans]


def _description(step: Step) -> str:
    """Return the text of the column "operation" in `Program.table`."""
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
