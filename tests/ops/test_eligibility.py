"""Eligibility for the fused path: a call that might differ from running the modules is not served, and the reason is
named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.models import resnet
from fastres.ops import dispatch, eligibility
from fastres.ops.eligibility import Parts
from fastres.ops.shortcut import PadShortcut


@pytest.fixture(autouse=True)
def _every_dtype_is_served() -> Any:
    """Make `dispatch` accept every dtype and device; whether kernels exist is not tested here."""
    with fastres.backend("reference"):
        yield


def block() -> Any:
    projection = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    return resnet.BasicBlock(6, 8, 2, projection)


def images(channels: int = 6) -> Tensor:
    return torch.randn(2, channels, 6, 6)


def why(x: Tensor, block: Any) -> str | None:
    reason = eligibility.why_plain(x, block.parts())
    assert eligibility.serves(x, block.parts()) == (reason is None)
    return reason


def test_a_block_of_exactly_its_modules_is_served() -> None:
    assert why(images(), block()) is None


class Activation(nn.ReLU):
    """A subclass, which may override `forward`, so it must not run fused."""


class Marked(nn.Parameter):
    pass


def change(path: str, module: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    return lambda block: block.set_submodule(path, module())


CHANGES = {
    "another norm": (
        change("bn1", lambda: nn.SyncBatchNorm(8)),
        "contains SyncBatchNorm where BatchNorm2d or FrozenBatchNorm2d is expected",
    ),
    "another convolution": (change("conv2", nn.Identity), "contains Identity where Conv2d is expected"),
    "a subclass": (change("relu", Activation), "contains Activation where ReLU is expected"),
    "reflected padding": (
        change("conv2", lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False, padding_mode="reflect")),
        "padding=(1, 1), padding_mode='reflect'",
    ),
    "padding in words": (change("conv2", lambda: nn.Conv2d(8, 8, 3, padding="same", bias=False)), "padding='same'"),
    "a bias": (change("conv1", lambda: nn.Conv2d(6, 8, 3, 2, 1)), "has a bias before the BatchNorm"),
    "two strides": (change("conv1", lambda: nn.Conv2d(6, 8, 3, (1, 2), 1, bias=False)), "has stride (1, 2)"),
    "two dilations": (
        change("conv2", lambda: nn.Conv2d(8, 8, 3, 1, 1, (1, 2), bias=False)),
        "has dilation (1, 2)",
    ),
    "another shortcut": (change("downsample", nn.Identity), "its shortcut is ['Identity'], not a Conv2d and a Batch"),
    "a projection with a bias": (change("downsample.0", lambda: nn.Conv2d(6, 8, 1, 2)), "has a bias before the Batch"),
    "a forward hook": (lambda block: block.relu.register_forward_hook(lambda *_: None), "a ReLU in it has a hook"),
    "a hook before forward": (
        lambda block: block.conv1.register_forward_pre_hook(lambda *_: None),
        "a Conv2d in it has a hook",
    ),
    "a backward hook": (
        lambda block: block.bn2.register_full_backward_hook(lambda *_: None),
        "a BatchNorm2d in it has a hook",
    ),
    "a hook on the shortcut": (
        lambda block: block.downsample[1].register_forward_hook(lambda *_: None),
        "a BatchNorm2d in it has a hook",
    ),
    "a forward of its own": (lambda block: setattr(block.conv2, "forward", torch.relu), "or a replaced forward"),
    "another parameter": (
        lambda block: setattr(block.bn1, "weight", Marked(torch.ones(8))),
        "a BatchNorm2d in it has a Marked as a parameter",
    ),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_block_of_other_modules_runs_plain(change: Callable[[Any], Any], reason: str) -> None:
    changed = block()
    change(changed)
    assert reason in (why(images(), changed) or "served")


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (images(5), "the input has 5 channels, not 6"),
        (images().double(), "the input is torch.float64, the weights are torch.float32"),
        (images().to("meta"), "the input is on meta, the weights are on cpu"),
        (images()[0], "not a non-empty [N, C, H, W] batch"),
        (images()[:0], "not a non-empty [N, C, H, W] batch"),
        (images().as_subclass(Marked), "the input is a Marked, not a plain tensor"),
        (fx.Proxy(fx.Node(fx.Graph(), "x", "placeholder", "x", (), {})), "the net is being traced"),
    ],
    ids=["channels", "dtype", "device", "one image", "no image", "a subclass", "traced"],
)
def test_an_input_that_the_weights_do_not_fit_runs_plain(x: Any, reason: str) -> None:
    assert reason in (why(x, block()) or "served")


def test_a_parameter_is_a_plain_tensor() -> None:
    assert why(nn.Parameter(images()), block()) is None


def test_input_and_weights_are_compared_in_autocasts_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert why(images().half(), block()) is None
        assert "torch.float64" in (why(images().double(), block()) or "served")


def test_transformed_calls_run_plain() -> None:
    served, x = block(), images()
    reasons = []

    def ask(x: Tensor) -> Tensor:
        reasons.append(why(x, served))
        return x.sum()

    torch.func.grad(ask)(x)
    with forward_ad.dual_level():
        ask(x)
    with nn_module.register_module_forward_hook(lambda *_: None):
        ask(x)
    torch.jit.trace(ask, x, check_trace=False)
    assert reasons == [
        "a torch.func transform is active",
        "forward-mode differentiation is active",
        "a global module hook is registered",
        "the net is being traced",
    ]


def test_calls_without_kernels_run_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_unfused", lambda dtype, device: f"none for {dtype} on {device}")
    assert why(images(), block()) == "none for torch.float32 on cpu"


def test_a_stem_requires_a_max_pool_and_idle_optional_layers() -> None:
    conv, norm, relu, pool = nn.Conv2d(6, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    assert eligibility.why_plain(images(), Parts([(conv, norm)], [relu], pool=pool)) is None
    assert eligibility.why_plain(images(), Parts([(conv, norm)], [relu], idle=[None, nn.Identity()])) is None
    for parts, named in (
        (Parts([(conv, norm)], [relu], pool=nn.AvgPool2d(3)), "AvgPool2d where MaxPool2d"),
        (Parts([(conv, norm)], [relu], idle=[nn.Dropout()]), "Dropout where Identity"),
    ):
        assert named in (eligibility.why_plain(images(), parts) or "served")


def test_nothing_is_served_while_dynamo_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not eligibility.serves(images(), block().parts())
    assert not eligibility.serves_pad_end(images(), nn.ReLU(), PadShortcut(2, 8))
    assert not eligibility.runs_stages()


@pytest.fixture
def fused_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that fusion across blocks is in force, which needs kernels or `recompute`."""
    monkeypatch.setattr(dispatch, "wants_reference", lambda: False)
    monkeypatch.setattr(dispatch, "fuses_blocks", lambda: True)


