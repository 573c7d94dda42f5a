"""Fused blocks against their modules, in float64 without kernels: outputs, gradients and running statistics.

These tests check the algorithm (which tensors are saved, how the backward proceeds, which gradients are skipped) to
rounding error. Kernels change only speed and rounding, and have their own tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from cases import relative_error
from tolerances import EXACT_BLOCK
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastres.ops import block as fused
from fastres.ops import conv_bn, dispatch, reference
from fastres.ops.block import stages


def unit(c: int, k: int, r: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c, k, r, stride, dilation * (r // 2), dilation, groups, bias=False)
    bn = nn.BatchNorm2d(k)
    nn.init.uniform_(bn.weight, -1, 1)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    return [conv, bn]


class Pad(nn.Module):
    """The option-A shortcut, computed by `reference`."""

    stride = 2

    def forward(self, x: Tensor) -> Tensor:
        return reference.pad_shortcut(x, 2, 8)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        layers, self.shortcut = {
            "basic": ([unit(6, 6, 3), unit(6, 6, 3)], None),
            "bottleneck": ([unit(6, 4, 1), unit(4, 4, 3), unit(4, 6, 1)], None),
            "projection": ([unit(6, 4, 1), unit(4, 4, 3, 2), unit(4, 8, 1)], nn.Sequential(*unit(6, 8, 1, 2))),
            "option-a": ([unit(6, 8, 3, 2), unit(8, 8, 3)], Pad()),
            "grouped": ([unit(6, 4, 1), unit(4, 4, 3, groups=2), unit(4, 6, 1)], None),
            "dilated": ([unit(6, 6, 3, dilation=2), unit(6, 6, 3, dilation=2)], None),
            "wide": ([unit(8, 4, 1), unit(4, 4, 3), unit(4, 8, 1)], None),
            "plain": ([unit(6, 8, 3, 2), unit(8, 8, 3)], None),
            "stem": ([unit(6, 5, 7, 2)], nn.MaxPool2d(3, 2, 1)),
        }[kind]
        self.kind = kind
        self.layers = nn.ModuleList(nn.Sequential(*layer) for layer in layers)

    def forward(self, x: Tensor, ops=fused) -> Tensor:
        pairs = [tuple(layer) for layer in self.layers]
        if self.kind == "plain":
            return ops.plain_block(x, pairs)
        if self.kind == "stem":
            return ops.stem(x, *pairs[0], self.shortcut)
        return ops.residual_block(x, pairs, self.shortcut)


KINDS = ("basic", "bottleneck", "projection", "option-a", "grouped", "dilated", "plain", "stem")


def results(block: Block, x: Tensor, ops) -> dict[str, Tensor]:
    """Return the output, all gradients and all buffers after one forward and backward."""
    x = x.clone().requires_grad_()
    y = block(x, ops)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y, "dx": x.grad, **grads, **dict(block.named_buffers())}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_backward_and_buffers_equal_the_definition(kind: str, training: bool) -> None:
    block = Block(kind).double().train(training)
    x = torch.randn(3, 6, 9, 8, dtype=torch.double)
    want = results(copy.deepcopy(block), x, reference)
    got = results(block, x, fused)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert relative_error(got[name], value) < EXACT_BLOCK, name
    for name, p in block.named_parameters():
        assert p.grad.stride() == p.stride(), f"{name}'s gradient has other strides than the parameter"


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_activation_spoils_the_same_gradients_as_in_pytorch(kind: str) -> None:
    """In eval mode dz = c_g g doesn't depend on z, so an infinite pixel must not spread further than in PyTorch."""
    block = Block(kind).double().eval()
    x = torch.randn(3, 6, 9, 8, dtype=torch.double)
    x[1, 2, 4, 4] = float("inf")
    want = results(copy.deepcopy(block), x, reference)
    got = results(block, x, fused)
    assert want["dx"].isfinite().all()
    for name, value in want.items():
        finite = value.isfinite()
        assert torch.equal(got[name].isfinite(), finite), name
        assert relative_error(got[name][finite], value[finite]) < EXACT_BLOCK, name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_buffers_without_gradients_equal_the_definition(kind: str, training: bool) -> None:
    block = Block(kind).double().train(training)
    other = copy.deepcopy(block)
    x = torch.randn(2, 6, 8, 9, dtype=torch.double)
    with torch.no_grad():
        assert relative_error(block(x), other(x, reference)) < EXACT_BLOCK
    for (name, got), want in zip(block.named_buffers(), other.buffers(), strict=True):
        assert relative_error(got, want) < EXACT_BLOCK, name


