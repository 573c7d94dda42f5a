"""The paper's nets match Table 1, Fig. 3 and section 4.2, and survive copying, tracing, compilation and hooks."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close_to_reference
from covering import extra
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import fastres
from fastres.models import paper
from fastres.models.resnet import BasicBlock
from fastres.ops.shortcut import PadShortcut

# One block of every kind per stage, or two where the second differs from the first.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "basic-A": lambda: paper.ResNet(BasicBlock, (1, 2, 1, 1), "A", 10, 3),
    "basic-C": lambda: paper.ResNet(BasicBlock, (1, 1, 1, 1), "C", 10, 3),
    "bottleneck-A": lambda: paper.ResNet(paper.Bottleneck, (1, 1, 1, 1), "A", 10, 3),
    "bottleneck-B": lambda: paper.ResNet(paper.Bottleneck, (1, 2, 1, 1), "B", 10, 3),
    "plain": lambda: paper.ResNet(paper.PlainBlock, (1, 1, 1, 1), None, 10, 3),
    "cifar": lambda: paper.cifar(14),
    "cifar-plain": lambda: paper.cifar(8, residual=False),
    "cifar-stem": lambda: paper.CifarStemResNet(BasicBlock, (1, 1, 1, 1), 10, 3),
}
with_option_a = pytest.mark.parametrize("name", ["basic-A", "bottleneck-A", "cifar"])
every_kind = pytest.mark.parametrize("name", SMALL)


@functools.cache
def _small(name: str) -> nn.Module:
    net = SMALL[name]()
    with torch.no_grad():
        for _ in range(2):
            net(images(8, size_for(name)))
    return net.eval()


def small(name: str) -> nn.Module:
    """Return a small net in eval mode whose BatchNorm statistics are not the initial ones."""
    return copy.deepcopy(_small(name))


def images(n: int = 2, size: int = 32, **kwargs: object) -> Tensor:
    return torch.randn(n, 3, size, size, **kwargs)


def size_for(name: str) -> int:
    """Return the side of small images for a net: 16 for the CIFAR nets, 32 for the others."""
    return 16 if name.startswith("cifar") else 32


def stages(net: nn.Module) -> list[nn.Sequential]:
    return [child for name, child in net.named_children() if name.startswith("layer")]


def blocks(net: nn.Module) -> list[nn.Module]:
    return [block for stage in stages(net) for block in stage]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


# Which nets exist


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: paper.resnet(20), "18, 34, 50, 101, 152"),
        (lambda: paper.resnet(34, "D"), "A, B, C"),
        (lambda: paper.resnet(34, "a"), "A, B, C"),
        (lambda: paper.plain(50), "18, 34"),
        (lambda: paper.cifar(21), "20, 32, 44, 56, 110, 1202"),
        (lambda: paper.cifar(2), "6n\\+2"),
        (lambda: paper.cifar_stem(20), "18, 34, 50, 101, 152"),
        (lambda: paper.resnet(18, in_channels=0), "in_channels must be a whole number, at least 1: got 0"),
        (lambda: paper.cifar(20, num_classes=-1), "num_classes must be a whole number, at least 1: got -1"),
        (lambda: paper.cifar_stem(18, in_channels=2.5), "in_channels must be a whole number, at least 1: got 2.5"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(call: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("name", ["basic-A", "plain", "cifar", "cifar-stem"])
@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32)])
def test_wrong_images_are_refused_with_the_right_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes images \[N, 3, H, W\], got"):
        on_meta(SMALL[name])(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("build", [paper.cifar, paper.cifar_stem, paper.resnet])
def test_channels_and_classes_can_be_chosen(build: Callable[..., nn.Module], channels: int) -> None:
    depth = 20 if build is paper.cifar else 18
    net = on_meta(lambda: build(depth, in_channels=channels, num_classes=7))
    assert net(torch.empty(2, channels, 32, 32, device="meta")).shape == (2, 7)


def test_the_papers_nets_are_fastres_paper() -> None:
    assert fastres.paper is paper


# Table 1, Fig. 3, section 4.2


@pytest.mark.parametrize(
    ("depth", "counts"),
    [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))],
)
def test_imagenet_nets_are_those_of_table_1(depth: int, counts: tuple[int, ...]) -> None:
    net = on_meta(lambda: paper.resnet(depth))
    expansion = 4 if depth >= 50 else 1
    assert tuple(map(len, stages(net))) == counts
    x = net.relu(net.bn1(net.conv1(torch.empty(1, 3, 224, 224, device="meta"))))
    assert x.shape == (1, 64, 112, 112)
    x = net.maxpool(x)
    for stage, width, size in zip(stages(net), (64, 128, 256, 512), (56, 28, 14, 7), strict=True):
        x = stage(x)
        assert x.shape == (1, width * expansion, size, size)
    assert net(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    layers = [m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56, 110, 1202])
@pytest.mark.parametrize("residual", [True, False])
def test_a_cifar_net_has_its_layers_and_sizes(depth: int, residual: bool) -> None:
    net = on_meta(lambda: paper.cifar(depth, residual))
    n = (depth - 2) // 6
    assert tuple(map(len, stages(net))) == (n, n, n)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules()) == depth
    x = net.relu(net.bn1(net.conv1(torch.empty(1, 3, 32, 32, device="meta"))))
    for stage, width, size in zip(stages(net), (16, 32, 64), (32, 16, 8), strict=True):
        x = stage[0](x)
        assert x.shape == (1, width, size, size)
    assert sum(isinstance(block, paper.PadBasicBlock) for block in blocks(net)) == (2 if residual else 0)
    assert net.fc.in_features == 64
    assert net.fc.out_features == 10


def test_cifar_110_runs() -> None:
    assert paper.cifar(110).eval()(images(1)).isfinite().all()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_a_net_with_a_cifar_stem_has_its_layers_and_sizes(depth: int) -> None:
    net = on_meta(lambda: paper.cifar_stem(depth))
    x = net.relu(net.bn1(net.conv1(torch.empty(1, 3, 32, 32, device="meta"))))
    expansion = 4 if depth >= 50 else 1
    for stage, width, size in zip(stages(net), (64, 128, 256, 512), (32, 16, 8, 4), strict=True):
        x = stage(x)
        assert x.shape == (1, width * expansion, size, size)
    assert net.linear.out_features == 10
    assert tuple(map(len, stages(net))) == paper.LAYERS[depth]


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_a_bottleneck_strides_its_first_1x1(depth: int) -> None:
    net = on_meta(lambda: paper.resnet(depth))
    strides = [[(block.conv1.stride, block.conv2.stride) for block in stage] for stage in stages(net)]
    assert [stage[0] for stage in strides] == [((1, 1), (1, 1))] + 3 * [((2, 2), (1, 1))]
    assert all(pair == ((1, 1), (1, 1)) for stage in strides for pair in stage[1:])
    theirs = on_meta(lambda: fastres.models.resnet.ResNet(fastres.Bottleneck, list(paper.LAYERS[depth])))
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(("depth", "default"), [(18, "A"), (34, "A"), (50, "B"), (101, "B"), (152, "B")])
def test_shortcut_options_have_their_parameters(depth: int, default: str) -> None:
    nets = {option: on_meta(lambda o=option: paper.resnet(depth, o)) for option in (None, "A", "B", "C")}
    count = {option: parameters(net) for option, net in nets.items()}
    assert count[None] == count[default]
    assert count["A"] < count["B"] < count["C"]
    inplanes = 64
    for a, b, c in zip(*(blocks(nets[option]) for option in "ABC"), strict=True):
        outplanes = a.pairs()[-1][0].out_channels
        changes = a.conv1.stride != (1, 1) or inplanes != outplanes
        projection = inplanes * outplanes + 2 * outplanes  # 1x1 weight, BN weight and bias
        assert parameters(c.downsample) == projection
        assert parameters(b.downsample) == projection if changes else b.downsample is None
        assert isinstance(a.downsample, PadShortcut) if changes else a.downsample is None
        assert parameters(a) == parameters(b) - (projection if changes else 0) == parameters(c) - projection
        inplanes = outplanes


@pytest.mark.parametrize(
    ("plain", "residual"),
    [
        (lambda: paper.plain(18), lambda: paper.resnet(18, "A")),
        (lambda: paper.plain(34), lambda: paper.resnet(34, "A")),
        (lambda: paper.cifar(110, residual=False), lambda: paper.cifar(110)),
    ],
)
def test_a_plain_net_is_the_residual_one_with_no_parameter_more_or_less(
    plain: Callable[[], nn.Module], residual: Callable[[], nn.Module]
) -> None:
    ours, theirs = on_meta(plain).state_dict(), on_meta(residual).state_dict()
    assert [(name, t.shape) for name, t in ours.items()] == [(name, t.shape) for name, t in theirs.items()]


@pytest.mark.parametrize("stride", [1, 2])
def test_only_the_shortcut_divides_plain_from_residual(stride: int) -> None:
    plain = paper.PlainBlock(4, 4 * stride, stride).double()
    block = BasicBlock(4, 4) if stride == 1 else paper.PadBasicBlock(4, 8, 2, PadShortcut(2, 8))
    block.double().load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    branch = plain.bn2(plain.conv2(F.relu(plain.bn1(plain.conv1(x)))))
    shortcut = x if stride == 1 else torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 4, 5, 4, dtype=x.dtype)], dim=1)
    torch.testing.assert_close(plain(x), F.relu(branch))
    torch.testing.assert_close(block(x), F.relu(branch + shortcut))


def test_a_bottleneck_block_is_what_the_paper_draws() -> None:
    def unit(x: Tensor, conv: nn.Conv2d, stride: int = 1) -> Tensor:  # batch statistics, weight 1 and bias 0
        z = F.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2)
        return (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()

    for option in "ABC":
        block = paper.ResNet(paper.Bottleneck, (1, 1, 1, 1), option, 10, 3).layer2[0].double()
        x = torch.randn(3, 256, 9, 8, dtype=torch.float64, requires_grad=True)
        y = unit(F.relu(unit(F.relu(unit(x, block.conv1, 2)), block.conv2)), block.conv3)
        padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 256))
        shortcut = padded if option == "A" else unit(x, block.downsample[0], 2)
        ref, out, dy = F.relu(y + shortcut), block(x), torch.randn_like(y)
        torch.testing.assert_close(out, ref)
        wanted = [x, *(p for p in block.parameters() if p.dim() == 4)]
        ours, theirs = torch.autograd.grad(out, wanted, dy), torch.autograd.grad(ref, wanted, dy)
        torch.testing.assert_close(ours, theirs)


@every_kind
def test_weights_begin_as_he_et_al_draw_them(name: str) -> None:
    for module in SMALL[name]().modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach().double()
            fan_in, n = weight[0].numel(), weight.numel()
            std = (2 / fan_in) ** 0.5
            # 5 standard errors of a normal sample of this size; fan_out would be off by up to sqrt(2) or sqrt(4)
            assert abs(float(weight.mean())) < 5 * std / n**0.5
            assert abs(float(weight.std()) / std - 1) < 5 / (2 * n) ** 0.5
            assert isinstance(module, nn.Linear) == (module.bias is not None)
            if module.bias is not None:
                assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


# An independent net


class PlainWordsBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        same = stride == 1 and cin == cout
        self.s = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.f(x) + self.s(x))


class PlainWordsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entrance = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        plan = [(64, 64, 1)] * 3 + [(64, 128, 2)] + [(128, 128, 1)] * 3
        plan += [(128, 256, 2)] + [(256, 256, 1)] * 5 + [(256, 512, 2)] + [(512, 512, 1)] * 2
        self.body = nn.Sequential(*(PlainWordsBlock(*sizes) for sizes in plan))
        self.linear = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.avg_pool2d(self.body(self.entrance(x)), 4).flatten(1))


def test_cifar_stem_34_equals_an_independent_net() -> None:
    theirs, ours = PlainWordsNet().double(), paper.cifar_stem(34).double()
    # ours registers a block's conv1 bn1 conv2 bn2 and then the shortcut, as theirs does: the order is the map
    ours.load_state_dict(dict(zip(ours.state_dict(), copy.deepcopy(theirs.state_dict()).values(), strict=True)))
    assert "linear.weight" in ours.state_dict()
    x = images(2, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [net(i) for net, i in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    dy = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x[:1]), theirs.eval()(x[:1]))


# Copies, traces, compilation, layouts, hooks


@every_kind
def test_copies_give_the_same(name: str) -> None:
    net, x = _small(name), images(2, size_for(name))
    y, fresh = net(x), SMALL[name]().eval()
    fresh.load_state_dict(net.state_dict())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh):
        torch.testing.assert_close(other(x), y)


@pytest.mark.parametrize(
    "name", ["basic-A", extra("bottleneck-A"), "bottleneck-B", "plain", "cifar", extra("cifar-stem")]
)
def test_recordings_give_the_same(name: str) -> None:
    net, x = small(name), images(2, size_for(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, x)
    head = net.linear if hasattr(net, "linear") else net.fc
    features = create_feature_extractor(net, {"flatten": "y"})
    recorded = {
        "script": torch.jit.script(net),
        "trace": traced,
        "fx": torch.fx.symbolic_trace(net),
        "export": torch.export.export(net, (x,)).module(),
        "features": lambda x: head(features(x)["y"]),
    }
    for kind, run in recorded.items():
        torch.testing.assert_close(run(x), net(x), msg=lambda text, kind=kind: f"{kind}: {text}")
    x = images(1, size_for(name) + 5)
    torch.testing.assert_close(recorded["fx"](x), net(x))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("bottleneck-B", "eager"), ("cifar-plain", "eager"), ("cifar", "eager"), ("cifar", "aot_eager")],
)
def test_nets_compile_without_a_graph_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    net, x = small(name), images(2, size_for(name))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=backend, fullgraph=True)(x), net(x))


@every_kind
def test_layouts_and_dtypes_agree_and_all_parameters_learn(name: str) -> None:
    net, x = small(name), images(4, size_for(name) + 1)
    ref = copy.deepcopy(net).double()(x.double())
    nhwc = copy.deepcopy(net).to(memory_format=torch.channels_last)
    x_nhwc = x.contiguous(memory_format=torch.channels_last)
    assert blocks(nhwc)[0](nhwc._stem(x_nhwc)).is_contiguous(memory_format=torch.channels_last)
    half = copy.deepcopy(net).bfloat16()
    with fastres.backend("reference"):
        baseline, half_baseline = nhwc(x_nhwc), half(x.bfloat16())
    assert_close_to_reference(nhwc(x_nhwc), ref, baseline)
    assert_close_to_reference(half(x.bfloat16()), ref, half_baseline)
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@every_kind
def test_the_fused_entry_points_give_the_same(name: str) -> None:
    net, x = small(name), images(2, size_for(name))
    with fastres.backend("reference"):
        torch.testing.assert_close(net(x), (y := net(x)))
    torch.testing.assert_close(net(x), y)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Record the shortcut's input at every block end (padded shortcut, addition, ReLU) that runs as one operation."""
    seen: list[Tensor] = []

    def end(y: Tensor, x: Tensor, stride: int) -> Tensor:
        seen.append(x)
        return original(y, x, stride)

    original = paper.pad_shortcut_add_relu
    monkeypatch.setattr(paper, "pad_shortcut_add_relu", end)
    return seen


