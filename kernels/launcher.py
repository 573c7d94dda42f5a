"""A cache of kernel launches, which keeps the host time of a launcher short.

What a launcher does (checks, choice of a tile, allocations, launch grids, TMA descriptors) depends on the sizes, dtypes
and layouts of its tensors and on its options, but not on the tensors' contents. So the first call records its
allocations and launches. A later call whose arguments differ only in the addresses of tensors (with equal alignment to
16 bytes) repeats them with the new addresses. Without the cache, the host would take longer than the GPU for small
problems.

    @remembered
    def negate(x):
        y = empty(x.shape, x.dtype, x.device)
        launch(negate_kernel, (cdiv(x.numel(), 1024),), x=x, y=y, numel=x.numel(), BLOCK=1024)
        return y

Rules for a function with `@remembered`: it launches kernels by `launch` only and allocates memory by `empty` only. It
does nothing else to the contents of tensors, since a repeated call would skip that. It returns arguments, tensors from
`empty`, views of either, and constants, also in tuples. A call is not remembered if it launches with or returns a
tensor that is in the memory of none of its arguments and `empty` tensors, or of more than one.
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

LIMIT = 4096  # remembered calls, after which the cache is emptied; a net has a few hundred for each size of its input

_calls: dict[Any, _Call] = {}
_thread = local()  # .recording: the `_Recording` of the launcher that runs in this thread, or None
_remembering = True


def remembered(launcher: Callable[P, R]) -> Callable[P, R]:
    """Decorate a launcher so that repeated calls repeat its recorded launches instead of running it.

    The launcher takes at least one tensor. All tensors are on one device, which is the current device while it runs.
    A launcher that is called by another one is recorded as part of that.
    """

    @wraps(launcher)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if getattr(_thread, "recording", None) is not None:  # part of the launcher that is being recorded
            return launcher(*args, **kwargs)
        tensors: list[Tensor] = []
        key = (launcher, *[_facts(v, tensors) for v in args], *kwargs, *[_facts(v, tensors) for v in kwargs.values()])
        addresses = [tensor.data_ptr() for tensor in tensors]
        if len(set(addresses)) < len(addresses):  # which arguments share an address is part of the key
            key = (*key, *map(addresses.index, addresses))
        with torch.cuda.device_of(tensors[0]):
            try:
                known = _calls.get(key) if _remembering else None
            except TypeError:  # an argument is not hashable, for example a list
                return launcher(*args, **kwargs)
            return _record(launcher, key, tensors, args, kwargs) if known is None else known(tensors, addresses)

    return call


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run kernel[grid](**arguments) on the current device, and record it if a launcher is being recorded."""
    compiled = kernel[grid](**arguments)
    if (recording := getattr(_thread, "recording", None)) is not None:
        recording.launches.append((kernel, grid, arguments, compiled))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous, uninitialised tensor, and record the allocation if a launcher is being recorded."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if (recording := getattr(_thread, "recording", None)) is not None:
        recording.owners.append(tensor)
    return tensor


def view(tensor: Tensor | None, shape: Sequence[int], box: Sequence[int] | None = None, at: Any = ()) -> Any:
    """Return `tensor` viewed as `shape` and indexed by `at`; with `box`, a TMA descriptor of that view; None for None.

    box: the shape of the blocks that the descriptor loads or stores.
    """
    if tensor is None:
        return None
    seen = tensor.view(shape)[at]
    return seen if box is None else TensorDescriptor.from_tensor(seen, list(box))


@contextmanager
def forgetful() -> Iterator[None]:
    """Switch the cache off within a `with` block, in all threads.

    Every launcher then runs in full and launches by `kernel[grid]`.
    """
    global _remembering
    before, _remembering = _remembering, False
    try:
        yield
    finally:
        _remembering = before


def forget() -> None:
    """Empty the cache. Needed when something has changed that launchers depend on, such as a table of tiles."""
    _calls.clear()


def _facts(value: Any, tensors: list[Tensor]) -> Any:
    """Return the part of a cache key for one argument: everything but the contents and addresses of its tensors.

    Of an address, only the alignment to 16 bytes is part of the key. Appends the argument's tensors to `tensors`.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        strides = value.is_contiguous() or value.stride()
        return value.shape, value.dtype, value.device, strides, value.data_ptr() % 16  # Triton specialises by alignment
    if isinstance(value, tuple):
        return type(value), *[_facts(v, tensors) for v in value]
    return value


class _Recording:
    """The record of what a launcher's current call has done so far.

    owners: its tensor arguments, then the tensors that it allocated. launches: kernel, grid, arguments and what
    `kernel[grid]` returned, of each launch.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.owners = list(given)
        self.launches: list[tuple[Any, tuple[int, ...], dict[str, Any], Any]] = []


def _record(launcher: Any, key: Any, given: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
    """Run the launcher, store its call under `key` if it can be repeated, and return its result."""
    _thread.recording = recording = _Recording(given)
    try:
        result = launcher(*args, **kwargs)
    finally:
        _thread.recording = None
    if not _remembering or given[0].device.type == "meta":  # meta tensors have no addresses
        return result
    if len(_calls) >= LIMIT:
        forget()
    with suppress(_UnownedError):
        _calls[key] = _Call(recording, len(given), result)
    return result


class _UnownedError(Exception):
    """Raised for a tensor whose memory belongs to none of a call's tensors, or to more than one."""


class _View(NamedTuple):
    """A tensor described by its owner: the argument or allocation of a call whose memory contains it."""

    owner: int  # index into the call's owners
    whole: bool  # whether shape, strides and offset are the owner's
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # from the owner's first element, in elements
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
    """Return the number of bytes from the first element of a tensor to the end of its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.itemsize if tensor.numel() else 0


class _Address(NamedTuple):
    """An address that replaces a descriptor's tensor: of that tensor, Triton's launcher only calls `data_ptr()`."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class _Launch:
    """A recorded launch: all its arguments except tensors, and the compiled kernel that `kernel[grid]` returned.

    Calling it launches the compiled kernel with new addresses. In the interpreter, where nothing is compiled, it calls
    `kernel[grid]` with new tensors instead.
    """

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
        """Put the arguments in the order of a compiled kernel, which takes all parameters by position.

        Compiler options such as num_warps are not among the parameters and are dropped.
        """
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
            values[at] = box = object.__new__(TensorDescriptor)  # skips __init__'s checks, passed when recording
            box.__dict__.update(fields)
            box.base = _Address(addresses[owner] + offset)
        self.compiled[self.grid](*values)


class _Call:
    """A recorded call to a launcher: its allocations, its launches and its result."""

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
    """Replace the tensors in a launcher's result by `_View`s, and tuples by (type, parts)."""
    if isinstance(result, Tensor):
        return _View.of(result, owners)
    if isinstance(result, tuple):
        return type(result), [_views(each, owners) for each in result]
    return result


def _tensors(result: Any, owners: Sequence[Tensor]) -> Any:
    """Undo `_views`: build a result from the owners of a new call."""
    if isinstance(result, _View):
        return result.tensor(owners)
    if isinstance(result, tuple):
        kind, parts = result
        tensors = [_tensors(each, owners) for each in parts]
        return tuple(tensors) if kind is tuple else kind(*tensors)
    return result
