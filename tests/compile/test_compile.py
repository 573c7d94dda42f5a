"""torch.compile with our backend and, for our nets, with PyTorch's own: what is rewritten, and that it means the same.

Most tests compile with AOTAutograd alone behind the rewriting; Inductor, which is slow to compile, has a few tiny nets.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from cases import relative_error
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres import compile as compiler
from fastres.ops import dispatch

ALWAYS = {"fastres.rewrite": "always", "fastres.inner": "aot_eager"}
EXACT = 1e-11
COPIES = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default)  # for the sake of a layout


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.set_num_threads(1)


def conv_bn(c: int, k: int, side: int = 3, stride: int = 1, **kwargs: Any) -> nn.Sequential:
    conv = nn.Conv2d(c, k, side, stride, side // 2, bias=kwargs.pop("bias", False), **kwargs)
    bn = nn.BatchNorm2d(k)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return nn.Sequential(conv, bn)


def tiny(block: type[nn.Module] = BasicBlock, net: Any = torchvision.models.ResNet) -> nn.Module:
    return net(block, [2, 1, 1, 1], num_classes=5)


def outcome(model: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> dict[str, Any]:
    """Output, gradients and buffers after one forward and backward."""
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    y = model(*inputs)
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape))
    grads = {f"d{name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": inputs[0].grad, **grads, **dict(module.named_buffers())}


def check(
    module: nn.Module,
    *inputs: Tensor,
    train: bool = True,
    tolerance: float = EXACT,
    options: Any = ALWAYS,
    zero: Sequence[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """The compiled module does what the module does, strides included; the gradients `zero`, of which the module gives
    what rounding leaves, are zero. Returns the module that was compiled."""
    module.train(train)
    twin = copy.deepcopy(module)
    want = outcome(module, module, *inputs)
    got = outcome(torch.compile(twin, backend="fastres", options=options, **kwargs), twin, *inputs)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        if name in zero:
            assert torch.equal(got[name], torch.zeros_like(value)), name
            assert value.abs().max() < tolerance, name
        else:
            assert relative_error(got[name].double(), value.double()) < tolerance, name
        assert got[name].stride() == value.stride(), name
        assert got[name].dtype == value.dtype, name
    return twin


# What is rewritten.


def found(model: nn.Module, *shape: int) -> compiler.Explanation:
    with torch.device("meta"):
        x = torch.empty(shape or (2, 3, 64, 64))
    return fastres.explain(model.to("meta"), x)


def test_the_backend_is_found_by_its_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fastres")
    assert entry.load() is compiler.backend
    assert "fastres" in torch._dynamo.list_backends()
    assert lookup_backend("fastres") is compiler.backend


TORCHVISION = {
    "resnet18": 9,
    "resnet50": 17,
    "resnet34": 17,
    "resnet101": 34,
    "resnet152": 51,
    "resnext50_32x4d": 17,
    "resnext101_32x8d": 34,
    "resnext101_64x4d": 34,
    "wide_resnet50_2": 17,
    "wide_resnet101_2": 34,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.extra if i else ()) for i, name in enumerate(TORCHVISION)]
)
def test_all_of_torchvisions_resnets_is_rewritten(name: str) -> None:
    """Stem and every block, each as one call, in training and in eval without gradients."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        graph, _ = rewritten(model, torch.empty(2, 3, 64, 64))
    assert sum(node.target in COPIES for node in graph.nodes) == 1  # of the images
    told = found(model)
    assert (len(told.hits), told.misses, told.graphs, dict(told.graph_breaks)) == (TORCHVISION[name], (), 1, {})
    assert {hit.operator for hit in told.hits} == {"conv_bn_act"}
    assert sum(hit.pattern.endswith("project-ReLU") for hit in told.hits) == (
        3 if name in ("resnet18", "resnet34") else 4
    )
    with torch.no_grad():
        told = found(model.eval())
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert sum(int(hit.operator.removeprefix("conv_affine_act x")) for hit in told.hits) == convs


