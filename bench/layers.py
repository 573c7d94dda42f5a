"""What the commands about single kernels share: the convolutions of a net, each in its role and with random operands;
the work of a pass as the net runs it; timing on a GPU; tables as CSV."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastres
from fastres.inference import plan
from fastres.inference.program import Program
from fastres.kernels.problem import ConvProblem, model_problems
from fastres.ops import dispatch, folded
from fastres.ops.conv_bn import ConvBN, conv_bn
from fastres.ops.layout import Geometry
from fastres.ops.reference import BNBackward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What a user waits for: inference with everything in one epilogue, and the three passes of training.
PASSES = ("infer", "fprop", "dgrad", "wgrad")


class Role(NamedTuple):
    """What stands around a convolution in a net.

    place: "stem"; "first" of a block, which reads a finished activation; "inner" and "last", which read z of the
    convolution before them through BatchNorm and ReLU; "project", on the shortcut.
    border: a "first" whose block follows another one, whose end is fused with it forward and backward.
    summed: the gradient comes masked and with its sums, so that our dgrad and wgrad may compute dz on load; elsewhere
    dz is stored, whatever the engine. It comes so from our dgrad of the convolution behind: where the library wins that
    one, dz is stored here, too, and what is measured here is not quite what runs.
    """

    place: Literal["stem", "first", "inner", "last", "project"]
    border: bool = False
    summed: bool = False

    @property
    def normed(self) -> bool:
        return self.place in ("inner", "last")


def roles(depth: int, batch: int, size: int) -> Counter[tuple[ConvProblem, Role]]:
    """The convolutions of torchvision's ResNet of that depth in their roles, and how often each occurs."""
    found: Counter[tuple[ConvProblem, Role]] = Counter()
    with torch.device("meta"), torch.no_grad():
        net = getattr(fastres, f"resnet{depth}")().eval()
        x = torch.empty(batch, 3, size, size)

        def count(conv: torch.nn.Module, x: Tensor, place: Any, border: bool = False, summed: bool = False) -> Tensor:
            (problem,) = model_problems(conv, tuple(x.shape))  # type: ignore[arg-type]
            found[problem, Role(place, border, summed)] += 1
            return conv(x)

        x = net.maxpool(count(net.conv1, x, "stem"))
        blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
        for b, block in enumerate(blocks):
            pairs, shortcut = block.parts().pairs, block.parts().shortcut
            if shortcut is not None:
                count(shortcut[0], x, "project")
            first, *inner, last = (conv for conv, _ in pairs)
            x = count(first, x, "first", border=b > 0, summed=True)
            for conv in inner:
                x = count(conv, x, "inner", summed=True)
            x = count(last, x, "last", summed=shortcut is None and b + 1 < len(blocks))
    return found


def problems(depths: Iterable[int], batch: int, size: int) -> dict[ConvProblem, tuple[int, Role]]:
    """The convolutions of torchvision's ResNets of those depths: how often each occurs, and its most frequent role, for
    which it is measured: a table has one entry a problem."""
    found: dict[ConvProblem, Counter[Role]] = {}
    for depth in depths:
        for (problem, role), count in roles(depth, batch, size).items():
            found.setdefault(problem, Counter())[role] += count
    return {problem: (counts.total(), _usual(counts)) for problem, counts in found.items()}


def _usual(counts: Counter[Role]) -> Role:
    """The most frequent role in the most frequent place."""
    places: Counter[str] = Counter()
    for role, count in counts.items():
        places[role.place] += count
    return max(counts, key=lambda role: (places[role.place], role.place, counts[role], role.summed, role.border))


def name(p: ConvProblem) -> str:
    """The layer as a table names it: filter/stride, channels, image."""
    stride = f"/{p.stride}" if p.stride > 1 else ""
    groups = f" g{p.groups}" if p.groups > 1 else ""
    return f"{p.R}x{p.S}{stride} {p.C}->{p.K} @{p.H}x{p.W}{groups}"


