"""Blocks with running statistics in training: FrozenBatchNorm2d, and BatchNorm2d in eval mode.

Most tests check the algorithm in float64 without kernels. Those marked `interpret` run the kernels.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close_to_reference, relative_error
from test_block import KINDS, Block, results, saved_bytes
from tolerances import EXACT_BLOCK, GRADIENTS, TOLERANCES, WHOLE_NETS, lost_in_sums
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.kernels import batch_norm, dgrad, fprop, max_pool, wgrad
from fastres.models import resnet
from fastres.ops import block as fused
from fastres.ops import dispatch, frozen, reference
from fastres.ops.block import stages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def freeze(module: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d in `module` by a FrozenBatchNorm2d with the same values, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = FrozenBatchNorm2d(child.num_features, child.eps)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm.to(child.weight.dtype))
        else:
            freeze(child)
    return module


def drawn(module: nn.Module) -> nn.Module:
    """Draw the weights, biases and running statistics of each BatchNorm2d in `module`, in place."""
    for norm in (each for each in module.modules() if isinstance(each, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1)
        nn.init.normal_(norm.bias, std=0.1)
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    return module


def arguments(blocks: Any) -> list[tuple[list[Any], Any]]:
    """Return the blocks of one stage as `stages` takes them."""
    return [([tuple(layer) for layer in b.layers], b.shortcut) for b in blocks]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_with_frozen_batch_norm_equal_the_definition(kind: str) -> None:
    block = freeze(Block(kind).double())
    x = torch.randn(3, 6, 9, 8, dtype=torch.double)
    want, got = results(copy.deepcopy(block), x, reference), results(block, x, fused)
    assert got.keys() == want.keys()
    assert any(name.endswith("0.weight") for name in want)
    for name, value in want.items():
        assert relative_error(got[name], value) < EXACT_BLOCK, name


@pytest.mark.parametrize("kind", ["bottleneck", "projection", "option-a", "stem"])
def test_any_choice_of_trained_parameters_gets_exact_gradients(kind: str) -> None:
    """Each parameter alone, and random subsets: what isn't needed is not saved, which must not change a gradient."""
    generator = torch.Generator().manual_seed(0)
    block = Block(kind).double().eval()
    count = len(list(block.parameters()))
    x = torch.randn(2, 6, 9, 8, dtype=torch.double)
    choices = [torch.arange(count) == i for i in range(count)]
    choices += [torch.rand(count, generator=generator) < 0.4 for _ in range(8)]
    for chosen in choices:
        for needs_x in (False, True):
            if not (needs_x or chosen.any()):
                continue
            grads = []
            for ops in (reference, fused):
                one = copy.deepcopy(block)
                for p, needed in zip(one.parameters(), chosen.tolist(), strict=True):
                    p.requires_grad_(needed)
                own = x.clone().requires_grad_(needs_x)
                y = one(own, ops)
                y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
                grads.append([own.grad, *(p.grad for p in one.parameters())])
            for want, got in zip(*grads, strict=True):
                assert (want is None) == (got is None)
                assert want is None or relative_error(got, want) < EXACT_BLOCK


