"""`optimize(model)`: a ResNet frozen for inference, as a static plan of fused convolutions on NHWC tensors.

BatchNorm is folded into the weights once, in float64. For each input shape the plan's steps are bound to engines
(`fastres.ops.dispatch` chooses) and, on a GPU, captured in a CUDA graph that later calls of that shape replay.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastres.inference.plan import (
    Aten,
    Attr,
    Chain,
    Conv,
    Step,
    by_image,
    convs,
    fuse,
    fuse_chains,
    leaves,
    quantise,
    trace,
)
from fastres.inference.program import Program
from fastres.inference.ranges import Ranges
from fastres.models.wrappers import refuse_wrapper
from fastres.ops import dispatch, eligibility, folded, onednn, quantised
from fastres.ops.layout import nhwc
from fastres.ops.quantised import FLOAT8

__all__ = ["Optimized", "optimize"]

_MOST_COMPARED = 16  # images, where a net asks for its number of them
MAX_SHAPES = 8  # bound plans kept per net, least recently used dropped first
SETTLED_AFTER = 10  # calls of one shape on a CPU, then compiling it is worth the time
ALIVE = 32 * 2**20  # bytes of values alive at once on a CPU: what a large cache holds, and glibc's heap keeps
_TRIED = 4  # images of a new size, to see how many bytes they take
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_QUANTISED = {FLOAT8: torch.bfloat16, torch.int8: torch.float32}  # of convolutions -> of all else and of the answer


@torch.inference_mode(False)
def optimize(
    model: nn.Module,
    example: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = True,
    torchscript: bool = True,
    calibration: Iterable[Any] | None = None,
    percentile: float | None = None,
) -> Optimized:
    """Freeze `model`, a ResNet in eval mode, for inference. The model itself stays untouched.

    Accepts fastres's nets, torchvision's and timm's ResNets, and what else consists of the operations that the error
    for an unknown one lists. The result is called as the model is and answers as `model.to(dtype)` would, in `dtype`,
    for input [N, C, H, W] of any floating dtype in any memory format; no gradient flows. The input is never changed,
    even where the model would work in it in place. Returned tensors are the caller's own: no later call, thread or
    stream changes them.

    example: input whose shape is made ready now, not at the first call, as by `ready`: engines are chosen, kernels
    compiled, a graph is captured. dtype: bfloat16, float16, float32 or float64; float8_e4m3fn on GPUs of compute
    capability 8.9 and above; int8 on CPUs with AVX512-VNNI. The default is that of the model's convolutions.
    cuda_graph: on a GPU, replay a CUDA graph per input shape (the last 8 shapes are kept).

    On an x86-64 CPU the convolutions are oneDNN's, each with its bias, addition and ReLU in one call: in float32, in
    int8 and, where the CPU has the instructions, in bfloat16 and float16. An image with NaN or infinity is answered as
    by PyTorch, in int8 by NaN. One difference remains in float32 and bfloat16: where an activation overflows inside
    the net, a NaN may follow, and oneDNN's ReLU makes 0 of it.

    torchscript: on a CPU, have TorchScript compile the plan for an input shape after ten calls with it, or at once for
    `example` and `ready`. The result is used where it is faster than the steps one by one. In float32 and bfloat16 it
    is a oneDNN graph, whose answers may differ from those of the steps in the last bits; in int8 it has the same steps
    and answers. Where `torch.use_deterministic_algorithms` is on, nothing is compiled.

    calibration: for float8 and int8 only, batches (or (batch, ...) tuples) that represent the real input. Their numbers
    set the range of each activation; what lies beyond it later is clamped. percentile: above 0 and up to 100, the
    default. This share of an activation's numbers, in percent, lies below the upper end of its range, and as many above
    the lower end; 100 is the extremes. Weights have one scale per output channel. In float8 the first convolution,
    grouped ones and the classifier stay in bfloat16, and the result is in it. In int8 weights are whole numbers from
    -127 to 127, activations from 0 to 255 with a zero point; max pools between convolutions work in 8 bits. The
    classifier, all else and the result are in float32. Under `backend("reference")` either dtype is simulated on any
    device.

    Raises TypeError or ValueError, saying what is accepted, for a model in training mode or with hooks, for an
    operation without a step, for one in place whose effect may show under another name, for folded weights that aren't
    finite, for a dtype or device that can't be served. The first call (here, where `example` is given) takes longer: it
    also holds plan and model against each other, both in float64 on the CPU, on random images of its size, and raises
    ValueError if they differ, as where the model's code asks `type(x)`, which a trace can't see. What `torch.autocast`
    does inside a model is left out.
    """
    refuse_wrapper(model, "optimize")
    if any(isinstance(module, Optimized) for module in model.modules()):
        raise TypeError("this net is optimized already, or a part of it is; optimize() takes the original")
    if dtype is not None and dtype not in (*_DTYPES, *_QUANTISED):
        raise ValueError(f"dtype={dtype} isn't served; accepted: {', '.join(map(str, (*_DTYPES, *_QUANTISED)))}")
    if (dtype in _QUANTISED) != (calibration is not None):
        raise ValueError(
            "float8_e4m3fn and int8 need calibration=, an iterable of input batches, and no other dtype takes it"
        )
    if percentile is not None and calibration is None:
        raise ValueError("percentile= says how calibration sets ranges; give it with float8_e4m3fn or int8")
    ranges = Ranges(100.0 if percentile is None else percentile)
    model = _openly_normalised(model)
    steps, output = trace(copy.deepcopy(model))
    steps = fuse(steps, output, absorb=dtype != torch.int8)
    if not any(isinstance(step, Conv) for step in steps):
        raise ValueError(f"{type(model).__name__} has no convolution: there is nothing to optimize")
    device = _device(model)
    source = copy.deepcopy(model)
    if calibration is not None:
        assert dtype is not None
        (_require_float8 if dtype == FLOAT8 else _require_int8)(device)
        wide = Optimized(source, steps, output, _QUANTISED[dtype], cuda_graph=False, original=source)
        for x in _batches(calibration):
            wide.observed(x, ranges.meet)
        steps, output = quantise(steps, output, ranges.found(), dtype)
        dtype = wide.dtype
    # The net that was calibrated with has been compared; one of 8 bits is too coarse to be.
    original = None if calibration is not None else source
    steps, dtype = fuse_chains(steps, output), dtype or _dtype(model, steps)
    net = Optimized(source, steps, output, dtype, cuda_graph, original, torchscript)
    if example is not None:
        net.ready(example)
    return net


class _Normalize(nn.Module):
    """torchvision's Normalize as arithmetic that a trace can read: x [N, C, H, W] -> (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _openly_normalised(model: nn.Module) -> nn.Module:
    """A copy of `model` with `_Normalize` for torchvision's Normalize layers; the model itself where it has none."""
    found = {path: module for path, module in model.named_modules() if path and _is_normalize(module)}
    if not found:
        return model
    like = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    model = copy.deepcopy(model)
    for path, module in found.items():
        mean, std = (torch.as_tensor(v, dtype=torch.float64, device=like.device) for v in (module.mean, module.std))
        layer = _Normalize(mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1))
        model.set_submodule(path, layer.train(module.training))
    return model


