"""`optimize`, `convert` and `explain` handle wrapped nets and compiled programs, or refuse them with advice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.utils
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastres


def net() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def sharded() -> nn.Module:
    class FSDPModule:
        """Stand-in for FSDP2's base class, which FSDP2 adds to the class of a net."""

    model = net()
    model.__class__ = type("FSDPResNet", (FSDPModule, type(model)), {"__deepcopy__": None})
    return model


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "torch.compile": (lambda: torch.compile(net()), r"a wrapper, OptimizedModule; .*: optimize\(model\._orig_mod\)$"),
    "AveragedModel": (lambda: AveragedModel(net()).eval(), r"AveragedModel; .*: optimize\(model\.module\)$"),
    "DataParallel": (lambda: nn.DataParallel(net()), r"DataParallel; .* the module inside: optimize\(model\.module\)$"),
    "timm's EMA": (lambda: timm.utils.ModelEmaV3(net()).eval(), r"ModelEmaV3; .*: optimize\(model\.module\)$"),
    "one in another": (
        lambda: nn.DataParallel(torch.compile(net())).eval(),
        r"optimize\(model\.module\._orig_mod\)$",
    ),
    "a layer": (
        lambda: nn.Sequential(nn.DataParallel(net())).eval(),
        r"^layer '0' is a .* the module inside: layer\.module$",
    ),
    "FSDP": (sharded, "FSDPModule spreads the weights over processes; load the full state_dict"),
    "scripted": (lambda: torch.jit.script(net()), "of type ScriptModule, .*; optimize the original eager module$"),
    "traced": (
        lambda: torch.jit.trace(net(), images()),
        "of type ScriptModule, .*; optimize the original eager module$",
    ),
    "exported": (lambda: torch.export.export(net(), (images(),)), "ExportedProgram, .* the original eager module$"),
    "exported module": (
        lambda: torch.export.export(net(), (images(),)).module(),
        r"graph of ATen operators \(torch\.export, make_fx\), .*; optimize the original eager module$",
    ),
    "optimized part": (lambda: nn.Sequential(fastres.optimize(net())).eval(), "already optimized, or contains"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRAPPED)
def test_optimize_says_what_to_give(name: str) -> None:
    build, message = WRAPPED[name]
    with pytest.raises(TypeError, match=message):
        fastres.optimize(build())


def test_a_net_compiled_in_place_is_served() -> None:
    model, x = net(), images()
    expected = fastres.optimize(copy.deepcopy(model))(x)
    model.compile()
    assert torch.equal(fastres.optimize(model)(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_convert_reaches_into_wrappers_but_not_into_programs() -> None:
    wrapped = nn.DataParallel(net())
    assert len(fastres.convert(wrapped).converted) == 5
    conversion = fastres.convert(nn.Sequential(torch.jit.script(net())))
    assert not conversion.converted
    assert conversion.kept == {"0": "it is a ScriptModule, which has no blocks; convert the original eager module"}
    optimized = nn.Sequential(fastres.optimize(net()))
    assert "0" in fastres.convert(optimized).kept
    assert type(optimized[0].layer1[0]) is torchvision.models.resnet.BasicBlock
    exported = torch.export.export(net(), (images(),)).module()
    assert "graph of ATen operators" in fastres.convert(exported).kept[""]


def test_explain_refuses_what_cannot_be_copied() -> None:
    with pytest.raises(TypeError, match=r"load the full state_dict .* and explain that"):
        fastres.explain(sharded(), images())
