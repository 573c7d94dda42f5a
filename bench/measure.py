"""Measure one row of the bench (one backend on one case): warm-up, timed windows, memory, and the error against a run
of the same weights in float64 (in training, in the widest dtype that fits into memory).

Units: seconds, images per second, milliseconds, MiB, GFLOP/s (2 x multiply-adds, x 3 for a training step).
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import backends
import photos
import torch
import torch.nn.functional as F
from backends import Backend, Case
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastres

# Without this, a profiler stays attached to the process and slows the launches of all later rows.
os.environ.setdefault("TEARDOWN_CUPTI", "1")

INPUTS = 4  # batches used in turn; large batches together exceed a GPU's L2
CHECKED = 4  # images whose scores are compared with float64 in inference
# Images, rounded up to whole batches, whose classes are compared with eager PyTorch's if a row has its own dtype.
JUDGED = 64
WINDOWS = 7
NOISY = 0.1  # the largest `quartile_spread` of the windows of a row that is ranked; about 0.01 on a quiet machine
LOAD = 0.3  # on a GPU, seconds that a row runs untimed before each of its windows
WARM_UPS = 3  # calls after the first, for cudnn.benchmark and the recording of CUDA graphs
# The paper's momentum and weight decay, with a learning rate that keeps training on random labels stable.
OPTIMIZER = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative error that any correct arithmetic in `dtype` may make in a whole net.

    It is four times the eps of the dtype, or of TF32 where cuDNN may use that for fp32. fp32 without TF32 gets 64 eps,
    because of Winograd's transforms.
    """
    if dtype == torch.float32:
        tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return 4 * 2**-10 if tf32 else 64 * torch.finfo(dtype).eps
    return 4 * torch.finfo(dtype).eps


def allowed(baseline: float, dtype: torch.dtype, device: torch.device, mode: str) -> float:
    """Return the largest error that is accepted, given the error `baseline` of eager PyTorch on the same case.

    Inference: four times the baseline or `rounding`, whichever is larger. Gradients: an error e of the activations
    flips a share e of the ReLUs, which moves a gradient by about sqrt(e). The limit is four times that (at most 0.5) or
    twice the baseline, whichever is larger. Limits are at most 0.5 for inference and 0.9 for gradients, below the error
    of a result that is unrelated to the right one (1 if it is zero, 1.4 if it is random).
    """
    e = rounding(dtype, device)
    if mode == "infer":
        return min(0.5, max(4 * baseline, e))
    return min(0.9, max(2 * baseline, min(0.5, 4 * math.sqrt(e))))


def relative_l2(found: Tensor, right: Tensor) -> float:
    """Return ||found - right|| / ||right||, computed in float64."""
    right = right.double()
    return (torch.dist(found.double(), right) / right.norm()).item()


@dataclass
class Data:
    """What all backends of one case share, on the CPU: weights and input batches in fp32, labels, and reference
    results.

    reference: in inference, the fp64 scores [CHECKED, classes] of the first images of the first batch; in training, a
        dict of every parameter's gradient in a first step on the first batch.
    reference_dtype: the dtype in which the reference was computed.
    baseline: eager PyTorch's own errors in the case's dtype, as `Infer.errors` or `Train.errors` returns them.
    judged: in inference, batches on which no row is calibrated; empty in training.
    classes: the classes that eager PyTorch in the case's dtype gives the images in `judged`; None in training.
    """

    weights: dict[str, Tensor]
    inputs: list[Tensor]
    labels: list[Tensor]
    reference: Any = None
    reference_dtype: str = "float64"
    baseline: dict[str, float] = field(default_factory=dict)
    judged: list[Tensor] = field(default_factory=list)
    classes: Tensor | None = None


