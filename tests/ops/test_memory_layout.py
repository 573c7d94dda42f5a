"""Memory layouts: conversions return views where possible, and copies equal PyTorch's own bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastres.ops import layout
from fastres.ops.layout import Geometry, cast_gradients, read_weights


def test_a_geometry_is_the_same_in_both_directions() -> None:
    assert Geometry(2, 3, 1, 4).both == ([2, 2], [3, 3], [1, 1], 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_statistics_are_at_least_float32(dtype: torch.dtype) -> None:
    assert layout.wide(dtype) == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_an_input_is_copied_only_to_change_layout_or_dtype(
    memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=memory_format)
    got = layout.dense(x, dtype)
    assert (got.dtype, got.is_contiguous()) == (dtype, True)
    assert torch.equal(got, x.permute(0, 2, 3, 1).to(dtype))
    viewed = memory_format == torch.channels_last and dtype == torch.float32
    assert (got.data_ptr() == x.data_ptr()) == viewed
    assert layout.nchw(got).data_ptr() == got.data_ptr()
    assert torch.equal(layout.nchw(got), x.to(dtype))


def test_a_result_allows_in_place_operations() -> None:
    """Autograd forbids changing a view that a custom function returns, so the result must not be marked as a view."""
    out = torch.zeros(1, 2, 2, 3)
    assert layout.nchw(out)._is_view()
    result = layout.unaliased(out)
    assert not result._is_view()
    assert result.data_ptr() == out.data_ptr()
    assert result.shape == (1, 3, 2, 2)


def test_a_filter_is_read_without_autograd() -> None:
    weight = torch.randn(4, 3, 2, 2, requires_grad=True)
    got = layout.krsc(weight, torch.float16)
    assert not got.requires_grad
    assert got.is_contiguous()
    assert torch.equal(got, weight.detach().permute(0, 2, 3, 1).half())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (4, 1, 3, 3), (1, 1, 1, 1), (4, 6, 3, 3)], ids=str)
def test_a_gradient_is_copied_only_into_another_order(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    weight = torch.empty(shape).contiguous(memory_format=memory_format)
    memory = torch.randn(7 + weight.numel())
    k, c, r, s = shape
    dw = memory[7:].view(k, r, s, c)
    for dtype in (torch.float32, torch.float64):
        grad = layout.like_parameter(dw, weight.to(dtype))
        assert torch.equal(grad, dw.permute(0, 3, 1, 2).to(dtype))
        assert (grad.stride(), grad.dtype) == (weight.stride(), dtype)
        same_order = c == 1 or r == s == 1 or memory_format == torch.channels_last
        assert (grad.data_ptr() == dw.data_ptr()) == (same_order and dtype == torch.float32)


def test_weights_of_a_stage_are_cast_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cast weights equal those of `to` bit for bit and are aligned for TMA. Weights that need more than a cast, or
    none, are not cast together."""
    copied, copy_ = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: copied.append(len(given)) or copy_(to, given))
    shapes = [(5, 3, 7, 7), (6, 5, 1, 1), (3, 2, 3, 3), (1, 1, 1, 1)]
    nhwc, nchw = torch.channels_last, torch.contiguous_format
    usual = [torch.randn(shape).contiguous(memory_format=nhwc).requires_grad_() for shape in shapes]
    usual += [torch.randn(shapes[1]), torch.tensor([[[[float("nan")]]], [[[float("inf")]]], [[[1e-40]]]])]
    others = [torch.randn(shapes[0]).contiguous(memory_format=nchw), torch.randn(shapes[0]).bfloat16()]
    for weights in ([*usual, *others, usual[0]], others, usual[:1]):
        found = read_weights(weights, torch.bfloat16)
        for w, got in zip(weights, found, strict=True):
            want = w.detach().to(torch.bfloat16).permute(0, 2, 3, 1).contiguous()
            assert torch.equal(got.view(torch.int16), want.view(torch.int16))
            assert got.is_contiguous()
            assert not got.requires_grad
            assert got.data_ptr() % 16 == 0
    assert copied == [len(usual) + 1]
    for w, got in zip(usual, read_weights(usual, torch.float32), strict=True):
        assert got.data_ptr() == w.data_ptr()


def test_weights_on_other_devices_stay_there() -> None:
    """The kernel that reads such a weight raises an error, as PyTorch's convolution does."""
    weights = [torch.randn(4, 4, 1, 1, device=device) for device in ("cpu", "cpu", "meta")]
    found = read_weights(weights, torch.bfloat16)
    assert [w.device.type for w in found] == ["cpu", "cpu", "meta"]


def test_gradients_of_a_stage_are_cast_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one cast for each pair of dtypes, and its results have the parameters' strides. Gradients that have the
    parameter's dtype are returned unchanged."""
    copied, copy_ = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: copied.append(len(given)) or copy_(to, given))
    shapes = [(5, 3, 7, 7), (6, 5, 1, 1), (3, 1, 3, 3), (1, 1, 1, 1), (4,)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters += [nn.Parameter(p.to(memory_format=torch.channels_last)) for p in parameters[:4]]
    parameters += [nn.Parameter(torch.randn(3, 2, 3, 3, dtype=torch.double)), parameters[0], None, parameters[4]]
    grads = [torch.randn(p.shape).bfloat16().to(memory_format=torch.channels_last) for p in parameters[:4]]
    grads += [torch.randn(4)] + [grad.clone() for grad in grads]
    grads += [torch.randn(3, 2, 3, 3).bfloat16(), torch.randn(shapes[0]).half(), None, None]
    grads[1].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), 1e-40])
    found = cast_gradients([*grads], parameters)
    assert copied == [8, 1, 1]
    for grad, got, p in zip(grads, found, parameters, strict=True):
        if grad is None:
            assert got is None
        elif grad.dtype == p.dtype:
            assert got is grad
        else:
            assert torch.equal(got.nan_to_num(7), grad.to(p.dtype).nan_to_num(7))
            assert (got.dtype, got.stride(), got.requires_grad) == (p.dtype, p.stride(), False)
    assert len({got.data_ptr() for got in found if got is not None}) == 11
