"""Test that frozen BatchNorms, which are arithmetic in Dynamo's graph, match where that is safe."""

from __future__ import annotations

import copy
from typing import Any

import fuzz
import pytest
import torch
from cases import relative_error
from compiled import ALWAYS, Case, check, conv_bn, drawn, outcome, pairs_in, rewritten, tiny
from tolerances import AUTOCAST_GRADIENTS, EXACT, TWICE
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.ops.operators import conv_affine_act, conv_bn_act

pytestmark = pytest.mark.usefixtures("compiled_afresh")


def frozen(block: type[nn.Module] = BasicBlock) -> nn.Module:
    return drawn(tiny(block, norm_layer=FrozenBatchNorm2d))


def pair(c: int = 6, k: int = 6, **kwargs: Any) -> nn.Module:
    return conv_bn(c, k, norm=FrozenBatchNorm2d, **kwargs)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_frozen_net_gives_eagers_results(block: type[nn.Module], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = frozen(block).double().to(memory_format=layout)
    x = torch.randn(3, 3, 40, 33).double().to(memory_format=layout)
    check(model, x, fullgraph=True)
    with torch.no_grad():
        assert relative_error(torch.compile(model, backend="fastres", options=ALWAYS)(x), model(x)) < EXACT


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
def test_nothing_of_a_frozen_batch_norm_stays_in_the_graph(block: type[nn.Module], gradients: bool) -> None:
    """The matches are those of the net with BatchNorm2d, and no node that computed a scale or shift is left."""
    with torch.set_grad_enabled(gradients):
        images = torch.randn(2, 3, 40, 40)
        graph, findings = rewritten(frozen(block), images)
        _, theirs = rewritten(tiny(block).eval(), images)
    assert [(f.layer, f.pattern, f.operator) for f in findings] == [(f.layer, f.pattern, f.operator) for f in theirs]
    assert sum(n.target in (conv_bn_act, conv_affine_act) for n in graph.nodes) == (
        6 if gradients else pairs_in(theirs)
    )
    assert not [n for n in graph.nodes if n.target in ("reshape", "rsqrt")]


def dynamic(kind: str) -> nn.Module:
    norm = FrozenBatchNorm2d if kind == "frozen" else nn.BatchNorm2d
    model = nn.Sequential(conv_bn(3, 8, norm=norm), nn.ReLU(), BasicBlock(8, 8, norm_layer=norm)).double()
    return drawn(model).train(kind == "train")


@pytest.mark.parametrize("kind", ["frozen", "eval", "train"])
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
def test_one_dynamic_graph_serves_all_sizes(kind: str, gradients: bool) -> None:
    """With dynamic=True the first graph is the only one, and rewritten. Dynamo passes eps and momentum as symbols."""
    model, twin = dynamic(kind), dynamic(kind)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="fastres", options=ALWAYS, dynamic=True, fullgraph=True)
    counters.clear()
    with torch.set_grad_enabled(gradients):
        for n, h, w in ((4, 24, 16), (4, 17, 32), (3, 30, 19)):
            x = torch.randn(n, 3, h, w).double()
            want, got = outcome(model, model, x), outcome(compiled, twin, x)
            for name, value in want.items():
                assert (got[name] is None) == (value is None), name
                assert value is None or relative_error(got[name], value.double()) < EXACT, (name, x.shape)
            for net in (model, twin):
                net.zero_grad()
        assert counters["stats"]["unique_graphs"] == 1
        graph, findings = rewritten(model, x, dynamic=True)
    assert [finding.hit for finding in findings] == [True, True]
    assert not [n for n in graph.nodes if n.target == "item"]


