"""Weight gradients on a second stream: no data races between the streams, no early reuse of memory, and bit-identical
results.

Most tests simulate streams without a GPU. A launch runs immediately, but counts as ordered before the launches of the
other stream only after that stream has waited for it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.models import families
from fastres.ops import conv_bn, dispatch, side_stream
from fastres.ops.block import residual_block, stages
from fastres.ops.library_engine import Library
from fastres.ops.side_stream import SideStream


class Stream:
    """A simulated CUDA stream.

    known: for each stream, how many of its launches are ordered before the next launch on this stream.
    """

    device = torch.device("cuda:0")

    def __init__(self, *_: Any) -> None:
        self.known: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: Stream) -> None:
        for stream, count in other.known.items():
            self.known[stream] = max(self.known.get(stream, 0), count)

    def after(self, launch: tuple[Stream, int]) -> bool:
        """Return whether the next launch on this stream is ordered after `launch`, a (stream, count) pair."""
        stream, count = launch
        return self.known.get(stream, 0) >= count


@dataclass
class Memory:
    """The accesses to one storage.

    owner: the stream whose later launches may reuse the memory once it is freed. written: the last launch that wrote
    it. read: the launches that read it. recorded: the streams of its `record_stream` calls.
    """

    owner: Stream
    written: tuple[Stream, int]
    read: list[tuple[Stream, int]] = field(default_factory=list)
    recorded: set[Stream] = field(default_factory=set)


class Races(TorchDispatchMode):
    """Tracks the stream of every launch and the memory that it accesses; `found` lists the races."""

    def __init__(self, main: Stream) -> None:
        super().__init__()
        self.main = self.current = main
        self.memory: dict[StorageWeakRef, Memory] = {}
        self.found: list[str] = []
        self.launches: list[Stream] = []

    def of(self, tensor: Tensor, owner: Stream) -> Memory:
        return self.memory.setdefault(StorageWeakRef(tensor.untyped_storage()), Memory(owner, (self.main, 0)))

    def free(self) -> None:
        """Drop storages that have been freed, and report those that another stream may still access."""
        for at in [at for at in self.memory if at.expired()]:
            memory = self.memory.pop(at)
            for stream, count in (memory.written, *memory.read):
                if not (memory.owner.after((stream, count)) or stream in memory.recorded):
                    self.found.append("memory is free before its last use")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.free()
        given = list(zip(function._schema.arguments, args, strict=False))
        result = function(*args, **(kwargs or {}))
        stream = self.current
        stream.known[stream] += 1
        self.launches.append(stream)
        now = (stream, stream.known[stream])
        for argument, value in given:
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor):
                    self.touch(self.of(tensor, self.main), now, argument.is_write, function)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and StorageWeakRef(tensor.untyped_storage()) not in self.memory:
                self.of(tensor, stream).written = now
        return result

    def touch(self, memory: Memory, now: tuple[Stream, int], writes: bool, function: Any) -> None:
        stream = now[0]
        if not stream.after(memory.written):
            self.found.append(f"{function} before its operand is written")
        if writes:
            if not all(map(stream.after, memory.read)):
                self.found.append(f"{function} overwrites what is still read")
            memory.written = now
        else:
            memory.read.append(now)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Races:
    races = Races(Stream())

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, races.current = races.current, stream
        try:
            yield
        finally:
            races.current = before

    def wait_stream(stream: Stream, other: Stream) -> None:
        races.free()
        wait(stream, other)

    wait = Stream.wait_stream
    monkeypatch.setattr(Stream, "wait_stream", wait_stream)
    monkeypatch.setattr(SideStream, "serves", lambda device: True)
    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: races.of(t, stream).recorded.add(stream))
    for name, value in {"current_stream": lambda device: races.current, "stream": on, "Stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(side_stream, "_second", second_of := {races.main: Stream()}.__getitem__)
    races.second = second_of(races.main)
    conv_bn.conv_bn.cache_clear()
    return races


def unit(c: int, k: int, r: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, r, padding=r // 2, bias=False), nn.BatchNorm2d(k))


class Net(nn.Module):
    """A block with a projection and one without, run as one stage or as two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([unit(4, 4, 1), unit(4, 4, 3), unit(4, 8, 1)])
        self.second = nn.ModuleList([unit(8, 4, 1), unit(4, 4, 3), unit(4, 8, 1)])
        self.shortcut = unit(4, 8, 1)

    def forward(self, x: Tensor, together: bool) -> Tensor:
        first, second = ([tuple(layer) for layer in layers] for layers in (self.first, self.second))
        if together:
            return stages(x, [[(first, self.shortcut), (second, None)]])
        return residual_block(residual_block(x, first, self.shortcut), second, None)


