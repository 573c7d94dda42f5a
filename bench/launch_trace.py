"""Record every kernel that a step launches, in order, with the bytes it moves and its FLOPs. No GPU is needed, because
the step runs on meta tensors.

    with recorded(torch.bfloat16) as recorder:
        net(images)                           # on the meta device
    recorder.launches()[0].kernel

Our kernels are recorded where they are launched (`kernels.launcher.launch`). Everything else, including the library's
convolutions, is recorded as PyTorch operators. An operator counts as one kernel, except that a convolution's backward
counts as one for each gradient and BatchNorm in training as two, and that views and allocations don't count.
"""

from __future__ import annotations

import copy
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import layers
import torch
import torch.nn.functional as F
from measure import OPTIMIZER
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres import kernels
from fastres.inference import plan
from fastres.inference.program import Program
from fastres.inference.trace import trace
from fastres.kernels import launcher, tables
from fastres.kernels.checks import gpu_of
from fastres.kernels.problem import ConvProblem
from fastres.ops import conv_bn, dispatch, folded
from fastres.ops.layout import nhwc

META = torch.device("meta")


class Part(NamedTuple):
    """The part of a tensor that one kernel reads or writes: the number of its storage, and a count of bytes in it."""

    memory: int
    bytes: int


@dataclass(frozen=True)
class Launch:
    """One kernel.

    pass_: "infer", "fprop", "dgrad" or "wgrad" for the work of a convolution, "norm" for the steps between the
        convolutions of a fused block and all other kernels of ours, "pytorch" for other operators.
    layer: `layers.name` of the convolution that it works for, or empty.
    flops: the FLOPs of its multiplications, 0 if it has none.
    ours: whether it is a Triton kernel of ours. If not, grid and arguments are empty.
    arguments: by name, with a `Part` in the place of each tensor.
    """

    kernel: str
    pass_: str
    layer: str
    flops: int
    reads: tuple[Part, ...]
    writes: tuple[Part, ...]
    ours: bool = False
    grid: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The bytes that it moves, every tensor once. A kernel of ours has all of its tensors in `reads`, because its
        arguments don't show which ones it writes."""
        return sum(part.bytes for part in (*self.reads, *self.writes))

    @property
    def programs(self) -> int:
        return math.prod(self.grid) if self.ours else 0


@dataclass
class Work:
    """One pass of a convolution, or other work (`problem` is None), with which the kernels launched during it are
    labelled. Those of them that multiply share its FLOPs."""

    pass_: str
    problem: ConvProblem | None = None
    flops: int = 0


