"""Time a few convolutions under pytest-benchmark, to follow single kernels over time. `kernels.py` times all of them.

    pytest bench/conv_benchmark.py --benchmark-only --benchmark-json out/convolutions.json

Compares our kernels with the library's engine, in bf16 at batch 256. If an engine needs a stored dz (the gradient of
the convolution's output), it is stored before the timing. Needs a CUDA GPU.
"""

from __future__ import annotations

import layers
import pytest
import torch
from layers import Operands, Role, name

import fastres
from fastres.kernels.problem import ConvProblem

SHAPES = [
    ConvProblem(256, 56, 56, 64, 256),
    ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1),
    ConvProblem(256, 28, 28, 128, 128, 3, 3, 1, 1),
    ConvProblem(256, 14, 14, 1024, 256),
    ConvProblem(256, 14, 14, 256, 256, 3, 3, 1, 1),
    ConvProblem(256, 7, 7, 512, 512, 3, 3, 1, 1),
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
@pytest.mark.parametrize("pass_", layers.PASSES)
@pytest.mark.parametrize("problem", SHAPES, ids=name)
def test_convolution(benchmark, problem: ConvProblem, pass_: str, backend: str) -> None:
    device = torch.device("cuda")
    operands = Operands.random(problem, torch.bfloat16, device)
    role = Role("inner", summed=True)
    with fastres.backend(backend):
        work = layers.call(layers.pair(problem, torch.bfloat16, device), pass_, operands, role)

    def synchronised() -> None:
        work()
        torch.cuda.synchronize()

    benchmark.group = f"{pass_} {name(problem)}"
    benchmark(synchronised)
