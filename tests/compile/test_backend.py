"""Test the backend through `torch.compile`, also with Inductor, and PyTorch's own backends on fastres's nets."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative_error
from compiled import ALWAYS, check, conv_bn, outcome, rewritten, tiny
from tolerances import EXACT_GRADIENTS, KERNELS_GRADIENTS, SUMS
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.compile import backend
from fastres.ops import dispatch

pytestmark = pytest.mark.usefixtures("compiled_afresh")

INDUCTOR = {"fastres.rewrite": "always"}


def test_the_backend_is_found_by_its_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fastres")
    assert entry.load() is backend
    assert "fastres" in torch._dynamo.list_backends()
    assert lookup_backend("fastres") is backend


def test_unknown_options_are_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    for options in ({"fastres.rewrite": "sometimes"}, {"fastres.tile": 1}):
        with pytest.raises(Exception, match="unknown option"):
            torch.compile(conv_bn(3, 4), backend="fastres", options=options)(x)
    with pytest.raises(Exception, match="accepts neither"):
        torch.compile(conv_bn(3, 4), backend="fastres", options=ALWAYS | {"freezing": True})(x)


def test_a_device_without_kernels_keeps_its_graph() -> None:
    if torch.cuda.is_available() or dispatch.interpreting():
        pytest.skip("there are kernels here")
    module, x = conv_bn(3, 4), torch.randn(2, 3, 8, 8)
    graph, findings = rewritten(module, x, always=False)
    assert [f.reason for f in findings] == ["there are no fused kernels for cpu"]
    assert not [n for n in graph.nodes if "fastres" in str(n.target)]
    with fastres.backend("reference"):
        assert [f.hit for f in rewritten(module, x, always=False)[1]] == [True]


def small() -> nn.Module:
    body = nn.Sequential(
        conv_bn(4, 8, bias=True),
        nn.ReLU(),
        conv_bn(8, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return body


@pytest.mark.extra  # the C++ compiler takes about 15 seconds
def test_the_second_compilation_comes_from_the_cache() -> None:
    """AOTAutograd's cache serves the second compilation of the same net."""
    from torch._inductor.utils import fresh_cache

    x = torch.randn(2, 4, 10, 9)
    model = small()
    with fresh_cache():
        counters.clear()
        check(copy.deepcopy(model), x, tolerance=SUMS, options=INDUCTOR, zero=["d0.0.bias"], fullgraph=True)
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
        assert counters["aot_autograd"]["autograd_cache_miss"] == 1
        torch._dynamo.reset()
        check(copy.deepcopy(model), x, tolerance=SUMS, options=INDUCTOR, zero=["d0.0.bias"], fullgraph=True)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_inductor_freezes_weights_under_dynamic_shapes() -> None:
    model = small().eval()
    options = INDUCTOR | {"freezing": True}
    compiled = torch.compile(model, backend="fastres", options=options, dynamic=True)
    with torch.no_grad():
        for n, h in ((2, 10), (3, 12)):
            x = torch.randn(n, 4, h, 9)
            assert relative_error(compiled(x), model(x)) < SUMS


def our_net(kind: str) -> nn.Module:
    resnet = fastres.models.resnet
    if kind == "cifar":
        return fastres.paper.cifar(8).double()
    return tiny(getattr(resnet, kind), resnet.ResNet).double()


def backend_called(name: str) -> Callable[..., Any]:
    """Return the backend `name`.

    "fastres" rewrites on every device and then compiles by AOTAutograd alone, "fastres-inductor" by Inductor.
    """
    if name.startswith("fastres"):
        options = INDUCTOR if name == "fastres-inductor" else ALWAYS
        return functools.partial(backend, options=options)
    return lookup_backend(name)