class Recorder(TorchDispatchMode):
    """Record launches of kernels and calls of operators while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Launch, Work]] = []
        self.work = [Work("norm")]
        # Address of a storage -> (its number, the storage). Keeps it alive, so that no other gets the same address.
        self.memories: dict[int, tuple[int, Any]] = {}

    def launches(self) -> list[Launch]:
        """Return what was recorded, with the FLOPs of each work divided among its kernels that multiply."""
        shares: dict[int, int] = {}
        for one, work in self.noted:
            if one.ours and one.flops:
                shares[id(work)] = shares.get(id(work), 0) + one.programs * taps(one.arguments)
        found = []
        for one, work in self.noted:
            shared = one.ours and one.flops
            share = one.programs * taps(one.arguments) / shares[id(work)] if shared else 1.0
            found.append(replace(one, flops=round(one.flops * share)))
        return found

    def kernel(self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """Record a launch of one of our kernels. Replaces `launcher.launch`."""
        work = self.work[-1]
        p = work.problem
        flops = work.flops if multiplies(kernel) else 0
        parts: dict[int, Part] = {}
        numbers: dict[str, Any] = {}
        for name, value in arguments.items():
            tensor = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(tensor, Tensor) and not (flops and not taps(arguments) and name in OPERANDS):
                part = self.part(tensor, reached(p, work.pass_) if flops and name == "x" and p is not None else 1.0)
                known = parts.get(part.memory, part)
                parts[part.memory] = max(part, known, key=lambda one: one.bytes)
            # Keep no tensor: autograd would copy a gradient to which another reference exists.
            numbers[name] = self.part(tensor) if isinstance(tensor, Tensor) else value
        layer = "" if p is None else layers.name(p)
        self.noted.append(
            (Launch(name_of(kernel), work.pass_, layer, flops, tuple(parts.values()), (), True, grid, numbers), work)
        )

    def part(self, tensor: Tensor, share: float = 1.0) -> Part:
        """Return the `Part` for a share (1 for all) of a tensor's elements. Elements that overlap or repeat count
        once."""
        storage = tensor.untyped_storage()
        memory, _ = self.memories.setdefault(storage._cdata, (len(self.memories), storage))
        elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        moved = min(elements * tensor.itemsize, storage.nbytes()) if tensor.numel() else 0
        return Part(memory, round(share * moved))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "_local_scalar")):
            return result
        inputs, mutated = _operands(func, args, kwargs or {})
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        work = self.work[-1]
        if name == "convolution_backward":
            self._backward(args, made, work)
        else:
            problem = _problem(name, args)
            read = tuple(self.part(t, reached(problem, "fprop") if problem and t is args[0] else 1.0) for t in inputs)
            fresh = {part.memory: part for part in map(self.part, [*made, *mutated])}
            if not read and not any(part.bytes > 4 for part in fresh.values()):
                return result  # a scalar on the host
            pass_ = work.pass_ if len(self.work) > 1 else "pytorch" if problem is None else "fprop"
            flops = 2 * problem.multiply_adds if problem else _matmul_flops(name, args)
            layer = layers.name(problem or work.problem) if problem or work.problem else ""
            for kernel, reads, writes in _passes(name, args, read, tuple(fresh.values())):
                self.noted.append((Launch(kernel, pass_, layer, flops, reads, writes), work))
        return result

    def _backward(self, args: Any, made: list[Tensor], work: Work) -> None:
        """Record each wanted gradient of a convolution as a kernel: that of x, which reads dy and w, and that of w,
        which reads dy and x."""
        dy, x, w, *_, mask = args
        problem = conv_problem(x, w, *(args[i][0] for i in (4, 5, 6)), args[9])
        gradients = iter(made)
        for wanted, pass_, other in zip(mask, ("dgrad", "wgrad"), (w, x), strict=False):
            if wanted:
                read = self.part(dy), self.part(other, reached(problem, pass_) if pass_ == "wgrad" else 1.0)
                moved = Launch(
                    f"convolution_{pass_}", pass_, layers.name(problem), 2 * problem.multiply_adds, read,
                    (self.part(next(gradients)),),
                )  # fmt: skip
                self.noted.append((moved, work))


OPERANDS = ("dy", "z", "w")  # arguments that dgrad doesn't read in a launch for pixels that no filter tap reaches


def taps(arguments: Mapping[str, Any]) -> int:
    """Return the number of filter taps that reach the pixels of one launch if the kernel (dgrad) has a launch for each
    class of pixels, else 1."""
    return int(arguments.get("TAPS_R", 1) * arguments.get("TAPS_S", 1))


def reached(problem: ConvProblem, pass_: str) -> float:
    """Return the share of x that a convolution reads: less than 1 if its stride skips pixels. 1 for dgrad, which writes
    all of dx."""
    rows, columns = min(1.0, problem.R / problem.stride), min(1.0, problem.S / problem.stride)
    return rows * columns if pass_ != "dgrad" else 1.0


def conv_problem(x: Tensor, w: Tensor, stride: int, pad: int, dilation: int, groups: int) -> ConvProblem:
    """Return the problem of a convolution of x [N, C, H, W] with filters w [K, C/groups, R, S]."""
    (N, C, H, W), (K, _, R, S) = x.shape, w.shape
    return ConvProblem(N, H, W, C, K, R, S, stride, pad, dilation, groups)


def _problem(name: str, args: Any) -> ConvProblem | None:
    """Return the problem of the convolution that an operator computes, or None."""
    if name == "convolution":
        return conv_problem(args[0], args[1], *(args[i][0] for i in (3, 4, 5)), args[8])
    if name.startswith("cudnn_convolution"):
        *_, stride, pad, dilation, groups = args
        return conv_problem(args[0], args[1], stride[0], pad[0], dilation[0], groups)
    return None


def _matmul_flops(name: str, args: Any) -> int:
    """Return the FLOPs of a matrix product, or 0 for other operators."""
    if name not in ("mm", "addmm"):
        return 0
    a, b = args[-2:]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


# Positions of arguments that an operator gets but its kernel never reads.
UNREAD = {"max_pool2d_with_indices_backward": (1,), "copy_": (0,), "zero_": (0,), "fill_": (0,)}


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operator reads, and those of its arguments that it writes."""
    read, mutated = [], []
    unread = UNREAD.get(func.overloadpacket.__name__, ())
    for i, parameter in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(parameter.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        read += [] if i in unread else tensors
        writes = parameter.alias_info is not None and parameter.alias_info.is_write
        # `_fused_sgd_` writes its argument grads only if they are scaled, which no step does.
        mutated += tensors if writes and parameter.name != "grads" else []
    return read, mutated


def _passes(
    name: str, args: Any, reads: tuple[Part, ...], writes: tuple[Part, ...]
) -> list[tuple[str, tuple[Part, ...], tuple[Part, ...]]]:
    """Return an operator's kernels as (name, reads, writes). PyTorch's BatchNorm in training has two: one reduces, the
    other reads the same tensors again."""
    training = {"native_batch_norm": 5, "native_batch_norm_backward": 7}
    if name in training and args[training[name]]:
        return [(f"{name}_sums", reads, ()), (name, reads, writes)]
    return [(name, reads, writes)]


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operator on meta tensors. Operators without a meta implementation are replaced by others or skipped."""
    name = func.overloadpacket.__name__
    if name == "_fused_sgd_":
        return None
    if name.startswith("cudnn_convolution"):
        *_, stride, pad, dilation, groups = args
        args = (args[0], args[1], None, stride, pad, dilation, False, [0, 0], groups)
        func, name = torch.ops.aten.convolution.default, "convolution"
    result = func(*args, **kwargs)
    if name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)  # the layout that a GPU returns
    return result


def name_of(kernel: Any) -> str:
    return kernel.fn.__name__


@cache
def multiplies(kernel: Any) -> bool:
    """Return whether a Triton kernel, or a Triton function that it calls, multiplies matrices."""
    source = inspect.getsource(kernel.fn)
    if "tl.dot(" in source:
        return True
    called = (kernel.fn.__globals__.get(name) for name in set(re.findall(r"\b(\w+)\(", source)))
    return any(multiplies(one) for one in called if one is not kernel and type(one) is type(kernel))


class Autocast(TorchFunctionMode):
    """Casts the operands of a ResNet's operators as `torch.autocast` does, which doesn't support meta tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to = {F.linear: self.dtype, F.conv2d: self.dtype, torch.conv2d: self.dtype, F.cross_entropy: torch.float32}
        if (dtype := to.get(func)) is not None:
            args = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


@cache
def launching() -> list[ModuleType]:
    """Return the modules of `fastres.kernels` with launchers."""
    modules = [import_module(f"{kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(kernels.__path__)]
    return [module for module in modules if getattr(module, "launch", None) is launcher.launch]


@contextmanager
def recorded(dtype: torch.dtype) -> Iterator[Recorder]:
    """Within the context, treat meta tensors like tensors on an H200 under autocast with `dtype`, and record every
    kernel."""
    recorder = Recorder()
    why_engine = dispatch.why_engine

    def engine(*call: Any) -> tuple[Any, str]:
        by, why = why_engine(*call)
        return ("cudnn" if by == "aten" else by), why

    replaced: dict[str, Callable[..., Any]] = {
        "_kernel_less": lambda device: None,
        "_measured": lambda pass_, problem, of, device: tables.measured(pass_, problem, of, gpu_of(device)),
        "passes_engine": lambda *_: "aten" if dispatch.wants_reference() else "triton",
        "compute_dtype": lambda x: dtype,
        "why_engine": engine,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch.object(dispatch, name, function))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        # As if a graph was being captured, so that no alternatives are timed.
        stack.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: True))
        # fastres doesn't use its kernels under a dispatch mode, which `recorder` is.
        stack.enter_context(patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0))
        for module in launching():
            stack.enter_context(patch.object(module, "launch", lambda k, g, **a: recorder.kernel(k, g, a)))
        stack.enter_context(patch.object(conv_bn, "bind", _noting(conv_bn.bind, recorder)))
        for name, function in [*vars(folded).items()]:
            if inspect.isfunction(function) and name.startswith("by_"):
                stack.enter_context(patch.object(folded, name, _by_folded(function, recorder)))
        conv_bn.conv_bn.cache_clear()
        stack.callback(conv_bn.conv_bn.cache_clear)
        stack.enter_context(Autocast(dtype))
        stack.enter_context(recorder)
        yield recorder


