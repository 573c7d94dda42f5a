"""Code shared by the scripts that measure single kernels.

It has the convolutions of a net, each in its role and with random operands; the work of a pass as the net runs it;
timing on a GPU; and tables as CSV.
"""

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
# What is measured of a convolution: inference with shift, residual and ReLU, and the three passes of training.
PASSES = ("infer", "fprop", "dgrad", "wgrad")


class Role(NamedTuple):
    """What surrounds a convolution in a net.

    place: "stem"; "first" of a block, which reads a finished activation; "inner" and "last", which read z, the raw
        output of the convolution before them, through BatchNorm and ReLU; "project", on the shortcut.
    boundary: a "first" whose block follows another block. The end of the previous block (addition and ReLU) may be
        fused with it, forward and backward.
    summed: whether the gradient arrives with the ReLU's mask applied and with the sums for BatchNorm's backward, so
        that our dgrad and wgrad may compute dz, the gradient of z, on load. Otherwise dz is stored before, whatever the
        engine. This assumes that our dgrad computes the next convolution. If the library does, the net stores dz
        here too, and its work differs from the measured work.
    """

    place: Literal["stem", "first", "inner", "last", "project"]
    boundary: bool = False
    summed: bool = False

    @property
    def normed(self) -> bool:
        """Whether the convolution reads its input through a BatchNorm."""
        return self.place in ("inner", "last")


def roles(depth: int, batch: int, size: int) -> Counter[tuple[ConvProblem, Role]]:
    """Count the convolutions of torchvision's ResNet of that depth by problem and role."""
    found: Counter[tuple[ConvProblem, Role]] = Counter()
    with torch.device("meta"), torch.no_grad():
        net = getattr(fastres, f"resnet{depth}")().eval()
        x = torch.empty(batch, 3, size, size)

        def count(conv: torch.nn.Module, x: Tensor, place: Any, boundary: bool = False, summed: bool = False) -> Tensor:
            (problem,) = model_problems(conv, tuple(x.shape))  # type: ignore[arg-type]
            found[problem, Role(place, boundary, summed)] += 1
            return conv(x)

        x = net.maxpool(count(net.conv1, x, "stem"))
        blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
        for b, block in enumerate(blocks):
            pairs, shortcut = block.parts().pairs, block.parts().shortcut
            if shortcut is not None:
                count(shortcut[0], x, "project")
            first, *inner, last = (conv for conv, _ in pairs)
            x = count(first, x, "first", boundary=b > 0, summed=True)
            for conv in inner:
                x = count(conv, x, "inner", summed=True)
            x = count(last, x, "last", summed=shortcut is None and b + 1 < len(blocks))
    return found


def problems(depths: Iterable[int], batch: int, size: int) -> dict[ConvProblem, tuple[int, Role]]:
    """Return a dict from each problem in torchvision's ResNets of those depths to (number of convolutions in all of
    them, most frequent role).

    A problem is measured in that role, because a table has one entry per problem.
    """
    found: dict[ConvProblem, Counter[Role]] = {}
    for depth in depths:
        for (problem, role), count in roles(depth, batch, size).items():
            found.setdefault(problem, Counter())[role] += count
    return {problem: (counts.total(), _usual(counts)) for problem, counts in found.items()}


def _usual(counts: Counter[Role]) -> Role:
    """Return the most frequent role in the most frequent place."""
    places: Counter[str] = Counter()
    for role, count in counts.items():
        places[role.place] += count
    return max(counts, key=lambda role: (places[role.place], role.place, counts[role], role.summed, role.boundary))


def name(p: ConvProblem) -> str:
    """Return the layer's name in a table: filter/stride, channels, image."""
    stride = f"/{p.stride}" if p.stride > 1 else ""
    groups = f" g{p.groups}" if p.groups > 1 else ""
    return f"{p.R}x{p.S}{stride} {p.C}->{p.K} @{p.H}x{p.W}{groups}"


