"""On a GPU, 20 runs from the same weights on the same images give bit-identical results.

The results are a training step's loss, gradients and buffers, and the outputs of `optimize`. They are checked twice:
with the engines that the tables choose and deterministic cuDNN, and with backend("triton"), which needs no such switch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
from fastres.cuda_graph import WARM_UPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        ("backend", "deterministic"), [("auto", True), ("triton", False)], ids=["auto, cuDNN deterministic", "triton"]
    ),
]
RUNS = 20


def images() -> Tensor:
    return torch.randn(32, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
def test_20_runs_of_a_step(graphed: bool, backend: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    net = fastres.resnet50().cuda().to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    x, labels = images(), torch.arange(32, device="cuda")

    def step(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(net(x), labels)
        loss.backward()
        found = (loss, *(p.grad for p in net.parameters()))
        net.zero_grad(set_to_none=True)
        return found

    call: Any = fastres.graphed(step, net) if graphed else step
    with fastres.backend(backend):
        for run in range(-WARM_UPS if graphed else 0, RUNS):
            net.load_state_dict(start)
            found = [t.detach().clone() for t in (*call(x, labels), *net.buffers())]
            if run <= 0:  # a library may choose other algorithms during graph capture
                want = found
            differing = [i for i, (a, b) in enumerate(zip(found, want, strict=True)) if not torch.equal(a, b)]
            assert not differing, f"run {run}: {len(differing)} of {len(want)} tensors, the first {differing[0]}"
    assert not graphed or len(call.graphs) == 1


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
def test_20_runs_of_optimize(graphed: bool, backend: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    x = images().bfloat16()
    with fastres.backend(backend):
        net = fastres.optimize(fastres.resnet50().cuda().eval(), dtype=torch.bfloat16, cuda_graph=graphed)
        want = net(x)
        assert want.isfinite().all()
        assert all(torch.equal(net(x), want) for _ in range(RUNS - 1))