COVERED = {
    # net: chains, convolution-BN pairs in them, copies of images for the sake of a layout; NCHW in training
    "torchvision.resnet18": (9, 20, 1),
    "torchvision.densenet121": (59, 59, 59),
    "torchvision.vgg11_bn": (5, 8, 1),
    "torchvision.googlenet": (38, 57, 38),
    "timm.resnet18": (9, 20, 1),
    "timm.resnet50": (17, 53, 1),
    "timm.resnet50d": (20, 55, 7),
    "timm.seresnet50": (21, 53, 19),
    "timm.ecaresnet50d": (21, 55, 35),
    "timm.resnetrs50": (21, 56, 19),
    "timm.resnetv2_50": (16, 32, 16),
    "timm.skresnet18": (36, 36, 52),
    "timm.res2net50_26w_4s": (85, 85, 85),
    "timm.densenet121": (59, 59, 59),
}


def of_one_pixel(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return value is not None and value.shape[2:] == (1, 1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("torchvision.resnet18", "torchvision.vgg11_bn") else pytest.mark.extra)
        for name in COVERED
    ],
)
def test_caution_costs_no_coverage(name: str) -> None:
    """What is left alone for safety's sake isn't what these nets consist of."""
    library, _, builder = name.partition(".")
    with torch.device("meta"):
        if library == "timm":
            model = pytest.importorskip("timm").create_model(builder)
        else:
            own = {"aux_logits": False, "init_weights": False} if builder == "googlenet" else {}
            model = getattr(torchvision.models, builder)(**own)
        graph, told = rewritten(model.train(), torch.empty(2, 3, 128, 128))
    hits = [finding for finding in told if finding.hit]
    units = sum(hit.pattern.count("conv-BN") + ("project" in hit.pattern) for hit in hits)
    copies = sum(node.target in COPIES and not of_one_pixel(node) for node in graph.nodes)
    least, pairs, most = COVERED[name]
    assert (len(hits), units) >= (least, pairs)
    assert copies <= most


@pytest.mark.slow
def test_timms_resnets() -> None:
    timm = pytest.importorskip("timm")
    told = found(timm.create_model("resnet50"))
    assert (len(told.hits), told.misses) == (17, ())
    told = found(timm.create_model("seresnet50"))  # the SE gate stands between the last BN and the addition
    assert len(told.hits) == 1 + 16 + 4
    assert sum(hit.pattern == "conv-BN-ReLU-conv-BN-ReLU-conv-BN" for hit in told.hits) == 16
    assert sum(miss.pattern == "add-ReLU" for miss in told.misses) == 16
    assert sum(".se." in miss.layer for miss in told.misses) == 32
    told = found(timm.create_model("resnetv2_50"))  # BN stands before the convolution: conv1 and conv2 have one behind
    assert {hit.pattern for hit in told.hits} == {"conv-BN-ReLU-conv-BN-ReLU"}
    assert len(told.hits) == 16
    assert sum(miss.pattern == "BN-ReLU" for miss in told.misses) == 17
    assert all(miss.reason for miss in told.misses)


def test_explain_is_a_table_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    before = copy.deepcopy(model.state_dict())
    told = fastres.explain(model, torch.randn(2, 3, 8, 8))
    assert [(f.layer, f.pattern, f.operator) for f in told.findings] == [
        ("0.0", "conv-BN-ReLU", "conv_bn_act"),
        ("2", "conv", None),
    ]
    text = str(told)
    assert text.splitlines()[0].startswith("1 rewritten, 1 left, in 1 graph(s)")
    assert "stays: no BatchNorm behind it" in text
    if not torch.cuda.is_available():
        assert "not on this device: there are no fused kernels for cpu" in text
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastres.explain(torch.relu, torch.randn(1))