@dataclass
class Operands:
    """Random tensors for every pass of one convolution, as they are in a net.

    x, shortcut, below: [N, H, W, C]: the input; the shortcut or its gradient; z of the previous block's last
        convolution.
    z, dz: [N, P, Q, K]: the output; its gradient, or g where dz is computed on load.
    w: the filters [K, R, S, C/groups].
    a_affine, mean: scale and shift, and batch mean, of the BatchNorm before the convolution.
    bn: the coefficients with which the BatchNorm after the convolution turns g into dz.
    shift: the shift of the BatchNorm after the convolution, folded.
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
    """Return the pair (the convolution with a BatchNorm in training mode), run by the engines that are in force
    (`fastres.backend`)."""
    p = problem
    geometry, choice = Geometry(p.stride, p.pad, p.dilation, p.groups), dispatch.choice(dtype, device)
    shapes = (p.N, p.H, p.W), (p.K, p.C // p.groups, p.R, p.S)
    return conv_bn(*shapes, geometry, 0.0, True, dtype, device, choice)


def call(pair: ConvBN, pass_: str, operands: Operands, role: Role) -> Callable[[], Any]:
    """Return a function that does the work of one pass, with what the net does around it in that role, by the engines
    of `pair`.

    What it returns depends on the pass. "partials" are partial sums for a BatchNorm:

    - "infer": the activation; for a projection, its output.
    - "fprop": (z, partials), or (x, z, partials) where x is the output of the previous block, which our kernel may
      compute on load.
    - "dgrad": dx, or (dx, mask, partials of the BatchNorm below), where mask is None if dx is masked already.
    - "wgrad": dw.
    """
    o, prologue = operands, operands.a_affine if role.normed else None
    if pass_ == "infer":
        projects = role.place == "project"  # its shift is folded into that of the convolution to which it is added
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
    if not role.boundary:
        residual = {} if role.place == "project" else {"residual": o.shortcut}
        return lambda: pair.dgrad(dz, o.w, bn, **residual)

    def into_the_block_before() -> tuple[Tensor, Tensor | None, Tensor]:
        dx, sums = pair.dgrad_joined(dz, o.w, bn, o.x, ((o.below, o.mean), None), residual=o.shortcut)
        if sums is None:  # the previous block then needs a separate reduction
            return dx, o.x, pair.passes.backward_reduce(dx, o.below, o.mean, mask=o.x)
        return dx, None, sums

    return into_the_block_before


def infer(
    pair: ConvBN, w: Tensor, shift: Tensor | None, inputs: tuple[Tensor, ...], relu: bool
) -> Callable[..., Tensor]:
    """Return a callable that computes [relu](conv(x, w) + shift + residual) as `optimize` does, with folded weights.

    `inputs` are tensors like those of a call, (x,) or (x, residual). The callable runs our kernel or what `optimize`
    binds of the library: one operator for everything, where that is possible and faster.

    A table's "infer" entry also decides the eval-mode path without `optimize`. There a separate normalise pass follows
    the library's convolution, so the library is slower than measured here. The comparison is made for `optimize`,
    because users who need speed use that.
    """
    weights = folded.Folded(w, shift, None if shift is None else shift.to(w.dtype))
    if pair.engines.infer in ("triton", "stem"):
        by: Any = folded.by_stem if pair.engines.infer == "stem" else folded.by_triton
        return partial(by, weights=weights, geometry=pair.geometry, relu=relu, precision=pair.engines.precision)
    added, shape = "residual" if len(inputs) > 1 else None, tuple(w.shape)
    conv = plan.Conv(plan.Pair("conv"), plan.INPUT, "y", pair.geometry, shape, added, relu)  # type: ignore[arg-type]
    outputs = plan.Outputs(("y",), plan.Place(0))
    with fastres.backend("cudnn"):
        bound, _ = Program([conv], outputs, {"y": weights}, {}, w.dtype)._bind_conv(conv, *inputs)
    return lambda *inputs: bound.call(*inputs)[0]


def joins(problem: ConvProblem, role: Role) -> bool:
    """Return whether fprop's work includes the end of the previous block, because our kernel may compute that on load.
    If it can't, the end is the same separate pass for all engines, and is left out."""
    return role.boundary and dispatch.joins(problem)


def stores_dz(pair: ConvBN, role: Role, operands: Operands) -> bool:
    """Return whether dz has to be stored before dgrad and wgrad because the engines of `pair` don't compute it on load.
    False if no engine could in this role."""
    return role.summed and not pair.fuses(operands.bn)


def half_of_dz(pair: ConvBN, operands: Operands) -> float:
    """Return half of the microseconds that storing dz takes. dgrad and wgrad are charged one half each."""
    return microseconds(lambda: pair.passes.backward_apply(operands.dz, *operands.bn)) / 2


def moved_bytes(problem: ConvProblem, pass_: str, itemsize: int, role: Role) -> int:
    """Return the fewest bytes that the work of `call` can move, given dispatch's rules for what is computed on load."""
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
    """Return how many tensors of dx's size the epilogue of dgrad reads.

    A projection reads none. A `boundary` reads the shortcut's gradient, and the output and z of the previous block. All
    others read one: z of the BatchNorm below, or the shortcut's gradient.
    """
    return 0 if role.place == "project" else 3 if role.boundary else 1


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a table with these columns, and make its folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, columns)
        writer.writeheader()
        writer.writerows(rows)


def applicable(problem: ConvProblem, pass_: str) -> bool:
    """Return whether the net needs this pass. All are needed, except that a stem (fewer than 8 channels) has no
    dgrad."""
    return pass_ != "dgrad" or problem.C >= 8


def microseconds(work: Callable[[], Any]) -> float:
    """Return the median time on the GPU, with L2 flushed before each run.

    The work is replayed as a CUDA graph, because a small layer takes less time than the host needs to launch it. Launch
    costs are a separate question: `optimize` replays a graph, and in training the host runs ahead of the GPU.
    """
    from triton.testing import do_bench

    work()  # compiles the kernels and lets cuDNN choose its algorithm
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # `torch.cuda.graph` would also synchronize and empty PyTorch's caches before each capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            kept = work()
        finally:
            graph.capture_end()
    us = 1e3 * do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    del kept, graph
    torch.cuda.empty_cache()  # a graph has its own memory pool, which is only freed here
    return us
