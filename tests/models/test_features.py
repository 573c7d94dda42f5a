"""Converted feature extractors return what torchvision's and timm's return, with the same side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from cases import assert_close_to_reference, relative_error
from compiled import ALWAYS
from nets import images, needs_kernels
from tolerances import EXACT_GRADIENTS, NETS
from torch import Tensor, fx, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import fastres
from fastres.models import features, resnet
from fastres.models import timm as ours


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused calls outside of blocks, in order: stem, plain_block, or how many blocks consecutive stages have."""
    calls: list[str] = []

    def watch(module: Any, name: str, told: Callable[..., str]) -> None:
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.append(told(*args)), inner(*args))[1])

    for module, name in ((features, "stem"), (features, "plain_block"), (ours, "stem")):
        watch(module, name, lambda *_, name=name: name)
    watch(resnet, "stages", lambda x, stages: "-".join(str(len(blocks)) for blocks in stages))
    return calls


def net() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)


def timms(**options: Any) -> nn.Module:
    sizes = {"layers": (2, 1, 1, 1), "channels": (16, 16, 32, 32)}
    return timm.create_model("resnet18", features_only=True, zero_init_last=False, **sizes, **options)


def _values(found: Any) -> list[Tensor]:
    return [*found.values()] if isinstance(found, dict) else [*found]


def outcome(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Any] | None = None) -> dict[str, Any]:
    """Return the outputs of a training step of `model` by name, then the gradients and buffers."""
    x = x.clone().requires_grad_()
    found = (call or (lambda model, x: model(x)))(model, x)
    if not isinstance(found, dict):
        found = {str(i): y for i, y in enumerate(found if isinstance(found, (list, tuple)) else [found])}
    parameters = dict(model.named_parameters())
    total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() for y in found.values())
    grads = torch.autograd.grad(total, [x, *parameters.values()], allow_unused=True)
    return {
        **{f"output {name}": y.detach() for name, y in found.items()},
        **{f"gradient of {name}": grad for name, grad in zip(["x", *parameters], grads, strict=True)},
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def same_as_stock(model: nn.Module, call: Callable[[nn.Module, Tensor], Any] | None = None, exact: bool = False) -> Any:
    """Convert a copy of `model` and compare a training step of both, in float64; return the copy."""
    model = model.double().train()
    twin = copy.deepcopy(model)
    fastres.convert(twin)
    x = images(2, 33, torch.float64)
    want = outcome(model, x, call)
    got = outcome(twin, x, call)
    assert list(got) == list(want)  # also the order of the outputs
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        elif exact:
            assert torch.equal(got[name], value), name
        else:
            assert relative_error(got[name].double(), value.double()) < EXACT_GRADIENTS, name
    return twin


RETURNED = {
    "as a detector": ({"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}, ["stem"]),
    "as a segmenter": ({"layer3": "aux", "layer4": "out"}, ["stem"]),
    "the stem": ({"maxpool": "stem", "layer1": "out"}, ["stem"]),
    "the activation": ({"relu": "a", "layer2": "b"}, ["plain_block"]),
    "a BatchNorm whose output the ReLU overwrites": ({"bn1": "z", "layer1": "out"}, []),
    "a convolution": ({"conv1": "z", "layer1": "out"}, []),
    "two under one name": ({"layer1": "0", "layer2": "0", "layer3": "1"}, ["stem"]),
}


@pytest.mark.parametrize("case", RETURNED)
def test_torchvisions_extractors_return_the_same(case: str, path: str, fused: list[str]) -> None:
    returned, calls = RETURNED[case]
    twin = same_as_stock(IntermediateLayerGetter(net(), returned), exact=path == "auto")
    assert type(twin) is features.IntermediateLayerGetter
    assert fused == (calls if path == "reference" else [])
    blocks = fastres.status(twin).blocks or {}
    assert ("" in blocks) == bool(calls)
    if calls and path == "reference":
        assert blocks[""] == "fused"


TIMMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({}, ["plain_block"]),
    "without the stem": ({"out_indices": (1, 3)}, ["stem"]),
    "the stem alone": ({"out_indices": (0,)}, []),
    "a dict": ({"feature_cls": "dict", "out_indices": (2, 4)}, ["stem"]),
    "a getter": ({"feature_cls": "getter", "out_indices": (1, 2)}, ["stem"]),
    "a getter of all": ({"feature_cls": "getter"}, ["plain_block"]),
    "a getter of the stem": ({"feature_cls": "getter", "out_indices": (0,)}, []),
    "hooks": ({"feature_cls": "hook"}, []),
    "an fx graph": ({"feature_cls": "fx"}, []),
}


@pytest.mark.parametrize("case", TIMMS)
def test_timms_extractors_return_the_same(case: str, path: str, fused: list[str]) -> None:
    options, calls = TIMMS[case]
    torch.manual_seed(1)
    theirs, mine = (timms(**options).double().train() for _ in range(2))  # hooks hold their net: no copy
    mine.load_state_dict(theirs.state_dict())
    fastres.convert(mine)
    x = images(2, 33, torch.float64)
    want, got = outcome(theirs, x), outcome(mine, x)
    assert list(got) == list(want)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert relative_error(got[name].double(), value.double()) < EXACT_GRADIENTS, name
            assert path != "auto" or torch.equal(got[name], value), name
    assert fused == (calls if path == "reference" else [])


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("indices", [None, 2, [0], [1, 3], [-1, 0]], ids=str)
def test_timms_intermediates_are_the_same(indices: Any, only: bool, stop_early: bool, path: str) -> None:
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (2, 1, 1, 1), channels=(16, 16, 32, 32))

    def call(model: Any, x: Tensor) -> list[Tensor]:
        found = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=only)
        return found if only else [found[0], *found[1]]

    same_as_stock(model, call, exact=path == "auto")


