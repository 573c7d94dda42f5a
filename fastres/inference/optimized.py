"""`Optimized`: the module that `optimize` returns. It keeps the folded weights, and a bound program per input shape.

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
from typing import Any

import torch
from torch import Tensor, nn

from fastres.inference.plan import Aten, Conv, ModelTensor, Pair, Step, by_image, convs, leaves, unchained
from fastres.inference.program import Program
from fastres.ops import dispatch, folded, onednn, quantised
from fastres.ops.layout import nhwc
from fastres.ops.quantised import FLOAT8

MAX_SHAPES = 8  # bound plans kept per net, least recently used dropped first
SPECIALISED_AFTER = 10  # calls of one shape on a CPU, then compiling it is worth the time
MAX_ALIVE_BYTES = 32 * 2**20  # of values at once on a CPU: what a large cache holds, and glibc's heap keeps
FIRST_SLICE = 4  # images of a new size, to see how many bytes they take
_MAX_COMPARED = 16  # images, where a net asks for its number of them
_DERIVED = {"_lock", "_programs", "_image_bytes", "_folded", "_packings", "_layers", "_unbound", "_weight"}
_DERIVED |= {"_last_use", "_graph_memory"}  # on a GPU


def batch_inputs(batches: Iterable[Any]) -> Iterator[Tensor]:
    """The input of each batch: a tensor, or the first of a tuple."""
    for batch in batches:
        yield batch if isinstance(batch, Tensor) else batch[0]


class Optimized(nn.Module):
    """What `optimize` returns. Its submodules, parameters, buffers and `state_dict` are a copy of the original's.

    Loading a state_dict of the original folds again, and so does moving to another device; loading into a part of it,
    or writing into its weights, doesn't. deepcopy and pickle work.
    Plans are kept per input shape, `backend` in force and numerical switches of PyTorch's (TF32, cuDNN, deterministic).
    """

    dtype: torch.dtype

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[Step],
        output: str,
        dtype: torch.dtype,
        cuda_graph: bool,
        torchscript: bool = False,
        *,
        compared: bool = False,
    ) -> None:
        """model: whose modules become the net's. compared: whether the first call holds its answer against model's."""
        super().__init__()
        self._uncompared = (model if compared else None,)  # in a tuple, or it would become a submodule
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(self, name, getattr(model, name))
        self.requires_grad_(False)
        self.training = False
        self.dtype = dtype
        self.cuda_graph, self.torchscript = cuda_graph, torchscript
        self._steps = list(steps)
        self._output = output
        self._model_name = type(model).__name__
        self._by_image = by_image(steps, model)
        self.register_load_state_dict_post_hook(_refold)
        self._reset()

    def forward(self, x: Tensor) -> Tensor:
        """The original's answer in `dtype` to x [N, C, H, W]: x in any floating dtype, on the weights' device."""
        x = self._checked(x)
        if _is_being_recorded(x):
            return self._run_recorded(x)
        with _plain_mode(x):
            return self._on_cuda(x) if x.is_cuda else self._on_cpu(x)

    def ready(self, example: Tensor) -> None:
        """Make what calls with inputs of `example`'s shape need: engines, kernels, a CUDA graph, or TorchScript on a
        CPU, without waiting for ten calls."""
        self(example)
        if not example.is_cuda:
            with _plain_mode(example):
                self._on_cpu(self._checked(example), specialises_after=0)

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
        small = self._small_dtype()
        convolutions = f" with {small} convolutions" if small else ""
        return f"{self._model_name} in {self.dtype}{convolutions}, {programs[-1].how_it_runs()}\n{programs[-1].table()}"

    def agreement(self, model: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> float:
        """The share of images in `batches` (tensors or (tensor, ...) tuples) with the same top-1 class as `model`'s.

        `model` is given each batch in the dtype and on the device of its own parameters, if it has any.
        """
        same = total = 0
        for x in batch_inputs(batches):
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
        return f"optimized {self._model_name}, dtype={self.dtype}"

    def observed(self, x: Tensor, observer: Callable[[str, Any], None]) -> Tensor:
        """forward(x) without a graph; `observer` is shown every value by name, which later steps may overwrite."""
        x = self._checked(x)
        with _plain_mode(x), self._lock:
            return self._program_for(x)[0].run(self._nhwc(x), observer)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._image_bytes: dict[Any, float] = {}  # what an image of a size adds to the bytes alive at once
        self._fold()

    def _fold(self) -> None:
        self._drop_programs()
        self._folded: dict[str, folded.Folded] = {}
        self._packings = onednn.Packings()
        self._layers: dict[str, Any] = {}  # modules and tensors of ATen steps in `dtype`
        for step in self._steps:
            if isinstance(step, Aten):
                self._convert(step)
            for conv in convs(step):
                self._folded[conv.out] = self._pack(conv)
        self._unbound = self._new_program()
        self._weight = next(iter(self._folded.values())).w
        if self._weight.is_cuda:
            self._last_use = torch.cuda.Event()  # the last use of weights or static buffers that a stream must wait for
            self._last_use.record(torch.cuda.current_stream(self._weight.device))
            self._graph_memory = _new_graph_memory(self._weight.device)

    def _convert(self, step: Aten) -> None:
        if step.kind in ("module", "norm"):
            layer: Any = copy.deepcopy(self.get_submodule(step.name)).to(self.dtype)
            if hasattr(layer, "inplace"):
                layer.inplace = False
            self._layers[step.name] = layer
        for leaf in leaves((step.args, step.kwargs)):
            if isinstance(leaf, ModelTensor):
                tensor = leaf.of(self).detach()
                self._layers[leaf.path] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _pack(self, conv: Conv) -> folded.Folded:
        w, shift = self._fold_pair(conv.pair)
        if conv.absorbed is not None:
            shift = shift + self._fold_pair(conv.absorbed)[1]
        added = None if conv.bare or not shift.any() else shift
        if conv.quantised is not None:
            return quantised.pack(w, added, conv.quantised.x)
        return folded.pack(w, added, self.dtype, conv.name)

    def _fold_pair(self, pair: Pair) -> tuple[Tensor, Tensor]:
        norm = None if pair.norm is None else self.get_submodule(pair.norm)
        name = pair.conv if pair.norm is None else f"{pair.conv} + {pair.norm}"
        return folded.fold(self.get_submodule(pair.conv), norm, name)  # type: ignore[arg-type]

    def _drop_programs(self) -> None:
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
        if small := self._small_dtype():
            raise RuntimeError(
                f"the activation scales of this {small} net belong to the weights they were calibrated with; "
                "load the state_dict into the original and optimize it again"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def _small_dtype(self) -> str | None:
        """The name of the 8-bit dtype that convolutions are in; None where there is none."""
        grids = (conv.quantised.x for step in self._steps for conv in convs(step) if conv.quantised is not None)
        return next(("float8" if grid.dtype == FLOAT8 else "int8" for grid in grids), None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def _checked(self, x: Tensor) -> Tensor:
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

    def _run_recorded(self, x: Tensor) -> Tensor:
        """The answer in PyTorch's operations on x [N, C, H, W], whose sizes may be symbols."""
        if small := self._small_dtype():
            raise RuntimeError(
                f"this {small} net can't be traced, exported, compiled or transformed; for that, optimize the original "
                "in a floating dtype"
            )
        with torch.no_grad(), _without_autocast(x):
            return self._unbound.definition(x.to(self.dtype))

    def _nhwc(self, x: Tensor) -> Tensor:
        return nhwc(x.to(self.dtype, memory_format=torch.channels_last))

    def _program_for(self, x: Tensor) -> tuple[Program, Tensor | None]:
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
        answer = program.bind(self._nhwc(x))
        self._programs[key] = program
        if _is_plain(x):
            self._image_bytes[tuple(x.shape[1:])] = program.most_bytes() / len(x)
        return program, answer

    def _new_program(self) -> Program:
        return Program(self._steps, self._output, self._folded, self._layers, self.dtype, self._packings)

    def _compare(self, x: Tensor) -> None:
        """Once: whether the plan answers as the original does, to two random images of x's size, or to as many as in x
        (16 at most) where it doesn't take two; both on the CPU in float64, where all that differs is rounding. Raises
        ValueError if it doesn't. Where the original can't run so, nothing is compared."""
        (original,) = self._uncompared
        if original is None or not _is_plain(x):
            return
        memo = {id(t): _in_float64(t) for t in (*original.parameters(), *original.buffers())}
        model = copy.deepcopy(original, memo)
        plan = Optimized(model, unchained(self._steps), self._output, torch.float64, cuda_graph=False)
        chance = torch.Generator().manual_seed(0)
        for n in dict.fromkeys((min(2, len(x)), min(len(x), _MAX_COMPARED))):
            images = torch.randn(n, *x.shape[1:], dtype=torch.float64, generator=chance)
            try:
                with _plain_mode(images), dispatch.backend("reference"):
                    want = model(images.clone())
            except Exception:  # of another number of images, or whatever the model has on a GPU alone
                continue
            with dispatch.backend("reference"):
                got = plan(images)
            if (difference := _difference(got, want)) is not None:
                name = self._model_name
                raise ValueError(
                    f"the plan of {name} doesn't answer as {name} does ({difference}). Its code may take another way "
                    "on a tensor than on the stand-in it was traced with; otherwise please report this. A ResNet "
                    "inside it runs fused after fastres.convert(model)"
                )
            break
        self._uncompared = (None,)

    def _on_cpu(self, x: Tensor, specialises_after: int = SPECIALISED_AFTER) -> Tensor:
        """specialises_after: so many calls of a shape before TorchScript compiles it."""
        plain, fused = _is_plain(x), dispatch.optimizes_by_onednn(self.dtype, x.device)
        x = x.to(self.dtype)  # in which a finite number may be infinite
        finite = not plain or bool(x.sum(dtype=torch.float32).isfinite())
        if not finite and self._small_dtype() == "int8":
            return self._with_nan_for_broken(x)
        if not fused:
            return self._on_steps(x)
        if not (plain and finite):  # oneDNN's ReLU makes 0 of NaN, and infinity becomes NaN in a sum
            with dispatch.backend("reference"):
                return self._on_steps(x)
        onednn.keep_heap()
        answers = [self._on_steps(part, specialises_after) for part in self._slices(x)]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _with_nan_for_broken(self, x: Tensor) -> Tensor:
        """The answer to x in int8, NaN for images that aren't finite; for all, where they may depend on each other."""
        broken = ~x.isfinite().flatten(1).all(1)
        y = self._on_steps(x.nan_to_num(0.0, 0.0, 0.0))
        return y.index_fill_(0, broken.nonzero().flatten(), math.nan) if self._by_image else y.fill_(math.nan)

    def _on_steps(self, x: Tensor, specialises_after: int | None = None) -> Tensor:
        with self._lock:
            program, answer = self._program_for(x)
            if specialises_after is not None:
                program.calls += 1
                if program.calls > specialises_after and not program.specialised:
                    compiles = self.torchscript and not torch.are_deterministic_algorithms_enabled()
                    program.specialise(self._nhwc(x), compiles)
        return program.run(self._nhwc(x)) if answer is None else answer

    def _slices(self, x: Tensor) -> Iterator[Tensor]:
        """x [N, C, H, W] in slices of so many images that what is alive at once stays within `MAX_ALIVE_BYTES`, where
        the plan treats each image by itself."""
        if not self._by_image:
            yield x
            return
        size, done = tuple(x.shape[1:]), 0
        if size not in self._image_bytes:
            done = min(FIRST_SLICE, len(x))
            yield x[:done]
        if done < len(x):
            most = max(1, int(MAX_ALIVE_BYTES / self._image_bytes[size]))
            yield from x[done:].tensor_split(-(-(len(x) - done) // most))

    def _on_cuda(self, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream()
        in_a_capture = torch.cuda.is_current_stream_capturing()  # somebody else's graph takes the steps one by one
        with self._lock:
            if not in_a_capture:
                stream.wait_event(self._last_use)
            program, answer = self._program_for(x)
            if self.cuda_graph and x.numel() and not in_a_capture:
                if program.graph is None:
                    self._capture(program, x)
                result = program.replay(x)
                self._last_use.record(stream)
                return result
        return program.run(self._nhwc(x)) if answer is None else answer

    def _capture(self, program: Program, x: Tensor) -> None:
        try:
            program.capture(self._nhwc(x), *self._graph_memory)
        except BaseException:  # torch never ends recording into the pool of a capture that failed
            self._graph_memory = _new_graph_memory(x.device)
            raise


def _is_being_recorded(x: Tensor) -> bool:
    """Whether something records, traces or transforms what is done with x."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _is_plain(x: Tensor) -> bool:
    """Whether a call is no more than that: of at least one image, and not in somebody's CUDA graph."""
    return x.numel() > 0 and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _in_float64(tensor: Tensor) -> Tensor:
    """A parameter or buffer, on the CPU, in float64 if it is floating."""
    copied = tensor.detach().cpu()
    copied = copied.double() if copied.is_floating_point() else copied.clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _difference(got: Tensor, want: Any) -> str | None:
    """In what the answers differ, beyond rounding in float64; None in nothing."""
    if not isinstance(want, Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        wanted = f"{list(want.shape)} in {want.dtype}" if isinstance(want, Tensor) else type(want).__name__
        return f"{list(got.shape)} in {got.dtype} instead of {wanted}"
    most = float(want.nan_to_num().abs().max()) if want.numel() else 0.0
    if torch.allclose(got, want, rtol=0.0, atol=1e-6 * max(most, 1.0), equal_nan=True):
        return None
    return f"off by {float((got - want).abs().max()):.2g}, its largest value is {most:.2g}"


def _new_graph_memory(device: torch.device) -> tuple[Any, torch.cuda.Stream]:
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