@with_option_a
def test_option_a_ends_in_one_pass(name: str, ends: list[Tensor]) -> None:
    net, x = small(name), images(2, size_for(name))
    ends.clear()
    net(x)
    assert len(ends) == sum(isinstance(block, paper._PadEnd) for block in blocks(net)) >= 2


@with_option_a
@pytest.mark.parametrize("where", ["relu", "downsample"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_on_the_end_is_called_and_sees_the_same(name: str, where: str, kind: str, ends: list[Tensor]) -> None:
    net, x = small(name), images(2, size_for(name))
    y = net(x)
    block = next(block for block in blocks(net) if isinstance(block, paper._PadEnd))
    for child in net.modules():  # a full backward hook hands on a view, which no in-place ReLU may overwrite
        if isinstance(child, nn.ReLU):
            child.inplace = False
    ends.clear()
    calls: list[str] = []
    getattr(block.get_submodule(where), f"register_{kind}_hook")(lambda *args: calls.append(kind))
    out = net(x.requires_grad_())
    torch.testing.assert_close(out, y)
    out.sum().backward()
    assert calls
    assert len(ends) == sum(isinstance(other, paper._PadEnd) for other in blocks(net)) - 1


@with_option_a
def test_hooks_anywhere_else_are_called(name: str) -> None:
    net, x = small(name), images(2, size_for(name))
    y, called = net(x), set()
    for path, module in net.named_modules():
        module.register_forward_hook(lambda *args, path=path: called.add(path))
    torch.testing.assert_close(net(x), y)
    assert called == {path for path, _ in net.named_modules()}


@with_option_a
def test_a_replaced_end_is_obeyed(name: str) -> None:
    net, x = small(name), images(2, size_for(name))
    block = next(block for block in blocks(net) if isinstance(block, paper._PadEnd))
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    block.relu = nn.Identity()
    assert (block(x) < 0).any()
