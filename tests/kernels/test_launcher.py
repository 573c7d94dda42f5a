"""Test the cache of launches: a repeated call does the same as a call that runs the launcher in full."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import stub_cuda
import torch
import triton
from torch import Tensor

from fastres.kernels import __path__ as kernels
from fastres.kernels import batch_norm, fprop, launcher, stem
from fastres.kernels.batch_norm import Pool
from fastres.kernels.chain import bottleneck_chain
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.fprop import Join, RunningNorm, conv_fprop
from fastres.kernels.max_pool import max_pool
from fastres.kernels.pad_shortcut import pad_shortcut_backward
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import conv_stem, conv_stem_wgrad, pack_images
from fastres.kernels.tiles import Tile
from fastres.kernels.wgrad import conv_wgrad

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


class Operands:
    """A source of random tensors: a call returns a new one of the shape and dtype.

    `vectors` returns fp32 vectors that are views of one tensor, like the vectors of a BatchNorm.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, draw: Any = torch.randn) -> Tensor:
        return draw(shape, generator=self.generator).to(DEVICE, dtype or self.dtype)

    def vectors(self, count: int, length: int) -> tuple[Tensor, ...]:
        return self(count, length, dtype=torch.float32).unbind()


PERSISTENT = Tile(64, 32, 64, 4, 3, (1, 1, 32), persistent=1)
STEM = ConvProblem(2, 10, 12, 3, 16, 7, 7, 2, 3)
CALLS: dict[str, Callable[[Operands], Any]] = {
    "fprop 1x1": lambda o: conv_fprop(
        o(2, 8, 8, 32),
        o(64, 1, 1, 32),
        ConvProblem.of((2, 8, 8, 32), (64, 1, 1, 32)),
        prologue=o.vectors(2, 32),
        statistics=True,
    ),
    "fprop 3x3": lambda o: conv_fprop(
        o(2, 8, 8, 32),
        o(16, 3, 3, 32),
        ConvProblem.of((2, 8, 8, 32), (16, 3, 3, 32), pad=1, stride=2),
        residual=o(2, 4, 4, 16),
    ),
    "fprop, grouped": lambda o: conv_fprop(
        o(2, 5, 7, 6), o(8, 3, 3, 3), ConvProblem.of((2, 5, 7, 6), (8, 3, 3, 3), groups=2, pad=1), out=o(2, 5, 7, 8)
    ),
    "fprop, live norm": lambda o: conv_fprop(
        o(2, 8, 8, 32),
        o(16, 1, 1, 32),
        ConvProblem.of((2, 8, 8, 32), (16, 1, 1, 32)),
        norm=RunningNorm(o(16), o(16, draw=torch.rand), None, o(16), 1e-5),
        relu=True,
    ),
    "fprop, split": lambda o: conv_fprop(
        o(2, 8, 8, 32),
        o(16, 3, 3, 32),
        ConvProblem.of((2, 8, 8, 32), (16, 3, 3, 32), pad=1),
        scale=o.vectors(1, 16)[0],
        residual=o(2, 8, 8, 16),
        tile=Tile(16, 32, 32, 4, 2, (1, 4, 8), splits=4),
    ),
    "fprop, split, by pointers": lambda o: conv_fprop(
        o(2, 5, 7, 6),
        o(8, 3, 3, 3),
        ConvProblem.of((2, 5, 7, 6), (8, 3, 3, 3), groups=2, pad=1),
        relu=True,
        tile=Tile(16, 32, 16, 4, 2, splits=2),
    ),
    "fprop, joined": lambda o: conv_fprop(
        o(2, 8, 8, 32),
        o(16, 1, 1, 32),
        ConvProblem.of((2, 8, 8, 32), (16, 1, 1, 32)),
        prologue=o.vectors(2, 32),
        join=Join(o(2, 8, 8, 32), None, None, o(2, 8, 8, 32)),
    ),
    "fprop, persistent": lambda o: conv_fprop(
        o(2, 8, 8, 32),
        o(64, 1, 1, 32),
        ConvProblem.of((2, 8, 8, 32), (64, 1, 1, 32)),
        prologue=o.vectors(2, 32),
        statistics=True,
        tile=PERSISTENT,
    ),
    "dgrad": lambda o: conv_dgrad(
        o(2, 4, 4, 64), o(64, 3, 3, 32), ConvProblem.of((2, 8, 8, 32), (64, 3, 3, 32), stride=2, pad=1)
    ),
    "dgrad, sums": lambda o: conv_dgrad(
        o(2, 8, 8, 64),
        o(64, 1, 1, 32),
        ConvProblem.of((2, 8, 8, 32), (64, 1, 1, 32)),
        bn_backward=(o(2, 8, 8, 64), *o.vectors(3, 64)),
        relu_mask=o(2, 8, 8, 32),
        below=(o(2, 8, 8, 32), *o.vectors(1, 32)),
        projection=(o(2, 8, 8, 32), *o.vectors(1, 32)),
    ),
    "dgrad, persistent": lambda o: conv_dgrad(
        o(2, 8, 8, 64),
        o(64, 1, 1, 32),
        ConvProblem.of((2, 8, 8, 32), (64, 1, 1, 32)),
        below=(o(2, 8, 8, 32), *o.vectors(1, 32)),
        tile=PERSISTENT,
    ),
    "wgrad": lambda o: conv_wgrad(
        o(2, 8, 8, 32), o(2, 8, 8, 16), ConvProblem.of((2, 8, 8, 16), (32, 3, 3, 16), pad=1), prologue=o.vectors(2, 16)
    ),
    "wgrad, strided": lambda o: conv_wgrad(
        o(2, 4, 4, 32), o(2, 8, 8, 16), ConvProblem.of((2, 8, 8, 16), (32, 1, 1, 16), stride=2)
    ),
    "wgrad, split": lambda o: conv_wgrad(
        o(2, 8, 8, 32),
        o(2, 8, 8, 16),
        ConvProblem.of((2, 8, 8, 16), (32, 1, 1, 16)),
        tile=Tile(16, 16, 32, 4, 2, splits=2),
    ),
    "statistics": lambda o: batch_norm.statistics(o(2, 9, 8, 5)),
    "finish_statistics": lambda o: batch_norm.finish_statistics(
        o(300, 3, 8, dtype=torch.float32, draw=torch.rand),
        *o.vectors(2, 8),
        1e-5,
        running_mean=o(8),
        running_var=o(8, draw=torch.rand),
        momentum=0.1,
        counter=o(dtype=torch.int64),
    ),
    "finish_statistics, merged": lambda o: batch_norm.finish_statistics(
        o(600, 3, 8, dtype=torch.float32, draw=torch.rand), *o.vectors(2, 8), 1e-5
    ),
    "running_statistics": lambda o: batch_norm.running_statistics(o(8), o(8, draw=torch.rand), None, None, 1e-5),
    "normalize": lambda o: batch_norm.normalize(o(2, 8, 8, 16), *o.vectors(2, 16), relu=True, residual=o(2, 8, 8, 16)),
    "pool": lambda o: batch_norm.normalize_max_pool(o(2, 8, 8, 16), *o.vectors(2, 16)),
    "pool, bare": lambda o: max_pool(o(2, 8, 8, 16)),
    "backward_reduce": lambda o: batch_norm.backward_reduce(
        o(2, 8, 8, 16), o(2, 8, 8, 16), *o.vectors(1, 16), projection=(o(2, 8, 8, 16), *o.vectors(1, 16))
    ),
    "backward_reduce, pool": lambda o: batch_norm.backward_reduce(
        o(2, 4, 4, 16),
        o(2, 8, 8, 16),
        *o.vectors(1, 16),
        mask=o.vectors(2, 16),
        pool=Pool(o(2, 4, 4, 16, dtype=torch.uint8, draw=torch.rand), 3, 2, 1),
    ),
    "finish_backward": lambda o: batch_norm.finish_backward(
        o(300, 2, 8, dtype=torch.float32), o(8), *o.vectors(2, 8), 100, batch_statistics=True
    ),
    "backward_apply": lambda o: batch_norm.backward_apply(
        o(2, 8, 8, 16), o(2, 8, 8, 16), *o.vectors(3, 16), mask=o.vectors(2, 16)
    ),
    "pad_shortcut_backward": lambda o: pad_shortcut_backward(o(2, 8, 8, 16), o(2, 4, 4, 32), stride=2),
    "pack_images": lambda o: pack_images(o(2, 3, 10, 12), STEM, o.dtype),
    "stem": lambda o: conv_stem(o(2, 10, 18, 4), o(16, 7, 8, 4), STEM, statistics=True),
    "stem, by pointers": lambda o: conv_stem(
        o(2, 10, 18, 4), o(16, 7, 8, 4), STEM, statistics=True, tile=Tile(16, 32, 32, 4, 2)
    ),
    "stem's wgrad": lambda o: conv_stem_wgrad(o(2, 5, 6, 16), o(2, 10, 18, 4), STEM),
    "stem's wgrad, split": lambda o: conv_stem_wgrad(
        o(2, 5, 6, 16), o(2, 10, 18, 4), STEM, tile=Tile(16, 32, 16, 4, 2, splits=3)
    ),
    "chain": lambda o: bottleneck_chain(
        o(1, 4, 8, 64),
        o(64, 3, 3, 64),
        *o.vectors(1, 64),
        o(256, 1, 1, 64),
        *o.vectors(1, 256),
        o(1, 4, 8, 256),
        o(64, 1, 1, 256),
        *o.vectors(1, 64),
    ),
}


