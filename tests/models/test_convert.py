"""`fastres.convert` changes only the code path of a net. Parameters, names, hooks and results stay the same."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from cases import assert_close_to_reference
from covering import covered, each, extra
from nets import PATHS
from torch import Tensor, nn

import fastres
from fastres.models.convert import Conversion
from fastres.ops import block


def images(n: int = 2, size: int = 33) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def same_after_conversion(net: nn.Module, x: Tensor | None = None) -> Conversion:
    """Convert a copy of `net` and compare it with `net`: the identity of its tensors, and scores and gradients in train
    and eval mode."""
    x = images() if x is None else x
    net = net.double()
    twin = copy.deepcopy(net)
    owned = {name: id(value) for name, value in twin.state_dict(keep_vars=True).items()}
    report = fastres.convert(twin)
    assert report.model is twin
    assert {name: id(value) for name, value in twin.state_dict(keep_vars=True).items()} == owned
    assert list(twin.state_dict()) == list(net.state_dict())
    for training in (True, False):
        scores, grads = _step(twin.train(training), x)
        expected, expected_grads = _step(net.train(training), x)
        assert_close_to_reference(scores, expected)
        for a, b in zip(grads, expected_grads, strict=True):
            assert_close_to_reference(a, b)
    for (name, a), b in zip(twin.named_buffers(), net.buffers(), strict=True):
        assert_close_to_reference(a.double(), b.double(), what=name)
    return report


def _step(net: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = net(x)
    out = out["out"] if isinstance(out, dict) else out[-1] if isinstance(out, list) else out
    trained = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().mean(), trained, allow_unused=True)
    return out.detach(), tuple(grad for grad in grads if grad is not None)


@covered(by=each, indirect=["path"], name=["resnet18", "resnet50", "resnext50_32x4d"], path=PATHS)
def test_torchvisions_nets_are_converted(path: str, name: str) -> None:
    net = getattr(torchvision.models, name)(num_classes=5)
    report = same_after_conversion(net)
    assert type(report.model) is fastres.ResNet
    assert len(report.converted) == (9 if name == "resnet18" else 17)  # the blocks, and the net itself for its stem
    assert not report.kept
    assert "converted: " in str(report)
    again = fastres.convert(report.model)
    assert not again.converted
    assert set(again.kept.values()) == {"it is already fastres's"}
    restored = pickle.loads(pickle.dumps(report.model))
    assert type(restored.layer1[0]) is type(report.model.layer1[0])


def test_hooks_stay(path: str) -> None:
    net = torchvision.models.resnet18(num_classes=5).eval()
    seen = []
    for name in ("layer1.0", "layer1.1.relu", "layer2.0.bn1"):
        net.get_submodule(name).register_forward_hook(lambda module, *_, name=name: seen.append(name))
    fastres.convert(net).model(images().float())
    assert seen == ["layer1.0", "layer1.1.relu", "layer1.1.relu", "layer2.0.bn1"]


def test_a_detectors_backbone_is_converted(path: str) -> None:
    """IntermediateLayerGetter has the stages but not the ResNet itself, and its norm layers are FrozenBatchNorm2d."""
    net = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    twin = copy.deepcopy(net)
    report = fastres.convert(twin)
    assert len(report.converted) == 17
    assert report.converted[0] == "backbone.body"  # the container, for the stem and for whole stages
    assert all(name.startswith("backbone.body.layer") for name in report.converted[1:])
    x = images(1, 65).float()
    for (name, a), b in zip(twin.backbone(x).items(), net.backbone(x).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("path", [extra("auto"), "reference"], indirect=True)
def test_a_segmentation_net_is_converted(path: str) -> None:
    net = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    net.classifier[0].project[3].p = 0.0  # dropout would draw other random numbers
    report = same_after_conversion(net.eval())
    assert len(report.converted) == 17


def test_what_is_kept_is_told_with_the_reason() -> None:
    class Mine(torchvision.models.resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = torchvision.models.resnet18()
    net.layer1[0].__class__ = Mine
    net.layer1[1].forward = torch.tanh
    report = fastres.convert(net)
    assert "subclass" in report.kept["layer1.0"]
    assert "forward has been replaced" in report.kept["layer1.1"]
    assert len(report.converted) == 7
    assert "layer1.0" in str(report)
    assert not fastres.convert(nn.Linear(2, 2)).converted
    with pytest.raises(TypeError, match="got dict"):
        fastres.convert({})  # type: ignore[arg-type]


def test_importing_fastres_needs_no_timm() -> None:
    code = """