def test_explain_counts_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(3, 4), conv_bn(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    told = fastres.explain(Broken(), torch.randn(2, 3, 8, 8))
    assert told.graphs == 2
    assert len(told.hits) == 2
    assert len(told.graph_breaks) == 1
    assert "graph break" in str(told)


def test_options() -> None:
    x = torch.randn(2, 3, 8, 8)
    for options in ({"fastres.rewrite": "sometimes"}, {"fastres.tile": 1}):
        with pytest.raises(Exception, match="unknown option"):
            torch.compile(conv_bn(3, 4), backend="fastres", options=options)(x)
    with pytest.raises(Exception, match="takes neither"):
        torch.compile(conv_bn(3, 4), backend="fastres", options=ALWAYS | {"freezing": True})(x)


def rewritten(module: nn.Module, *inputs: Tensor, always: bool = True) -> tuple[fx.Graph, list[compiler.Finding]]:
    kept: list[Any] = []

    def record(gm: fx.GraphModule, given: list[Any]) -> Any:
        run = fx.GraphModule(gm, copy.deepcopy(gm.graph)).forward
        kept.append((gm.graph, compiler.rewrite(gm, given, always=always)))
        return run

    torch.compile(copy.deepcopy(module), backend=record, fullgraph=True)(*inputs)
    return kept[0]


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


def test_a_device_without_kernels_keeps_its_graph() -> None:
    if torch.cuda.is_available() or dispatch.interpreting():
        pytest.skip("there are kernels here")
    module, x = conv_bn(3, 4), torch.randn(2, 3, 8, 8)
    graph, told = rewritten(module, x, always=False)
    assert [f.reason for f in told] == ["there are no fused kernels for cpu"]
    assert not [n for n in graph.nodes if "fastres" in str(n.target)]
    with fastres.backend("reference"):
        assert [f.hit for f in rewritten(module, x, always=False)[1]] == [True]


# That it means the same.


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_torchvisions_blocks(block: type[nn.Module], train: bool, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = tiny(block).double().to(memory_format=layout)
    check(model, torch.randn(3, 3, 40, 33).double().to(memory_format=layout), train=train, fullgraph=True)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_option_a(train: bool) -> None:
    model = fastres.paper.cifar(8)
    graph, told = rewritten(model.train(train), torch.randn(2, 3, 16, 16))
    assert sum(f.pattern.endswith("pad-ReLU") for f in told) == 2
    assert not [n for n in graph.nodes if "pad_shortcut" in str(n.target)]
    check(model.double(), torch.randn(2, 3, 16, 16).double(), train=train, fullgraph=True)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_inference(block: type[nn.Module]) -> None:
    """Without gradients every BN is its convolution's epilogue; biased convolutions too."""
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


def test_training_mode_without_gradients() -> None:
    model = tiny().double().train()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        got = torch.compile(twin, backend="fastres", options=ALWAYS)(x)
        assert relative_error(got, model(x)) < EXACT
    for (name, a), b in zip(twin.named_buffers(), model.buffers(), strict=True):
        assert relative_error(a.double(), b.double()) < EXACT, name


class Case(nn.Module):
    """One conv-BN or two and a body that uses them."""

    def __init__(self, body: Callable[..., Tensor], *units: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, *self.units)


def moved_in_between(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    x = x * 1
    y = b(a(x).relu())
    x.mul_(2)
    return (y + x).relu()


def residual_in_place(x: Tensor, a: nn.Module) -> Tensor:
    x = x * 1
    x += a(x)
    return x.relu() + x


def read_statistics(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x)
    return y.relu() * a[1].running_mean.sum()


def autocast_in_between(x: Tensor, a: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        y = a(x)
    return (y + x).relu()


def setitem(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x)
    y[:, 0] = 0
    return y.relu()


def akamaster(x: Tensor, a: nn.Module) -> Tensor:
    return (a(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))).relu()


def gated(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x) * 0.5
    return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)))


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    # name: (module on [2, 6, 8, 7], patterns that hit, words from the reasons of the misses)
    "linear": (lambda: conv_bn(6, 8), ["conv-BN"], []),
    "chain": (lambda: nn.Sequential(conv_bn(6, 8), nn.ReLU(), conv_bn(8, 8), nn.ReLU(True)), ["conv-BN-ReLU-conv-BN-ReLU"], []),  # noqa: E501
    "grouped": (lambda: nn.Sequential(conv_bn(6, 8, groups=2), nn.ReLU6()), ["conv-BN"], []),
    "two users": (lambda: Case(lambda x, a: a(x).relu() + x.mean() * a[0](x), conv_bn(6, 6)), ["conv-BN-ReLU"], ["no BatchNorm"]),  # noqa: E501
    "conv read twice": (lambda: Case(lambda x, a: a[1](z := a[0](x)) + z, conv_bn(6, 6)), [], ["used beside"]),
    "other residual": (lambda: Case(lambda x, a: (x.sigmoid() + a(x)).relu(), conv_bn(6, 6)), ["conv-BN-join-ReLU"], []),  # noqa: E501
    "two branches": (
        lambda: Case(lambda x, a, b: (a(x) + b(x.sigmoid())).relu(), conv_bn(6, 8), conv_bn(6, 8)),
        ["conv-BN-join-ReLU", "conv-BN"],
        [],
    ),
    "doubled": (lambda: Case(lambda x, a: ((y := a(x)) + y).relu(), conv_bn(6, 6)), ["conv-BN"], ["Inductor"]),
    "broadcast": (lambda: Case(lambda x, a: (a(x) + x.mean((2, 3), True)).relu(), conv_bn(6, 6)), ["conv-BN"], ["Inductor"]),  # noqa: E501
    "no relu": (lambda: Case(lambda x, a: a(x) + x, conv_bn(6, 6)), ["conv-BN"], []),
    "asymmetric": (lambda: conv_bn(6, 8, stride=(2, 1)), [], ["one number for both"]),
    "same padding": (
        lambda: nn.Sequential(nn.Conv2d(6, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8)), [], ["one number"]
    ),
    "cumulative": (lambda: nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False, track_running_stats=False)), ["conv-BN"], []),  # noqa: E501
    "moved in between": (lambda: Case(moved_in_between, conv_bn(6, 6), conv_bn(6, 6)), [], ["writes into", "Inductor"]),
    "residual in place": (lambda: Case(residual_in_place, conv_bn(6, 6)), ["conv-BN"], ["Inductor"]),
    "statistics read": (lambda: Case(read_statistics, conv_bn(6, 6)), [], ["running statistics"]),
    "shared": (lambda: Case(lambda x, a: a(a(x).relu()).relu(), conv_bn(6, 6)), ["conv-BN-ReLU"] * 2, []),
    "autocast": (lambda: Case(autocast_in_between, conv_bn(6, 6)), [], ["mode changes", "Inductor"]),
    "setitem": (lambda: Case(setitem, conv_bn(6, 6)), ["conv-BN"], []),
    "view": (lambda: Case(lambda x, a: a(x).relu().view(x.shape[0], -1), conv_bn(6, 6)), ["conv-BN-ReLU"], []),
    "pooled view": (lambda: Case(lambda x, a: F.avg_pool2d(a(x).relu(), 2).view(x.shape[0], -1), conv_bn(6, 6)), ["conv-BN-ReLU"], []),  # noqa: E501
    "pad in front": (lambda: Case(akamaster, conv_bn(6, 8, stride=2)), ["conv-BN-join-ReLU"], []),
    "pad behind": (lambda: Case(gated, conv_bn(6, 8, stride=2)), ["conv-BN", "pad-add-ReLU"], []),
    "no conv": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(336, 4)), [], []),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), [], ["no convolution before it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_matches_and_what_must_not(name: str) -> None:
    build, hits, reasons = CASES[name]
    module, x = build().double(), torch.randn(2, 6, 8, 7).double()
    _, told = rewritten(module, x)
    assert [f.pattern for f in told if f.hit] == hits
    misses = [f.reason for f in told if not f.hit]
    assert len(misses) == len(reasons)
    assert all(words in reason for words, reason in zip(reasons, misses, strict=True)), misses
    in_place = name in ("moved in between", "residual in place")  # autograd refuses these
    with torch.set_grad_enabled(not in_place):
        check(module, x)


# What is changed in place, and who else reads it.


def then(change: Callable[[Tensor], Any], kept: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[..., Any]:
    """A unit's result, what is kept of it, a change of the result, and what was kept returned."""

    def body(x: Tensor, a: nn.Module) -> Tensor:
        y = a(x)
        names = kept(y)
        change(y)
        return names

    return body


def later(value: Callable[[Tensor], Tensor], change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A value made of a unit's result, changed."""

    def body(x: Tensor, a: nn.Module, *rest: nn.Module) -> Tensor:
        y = value(a(x))
        for layer in rest:
            y = layer(y)
        change(y)
        return y

    return body


def second_name_in_place(x: Tensor, a: nn.Module) -> tuple[Tensor, Tensor]:
    y = a(x)
    z = y.flatten(1)
    z.relu_()
    return y, z


def plus_equal(y: Tensor) -> None:
    y += 1.0


def cleared(y: Tensor) -> None:
    y[:, :1] = 0.0


def input_in_place(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x)
    x.mul_(2.0)
    return F.relu(y + x)


def moved_before_padding(x: Tensor, a: nn.Module) -> Tensor:
    x = x * 1.0
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    x.mul_(2.0)
    return F.relu(a(x) + shortcut)


def gate_in_place(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x) * 0.5
    whole = y[:]
    whole += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    return F.relu(whole) + y


def other_shape(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return F.relu(a(x) + b(x))


def statistics_of_another_mode(x: Tensor, a: nn.Module) -> Tensor:
    """The second call reads running statistics that the first one moves."""
    conv, norm = a
    y = F.relu(norm(conv(x)))
    return F.relu(F.batch_norm(conv(y), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 1e-5))


def padding_changed(x: Tensor, a: nn.Module) -> Tensor:
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    shortcut.mul_(2.0)
    return F.relu(a(x) + shortcut)


def changed_by_name(x: Tensor, a: nn.Module) -> Tensor:
    x = x * 1.0
    y = a(x)
    F.leaky_relu(input=x, negative_slope=0.1, inplace=True)
    return F.relu(y + x)


def statistics_without_batch_norm(x: Tensor, a: nn.Module) -> Tensor:
    """ATen's own function moves them, and says so nowhere."""
    conv, norm = a
    y = conv(x)
    with torch.no_grad():
        torch.ops.aten.native_batch_norm(x, None, None, norm.running_mean, norm.running_var, True, 0.5, 1e-5)
    return norm(y)


def turned(x: Tensor, a: nn.Module) -> Tensor:
    return a(x).transpose_(2, 3).transpose_(2, 3)


def detached(x: Tensor, a: nn.Module) -> Tensor:
    return F.relu(a(x)).detach_() + x


def moved_away(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x)
    with torch.no_grad():
        y.set_((x * 2.0).contiguous())
    return y * 1.0


_INPLACE = nn.ReLU(inplace=True)
SHARED: dict[str, tuple[Callable[..., Any], Callable[[], list[nn.Module]]]] = {
    # name: (body, its units on [3, 4, 8, 6]); each was, or might have been, wrong without a word
    **{
        f"{name} before return": (then(change), lambda: [conv_bn(4, 4)])
        for name, change in {
            "nn.ReLU(inplace)": _INPLACE,
            "F.relu(inplace)": lambda y: F.relu(y, inplace=True),
            "F.relu(x, True)": lambda y: F.relu(y, True),
            "relu_": torch.relu_,
            "add_": lambda y: y.add_(1.0),
            "+=": plus_equal,
            "setitem": cleared,
            "out=": lambda y: torch.add(y, 1.0, out=y),
            "a view's relu_": lambda y: y[:, :1].relu_(),
        }.items()
    },
    **{
        f"{name}, then relu_": (then(torch.relu_, kept), lambda: [conv_bn(4, 4)])
        for name, kept in {
            "view": lambda y: y.view(3, 4, -1) if y.is_contiguous() else y[:],
            "flatten(1)": lambda y: y.flatten(1),
            "flatten(2)": lambda y: y.flatten(2),
            "Identity": nn.Identity(),
            "contiguous": lambda y: y.contiguous(),
            "detach": lambda y: y.detach(),
            "unsqueeze": lambda y: y.unsqueeze(1),
            "permute": lambda y: y.permute(0, 2, 3, 1),
            "slice": lambda y: y[:, 1:],
            "clone": lambda y: y.clone(),
        }.items()
    },
    "a later conv, add_": (later(lambda y: y, lambda y: y.add_(1.0)), lambda: [conv_bn(4, 4), nn.Conv2d(4, 4, 1)]),
    "a later pool, relu_": (later(lambda y: F.max_pool2d(y, 2), torch.relu_), lambda: [conv_bn(4, 4)]),
    "a later slice, zero_": (later(lambda y: y * 2.0, lambda y: y[:, :1].zero_()), lambda: [conv_bn(4, 4)]),
    "flatten, relu_, both returned": (second_name_in_place, lambda: [conv_bn(4, 4)]),
    "two results, one memory": (lambda x, a: (y := a(x), y[:, :2]), lambda: [conv_bn(4, 4)]),
    "BatchNorm twice, once in a chain": (lambda x, a: a(a[1](x)), lambda: [conv_bn(4, 4)]),
    "BatchNorm twice, once read": (statistics_of_another_mode, lambda: [conv_bn(4, 4)]),
    "the input, changed": (input_in_place, lambda: [conv_bn(4, 4)]),
    "padded, then changed": (moved_before_padding, lambda: [conv_bn(4, 6, stride=2)]),
    "a view added to in place": (gate_in_place, lambda: [conv_bn(4, 6, stride=2)]),
    "padded, then the padding changed": (padding_changed, lambda: [conv_bn(4, 6, stride=2)]),
    "padded twice": (lambda x, a: F.relu(a(x) + F.pad(x[:2][:, :, ::2, ::2], (0, 0, 0, 0, 0, 2, 0, 1))), lambda: [conv_bn(4, 6, stride=2)]),  # noqa: E501
    "padded from a slice": (lambda x, a: F.relu(a(x)[:2] + F.pad(x[:2], (0, 0, 0, 0, 0, 2))), lambda: [conv_bn(4, 6)]),
    "padding first, other weights": (
        lambda x, a: F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)) + a(x)),
        lambda: [conv_bn(4, 6, stride=2).to(memory_format=torch.channels_last)],
    ),
    "changed by name": (changed_by_name, lambda: [conv_bn(4, 4)]),
    "relu by name": (lambda x, a: F.relu(input=a(x), inplace=True) + torch.relu(input=x), lambda: [conv_bn(4, 4)]),
    "one channel": (lambda x, a, b: b(F.relu(a(x))), lambda: [conv_bn(4, 1), nn.Conv2d(1, 5, 3)]),
    "one pixel": (lambda x, a, b: b(F.relu(a(x))), lambda: [nn.Sequential(nn.Conv2d(4, 4, (8, 6)), nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 5, 3)]),  # noqa: E501
    "an empty batch": (lambda x, a: a(x[:0]), lambda: [conv_bn(4, 4)]),
    "statistics moved by ATen": (statistics_without_batch_norm, lambda: [conv_bn(4, 4)]),
    "transpose_": (turned, lambda: [conv_bn(4, 4)]),
    "detach_": (detached, lambda: [conv_bn(4, 4)]),
    "set_": (moved_away, lambda: [conv_bn(4, 4)]),
    "a projection that broadcasts": (other_shape, lambda: [conv_bn(4, 4), nn.Sequential(nn.Conv2d(4, 4, (8, 6)), nn.BatchNorm2d(4))]),  # noqa: E501
}  # fmt: skip


# A convolution of channels_last to one channel has other strides on a CPU than PyTorch's own tracing says.
NCHW_ONLY = ("one channel", "one pixel")


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        *(pytest.param(name, False, id=f"{name}-nchw") for name in SHARED),
        *(
            pytest.param(name, True, id=f"{name}-nhwc", marks=pytest.mark.extra)
            for name in SHARED
            if name not in NCHW_ONLY
        ),
    ],
)
def test_what_changes_in_place_is_seen_by_all_who_read_it(name: str, channels_last: bool) -> None:
    """Results, gradients, statistics, the input and what shares memory are eager's."""
    body, units = SHARED[name]
    module = Case(body, *units()).double()
    for mode in fuzz.MODES:
        verdict = fuzz.compiled(lambda: copy.deepcopy(module), fuzz.images(0, channels_last), mode)
        assert verdict.faults == []
        assert not any("alone" in what for what in verdict.counts), mode