def leaves(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for each in result:
            yield from leaves(each)


def decided() -> Any:
    """Return a patch for a `with` block; its mock is called whenever a launcher runs in full, not from the cache."""
    return patch.object(launcher, "_record", wraps=launcher._record)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_gives_the_same_as_a_full_call(name: str) -> None:
    call, dtype = CALLS[name], torch.float16
    first = call(Operands(0, dtype))
    with decided() as deciding:
        second = call(Operands(1, dtype))
    assert not deciding.called
    with launcher.forgetful():
        full = call(Operands(1, dtype))
    assert type(second) is type(full)
    tensors = [list(leaves(result)) for result in (first, second, full)]
    assert len(tensors[0]) == len(tensors[1]) == len(tensors[2]) > 0
    for old, new, wanted in zip(*tensors, strict=True):
        assert new.data_ptr() != old.data_ptr()
        assert (new.dtype, new.stride()) == (wanted.dtype, wanted.stride())
        written = ~wanted.isnan()  # the stem doesn't write its padding
        assert torch.equal(new[written], wanted[written])


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="which of two kernels runs depends on the GPU")
def test_the_calls_launch_every_kernel() -> None:
    """`CALLS` launch every kernel, so `make test` runs each of them, although it skips cases of other tests."""
    launched = set()

    def note(recording: Any, *_: Any) -> None:
        launched.update(kernel.__name__ for kernel, *_ in recording.launches)

    with patch.object(launcher, "_Call", side_effect=note):
        for call in CALLS.values():
            call(Operands(0, torch.float16))
    modules = [importlib.import_module(f"fastres.kernels.{found.name}") for found in pkgutil.iter_modules(kernels)]
    assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the interpreter's tests instead")
