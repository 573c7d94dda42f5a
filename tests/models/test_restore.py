"""`fastres.restore` brings back torchvision's and timm's modules, with the same tensors, hooks and results."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from compiled import tiny
from nets import images
from torch import Tensor, nn
from torchvision.models import resnet as tv
from torchvision.models._utils import IntermediateLayerGetter

import fastres
import fastres.timm
from fastres import paper


def types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def tensors(model: nn.Module) -> dict[str, int]:
    return {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    found = model(x)
    found = [*found.values()] if isinstance(found, dict) else found if isinstance(found, list) else [found]
    return [y.detach() for y in found]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    sum(y.square().mean() for y in (model(x).values() if isinstance(model, nn.ModuleDict) else [model(x)])).backward()
    optimizer.step()


def timms(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=3, **options)


THEIRS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=3),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=3),
    "resnext": lambda: torchvision.models.ResNet(tv.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
    "a detector's backbone": lambda: IntermediateLayerGetter(
        torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d), {"layer1": "0", "layer4": "1"}
    ),
    "deeplab": lambda: torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).eval(),
    "timm": lambda: timms("resnet18"),
    "timm with kept parts": lambda: timms("resnet50d"),
    "timm's features": lambda: timm.create_model("resnet18", features_only=True),
    "timm's features as a dict": lambda: timm.create_model("resnet18", features_only=True, feature_cls="dict"),
    "timm's getter": lambda: timm.create_model("resnet18", features_only=True, feature_cls="getter"),
    "inside DataParallel": lambda: nn.DataParallel(tiny()),
}


@pytest.mark.parametrize("case", THEIRS)
def test_convert_and_restore_are_a_round_trip(case: str) -> None:
    model, x = THEIRS[case](), images(2, 64)
    twin = copy.deepcopy(model)
    before, owned, pickled = types(model), tensors(model), pickle.dumps(model)
    converted = fastres.convert(model).converted
    assert converted
    assert b"fastres" in pickle.dumps(model)
    report = fastres.restore(model)
    assert report.model is model
    assert report.restored == converted
    assert not report.kept
    assert str(report) == f"restored: {len(converted)}, kept: 0"
    assert types(model) == before
    assert tensors(model) == owned
    assert pickle.dumps(model) == pickled
    assert b"fastres" not in pickled
    for a, b in zip(outputs(model, x), outputs(twin, x), strict=True):
        assert torch.equal(a, b)
    assert not fastres.restore(model).restored
    assert fastres.convert(model).converted == converted


OURS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "resnet50": (fastres.resnet50, torchvision.models.resnet50),
    "wide": (fastres.wide_resnet50_2, torchvision.models.wide_resnet50_2),
    "resnext": (fastres.resnext50_32x4d, torchvision.models.resnext50_32x4d),
    "timm's resnet50": (lambda: timms("fastres_resnet50"), lambda: timms("resnet50")),
    "timm's features": (
        lambda: timm.create_model("fastres_resnet18", features_only=True),
        lambda: timm.create_model("resnet18", features_only=True),
    ),
    "paper 18 B": (lambda: paper.resnet(18, "B"), torchvision.models.resnet18),
    "paper 34 C": (lambda: paper.resnet(34, "C"), torchvision.models.resnet34),
    "paper 50 B": (lambda: paper.resnet(50), torchvision.models.resnet50),
}


@pytest.mark.parametrize("case", OURS)
def test_nets_that_fastres_built_become_stock_nets(case: str) -> None:
    build, stock = OURS[case]
    model, x = build(), images(2, 64)
    twin, owned = copy.deepcopy(model), tensors(model)
    assert not fastres.restore(model).kept
    theirs = stock()
    if case != "paper 34 C":  # its identity shortcuts are projections
        assert types(model) == types(theirs)
        assert list(model.state_dict()) == list(theirs.state_dict())
    assert tensors(model) == owned
    assert b"fastres" not in pickle.dumps(model)
    for training in (True, False):
        for a, b in zip(outputs(model.train(training), x), outputs(twin.train(training), x), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


KEPT: dict[str, tuple[Callable[[], nn.Module], int, dict[str, str]]] = {
    "option A": (
        lambda: paper.resnet(18, "A").eval(),
        6,
        {
            f"layer{i}.0{path}": f"torchvision and timm have no {kind}"
            for i in (2, 3, 4)
            for path, kind in (("", "PadBasicBlock"), (".downsample", "PadShortcut"))
        },
    ),
    "plain": (
        lambda: paper.plain(18).eval(),
        1,
        {f"layer{i}.{j}": "torchvision and timm have no PlainBlock" for i in (1, 2, 3, 4) for j in (0, 1)},
    ),
    "small images": (lambda: paper.cifar_stem(18).eval(), 8, {"": "torchvision and timm have no CifarStemResNet"}),
    "optimized": (
        lambda: nn.Sequential(fastres.optimize(fastres.convert(tiny()).model.eval())),
        0,
        {"0": "it is a net made by fastres.optimize, which has no blocks; restore the original eager module"},
    ),
    "scripted": (
        lambda: nn.Sequential(torch.jit.script(fastres.convert(tiny()).model)).eval(),
        0,
        {"0": "it is a ScriptModule, which has no blocks; restore the original eager module"},
    ),
    "exported": (
        lambda: torch.export.export(fastres.resnet18().eval(), (images(),)).module(),
        0,
        {
            "": "it is a graph of ATen operators (torch.export, make_fx), which has no blocks; restore the original "
            "eager module"
        },
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", KEPT)
def test_what_has_no_stock_class_is_kept_with_the_reason(case: str) -> None:
    build, restored, kept = KEPT[case]
    model = build()
    twin = copy.deepcopy(model)
    report = fastres.restore(model)
    assert len(report.restored) == restored
    assert report.kept == kept
    name, reason = next(iter(kept.items()))
    assert f"  {name or '(the net)'}: {reason}" in str(report)
    x = images(2, 16)
    assert torch.equal(model(x), twin(x))


class Mine(fastres.models.resnet.BasicBlock):
    """A user's subclass of a block."""