def stages() -> list[list[Any]]:
    return [[block(), resnet.BasicBlock(8, 8)], [resnet.BasicBlock(8, 8)], [resnet.BasicBlock(8, 8)]]


def test_stages_are_served_up_to_the_first_unserved_block(fused_stages: None) -> None:
    assert eligibility.serves_stages(images(), stages()) == 3

    class Other(resnet.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked, compiled, wider = (resnet.BasicBlock(8, 8) for _ in range(3))
    hooked.register_forward_hook(lambda *_: None)
    compiled.compile(backend="eager")
    wider.conv1 = nn.Conv2d(9, 8, 3, padding=1, bias=False)
    for other in (Other(8, 8), hooked, compiled, wider, copy.deepcopy(block()).double(), nn.Identity()):
        for stage in range(3):
            found = stages()
            found[stage].append(other)
            assert eligibility.serves_stages(images(), found) == stage, type(other)
    assert eligibility.serves_stages(images(), [*stages(), []]) == 3
    assert eligibility.serves_stages(images(), [[], *stages()]) == 0


def test_no_stage_is_served_without_a_backward(fused_stages: None) -> None:
    frozen = stages()
    for stage in frozen:
        for each in stage:
            each.requires_grad_(False)
    assert eligibility.serves_stages(images(), frozen) == 0
    assert eligibility.serves_stages(images().requires_grad_(), frozen) == 3
    with torch.no_grad():
        assert eligibility.serves_stages(images(), stages()) == 0
        assert not eligibility.runs_stages()


def test_no_stage_is_served_if_the_call_is_not(fused_stages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert eligibility.serves_stages(images()[:0], stages()) == 0
    assert eligibility.serves_stages(images(5), stages()) == 0
    x, served = images(), stages()
    with TorchDispatchMode():
        assert eligibility.serves_stages(x, served) == 0, "a dispatch mode sees operators"
    monkeypatch.setattr(dispatch, "why_unfused", lambda *_: "none")
    assert eligibility.serves_stages(images(), stages()) == 0


def test_no_stage_is_served_by_the_reference() -> None:
    assert not eligibility.runs_stages()
    with dispatch.fusions(recompute=True):
        assert eligibility.runs_stages()
        assert eligibility.serves_stages(images(), stages()) == 0


def test_option_a_ends_in_one_pass_if_its_modules_are_bare() -> None:
    relu, shortcut = nn.ReLU(), PadShortcut(2, 8)
    assert eligibility.serves_pad_end(images(), relu, shortcut)
    assert not eligibility.serves_pad_end(images(), Activation(), shortcut)
    assert not eligibility.serves_pad_end(images(), relu, nn.Identity())
    assert not eligibility.serves_pad_end(images()[0], relu, shortcut)
    relu.register_forward_hook(lambda *_: None)
    assert not eligibility.serves_pad_end(images(), relu, shortcut)


def test_an_average_pool_is_a_mean_if_it_is_global_and_bare() -> None:
    x = images().contiguous(memory_format=torch.channels_last)
    for size, serves in ((1, True), ((1, 1), True), (2, False), ((1, None), False)):
        assert eligibility.serves_global_pool(x, nn.AdaptiveAvgPool2d(size)) == serves
    assert not eligibility.serves_global_pool(images(), nn.AdaptiveAvgPool2d(1)), "another layout"
    assert not eligibility.serves_global_pool(x, nn.AdaptiveMaxPool2d(1))
    hooked = nn.AdaptiveAvgPool2d(1)
    hooked.register_forward_pre_hook(lambda *_: None)
    assert not eligibility.serves_global_pool(x, hooked)
    with nn_module.register_module_forward_hook(lambda *_: None):
        assert not eligibility.serves_global_pool(x, nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize(
    ("pool", "sizes"),
    [
        (nn.MaxPool2d(3, 2, 1), (3, 2, 1)),
        (nn.MaxPool2d(2), (2, 2, 0)),
        (nn.MaxPool2d((3, 3), 2, 1), None),
        (nn.MaxPool2d(3, 2, 1, dilation=2), None),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), None),
        (nn.MaxPool2d(3, 2, 1, return_indices=True), None),
        (nn.MaxPool2d(99, 2, 1), None),
        (nn.AvgPool2d(3, 2, 1), None),
        (None, None),
    ],
    ids=str,
)
def test_a_max_pool_has_sizes_if_a_kernel_serves_it(pool: nn.Module | None, sizes: tuple[int, ...] | None) -> None:
    assert eligibility.pool_sizes(pool) == sizes


def test_a_compiled_module_is_not_bare() -> None:
    module = nn.ReLU()
    assert eligibility.is_bare(module)
    module.compile(backend="eager")
    assert not eligibility.has_hooks(module)
    assert not eligibility.is_bare(module)