def prepare(case: Case, weights: dict[str, Tensor], inputs: list[Tensor], seed: int) -> Data:
    """Return the case's data with its reference and baseline error. Raises PyTorch's error if a step runs out of
    memory."""
    generator = torch.Generator().manual_seed(seed)
    classes = len([*weights.values()][-1])  # the classifier's bias
    labels = [torch.randint(classes, (case.batch,), generator=generator) for _ in inputs]
    data = Data(weights, inputs, labels)
    eager = backends.BACKENDS["eager"]
    if case.mode == "infer":
        exact = replace(case, dtype=torch.float64, device=torch.device("cpu"))
        data.reference = Infer(eager, exact, _few(data))(0)
        data.baseline = errors_of_eager(case, data)
        data.judged = photos.batches(math.ceil(JUDGED / case.batch), case.batch, case.size, seed + 2)
        data.classes = Infer(backends.BACKENDS["eager-channels-last"], case, data).classes()
    else:
        data.reference, data.reference_dtype = _reference_gradients(eager, case, data)
        data.baseline = Train(eager, case, data).errors()
    release(case.device)
    return data


def _few(data: Data) -> Data:
    """Return the data with only the images that are checked. For inference only, where images don't depend on each
    other."""
    return replace(data, inputs=[data.inputs[0][:CHECKED]])


def errors_of_eager(case: Case, data: Data) -> dict[str, float]:
    """Return the errors of eager PyTorch's inference in the case's dtype."""
    return Infer(backends.BACKENDS["eager"], case, _few(data)).errors()


def _reference_gradients(eager: Backend, case: Case, data: Data) -> tuple[dict[str, Tensor], str]:
    """Return (gradients by parameter name, name of their dtype) of eager PyTorch.

    They are computed over the whole batch, because of BatchNorm's statistics. The dtype is the first of fp64, fp32 and
    the case's dtype that fits into memory.
    """
    dtypes = (torch.float64, torch.float32, case.dtype)
    for dtype in dtypes:
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
                gradients = Train(eager, replace(case, dtype=dtype), data).gradients()
            return gradients, str(dtype).removeprefix("torch.")
        except Exception as error:
            if not is_out_of_memory(error) or dtype == dtypes[-1]:
                raise
        release(case.device)
    raise AssertionError("unreachable")


