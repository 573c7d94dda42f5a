"""The backends that the bench can run, in the table `BACKENDS`.

To add a way to run a net, add an entry there. `by_default` decides whether it runs without being asked for; on a GPU it
does unless `EXPERIMENTS` names it.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import runtimes
import stock_nets
import torch
import torch._dynamo.config
import torch._inductor.config
import torch._inductor.utils
import torchvision.models.resnet as tv
from torch import nn

import fastres
from fastres import capability
from fastres import compile as fastres_compile
from fastres.models import families
from fastres.ops import dispatch, eligibility

DEPTHS = (18, 34, 50, 101, 152)
MODES = ("infer", "train")
FLOAT8 = torch.float8_e4m3fn
QUANTISED = (torch.int8, FLOAT8)
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    FLOAT8: "fp8",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class Case:
    """What a row measures, apart from the backend. `net` is a name that `families.named` accepts, `size` the height and
    width of the images."""

    net: str
    mode: str
    batch: int
    dtype: torch.dtype
    size: int
    device: torch.device


@dataclass(frozen=True)
class Backend:
    """One way to run a net.

    net: maps a name to a module with the state_dict keys of `stock_nets.net(name)`.
    says: the description in the help text.
    compile: keyword arguments of `torch.compile`; None runs the module as it is.
    inductor: Inductor settings that are in force while the backend runs.
    freeze: a function that turns the prepared net and the case's batches into a callable; such a backend doesn't train.
    dtype: the dtype that the backend always computes in, or None for the case's dtype. A backend with a dtype doesn't
        train. It gets the net and the images in this dtype, except that for int8 and float8 they are in the case's
        dtype, or in fp32 for an int8 peer.
    graph: whether a whole training step, optimizer included, runs in one CUDA graph; such a backend doesn't infer.
    channels_last: whether the net and the images are in channels_last.
    ours: whether this is fastres. The other backends are the peers; rows are compared with the best of them.
    use: what a user of fastres writes to get this backend, in words or code.
    needs: the only device type that the backend runs on; None for any.
    packages: packages to install in addition to fastres' own dependencies.
    only_torchvision: whether the backend has only torchvision's nets.
    """

    net: Callable[[str], nn.Module]
    says: str
    compile: dict[str, Any] | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    freeze: Callable[[nn.Module, Sequence[torch.Tensor]], Callable] | None = None
    dtype: torch.dtype | None = None
    graph: bool = False
    channels_last: bool = True
    ours: bool = False
    use: str = ""
    needs: str | None = None
    packages: tuple[str, ...] = ()
    only_torchvision: bool = False

    def why_not(self, case: Case) -> str | None:
        """Return why this backend can't run `case` on this machine, or None if it can."""
        return self.why_never(case.net, case.mode) or self.why_not_here(case.device)

    def why_never(self, net: str, mode: str) -> str | None:
        """Return why this backend can't run `net` in `mode` on any machine, or None if it can on some."""
        if (self.freeze or self.dtype) and mode == "train":
            return "it runs inference only"
        if self.graph and mode == "infer":
            return "it runs training only"
        if self.only_torchvision and net not in families.BUILDERS:
            return f"{', '.join(self.packages)} has no {net}"
        return None

    def why_not_here(self, device: torch.device) -> str | None:
        """Return why this backend can't run anything on `device`, or None if it can."""
        if self.needs and device.type != self.needs:
            return f"it needs a {self.needs} device"
        if (
            self.dtype == FLOAT8
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device) < capability.FLOAT8
        ):
            return f"float8 needs compute capability {capability.spelt(capability.FLOAT8)}"
        if self.dtype in (torch.int8, torch.bfloat16) and (reason := dispatch.why_no_onednn(self.dtype)) is not None:
            return reason  # a peer might run, but emulated or with saturating sums
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"not installed: pip install {' '.join(missing)}" if missing else None

    @property
    def quantises(self) -> bool:
        """Whether the backend computes in int8 or float8. Eager PyTorch can't, so its error is no measure of the
        backend's."""
        return self.dtype in QUANTISED

    def own(self, case: Case) -> Case:
        """Return the case with the dtype in which this backend gets the net and the images."""
        if self.dtype == torch.int8 and not self.ours:
            return replace(case, dtype=torch.float32)
        return case if self.dtype is None or self.quantises else replace(case, dtype=self.dtype)

    def arithmetic(self, case: Case) -> str:
        """Return the name, as in a record, of the dtype in which the backend computes `case`."""
        return NAMES[self.dtype or case.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(
        self, weights: dict[str, torch.Tensor], case: Case, inputs: Sequence[torch.Tensor]
    ) -> tuple[nn.Module, Callable]:
        """Return (the module that owns the parameters, the callable to run on a batch), on the case's device. `inputs`
        are on that device already.

        In inference, the module is in eval mode and everything is in the case's dtype. In training, master weights are
        in fp32 (or in fp64, if that is the case's dtype), and the caller applies autocast.
        """
        with torch.device("meta"):  # skips an initialisation that would be overwritten
            model = self.net(case.net)
        model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        infer = case.mode == "infer"
        model.train(not infer).requires_grad_(not infer)
        dtype = case.dtype if infer or case.dtype == torch.float64 else torch.float32
        model = model.to(case.device, dtype, memory_format=self.memory_format)
        if self.freeze is not None:
            return model, self.freeze(model, inputs)
        if self.compile is None:
            return model, model
        return model, torch.compile(model, dynamic=False, **self.compile)

    @contextmanager
    def isolated(self, device: torch.device) -> Iterator[None]:
        """If the backend compiles, apply its settings within the context and begin with empty compiler caches on disk.

        Compiled code stays in memory until `torch.compiler.reset()`, so contexts of several backends may be nested.
        """
        with ExitStack() as stack:
            if self.compile is not None:
                start_compiler(self.compile["backend"], device)
                stack.enter_context(torch._inductor.utils.fresh_cache())
                stack.enter_context(torch._inductor.config.patch(self.inductor))
                # Dynamo's limit is for each code object, and backends share code.
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield


@cache
def start_compiler(backend: str, device: torch.device) -> None:
    """Run what `backend` does once per process (imports, queries of the machine), so that its first row is not charged
    for it.

    Errors are ignored here: the rows that need the compiler will report them.
    """
    with torch._inductor.utils.fresh_cache(), suppress(Exception):
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: x.sigmoid().sum(), backend=backend)(x).backward()


