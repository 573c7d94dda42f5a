"""Launchers that remember their launches.

Sizes, dtypes and switches decide all that a launcher does: checks, tile, allocations, grids, descriptors. A second call
that differs from one before in nothing but addresses therefore repeats that call's launches with the new addresses;
deciding them again would take the host longer than the GPU takes for a small problem.

    @remembered
    def negate(x):
        y = empty(x.shape, x.dtype, x.device)
        launch(negate_kernel, (cdiv(x.numel(), 1024),), x=x, y=y, numel=x.numel(), BLOCK=1024)
        return y

Such a function touches its tensors by `launch` only, and allocates by `empty` only; it returns its arguments, what it
allocated, or views of these. Any other function is simply called every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from threading import local
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

P = ParamSpec("P")
R = TypeVar("R")

LIMIT = 4096  # calls that are remembered; a net has a few hundred per size of its input

_calls: dict[Any, _Call] = {}
_thread = local()  # .recording: what the launcher that runs in this thread has done so far
_remembering = True


def remembered(launcher: Callable[P, R]) -> Callable[P, R]:
    """`launcher`, which is called only for what it was not called with before. All its tensors live on one device,
    which is the current one while it runs."""

    @wraps(launcher)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if getattr(_thread, "recording", None) is not None:  # called by another launcher, whose launches it adds to
            return launcher(*args, **kwargs)
        tensors: list[Tensor] = []
        key = (launcher, *[_facts(v, tensors) for v in args], *kwargs, *[_facts(v, tensors) for v in kwargs.values()])
        addresses = [tensor.data_ptr() for tensor in tensors]
        if len(set(addresses)) < len(addresses):  # which tensors are the same is decided, too
            key = (*key, *map(addresses.index, addresses))
        with torch.cuda.device_of(tensors[0]):
            try:
                known = _calls.get(key) if _remembering else None
            except TypeError:  # an argument that can't be a key, like a list of sizes
                return launcher(*args, **kwargs)
            return _record(launcher, key, tensors, args, kwargs) if known is None else known(tensors, addresses)

    return call


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """kernel[grid](**arguments) on the current device."""
    compiled = kernel[grid](**arguments)
    if (recording := getattr(_thread, "recording", None)) is not None:
        recording.launches.append((kernel, grid, arguments, compiled))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a launcher's result or for what it needs on the way, contiguous and uninitialised."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if (recording := getattr(_thread, "recording", None)) is not None:
        recording.owners.append(tensor)
    return tensor


def view(tensor: Tensor | None, shape: Sequence[int], box: Sequence[int] | None = None, at: Any = ()) -> Any:
    """`tensor`, where there is one, seen as `shape` and indexed by `at`; with a box, TMA's descriptor of such boxes."""
    if tensor is None:
        return None
    seen = tensor.view(shape)[at]
    return seen if box is None else TensorDescriptor.from_tensor(seen, list(box))


@contextmanager
def forgetful() -> Iterator[None]:
    """Within, in all threads, no launch is remembered: every launcher decides everything again, and launches by way of
    `kernel[grid]`."""
    global _remembering
    before, _remembering = _remembering, False
    try:
        yield
    finally:
        _remembering = before


def forget() -> None:
    """No call is remembered any more: what launchers decide by has changed (a table of tiles)."""
    _calls.clear()


def _facts(value: Any, tensors: list[Tensor]) -> Any:
    """What a launcher may decide by, without the address of any tensor; tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        strides = value.is_contiguous() or value.stride()
        return value.shape, value.dtype, value.device, strides, value.data_ptr() % 16  # Triton specialises by that
    if isinstance(value, tuple):
        return type(value), *[_facts(v, tensors) for v in value]
    return value


class _Recording:
    """The tensors that launches may take, given ones first, and the launches of a call that is under way."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.owners = list(given)
        self.launches: list[tuple[Any, tuple[int, ...], dict[str, Any], Any]] = []


