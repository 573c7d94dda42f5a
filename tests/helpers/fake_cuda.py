"""Simulates CUDA streams and graphs without a GPU: a capture records the operators and their tensors, a replay repeats
them.

As on a GPU, a capture does not change any existing tensor, and the tensors that it allocates are uninitialised (here
NaN, if their dtype has it). Python numbers that the captured code computes are constants of the graph. Reading the
value of a tensor in Python during a capture is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastres import cuda_graph


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """A substitute for torch.cuda.CUDAGraph that records operators on CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.own: dict[int, Tensor] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors(args, kwargs):
            storage = tensor.untyped_storage()
            if address(tensor) not in self.own.keys() | self.before.keys():
                self.before[address(tensor)] = storage, storage.clone()
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.calls.append((func, args, kwargs or {}, tensors(result)))
            for tensor in tensors(result):
                if address(tensor) not in self.before:
                    self.own.setdefault(address(tensor), tensor)
        return result

    @torch.no_grad()
    def end(self) -> None:
        for storage, saved in self.before.values():
            storage.copy_(saved)
        for tensor in self.own.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the recorded calls include autocast's casts
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            for again, recorded in zip(tensors(func(*args, **kwargs)), results, strict=True):
                if address(again) != address(recorded):
                    recorded.copy_(again)


class FakeCuda:
    """Replaces functions and classes of torch.cuda for tensors on the CPU.

    modes: the `capture_error_mode` of every capture so far.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = self
        self.modes: list[str] = []
        self.capturing = False
        for name, value in {
            "is_current_stream_capturing": lambda: self.capturing,
            "current_stream": lambda device=None: self.stream,
            "synchronize": lambda device=None: None,
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda device=None: FakeCuda.__new__(FakeCuda),
            "Event": lambda: SimpleNamespace(record=lambda stream: None),
            "stream": self.on,
            "graph": self.capture,
            "graph_pool_handle": object,
            "CUDAGraph": Tape,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda_graph, "_can_record", lambda device: True)

    def wait_stream(self, other: Any) -> None:
        assert other is not self

    def wait_event(self, event: Any) -> None:
        pass

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capture(self, graph: Tape, pool: Any, stream: Any, capture_error_mode: str = "global") -> Iterator[None]:
        """Capture into `graph`. If the capture fails, its stream stays current, as in torch."""
        self.modes.append(capture_error_mode)
        before, self.stream, self.capturing = self.stream, stream, True
        try:
            with graph:
                yield
        finally:
            self.capturing = False
            graph.end()
        self.stream = before