def timm_net(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def switched(fusion: str, name: str) -> nn.Module:
    """Return the net called `name` with one fusion (a field of `dispatch.Fusions`) switched on in every forward."""
    net = families.named(name)
    net.forward = dispatch.fusions(**{fusion: True})(net.forward)  # type: ignore[method-assign]
    return net


def optimize(model: nn.Module, inputs: Sequence[torch.Tensor]) -> Callable:
    # An example input prepares the plan for its shape before anything is timed.
    return fastres.optimize(model, inputs[0])


def optimize_quantised(dtype: torch.dtype, model: nn.Module, inputs: Sequence[torch.Tensor]) -> Callable:
    return fastres.optimize(model, inputs[0], dtype=dtype, calibration=inputs)


def inductor(mode: str = "default", **kwargs: Any) -> Backend:
    return Backend(
        stock_nets.net,
        f"torch.compile, mode {mode!r}, weights frozen in inference",
        compile={"backend": "inductor", "mode": mode},
        inductor={"freezing": True},
        **kwargs,
    )


ONNX = ("onnx", "onnxscript", "onnxruntime")

BACKENDS = {
    "eager": Backend(
        stock_nets.net,
        "plain PyTorch (torchvision's net, if it has one) with its defaults: NCHW, no compiler",
        channels_last=False,
    ),
    "eager-channels-last": Backend(stock_nets.net, "plain PyTorch in channels_last"),
    "eager-channels-last-bf16": Backend(
        stock_nets.net, "the same, with net and images in bf16; inference only", dtype=torch.bfloat16, needs="cpu"
    ),
    "eager-graph": Backend(
        stock_nets.net,
        "plain PyTorch in channels_last, with a whole training step in a CUDA graph; training only",
        graph=True,
        needs="cuda",
    ),
    "cudagraphs": Backend(
        stock_nets.net,
        "torch.compile, backend 'cudagraphs': plain PyTorch in a CUDA graph, nothing fused",
        compile={"backend": "cudagraphs"},
        needs="cuda",
    ),
    "aot-eager": Backend(
        stock_nets.net,
        "torch.compile, backend 'aot_eager': AOTAutograd's graph run by ATen, nothing fused",
        compile={"backend": "aot_eager"},
    ),
    "inductor": inductor(),
    "reduce-overhead": inductor("reduce-overhead", needs="cuda"),
    "max-autotune": inductor("max-autotune"),
    "max-autotune-no-cudagraphs": inductor("max-autotune-no-cudagraphs"),
    "onnxruntime": Backend(
        stock_nets.net,
        "ONNX Runtime in fp32; inference only",
        freeze=runtimes.onnxruntime,
        dtype=torch.float32,
        channels_last=False,
        needs="cpu",
        packages=ONNX,
    ),
    "onnxruntime-int8": Backend(
        stock_nets.net,
        "ONNX Runtime in int8, quantised statically on the batches it is timed with; inference only",
        freeze=runtimes.onnxruntime_int8,
        dtype=torch.int8,
        channels_last=False,
        needs="cpu",
        packages=ONNX,
    ),
    "openvino": Backend(
        stock_nets.net,
        "OpenVINO in fp32; inference only",
        freeze=runtimes.openvino,
        dtype=torch.float32,
        channels_last=False,
        needs="cpu",
        packages=("openvino", "onnxscript"),
    ),
    "timm": Backend(timm_net, "timm's resnet in channels_last", packages=("timm",), only_torchvision=True),
    "timm-inductor": Backend(
        timm_net,
        "timm's resnet under torch.compile, weights frozen in inference",
        compile={"backend": "inductor"},
        inductor={"freezing": True},
        packages=("timm",),
        only_torchvision=True,
    ),
    "fastres": Backend(
        families.named,
        "fastres in channels_last, no compiler",
        ours=True,
        use="fastres' net in channels_last",
    ),
    "fastres-graph": Backend(
        families.named,
        "the same, with a whole training step in a CUDA graph; training only",
        graph=True,
        ours=True,
        use="fastres.graphed(step, model, optimizer)",
        needs="cuda",
    ),
    "fastres-graph-keep": Backend(
        partial(switched, "keep_activation"),
        "the same, with the fusion keep_activation on; training only",
        graph=True,
        ours=True,
        use="fastres.graphed(step, model, optimizer) with the fusion keep_activation",
        needs="cuda",
    ),
    "fastres-graph-overlap": Backend(
        partial(switched, "overlap"),
        "the same, with weight gradients on a second stream; training only",
        graph=True,
        ours=True,
        use="fastres.graphed(step, model, optimizer) with weight gradients on a second stream",
        needs="cuda",
    ),
    "fastres-inductor": Backend(
        families.named,
        "fastres' net under torch.compile, weights frozen in inference",
        compile={"backend": "inductor"},
        inductor={"freezing": True},
        ours=True,
        use="torch.compile of fastres' net",
    ),
    "fastres-compile": Backend(
        stock_nets.net,
        "plain PyTorch under torch.compile, backend 'fastres', weights frozen in inference",
        compile={"backend": "fastres"},
        inductor={"freezing": True},
        ours=True,
        use='torch.compile(model, backend="fastres")',
    ),
    "fastres-optimize": Backend(
        families.named,
        "fastres.optimize: BatchNorms folded, in a static plan; on a GPU in a CUDA graph; inference only",
        freeze=optimize,
        ours=True,
        use="fastres.optimize(model)",
    ),
    "fastres-optimize-bf16": Backend(
        families.named,
        "the same, with net and images in bf16; inference only",
        freeze=optimize,
        dtype=torch.bfloat16,
        ours=True,
        use="fastres.optimize(model, dtype=torch.bfloat16)",
        needs="cpu",
    ),
    "fastres-optimize-int8": Backend(
        families.named,
        "the same in int8, calibrated on the batches it is timed with; inference only",
        freeze=partial(optimize_quantised, torch.int8),
        dtype=torch.int8,
        ours=True,
        use="fastres.optimize(model, dtype=torch.int8, calibration=batches)",
        needs="cpu",
    ),
    "fastres-optimize-fp8": Backend(
        families.named,
        "the same in float8, calibrated on the batches it is timed with; inference only",
        freeze=partial(optimize_quantised, FLOAT8),
        dtype=FLOAT8,
        ours=True,
        use="fastres.optimize(model, dtype=torch.float8_e4m3fn, calibration=batches)",
        needs="cuda",
    ),
}


EXPERIMENTS = ("fastres-graph-keep", "fastres-graph-overlap")


def by_default(device: torch.device, net: str, mode: str) -> list[str]:
    """Return the names of the backends that run in `mode` on this device if the user names none.

    On a GPU these are all of fastres except `EXPERIMENTS`, and the peers: all of them for ResNet-50, a few for other
    nets. On a CPU they are eager PyTorch in channels_last, ONNX Runtime and fastres without a compiler. ResNet-50
    inference adds the other rows of eager PyTorch, `inductor` and, if it is installed, OpenVINO. timm is left out
    there, because it runs what eager PyTorch does.
    """
    if device.type == "cuda":
        every_net = ("eager-channels-last", "eager-graph", "inductor", "max-autotune")
        chosen = [name for name, b in BACKENDS.items() if net == "resnet50" or b.ours or name in every_net]
        chosen = [name for name in chosen if name not in EXPERIMENTS]
    else:
        chosen = ["eager-channels-last", "fastres", "onnxruntime", "onnxruntime-int8"]
        chosen += ["fastres-optimize", "fastres-optimize-bf16", "fastres-optimize-int8"]
        if net == "resnet50" and mode == "infer":
            chosen += ["eager", "eager-channels-last-bf16", "inductor"]
            chosen += ["openvino"] if importlib.util.find_spec("openvino") else []
    return [
        name
        for name, backend in BACKENDS.items()
        if name in chosen and not backend.why_never(net, mode) and backend.needs in (None, device.type)
    ]


def shared_weights(net: str, calibration: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return the state_dict, in fp32 on the CPU, that every backend loads for the net called `net`.

    It is the net's own initialisation, except that BatchNorms get random weights and biases, and running statistics
    gathered over the `calibration` batches. The last BatchNorm of each residual branch gets a small weight, as in the
    usual recipes. Without these changes the net would amplify rounding errors so much that right and wrong gradients
    could not be told apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = stock_nets.net(net)
        blocks = [m for m in model.modules() if isinstance(m, (tv.BasicBlock, tv.Bottleneck))]
        last = {block.bn3 if isinstance(block, tv.Bottleneck) else block.bn2 for block in blocks}
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, *((0.05, 0.1) if norm in last else (0.5, 1.5)))
            nn.init.normal_(norm.bias, 0, 0.1)
            norm.momentum = None
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    return model.state_dict()


@contextmanager
def watched_paths() -> Iterator[Counter[str | None]]:
    """Within the context, count for stem and blocks why each takes the plain path, under None if it runs fused.

    The counts come from the answers of `eligibility` to stem, blocks and stages of blocks, and from what backend
    "fastres" of torch.compile finds in a graph.
    """
    answers: Counter[str | None] = Counter()
    ask, ask_together, rewrite = eligibility.why_plain, eligibility.serves_stages, fastres_compile.rewrite_graph

    def listen(*call: Any) -> str | None:
        answer = ask(*call)
        answers[answer] += 1
        return answer

    def listen_to_stages(x: torch.Tensor, stages: Sequence[Sequence[Any]]) -> int:
        served = ask_together(x, stages)
        answers[None] += sum(map(len, stages[:served]))
        return served

    def look(*call: Any, **options: Any) -> list[fastres_compile.Finding]:
        findings = rewrite(*call, **options)
        answers.update(None if finding.hit else finding.reason for finding in findings)
        return findings

    with (
        mock.patch.object(eligibility, "why_plain", listen),
        mock.patch.object(eligibility, "serves_stages", listen_to_stages),
        mock.patch.object(fastres_compile, "rewrite_graph", look),
    ):
        yield answers


def path_in_words(answers: Counter[str | None], backend: Backend) -> str:
    """Describe how the blocks of a fastres row ran, fused or plain, from the counts of `watched_paths` in one call."""
    compiled = backend.compile is not None
    if backend.freeze is not None:
        return "a static plan of folded convolutions"
    if not answers:
        return "plain path: torch.compile traced the plain modules" if compiled else "plain path"
    total = sum(answers.values())
    parts = [
        f"plain path in {n} of {total} blocks: {why}" if why else f"fused in {n} of {total} blocks"
        for why, n in answers.most_common()
    ]
    return "; ".join(parts)