import sys
sys.modules["timm"] = None  # as where it is not installed
import fastres, torchvision
assert len(fastres.convert(torchvision.models.resnet18()).converted) == 9
try:
    import fastres.timm
except ImportError as error:
    assert "pip install timm" in str(error)
else:
    raise AssertionError("imported without timm")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class TestTimm:
    @pytest.fixture(autouse=True)
    def _timm(self) -> None:
        self.timm = pytest.importorskip("timm")

    @covered(by=each, indirect=["path"], name=["resnet18", "resnet50"], path=PATHS)
    def test_timms_plain_nets_are_converted(self, path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastres.models import timm as ours

        calls = []
        for entry in ("residual_block", "stem"):
            inner = getattr(block, entry)
            monkeypatch.setattr(ours, entry, lambda *args, inner=inner: (calls.append(1), inner(*args))[1])
        report = same_after_conversion(self.timm.create_model(name, num_classes=5, zero_init_last=False))
        blocks = 8 if name == "resnet18" else 16
        assert len(report.converted) == blocks + 1
        assert len(calls) == (2 * (blocks + 1) if path == "reference" else 0)
        assert type(pickle.loads(pickle.dumps(report.model))) is ours.ResNet
        scripted = torch.jit.script(report.model.eval())
        assert_close_to_reference(scripted(images()), report.model(images()))

    @pytest.mark.parametrize(
        ("name", "options", "converted", "reason"),
        [
            ("seresnet50", {}, 1, "SEModule"),
            ("resnet50d", {}, 12, "AvgPool2d"),  # the deep stem and the pooled shortcuts are kept
            ("resnetblur18", {}, 5, "BlurPool2d"),
            ("resnet18", {"act_layer": "silu"}, 0, "SiLU"),
            ("resnet18", {"drop_path_rate": 0.1}, 2, "DropPath"),
            ("resnet18", {"drop_block_rate": 0.1}, 5, "DropBlock2d"),
            ("resnet50_gn", {}, 0, "GroupNorm"),
        ],
    )
    def test_what_is_kept_is_told_with_the_reason(
        self, name: str, options: dict[str, Any], converted: int, reason: str
    ) -> None:
        report = fastres.convert(self.timm.create_model(name, num_classes=5, **options))
        assert any(reason in why for why in report.kept.values()), report
        assert len(report.converted) == converted, report

    def test_timms_registry_builds_ours(self, path: str) -> None:
        import fastres.timm

        assert len(self.timm.list_models("fastres_*")) == 10
        net = self.timm.create_model("fastres_resnet18", num_classes=7, in_chans=1)
        assert type(net) is fastres.timm.ResNet
        assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
        theirs = self.timm.create_model("resnet18", num_classes=7, in_chans=1)
        net.load_state_dict(theirs.state_dict())
        assert net.pretrained_cfg == theirs.pretrained_cfg
        tagged = self.timm.create_model("fastres_resnet50.tv_in1k")
        assert tagged.pretrained_cfg["tag"] == "tv_in1k"
        features = self.timm.create_model("fastres_resnet18", features_only=True)
        assert [f.shape[1] for f in features(images(1).float())] == [64, 64, 128, 256, 512]
        assert type(features.layer1[0] if hasattr(features, "layer1") else None) is fastres.timm.BasicBlock

    def test_gradient_checkpointing_goes_on(self, path: str) -> None:
        net = self.timm.create_model("resnet18", num_classes=5)
        net.set_grad_checkpointing()
        same_after_conversion(net)