def same_outcome(compiled: Callable[..., Tensor], twin: nn.Module, model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    twin.zero_grad()
    want, got = outcome(model, model, x), outcome(compiled, twin, x)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert relative_error(got[name].double(), value.double()) < EXACT_GRADIENTS, (name, x.shape)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("aot_eager", "cifar"),
        ("fastres", "cifar"),
        *(
            pytest.param(backend, kind, marks=pytest.mark.slow)
            for kind, backends in {
                "BasicBlock": ("aot_eager", "fastres"),
                "Bottleneck": ("aot_eager", "fastres"),
                "cifar": ("inductor", "fastres-inductor"),  # Inductor takes minutes for dynamic sizes
            }.items()
            for backend in backends
        ),
    ],
)
def test_one_graph_serves_eight_sizes(backend: str, kind: str, train: bool) -> None:
    """One dynamic graph serves all image sizes, as multi-scale training and testing require.

    There is no graph break and no recompilation. Outputs, gradients and statistics are those of eager.
    """
    # If Inductor's forward picks another layout than eager, its backward is compiled for the first sizes only.
    layout = torch.channels_last if backend == "inductor" else torch.contiguous_format
    model = our_net(kind).train(train).to(memory_format=layout)
    twin, called, graphs = copy.deepcopy(model), backend_called(backend), 0

    def count(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return called(gm, inputs)

    compiled = torch.compile(twin, backend=count, fullgraph=True)

    def dynamic(x: Tensor) -> Tensor:
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, dim)
        return compiled(x)

    with torch.set_grad_enabled(train):
        for i in range(8):
            x = torch.randn(2 + i % 2, 3, 40 + 8 * i, 96 - 8 * (i // 2)).double()
            same_outcome(dynamic, twin, model, x.to(memory_format=layout))
    assert graphs == 1


SIZES = [(4, 64, 64), (4, 96, 64), (3, 64, 96), (4, 48, 80), (2, 80, 64), (4, 64, 128), (3, 112, 48), (4, 96, 96)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_sizes_that_vary_compile_no_more_often_than_in_stock(norm: type[nn.Module], train: bool, inner: str) -> None:
    """Dynamo makes the image size symbolic at the second size, the batch size at the second batch; then no graph more.

    A short last batch needs no graph of its own either. Stock Inductor compiles more graphs in training if its forward
    picks another memory format than eager.
    """
    model = nn.Sequential(conv_bn(3, 8, norm=norm), nn.ReLU(), nn.MaxPool2d(2), BasicBlock(8, 8, norm_layer=norm))
    model.double().train(train)

    def compilations(called: Callable[..., Any]) -> list[int]:
        torch._dynamo.reset()
        twin, graphs, after = copy.deepcopy(model), 0, []

        def count(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            nonlocal graphs
            graphs += 1
            return called(gm, inputs)

        compiled = torch.compile(twin, backend=count, fullgraph=True)
        with torch.set_grad_enabled(train):
            for n, h, w in SIZES:
                same_outcome(compiled, twin, model, torch.randn(n, 3, h, w).double())
                after.append(graphs)
        return after

    options = {"fastres.rewrite": "always", "fastres.inner": inner}
    ours = compilations(functools.partial(backend, options=options))
    assert ours == [1, 2, 3, 3, 3, 3, 3, 3]
    assert all(a <= b for a, b in zip(ours, compilations(lookup_backend(inner)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("backend", ["inductor", "fastres-inductor"])
def test_inductor_compiles_our_nets(backend: str, mode: str) -> None:
    """Inductor's outcome is that of eager. In float64 rounding does not move values across a ReLU's zero."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = our_net("BasicBlock").to(device)
    twin = copy.deepcopy(model)
    named = backend if backend == "inductor" else backend_called(backend)
    compiled = torch.compile(twin, backend=named, mode=mode, fullgraph=True)
    for _ in range(3):  # a CUDA graph is recorded on the second call and replayed on the third
        same_outcome(compiled, twin, model, torch.randn(4, 3, 64, 64, device=device).double())


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_cudagraphs_compiles_our_nets(train: bool) -> None:
    model = our_net("BasicBlock").cuda().train(train)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="cudagraphs", fullgraph=True)
    with torch.set_grad_enabled(train):
        for _ in range(3):
            same_outcome(compiled, twin, model, torch.randn(4, 3, 64, 64, device="cuda").double())


def test_exported_nets_hold_aten_only_and_load_without_fastres(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    for kind in ("cifar", "Bottleneck"):
        model = our_net(kind).float().eval()
        program = torch.export.export(model, (x,))
        targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert all(target.startswith(("aten.", "<built-in function getitem>")) for target in targets), targets
        torch.export.save(program, tmp_path / f"{kind}.pt2")
        torch.save((x, model(x)), tmp_path / f"{kind}.pt")
    code = """
import pathlib, sys, torch
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    x, y = torch.load(file.with_suffix(".pt"))
    torch.testing.assert_close(torch.export.load(file).module()(x), y)
    print(file.stem)
assert not any(name.startswith("fastres") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Bottleneck", "cifar"]


@pytest.mark.interpret
def test_kernels_serve_a_compiled_net() -> None:
    """A rewritten net runs forward and backward on kernels. The shapes are small enough for Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(conv_bn(8, 16, bias=True), nn.ReLU(), conv_bn(16, 16, 1), nn.ReLU()).to(device)
    x = torch.randn(2, 8, 6, 6, device=device)
    with fastres.backend("triton"):
        check(model, x, tolerance=KERNELS_GRADIENTS, options={"fastres.inner": "aot_eager"}, zero=["d0.0.bias"])
        with torch.no_grad():
            model.eval()
            compiled = torch.compile(model, backend="fastres", options={"fastres.inner": "aot_eager"})
            assert relative_error(compiled(x).double(), model(x).double()) < KERNELS_GRADIENTS