@pytest.mark.parametrize(
    "node", ["bn1", "layer1.0.bn2", "layer2.0.add", *(pytest.param(n, marks=pytest.mark.extra) for n in (
        "layer1.0.bn1", "layer1.0.add", "layer1.1.add", "layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1",
        "layer3.0.bn2", "layer3.0.add", "layer4.0.bn1", "layer4.0.downsample.1", "layer4.0.add",
    ))]
)  # fmt: skip
def test_features_before_an_inplace_relu(node: str) -> None:
    """torchvision's extractor returns what the net's own ReLU(inplace=True) changes on its way to the last node."""
    model = create_feature_extractor(tiny().double().eval(), [node, "flatten"])
    x = torch.randn(2, 3, 64, 64).double()
    want = model(x)
    got = torch.compile(model, backend="fastres", options=ALWAYS)(x)
    assert relative_error(got[node], want[node]) < EXACT
    assert relative_error(got["flatten"], want["flatten"]) < EXACT


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_bias_before_batch_norm(train: bool, affine: bool) -> None:
    """It shifts a batch's mean and the result not at all; behind running statistics it counts."""

    def unit() -> nn.Module:
        pair = conv_bn(6, 6, bias=True)
        if not affine:
            pair[1] = nn.BatchNorm2d(6, affine=False)
            pair[1].running_mean.normal_()
        nn.init.normal_(pair[0].bias)
        return pair

    module = Case(lambda x, a, b: (b(a(x).relu()) + x).relu(), unit(), unit()).double().train(train)
    x = torch.randn(3, 6, 8, 7).double()
    _, told = rewritten(module, x)
    assert [(f.pattern, f.hit) for f in told] == [("conv-BN-ReLU-conv-BN-add-ReLU", True)]
    check(module, x, train=train, zero=["dunits.0.0.bias", "dunits.1.0.bias"] if train else [])
    module.zero_grad()
    with torch.no_grad():
        check(module, x, train=train)
        module.units[1][0].bias[2] = torch.nan
        got = torch.compile(module, backend="fastres", options=ALWAYS)(x)
    assert got[:, 2].isnan().all()
    assert got[:, :2].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "size", "hits"), [("vgg11_bn", 32, 5), ("densenet121", 64, 59), ("googlenet", 64, 38)]
)
def test_nets_of_other_families(name: str, size: int, hits: int, train: bool) -> None:
    """VGG's convolutions have biases, DenseNet's BN stands before them, GoogLeNet's branches are concatenated."""
    own = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=5, **own).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    x = torch.randn(4, 3, size, size).double()
    assert len(fastres.explain(model, x).hits) == hits
    check(model, x, train=train, tolerance=1e-8, zero=[f"d{conv}.bias" for conv in convs] if train else [])


