"""Training and inference steps of whole nets without a GPU, to check every kernel launch.

Most tests run on meta tensors and check that each launch respects the hardware limits, which neither the interpreter
nor the compiler checks. One compiles the kernels and launches them against a stub driver that runs nothing, so that
the tensors' memory is never accessed.

Sources of the limits: for the tensor memory accelerator (TMA), `cuTensorMapEncodeTiled` in the CUDA driver API; for
launch grids, the table of compute capabilities in the CUDA programming guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import stub_cuda
import torch
from binary import Launch, record
from triton.tools.tensor_descriptor import TensorDescriptor

import fastres
from fastres.kernels import checks, fprop, stem, tables
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import H200
from fastres.ops import conv_bn, dispatch


@pytest.fixture(autouse=True)
def _kernels_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make meta tensors run on the kernels, as tensors on a GPU do."""
    conv_bn.conv_bn.cache_clear()
    monkeypatch.setattr(dispatch, "_kernel_less", lambda device: None)
    monkeypatch.setattr(dispatch, "passes_engine", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "compute_dtype", lambda x: x.dtype)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # autocast doesn't support meta
    yield
    conv_bn.conv_bn.cache_clear()


def broken(launched: Launch) -> Iterator[str]:
    """Yield a description of each hardware limit that a launch exceeds."""
    x, y, z = (*launched.grid, 1, 1)[:3]
    if not (0 < x * y * z < 2**31 and y < 2**16 and z < 2**16):
        yield f"grid {launched.grid}"
    for name, value in launched.kwargs.items():
        if isinstance(value, TensorDescriptor):
            for text in broken_descriptor(value):
                yield f"{name}: {text}"


def broken_descriptor(d: TensorDescriptor) -> Iterator[str]:
    """Yield a description of each TMA limit that a descriptor exceeds."""
    size = d.base.dtype.itemsize
    if d.base.storage_offset() * size % 16:
        yield f"starts {d.base.storage_offset() * size} bytes into its memory, which is not a multiple of 16"
    if not 1 <= len(d.shape) <= 5:
        yield f"{len(d.shape)} dimensions"
    if any(not 1 <= length <= 2**32 for length in d.shape):
        yield f"shape {list(d.shape)}"
    if any(stride * size % 16 or not 0 < stride * size < 2**40 for stride in d.strides[:-1]):
        yield f"strides {list(d.strides)} of {size} bytes"
    if d.strides[-1] != 1 or d.block_shape[-1] * size < 16:
        yield f"boxes {d.block_shape} of {size} bytes, innermost stride {d.strides[-1]}"
    reach = sum((length - 1) * stride for length, stride in zip(d.shape, d.strides, strict=True))
    if d.base.storage_offset() + reach >= d.base.untyped_storage().nbytes() // size:
        yield f"shape {list(d.shape)} by strides {list(d.strides)} leaves the tensor"


