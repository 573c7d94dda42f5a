"""Detectors and segmentation nets of torchvision, and timm's features, train and predict alike once converted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from cases import relative_error
from nets import needs_kernels
from tolerances import EXACT_GRADIENTS, FUSED, NETS
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.report import FUSED as RUNS_FUSED

BLOCKS = 5  # of the small backbone


def lived_in(model: nn.Module) -> nn.Module:
    """Draw the statistics and parameters of all norms: those of a new FrozenBatchNorm2d do nothing."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            with torch.no_grad():
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.2)
                module.bias.uniform_(-0.3, 0.3)
    return model


def backbone(norm: type[nn.Module], trainable: int) -> nn.Module:
    resnet = lived_in(torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1], norm_layer=norm))
    return _resnet_fpn_extractor(resnet, trainable)


FEW = {"min_size": 64, "max_size": 64, "box_detections_per_img": 5, "box_score_thresh": 0.0}
FEW |= {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
FEW |= {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 16}


def keypoint_rcnn() -> nn.Module:
    head = detection.keypoint_rcnn.KeypointRCNNHeads(256, (16, 512))  # torchvision's has eight layers
    return detection.KeypointRCNN(backbone(nn.BatchNorm2d, 3), 2, num_keypoints=3, keypoint_head=head, **FEW)


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "Faster R-CNN, frozen norms": lambda: detection.FasterRCNN(backbone(FrozenBatchNorm2d, 3), 3, **FEW),
    "Faster R-CNN": lambda: detection.FasterRCNN(backbone(nn.BatchNorm2d, 5), 3, **FEW),
    "RetinaNet, frozen norms": lambda: detection.RetinaNet(backbone(FrozenBatchNorm2d, 5), 3, 64, 64),
    "RetinaNet": lambda: detection.RetinaNet(backbone(nn.BatchNorm2d, 3), 3, 64, 64, score_thresh=0.0),
    "Mask R-CNN": lambda: detection.MaskRCNN(backbone(nn.BatchNorm2d, 3), 3, **FEW),
    "Keypoint R-CNN": keypoint_rcnn,
}
SEGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "DeepLabV3": lambda: segmentation.deeplabv3_resnet50(num_classes=3, aux_loss=True, weights_backbone=None),
    "FCN": lambda: segmentation.fcn_resnet50(num_classes=3, weights_backbone=None),
}
FEATURES: dict[str, Callable[[], nn.Module]] = {
    "timm's features": lambda: timm.create_model("resnet18", features_only=True, layers=(2, 1, 1, 1)),
}
ALL = {**DETECTORS, **SEGMENTERS, **FEATURES}


def scenes(dtype: torch.dtype) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images of different shapes, and boxes, classes, masks and keypoints in them."""
    images, targets = [], []
    for i, (height, width) in enumerate([(64, 64), (48, 64)]):
        images.append(torch.rand(3, height, width, dtype=dtype))
        boxes = torch.tensor([[4, 4, 36, 36], [20, 10 + i, 60, 44]], dtype=dtype)
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[:, 10:30, 22:34] = 1
        points = torch.tensor([[24, 12, 1], [30, 20, 1], [34, 28, 1]]).repeat(2, 1, 1).float()  # x, y, visible
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": points})
    return images, targets


def losses(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the losses of a training step, with proposals and dropout drawn from the same seed each time."""
    torch.manual_seed(3)
    images, targets = scenes(dtype)
    if isinstance(model, (detection.FasterRCNN, detection.RetinaNet)):
        return model(images, targets)
    found = model(torch.rand(2, 3, 48, 64, dtype=dtype))
    found = found if isinstance(found, dict) else {str(i): y for i, y in enumerate(found)}
    return {name: y.square().mean() for name, y in found.items()}


def step(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Train a step with SGD; return the losses and then the state of the net."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01)
    found = losses(model.train(), dtype)
    sum(found.values()).backward()
    optimizer.step()
    return {**{name: loss.detach() for name, loss in found.items()}, **model.state_dict()}


def predictions(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(4)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found = model.eval()(list(images) if isinstance(model, (detection.FasterRCNN, detection.RetinaNet)) else images)
    parts = found if isinstance(found, list) else [found]
    return [t for part in parts for t in (part.values() if isinstance(part, dict) else [part])]


def same(got: Tensor, want: Tensor, exact: bool, what: str) -> None:
    if exact or not want.is_floating_point():
        assert torch.equal(got, want), what
    else:
        assert relative_error(got, want.double()) < EXACT_GRADIENTS, what


@pytest.mark.parametrize("case", ALL)
def test_a_converted_net_trains_and_predicts_alike(case: str, path: str) -> None:
    theirs = ALL[case]().double()
    ours = copy.deepcopy(theirs)
    before = {name: type(module) for name, module in ours.named_modules()}
    converted = fastres.convert(ours).converted
    assert len(converted) == 1 + (16 if case in SEGMENTERS else BLOCKS)
    assert converted[0] == ("backbone.body" if case in DETECTORS else "backbone" if case in SEGMENTERS else "")
    blocks = fastres.status(ours).blocks or {}
    assert tuple(blocks) == converted
    if path == "reference" and "frozen" not in case:
        assert set(blocks.values()) == {RUNS_FUSED}

    want, got = step(theirs), step(ours)
    assert list(got) == list(want)
    for name, value in want.items():
        same(got[name], value, path == "auto", name)
    for i, (a, b) in enumerate(zip(predictions(ours), predictions(theirs), strict=True)):
        same(a, b, path == "auto", f"prediction {i}")

    assert fastres.restore(ours).restored == converted
    assert {name: type(module) for name, module in ours.named_modules()} == before
    for i, (a, b) in enumerate(zip(predictions(ours), predictions(theirs), strict=True)):
        same(a, b, path == "auto", f"prediction {i} of the restored net")


@pytest.mark.parametrize("case", ["Faster R-CNN, frozen norms", "FCN", "timm's features"])
def test_checkpoints_go_both_ways(case: str) -> None:
    theirs, ours = ALL[case]().double(), fastres.convert(ALL[case]().double()).model
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((theirs, ours), (ours, theirs)):
        step(source)
        target.load_state_dict(source.state_dict())
        for a, b in zip(predictions(source), predictions(target), strict=True):
            assert torch.equal(a, b)


@needs_kernels
@pytest.mark.interpret
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_detector_trains_on_the_kernels(norm: type[nn.Module]) -> None:
    """RetinaNet compares boxes with anchors only, so rounding errors change no choice. It has two stages here."""
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    resnet = lived_in(torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1], norm_layer=norm))
    fpn = BackboneWithFPN(resnet, {"layer1": "0", "layer2": "1"}, [64, 128], 16)
    exact = detection.RetinaNet(fpn, 3, 32, 32, anchor_generator=anchors)
    theirs, ours = copy.deepcopy(exact), copy.deepcopy(exact)
    assert len(fastres.convert(ours).converted) == 4
    want, plain = step(exact.double()), step(theirs, torch.float32)
    with fastres.backend("triton"):
        blocks = fastres.status(ours).blocks or {}
        got = step(ours, torch.float32)
    assert norm is FrozenBatchNorm2d or [*blocks.values()] == 4 * [RUNS_FUSED]
    for name, value in want.items():
        if value.is_floating_point():
            allowed = FUSED * relative_error(plain[name], value) + NETS
            assert relative_error(got[name], value) < allowed, name