def test_a_torch_func_transform_in_the_graph_stays() -> None:
    module = conv_bn(3, 4).double().eval()
    x = torch.randn(2, 3, 6, 6).double()

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: module(t).relu().sum())(x)

    got = torch.compile(gradient, backend="fastres", options=ALWAYS)(x)
    assert relative_error(got, gradient(x)) < EXACT


def test_activation_checkpointing() -> None:
    inner = nn.Sequential(conv_bn(6, 6), nn.ReLU(), conv_bn(6, 6)).double()
    check(
        Case(lambda x, a: checkpoint(a, x, use_reentrant=False).relu(), inner).eval(),
        torch.randn(2, 6, 8, 7).double(),
        train=False,
    )


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(inside: bool) -> None:
    """bf16 activations with fp32 parameters; gradients come in fp32."""
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
        _, told = rewritten(model, x)
        assert all(f.hit for f in told)
        twin = copy.deepcopy(model)
        got = torch.compile(twin, backend="fastres", options=ALWAYS, fullgraph=True)(x)
        want = model(x)
    assert got.dtype == torch.bfloat16
    assert relative_error(got.double(), want.double()) < 0.05
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
            2 * relative_error(q.grad.double(), right.grad), 0.02
        ), name


@pytest.mark.slow
def test_data_parallel(tmp_path: Path) -> None:
    """Two processes over gloo; see `_rank` for what each of them asserts."""
    mp.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def _rank(rank: int, store: str) -> None:
    """DDP splits the graph between its buckets and each part is rewritten by itself: the same steps as uncompiled."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    units = (conv_bn(3, 128, bias=True), conv_bn(128, 128), conv_bn(128, 128))  # a bucket each

    def body(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        return c(b(a(x).relu()).relu()).relu().mean((2, 3))

    model = Case(body, *units).double()
    theirs, ours = (nn.parallel.DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=1) for _ in range(2))
    parts = 0

    def count(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal parts
        parts += any(finding.hit for finding in compiler.rewrite(gm, inputs, always=True))
        return lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(ours, backend=count)
    x = torch.randn(2, 2, 3, 8, 8).double()[rank]
    want = outcome(theirs, theirs, x)
    got = outcome(compiled, ours, x)
    for name, value in want.items():
        if name == "dmodule.units.0.0.bias":
            assert got[name].abs().max() < EXACT > value.abs().max(), "zero but for rounding"
        else:
            assert relative_error(got[name].double(), value.double()) < EXACT, name
    assert parts > 1
    torch.distributed.destroy_process_group()


# Inductor.


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


INDUCTOR = {"fastres.rewrite": "always"}


@pytest.mark.extra  # a quarter of a minute of the C++ compiler
def test_inductor_and_its_caches() -> None:
    """The second compilation of the same net comes from AOTAutograd's cache."""
    from torch._inductor.utils import fresh_cache

    x = torch.randn(2, 4, 10, 9)
    model = small()
    with fresh_cache():
        counters.clear()
        check(copy.deepcopy(model), x, tolerance=1e-5, options=INDUCTOR, zero=["d0.0.bias"], fullgraph=True)
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 0
        assert counters["aot_autograd"]["autograd_cache_miss"] == 1
        torch._dynamo.reset()
        check(copy.deepcopy(model), x, tolerance=1e-5, options=INDUCTOR, zero=["d0.0.bias"], fullgraph=True)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_inductor_freezing_with_dynamic_shapes() -> None:
    model = small().eval()
    options = INDUCTOR | {"freezing": True}
    compiled = torch.compile(model, backend="fastres", options=options, dynamic=True)
    with torch.no_grad():
        for n, h in ((2, 10), (3, 12)):
            x = torch.randn(n, 4, h, 9)
            assert relative_error(compiled(x), model(x)) < 1e-5