@pytest.mark.parametrize("kind", ["frozen", "eval", "train"])
def test_a_symbolic_eps_that_changes_is_read_again(kind: str) -> None:
    model, x = dynamic(kind), torch.randn(4, 3, 24, 16).double()
    compiled = torch.compile(model, backend="fastres", options=ALWAYS, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for eps in (1e-5, 0.5, 0.25):
            model[0][1].eps = eps
            assert relative_error(compiled(x), model(x)) < EXACT


def test_layers_without_gradients_save_nothing_for_backward() -> None:
    """A stem and a first stage that don't train run `conv_affine_act`, the trained stages `conv_bn_act`."""
    model = frozen().double()
    for part in (model.conv1, model.layer1):
        part.requires_grad_(False)
    x = torch.randn(2, 3, 40, 33).double()
    findings = fastres.explain(model, x).findings
    assert [f.operator for f in findings] == ["conv_affine_act x1", *["conv_affine_act x2"] * 2, *["conv_bn_act"] * 3]
    twin = copy.deepcopy(model)
    torch.compile(twin, backend="fastres", options=ALWAYS)(x).square().sum().backward()
    model(x).square().sum().backward()
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not q.requires_grad), name
        assert p.grad is None or relative_error(p.grad, q.grad) < EXACT, name


class Trainable(nn.Module):
    """A BatchNorm with fixed statistics, in arithmetic, whose bias and weight train; the weight may be computed."""

    def __init__(self, channels: int, computed: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels).uniform_(0.5, 1.5)) for _ in range(2))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.empty(channels).uniform_(0.5, 2))
        self.eps, self.computed = 0.1, computed

    def forward(self, z: Tensor) -> Tensor:
        weight = self.weight * self.weight if self.computed else self.weight
        scale = weight.view(1, -1, 1, 1) * (self.running_var.view(1, -1, 1, 1) + self.eps).rsqrt()
        return z * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


@pytest.mark.parametrize("computed", [False, True], ids=["parameter", "computed"])
def test_gradients_reach_a_weight_that_trains(computed: bool) -> None:
    def body(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        return (b(a(x).relu()) + x).relu()

    pairs = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), Trainable(6, computed)) for _ in range(2)]
    module, x = Case(body, *pairs).double(), torch.randn(3, 6, 8, 7).double()
    assert [f.pattern for f in rewritten(module, x)[1]] == ["conv-BN-ReLU-conv-BN-add-ReLU"]
    check(module, x)


def of_detectron(z: Tensor, norm: Any) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = (norm.bias - norm.running_mean * scale).reshape(1, -1, 1, 1)
    scale = scale.reshape(1, -1, 1, 1)
    return z * scale.to(z.dtype) + shift.to(z.dtype)