def _is_normalize(module: nn.Module) -> bool:
    """Whether it is one, of transforms or transforms.v2, whose call does no more than the arithmetic."""
    kind = type(module)
    named = kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision.transforms.")
    return named and not module.inplace and not eligibility.has_hooks(module) and 0 not in module.std  # type: ignore


def _device(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or torch.device("meta") in devices:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"optimize() takes a model whose parameters and buffers lie on one device, got {names}")
    return devices.pop()


def _dtype(model: nn.Module, steps: Iterable[Step]) -> torch.dtype:
    dtypes = {model.get_submodule(conv.name).weight.dtype for step in steps for conv in convs(step)}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise ValueError(f"the model's convolutions are in {', '.join(sorted(map(str, dtypes)))}; give one dtype")
    return dtypes.pop()  # type: ignore[return-value]


def _require_float8(device: torch.device) -> None:
    if dispatch.wants_reference():
        return
    if device.type != "cuda":
        raise ValueError(f"float8_e4m3fn needs a CUDA GPU, the model is on {device}; backend('reference') simulates it")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"float8_e4m3fn needs compute capability 8.9 or above, {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}; backend('reference') simulates it"
        )


def _require_int8(device: torch.device) -> None:
    if dispatch.wants_reference():
        return
    if device.type != "cpu":
        raise ValueError(
            f"int8 needs a CPU, the model is on {device}; there is float8_e4m3fn for GPUs, and backend('reference') "
            "simulates int8"
        )
    if (reason := dispatch.why_no_int8(device)) is not None:
        raise ValueError(f"int8 isn't served: {reason}; backend('reference') simulates it")


