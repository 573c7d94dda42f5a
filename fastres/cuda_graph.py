"""`fastres.graphed`: a training step in a CUDA graph, which the host launches as a whole instead of kernel by kernel.

A replay repeats the recorded GPU work on the same memory, without running the step's Python. There are three kinds of
calls:

    warming up    runs the step eagerly on a side stream: libraries choose algorithms, the optimizer creates its state
    recording     runs the step's Python under capture; the GPU executes nothing, so there is nothing to undo
    replaying     copies inputs and existing gradients to the graph's memory, launches the graph, copies the results

Every call checks what a graph depends on. Each `_signature` (layout of inputs and gradients) has its own graph. A
change of `_facts` (addresses and values that the capture has read) drops all graphs.
"""

from __future__ import annotations

import gc
import random
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastres.ops import dispatch

WARM_UPS = 2  # calls with the same `_signature` that run eagerly before the next one is recorded
MAX_COUNTED = 64  # signatures whose calls are counted; the count of the oldest is forgotten
# Names of classes whose processes or devices wait for each other. Recorded models must not have them.
SHARED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel", "SyncBatchNorm"}
PLAIN = {bool, int, float, str, type(None), torch.dtype}
BOXES = {dict, OrderedDict, set, list}  # most attributes of a module; skipped, because a graph depends on none of them

Result = Tensor | tuple[Tensor, ...] | None


def graphed(
    step: Callable[..., Result],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    *,
    limit: int = 4,
) -> Graphed:
    """Return a callable that runs `step` eagerly twice, then records it in a CUDA graph and replays that graph.

        step = fastres.graphed(step, model, optimizer)  # step(images, labels): forward, backward, optimizer.step()
        for images, labels in loader:
            loss = step(images, labels)

    On a CPU the step is simply called. The results are those of

        def eager(*inputs):
            return step(*inputs).detach().clone()

    step: takes tensors on the model's device that do not require gradients. It returns a tensor, a tuple of tensors or
    None.
    model: the module that the step trains. Put several models into one `nn.ModuleList`.
    optimizer, scaler: those that the step calls, None for none. SGD needs fused=True. Adam and similar optimizers need
    capturable=True, and with a scaler fused=True as well.
    limit: the largest number of graphs.

    Gradients that the step leaves in `.grad` are the graph's memory, and the next call overwrites them. It is cheapest
    to call `optimizer.zero_grad()` at the end of the step, which leaves none.

    Between calls, these may change:

    - The shape, dtype or memory format of the inputs. Each combination has its own graph, e.g. a short last batch.
      Beyond `limit` graphs, the step runs eagerly with a RuntimeWarning. All graphs share one memory pool.
    - The learning rate. A call copies a Python number to the GPU in float32; the graph reads a CUDA tensor directly.
    - train() or eval(), requires_grad, weight decay, parameters or optimizer state that are now other tensors,
      autocast, a switch of torch.backends, `fastres.backend`. Such a change drops all graphs. A RuntimeWarning names
      the change, the step runs eagerly, and it is recorded again.

    All other tensors that the step reads must stay the same tensors. A Python number keeps the value that it had at the
    capture, even if the step draws it from a private random generator. Printing, hooks and other Python code of the
    step run only during the first calls.

    Raises TypeError for arguments or results of another type, and ValueError for limit < 1 or a model on several
    devices.

    Raises RuntimeError if the step can't be recorded. The model, the optimizer and the gradients are then as before the
    call. The step must not

    - wait for the GPU: `.item()`, a BatchNorm with momentum=None, a GradScaler with an optimizer that isn't fused;
    - set hyperparameters of the optimizer, for example by a scheduler: call that between steps;
    - draw random numbers from a global generator of the CPU (dropout on the GPU is fine: each replay draws new ones);
    - assign an attribute of a layer, such as a counter or a tensor (changing a buffer in place is fine);
    - change an input in place;
    - leave gradients in parameters that neither `model` nor `optimizer` has;
    - change parameters in place that are not in `optimizer`;
    - call another optimizer than `optimizer`.

    Raises ValueError for a model that works on several processes or devices (DistributedDataParallel, DataParallel,
    FSDP, SyncBatchNorm). Record forward and backward of the unwrapped model instead. After each call, average the
    gradients with `fastres.train.process.average` and call the optimizer; `torchrun ... -m fastres train --cuda-graph`
    does so.
    """
    return Graphed(step, model, optimizer, scaler, limit)