def backward(net: nn.Module, together: bool, within: Any = contextlib.nullcontext, **switches: bool) -> list[Tensor]:
    """Return the gradients of x and of the parameters."""
    x = torch.linspace(-1, 1, 2 * 4 * 6 * 5, dtype=torch.double).reshape(2, 4, 6, 5).requires_grad_()
    with dispatch.fusions(**switches):
        y = net(x, together)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    with within():
        y.backward(dy)
    return [x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("keep_activation", [False, True])
@pytest.mark.parametrize("together", [False, True], ids=["blocks", "stage"])
def test_streams_wait_for_each_other(together: bool, keep_activation: bool, races: Races) -> None:
    net = Net().double()
    want = backward(copy.deepcopy(net), together)
    assert not races.launches
    got = backward(net, together, lambda: races, overlap=True, keep_activation=keep_activation)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert races.launches.count(races.second) >= 7, "one weight gradient for each convolution"
    assert races.launches.count(races.main) > 7
    done = (races.second, races.second.known[races.second])
    assert races.main.after(done), "a gradient is returned before it is computed"
    assert len([m for m in races.memory.values() if m.recorded == {races.main}]) >= 7
    net.zero_grad(set_to_none=True)
    got.clear()
    races.free()
    assert not races.found


def test_a_failing_backward_also_waits_for_the_second_stream(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    net, wgrad, calls = Net().double(), Library.wgrad, []

    def failing(self: Library, *operands: Any) -> Tensor:
        calls.append(races.current)
        found = wgrad(self, *operands)
        if len(calls) == 2:
            raise MemoryError
        return found

    monkeypatch.setattr(Library, "wgrad", failing)
    conv_bn.conv_bn.cache_clear()
    with pytest.raises(MemoryError):
        backward(net, True, lambda: races, overlap=True)
    assert calls == [races.second] * 2
    assert races.current is races.main
    assert races.main.after((races.second, races.second.known[races.second]))
    races.free()
    assert not races.found


def test_one_call_at_a_time(races: Races) -> None:
    """The arguments of a call are kept alive until the next call or `join`, and no longer."""
    calls, kept = SideStream(torch.device("cuda")), []
    for _ in range(3):
        x = torch.ones(4)
        kept.append(StorageWeakRef(x.untyped_storage()))
        calls(torch.neg, x)
        del x
        assert [at.expired() for at in kept] == [True] * (len(kept) - 1) + [False]
    calls.join()
    assert kept[-1].expired()


def test_without_a_gpu_there_is_no_second_stream() -> None:
    net = Net().double()
    want = backward(copy.deepcopy(net), True)
    got = backward(net, True, overlap=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_second_stream_differs_from_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds even if PyTorch's pool returns the current stream; repeated calls return the same second stream."""
    main = Stream()
    side_stream._second.cache_clear()
    pool = iter([main, Stream(), Stream()])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(pool))
    second = side_stream._second(main)
    assert second is not main
    assert side_stream._second(main) is second
    side_stream._second.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", ["auto", "triton", "cudnn"])
def test_no_bit_changes_on_a_gpu(backend: str, graphed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 overlapping steps, between which memory is freed and reused, equal a step without overlap."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net = families.named("resnet50").cuda().to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 96, 96, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.arange(16, device="cuda")

    def step(x: Tensor) -> tuple[Tensor, ...]:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(net(x), labels)
        loss.backward()
        return tuple(p.grad for p in net.parameters())

    def run(overlap: bool) -> Iterator[tuple[Tensor, ...]]:
        with fastres.backend(backend), dispatch.fusions(overlap=overlap):
            call: Callable[..., tuple[Tensor, ...]] = step
            if graphed:
                call = fastres.graphed(step, net)
            for _ in range(20 if overlap else 4):  # `graphed` captures in the third call
                yield call(x)

    *_, found = run(False)
    want = [grad.clone() for grad in found]
    for found in run(True):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