class Infer:
    """Inference of a batch of images to scores, everything in the case's dtype, under inference mode."""

    def __init__(self, backend: Backend, case: Case, data: Data) -> None:
        self.data = data
        self.case = case
        self.backend = backend
        self.inputs = _on_device(data.inputs, case, backend)
        self.model, self.call = backend.prepare(data.weights, case, self.inputs)

    def __call__(self, i: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode():
            return self.call(self.inputs[i % len(self.inputs)])

    def errors(self) -> dict[str, float]:
        """Return {"error": relative L2 distance of the first CHECKED images' scores from the fp64 scores}. It is NaN
        if a score is NaN."""
        return self._error(self(0)[:CHECKED])

    def definition(self) -> tuple[dict[str, float], float]:
        """Return (errors of a quantised net's definition, distance of the net from its definition).

        The definition is the net with the same quantised weights and activations, multiplied by PyTorch (backend
        "reference"). Its errors are computed like those of `errors`. The distance is the relative L2 distance between
        the net's scores and the definition's.
        """
        few = self.inputs[0][:CHECKED]
        with torch.inference_mode(), fastres.backend("reference"):
            meant = self.call(few)
        return self._error(meant), relative_l2(self(0)[:CHECKED], meant)

    def _error(self, scores: Tensor) -> dict[str, float]:
        return {"error": relative_l2(scores.cpu(), self.data.reference)}

    def classes(self) -> Tensor:
        """Return the predicted classes of the judged images, on the CPU."""
        batches = _on_device(self.data.judged, self.case, self.backend)
        with torch.inference_mode():
            return torch.cat([self.call(x).argmax(1).cpu() for x in batches])

    def agreement(self) -> float:
        """Return the share of the judged images whose class is the same as eager PyTorch's."""
        return (self.classes() == self.data.classes).double().mean().item()


class Train:
    """One training step: forward, cross-entropy, backward, fused SGD with momentum, gradients set to None.

    Master weights are in fp32. bf16 and fp16 run by autocast, fp16 with a loss scale. In fp64 (the reference) all
    weights and activations are in fp64. Momentum buffers start as zeros, so that the first step is like all others and
    can be captured.
    """

    def __init__(self, backend: Backend, case: Case, data: Data) -> None:
        self.data = data
        self.case = case
        self.inputs = _on_device(data.inputs, case, backend)
        self.model, self.call = backend.prepare(data.weights, case, self.inputs)
        self.labels = [labels.to(case.device) for labels in data.labels]
        self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **OPTIMIZER)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            self.optimizer.state[p]["momentum_buffer"] = self.momenta[name]
        self.scaler = torch.amp.GradScaler(
            case.device.type, init_scale=1024, growth_interval=10**6, enabled=case.dtype == torch.float16
        )
        self.call_step: Callable[..., Any] = self.step
        if backend.graph:
            self.call_step = fastres.graphed(self.step, self.model, self.optimizer, self.scaler)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        """Run a step on images and labels and return (loss,)."""
        torch.compiler.cudagraph_mark_step_begin()
        low = self.case.dtype in (torch.bfloat16, torch.float16)
        dtype = self.case.dtype if low else None
        with torch.autocast(self.case.device.type, dtype, enabled=low):
            loss = F.cross_entropy(self.call(x), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return (loss.detach(),)

    def __call__(self, i: int) -> Tensor:
        x, y = self.inputs[i % len(self.inputs)], self.labels[i % len(self.labels)]
        return self.call_step(x, y)[0]

    def gradients(self) -> dict[str, Tensor]:
        """Return a dict of every parameter's gradient, on the CPU, in a step on the first batch from the shared
        weights.

        The step is the one that is timed. It sets gradients to None, so they are read from the momentum buffers, and
        the weight decay that these include is subtracted.
        """
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(self.data.weights[name])
            for momentum in self.momenta.values():
                momentum.zero_()
        self(0)
        decay = OPTIMIZER["weight_decay"]
        return {name: m.cpu() - decay * self.data.weights[name].to(m.dtype) for name, m in self.momenta.items()}

    def errors(self) -> dict[str, float]:
        """Return the relative L2 errors of the gradients over the parameters: their median (error) and 95th percentile
        (error_p95). Both are NaN if any gradient contains NaN."""
        errors = []
        for name, gradient in self.gradients().items():
            right = self.data.reference[name].double()
            errors.append(relative_l2(gradient, right))
        if any(map(math.isnan, errors)):
            return {"error": math.nan, "error_p95": math.nan}
        return {"error": statistics.median(errors), "error_p95": sorted(errors)[math.ceil(0.95 * len(errors)) - 1]}


STEPS = {"infer": Infer, "train": Train}


def _on_device(inputs: list[Tensor], case: Case, backend: Backend) -> list[Tensor]:
    return [x.to(case.device, case.dtype).contiguous(memory_format=backend.memory_format) for x in inputs]


class Row:
    """One backend on one case, in this process: `prepare`, then `window` any number of times, then `finish` and
    `inspect`.

    The fields that they return are documented in bench/records/README.md. Errors are raised. `close` frees everything.
    """

    def __init__(self, backend: Backend, case: Case, seconds: float) -> None:
        """`seconds` is the time that all windows together should take."""
        self.backend, self.case, self.seconds = backend, case, seconds
        self.own = backend.own(case)
        self.life = ExitStack()
        self.recompiles = 0
        self.single: list[float] = []

    def ready(self) -> None:
        """Do the work that is needed once per process: imports, starting CUDA and the compiler."""
        if self.case.device.type == "cuda":
            torch.cuda.set_device(self.case.device)
            torch.zeros(1, device=self.case.device)
        if self.backend.compile is not None:
            backends.start_compiler(self.backend.compile["backend"], self.case.device)

    def prepare(self, data: Data | Path) -> dict[str, Any]:
        """Build the net, call it until it is warm, and return the fields that are known then.

        `data` is the case's data, or a file of it that another process wrote.
        """
        self.data = torch.load(data, mmap=True, weights_only=False) if isinstance(data, Path) else data
        device, compiled = self.case.device, self.backend.compile is not None
        torch.backends.cudnn.benchmark = True
        self.life.enter_context(self.backend.isolated(device))
        breaks, graphs, start = _graph_breaks(), _graphs(), time.perf_counter()
        self.step = STEPS[self.case.mode](self.backend, self.own, self.data)
        with backends.watched_paths() as answers:
            self.step(0)
            synchronize(device)
        fields: dict[str, Any] = {
            "first_call_s": time.perf_counter() - start,
            "graphs": _graphs() - graphs if compiled else None,
            "graph_breaks": _graph_breaks() - breaks if compiled else None,
        }
        if self.backend.ours:
            fields["path"] = backends.path_in_words(answers, self.backend)
        with self._counting_recompiles():
            for i in range(WARM_UPS):
                self.step(i + 1)
            synchronize(device)
            fields["warm_up_s"] = time.perf_counter() - start
            if device.type == "cuda":  # leave out the memory that the choice of algorithms took
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            for i in range(WARM_UPS):
                self.single.append(_seconds(self.step, range(i, i + 1), device))
        self.calls = max(1, round(self.seconds / WINDOWS / min(self.single)))
        return fields | {"calls_per_window": self.calls, "peak_reserved_mib": _mib("max_memory_reserved", device)}

    def window(self) -> float:
        """Return the seconds per call in one timed window.

        On a GPU the row first runs untimed for `LOAD` seconds, to reach its own clocks and temperature, and then times
        three single calls. On a CPU it first makes one untimed call, because threads of the previous row may still spin
        and the caches are full of its data.
        """
        device = self.case.device
        with self._counting_recompiles():
            if device.type == "cuda":
                for i in range(math.ceil(LOAD / min(self.single))):
                    self.step(i)
                self.single += [_seconds(self.step, range(i, i + 1), device) for i in range(3)]
            else:
                self.step(0)
            return _seconds(self.step, range(self.calls), device) / self.calls

    def finish(self) -> dict[str, Any]:
        """Return the fields other than rates: latency, memory, errors, and "status", which is "ok" or "wrong" (with a
        "reason")."""
        step, device, cuda = self.step, self.case.device, self.case.device.type == "cuda"
        with self._counting_recompiles():
            self.single += [_seconds(step, range(i, i + 1), device) for i in range(min(20, self.calls))]
        row: dict[str, Any] = {
            "latency_ms": 1e3 * statistics.median(self.single),
            "host_ms": 1e3 * statistics.median(host_seconds(step, i, device) for i in range(5)) if cuda else None,
            "peak_reserved_mib": _mib("max_memory_reserved", device),
            "peak_allocated_mib": _mib("max_memory_allocated", device),
            "recompiles": self.recompiles if self.backend.compile is not None else None,
            "reference": self.data.reference_dtype,
        }
        finite = bool(torch.isfinite(step(0)).all())
        return row | self._verdict(finite)

    def inspect(self) -> dict[str, Any]:
        """Return diagnostic fields: clocks, number of kernels, notes on layouts. Clocks are None on a CPU or without
        nvidia-smi, the number of kernels on a CPU."""
        found = dict(UNINSPECTED)
        if self.case.device.type == "cuda":
            found["clocks"] = clocks_under_load(self.step, min(self.single), self.case.device)
            found["kernels_per_step"], found["notes"] = profiled(self.step)
        if self.case.mode == "train" and self.backend.channels_last and self.backend.compile is not None:
            found["notes"] = [*found["notes"], *lost_layouts(self.step)]
        return found

    def close(self) -> None:
        """Free the net and its memory, and undo the backend's settings."""
        self.step: Any = None
        self.life.close()
        release(self.case.device)

    def _verdict(self, finite: bool) -> dict[str, Any]:
        """Return the errors, their limits and the resulting status."""
        errors, baseline, case = self.step.errors(), self.data.baseline, self.own
        if case != self.case and not self.backend.quantises:
            baseline = errors_of_eager(case, self.data)
        limits = {name: allowed(e, case.dtype, case.device, case.mode) for name, e in baseline.items()}
        agreement = departure = None
        if self.backend.quantises and self.backend.ours:
            baseline, departure = self.step.definition()
            limits = {name: min(0.5, 2 * e) for name, e in baseline.items()}
        elif self.backend.quantises:  # peers quantise in their own ways
            limits = {}
        if self.backend.dtype not in (None, self.case.dtype):
            agreement = self.step.agreement()
        images = None if agreement is None else len(self.data.judged) * case.batch
        row: dict[str, Any] = {"agreement": agreement, "agreement_images": images}
        for name in ("error", "error_p95"):
            row |= {name: _finite(errors.get(name)), f"{name}_allowed": _finite(limits.get(name))}
            row[f"{name}_of_eager"] = _finite(baseline.get(name))
        wrong = [
            f"{n} is {errors[n]:.2g}; at most {limit:.2g} is allowed"
            for n, limit in limits.items()
            if not errors[n] <= limit
        ]
        if not finite:
            wrong = ["the output is NaN or infinite after the timed calls"]
        elif not all(map(math.isfinite, baseline.values())):
            wrong = ["eager PyTorch's own error, which sets the limit, is NaN"]
        elif departure is not None and not departure <= baseline["error"]:
            limit = f"at most {baseline['error']:.2g} is allowed"
            wrong.append(f"scores differ by {departure:.2g} from PyTorch's with the same quantised values; {limit}")
        return row | ({"status": "wrong", "reason": wrong[0]} if wrong else {"status": "ok"})

    @contextmanager
    def _counting_recompiles(self) -> Iterator[None]:
        """Count the graphs compiled within the context. Rows that share a process take turns, and each counts only its
        own."""
        known = _graphs()
        yield
        self.recompiles += _graphs() - known


UNINSPECTED: dict[str, Any] = {"clocks": None, "kernels_per_step": None, "notes": []}


def uninspected(error: Exception) -> dict[str, Any]:
    """Return the fields of `inspect` for a row in which it raised `error`. The row keeps its measurements."""
    return UNINSPECTED | {"notes": [f"not inspected: {first_line(error)}"]}


def _finite(value: float | None) -> float | None:
    """Return `value`, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _mib(statistic: str, device: torch.device) -> float | None:
    """Return a CUDA memory statistic, named like its function in torch.cuda, in MiB, or None on a CPU."""
    return getattr(torch.cuda, statistic)(device) / 2**20 if device.type == "cuda" else None


def rates(case: Case, multiply_adds: int, windows: Sequence[float]) -> dict[str, Any]:
    """Return the fields that follow from the seconds per call in each window. `multiply_adds` is for one image."""
    found = [case.batch / window for window in windows]
    return {
        "window_img_s": found,
        "img_s": statistics.median(found),
        "img_s_min": min(found),
        "img_s_max": max(found),
        "gflop_s": 2e-9 * multiply_adds * (3 if case.mode == "train" else 1) * statistics.median(found),
    }


def settled(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row that has all of its windows with its energy per image added. An "ok" row becomes "noisy" if its
    windows spread too much for ranking."""
    watts = _number(row["clocks"]["power.draw"]) if row["clocks"] else None
    row = row | {"joules_per_image": None if watts is None else watts / row["img_s"]}
    if row["status"] == "ok" and (spread := quartile_spread(row["window_img_s"])) > NOISY:
        reason = (
            f"the middle half of the windows spans {100 * spread:.0f} % of the median; the limit is {100 * NOISY:.0f} %"
        )
        return row | {"status": "noisy", "reason": f"{reason}: the machine may be busy or throttling"}
    return row


def quartile_spread(values: Sequence[float]) -> float:
    """Return the interquartile range relative to the median."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / median


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def measure(backend: Backend, case: Case, data: Data, seconds: float, multiply_adds: int) -> dict[str, Any]:
    """Measure a whole row on its own in this process. An error becomes its status and reason."""
    row = Row(backend, case, seconds)
    try:
        fields = row.prepare(data)
        windows = [row.window() for _ in range(WINDOWS)]
        fields |= rates(case, multiply_adds, windows) | row.finish()
        try:
            return settled(fields | row.inspect())
        except Exception as error:
            return settled(fields | uninspected(error))
    except Exception as error:
        return failure(error)
    finally:
        row.close()
        torch.compiler.reset()


def failure(error: BaseException) -> dict[str, Any]:
    """Return the status and the reason to record for a row whose measurement raised `error`."""
    return {"status": "out of memory" if is_out_of_memory(error) else "failed", "reason": first_line(error)}


def _seconds(step: Callable[[int], Any], calls: range, device: torch.device) -> float:
    """Return the seconds from the first call until the last one's work is done, by CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in calls:
            step(i)
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for i in calls:
        step(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_seconds(step: Callable[[int], Any], call: int, device: torch.device) -> float:
    """Return the seconds that a call on an idle GPU takes to return, which may be before its work is done. If that is
    as long as the latency, the GPU waits for the host."""
    synchronize(device)
    start = time.perf_counter()
    step(call)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free the memory of the previous row."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that memory ran out."""
    message = str(error)  # compilers wrap the error in their own, and the CPU's allocator raises a plain RuntimeError
    wrapped = "out of memory" in message or "can't allocate memory" in message
    return wrapped or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def clocks_under_load(step: Callable[[int], Any], seconds: float, device: torch.device) -> dict[str, str] | None:
    """Return SM and memory clock in MHz, power in W and temperature in °C while steps run, or None without nvidia-smi.

    `seconds` is the duration of a step. nvidia-smi averages the power over a second, so steps run for longer than that
    before nvidia-smi is called, and until it has answered.
    """
    with ThreadPoolExecutor(1) as executor:
        began, answer = time.perf_counter(), None
        while answer is None or not answer.done():
            # Short bursts, since queued work would run on long after the answer.
            for i in range(math.ceil(0.05 / seconds)):
                step(i)
            synchronize(device)
            if answer is None and time.perf_counter() - began > 1.2:
                fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
                answer = executor.submit(nvidia_smi, device, *fields)
    return answer.result()


def nvidia_smi(device: torch.device, *fields: str) -> dict[str, str] | None:
    """Return the named fields of `nvidia-smi --query-gpu` for `device`, without units, or None if nvidia-smi is missing
    or fails."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in answer.strip().split(",")), strict=True))


def _graph_breaks() -> int:
    """Return the number of graph breaks so far in this process."""
    return sum(counters["graph_break"].values())


def _graphs() -> int:
    """Return the number of graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def profiled(step: Callable[[int], Any]) -> tuple[int, list[str]]:
    """Return (number of kernels and copies that a step runs on the GPU, notes).

    There is a note if cuDNN transposes between NCHW and NHWC, which means that the net lost channels_last or never had
    it.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(0)
        torch.cuda.synchronize()
    times: Counter[bool] = Counter()
    count = kernels = 0
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        turns = any(name in event.name.lower() for name in ("nchwtonhwc", "nhwctonchw"))
        times[turns] += event.device_time_total
        count += turns
        kernels += 1
    if not count:
        return kernels, []
    share = 100 * times[True] / times.total()
    return kernels, [f"cuDNN transposes layouts in {count} kernels, {share:.0f} % of the GPU's time"]


def lost_layouts(step: Train) -> list[str]:
    """Return a list with a note if a compiled backward returns weight gradients that are no longer channels_last, else
    an empty one.

    Hooks look at the gradients before their accumulation, which copies them back into the parameter's layout. 1x1
    filters are left out, because their layouts don't differ.
    """
    lost: Counter[bool] = Counter()

    def look(gradients: tuple[Tensor, ...]) -> None:
        lost[not gradients[0].is_contiguous(memory_format=torch.channels_last)] += 1

    handles = []
    for module in step.model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            node = torch.autograd.graph.get_gradient_edge(module.weight).node
            handles.append((node, node.register_prehook(look)))
    step.gradients()
    for _, handle in handles:
        handle.remove()
    return [f"{lost[True]} of {lost.total()} weight gradients lost channels_last"] if lost[True] else []
