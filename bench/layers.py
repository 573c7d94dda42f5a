"""What `kernels.py` and `tune.py` share: the convolutions of a net, random operands for one, timing on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastres
from fastres.kernels.problem import ConvProblem, model_problems
from fastres.ops import launch
from fastres.ops.launch import Step
from fastres.ops.steps import Geometry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What a user waits for: inference with everything in one epilogue, and the three passes of training.
PASSES = ("infer", "fprop", "dgrad", "wgrad")


def problems(depth: int, batch: int, size: int) -> Counter[ConvProblem]:
    """The convolutions of torchvision's ResNet of that depth and how often each occurs."""
    with torch.device("meta"):
        return model_problems(getattr(fastres, f"resnet{depth}")(), (batch, 3, size, size))


def name(p: ConvProblem) -> str:
    """The layer as a table names it: filter/stride, channels, image."""
    stride = f"/{p.stride}" if p.stride > 1 else ""
    groups = f" g{p.groups}" if p.groups > 1 else ""
    return f"{p.R}x{p.S}{stride} {p.C}->{p.K} @{p.H}x{p.W}{groups}"


@dataclass
class Operands:
    """Random tensors for every pass of one convolution, as a net in training holds them."""

    x: Tensor
    w: Tensor
    z: Tensor
    dz: Tensor
    a_affine: tuple[Tensor, Tensor]
    mean: Tensor
    bn: tuple[Tensor, Tensor, Tensor, Tensor]
    out_affine: tuple[Tensor, Tensor]

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
            x=normal(p.N, p.H, p.W, p.C),
            w=normal(p.K, p.R, p.S, p.C // p.groups) * (p.R * p.S * p.C // p.groups) ** -0.5,
            z=z,
            dz=normal(p.N, p.P, p.Q, p.K),
            a_affine=(vector(p.C), vector(p.C) - 1),
            mean=vector(p.C) - 1,
            bn=(z, vector(p.K), 0.01 * vector(p.K), 0.01 * vector(p.K)),
            out_affine=(vector(p.K), vector(p.K) - 1),
        )


def step(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Step:
    """The convolution's step with the engines that are in force (`fastres.backend`)."""
    p = problem
    weight = torch.empty((p.K, p.C // p.groups, p.R, p.S), device="meta")
    return launch.step((p.N, p.H, p.W), weight, Geometry(p.stride, p.pad, p.dilation, p.groups), dtype, device)


def call(step: Step, pass_: str, operands: Operands) -> Callable[[], Any]:
    """The work of one pass on one engine, everything between two convolutions of a net included: "infer" ends with BN
    and ReLU, "fprop" begins with them and ends with statistics, "dgrad" and "wgrad" apply BN's backward first."""
    o, first = operands, step.problem.C < 8  # the stem has no activation before it
    scale, shift = o.out_affine
    if pass_ == "infer":
        return lambda: step.infer(o.x, o.w, scale, shift)
    if pass_ == "fprop":
        return lambda: step.fprop_statistics(o.x, o.w, None if first else o.a_affine)
    if pass_ == "dgrad":
        return lambda: step.dgrad_masked(o.dz, o.w, o.x, o.a_affine, o.mean, o.bn)
    return lambda: step.wgrad(o.dz, o.x, o.bn, None if first else o.a_affine, torch.float32)


def moved_bytes(problem: ConvProblem, pass_: str, itemsize: int) -> int:
    """The fewest bytes that `call` can move: dgrad also reads z of both BNs, wgrad z of one."""
    extra = {"dgrad": problem.x_numel + problem.y_numel, "wgrad": problem.y_numel}.get(pass_, 0)
    return problem.min_bytes(itemsize) + itemsize * extra


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
        graph.capture_begin()  # `torch.cuda.graph` also collects garbage, which takes longer than the measurement
        try:
            kept = work()
        finally:
            graph.capture_end()
    us = 1e3 * do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    del kept, graph
    torch.cuda.empty_cache()  # a graph's memory is its own and is only given back here
    return us