@pytest.mark.parametrize("norms", ["frozen", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_block_saves_what_its_convolutions_read_and_its_output(kind: str, norms: str) -> None:
    """The input of each convolution, the output, a pool's taps (a byte each), and per-channel vectors: no z."""
    block = Block(kind).double()
    block = freeze(block) if norms == "frozen" else block.eval()
    x = torch.randn(2, 6, 64, 64, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    ours, y = saved_bytes(lambda: block(x))
    stock, _ = saved_bytes(lambda: block(x, reference))
    taps = y.numel() if kind == "stem" else 0
    inputs, a = x.nbytes, x
    for layer in list(block.layers)[:-1]:
        a = F.relu(layer(a))
        inputs += a.nbytes
    tensors = sum(t.nbytes for t in (*block.parameters(), *block.buffers()) if t.is_floating_point())
    filters = sum(m.weight.nbytes for m in block.modules() if isinstance(m, nn.Conv2d))  # KRSC copies
    vectors = sum(4 * m.out_channels * 8 for m in block.modules() if isinstance(m, nn.Conv2d))
    assert inputs + y.nbytes + taps <= ours <= inputs + y.nbytes + taps + tensors + filters + vectors
    if norms == "eval":
        assert ours < stock


def test_the_convolutions_of_frozen_layers_save_nothing() -> None:
    """The parts of a block below its first trained parameter keep no activation for backward."""
    block = freeze(Block("bottleneck").double())
    x = torch.randn(2, 6, 32, 32, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    whole, y = saved_bytes(lambda: block(x))
    block.layers[:2].requires_grad_(False)
    upper, _ = saved_bytes(lambda: block(x))
    first = F.relu(block.layers[0](x))
    assert whole - upper == first.nbytes  # the second convolution's input
    block.requires_grad_(False)
    nothing, y = saved_bytes(lambda: block(x))
    assert nothing == 0
    assert not y.requires_grad


def test_a_net_with_a_frozen_stem_and_first_stage_saves_nothing_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As detectors train it. Everything saved for backward belongs to the trained stages."""
    monkeypatch.setattr(dispatch, "why_unfused", lambda *_: None)
    net = freeze(drawn(fastres.resnet18(num_classes=5))).double()
    for layer in (net.conv1, net.layer1):
        layer.requires_grad_(False)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    saved, _ = saved_bytes(lambda: net(images))
    with torch.no_grad():
        x = net._stem(images)
        x = net.layer1(x)

    def rest() -> Tensor:
        return net.fc(resnet.pooled(resnet.run_stages(x, net.layer2, net.layer3, net.layer4), net.avgpool))

    alone, _ = saved_bytes(rest)
    assert saved == alone


@pytest.mark.parametrize("second", ["frozen", "trained"])
def test_stages_of_frozen_and_trained_blocks_equal_their_blocks(second: str) -> None:
    """Frozen blocks and blocks with batch statistics follow each other, within a stage and across two."""
    blocks = nn.ModuleList([Block("projection"), *(Block("wide") for _ in range(5))]).double()
    for at in (0, 2, 3) if second == "frozen" else (1, 4, 5):
        freeze(blocks[at])
    x = torch.randn(2, 6, 9, 8, dtype=torch.double)

    def run(together: bool) -> list[Tensor]:
        own, start = copy.deepcopy(blocks), x.clone().requires_grad_()
        if together:
            y = stages(start, [arguments(own[:3]), arguments(own[3:])])
        else:
            y = start
            for block in own:
                y = block(y)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        assert start.grad is not None
        return [y, start.grad, *(p.grad for p in own.parameters()), *own.buffers()]

    for want, got in zip(run(False), run(True), strict=True):
        assert relative_error(got, want) < EXACT_BLOCK


def test_frozen_stages_are_one_node_and_mask_each_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a stage, dgrad's epilogue applies the ReLU's mask of the block before. Only the last block masks alone."""
    blocks = nn.ModuleList([Block("projection"), Block("wide"), Block("wide")]).double()
    freeze(blocks)
    masks = Counter()
    for module, name in ((frozen, "relu_backward"), (reference, "relu_backward")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, of=module.__name__, do=original: masks.update([of]) or do(*a))
    x = torch.randn(2, 6, 9, 8, dtype=torch.double, requires_grad=True)
    y = stages(x, [arguments(blocks)])
    assert y.grad_fn is not None
    assert [each for each, _ in y.grad_fn.next_functions if each is not None and "Blocks" in each.name()] == []
    y.sum().backward()
    # The library's dgrad masks each of the 3 * 2 inner activations and the 2 inputs of inner blocks.
    assert masks == {"fastres.ops.frozen": 1, "fastres.ops.reference": 8}


def test_first_and_second_derivatives_of_frozen_blocks_pass_gradcheck() -> None:
    blocks = nn.ModuleList([Block("basic"), freeze(Block("basic"))]).double().eval()
    names = [name for name, _ in blocks.named_parameters()]
    x = torch.randn(2, 6, 4, 5, dtype=torch.double, requires_grad=True)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            return stages(x, [arguments(self.blocks)])

    stage = Stage()

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip((f"blocks.{name}" for name in names), parameters, strict=True))
        return torch.func.functional_call(stage, values, (x,))

    assert torch.autograd.gradcheck(f, (x, *blocks.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *blocks.parameters()), fast_mode=True)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_the_norms_weights_are_as_accurate_as_pytorchs(dtype: torch.dtype, mean: float) -> None:
    """The gradient of a norm's weight comes from the filters' gradient, in place of a sum over z.

    With a large running mean its two terms nearly cancel. The medians of eight random blocks are compared, because
    after a ReLU that lets little through single errors are large in PyTorch, too.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(8):
        torch.manual_seed(seed)
        block = Block("bottleneck").eval()
        for _, norm in block.layers:
            norm.running_mean += mean
            norm.bias.data += mean * norm.weight.data / (norm.running_var + norm.eps).sqrt()
        x = torch.randn(4, 6, 17, 16).to(dtype)
        block.to(dtype)
        exact = results(copy.deepcopy(block).double(), x.double(), reference)
        stock, ours = results(copy.deepcopy(block), x, reference), results(block, x, fused)
        for name in (f"layers.{i}.1.weight" for i in range(3)):
            both = relative_error(stock[name], exact[name]), relative_error(ours[name], exact[name])
            errors.setdefault(name, []).append(both)
    for name, of_seeds in errors.items():
        of_stock, of_ours = map(statistics.median, zip(*of_seeds, strict=True))
        assert of_ours <= GRADIENTS * of_stock + TOLERANCES[dtype], name


def test_a_frozen_norm_under_autocast_gives_autocasts_dtype() -> None:
    """As BatchNorm2d does. PyTorch's FrozenBatchNorm2d multiplies by float32 buffers and gives float32."""
    block = freeze(Block("projection"))
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        assert block(x, reference).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_running_statistics_are_read_when_the_forward_runs() -> None:
    """Later changes, such as those of a forward in training mode, don't change the gradients of an earlier forward."""
    block = Block("basic").double().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.double)
    want = results(copy.deepcopy(block), x, fused)
    start = x.clone().requires_grad_()
    y = block(start)
    for layer in block.layers:
        layer[1].running_var.mul_(3)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    assert relative_error(start.grad, want["dx"]) < EXACT_BLOCK


class Calls:
    """Counts the launches of kernels, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        for module in (fprop, dgrad, wgrad, batch_norm, max_pool):
            monkeypatch.setattr(module, "launch", self._counting(module.launch))

    def _counting(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        def call(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.count[kernel.fn.__name__] += 1
            return launch(kernel, *args, **kwargs)

        return call


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bottleneck", "projection", "option-a", "stem"])
def test_frozen_blocks_train_on_the_kernels(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution applies its norm in the epilogue, and dgrad's epilogue the ReLU's mask of the layer before."""
    monkeypatch.setattr(dispatch, "conv_engine", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "passes_engine", lambda *_: "triton")
    torch.manual_seed(0)
    block = freeze(Block(kind)).to(DEVICE, dtype)
    x = torch.randn(2, 6, 9, 8, device=DEVICE, dtype=dtype)
    exact = results(copy.deepcopy(block).double(), x.double(), reference)
    stock = results(copy.deepcopy(block), x, reference)
    calls = Calls(monkeypatch)
    ours = results(block, x, fused)
    for name, want in exact.items():
        if name not in dict(block.named_buffers()):
            lost = lost_in_sums(9 * 8 * 2, x)
            assert_close_to_reference(ours[name], want, stock[name], factor=GRADIENTS, what=name, lost=lost)
    convs = len(block.layers) + (kind == "projection")
    assert sum(n for name, n in calls.count.items() if name.startswith("conv_fprop")) == convs
    assert calls.count["wgrad_kernel"] == convs
    assert calls.count["backward_reduce_kernel"] == calls.count["statistics_kernel"] == 0
    assert calls.count["normalize_kernel"] == (kind == "option-a")
    assert calls.count["backward_apply_kernel"] == (kind == "stem")


@pytest.mark.interpret
def test_a_detectors_backbone_trains_on_the_kernels() -> None:
    """A narrow ResNet with FrozenBatchNorm2d; its stem and first stage get no gradients."""
    torch.manual_seed(0)
    net = freeze(drawn(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64)))
    net.layer3 = net.layer4 = nn.Identity()
    net.fc = nn.Linear(128, 5)
    net.to(DEVICE)
    for layer in (net.conv1, net.layer1):
        layer.requires_grad_(False)
    images, labels = torch.randn(2, 3, 32, 32, device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    grads = []
    for dtype, name in ((torch.double, "reference"), (torch.float, "reference"), (torch.float, "triton")):
        own = copy.deepcopy(net).to(dtype)
        with fastres.backend(name):
            F.cross_entropy(own(images.to(dtype)), labels).backward()
        grads.append({name: p.grad for name, p in own.named_parameters()})
    for name, exact in grads[0].items():
        assert (grads[2][name] is None) == (exact is None) == (name.startswith(("conv1", "layer1")))
        if exact is not None:
            lost = lost_in_sums(9 * 128, images)
            assert_close_to_reference(grads[2][name], exact, grads[1][name], factor=WHOLE_NETS, what=name, lost=lost)