def net_and_images(models: Any, depth: int, batch: int, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    with torch.device("meta"):
        net = getattr(models, f"resnet{depth}")()
        net.fc = torch.nn.Identity()
        x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return net.to(torch.bfloat16, memory_format=torch.channels_last), x


def launches_of(depth: int, batch: int, size: int, training: bool) -> list[Launch]:
    net, x = net_and_images(fastres, depth, batch, size)
    net.train(training).requires_grad_(training)
    with record() as recorded:
        y = net(x)
        if training:
            y.float().sum().backward()
    return recorded


@pytest.mark.parametrize("first", ["triton", "stem"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize(("depth", "batch", "size"), [(50, 256, 224), (50, 1, 224), (18, 3, 97), (50, 2, 321)])
def test_every_launch_respects_the_hardware_limits(
    depth: int, batch: int, size: int, training: bool, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(pass_: str, problem: ConvProblem, *_: Any) -> str:
        return first if problem.C == 3 and pass_ != "dgrad" else "triton"

    monkeypatch.setattr(dispatch, "conv_engine", engine)
    launches = launches_of(depth, batch, size, training)
    names = [one.fn.__name__ for one in launches]
    convs = {18: 20, 50: 53}[depth]
    assert sum(name.startswith(("conv_fprop", "pointwise_fprop")) for name in names) == convs
    packed = first == "stem"
    assert names.count("wgrad_kernel") == (convs - packed if training else 0)
    assert names.count("stem_wgrad_kernel") == (packed and training)
    assert names.count("pack_images_kernel") == packed * (1 + training)
    own = convs if training else 1  # in eval mode the epilogues apply BN, except in the convolution before the pool
    assert names.count("finish_statistics_kernel") == own
    assert any(isinstance(value, TensorDescriptor) for one in launches for value in one.kwargs.values())
    wrong = [f"{one.fn.__name__}: {text}" for one in launches for text in broken(one)]
    assert not wrong


@pytest.mark.parametrize("training", [True, False], ids=["train", "infer"])
def test_no_kernel_is_compiled_for_a_size_of_images(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a binary knows are filters and its tile, so that ever new sizes of images need ever fewer new binaries.

    Every number in it is that of a filter or a power of two; heights, widths, batches and splits are arguments, which
    Triton must not specialise by divisibility either.
    """
    monkeypatch.setattr(dispatch, "conv_engine", lambda *_: "triton")
    kinds: dict[Any, set[Any]] = {}
    for height, width in ((641, 1201), (800, 1088), (1328, 1328)):
        net, _ = net_and_images(fastres, 50, 1, 32)
        net.train(training).requires_grad_(training)
        x = torch.empty(3, 3, height, width, dtype=torch.bfloat16, device="meta")
        with record() as recorded:
            y = net(x.contiguous(memory_format=torch.channels_last))
            if training:
                y.float().sum().backward()
        for one in recorded:
            _, types, constexprs, attributes, _ = one.specialization()
            for path, value in constexprs.items():
                small = not isinstance(value, int) or value <= 7 or value.bit_count() == 1
                assert small, f"{one.fn.__name__}: {one.fn.arg_names[path[0]]}={value}"
            sizes = {name: types[name] for name in "NHWPQUVM" if name in types}
            kinds.setdefault(one.fn, set()).add(repr(sizes))
            divisible = {one.fn.arg_names[path[0]] for path in attributes}
            assert not divisible & {"N", "H", "W", "P", "Q", "U", "V", "M", "pixels", "steps"}
    assert all(len(each) == 1 for each in kinds.values()), kinds


def test_tensors_that_are_not_computed_on_load_are_stored_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turning computation on load off by measurement or by `fusions` launches the same kernels."""
    monkeypatch.setattr(dispatch, "conv_engine", lambda *_: "triton")

    def names() -> list[str]:
        return [one.fn.__name__ for one in launches_of(50, 2, 64, training=True)]

    fused = names()
    with dispatch.fusions(block_end=False):
        with dispatch.fusions(prologue=False, bn_backward=False):
            wanted = names()
        conv_bn.conv_bn.cache_clear()
        monkeypatch.setattr(dispatch, "on_load", lambda *_: False)
        assert names() == wanted
    conv_bn.conv_bn.cache_clear()
    assert names().count("normalize_kernel") == wanted.count("normalize_kernel") > fused.count("normalize_kernel")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a driver")
@pytest.mark.skipif(stub_cuda.unbuildable() is not None, reason=str(stub_cuda.unbuildable()))
@pytest.mark.parametrize(
    ("name", "batch", "size"), [("resnet50", 256, 224), ("resnet18", 3, 97), ("resnext50_32x4d", 32, 224)]
)
def test_the_driver_accepts_every_launch_of_a_training_step(
    name: str, batch: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton and the stub driver must accept each launch's arguments, the resources of its binary and its tensor maps.

    The second step replays the launches that the first one cached, and must make the same launches.
    """
    monkeypatch.setattr(dispatch, "conv_engine", lambda *_: "triton")
    monkeypatch.setattr(checks, "INTERPRETER", H200)
    for module in (fprop, stem):
        monkeypatch.setattr(module, "check_device", lambda *_: None)
    net = getattr(fastres, name)().to(torch.bfloat16, memory_format=torch.channels_last)
    net.avgpool = net.fc = torch.nn.Identity()  # the layers without kernels would read the memory
    x = torch.empty(batch, size, size, 3, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    with stub_cuda.driver() as launched:
        counts = [0]
        for _ in range(2):
            y = net(x)
            y.backward(torch.empty_like(y))
            counts.append(len(launched))
    steps = [[(one.name, one.grid, one.shared) for one in launched[a:b]] for a, b in itertools.pairwise(counts)]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 100


def test_keeping_activations_takes_bytes_and_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For ResNet-50 at batch 256 with the H200's shipped table, `keep_activation` saves 21 normalize kernels and costs
    655 MB."""
    monkeypatch.setattr(dispatch, "_measured", lambda *call: tables.measured(*call[:3], H200))

    def note(saved: dict[Any, torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage()] = t
        return t

    passes, storages = [], []
    for keep in (False, True):
        net, x = net_and_images(fastres, 50, 256, 224)
        with record() as recorded, dispatch.fusions(keep_activation=keep):
            with torch.autograd.graph.saved_tensors_hooks(partial(note, saved := {}), lambda t: t):
                y = net(x)
            y.float().sum().backward()
        passes.append([one.fn.__name__ for one in recorded].count("normalize_kernel"))
        storages.append(sum(storage.nbytes() for storage in saved))
    assert passes[0] - passes[1] == 21
    assert storages == [8_794_924_160, 8_794_924_160 + 655_097_856]


def test_launches_beyond_the_limits_are_detected() -> None:
    x = torch.empty(4, 8, 24, dtype=torch.bfloat16, device="meta")

    def said(tensor: torch.Tensor, shape: Any = None, strides: Any = None) -> str:
        d = object.__new__(TensorDescriptor)  # skips its constructor, which rejects some of these
        d.base, d.shape, d.strides, d.block_shape = tensor, shape or tensor.shape, strides or tensor.stride(), [1, 1, 8]
        return "; ".join(broken_descriptor(d))

    assert said(x) == ""
    assert "4 bytes into" in said(x[..., 2:])
    assert "strides" in said(x, strides=(192, 20, 1))
    assert "leaves the tensor" in said(x, shape=(4, 9, 24))
    assert "innermost stride 2" in said(x, shape=(4, 8, 12), strides=(192, 24, 2))
    assert list(broken(Launch(None, (2**16, 2**15), (), {})))
    assert list(broken(Launch(None, (1, 2**16), (), {})))