@dataclass
class Operands:
    """Random tensors for every pass of one convolution, as a net holds them.

    x, shortcut, below: like the input; z, dz: like the output. a_affine, mean: of the BatchNorm before it; bn: what
    makes dz of g behind its own; shift: its folded one.
    """

    x: Tensor
    shortcut: Tensor
    below: Tensor
    w: Tensor
    z: Tensor
    dz: Tensor
    a_affine: tuple[Tensor, Tensor]
    mean: Tensor
    bn: BNBackward
    shift: Tensor

    @classmethod
    def random(cls, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Operands:
        p = problem
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def vector(length: int) -> Tensor:
            return torch.rand(length, generator=generator, device=device) + 0.5

        z = normal(p.N, p.P, p.Q, p.K)
        return cls(
            x=normal(*p.x_shape),
            shortcut=normal(*p.x_shape),
            below=normal(*p.x_shape),
            w=normal(*p.w_shape) * (p.R * p.S * p.C // p.groups) ** -0.5,
            z=z,
            dz=normal(p.N, p.P, p.Q, p.K),
            a_affine=(vector(p.C), vector(p.C) - 1),
            mean=vector(p.C) - 1,
            bn=BNBackward(z, vector(p.K), 0.01 * vector(p.K), 0.01 * vector(p.K)),
            shift=vector(p.K) - 1,
        )


def pair(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> ConvBN:
    """The convolution with a BatchNorm that takes the batch's statistics, by the engines that are in force
    (`fastres.backend`)."""
    p = problem
    geometry, choice = Geometry(p.stride, p.pad, p.dilation, p.groups), dispatch.choice(dtype, device)
    shapes = (p.N, p.H, p.W), (p.K, p.C // p.groups, p.R, p.S)
    return conv_bn(*shapes, geometry, 0.0, True, dtype, device, choice)


def call(pair: ConvBN, pass_: str, operands: Operands, role: Role) -> Callable[[], Any]:
    """The work of one pass with what the net does around it in that role, by the engines of `pair`.

    It returns, for "infer", the activation; "fprop": (z, partials), or (x, z, partials) where x is the end of the block
    before, which our kernel may compute on load; "dgrad": dx, or (dx, the mask still to apply, partials of the
    BatchNorm below); "wgrad": dw.
    """
    o, prologue = operands, operands.a_affine if role.normed else None
    if pass_ == "infer":
        projects = role.place == "project"  # its shift is folded into that of the convolution it is added to
        inputs = (o.x, o.z) if role.place == "last" else (o.x,)
        return partial(infer(pair, o.w, None if projects else o.shift, inputs, relu=not projects), *inputs)
    if pass_ == "fprop":
        if joins(pair.problem, role):
            return lambda: pair.fprop_joined(o.x, o.a_affine, o.w, relu=True, residual=o.shortcut)
        return lambda: pair.fprop(o.x, o.w, prologue)
    bn = o.bn if role.summed and pair.fuses(o.bn) else None
    dz = pair.passes.backward_apply(o.dz, *o.bn) if stores_dz(pair, role, o) else o.dz
    if pass_ == "wgrad":
        return lambda: pair.wgrad(dz, o.x, bn, prologue, torch.float32)
    if role.normed:
        return lambda: pair.dgrad_masked(dz, o.w, bn, o.x, o.mean, o.a_affine)
    if not role.border:
        residual = {} if role.place == "project" else {"residual": o.shortcut}
        return lambda: pair.dgrad(dz, o.w, bn, **residual)

    def into_the_block_before() -> tuple[Tensor, Tensor | None, Tensor]:
        dx, sums = pair.dgrad_joined(dz, o.w, bn, o.x, ((o.below, o.mean), None), residual=o.shortcut)
        if sums is None:  # that block then takes them in a pass of its own
            return dx, o.x, pair.passes.backward_reduce(dx, o.below, o.mean, mask=o.x)
        return dx, None, sums

    return into_the_block_before


def infer(
    pair: ConvBN, w: Tensor, shift: Tensor | None, inputs: tuple[Tensor, ...], relu: bool
) -> Callable[..., Tensor]:
    """What computes [relu](conv(x, w) + shift + residual) of inputs like (x,) or (x, residual) in `optimize`, which
    folds weights: our kernel, or what it binds of the library, which has an operator for all of it.

    A table's "infer" decides the live eval path, too, whose library convolution has the normalise pass behind it and so
    loses to ours more often than what ours is set against here; `optimize` is where speed is asked for.
    """
    weights = folded.Folded(w, shift, None if shift is None else shift.to(w.dtype))
    if pair.engines.infer in ("triton", "stem"):
        by: Any = folded.by_stem if pair.engines.infer == "stem" else folded.by_triton
        return partial(by, weights=weights, geometry=pair.geometry, relu=relu, precision=pair.engines.precision)
    added, shape = "residual" if len(inputs) > 1 else None, tuple(w.shape)
    conv = plan.Conv(plan.Pair("conv"), plan.INPUT, "y", pair.geometry, shape, added, relu)  # type: ignore[arg-type]
    with fastres.backend("cudnn"):
        bound, _ = Program([conv], "y", {"y": weights}, {}, w.dtype)._bind_conv(conv, *inputs)
    return lambda *inputs: bound.call(*inputs)[0]


def joins(problem: ConvProblem, role: Role) -> bool:
    """Whether the end of the block before belongs to fprop's work: our kernel may do it on load. Elsewhere it is the
    same pass whatever the engine."""
    return role.border and dispatch.joins(problem)


def stores_dz(pair: ConvBN, role: Role, operands: Operands) -> bool:
    """Whether a pass has to store dz before dgrad and wgrad, where another engine may need none."""
    return role.summed and not pair.fuses(operands.bn)


def half_of_dz(pair: ConvBN, operands: Operands) -> float:
    """Microseconds of the pass that stores dz, of which dgrad and wgrad owe one half each."""
    return microseconds(lambda: pair.passes.backward_apply(operands.dz, *operands.bn)) / 2


def moved_bytes(problem: ConvProblem, pass_: str, itemsize: int, role: Role) -> int:
    """The fewest bytes that `call` can move, by the rules for what is computed on load."""
    p = problem
    z_numel = p.y_numel if role.summed and dispatch.bn_backward_on_load(p) else 0
    extra = {
        "infer": p.y_numel if role.place == "last" else 0,
        "fprop": 2 * p.x_numel if joins(p, role) else 0,
        "dgrad": p.x_numel * met_by_dx(role) + z_numel,
        "wgrad": z_numel,
    }
    return p.min_bytes(itemsize) + itemsize * extra[pass_]


def met_by_dx(role: Role) -> int:
    """Tensors like dx that dgrad's epilogue reads: z of the BatchNorm below, or the shortcut's gradient, with which the
    end of a block brings its output and its z."""
    return 0 if role.place == "project" else 3 if role.border else 1


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A table of `columns`; makes the folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, columns)
        writer.writeheader()
        writer.writerows(rows)


def applicable(problem: ConvProblem, pass_: str) -> bool:
    """No net asks its stem for the image's gradient in training."""
    return pass_ != "dgrad" or problem.C >= 8


def microseconds(work: Callable[[], Any]) -> float:
    """Median time on the GPU, L2 flushed before each run.

    Replayed as a CUDA graph: a small layer takes less time than the host needs to launch it, and that is another
    question (a net's `optimize` replays a graph, training runs ahead of the GPU).
    """
    from triton.testing import do_bench

    work()  # compiles, and lets cuDNN choose
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # `torch.cuda.graph` also collects garbage, which takes longer than the measurement.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            kept = work()
        finally:
            graph.capture_end()
    us = 1e3 * do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    del kept, graph
    torch.cuda.empty_cache()  # a graph's memory is its own and is only given back here
    return us