@pytest.mark.parametrize("kind", ["basic", "projection", "option-a", "stem"])
def test_first_and_second_derivatives_of_a_block_pass_gradcheck(kind: str) -> None:
    block = Block(kind).double()
    x = torch.randn(2, 6, 5, 6, dtype=torch.double, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *block.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *block.parameters()), fast_mode=True)


def test_batch_norms_of_every_kind_equal_the_definition() -> None:
    for change in ({"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}, {"affine": False}):
        block = Block("basic").double()
        for i, channels in ((0, 6), (1, 6)):
            block.layers[i][1] = nn.BatchNorm2d(channels, **change).double()
        other = copy.deepcopy(block)
        for _ in range(3):
            x = torch.randn(2, 6, 5, 5, dtype=torch.double)
            want, got = results(other, x, reference), results(block, x, fused)
            for name, value in want.items():
                if value is not None:
                    assert relative_error(got[name], value) < EXACT_BLOCK, (change, name)


@pytest.mark.parametrize(
    "counter",
    [None, torch.zeros(1, dtype=torch.int64), torch.tensor(3, dtype=torch.int32), torch.tensor(1.5)],
    ids=["none", "a vector", "int32", "float"],
)
def test_unusual_batch_counters_behave_as_in_pytorch(counter: Tensor | None) -> None:
    block, x = Block("projection").double(), torch.randn(2, 6, 5, 5, dtype=torch.double)
    block.layers[1][1].num_batches_tracked = counter
    other = copy.deepcopy(block)
    for _ in range(2):
        want, got = results(other, x, reference), results(block, x, fused)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert relative_error(got[name], value) < EXACT_BLOCK, name
    assert block.layers[0][1].num_batches_tracked == 2


def test_a_batch_is_counted_when_its_statistics_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PyTorch, an error before a BatchNorm leaves its count unchanged.

    Activation checkpointing, which runs the forward twice, counts a batch twice.
    """
    block, x = Block("bottleneck").double(), torch.randn(2, 6, 5, 5, dtype=torch.double)
    norms = [layer[1] for layer in block.layers]
    convolve, calls = reference.conv_fprop, []

    def failing(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return convolve(*args, **kwargs)

    with monkeypatch.context() as within:
        within.setattr(reference, "conv_fprop", failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            block(x)
    assert [int(bn.num_batches_tracked) for bn in norms] == [1, 0, 0]
    checkpoint(block, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert [int(bn.num_batches_tracked) for bn in norms] == [3, 2, 2]
    block.eval()(x)
    with torch.no_grad():
        block.train()(x)
    assert [int(bn.num_batches_tracked) for bn in norms] == [4, 3, 3]


class Counting:
    """Counts the calls of `reference`'s convolution steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        for name in ("conv_fprop", "conv_dgrad", "conv_wgrad"):
            monkeypatch.setattr(reference, name, self._wrap(name, getattr(reference, name)))

    def _wrap(self, name: str, function):
        def call(*args, **kwargs):
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call


def test_gradients_that_are_not_required_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counting(monkeypatch)
    block = Block("bottleneck").double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.double)

    block(x).sum().backward()  # x requires no gradient: no dgrad of the first convolution
    assert counts.calls == {"conv_fprop": 3, "conv_wgrad": 3, "conv_dgrad": 2}

    counts.calls.clear()
    block.requires_grad_(False)
    block.layers[2][1].bias.requires_grad_()
    block(x).sum().backward()  # only the last BN's bias requires one: no convolution runs backward
    assert counts.calls == {"conv_fprop": 3}

    counts.calls.clear()
    block(x.requires_grad_()).sum().backward()  # frozen weights, but x requires a gradient
    assert counts.calls == {"conv_fprop": 3, "conv_dgrad": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_each_activation_is_saved_once(kind: str) -> None:
    """A block saves at most its input, each convolution's output, its own output and the pool's taps, plus parameters
    and per-channel vectors."""
    block = Block(kind).double()
    x = torch.randn(2, 6, 64, 64, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    raw: list[int] = []
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: raw.append(o.nbytes))
    modules = copy.deepcopy(block)
    a = x
    for layer in modules.layers:
        a = layer(a)
    if kind == "projection":
        modules.shortcut(x)

    ours, out = saved_bytes(lambda: block(x))
    stock, _ = saved_bytes(lambda: block(x, reference))
    parameters = sum(p.nbytes for p in block.parameters())
    taps = out.numel() if kind == "stem" else 0
    vectors = sum(4 * m.num_features * 8 for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    assert ours <= x.nbytes + sum(raw) + out.nbytes + taps + 2 * parameters + vectors
    assert ours < stock


@pytest.mark.parametrize("kind", [*KINDS, "stage"])
def test_keep_activation_costs_the_activations_bytes_and_saves_a_pass(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's convolutions read stored activations, which are normally computed again in backward. `keep_activation`
    saves those whose weight gradient is required. Each costs its bytes and saves one elementwise pass. The results stay
    bit-identical."""
    blocks = [Block(name).double() for name in (("projection", "wide", "wide") if kind == "stage" else (kind,))]
    passes = Mock(wraps=reference.normalize)
    monkeypatch.setattr(reference, "normalize", passes)
    conv_bn.conv_bn.cache_clear()
    x = torch.randn(3, 6, 9, 8, dtype=torch.double)

    def run(**switches: bool) -> tuple[list[Tensor], int, int]:
        copies, x_read = copy.deepcopy(blocks), x.clone().requires_grad_()

        def forward() -> Tensor:
            if kind == "stage":
                return stages(x_read, [[([tuple(layer) for layer in b.layers], b.shortcut) for b in copies]])
            return copies[0](x_read)

        passes.reset_mock()
        with dispatch.fusions(**switches):
            kept, y = saved_bytes(forward)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        grads = [p.grad for b in copies for p in b.parameters() if p.grad is not None]
        return [y, x_read.grad, *grads], kept, passes.call_count

    def check(inner: list[nn.Conv2d]) -> None:
        (want, usual, before), (got, kept, after) = run(), run(keep_activation=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        sizes = [read[conv] for conv in inner]
        assert (kept - usual, before - after) == (sum(sizes), len(sizes))

    inner = [layer[0] for b in blocks for layer in list(b.layers)[1:]]
    read: dict[nn.Module, int] = {}
    a = x
    for b in blocks:
        z, a = a, b(a, reference)
        for layer in b.layers:
            read[layer[0]], z = z.nbytes, layer(z)
    check(inner)
    for conv in inner[:1]:
        conv.requires_grad_(False)
    check(inner[1:])


def saved_bytes(forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the total bytes of the distinct storages that a forward saves for backward, and its output."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return sum(storages.values()), out


def test_one_value_per_channel_is_refused_as_batch_norm_does() -> None:
    block = Block("basic").double()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 6, 1, 1, dtype=torch.double))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_equals_its_blocks_and_can_recompute_their_outputs(recompute: bool) -> None:
    """Outputs, gradients and buffers equal those of single blocks bit for bit. With `recompute`, the three inner block
    outputs are not saved."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block("projection"), Block("wide"), Block("wide"), Block("wide")])

        def forward(self, x: Tensor, together: bool) -> Tensor:
            if together:
                return stages(x, [[([tuple(layer) for layer in b.layers], b.shortcut) for b in self.blocks]])
            for block in self.blocks:
                x = block(x)
            return x

    def run(stack: Stack, together: bool) -> tuple[list[Tensor], int]:
        x = torch.linspace(-1, 1, 2 * 6 * 9 * 8, dtype=torch.double).reshape(2, 6, 9, 8).requires_grad_()
        with dispatch.fusions(recompute=recompute):
            kept, y = saved_bytes(lambda: stack(x, together))
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.double).reshape(y.shape))
        assert x.grad is not None
        return [y, x.grad, *(p.grad for p in stack.parameters()), *stack.buffers()], kept

    one_by_one = Stack().double()
    as_one = copy.deepcopy(one_by_one)
    want, usual = run(one_by_one, False)
    got, kept = run(as_one, True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert kept <= usual - 3 * want[0].nbytes * recompute


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("first", ["x", "first", "last"])  # the first tensor that requires a gradient
def test_a_stage_under_autocast_equals_its_blocks(
    memory_format: torch.memory_format, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage casts the weights and gradients of its blocks together; run one by one, each block casts its own.

    The results must be bit-identical.
    """
    one_by_one = nn.ModuleList([Block("projection"), Block("wide"), Block("wide")]).to(memory_format=memory_format)
    if first == "last":
        one_by_one[:2].requires_grad_(False)
    as_one, grads = copy.deepcopy(one_by_one), []
    copied, copy_ = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: copied.append(len(given)) or copy_(to, given))
    for blocks in (one_by_one, as_one):
        copied.clear()
        x = torch.linspace(-1, 1, 2 * 6 * 9 * 8).reshape(2, 6, 9, 8).requires_grad_(first == "x")
        with torch.autocast("cpu", torch.bfloat16):
            if blocks is as_one:
                y = stages(x, [[([tuple(layer) for layer in b.layers], b.shortcut) for b in blocks]])
            else:
                y = blocks[2](blocks[1](blocks[0](x)))
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
        grads.append([y, x.grad, *(p.grad for p in blocks.parameters()), *blocks.buffers()])
    assert y.dtype == torch.bfloat16
    for want, got in zip(*grads, strict=True):
        assert got is want is None or torch.equal(got, want)
    for p in as_one.parameters():
        assert p.grad is None or (p.grad.dtype, p.grad.stride()) == (p.dtype, p.stride())
    assert copied[1:] == [3 if first == "last" else 10]  # after the cast of the weights, one cast of all gradients


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", ["first", "both"])
def test_frozen_stages_equal_their_blocks(frozen: str, training: bool) -> None:
    """A stage leaves the end of its last block to the next stage; it must also do so if it needs no gradients."""
    blocks = nn.ModuleList([Block("basic"), Block("bottleneck")]).double()
    blocks[0].requires_grad_(False).train(training)
    blocks[1].requires_grad_(frozen == "first").eval()
    x = torch.randn(2, 6, 5, 6, dtype=torch.double)
    want = blocks[1](blocks[0](x))
    got = stages(x, [[([tuple(layer) for layer in b.layers], b.shortcut)] for b in blocks])
    assert relative_error(got, want) < EXACT_BLOCK
    if frozen == "first":
        parameters = [*blocks[1].parameters()]
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), parameters) for y in (got, want)), strict=True):
            assert relative_error(a, b) < EXACT_BLOCK


def test_first_and_second_derivatives_of_a_stage_pass_gradcheck() -> None:
    blocks = nn.ModuleList([Block("basic"), Block("basic")]).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.double, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return stages(x, [[([tuple(layer) for layer in b.layers], b.shortcut) for b in blocks]])

    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)