def in_functions(z: Tensor, norm: Any) -> Tensor:
    weight, bias, mean, var = (t[:, None, None] for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = torch.mul(torch.rsqrt(torch.add(var, norm.eps)), weight)
    return torch.add(torch.sub(bias, torch.mul(scale, mean)), torch.mul(scale, z))


def in_place(z: Tensor, norm: Any) -> Tensor:
    weight, var = norm.weight.view(1, -1, 1, 1), norm.running_var.unsqueeze(1).unsqueeze(2)
    scale = (norm.eps + var).rsqrt() * weight
    shift = norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(-1, 1, 1) * scale
    z = z.mul_(scale)
    z += shift
    return z


def read_twice(z: Tensor, norm: Any) -> Tensor:
    """The scale is also read by others."""
    scale = norm.weight.view(1, -1, 1, 1) * (norm.running_var.view(1, -1, 1, 1) + 0.1).rsqrt()
    return torch.relu(z * scale + (norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale)) * scale


SPELLINGS = {"detectron2's": of_detectron, "functions": in_functions, "in place": in_place, "read twice": read_twice}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_match(name: str, gradients: bool) -> None:
    module = Case(lambda x, a: SPELLINGS[name](a[0](x), a[1]).relu(), pair(6, 8)).double()
    x = torch.randn(2, 6, 8, 7).double()
    with torch.set_grad_enabled(gradients):
        _, findings = rewritten(module, x)
        assert [(f.pattern, f.hit) for f in findings] == [("conv-BN-ReLU", True)]
        check(module, x)


def altered(z: Tensor, norm: Any, **other: Any) -> Tensor:
    """A frozen BatchNorm with `other` functions in place of its own steps."""
    step = {
        "rstd": lambda var: (var + norm.eps).rsqrt(),
        "shift": lambda bias, mean, scale: bias - mean * scale,
        "apply": lambda z, scale, shift: z * scale + shift,
        "view": lambda t: t.reshape(1, -1, 1, 1),
    } | other
    weight, bias, mean, var = map(step["view"], (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * step["rstd"](var)
    return step["apply"](z, scale, step["shift"](bias, mean, scale))


def written_scale(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    z = z * 1.0
    scale.mul_(2.0)
    return z * scale + shift


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    # what is not a frozen BatchNorm: (its steps, words from the reason)
    "another sign": ({"shift": lambda bias, mean, scale: bias + mean * scale}, "no BatchNorm"),
    "mean twice": ({"shift": lambda bias, mean, scale: bias - mean * mean}, "no BatchNorm"),
    "operands exchanged": ({"shift": lambda bias, mean, scale: mean * scale - bias}, "no BatchNorm"),
    "a factor": ({"shift": lambda bias, mean, scale: torch.sub(bias, mean * scale, alpha=2)}, "no BatchNorm"),
    "eps as a tensor": ({"rstd": lambda var: (var + var.mean()).rsqrt()}, "no BatchNorm"),
    "no eps": ({"rstd": lambda var: var.rsqrt()}, "no BatchNorm"),
    "eps twice": ({"rstd": lambda var: torch.add(var, 0.1, alpha=2).rsqrt()}, "no BatchNorm"),
    "square root": ({"rstd": lambda var: (var + 0.1).sqrt()}, "no BatchNorm"),
    "shift alone": ({"apply": lambda z, scale, shift: z + shift}, "no BatchNorm"),
    "along the width": ({"view": lambda t: t.reshape(1, 1, 1, -1)}, "no BatchNorm"),
    "reversed": ({"view": lambda t: t.flip(0).reshape(1, -1, 1, 1)}, ""),
    "product read twice": ({"apply": lambda z, scale, shift: (y := z * scale) + shift + y.mean()}, "other readers"),
    "output read twice": ({"apply": lambda z, scale, shift: z * scale + shift + z.mean()}, "readers other"),
    "scale written": ({"apply": written_scale}, "no BatchNorm"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arithmetic_stays(name: str) -> None:
    steps, reason = OTHERS[name]
    module = Case(lambda x, a: altered(a[0](x), a[1], **steps).relu(), pair(6, 7)).double()
    x = torch.randn(2, 6, 8, 7).double()  # 7 channels and 7 columns
    _, findings = rewritten(module, x)
    assert any(f.hit for f in findings) == (not reason)
    assert any(reason in f.reason for f in findings)
    check(module, x)


def write_weight(x: Tensor, a: nn.Module) -> Tensor:
    y = a(x).relu()
    a[1].weight.mul_(2.0)
    return y


def write_bias_before(x: Tensor, a: nn.Module) -> Tensor:
    a[1].bias.view(-1).mul_(2.0)
    return a(x).relu()


def write_var_between(x: Tensor, a: nn.Module) -> Tensor:
    z, norm = a[0](x), a[1]
    scale = norm.weight.view(1, -1, 1, 1) * (norm.running_var.view(1, -1, 1, 1) + 0.1).rsqrt()
    norm.running_mean.add_(1.0)
    return torch.relu(z * scale + (norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale))


def write_scale_between(x: Tensor, a: nn.Module) -> Tensor:
    z, norm = a[0](x), a[1]
    scale = norm.weight.view(1, -1, 1, 1) * (norm.running_var.view(1, -1, 1, 1) + 0.1).rsqrt()
    shift = norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale
    scale.mul_(2.0)
    return torch.relu(z * scale + shift)


def no_grad_scale(x: Tensor, a: nn.Module) -> Tensor:
    z, norm = a[0](x), a[1]
    with torch.no_grad():
        scale = norm.weight.view(1, -1, 1, 1) * (norm.running_var.view(1, -1, 1, 1) + 0.1).rsqrt()
    return torch.relu(z * scale + (norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale))


def moved_statistics(x: Tensor, a: nn.Module) -> Tensor:
    """Another BatchNorm, in training mode, updates the statistics of the frozen one."""
    norm = a[1]
    return torch.nn.functional.batch_norm(a(x).relu(), norm.running_mean, norm.running_var, training=True)


def learnt_statistics(x: Tensor, a: nn.Module) -> Tensor:
    z, norm = a[0](x), a[1]
    var = (x.mean() + 3.0) * norm.running_var
    scale = norm.weight.view(1, -1, 1, 1) * (var.view(1, -1, 1, 1) + 0.1).rsqrt()
    return torch.relu(z * scale + (norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale))


def into_the_shift(x: Tensor, a: nn.Module) -> Tensor:
    """With one image of one pixel, the shift has the shape of the result."""
    z, norm = a[0](x[:1, :, :1, :1]), a[1]
    scale = norm.weight.view(1, -1, 1, 1) * (norm.running_var.view(1, -1, 1, 1) + 0.1).rsqrt()
    shift = norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale
    shift.add_(z * scale)
    return shift.relu()


HAZARDS = {
    "shift written": (into_the_shift, "no BatchNorm"),
    "weight written after": (write_weight, "read or written elsewhere"),
    "bias written before": (write_bias_before, "read or written elsewhere"),
    "mean written between": (write_var_between, "writes into an input"),
    "scale written between": (write_scale_between, "writes into an input"),
    "scale without gradients": (no_grad_scale, "mode changes"),
    "statistics moved": (moved_statistics, "read or written elsewhere"),
    "statistics with gradients": (learnt_statistics, "require gradients"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_a_frozen_batch_norm_stays_where_matching_could_change_a_result(name: str) -> None:
    body, reason = HAZARDS[name]
    module = Case(body, pair()).double()
    if name == "scale without gradients":
        module.pairs[0][1] = Trainable(6).double()
    x = torch.randn(2, 6, 8, 7).double()
    _, findings = rewritten(module, x.clone().requires_grad_())
    assert not any(f.hit for f in findings)
    assert reason in findings[0].reason
    # AOTAutograd alone computes wrong gradients where a weight is written after its use.
    check(module, x, options=ALWAYS | {"fastres.inner": "eager"})


def test_explain_tells_a_frozen_batch_norm_without_a_convolution() -> None:
    model = nn.Sequential(FrozenBatchNorm2d(6), nn.ReLU(), pair(), nn.Sigmoid(), FrozenBatchNorm2d(6))
    findings = fastres.explain(model, torch.randn(2, 6, 8, 7)).findings
    assert [(f.layer, f.pattern, f.hit) for f in findings] == [
        ("0", "BN-ReLU", False),
        ("2.0", "conv-BN", True),
        ("4", "BN", False),
    ]


@pytest.mark.parametrize("inline", [True, False])
def test_buffers_may_be_attributes_of_the_graph(inline: bool) -> None:
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=inline):
        module = nn.Sequential(Case(lambda x, a: a[1](torch.conv2d(x, a[0].weight, None, 1, 1)).relu(), pair()))
        x = torch.randn(2, 6, 8, 7).double()
        _, findings = rewritten(module.double(), x)
        assert [f.hit for f in findings] == [True]
        check(module, x)


def test_vectors_of_half_the_precision_are_read_as_they_are() -> None:
    """In float16 and bfloat16, scale and shift are computed in float32, as `batch_norm` does."""
    for dtype in (torch.float16, torch.bfloat16):
        module = Case(lambda x, a: a(x).relu(), pair(8, 8)).to(dtype)
        x = torch.randn(2, 8, 9, 9).to(dtype)
        exact = copy.deepcopy(module).double()(x.double())
        with torch.no_grad():
            torch._dynamo.reset()
            got = torch.compile(module, backend="fastres", options=ALWAYS)(x)
            assert [f.hit for f in rewritten(module, x)[1]] == [True]
        assert got.dtype == dtype
        assert relative_error(got.double(), exact) < TWICE * relative_error(module(x).double(), exact)


class Tapped(nn.Module):
    """Returns a frozen net's features, each also changed by other nodes, as a user may do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = frozen()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        net, found = self.net, {}
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for i, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
            found[f"{i}"] = x = layer(x)
        if not torch.is_grad_enabled():  # autograd raises an error for it
            found["3"].add_(1.0)
        found["view"] = found["1"][:, :2]
        return found


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
def test_under_autocast_every_visible_value_keeps_its_dtype(gradients: bool) -> None:
    """Stock's frozen BatchNorms return float32 under autocast. So do the results, while operators compute in bf16.

    The errors against float64 are like those of eager.
    """
    model, x = Tapped(), torch.randn(4, 3, 64, 64)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.set_grad_enabled(gradients):
        with torch.autocast("cpu", torch.bfloat16):
            _, findings = rewritten(model, x)
            got, want = torch.compile(twin, backend="fastres", options=ALWAYS, fullgraph=True)(x), model(x)
        right = exact(x.double())
        for name, value in want.items():
            assert (got[name].dtype, got[name].stride()) == (torch.float32, value.stride()), name
            error = relative_error(value.double(), right[name])
            assert relative_error(got[name].double(), right[name]) < TWICE * error, name
        if gradients:
            for results in (got, want, right):
                sum(y.square().mean() for y in results.values()).backward()
    assert all(f.hit for f in findings)
    pairs = zip(twin.named_parameters(), model.parameters(), exact.parameters(), strict=True)
    for (name, p), q, r in pairs if gradients else ():
        if r.grad is not None:
            error = relative_error(q.grad.double(), r.grad)
            assert relative_error(p.grad.double(), r.grad) < max(TWICE * error, AUTOCAST_GRADIENTS), name


def casts(module: nn.Module, x: Tensor) -> list[Any]:
    with torch.autocast("cpu", torch.bfloat16):
        graph, _ = rewritten(module, x)
    return [n.args[1] for n in graph.nodes if n.target is torch.ops.aten.to.dtype]


def test_values_between_operators_stay_in_autocasts_dtype() -> None:
    """Only the images and what others read are cast, unless something writes into a value on its way."""
    x = torch.randn(2, 3, 64, 64)
    assert casts(frozen(), x) == [torch.bfloat16, torch.float32]

    def written(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        y = a(x).relu()
        y.mul_(2.0)
        return b(y)

    module, x = Case(written, pair(), pair()), torch.randn(2, 6, 8, 7)
    assert casts(module, x) == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = torch.compile(module, backend="fastres", options=ALWAYS)(x)
        exact = copy.deepcopy(module).double()(x.double())
        assert relative_error(got.double(), exact) < TWICE * relative_error(module(x).double(), exact)


def test_a_promotion_without_autocast_stays() -> None:
    """bfloat16 weights and float32 statistics: stock returns a float32 value that no operator computes."""
    module = pair()
    module[0].to(torch.bfloat16)
    x = torch.randn(2, 6, 8, 7, dtype=torch.bfloat16)
    (finding,) = rewritten(module, x)[1]
    assert "converts torch.bfloat16 to torch.float32" in finding.reason
    module = pair()
    module[0].double()
    (finding,) = rewritten(module, x.double())[1]
    assert "computes in torch.float32, the convolution in torch.float64" in finding.reason


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_spellings_give_eagers_results(first: int) -> None:
    verdict, wrong = fuzz.Verdict(), []
    for seed in range(first, first + 20):
        program = fuzz.FrozenWriter(seed).write()
        for mode in fuzz.MODES:
            of_net = fuzz.compiled(program.build, program.images(), mode)
            wrong += [f"seed {seed}", program.source(), *of_net.faults] if of_net.faults else []
            verdict += of_net
    assert not wrong, "\n".join(wrong)
    assert verdict.counts["matches rewritten"] >= 25, "the backend had little to do"