def _record(launcher: Any, key: Any, given: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
    _thread.recording = recording = _Recording(given)
    try:
        result = launcher(*args, **kwargs)
    finally:
        _thread.recording = None
    if not _remembering or given[0].device.type == "meta":  # without memory every address is the same
        return result
    if len(_calls) >= LIMIT:
        forget()
    with suppress(_UnownedError):
        _calls[key] = _Call(recording, len(given), result)
    return result


class _UnownedError(Exception):
    """A tensor that lies in none of a call's tensors, or in more than one."""


class _View(NamedTuple):
    """A tensor by its owner: the one, of those that a call was given or took, in whose memory it lies."""

    owner: int
    whole: bool  # whether it is the owner itself
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in elements
    itemsize: int

    @staticmethod
    def of(tensor: Tensor, owners: Sequence[Tensor]) -> _View:
        begin = tensor.data_ptr()
        end = begin + _extent(tensor)
        holders = [i for i, owner in enumerate(owners) if owner is tensor]
        for i, owner in enumerate(() if holders else owners):
            if owner.data_ptr() <= begin and end <= owner.data_ptr() + _extent(owner):
                holders.append(i)
        if len({owners[i].data_ptr() for i in holders}) != 1 or owners[holders[0]].dtype != tensor.dtype:
            raise _UnownedError
        shape, strides, owner = tuple(tensor.shape), tensor.stride(), owners[holders[0]]
        offset = (begin - owner.data_ptr()) // tensor.itemsize
        whole = (shape, strides, offset) == (owner.shape, owner.stride(), 0)
        return _View(holders[0], whole, shape, strides, offset, tensor.itemsize)

    def tensor(self, owners: Sequence[Tensor]) -> Tensor:
        owner = owners[self.owner]
        if self.whole:
            return owner
        return owner.as_strided(self.shape, self.strides, owner.storage_offset() + self.offset)

    @property
    def bytes(self) -> int:
        return self.offset * self.itemsize


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.itemsize if tensor.numel() else 0


class _Address(NamedTuple):
    """Memory, as far as Triton's launcher looks at it."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class _Launch:
    """One launch with all of its arguments but the tensors. What `kernel[grid]` compiled for it serves again; where
    nothing was compiled (in the interpreter), `kernel[grid]` is asked again."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any, owners: Sequence[Tensor]
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.compiled = compiled if isinstance(compiled, CompiledKernel) else None
        self.constants = dict(arguments)
        self.pointers: dict[str, _View] = {}
        self.boxes: dict[str, tuple[_View, dict[str, Any]]] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                self.pointers[name] = _View.of(value, owners)
            elif isinstance(value, TensorDescriptor):
                self.boxes[name] = _View.of(value.base, owners), {**vars(value), "base": None}
        for name in (*self.pointers, *self.boxes):
            self.constants[name] = None
        if self.compiled is not None:
            self._order(kernel.params)

    def _order(self, parameters: Sequence[Any]) -> None:
        """The arguments as a compiled kernel takes them: all, by position, without the options of the compiler."""
        self.values = [self.constants.get(p.name, p.default) for p in parameters]
        place = {p.name: i for i, p in enumerate(parameters)}
        self.pointers_at = [(place[name], view.owner, view.bytes) for name, view in self.pointers.items()]
        self.boxes_at = [(place[name], view.owner, view.bytes, box) for name, (view, box) in self.boxes.items()]

    def __call__(self, owners: Sequence[Tensor], addresses: Sequence[int]) -> None:
        if self.compiled is None:
            arguments = dict(self.constants)
            for name, view in self.pointers.items():
                arguments[name] = view.tensor(owners)
            for name, (view, fields) in self.boxes.items():
                arguments[name] = TensorDescriptor(**{**fields, "base": view.tensor(owners)})
            self.kernel[self.grid](**arguments)
            return
        values = self.values.copy()
        for at, owner, offset in self.pointers_at:
            values[at] = addresses[owner] + offset
        for at, owner, offset, fields in self.boxes_at:
            values[at] = box = object.__new__(TensorDescriptor)  # one like it was checked
            box.__dict__.update(fields)
            box.base = _Address(addresses[owner] + offset)
        self.compiled[self.grid](*values)


class _Call:
    """What a launcher did: memory taken, launches, result."""

    def __init__(self, recording: _Recording, given: int, result: Any) -> None:
        owners = recording.owners
        self.taken = [(tuple(t.shape), t.dtype, t.device) for t in owners[given:]]
        self.launches = [_Launch(*one, owners) for one in recording.launches]
        self.result = _views(result, owners)

    def __call__(self, given: list[Tensor], addresses: list[int]) -> Any:
        taken = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self.taken]
        owners, addresses = given + taken, addresses + [tensor.data_ptr() for tensor in taken]
        for one in self.launches:
            one(owners, addresses)
        return _tensors(self.result, owners)


def _views(result: Any, owners: Sequence[Tensor]) -> Any:
    if isinstance(result, Tensor):
        return _View.of(result, owners)
    if isinstance(result, tuple):
        return type(result), [_views(each, owners) for each in result]
    return result


def _tensors(result: Any, owners: Sequence[Tensor]) -> Any:
    if isinstance(result, _View):
        return result.tensor(owners)
    if isinstance(result, tuple):
        kind, parts = result
        tensors = [_tensors(each, owners) for each in parts]
        return tuple(tensors) if kind is tuple else kind(*tensors)
    return result
