"""Test detectors, segmenters and feature extractors, whose backbones the backend rewrites."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
import torchvision
from cases import relative_error
from compiled import ALWAYS, drawn, pairs_in
from timm.layers import freeze_batch_norm_2d
from tolerances import EXACT, EXACT_GRADIENTS
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

import fastres

pytestmark = pytest.mark.usefixtures("compiled_afresh")

DETECTORS = {"retina": detection.RetinaNet, "faster": detection.FasterRCNN, "mask": detection.MaskRCNN}


def detector(kind: str, frozen_stages: int = 2) -> nn.Module:
    """Return a detector with a small backbone, of which the stem and the first stage don't train."""
    resnet = drawn(torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d))
    backbone = _resnet_fpn_extractor(resnet, trainable_layers=5 - frozen_stages)
    return DETECTORS[kind](backbone, num_classes=3, min_size=64, max_size=96).double()


def labelled() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images of different sizes, and their boxes, labels and masks."""
    images = [torch.rand(3, *size).double() for size in ((70, 60), (64, 90))]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 10.0, 55.0, 60.0]]).double()
    masks = [torch.zeros(2, *image.shape[1:], dtype=torch.uint8) for image in images]
    for mask in masks:
        mask[:, 10:50, 20:40] = 1
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": mask} for mask in masks]


def same_gradients(twin: nn.Module, model: nn.Module) -> None:
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or relative_error(p.grad, q.grad) < EXACT_GRADIENTS, name


def same_values(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
        assert not value.numel() or relative_error(got[name].double(), value.double()) < EXACT_GRADIENTS, name


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["backbone", "whole"])
@pytest.mark.parametrize(
    "kind",
    ["retina", pytest.param("faster", marks=pytest.mark.extra), pytest.param("mask", marks=pytest.mark.slow)],
)
def test_a_detector_trains_and_detects_as_in_eager(kind: str, whole: bool, inner: str) -> None:
    """Losses, gradients and detections are those of eager, with the compiled backbone or the whole detector."""
    model = detector(kind)
    twin, (images, targets) = copy.deepcopy(model), labelled()
    (twin if whole else twin.backbone).compile(backend="fastres", options=ALWAYS | {"fastres.inner": inner})
    losses = []
    for net in (twin, model):
        torch.manual_seed(0)  # it samples anchors
        losses.append(net(images, targets))
        sum(losses[-1].values()).backward()
    same_values(*losses)
    same_gradients(twin, model)
    with torch.no_grad():
        for got, want in zip(twin.eval()(images), model.eval()(images), strict=True):
            same_values(got, want)


@pytest.mark.parametrize("frozen_stages", [0, 2, 5])
def test_every_pair_of_a_detectors_backbone_matches(frozen_stages: int) -> None:
    """The layers that don't train run `conv_affine_act`; what stays are the convolutions of the feature pyramid."""
    explanation = fastres.explain(detector("retina", frozen_stages).backbone, torch.randn(1, 3, 64, 96).double())
    assert (pairs_in(explanation.hits), explanation.graphs) == (20, 1)
    assert {(f.pattern, f.reason) for f in explanation.misses} == {("conv", "no BatchNorm after it")}
    assert all(f.layer.startswith("fpn") for f in explanation.misses)
    trained = sum(f.operator == "conv_bn_act" for f in explanation.hits)
    assert trained == {0: 9, 2: 6, 5: 0}[frozen_stages]


@pytest.mark.parametrize(
    ("builder", "pairs"), [("fcn_resnet50", 55), pytest.param("deeplabv3_resnet50", 61, marks=pytest.mark.extra)]
)
def test_every_pair_of_a_segmenter_matches(builder: str, pairs: int) -> None:
    """This includes the dilated convolutions of the last two stages and of DeepLab's head, and the auxiliary head's."""
    with torch.device("meta"):
        model = getattr(segmentation, builder)(weights=None, weights_backbone=None, aux_loss=True)
        explanation = fastres.explain(model, torch.empty(2, 3, 64, 64))
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert (pairs_in(explanation.hits), len(explanation.misses)) == (pairs, convs - pairs)
    assert all(f.reason == "no BatchNorm after it" for f in explanation.misses)


def segmenter() -> nn.Module:
    resnet = torchvision.models.ResNet(Bottleneck, [1, 1, 2, 2], replace_stride_with_dilation=[False, True, True])
    backbone = IntermediateLayerGetter(resnet, {"layer3": "aux", "layer4": "out"})
    head, aux = segmentation.deeplabv3.DeepLabHead(2048, 3, (3, 5)), segmentation.fcn.FCNHead(1024, 3)
    for dropout in (m for m in (*head.modules(), *aux.modules()) if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    return segmentation.deeplabv3.DeepLabV3(backbone, head, aux)


def features() -> nn.Module:
    return drawn(freeze_batch_norm_2d(timm.create_model("resnet18d", features_only=True, layers=(1, 1, 1, 1))))


NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "DeepLab": (segmenter, 30, 2),  # pairs inside matches, convolutions outside
    "timm's features": (features, 14, 0),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize("name", NETS)
def test_nets_with_several_outputs_give_eagers_results(name: str, train: bool) -> None:
    build, pairs, rest = NETS[name]
    model, x = build().double().train(train), torch.randn(3, 3, 40, 33).double()
    twin, found = copy.deepcopy(model), []
    with torch.set_grad_enabled(train):
        explanation = fastres.explain(model, x)
        compiled = torch.compile(twin, backend="fastres", options=ALWAYS, fullgraph=True)
        for net in (compiled, model):
            y: Any = net(x)
            found.append(y if isinstance(y, dict) else {f"{i}": each for i, each in enumerate(y)})
            if train:
                sum(each.square().mean() for each in found[-1].values()).backward()
    assert (pairs_in(explanation.hits), len(explanation.misses)) == (pairs, rest)
    same_values(*found)
    if train:
        same_gradients(twin, model)
        for a, b in zip(twin.buffers(), model.buffers(), strict=True):
            assert relative_error(a.double(), b.double()) < EXACT