# Our nets and PyTorch's own backends; beside them ours on our nets.


def our_net(kind: str) -> nn.Module:
    resnet = fastres.models.resnet
    if kind == "cifar":
        return fastres.paper.cifar(8).double()
    return tiny(getattr(resnet, kind), resnet.ResNet).double()


def backend_called(name: str) -> Callable[..., Any]:
    """The backend `name`; "fastres" rewrites on every device, before AOTAutograd alone or before Inductor."""
    if name.startswith("fastres"):
        options = INDUCTOR if name == "fastres-inductor" else ALWAYS
        return functools.partial(compiler.backend, options=options)
    return lookup_backend(name)


def same_outcome(compiled: Callable[..., Tensor], twin: nn.Module, model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    twin.zero_grad()
    want, got = outcome(model, model, x), outcome(compiled, twin, x)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert relative_error(got[name].double(), value.double()) < 1e-9, (name, x.shape)


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
                "cifar": ("inductor", "fastres-inductor"),  # of sizes left open Inductor thinks for minutes
            }.items()
            for backend in backends
        ),
    ],
)
def test_one_graph_serves_eight_sizes(backend: str, kind: str, train: bool) -> None:
    """Multi-scale testing and training: no graph break, no recompilation; outputs, gradients, statistics as eager's."""
    # Where Inductor's forward picks another layout than eager's, its backward is compiled for the first sizes alone.
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("backend", ["inductor", "fastres-inductor"])
def test_our_nets_under_inductor(backend: str, mode: str) -> None:
    """In float64, where no ReLU falls on the other side of zero for rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = our_net("BasicBlock").to(device)
    twin = copy.deepcopy(model)
    named = backend if backend == "inductor" else backend_called(backend)
    compiled = torch.compile(twin, backend=named, mode=mode, fullgraph=True)
    for _ in range(3):  # a CUDA graph is recorded on the second call and replayed on the third
        same_outcome(compiled, twin, model, torch.randn(4, 3, 64, 64, device=device).double())


@pytest.mark.gpu
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_our_nets_under_cudagraphs(train: bool) -> None:
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
    """Forward and backward of a rewritten net on kernels, at shapes for Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(conv_bn(8, 16, bias=True), nn.ReLU(), conv_bn(16, 16, 1), nn.ReLU()).to(device)
    x = torch.randn(2, 8, 6, 6, device=device)
    with fastres.backend("triton"):
        check(model, x, tolerance=1e-2, options={"fastres.inner": "aot_eager"}, zero=["d0.0.bias"])
        with torch.no_grad():
            model.eval()
            compiled = torch.compile(model, backend="fastres", options={"fastres.inner": "aot_eager"})
            assert relative_error(compiled(x).double(), model(x).double()) < 1e-2