def _noting(bind: Callable[..., conv_bn.ConvBN], recorder: Recorder) -> Callable[..., conv_bn.ConvBN]:
    """Wrap `conv_bn.bind`, so that the kernels of the pairs (a convolution with its BatchNorm) that it returns are
    recorded with the pair's problem."""

    def noted(pass_: str | None, problem: ConvProblem, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside = recorder.work[-1].pass_ if len(recorder.work) > 1 else "norm"
            recorder.work.append(Work(pass_ or inside, problem, 2 * problem.multiply_adds))
            try:
                return function(*args, **kwargs)
            finally:
                recorder.work.pop()

        return call

    def bound(*facts: Any) -> conv_bn.ConvBN:
        pair = bind(*facts)
        calls = {name: value for name, value in vars(pair).items() if callable(value)}
        calls = {name: noted(name.split("_")[0], pair.problem, call) for name, call in calls.items()}
        between = {name: call for name, call in vars(pair.passes).items() if callable(call)}
        passes = SimpleNamespace(**{name: noted(None, pair.problem, call) for name, call in between.items()})
        return replace(pair, **calls, passes=passes)

    return bound


def _by_folded(function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """Wrap a function of `folded` that runs a step of a plan, so that its kernels are recorded as its work. The step is
    one convolution, a chain of three, or a max pool."""

    @wraps(function)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weights, geometry, problem, flops = kwargs.get("weights"), kwargs.get("geometry"), None, 0
        if isinstance(weights, folded.Folded):
            problem = ConvProblem.of(x.shape, weights.w.shape, *geometry)
            flops = 2 * problem.multiply_adds
        elif weights is not None:  # a chain: all three convolutions have x's pixels, and the first is 3x3
            spatial = weights[0].w
            problem = ConvProblem(*x.shape, spatial.shape[0], *spatial.shape[1:3], 1, spatial.shape[1] // 2)
            flops = sum(2 * problem.pixels * one.w.numel() for one in weights)
        recorder.work.append(Work("infer", problem, flops))
        try:
            return function(x, *args, **kwargs)
        finally:
            recorder.work.pop()

    return call


def images(batch: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return images [N, 3, H, W] in channels_last on the meta device."""
    return torch.empty(batch, 3, size, size, dtype=dtype, device=META).to(memory_format=torch.channels_last)


def train(net: nn.Module, batch: int, size: int, dtype: torch.dtype) -> list[Launch]:
    """Return the kernels of a training step of `net` as bench/measure.py runs it in a CUDA graph.

    These are a copy of the batch to where the graph reads it, forward, cross-entropy, backward, and fused SGD with
    momentum. The loss scale of fp16 is left out.
    """
    net = net.to(META).to(memory_format=torch.channels_last).train()
    x, fed = images(batch, size, dtype), images(batch, size, dtype)
    labels = torch.empty(batch, dtype=torch.int64, device=META)
    parameters = [*net.parameters()]
    momenta = [torch.empty_like(p) for p in parameters]
    with recorded(dtype) as recorder:
        x.copy_(fed)
        F.cross_entropy(net(x), labels).backward()
        gradients = [p.grad for p in parameters]
        torch._fused_sgd_(
            [p.detach() for p in parameters], gradients, momenta, nesterov=False, dampening=0.0, maximize=False,
            is_first_step=False, **OPTIMIZER,
        )  # fmt: skip
    return recorder.launches()


def infer(net: nn.Module, batch: int, size: int, dtype: torch.dtype) -> list[Launch]:
    """Return the kernels of `net` in eval mode and `dtype`, without `fastres.optimize`."""
    net = net.to(META).to(dtype=dtype, memory_format=torch.channels_last).eval()
    x = images(batch, size, dtype)
    with recorded(dtype) as recorder, torch.no_grad():
        net(x)
    return recorder.launches()


def infer_optimized(net: nn.Module, batch: int, size: int, dtype: torch.dtype) -> list[Launch]:
    """Return the kernels of `fastres.optimize(net)` in a CUDA graph, with the copies of images in and scores out. Every
    BatchNorm is assumed to have a shift."""
    net = net.to(META).eval()
    steps, output = trace(copy.deepcopy(net))
    steps = plan.fuse_chains(plan.fuse(steps, output), output)
    weights, modules = {}, {}
    for step in steps:
        for conv in plan.convs(step):
            shift = None if conv.bare else torch.empty(conv.filter[0], device=META)
            w = torch.empty(conv.filter, dtype=dtype, device=META)
            weights[conv.out] = folded.Folded(w, shift, None if shift is None else shift.to(dtype))
        if isinstance(step, plan.Aten) and step.kind == "module":
            modules[step.name] = net.get_submodule(step.name).to(dtype)
    program = Program(steps, output, weights, modules, dtype)
    x, fed = nhwc(images(batch, size, dtype)), nhwc(images(batch, size, dtype))
    with recorded(dtype) as recorder, torch.no_grad():
        program.bind(x)
        recorder.noted.clear()
        x.copy_(fed)
        for y in program.run(x):
            y.clone()
    return recorder.launches()


# POINTWISE: operators that Inductor computes where their result is read. NORMS: the same, except for the kernels with
# the suffix _sums (`_passes`), which reduce.
POINTWISE = ("relu", "relu_", "add", "add_", "threshold_backward", "_to_copy", "div", "mul")
NORMS = ("native_batch_norm", "native_batch_norm_backward")
# MOST_READ: the most tensors from which a value is computed where it is read, Inductor's `realize_reads_threshold`.
# SMALL: bytes of the smallest tensor that counts.
MOST_READ, SMALL = 4, 2**16


def as_inductor(launches: Sequence[Launch]) -> list[Launch]:
    """Return the kernels of an eager step as Inductor would fuse them.

    A pointwise operator runs within the kernel that reads its result, unless that is a kernel of the library or it
    would then read too many tensors; in these cases the result is stored. Reductions stay separate, because the next
    kernel needs their sums.
    """
    fused: list[Launch] = []
    sizes: dict[int, int] = {}
    # Number of the storage of a value that isn't computed yet -> those of the stored tensors to compute it from.
    pending: dict[int, frozenset[int]] = {}

    def parts(memories: Iterable[int]) -> tuple[Part, ...]:
        return tuple(Part(memory, sizes[memory]) for memory in sorted(memories))

    def sources(reads: Iterable[Part]) -> frozenset[int]:
        large = [part.memory for part in reads if part.bytes >= SMALL]
        return frozenset[int]().union(*(pending.get(memory, {memory}) for memory in large))

    def store(reads: Iterable[Part]) -> None:
        for memory in [part.memory for part in reads if part.memory in pending]:
            fused.append(Launch("fused_pointwise", "pytorch", "", 0, parts(pending.pop(memory)), parts([memory])))

    for one in launches:
        for part in (*one.reads, *one.writes):
            sizes[part.memory] = max(part.bytes, sizes.get(part.memory, 0))
        if one.kernel.removesuffix("_sums") not in (*POINTWISE, *NORMS) or one.bytes < SMALL:
            store(one.reads)
            fused.append(one)
            continue
        if len(sources(one.reads)) > MOST_READ:
            store(one.reads)
        if one.kernel.endswith("_sums"):
            fused.append(replace(one, kernel="fused_reduction", reads=parts(sources(one.reads))))
        else:
            read = sources(one.reads)
            pending |= {part.memory: read for part in one.writes if part.bytes >= SMALL}
    return fused
