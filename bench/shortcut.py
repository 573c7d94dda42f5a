"""Compare the option-A shortcut on the CPU with plain PyTorch: `pytest bench/shortcut.py --benchmark-only`.

Covers every option-A transition of ResNet-18/34 (224 pixels) and of the CIFAR nets, times batch, dtype and memory
format, alone and fused with the block's addition and ReLU. A group of rows is one problem: `reference` is F.pad (+ add
+ relu), `fastres` the operator. `forward` records for autograd, and `backward` computes the gradients of the inputs.
Times are the CPU time of one thread, which other load on the machine hardly affects. They describe this machine and
have no limits to meet. `--benchmark-json FILE` saves them, and `-k` selects ("fused and nhwc and 128").
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fastres.ops import extension, reference, shortcut

TRANSITIONS = {  # C and H = W; the transition halves H and doubles C
    "imagenet 56": (64, 56),
    "imagenet 28": (128, 28),
    "imagenet 14": (256, 14),
    "cifar 32": (16, 32),
    "cifar 16": (32, 16),
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("module", [reference, shortcut], ids=["reference", "fastres"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("form", ["alone", "fused"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_shortcut(
    benchmark: pytest.FixtureRequest,
    transition: str,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    form: str,
    direction: str,
    module: ModuleType,
) -> None:
    assert extension.load("cpu"), extension.status().reason
    C, H = TRANSITIONS[transition]

    def tensor(channels: int, size: int) -> torch.Tensor:
        data = torch.randn(batch, channels, size, size, dtype=dtype)
        return data.contiguous(memory_format=FORMATS[layout])

    x, y, grad = tensor(C, H).requires_grad_(), tensor(2 * C, H // 2).requires_grad_(), tensor(2 * C, H // 2)
    inputs = (x,) if form == "alone" else (y, x)

    def forward() -> torch.Tensor:
        return module.pad_shortcut(x, 2, 2 * C) if form == "alone" else module.pad_shortcut_add_relu(y, x, 2)

    benchmark.group = f"{transition} batch {batch} {dtype} {layout} {form} {direction}"
    if direction == "forward":
        benchmark(forward)
    else:
        out = forward()
        benchmark(torch.autograd.grad, out, inputs, grad, retain_graph=True)
