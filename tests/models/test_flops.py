"""The FLOP counts agree with `torch.utils.flop_counter` and with the figures that the paper prints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from covering import covered, each, extra
from tolerances import PAPER
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg11, vgg16, vgg19

import fastres
from fastres.models import families, paper
from fastres.models.flops import ENSEMBLE, PAPER_TABLE, count

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": fastres.resnet18,
    "resnet50": fastres.resnet50,
    "resnext50_32x4d": fastres.resnext50_32x4d,
    "wide_resnet50_2": fastres.wide_resnet50_2,
    "dilated": lambda: fastres.resnet50(replace_stride_with_dilation=[False, True, True]),
    **{f"paper-{depth}-{s}": lambda d=depth, s=s: paper.resnet(d, s) for depth in (18, 50) for s in "ABC"},
    "plain-34": lambda: paper.plain(34),
    "cifar-20": lambda: paper.cifar(20),
    "cifar-plain-20": lambda: paper.cifar(20, residual=False),
    "cifar-stem-50": lambda: paper.cifar_stem(50),
    "vgg11": vgg11,
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@covered(by=each, shape=[(1, 3, 224, 224), (3, 3, 65, 97)], name=[*NETS])
def test_counts_are_those_of_torch(name: str, shape: tuple[int, ...]) -> None:
    net = on_meta(NETS[name]).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(shape, device="meta"))
    cost = count(net, shape)
    assert 2 * cost.multiply_adds == counter.get_total_flops()
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    assert sum(layer.multiply_adds for layer in cost.layers) == cost.multiply_adds
    assert sum(layer.parameters for layer in cost.layers) == cost.parameters


@pytest.mark.parametrize(
    ("build", "gflops"),
    [
        (lambda: paper.resnet(18, "A"), 1.795),
        (lambda: paper.resnet(18, "B"), 1.814),
        (lambda: paper.resnet(34, "A"), 3.644),
        (lambda: paper.resnet(34, "B"), 3.664),
        (lambda: paper.plain(34), 3.644),
        (lambda: paper.resnet(50), 3.858),
        (lambda: paper.resnet(101), 7.570),
        (lambda: paper.resnet(152), 11.282),
        (fastres.resnet50, 4.089),
        (fastres.resnet101, 7.801),
        (fastres.resnet152, 11.514),
    ],
)
def test_counts_are_exact(build: Callable[[], nn.Module], gflops: float) -> None:
    assert round(count(on_meta(build)).multiply_adds / 1e9, 3) == gflops


@pytest.mark.parametrize(
    "row", [extra(row) if "1202" in row.name else row for row in PAPER_TABLE], ids=lambda row: row.name
)
def test_counts_are_the_papers_figures(row: object) -> None:
    cost = row.cost()
    if row.gflops is not None:
        assert abs(cost.multiply_adds / 1e9 / row.gflops - 1) < PAPER
    if row.mparams is not None:
        decimals = len(str(row.mparams).split(".")[1])
        # The paper prints 1.73 M as 1.7, 19.42 M as 19.4, and 0.2697 M as 0.27.
        assert round(cost.parameters / 1e6, decimals) == row.mparams
    assert row.gflops is not None or row.mparams is not None or row.errors


def test_the_table_holds_every_figure_of_the_issue() -> None:
    gflops = {row.name: row.gflops for row in PAPER_TABLE if row.gflops is not None}
    assert {name: gflops[name] for name in ("VGG-16", "VGG-19")} == {"VGG-16": 15.3, "VGG-19": 19.6}
    ours = {row.depth: row.gflops for row in PAPER_TABLE if row.family == "paper" and row.gflops is not None}
    assert ours == {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}
    mparams = {row.depth: row.mparams for row in PAPER_TABLE if row.family == "cifar"}
    assert mparams == {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}
    assert len({row.name for row in PAPER_TABLE}) == len(PAPER_TABLE)
    for row in PAPER_TABLE:
        assert row.family == "vgg" or row.size == families.FAMILIES[row.family].size
    assert ENSEMBLE.top5 == 3.57


def test_the_baseline_is_torchvisions_vgg() -> None:
    costs = {row.name: row.cost() for row in PAPER_TABLE if row.family == "vgg"}
    assert costs == {"VGG-16": count(on_meta(vgg16)), "VGG-19": count(on_meta(vgg19))}
    assert round(costs["VGG-19"].multiply_adds / 1e9, 1) == 19.6


def test_any_size_is_counted_without_memory() -> None:
    net = paper.cifar(8)
    small, large = count(net, 32).under("layer1"), count(net, 32 * 2**12).under("layer1")
    assert large.multiply_adds == small.multiply_adds * 2**24  # 17 G pixels would need terabytes if they were allocated
    assert count(net, (32, 64)).under("layer1").multiply_adds == 2 * small.multiply_adds
    assert count(net, (5, 3, 32, 32)).multiply_adds == 5 * count(net, 32).multiply_adds


def test_the_model_is_left_alone() -> None:
    net = fastres.resnet18(num_classes=2).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    calls: list[int] = []
    handle = net.conv1.register_forward_hook(lambda *args: calls.append(1))
    pointers = [p.data_ptr() for p in net.parameters()]
    count(net, 64)
    handle.remove()
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert pointers == [p.data_ptr() for p in net.parameters()]
    assert not any(module._forward_hooks for module in net.modules())


def test_each_layer_has_a_row() -> None:
    cost = count(on_meta(lambda: paper.resnet(34)))
    first = cost.layers[0]
    assert (first.name, first.kind, first.output) == ("conv1", "Conv2d", (1, 64, 112, 112))
    assert first.multiply_adds == 112 * 112 * 64 * 3 * 49
    assert first.parameters == 64 * 3 * 49
    stage = cost.under("layer1")
    assert stage.multiply_adds == 6 * 56 * 56 * 64 * 64 * 9
    assert stage.parameters == 6 * (64 * 64 * 9 + 128)
    assert {layer.name.split(".")[0] for layer in stage.layers} == {"layer1"}
    assert cost.under("layer").layers == ()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.Conv1d(4, 4, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 8, 5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_counted_as_torch_does(layer: nn.Module) -> None:
    shape = (2, 4, 9) if isinstance(layer, nn.Conv1d) else (2, 4, 9, 8)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(shape))
    if len(shape) == 3:
        layer = nn.Sequential(nn.Flatten(2), layer)
        shape = (2, 4, 9, 1)
    assert 2 * count(layer, shape).multiply_adds == counter.get_total_flops()


def test_a_module_called_twice_works_twice_and_weighs_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.tied = nn.Conv2d(3, 3, 3, padding=1)
            self.tied.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.conv(self.conv(x)))

    cost = count(Twice(), 8)
    assert cost.multiply_adds == 3 * 64 * 81
    assert cost.parameters == sum(layer.parameters for layer in cost.layers) == 81 + 3 + 3


@pytest.mark.parametrize("size", [0, -1, (32,), (1, 2, 3), (1, 3, 0, 4), "32", (32, 1.5)])
def test_a_wrong_size_is_refused_with_those_accepted(size: object) -> None:
    with pytest.raises(ValueError, match=r"size must be a side, \(H, W\) or \(N, C, H, W\)"):
        count(nn.Conv2d(3, 3, 1), size)


def test_a_net_without_convolutions_wants_the_whole_input() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ValueError, match="pass size as"):
        count(net, 4)
    assert count(net, (1, 3, 4, 4)).multiply_adds == 96


@pytest.mark.parametrize("size", [10**11, 10**30])
def test_a_size_beyond_any_tensor_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="is larger than any tensor"):
        count(nn.Conv2d(3, 4, 1), size)