class Graphed:
    """The callable that `graphed` returns. graphs: result of `_signature` -> the graph recorded for such calls."""

    def __init__(
        self,
        step: Callable[..., Result],
        model: nn.Module,
        optimizer: Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        limit: int,
    ) -> None:
        if not callable(step):
            raise TypeError(f"step must be a function of tensors, got {type(step).__name__}")
        for name, value, kind in (("optimizer", optimizer, Optimizer), ("scaler", scaler, torch.amp.GradScaler)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be of type {kind.__name__} or None, got {type(value).__name__}")
        if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
            raise TypeError(f"model must be an nn.Module that has parameters, got {type(model).__name__}")
        if limit < 1:
            raise ValueError(f"limit must be at least 1: got {limit}")
        self.step, self.model, self.optimizer, self.scaler, self.limit = step, model, optimizer, scaler, limit
        _refuse_shared(model)
        self.facts: dict[str, Any] | None = None
        self.graphs: dict[Hashable, Recording] = {}
        self.calls: Counter[Hashable] = Counter()
        self.parameters: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Result:
        device = next(self.model.parameters()).device
        for x in inputs:
            if not isinstance(x, Tensor) or x.device != device or x.requires_grad:
                what = type(x).__name__ if not isinstance(x, Tensor) else f"{x.device}, requires_grad={x.requires_grad}"
                raise TypeError(f"a graphed step takes tensors on {device} that do not require gradients, not {what}")
        if not _can_record(device):
            return _copied(_detached(self.step(*inputs)))
        with torch.cuda.device(device):
            return self._call(inputs, device)

    def _call(self, inputs: Sequence[Tensor], device: torch.device) -> Result:
        facts = self._facts(device)
        if self.facts is None:
            self._begin(device)
        elif changed := [name for name in {**self.facts, **facts} if self.facts.get(name) != facts.get(name)]:
            warnings.warn(
                f"graphed: since the last call there were changes to {', '.join(changed)}. The step runs eagerly and "
                "is recorded again. If this happens in every call, graphed saves no time",
                RuntimeWarning,
                stacklevel=3,
            )
            self._begin(device)
        signature = self._signature(inputs)
        if signature not in self.graphs and self.calls[signature] >= WARM_UPS:
            if len(self.graphs) < self.limit:
                self.graphs[signature] = self._record(inputs, device)
            else:
                warnings.warn(
                    f"graphed: there are {self.limit} graphs already, for other inputs (shape, dtype, memory format) "
                    "or gradients (present or None), so this call runs eagerly. Raise limit= to record it",
                    RuntimeWarning,
                    stacklevel=3,
                )
        if signature in self.graphs:
            return self.graphs[signature].replay(inputs)
        self.calls[signature] += 1
        if len(self.calls) > MAX_COUNTED:
            del self.calls[next(iter(self.calls))]
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):  # the capture's stream: autograd runs backward on the forward's stream
                result = self.step(*inputs)
        finally:
            current.wait_stream(self.stream)
        self.facts = self._facts(device)  # includes the optimizer state that this call created
        return _copied(_detached(result))

    def _begin(self, device: torch.device) -> None:
        """Drop all graphs, and read the parameters again. Raises ValueError for a model on several devices."""
        _refuse_shared(self.model)
        optimized = [p for group in self._groups() for p in group["params"]]
        self.parameters = list(dict.fromkeys([*self.model.parameters(), *optimized]))
        if elsewhere := {str(t.device) for t in [*self.parameters, *self.model.buffers()]} - {str(device)}:
            raise ValueError(
                f"the model is on {device} and on {', '.join(sorted(elsewhere))}, but a graph runs on one device only"
            )
        if self.graphs:
            torch.cuda.synchronize(device)  # the last replay may still use the memory that is freed here
        self.graphs.clear()
        self.calls.clear()
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def _signature(self, inputs: Sequence[Tensor]) -> Hashable:
        """Return the key of a call's graph: the layout of its inputs and of the gradients before it."""
        gradients = [None if p.grad is None else (p.grad.dtype, p.grad.stride()) for p in self.parameters]
        return (*((x.shape, x.stride(), x.dtype) for x in inputs), *gradients)

    def _facts(self, device: torch.device) -> dict[str, Any]:
        """Return what a graph depends on besides its inputs, by name: addresses, and values that the capture reads."""
        layers = list(self.model.modules())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        facts: dict[str, Any] = {
            "a layer, an attribute (training, momentum, p, ...) or hook of a layer": [
                (
                    layer,
                    _attributes(layer, device),
                    [hook for name in hooks for hook in vars(layer)[name].values()],
                    vars(layer).get("forward"),
                )
                for layer in layers
            ],
            "the memory, dtype, requires_grad or hooks of a parameter or buffer": [
                None if t is None else (t.data_ptr(), t.dtype, t.stride(), t.requires_grad, _hooks(t))
                for layer in layers
                for t in (*layer._parameters.values(), *layer._buffers.values())
            ],
            "autocast, grad mode, a switch of torch.backends or of fastres": _switches(device),
        }
        for i, group in enumerate(self._groups()):
            for name, value in group.items():
                known = [id(p) for p in value] if name == "params" else _constant(value, device)
                read = name == "lr" and _reads_rate(group, device)
                facts[f"{name} of the optimizer's parameter group {i}"] = "read by every call" if read else known
        if self.optimizer is not None:
            facts["the optimizer's state"] = [
                (id(p), [(name, _constant(value, device)) for name, value in state.items()])
                for p, state in self.optimizer.state.items()
            ]
        if self.scaler is not None:
            ours = ("_enabled", "_scale", "_growth_tracker", "_growth_factor", "_backoff_factor", "_growth_interval")
            facts["the GradScaler"] = [_constant(vars(self.scaler).get(name), device) for name in ours]
        return facts

    def _record(self, inputs: Sequence[Tensor], device: torch.device) -> Recording:
        """Capture the step on copies of `inputs`.

        Raises RuntimeError if the capture fails, or if a replay would not do all that the step does. Tensors,
        gradients, layers, optimizer and random generators are then as before.
        """
        recording = Recording(inputs, self.parameters, self._groups(), device)
        random_numbers, versions = _host_random(), [p._version for p in self.parameters]
        others = [(t, t.grad, _version(t.grad)) for t in self._other_parameters(device)]
        given = [_version(x) for x in recording.inputs]
        layers = [(of, dict(of)) for m in self.model.modules() for of in (vars(m), m._parameters, m._buffers)]
        failure: Exception | None = None
        attributes = set() if self.optimizer is None else set(vars(self.optimizer))
        torch.clear_autocast_cache()  # a weight that an earlier call has cast and cached would not be cast in the graph
        try:
            # torch.cuda.graph does not restore the current stream when a capture fails; this context does.
            with torch.cuda.stream(self.stream), self._fixed(recording.groups), self._alone():
                facts, rates = self._facts(device), [t._version for t in recording.hyperparameters()]
                # The default mode, "global", fails when another thread allocates pinned memory, as a data loader does.
                how: Any = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(recording.graph, **how):
                    try:
                        recording.result = _detached(self.step(*recording.inputs))
                    except Exception as error:  # the end of a broken capture raises another error, which hides this one
                        failure = error
                        raise
                if rates != [t._version for t in recording.hyperparameters()]:
                    raise RuntimeError(_SETS.format("a learning rate"))
                after = self._facts(device)
                if changed := [name for name in {**facts, **after} if facts.get(name) != after.get(name)]:
                    raise RuntimeError(f"it changes {', '.join(changed)}, which a replay would not repeat")
            if not _equal_random(random_numbers, _host_random()):
                raise RuntimeError("it draws random numbers on the CPU, which a replay would not repeat")
            optimized = {id(p) for group in self._groups() for p in group["params"]}
            for p, version in zip(self.parameters, versions, strict=True):
                if id(p) not in optimized and p._version != version:
                    raise RuntimeError("it changes parameters that are not in the optimizer given to graphed()")
            if given != [_version(x) for x in recording.inputs]:
                raise RuntimeError("it changes an input in place, but a replay would change only a copy of that input")
            if any(t.grad is not gradient or _version(gradient) != version for t, gradient, version in others):
                raise RuntimeError(
                    "it leaves gradients in parameters that neither the model nor the optimizer given to graphed() "
                    "has; pass several models as one nn.ModuleList"
                )
            recording.left = [p.grad for p in self.parameters]
        except BaseException as error:
            entered = [*zip(self.parameters, recording.entered, strict=True), *((t, grad) for t, grad, _ in others)]
            for t, gradient in entered:
                t.grad = gradient
            for of, before in layers:
                of.update(before)
            _set_host_random(random_numbers)
            if self.optimizer is not None:
                for name in set(vars(self.optimizer)) - attributes:  # set by the scaler for the step that failed
                    delattr(self.optimizer, name)
            if self.scaler is not None and self.scaler.is_enabled():
                self.scaler._per_optimizer_states.clear()
            self.pool = torch.cuda.graph_pool_handle()  # torch keeps the pool of a failed capture in recording mode
            self.facts = self._facts(device)
            first = failure or error
            if isinstance(first, RuntimeError) and not isinstance(first, torch.OutOfMemoryError):
                raise RuntimeError(_WHY_NOT.format(first)) from first
            raise first from None
        finally:
            torch.clear_autocast_cache()
        return recording

    def _other_parameters(self, device: torch.device) -> list[Tensor]:
        """Return all parameters on `device` that may get gradients and are not the model's or the optimizer's."""
        known = {id(p) for p in self.parameters}
        found = [o for o in gc.get_objects() if issubclass(type(o), nn.Parameter) and id(o) not in known]
        return [p for p in found if p.device == device and p.requires_grad]

    @contextmanager
    def _fixed(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        """Replace the optimizer's parameter groups by `groups` inside the context."""
        if self.optimizer is None:
            yield
            return
        before, self.optimizer.param_groups = self.optimizer.param_groups, groups
        try:
            yield
        finally:
            self.optimizer.param_groups = before

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse steps of other optimizers in this thread: `_facts` would not see changes of their learning rates."""
        thread = threading.get_ident()

        def refuse(optimizer: Optimizer, *arguments: Any) -> None:
            if optimizer is not self.optimizer and threading.get_ident() == thread:
                raise RuntimeError(f"graphed() was not given the {type(optimizer).__name__} that steps in it")

        handle = register_optimizer_step_pre_hook(refuse)
        try:
            yield
        finally:
            handle.remove()


class Recording:
    """A CUDA graph with the tensors that it reads and writes."""

    result: Result
    left: list[Tensor | None]  # p.grad of each parameter after a replay

    def __init__(
        self, inputs: Sequence[Tensor], parameters: list[Tensor], groups: list[dict[str, Any]], device: torch.device
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.inputs = [x.clone() for x in inputs]
        self.parameters = parameters
        self.entered = [p.grad for p in parameters]  # p.grad of each parameter before a replay
        self.rates = [
            (group, torch.full((), float(group["lr"]), dtype=torch.float32, device=device))
            for group in groups
            if _reads_rate(group, device)
        ]
        read = {id(group): {"lr": rate} for group, rate in self.rates}
        self.groups: list[dict[str, Any]] = [_Fixed({**group, **read.get(id(group), {})}) for group in groups]

    def hyperparameters(self) -> list[Tensor]:
        return [value for group in self.groups for value in group.values() if isinstance(value, Tensor)]

    @torch.no_grad()
    def replay(self, inputs: Sequence[Tensor]) -> Result:
        moved = [
            (to, p.grad)
            for p, to in zip(self.parameters, self.entered, strict=True)
            if to is not None and p.grad is not None and p.grad is not to
        ]
        if copies := [*zip(self.inputs, inputs, strict=True), *moved]:
            torch._foreach_copy_([to for to, _ in copies], [read for _, read in copies])
        for group, rate in self.rates:
            rate.fill_(float(group["lr"]))
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.left, strict=True):
            if p.grad is not gradient:
                p.grad = gradient
        return _copied(self.result)


class _Fixed(dict[str, Any]):
    """A parameter group that refuses assignments, so that a scheduler in the step is noticed."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise RuntimeError(_SETS.format(name))


_SETS = "it sets {} of the optimizer, which a replay would not repeat: call a scheduler outside, between steps"
_WHY_NOT = (
    "the step can't be recorded in a CUDA graph: {}\n"
    "A graph can't wait for the GPU. So the step must not use .item(), .tolist(), .cpu(), print() or `if` on a tensor, "
    "tensors made from numbers on the host, BatchNorm with momentum=None, or an optimizer that reads tensors on the "
    "host: SGD needs fused=True; Adam and similar optimizers need capturable=True, and with a GradScaler fused=True as "
    "well. This call has changed nothing."
)


def _can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def _detached(result: Result) -> Result:
    """Return the result without its autograd graph. Raises TypeError unless it is a tensor, a tuple of them or None."""
    if result is None or isinstance(result, Tensor):
        return None if result is None else result.detach()
    if isinstance(result, tuple) and all(isinstance(value, Tensor) for value in result):
        return tuple(value.detach() for value in result)
    raise TypeError(f"a graphed step returns a tensor, a tuple of tensors or None, not a {type(result).__name__}")


def _copied(result: Result) -> Result:
    if isinstance(result, tuple):
        return tuple(value.clone() for value in result)
    return None if result is None else result.clone()


def _constant(value: Any, device: torch.device) -> Any:
    """Return the part of a value that a graph depends on: the memory of a tensor on the device, else the value."""
    if isinstance(value, Tensor):
        return (value.data_ptr(), value.dtype, value.stride()) if value.device == device else value.tolist()
    return value if type(value) in PLAIN else repr(value)


def _attributes(layer: nn.Module, device: torch.device) -> list[Any]:
    """Return the layer's own attributes that are plain values, tuples of these, NumPy numbers or tensors.

    A tensor or NumPy number is returned as `_constant` of it.
    """
    found: list[Any] = []
    for value in vars(layer).values():
        kind = type(value)
        if kind in PLAIN or (kind is tuple and PLAIN.issuperset(map(type, value))):
            found.append(value)
        elif kind not in BOXES and isinstance(value, Tensor | np.generic):
            found.append(_constant(value, device))
    return found


def _hooks(tensor: Tensor) -> list[Any]:
    both: tuple[Any, Any] = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return [hook for hooks in both if hooks for hook in hooks.values()]


def _version(tensor: Tensor | None) -> int | None:
    """Return the tensor's version, which each in-place change raises; None for None and inference tensors."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _reads_rate(group: dict[str, Any], device: torch.device) -> bool:
    """Return whether the group's learning rate is on the host, but its optimizer can read a rate from GPU memory."""
    rate = group.get("lr")
    on_host = isinstance(rate, int | float) or (isinstance(rate, Tensor) and rate.device != device)
    return on_host and bool(group.get("fused") or group.get("capturable"))


def _switches(device: torch.device) -> tuple[Any, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        matmul.fp32_precision,  # allow_tf32, the older name, raises once this one has been set
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        dispatch.choice(torch.float32, device),
    )


def _refuse_shared(model: nn.Module) -> None:
    """Raise ValueError for a model whose processes or devices wait for each other."""
    kinds = [{kind.__name__ for kind in type(layer).__mro__} & SHARED for layer in model.modules()]
    if dist.is_available() and dist.is_initialized():  # the step may call a wrapper of the model
        wrappers = [o for o in gc.get_objects() if type(o).__name__ == "DistributedDataParallel"]
        kinds += [{type(o).__name__} for o in wrappers if any(layer is model for layer in o.modules())]
    if found := sorted(set().union(*kinds)):
        raise ValueError(
            f"graphed does not accept {', '.join(found)}, because its processes or devices wait for each other. Record "
            "forward and backward of the plain model, average the gradients after each call with "
            "fastres.train.process.average(model.parameters()), then call the optimizer"
        )


def _host_random() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 - the global generators


def _set_host_random(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    torch.set_rng_state(state[1])
    np.random.set_state(state[2])  # noqa: NPY002


def _equal_random(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    arrays = np.array_equal(before[2][1], after[2][1]) and before[2][2:] == after[2][2:]
    return before[0] == after[0] and torch.equal(before[1], after[1]) and arrays