def test_subclasses_and_replaced_forwards_are_kept() -> None:
    model = fastres.resnet18()
    model.layer1[0].__class__ = Mine
    model.layer1[1].forward = torch.tanh
    report = fastres.restore(model)
    assert report.kept == {
        "layer1.0": f"{__name__}.Mine is a subclass and may have another forward",
        "layer1.1": "its forward has been replaced",
    }
    assert len(report.restored) == 7
    assert type(model.layer1[0]) is Mine
    with pytest.raises(TypeError, match=r"^restore\(\) takes an nn.Module, got dict$"):
        fastres.restore({})  # type: ignore[arg-type]


def test_other_nets_have_nothing_to_restore() -> None:
    model = nn.Sequential(torchvision.models.resnet18(), nn.Linear(2, 2))
    before = types(model)
    report = fastres.restore(model)
    assert not report.restored
    assert not report.kept
    assert types(model) == before


def test_hooks_and_optimizers_go_on() -> None:
    """Steps of a net that is converted and restored in between give the same bits as without."""
    model, x = tiny(), images(2, 33)
    twin, seen = copy.deepcopy(model), []
    for name in ("", "layer1.0", "layer1.1.relu"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    both = [(each, torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)) for each in (model, twin)]
    for change in (fastres.convert, fastres.restore, fastres.convert, fastres.restore):
        assert change(model).kept == {}
        for each, optimizer in both:
            step(each, optimizer, x)
    assert seen == 4 * ["layer1.0", "layer1.1.relu", "layer1.1.relu", ""]
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    states = [optimizer.state_dict()["state"] for _, optimizer in both]
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


@pytest.mark.parametrize("case", ["resnet18", "a detector's backbone", "timm's features"])
def test_a_restored_net_is_read_without_fastres(case: str, tmp_path: Path) -> None:
    model, x = THEIRS[case]().eval(), images(2, 33)
    fastres.convert(model)
    want = outputs(model, x)
    fastres.restore(model)
    torch.save((model, x, want), tmp_path / "net.pt")
    code = """
import sys
sys.modules["fastres"] = None  # as where it is not installed
import torch
model, x, want = torch.load(sys.argv[1], weights_only=False)
found = model(x)
found = [*found.values()] if isinstance(found, dict) else found if isinstance(found, list) else [found]
assert len(found) == len(want)
assert all(torch.equal(a, b) for a, b in zip(found, want))
assert not [name for name, module in sys.modules.items() if name.startswith("fastres") and module]
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "net.pt")], check=True)


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_net_is_restored_inside(in_place: bool) -> None:
    """Dynamo's guards see the change of classes, so the compiled net compiles again."""
    model, x, graphs = tiny().eval(), images(2, 33), []
    want = model(x)
    before = types(model)
    if in_place:
        compiled = model
        model.compile(backend=lambda gm, _: (graphs.append(gm), gm)[1])
    else:
        compiled = torch.compile(model, backend=lambda gm, _: (graphs.append(gm), gm)[1])
    for change, count in ((fastres.convert, 1), (fastres.restore, 2)):
        report = change(compiled)
        names = report.converted if change is fastres.convert else report.restored
        assert names == tuple(name if in_place else f"_orig_mod.{name}".rstrip(".") for name in ("", *_blocks(model)))
        assert torch.equal(compiled(x), want)
        assert len(graphs) == count
    assert types(model) == before


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, tv.BasicBlock)]