def test_timms_intermediates_refuse_what_timm_refuses() -> None:
    model = fastres.convert(timm.create_model("resnet18", num_classes=3)).model
    with pytest.raises(AssertionError, match="must be NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")  # type: ignore[operator]
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(images(), [5])  # type: ignore[operator]


@pytest.mark.parametrize("concat", [False, True])
def test_tuples_are_chosen_from_as_timm_does(concat: bool, path: str) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    class First(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] * 2

    model = timms()
    model.concat, model.layer2, model.layer3 = concat, Twice(), First()
    model.layer4 = nn.Sequential()
    same_as_stock(model, exact=path == "auto")


def test_gradient_checkpointing_goes_on(path: str) -> None:
    """torch.autograd.grad doesn't support timm's reentrant checkpoints."""
    x, grads = images(2, 33, torch.float64), []
    model = timms().double()
    model.set_grad_checkpointing()
    for each in (model, fastres.convert(copy.deepcopy(model)).model):
        sum(y.square().mean() for y in each(x)).backward()
        grads.append([p.grad for p in each.parameters()])
        assert int(each.layer2[0].bn1.num_batches_tracked) == 2  # the forward ran twice
    for a, b in zip(*grads, strict=True):
        assert_close_to_reference(a, b)


@pytest.mark.parametrize("name", ["relu", "layer1", "layer1.1", "layer1.0.bn2", "maxpool"])
def test_hooks_on_children_run(name: str, path: str) -> None:
    counts = []
    for convert in (False, True):
        model, seen = IntermediateLayerGetter(net(), {"layer1": "0", "layer3": "1"}), []
        model.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        model.layer2.register_forward_hook(lambda module, args, y: y * 2)
        (fastres.convert(model).model if convert else model)(images())
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0
    same_as_stock(model, exact=path == "auto")


def test_children_after_the_last_output_still_run(path: str) -> None:
    model = IntermediateLayerGetter(net(), {"layer1": "0", "layer3": "1"})
    model.return_layers = {"layer1": "0"}
    twin = same_as_stock(model, exact=path == "auto")
    assert twin.layer3[0].bn1.num_batches_tracked == 1


def test_replaced_children_run_as_they_are(path: str) -> None:
    model = IntermediateLayerGetter(net(), {"layer1": "0", "layer2": "1"})
    model.maxpool = nn.Identity()
    same_as_stock(model, exact=path == "auto")
    model.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 1))
    same_as_stock(model, exact=path == "auto")
    model.layer1 = nn.Conv2d(64, 64, 3, padding=1)
    same_as_stock(model, exact=path == "auto")


def test_the_stem_is_told_with_its_reason() -> None:
    model = fastres.convert(IntermediateLayerGetter(net(), {"layer1": "0"})).model
    model.conv1 = nn.Sequential(model.conv1)
    with fastres.backend("reference"):
        blocks = fastres.status(model).blocks
    assert blocks == {
        "": "plain PyTorch, module by module: it contains Sequential where Conv2d is expected",
        "layer1.0": "fused",
        "layer1.1": "fused",
    }


