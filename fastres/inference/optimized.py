"""`Optimized`: the module that `optimize` returns. It stores the folded weights and one bound program per input shape.

BatchNorm is folded into the weights once, in float64. For each input shape, the steps of the plan are bound to the
engines that `fastres.ops.dispatch` chooses. This is all that a shape costs at first. The net is prepared for a shape by
`ready`, or in the call after `PREPARED_AFTER` others with that shape: only then are engines timed, is a CUDA graph
captured (unless `cuda_graph` is False) or does TorchScript compile.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.inference.plan import (
    Aten,
    Conv,
    ModelTensor,
    Outputs,
    Pair,
    Place,
    Step,
    by_image,
    convs,
    leaves,
    mapped,
    unchained,
)
from fastres.inference.program import Bound, Program
from fastres.ops import dispatch, folded, onednn, quantised
from fastres.ops.layout import nhwc
from fastres.ops.quantised import FLOAT8

MAX_SHAPES = 8  # programs kept per net, of those that are prepared and of the others (LRU)
PREPARED_AFTER = {"cpu": 10, "cuda": 2}  # calls with a shape, after which it is worth preparing the net for it
# Calls between two preparations, once `MAX_SHAPES` shapes are prepared. Otherwise nine shapes that come in turns would
# drop a program in each call.
REPLACED_AFTER = 1000
# Limit on the bytes of all values alive at the same time on a CPU: about the size of a large cache. It also keeps each
# value small enough for glibc's heap, which reuses freed memory (see `onednn.HEAP_BLOCK`).
MAX_ALIVE_BYTES = 32 * 2**20
FIRST_SLICE = 4  # images that run at first, to learn how many bytes one image takes
MAX_KNOWN = 64  # image sizes of which the net remembers that, and shapes whose calls it counts (LRU)
_MAX_COMPARED = 16  # largest batch in the comparison with the model, if the model fails on a batch of two
# Attributes that are rebuilt after a copy or an unpickling instead of being stored.
_DERIVED = {"_lock", "_programs", "_image_bytes", "_folded", "_layers", "_unbound", "_bound", "_weight"}
_DERIVED |= {"_dropped", "_calls", "_since"}
_DERIVED |= {"_last_use", "_graph_memory"}  # on a GPU


def batch_inputs(batches: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the input of each batch: the batch itself if it is a tensor, else its first item."""
    for batch in batches:
        yield batch if isinstance(batch, Tensor) else batch[0]


