"""Test that rewritten nets give the results, gradients and running statistics of eager.

The rewritten graphs are compiled by AOTAutograd alone, because Inductor takes long to compile.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from cases import relative_error
from compiled import ALWAYS, Case, check, conv_bn, outcome, rewritten, tiny
from tolerances import AUTOCAST, AUTOCAST_GRADIENTS, EXACT, EXACT_ANY_NET, TWICE
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres.compile.rewrite import rewrite_graph

pytestmark = pytest.mark.usefixtures("compiled_afresh")


def test_only_operators_are_inserted() -> None:
    """A Python function in the graph would bypass AOTAutograd's cache."""
    module = tiny().train()
    x = torch.randn(2, 3, 32, 32)
    graph, _ = rewritten(module, x)
    own = [n.target for n in graph.nodes if n.op == "call_function" and "fastres" in str(n.target)]
    assert len(own) == 6
    assert all(isinstance(target, torch._ops.OpOverload) for target in own)
    for node in graph.nodes:
        if node.op == "call_method":
            assert "example_value" in node.args[0].meta


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_torchvisions_blocks_give_eagers_results(block: type[nn.Module], train: bool, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = tiny(block).double().to(memory_format=layout)
    check(model, torch.randn(3, 3, 40, 33).double().to(memory_format=layout), train=train, fullgraph=True)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_option_as_shortcut_becomes_part_of_its_match(train: bool) -> None:
    model = fastres.paper.cifar(8)
    graph, findings = rewritten(model.train(train), torch.randn(2, 3, 16, 16))
    assert sum(f.pattern.endswith("pad-ReLU") for f in findings) == 2
    assert not [n for n in graph.nodes if "pad_shortcut" in str(n.target)]
    check(model.double(), torch.randn(2, 3, 16, 16).double(), train=train, fullgraph=True)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_without_gradients_every_batch_norm_is_an_epilogue(block: type[nn.Module]) -> None:
    """Without gradients no BatchNorm is left in the graph, also after a convolution with a bias."""
    model = nn.Sequential(tiny(block), nn.Unflatten(1, (5, 1, 1)), conv_bn(5, 4, 1, bias=True)).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    compiled = torch.compile(model, backend="fastres", options=ALWAYS, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < EXACT
        graph, _ = rewritten(model, x)
    assert not [n for n in graph.nodes if n.target is F.batch_norm]
    torch._dynamo.reset()
    with torch.inference_mode():
        assert relative_error(compiled(x), model(x)) < EXACT
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert relative_error(torch.compile(frozen, backend="fastres", options=ALWAYS)(x), model(x)) < EXACT


def test_statistics_move_in_training_mode_without_gradients() -> None:
    model = tiny().double().train()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        got = torch.compile(twin, backend="fastres", options=ALWAYS)(x)
        assert relative_error(got, model(x)) < EXACT
    for (name, a), b in zip(twin.named_buffers(), model.buffers(), strict=True):
        assert relative_error(a.double(), b.double()) < EXACT, name


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_bias_before_batch_norm_matters_with_running_statistics_only(train: bool, affine: bool) -> None:
    """With batch statistics the bias cancels and gets the gradient 0. With running statistics it changes the result."""

    def biased_pair() -> nn.Module:
        pair = conv_bn(6, 6, bias=True)
        if not affine:
            pair[1] = nn.BatchNorm2d(6, affine=False)
            pair[1].running_mean.normal_()
        nn.init.normal_(pair[0].bias)
        return pair

    module = Case(lambda x, a, b: (b(a(x).relu()) + x).relu(), biased_pair(), biased_pair()).double().train(train)
    x = torch.randn(3, 6, 8, 7).double()
    _, findings = rewritten(module, x)
    assert [(f.pattern, f.hit) for f in findings] == [("conv-BN-ReLU-conv-BN-add-ReLU", True)]
    check(module, x, train=train, zero=["dpairs.0.0.bias", "dpairs.1.0.bias"] if train else [])
    module.zero_grad()
    with torch.no_grad():
        check(module, x, train=train)
        module.pairs[1][0].bias[2] = torch.nan
        got = torch.compile(module, backend="fastres", options=ALWAYS)(x)
    assert got[:, 2].isnan().all()
    assert got[:, :2].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "size", "hits"), [("vgg11_bn", 32, 5), ("densenet121", 64, 59), ("googlenet", 64, 38)]
)
def test_nets_of_other_families_give_eagers_results(name: str, size: int, hits: int, train: bool) -> None:
    """VGG's convolutions have biases, DenseNet's BN precedes its convolutions, GoogLeNet concatenates branches."""
    own = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=5, **own).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    x = torch.randn(4, 3, size, size).double()
    assert len(fastres.explain(model, x).hits) == hits
    check(model, x, train=train, tolerance=EXACT_ANY_NET, zero=[f"d{conv}.bias" for conv in convs] if train else [])


def test_activation_checkpoints_give_eagers_results() -> None:
    inner = nn.Sequential(conv_bn(6, 6), nn.ReLU(), conv_bn(6, 6)).double()
    check(
        Case(lambda x, a: checkpoint(a, x, use_reentrant=False).relu(), inner).eval(),
        torch.randn(2, 6, 8, 7).double(),
        train=False,
    )


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast_computes_in_bf16_as_eager_does(inside: bool) -> None:
    """Activations are bfloat16, parameters and their gradients float32, and the errors are like those of eager."""
    net = tiny()

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    model = Autocast() if inside else net
    x = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        _, findings = rewritten(model, x)
        assert all(f.hit for f in findings)
        twin = copy.deepcopy(model)
        got = torch.compile(twin, backend="fastres", options=ALWAYS, fullgraph=True)(x)
        want = model(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.double(), want.double()) < AUTOCAST
    got.float().square().mean().backward()
    want.float().square().mean().backward()
    exact = copy.deepcopy(net).double()
    for p in exact.parameters():
        p.grad = None
    exact(x.double()).square().mean().backward()
    mine = twin.net if inside else twin
    for (name, p), q, right in zip(mine.named_parameters(), net.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert relative_error(p.grad.double(), right.grad) < max(
            TWICE * relative_error(q.grad.double(), right.grad), AUTOCAST_GRADIENTS
        ), name


@pytest.mark.slow
def test_a_data_parallel_net_is_rewritten_part_by_part(tmp_path: Path) -> None:
    """Two processes over gloo run the same step compiled and uncompiled; `_rank` has the assertions."""
    mp.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def _rank(rank: int, store: str) -> None:
    """Check one rank: DDP splits the graph at its buckets, several parts are rewritten, and the results are eager's."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    pairs = (conv_bn(3, 128, bias=True), conv_bn(128, 128), conv_bn(128, 128))  # one bucket for each pair

    def body(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        return c(b(a(x).relu()).relu()).relu().mean((2, 3))

    model = Case(body, *pairs).double()
    theirs, ours = (nn.parallel.DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=1) for _ in range(2))
    parts = 0

    def count(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal parts
        parts += any(finding.hit for finding in rewrite_graph(gm, inputs, always=True))
        return lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(ours, backend=count)
    x = torch.randn(2, 2, 3, 8, 8).double()[rank]
    want = outcome(theirs, theirs, x)
    got = outcome(compiled, ours, x)
    for name, value in want.items():
        if name == "dmodule.pairs.0.0.bias":
            assert got[name].abs().max() < EXACT > value.abs().max(), "zero but for rounding"
        else:
            assert relative_error(got[name].double(), value.double()) < EXACT, name
    assert parts > 1
    torch.distributed.destroy_process_group()
