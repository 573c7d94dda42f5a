"""Test plans: which steps are merged, which plans may split a batch, and which values stay in 8 bits."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import relative_error
from nets import answers, images, lived_in, tiny
from test_int8 import int8
from tolerances import EXACT_BLOCK
from torch import Tensor, nn

import fastres
from fastres import optimize
from fastres.inference.plan import Aten, Chain, Conv, by_image, fuse, fuse_chains
from fastres.inference.trace import trace


def test_a_resnet_fuses_completely() -> None:
    raw, output = trace(fastres.resnet50().eval())
    plan = fuse(raw, output)
    convs = [step for step in plan if isinstance(step, Conv)]
    assert len(convs) == 53
    assert all(conv.pair.norm for conv in convs)
    assert sum(conv.relu for conv in convs) == 49  # all but the projections
    assert sum(conv.residual is not None for conv in convs) == 16
    assert sum(conv.bare for conv in convs) == sum(conv.absorbed is not None for conv in convs) == 4
    assert [step.name for step in plan if not isinstance(step, Conv)] == ["maxpool", "avgpool", "flatten", "fc"]
    chains = [step for step in fuse_chains(plan, output) if isinstance(step, Chain)]
    assert len(chains) == 2 + 2 + 4 + 1
    assert chains[0].name == "layer1.0.conv2 + layer1.0.conv3 + layer1.1.conv1"


FUSED = {
    # net: the least numbers of convolutions with a BatchNorm folded in, with a ReLU, with a residual; of chains
    "torchvision.resnet18": (20, 17, 8, 0),
    "torchvision.resnet34": (36, 33, 16, 0),
    "torchvision.resnet50": (53, 49, 16, 9),
    "torchvision.resnet101": (104, 100, 33, 26),
    "torchvision.resnet152": (155, 151, 50, 43),
    "torchvision.resnext50_32x4d": (53, 49, 16, 0),
    "torchvision.resnext101_32x8d": (104, 100, 33, 0),
    "torchvision.resnext101_64x4d": (104, 100, 33, 0),
    "torchvision.wide_resnet50_2": (53, 49, 16, 0),
    "torchvision.wide_resnet101_2": (104, 100, 33, 0),
    "torchvision.vgg11_bn": (8, 8, 0, 0),
    "torchvision.mobilenet_v2": (52, 0, 10, 0),
    "timm.resnet18": (20, 17, 8, 0),
    "timm.resnet50": (53, 49, 16, 9),
    "timm.resnet50d": (55, 51, 16, 9),
    "timm.resnext50_32x4d": (53, 49, 16, 0),
    "timm.wide_resnet50_2": (53, 49, 16, 0),
    "timm.seresnet50": (53, 53, 4, 0),
    "timm.ecaresnet50d": (55, 39, 4, 0),
    "timm.resnetrs50": (56, 56, 4, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_safety_checks_cost_no_fusion(name: str) -> None:
    """`optimize` refuses some code and leaves some unfused for safety; these nets still have all their fusions."""
    library, _, builder = name.partition(".")
    with torch.device("meta"):
        model = timm.create_model(builder) if library == "timm" else getattr(torchvision.models, builder)()
    steps, output = trace(model.eval())
    plan = fuse(steps, output)
    convs = [step for step in plan if isinstance(step, Conv)]
    counts = (
        sum(conv.pair.norm is not None for conv in convs),
        sum(conv.relu for conv in convs),
        sum(conv.residual is not None for conv in convs),
        sum(isinstance(step, Chain) for step in fuse_chains(plan, output)),
    )
    assert all(count >= least for count, least in zip(counts, FUSED[name], strict=True)), counts


class ReadTwice(nn.Module):
    """A net that reads `z` and `y` more than once, so that only the ReLU after `self.last` may be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        y = z + self.norm(z)
        return F.relu(self.last(y)) + y + F.relu(y)


def test_values_read_twice_are_not_merged_away() -> None:
    model, x = lived_in(ReadTwice()).double(), images(dtype=torch.float64)
    net = optimize(model)
    assert relative_error(net(x), answers(model, x)[0]) <= EXACT_BLOCK
    assert sum(isinstance(step, Conv) and step.relu for step in net._steps) == 1


@pytest.mark.parametrize("first", [1, 5])
def test_shifts_of_convolutions_that_broadcast_are_not_absorbed(first: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, first, 1), nn.Conv2d(3, 6 - first, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + self.b(x))

    model, x = Two().double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= EXACT_BLOCK


def test_batches_of_resnets_may_be_split() -> None:
    for model in (fastres.resnet18(), fastres.resnet50(), fastres.paper.cifar(20), fastres.paper.resnet(18, "A")):
        steps, output = trace(model.eval())
        assert by_image(fuse(steps, output), model)


def test_values_between_convolutions_stay_in_8_bits() -> None:
    with fastres.backend("reference"):
        net = int8(tiny())
        net(images())
    convs = [step for step in net._steps if isinstance(step, Conv)]
    assert all(step.quantised is not None and step.quantised.out is not None for step in convs)
    assert all(step.quantised.out.zero == 0 for step in convs if step.relu and step.quantised and step.quantised.out)
    (pool,) = (step for step in net._steps if isinstance(step, Aten) and step.selects)
    assert pool.reads == (convs[0].out,)
    assert pool.out in {step.x for step in convs}
    table = net.explain()
    assert "Sequential in torch.float32 with int8 convolutions" in table
    assert table.count("quantise ") == 2  # of the input, and back before the average pool
    assert "int8 simulated in float64" in table