@pytest.mark.skipif(stub_cuda.unbuildable() is not None, reason=str(stub_cuda.unbuildable()))
@pytest.mark.parametrize("name", CALLS)
def test_the_driver_gets_the_same_bytes_as_from_a_full_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call passes the same bytes to the driver as a full call with the same tensors and allocations.

    The driver is a stub that records launches and runs nothing.
    """
    taken: list[Tensor] = []
    drawn: list[Tensor] = []
    empty = torch.empty

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        taken.append(empty(*args, **kwargs))
        return taken[-1]

    for module in (fprop, stem):
        monkeypatch.setattr(module, "check_device", lambda *_: None)
    monkeypatch.setattr(Operands, "__call__", _kept(Operands.__call__, drawn))
    monkeypatch.setattr(torch, "empty", allocate)
    with stub_cuda.driver() as launched:
        CALLS[name](Operands(0, torch.bfloat16))
        # `drawn` and `taken` keep the tensors alive, so that the next call's have other addresses.
        once, first_drawn, first_taken = len(launched), len(drawn), len(taken)
        with decided() as deciding:
            CALLS[name](Operands(1, torch.bfloat16))
        assert not deciding.called
        given, memory = iter(drawn[first_drawn:]), iter(taken[first_taken:])
        monkeypatch.setattr(Operands, "__call__", lambda *_, **__: next(given))
        monkeypatch.setattr(torch, "empty", lambda *_, **__: next(memory))
        with launcher.forgetful():
            CALLS[name](Operands(1, torch.bfloat16))
    first, second, full = launched[:once], launched[once : 2 * once], launched[2 * once :]
    assert once > 0
    assert second == full
    assert all(a.arguments != b.arguments for a, b in zip(first, second, strict=True))


def _kept(draw: Callable[..., Tensor], drawn: list[Tensor]) -> Callable[..., Tensor]:
    def call(self: Operands, *shape: int, **kwargs: Any) -> Tensor:
        drawn.append(draw(self, *shape, **kwargs))
        return drawn[-1]

    return call


@pytest.fixture
def add() -> Callable[..., Tensor]:
    """Return a launcher whose "kernel" is a Python function that adds two tensors."""

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda a, b, out: out.copy_(a + b)

    @launcher.remembered
    def add(a: Tensor, b: Tensor, sizes: Any = None, *, within: tuple[Tensor, ...] = ()) -> Tensor:
        if a.shape != b.shape:
            raise ValueError("shapes differ")
        out = launcher.empty(a.shape, a.dtype, a.device)
        launcher.launch(Kernel(), (1,), a=a, b=within[0] if within else b, out=out)
        return out

    return add


def test_what_makes_a_launcher_run_in_full(add: Callable[..., Tensor]) -> None:
    """A launcher runs in full if shapes, dtypes, strides or alignments are new.

    It also does if an argument is passed that was left out before, or if two arguments that were different tensors are
    now the same one.
    """
    a, b = torch.arange(16.0), torch.ones(16)

    def decides(*args: Any, **kwargs: Any) -> bool:
        with decided() as deciding:
            out = add(*args, **kwargs)
        assert torch.equal(out, args[0] + (kwargs.get("within") or args[1:])[0])
        return deciding.called

    assert decides(a, b)
    assert not decides(b, a + 1)
    assert decides(a, a), "one tensor twice"
    assert not decides(b, b)
    assert decides(a, b, None), "an argument that was left out"
    assert decides(a[:8], b[:8])
    assert decides(a[::2], b[::2])
    assert decides(a[1:9], b[1:9]), "4 bytes past a multiple of 16"
    assert not decides(b[1:9], a[1:9])
    assert decides(a.double(), b.double())
    assert decides(a, b, within=(a + 1,))
    assert not decides(b, a, within=(b + 1,))
    launcher.forget()
    assert decides(a, b)
    with launcher.forgetful():
        assert decides(a, b)
    assert not decides(a, b)


def test_what_is_not_remembered(add: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.arange(32.0)
    a, b = memory[:16], memory[4:20]
    assert torch.equal(add(a, b), a + b)
    with pytest.raises(ValueError, match="shapes differ"):
        add(a, b[:4])
    assert torch.equal(add(a, b, [16]), a + b), "a list is not hashable"
    assert torch.equal(add(a, b), a + b), "an error leaves nothing in the cache"
    launcher.forget()
    meta = torch.empty(16, device="meta")
    monkeypatch.setattr(launcher, "_Call", None)  # recording a call would fail
    add(meta, meta)


def test_memory_is_bounded(add: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LIMIT", 3)
    for n in range(1, 9):
        add(torch.ones(n), torch.zeros(n))
        assert len(launcher._calls) <= 3


def test_ambiguous_views_are_not_remembered() -> None:
    """A call isn't remembered if a result may be a view of either of two overlapping arguments."""

    @launcher.remembered
    def first_half(whole: Tensor, part: Tensor) -> Tensor:
        return part[:2] if whole.shape[0] > 4 else whole[:2]

    memory = torch.arange(8.0)
    for shift in (2, 4):
        assert torch.equal(first_half(memory, memory[shift:]), memory[shift : shift + 2])
    assert not launcher._calls