def _batches(batches: Iterable[Any]) -> Iterator[Tensor]:
    for batch in batches:
        yield batch if isinstance(batch, Tensor) else batch[0]


class Optimized(nn.Module):
    """What `optimize` returns. Its submodules, parameters, buffers and `state_dict` are a copy of the original's.

    Loading a state_dict of the original folds anew, and so does moving to another device; loading into a part of it, or
    writing into its weights, doesn't. deepcopy and pickle work.
    Plans are kept per input shape, `backend` in force and numerical switches of PyTorch's (TF32, cuDNN, deterministic).
    """

    dtype: torch.dtype

    def __init__(
        self,
        source: nn.Module,
        steps: Sequence[Step],
        output: str,
        dtype: torch.dtype,
        cuda_graph: bool,
        original: nn.Module | None = None,
        torchscript: bool = False,
    ) -> None:
        """original: what the first call is compared with. It shares its modules with the net."""
        super().__init__()
        self._original = (original,)  # in a tuple, or it would become a submodule
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(self, name, getattr(source, name))
        self.requires_grad_(False)
        self.training = False
        self.dtype = dtype
        self.cuda_graph, self.torchscript = cuda_graph, torchscript
        self._steps = list(steps)
        self._output = output
        self._title = type(source).__name__
        self._by_image = by_image(steps, source)
        self.register_load_state_dict_post_hook(_refold)
        self._start()

    def forward(self, x: Tensor) -> Tensor:
        """The original's answer in `dtype` to x [N, C, H, W]: x in any floating dtype, on the weights' device."""
        x = self._given(x)
        if _is_recorded(x):
            return self._recorded(x)
        with _plain_mode(x):
            return self._on_cuda(x) if x.is_cuda else self._on_cpu(x)

    def ready(self, example: Tensor) -> None:
        """Make what calls with inputs of `example`'s shape need: engines, kernels, a CUDA graph, or TorchScript on a
        CPU, without waiting for ten calls."""
        self(example)
        if not example.is_cuda:
            with _plain_mode(example):
                self._on_cpu(self._given(example), settles_after=0)

    def explain(self, shape: Sequence[int] | None = None) -> str:
        """Each step's layer, output shape and engine, and why that engine, as a table.

        Of the plan for input of `shape` [N, C, H, W], by default the one used last. Raises ValueError if there's none.
        """
        with self._lock:
            programs = [p for key, p in self._programs.items() if shape is None or key[0] == tuple(shape)]
        if not programs:
            known = ", ".join(str(list(key[0])) for key in self._programs)
            wanted = f" for shape {list(shape)} (there are: {known})" if shape and known else ""
            raise ValueError(f"no plan yet{wanted}; call it on a batch first")
        small = self._eight_bits()
        convolutions = f" with {small} convolutions" if small else ""
        return f"{self._title} in {self.dtype}{convolutions}, {programs[-1].how()}\n{programs[-1].table()}"

    def agreement(self, model: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> float:
        """The share of images in `batches` (tensors or (tensor, ...) tuples) with the same top-1 class as `model`'s.

        `model` is given each batch in the dtype and on the device of its own parameters, if it has any.
        """
        same = total = 0
        for x in _batches(batches):
            like = next(model.parameters(), x) if isinstance(model, nn.Module) else x
            with torch.no_grad():
                theirs = model(x.to(like.device, like.dtype)).argmax(1)
            ours = self(x.to(self._weight.device)).argmax(1)
            same += int((ours == theirs.to(ours.device)).sum())
            total += len(x)
        if not total:
            raise ValueError("no images to compare on")
        return same / total

    def train(self, mode: bool = True) -> Optimized:
        """Raises RuntimeError for mode=True; `eval()` changes nothing."""
        if mode:
            raise RuntimeError("an optimized net is frozen for inference; train the original and optimize it again")
        return self

    def extra_repr(self) -> str:
        return f"optimized {self._title}, dtype={self.dtype}"

    def observed(self, x: Tensor, observe: Callable[[str, Any], None]) -> Tensor:
        """forward(x) without a graph; `observe` is shown every value by name, which later steps may overwrite."""
        x = self._given(x)
        with _plain_mode(x), self._lock:
            return self._program(x)[0].run(self._nhwc(x), observe)

    # The life of what is derived from the weights.

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._image_bytes: dict[Any, float] = {}  # what an image of a size adds to the bytes alive at once
        self._fold()

    def _fold(self) -> None:
        self._forget()
        self._folded: dict[str, folded.Folded] = {}
        self._packings = onednn.Packings()
        self._layers: dict[str, Any] = {}  # modules and tensors of ATen steps in `dtype`
        for step in self._steps:
            if isinstance(step, Aten):
                self._adopt(step)
            for conv in convs(step):
                self._folded[conv.out] = self._pack(conv)
        self._unbound = self._new_program()
        self._weight = next(iter(self._folded.values())).w
        if self._weight.is_cuda:
            self._done = torch.cuda.Event()  # the last use of weights or static buffers that a stream must wait for
            self._done.record(torch.cuda.current_stream(self._weight.device))
            self._graphs = _graph_memory(self._weight.device)

    def _adopt(self, step: Aten) -> None:
        if step.kind in ("module", "norm"):
            layer: Any = copy.deepcopy(self.get_submodule(step.name)).to(self.dtype)
            if hasattr(layer, "inplace"):
                layer.inplace = False
            self._layers[step.name] = layer
        for attr in leaves((step.args, step.kwargs)):
            if isinstance(attr, Attr):
                owner, _, name = attr.path.rpartition(".")
                tensor = getattr(self.get_submodule(owner), name).detach()
                self._layers[attr.path] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _pack(self, conv: Conv) -> folded.Folded:
        w, shift = self._unit(conv.unit)
        if conv.absorbed is not None:
            shift = shift + self._unit(conv.absorbed)[1]
        added = None if conv.bare or not shift.any() else shift
        if conv.quantised is not None:
            return quantised.pack(w, added, conv.quantised.x)
        return folded.pack(w, added, self.dtype, conv.name)

    def _unit(self, unit: Any) -> tuple[Tensor, Tensor]:
        norm = None if unit.norm is None else self.get_submodule(unit.norm)
        layer = unit.conv if unit.norm is None else f"{unit.conv} + {unit.norm}"
        return folded.fold(self.get_submodule(unit.conv), norm, layer)  # type: ignore[arg-type]

    def _forget(self) -> None:
        if any(program.graph is not None for program in self._programs.values()):
            torch.cuda.synchronize(self._weight.device)  # a stream may still read what is freed now
        self._programs.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Optimized:
        parameter = next(self.parameters())
        if fn(parameter.new_empty(0)).dtype != parameter.dtype:
            raise TypeError(f"an optimized net stays in {self.dtype}; call optimize(model, dtype=...) on the original")
        super()._apply(fn, recurse)
        self._fold()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if small := self._eight_bits():
            raise RuntimeError(
                f"the activation scales of this {small} net belong to the weights they were calibrated with; "
                "load the state_dict into the original and optimize it again"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def _eight_bits(self) -> str | None:
        """The name of the 8-bit dtype that convolutions are in; None where there is none."""
        grids = (conv.quantised.x for step in self._steps for conv in convs(step) if conv.quantised is not None)
        return next(("float8" if grid.dtype == FLOAT8 else "int8" for grid in grids), None)

    def __getstate__(self) -> dict[str, Any]:
        derived = {
            "_lock",
            "_programs",
            "_image_bytes",
            "_folded",
            "_packings",
            "_layers",
            "_unbound",
            "_weight",
            "_done",
            "_graphs",
        }
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    # One call.

    def _given(self, x: Tensor) -> Tensor:
        """x as a plain tensor, where it is fit for the net."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"input [N, C, H, W] of a floating dtype expected, got {getattr(x, 'dtype', type(x))}")
        if x.dim() != 4:
            raise ValueError(f"input [N, C, H, W] expected, got shape {list(x.shape)}")
        if x.device != self._weight.device:
            raise ValueError(f"the net is on {self._weight.device}, the input on {x.device}")
        # A class that only carries more with it, as a torchvision.tv_tensors.Image; one that computes stays what it is.
        carries = type(x) is not Tensor and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        return x.as_subclass(Tensor) if carries else x

    def _recorded(self, x: Tensor) -> Tensor:
        """The answer in PyTorch's operations on x [N, C, H, W], whose sizes may be symbols."""
        if small := self._eight_bits():
            raise RuntimeError(
                f"this {small} net can't be traced, exported, compiled or transformed; for that, optimize the original "
                "in a floating dtype"
            )
        with torch.no_grad(), _without_autocast(x):
            return self._unbound.definition(x.to(self.dtype))

    def _nhwc(self, x: Tensor) -> Tensor:
        return nhwc(x.to(self.dtype, memory_format=torch.channels_last))

    def _program(self, x: Tensor) -> tuple[Program, Tensor | None]:
        """The plan bound for inputs like x, and its answer to x if it had to be bound now. Under the lock."""
        self._compare(x)
        if x.is_cuda:
            cudnn = torch.backends.cudnn
            switches: Any = cudnn.enabled, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
        else:
            mkldnn: Any = torch.backends.mkldnn
            switches = mkldnn.enabled, mkldnn.conv.fp32_precision, torch.get_num_threads()
            switches += (torch.are_deterministic_algorithms_enabled(),)
        key = (tuple(x.shape), dispatch.choice(self.dtype, x.device), switches)
        if (program := self._programs.get(key)) is not None:
            self._programs.move_to_end(key)
            return program, None
        while len(self._programs) >= MAX_SHAPES:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            self._programs.popitem(last=False)
        program = self._new_program()
        first = program.bind(self._nhwc(x))
        self._programs[key] = program
        if _is_plain(x):
            self._image_bytes[tuple(x.shape[1:])] = program.most_bytes() / len(x)
        return program, first

    def _new_program(self) -> Program:
        return Program(self._steps, self._output, self._folded, self._layers, self.dtype, self._packings)

    def _compare(self, x: Tensor) -> None:
        """Once: whether the plan answers as the original does, to two random images of x's size, or to as many as in x
        (16 at most) where it doesn't take two; both on the CPU in float64, where all that differs is rounding. Raises
        ValueError if it doesn't. Where the original can't run so, nothing is compared."""
        (original,) = self._original
        if original is None or not _is_plain(x):
            return
        memo = {id(t): _exact(t) for t in (*original.parameters(), *original.buffers())}
        model = copy.deepcopy(original, memo)
        steps = [part for step in self._steps for part in (step.parts if isinstance(step, Chain) else (step,))]
        plan = Optimized(model, steps, self._output, torch.float64, cuda_graph=False)
        chance = torch.Generator().manual_seed(0)
        for n in dict.fromkeys((min(2, len(x)), min(len(x), _MOST_COMPARED))):
            images = torch.randn(n, *x.shape[1:], dtype=torch.float64, generator=chance)
            try:
                with _plain_mode(images), dispatch.backend("reference"):
                    want = model(images.clone())
            except Exception:  # of another number of images, or whatever the model has on a GPU alone
                continue
            with dispatch.backend("reference"):
                got = plan(images)
            if (found := _difference(got, want)) is not None:
                raise ValueError(
                    f"the plan of {self._title} doesn't answer as {self._title} does ({found}). Its code may take "
                    "another way on a tensor than on the stand-in it was traced with; otherwise please report this. A "
                    "ResNet inside it runs fused after fastres.convert(model)"
                )
            break
        self._original = (None,)

    def _on_cpu(self, x: Tensor, settles_after: int = SETTLED_AFTER) -> Tensor:
        """settles_after: so many calls of a shape before TorchScript compiles it."""
        plain, fused = _is_plain(x), dispatch.optimizes_by_onednn(self.dtype, x.device)
        x = x.to(self.dtype)  # in which a finite number may be infinite
        finite = not plain or bool(x.sum(dtype=torch.float32).isfinite())
        if not finite and self._eight_bits() == "int8":
            return self._without_broken(x)
        if not fused:
            return self._on_steps(x)
        if not (plain and finite):  # oneDNN's ReLU makes 0 of NaN, and infinity becomes NaN in a sum
            with dispatch.backend("reference"):
                return self._on_steps(x)
        onednn.keep_heap()
        answers = [self._on_steps(part, settles_after) for part in self._slices(x)]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _without_broken(self, x: Tensor) -> Tensor:
        """The answer to x in int8, NaN for images that aren't finite; for all, where they may depend on each other."""
        broken = ~x.isfinite().flatten(1).all(1)
        y = self._on_steps(x.nan_to_num(0.0, 0.0, 0.0))
        return y.index_fill_(0, broken.nonzero().flatten(), math.nan) if self._by_image else y.fill_(math.nan)

    def _on_steps(self, x: Tensor, settles_after: int | None = None) -> Tensor:
        with self._lock:
            program, first = self._program(x)
            if settles_after is not None:
                program.calls += 1
                if program.calls > settles_after and not program.settled:
                    compiles = self.torchscript and not torch.are_deterministic_algorithms_enabled()
                    program.settle(self._nhwc(x), compiles)
        return program.run(self._nhwc(x)) if first is None else first

    def _slices(self, x: Tensor) -> Iterator[Tensor]:
        """x [N, C, H, W] in slices of so many images that what is alive at once stays within `ALIVE`, where the plan
        treats each image by itself."""
        if not self._by_image:
            yield x
            return
        size, known = tuple(x.shape[1:]), 0
        if size not in self._image_bytes:
            known = min(_TRIED, len(x))
            yield x[:known]
        if known < len(x):
            most = max(1, int(ALIVE / self._image_bytes[size]))
            yield from x[known:].tensor_split(-(-(len(x) - known) // most))

    def _on_cuda(self, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream()
        if torch.cuda.is_current_stream_capturing():  # somebody else's graph takes the steps one by one
            with self._lock:
                program, first = self._program(x)
            return program.run(self._nhwc(x)) if first is None else first
        with self._lock:
            stream.wait_event(self._done)
            program, first = self._program(x)
            if self.cuda_graph and x.numel():
                if program.graph is None:
                    self._capture(program, x)
                result = program.replay(x)
                self._done.record(stream)
                return result
        return program.run(self._nhwc(x)) if first is None else first

    def _capture(self, program: Program, x: Tensor) -> None:
        try:
            program.capture(self._nhwc(x), *self._graphs)
        except BaseException:  # torch never ends recording into the pool of a capture that failed
            self._graphs = _graph_memory(x.device)
            raise


def _is_recorded(x: Tensor) -> bool:
    """Whether something records, traces or transforms what is done with x."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _is_plain(x: Tensor) -> bool:
    """Whether a call is no more than that: of at least one image, and not in somebody's CUDA graph."""
    return x.numel() > 0 and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _exact(tensor: Tensor) -> Tensor:
    """A parameter or buffer, on the CPU, in float64 if it is floating."""
    copied = tensor.detach().cpu()
    copied = copied.double() if copied.is_floating_point() else copied.clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _difference(got: Tensor, want: Any) -> str | None:
    """In what the answers differ, beyond rounding in float64; None in nothing."""
    if not isinstance(want, Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        told = f"{list(want.shape)} in {want.dtype}" if isinstance(want, Tensor) else type(want).__name__
        return f"{list(got.shape)} in {got.dtype} instead of {told}"
    most = float(want.nan_to_num().abs().max()) if want.numel() else 0.0
    if torch.allclose(got, want, rtol=0.0, atol=1e-6 * max(most, 1.0), equal_nan=True):
        return None
    return f"off by {float((got - want).abs().max()):.2g}, its largest value is {most:.2g}"


def _graph_memory(device: torch.device) -> tuple[Any, torch.cuda.Stream]:
    """The pool that graphs share, and the stream they are all captured on."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


def _refold(net: Optimized, incompatible: Any) -> None:
    net._fold()


@contextmanager
def _plain_mode(x: Tensor) -> Iterator[None]:
    """On x's device, with no gradients, no autocast and no inference mode (buffers kept between calls must be ordinary
    tensors)."""
    off = nullcontext()
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else off
    device = torch.cuda.device_of(x) if x.is_cuda else off
    with _without_autocast(x), inference, device, torch.no_grad():
        yield


def _without_autocast(x: Tensor) -> Any:
    """A context in which no library call casts to a dtype of its own. Where none would, a tracer sees no change."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
