"""Test which parts of a net match, which must not, and the reasons given for those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import relative_error
from compiled import ALWAYS, Case, check, conv_bn, pairs_in, rewritten
from tolerances import EXACT
from torch import Tensor, fx, nn

import fastres
import fastres.compile

pytestmark = pytest.mark.usefixtures("compiled_afresh")

COPIES = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default)  # copies that change the memory format


def explained(model: nn.Module, *shape: int) -> fastres.compile.Explanation:
    with torch.device("meta"):
        x = torch.empty(shape or (2, 3, 64, 64))
    return fastres.explain(model.to("meta"), x)


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
    """The stem and every block become one call in training. In eval mode without gradients every pair is rewritten."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        graph, _ = rewritten(model, torch.empty(2, 3, 64, 64))
    assert sum(node.target in COPIES for node in graph.nodes) == 1  # of the images
    explanation = explained(model)
    assert (len(explanation.hits), explanation.misses) == (TORCHVISION[name], ())
    assert (explanation.graphs, explanation.graph_breaks) == (1, {})
    assert {hit.operator for hit in explanation.hits} == {"conv_bn_act"}
    assert sum(hit.pattern.endswith("project-ReLU") for hit in explanation.hits) == (
        3 if name in ("resnet18", "resnet34") else 4
    )
    with torch.no_grad():
        explanation = explained(model.eval())
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert sum(int(hit.operator.removeprefix("conv_affine_act x")) for hit in explanation.hits) == convs


COVERED = {
    # net: matches, pairs in them, copies that change the memory format; in training with NCHW images
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
def test_safety_checks_cost_no_coverage(name: str) -> None:
    """Some code is left alone for safety; these nets still have all their matches, and no more copies than expected."""
    library, _, builder = name.partition(".")
    with torch.device("meta"):
        if library == "timm":
            model = pytest.importorskip("timm").create_model(builder)
        else:
            own = {"aux_logits": False, "init_weights": False} if builder == "googlenet" else {}
            model = getattr(torchvision.models, builder)(**own)
        graph, findings = rewritten(model.train(), torch.empty(2, 3, 128, 128))
    hits = [finding for finding in findings if finding.hit]
    copies = sum(node.target in COPIES and not of_one_pixel(node) for node in graph.nodes)
    fewest_hits, fewest_pairs, most_copies = COVERED[name]
    assert len(hits) >= fewest_hits
    assert pairs_in(findings) >= fewest_pairs
    assert copies <= most_copies


@pytest.mark.slow
def test_timms_resnets_are_matched_around_what_timm_adds() -> None:
    timm = pytest.importorskip("timm")
    explanation = explained(timm.create_model("resnet50"))
    assert (len(explanation.hits), explanation.misses) == (17, ())
    explanation = explained(timm.create_model("seresnet50"))  # the SE gate is between the last BN and the addition
    assert len(explanation.hits) == 1 + 16 + 4
    assert sum(hit.pattern == "conv-BN-ReLU-conv-BN-ReLU-conv-BN" for hit in explanation.hits) == 16
    assert sum(miss.pattern == "add-ReLU" for miss in explanation.misses) == 16
    assert sum(".se." in miss.layer for miss in explanation.misses) == 32
    explanation = explained(timm.create_model("resnetv2_50"))  # pre-activation: only conv1 and conv2 precede a BN
    assert {hit.pattern for hit in explanation.hits} == {"conv-BN-ReLU-conv-BN-ReLU"}
    assert len(explanation.hits) == 16
    assert sum(miss.pattern == "BN-ReLU" for miss in explanation.misses) == 17
    assert all(miss.reason for miss in explanation.misses)


def write_between(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
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


def padded_twice(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    """The second shortcut reads the output of the first one's block."""
    x = F.relu(a(x) * 0.5 + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)))
    return F.relu(b(x) * 0.5 + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2)))


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    # name: (module on [2, 6, 8, 7], patterns that hit, words from the reasons of the misses)
    "linear": (lambda: conv_bn(6, 8), ["conv-BN"], []),
    "one after the other": (lambda: nn.Sequential(conv_bn(6, 8), nn.ReLU(), conv_bn(8, 8), nn.ReLU(True)), ["conv-BN-ReLU-conv-BN-ReLU"], []),  # noqa: E501
    "grouped": (lambda: nn.Sequential(conv_bn(6, 8, groups=2), nn.ReLU6()), ["conv-BN"], []),
    "two users": (lambda: Case(lambda x, a: a(x).relu() + x.mean() * a[0](x), conv_bn(6, 6)), ["conv-BN-ReLU"], ["no BatchNorm"]),  # noqa: E501
    "conv read twice": (lambda: Case(lambda x, a: a[1](z := a[0](x)) + z, conv_bn(6, 6)), [], ["readers other"]),
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
    "write in between": (lambda: Case(write_between, conv_bn(6, 6), conv_bn(6, 6)), [], ["writes into", "Inductor"]),
    "residual in place": (lambda: Case(residual_in_place, conv_bn(6, 6)), ["conv-BN"], ["Inductor"]),
    "statistics read": (lambda: Case(read_statistics, conv_bn(6, 6)), [], ["running statistics"]),
    "shared": (lambda: Case(lambda x, a: a(a(x).relu()).relu(), conv_bn(6, 6)), ["conv-BN-ReLU"] * 2, []),
    "autocast": (lambda: Case(autocast_in_between, conv_bn(6, 6)), [], ["mode changes", "Inductor"]),
    "setitem": (lambda: Case(setitem, conv_bn(6, 6)), ["conv-BN"], []),
    "view": (lambda: Case(lambda x, a: a(x).relu().view(x.shape[0], -1), conv_bn(6, 6)), ["conv-BN-ReLU"], []),
    "pooled view": (lambda: Case(lambda x, a: F.avg_pool2d(a(x).relu(), 2).view(x.shape[0], -1), conv_bn(6, 6)), ["conv-BN-ReLU"], []),  # noqa: E501
    "channels padded in front": (lambda: Case(akamaster, conv_bn(6, 8, stride=2)), ["conv-BN-join-ReLU"], []),
    "channels appended": (lambda: Case(gated, conv_bn(6, 8, stride=2)), ["conv-BN", "pad-add-ReLU"], []),
    "padded twice in a row": (
        lambda: Case(padded_twice, conv_bn(6, 8, stride=2), conv_bn(8, 10, stride=2)),
        ["conv-BN", "pad-add-ReLU"] * 2,
        [],
    ),
    "no conv": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(336, 4)), [], []),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), [], ["no convolution before it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_only_safe_patterns_match(name: str) -> None:
    """The expected patterns are rewritten, the others are left for the expected reasons, and results equal eager's."""
    build, hits, reasons = CASES[name]
    module, x = build().double(), torch.randn(2, 6, 8, 7).double()
    _, findings = rewritten(module, x)
    assert [f.pattern for f in findings if f.hit] == hits
    misses = [f.reason for f in findings if not f.hit]
    assert len(misses) == len(reasons)
    assert all(words in reason for words, reason in zip(reasons, misses, strict=True)), misses
    in_place = name in ("write in between", "residual in place")  # autograd raises an error for these
    with torch.set_grad_enabled(not in_place):
        check(module, x)


def test_a_torch_func_transform_in_the_graph_stays() -> None:
    module = conv_bn(3, 4).double().eval()
    x = torch.randn(2, 3, 6, 6).double()

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: module(t).relu().sum())(x)

    got = torch.compile(gradient, backend="fastres", options=ALWAYS)(x)
    assert relative_error(got, gradient(x)) < EXACT