class Optimized(nn.Module):
    """The module that `optimize` returns. It has a copy of the model's submodules, parameters and buffers.

    Its `state_dict` therefore has the model's names and shapes. It also has the model's public attributes that are
    neither tensors nor callable, such as a detection backbone's `out_channels` or timm's `feature_info`.

    Calls compute with the folded weights. Loading a whole state dict of the model folds the weights again, and so does
    moving the net to another device. Loading into a submodule or writing into a weight does not fold them, so the
    results stay the same. deepcopy and pickle work.

    Bound programs are cached. The key is the input shape, the `backend` in force, and the switches of PyTorch that
    affect the arithmetic: on a GPU TF32, cuDNN and deterministic algorithms, on a CPU oneDNN, the number of threads and
    deterministic algorithms.
    """

    dtype: torch.dtype

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[Step],
        outputs: Outputs,
        dtype: torch.dtype,
        cuda_graph: bool,
        torchscript: bool = False,
        *,
        compared: bool = False,
    ) -> None:
        """Adopt the modules, parameters and buffers of `model` without copying them, freeze them, and fold the weights.

        steps: the plan. outputs: what it returns. dtype: the dtype of all steps that are
        not quantised, and of the result. cuda_graph, torchscript: as for `optimize`. compared: whether to compare the
        plan with `model` before the first result.
        """
        super().__init__()
        self.__dict__ |= _carried(model)
        self._uncompared = (model if compared else None,)  # in a tuple, so that it does not become a submodule
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            setattr(self, name, getattr(model, name))
        self.requires_grad_(False)
        self.training = False
        self.dtype = dtype
        self.cuda_graph, self.torchscript = cuda_graph, torchscript
        self._steps = list(steps)
        self._outputs = outputs
        self._model_name = type(model).__name__
        self._by_image = by_image(steps, model)
        self.register_load_state_dict_post_hook(_refold)
        self._reset()

    def forward(self, x: Tensor) -> Any:
        """Return what the model returns for x [N, C, H, W], with tensors in `self.dtype`.

        x has any floating dtype and memory format and is on the device of the weights. Raises TypeError for any other
        dtype, ValueError for another number of dimensions or another device.
        """
        x = self._checked(x)
        if _is_being_recorded(x):
            return self._run_recorded(x)
        with _plain_mode(x):
            return self._outputs.filled(self._on_cuda(x) if x.is_cuda else self._on_cpu(x))

    def ready(self, example: Tensor) -> None:
        """Prepare the net for inputs of `example`'s shape, so that the next call with this shape runs at full speed.

        Engines are chosen and kernels compiled. On a GPU, engines are timed where that is open, and a CUDA graph is
        captured if `cuda_graph` is True. On a CPU, weights are packed for this shape, and TorchScript compiles the plan
        if `torchscript` is True. Without `ready`, this happens in the third call with a shape on a GPU, and in the
        eleventh on a CPU.
        """
        x = self._checked(example)
        with _plain_mode(x):
            (self._on_cuda if x.is_cuda else self._on_cpu)(x, calls=math.inf)

    def explain(self, shape: Sequence[int] | None = None) -> str:
        """Return a table of the plan's steps: layer, output shape, engine, and the reason for that engine.

        If programs have been dropped because of other shapes, a last line counts them.

        shape: describe the plan for inputs of this shape [N, C, H, W]; by default, the plan that was used last. Raises
        ValueError if the net has not been called with such an input yet.
        """
        with self._lock:
            programs = [p for key, p in self._programs.items() if shape is None or key[0] == tuple(shape)]
            dropped = self._dropped.copy()
        if not programs:
            known = ", ".join(str(list(key[0])) for key in self._programs)
            wanted = f" for shape {list(shape)} (known shapes: {known})" if shape and known else ""
            raise ValueError(f"no plan yet{wanted}; call the net on a batch first")
        small = self._small_dtype()
        convolutions = f" with {small} convolutions" if small else ""
        text = f"{self._model_name} in {self.dtype}{convolutions}, {programs[-1].how_it_runs()}\n{programs[-1].table()}"
        if dropped:
            text += f"\ndropped since for other shapes: {dropped[True]} prepared programs, {dropped[False]} others"
        return text

    def agreement(self, model: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> float:
        """Return the share of images, from 0 to 1, for which the net and `model` have the same top-1 class.

        batches: tensors [N, C, H, W] or (tensor, ...) tuples. `model` gets each batch in the dtype and on the device of
        its first parameter, or unchanged if it has none. Raises ValueError if there are no images, or if the net
        returns something else than one tensor.
        """
        if not isinstance(self._outputs.structure, Place):
            kind = type(self._outputs.structure).__name__
            raise ValueError(f"agreement() compares the classes of images, but {self._model_name} returns a {kind}")
        same = total = 0
        for x in batch_inputs(batches):
            like = next(model.parameters(), x) if isinstance(model, nn.Module) else x
            with torch.no_grad():
                theirs = model(x.to(like.device, like.dtype)).argmax(1)
            ours = self(x.to(self._weight.device)).argmax(1)
            same += int((ours == theirs.to(ours.device)).sum())
            total += len(x)
        if not total:
            raise ValueError("batches contain no images to compare on")
        return same / total

    def train(self, mode: bool = True) -> Optimized:
        """Raise RuntimeError for mode=True; mode=False, as in `eval()`, does nothing."""
        if mode:
            raise RuntimeError("an optimized net is frozen for inference; train the original and optimize it again")
        return self

    def extra_repr(self) -> str:
        return f"optimized {self._model_name}, dtype={self.dtype}"

    def observed(self, x: Tensor, observer: Callable[[str, Any], None]) -> Any:
        """Return `forward(x)`, run step by step, and call `observer(name, value)` for every value.

        The values are the input and the outputs of the steps.

        Later steps may overwrite a value in place, so the observer must copy what it keeps.
        """
        x = self._checked(x)
        with _plain_mode(x), self._lock:
            return self._outputs.filled(self._program_for(x)[0].run(self._nhwc(x), observer))

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._image_bytes: OrderedDict[Any, float] = OrderedDict()  # image size (C, H, W) -> peak bytes per image
        self._fold()

    def _fold(self) -> None:
        self._drop_programs()
        self._folded: dict[str, folded.Folded] = {}
        self._layers: dict[str, Any] = {}  # path -> module or tensor that an `Aten` step uses, in `dtype`
        for step in self._steps:
            if isinstance(step, Aten):
                self._convert(step)
            for conv in convs(step):
                self._folded[conv.out] = self._pack(conv)
        self._unbound = Program(self._steps, self._outputs, self._folded, self._layers, self.dtype, onednn.Packings())
        self._bound: dict[Any, dict[Any, Bound]] = {}  # settings of the process -> steps that programs share
        self._weight = next(iter(self._folded.values())).w
        if self._weight.is_cuda:
            # Recorded after the fold and after each replay. The stream of every call waits for it, because the call
            # uses the same weights and, in a replay, the graph's static input and output.
            self._last_use = torch.cuda.Event()
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
            torch.cuda.synchronize(self._weight.device)  # a replay on some stream may still use the memory freed here
        self._programs.clear()
        self._dropped: Counter[bool] = Counter()  # whether prepared -> programs dropped because of other shapes
        self._calls: OrderedDict[Any, float] = OrderedDict()  # key of a program -> calls that wanted it
        self._since = 0  # calls since the net was prepared for a shape

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
                "load the state_dict into the original model and optimize it again"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def _small_dtype(self) -> str | None:
        """Return "float8" or "int8" if the plan has convolutions in that dtype, else None."""
        grids = (conv.quantised.x for step in self._steps for conv in convs(step) if conv.quantised is not None)
        return next(("float8" if grid.dtype == FLOAT8 else "int8" for grid in grids), None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def _checked(self, x: Tensor) -> Tensor:
        """Return x, unwrapped if it is a tensor subclass that only carries metadata.

        Raises TypeError or ValueError if the net can't take x.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the input must have a floating dtype, got {getattr(x, 'dtype', type(x))}")
        if x.dim() != 4:
            raise ValueError(f"the input must be [N, C, H, W], got shape {list(x.shape)}")
        if x.device != self._weight.device:
            raise ValueError(f"the net is on {self._weight.device}, but the input is on {x.device}")
        # torchvision.tv_tensors.Image, for example, only carries metadata. A subclass with its own __torch_dispatch__
        # changes what operations do, so it stays.
        carries = type(x) is not Tensor and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        return x.as_subclass(Tensor) if carries else x

    def _run_recorded(self, x: Tensor) -> Any:
        """Return the output for x [N, C, H, W], computed by PyTorch operations only. The sizes of x may be symbolic.

        Raises RuntimeError for a float8 or int8 net.
        """
        if small := self._small_dtype():
            raise RuntimeError(
                f"this {small} net can't be traced, exported, compiled or transformed; to do so, optimize the original "
                "model in a 16-, 32- or 64-bit dtype"
            )
        with torch.no_grad(), _without_autocast(x):
            return self._outputs.filled(self._unbound.definition(x.to(self.dtype)))

    def _nhwc(self, x: Tensor) -> Tensor:
        return nhwc(x.to(self.dtype, memory_format=torch.channels_last))

    def _program_for(self, x: Tensor, calls: float = 0) -> tuple[Program, list[Tensor] | None]:
        """Return the bound program for inputs like x, and its outputs for x if this call had to bind it (else None).

        calls: how many calls with x's shape this one counts for. After `PREPARED_AFTER`, the program is prepared; so
        infinity prepares it now, and 0 never does. The caller must hold the lock.
        """
        self._compare(x)
        if x.is_cuda:
            cudnn = torch.backends.cudnn
            switches: Any = cudnn.enabled, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
        else:
            mkldnn: Any = torch.backends.mkldnn
            switches = mkldnn.enabled, mkldnn.conv.fp32_precision, torch.get_num_threads()
            switches += (torch.are_deterministic_algorithms_enabled(),)
        key = (tuple(x.shape), dispatch.choice(self.dtype, x.device), switches)
        program, answer = self._programs.get(key), None
        self._since += 1
        total = calls + self._calls.get(key, 0.0)
        _remember(self._calls, key, total)
        often = calls > 0 and total > PREPARED_AFTER["cuda" if x.is_cuda else "cpu"]
        room = len(self._alike(prepared=True)) < MAX_SHAPES
        prepared = often and (room or self._since >= REPLACED_AFTER or math.isinf(calls))
        if program is None or (prepared and not program.prepared):
            program = self._unbound.unbound()
            answer = program.bind(self._nhwc(x), prepared, self._bound.setdefault(key[1:], {}))
            if prepared:
                self._finish(program, x)
                self._since = 0
            self._programs[key] = program
            self._programs.move_to_end(key)
            self._drop_beyond(x)
            if _is_plain(x):
                _remember(self._image_bytes, tuple(x.shape[1:]), program.most_bytes() / len(x))
        else:
            self._programs.move_to_end(key)
        return program, answer

    def _finish(self, program: Program, x: Tensor) -> None:
        """Let TorchScript compile a prepared program, or capture it as a CUDA graph, for x [N, C, H, W]."""
        if not x.is_cuda:
            if self.torchscript and not torch.are_deterministic_algorithms_enabled():
                program.compile(self._nhwc(x))
        elif self.cuda_graph:
            try:
                program.capture(self._nhwc(x), *self._graph_memory)
            except BaseException:  # PyTorch never stops recording into the pool of a failed capture: use a new pool
                self._graph_memory = _new_graph_memory(x.device)
                raise

    def _alike(self, prepared: bool) -> list[Any]:
        """Return the keys of the programs that are prepared, or of those that are not, by their last use."""
        return [key for key, program in self._programs.items() if program.prepared is prepared]

    def _drop_beyond(self, x: Tensor) -> None:
        """Drop what was used least recently beyond `MAX_SHAPES` prepared programs, and as many others.

        So inputs of ever new shapes never drop a prepared program.
        """
        for prepared in (False, True):
            for key in self._alike(prepared)[:-MAX_SHAPES]:
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                del self._programs[key]
                self._dropped[prepared] += 1
                if prepared:
                    self._calls.pop(key, None)
                if prepared and self._dropped[prepared] == MAX_SHAPES:
                    warnings.warn(
                        f"this optimized {self._model_name} has dropped {MAX_SHAPES} prepared programs for other input "
                        f"shapes (the last one for {list(key[0])}). It keeps {MAX_SHAPES}, and inputs of other shapes "
                        "run step by step. Pad images and batches to fewer sizes",
                        RuntimeWarning,
                        stacklevel=2,
                    )

    def _compare(self, x: Tensor) -> None:
        """Raise ValueError if the plan and the original model give different outputs.

        Both run on the CPU in float64, where only rounding may differ, on random images of x's size (C, H, W). The
        batch has two images (one if x has one). If the model raises an exception for it, the batch size of x is tried,
        limited to 16. If the model fails again, nothing is compared. Later calls skip the comparison once it has passed
        or proved impossible. An empty x, or one under CUDA graph capture, postpones it.
        """
        (original,) = self._uncompared
        if original is None or not _is_plain(x):
            return
        memo = {id(t): _in_float64(t) for t in (*original.parameters(), *original.buffers())}
        model = copy.deepcopy(original, memo).eval()  # `freeze._copied` says why
        plan = Optimized(model, unchained(self._steps), self._outputs, torch.float64, cuda_graph=False)
        chance = torch.Generator().manual_seed(0)
        for n in dict.fromkeys((min(2, len(x)), min(len(x), _MAX_COMPARED))):
            images = torch.randn(n, *x.shape[1:], dtype=torch.float64, generator=chance)
            try:
                with _plain_mode(images), dispatch.backend("reference"):
                    want = model(images.clone())
            except Exception:  # the model needs another batch size, or an operation that only a GPU has
                continue
            with dispatch.backend("reference"):
                got = plan(images)
            if (difference := _difference(got, want)) is not None:
                name = self._model_name
                raise ValueError(
                    f"the plan of {name} gives other results than {name} ({difference}). Its code may behave "
                    "differently on a tensor than on the proxy it was traced with; if not, please report this. To run "
                    "a ResNet inside the model on fused kernels, use fastres.convert(model)"
                )
            break
        self._uncompared = (None,)

    def _on_cpu(self, x: Tensor, calls: float = 1) -> list[Tensor]:
        """Return the outputs for x on a CPU. calls: as for `_program_for`."""
        plain, fused = _is_plain(x), dispatch.optimizes_by_onednn(self.dtype, x.device)
        x = x.to(self.dtype)  # may overflow to infinity, so check afterwards
        finite = not plain or bool(x.sum(dtype=torch.float32).isfinite())
        if not finite and self._small_dtype() == "int8":
            return self._with_nan_for_broken(x)
        if not fused:
            return self._on_steps(x)
        if not (plain and finite):  # infinity can become NaN in a sum, and oneDNN's ReLU turns NaN into 0
            with dispatch.backend("reference"):
                return self._on_steps(x)
        onednn.keep_heap()
        sizes: set[int] = set()  # of slices: however many there are, this is one call
        answers: list[list[Tensor]] = []
        for part in self._slices(x):
            answers.append(self._on_steps(part, 0 if len(part) in sizes else calls))
            sizes.add(len(part))
        return answers[0] if len(answers) == 1 else [torch.cat(parts) for parts in zip(*answers, strict=True)]

    def _with_nan_for_broken(self, x: Tensor) -> list[Tensor]:
        """Return the int8 outputs for x, with NaN for every image that is not finite.

        If the plan may mix the images of a batch, the outputs are NaN for all of them.
        """
        broken = ~x.isfinite().flatten(1).all(1)
        answers = self._on_steps(x.nan_to_num(0.0, 0.0, 0.0))
        for y in answers:
            if self._by_image:
                y.index_fill_(0, broken.nonzero().flatten(), math.nan)
            elif y.is_floating_point():  # unlike a buffer of integers that the model returns
                y.fill_(math.nan)
        return answers

    def _on_steps(self, x: Tensor, calls: float = 0) -> list[Tensor]:
        with self._lock:
            program, answer = self._program_for(x, calls)
        return program.run(self._nhwc(x)) if answer is None else answer

    def _slices(self, x: Tensor) -> Iterator[Tensor]:
        """Split x [N, C, H, W] along N, so that the values alive at the same time stay within `MAX_ALIVE_BYTES`.

        x stays whole if the plan may mix the images of a batch.
        """
        if not self._by_image:
            yield x
            return
        if not self._image_bytes:
            self._on_steps(x[:FIRST_SLICE])
        most = max(1, int(MAX_ALIVE_BYTES / self._bytes_of(tuple(x.shape[1:]))))
        yield from x.tensor_split(-(-len(x) // most))

    def _bytes_of(self, size: tuple[int, ...]) -> float:
        """Return the peak bytes of an image of this size (C, H, W); scaled from the largest known one if it is new."""
        with self._lock:
            if size in self._image_bytes:
                self._image_bytes.move_to_end(size)
                return self._image_bytes[size]
            largest = max(self._image_bytes, key=math.prod)
            return self._image_bytes[largest] * math.prod(size) / math.prod(largest)

    def _on_cuda(self, x: Tensor, calls: float = 1) -> list[Tensor]:
        """Return the outputs for x on a GPU. calls: as for `_program_for`."""
        stream = torch.cuda.current_stream()
        in_a_capture = torch.cuda.is_current_stream_capturing()  # the caller's graph records the single steps
        with self._lock:
            if not in_a_capture:
                stream.wait_event(self._last_use)
            program, answer = self._program_for(x, calls if _is_plain(x) else 0)
            if self.cuda_graph and program.graph is not None and not in_a_capture:
                result = program.replay(x)
                self._last_use.record(stream)
                return result
        return program.run(self._nhwc(x)) if answer is None else answer


def _carried(model: nn.Module) -> dict[str, Any]:
    """Return the public attributes of `model` that only describe it, such as a backbone's `out_channels`."""
    public = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return {
        name: value
        for name, value in public.items()
        if not (hasattr(Optimized, name) or callable(value) or isinstance(value, (Tensor, fx.Graph)))
    }


def _is_being_recorded(x: Tensor) -> bool:
    """Return whether operations on x are being traced, compiled, transformed or otherwise intercepted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _is_plain(x: Tensor) -> bool:
    """Return whether a call with x is ordinary: x is not empty, and the caller is not capturing a CUDA graph."""
    return x.numel() > 0 and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _remember(known: OrderedDict[Any, float], key: Any, value: float) -> None:
    """Set known[key] as the newest of at most `MAX_KNOWN` entries."""
    known[key] = value
    known.move_to_end(key)
    while len(known) > MAX_KNOWN:
        known.popitem(last=False)


def _in_float64(tensor: Tensor) -> Tensor:
    """Return a parameter or buffer detached and on the CPU, in float64 if it has a floating dtype."""
    copied = tensor.detach().cpu()
    copied = copied.double() if copied.is_floating_point() else copied.clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _difference(got: Any, want: Any) -> str | None:
    """Describe how two results of a net differ by more than rounding in float64; None if they do not."""
    ours, theirs = (str(mapped(result, _described)) for result in (got, want))
    if ours != theirs:
        return f"{ours} instead of {theirs}"
    for y, right in zip(leaves(got), leaves(want), strict=True):
        if isinstance(right, Tensor) and not _is_close(y, right):
            return f"off by {float((y - right).abs().max()):.2g}, its largest value is {float(right.abs().max()):.2g}"
    return None


def _described(leaf: Any) -> Any:
    return f"{list(leaf.shape)} in {leaf.dtype}" if isinstance(leaf, Tensor) else leaf


def _is_close(y: Tensor, want: Tensor) -> bool:
    y, want = y.double(), want.double()  # a buffer that the model returns may be of integers or booleans
    most = float(want.nan_to_num().abs().max()) if want.numel() else 0.0
    return torch.allclose(y, want, rtol=0.0, atol=1e-6 * max(most, 1.0), equal_nan=True)


def _new_graph_memory(device: torch.device) -> tuple[Any, torch.cuda.Stream]:
    """Return the memory pool that the net's graphs share, and the stream on which all of them are captured."""
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


def _refold(net: Optimized, incompatible: Any) -> None:
    net._fold()


@contextmanager
def _plain_mode(x: Tensor) -> Iterator[None]:
    """Run on x's device without gradients, autocast and inference mode.

    Inference mode is off because buffers that are kept between calls must be ordinary tensors.
    """
    off = nullcontext()
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else off
    device = torch.cuda.device_of(x) if x.is_cuda else off
    with _without_autocast(x), inference, device, torch.no_grad():
        yield


def _without_autocast(x: Tensor) -> Any:
    """Return a context without autocast.

    If autocast is off already, the context does nothing, so that a tracer records nothing for it.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