def test_extractors_without_blocks_are_left_alone() -> None:
    of_mobilenet = IntermediateLayerGetter(torchvision.models.mobilenet_v3_small().features, {"0": "low", "3": "high"})
    for other in (of_mobilenet, IntermediateLayerGetter(net(), {"relu": "a"})):
        report = fastres.convert(other)
        assert type(other) is IntermediateLayerGetter
        assert not report.converted
        assert not report.kept

    class Mine(IntermediateLayerGetter):
        pass

    report = fastres.convert(Mine(net(), {"layer1": "0"}))
    assert "Mine is a subclass and may have another forward" in report.kept[""]
    assert report.converted == ("layer1.0", "layer1.1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_extractors_can_be_recorded(path: str) -> None:
    x = images(2, 33)
    for model in (IntermediateLayerGetter(net(), {"relu": "0", "layer2": "1"}), timms(feature_cls="dict"), timms()):
        fastres.convert(model.eval())
        want = model(x)
        scripted = torch.jit.script(model)(x)
        recorded = [scripted, fx.symbolic_trace(model)(x), torch.export.export(model, (x,)).module()(x)]
        recorded.append(torch.jit.trace(model, x, strict=False)(x))
        for got in recorded:
            for a, b in zip(_values(got), _values(want), strict=True):
                assert_close_to_reference(a, b.double(), b)


@pytest.mark.usefixtures("compiled_afresh")
def test_the_compile_backend_sees_the_same_graph(path: str) -> None:
    """Dynamo traces the modules one by one: no graph break, and nothing hidden in a fused call."""
    x = images(2, 33, torch.float64)
    graphs: list[list[Any]] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append([(node.target, len(node.users)) for node in gm.graph.nodes if node.op == "call_function"])
        return gm

    for model in (IntermediateLayerGetter(net(), {"layer1": "0", "layer4": "1"}).double(), timms().double()):
        twin = copy.deepcopy(model)
        fastres.convert(twin)
        for each in (model, twin):
            torch.compile(each, backend=keep, fullgraph=True)(x)
        stock, converted = graphs[-2:]
        assert converted == stock
        compiled = torch.compile(twin, backend="fastres", options=ALWAYS, fullgraph=True)
        for got, want in zip(_values(compiled(x)), _values(model(x)), strict=True):
            assert_close_to_reference(got, want)


def test_a_graph_extractor_has_blocks_only_as_leaves(path: str) -> None:
    x, nodes = images(2, 33), {"layer1": "0", "layer2": "1"}
    model = net().eval()
    want = [y.detach() for y in create_feature_extractor(model, nodes)(x).values()]
    before = create_feature_extractor(copy.deepcopy(model), nodes, tracer_kwargs={"leaf_modules": [BasicBlock]})
    twin = fastres.convert(copy.deepcopy(model)).model
    inlined = create_feature_extractor(twin, nodes)
    leaves = create_feature_extractor(twin, nodes, tracer_kwargs={"leaf_modules": [resnet.BasicBlock]})
    assert not fastres.convert(inlined).converted
    assert fastres.status(inlined).blocks == {}
    assert fastres.convert(before).converted == ("layer1.0", "layer1.1", "layer2.0")
    for each in (before, inlined, leaves):
        assert len(fastres.status(each).blocks or {}) == (0 if each is inlined else 3)
        for a, b in zip(each(x).values(), want, strict=True):
            assert_close_to_reference(a, b.double(), b)


STAGES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any] | None, list[str]]] = {
    "torchvision": (
        lambda: IntermediateLayerGetter(net(), {"layer2": "0"}),
        None,
        ["stem", "2-1"],
    ),
    "timm": (lambda: timms(out_indices=(0, 1, 3)), None, ["plain_block", "2", "1-1"]),
    "timm's net": (lambda: timms(feature_cls="getter").model, None, ["stem", "2-1-1-1"]),
    "timm's intermediates": (
        lambda: timms(feature_cls="getter").model,
        lambda model, x: model.forward_intermediates(x, [1, 3])[1],
        ["stem", "2", "1-1", "1"],
    ),
}


@needs_kernels
@pytest.mark.interpret
@pytest.mark.parametrize("case", STAGES)
def test_stages_run_fused_between_the_outputs(case: str, fused: list[str]) -> None:
    build, call, calls = STAGES[case]
    model = build().train()
    twin = copy.deepcopy(model)
    fastres.convert(twin)
    x = images(2, 17)
    want, want64 = outcome(copy.deepcopy(model), x, call), outcome(model.double(), x.double(), call)
    with fastres.backend("triton"):
        got = outcome(twin, x, call)
    assert fused == calls
    assert list(got) == list(want64)
    for name, value in want64.items():
        if value is None:
            assert got[name] is None, name
        else:
            allowed = NETS + 8 * relative_error(want[name].double(), value.double())
            assert relative_error(got[name].double(), value.double()) < allowed, name
