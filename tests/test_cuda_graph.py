"""`fastres.graphed` equals eager steps bit for bit, notices changes that a graph would miss, and refuses steps that no
graph can repeat."""

from __future__ import annotations

import contextlib
import copy
import operator
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from tolerances import REPLAYED
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fastres
from fastres import cuda_graph
from fastres.cuda_graph import WARM_UPS, Graphed
from fastres.models import families
from fastres.ops import block, dispatch

REFUSED = r"BatchNorm2d\(\d+, momentum=None\) averages over all batches.*Give the layer a momentum"
CALLS = WARM_UPS + 4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


class Training:
    """A small net, its optimizer and a step that can zero gradients in several ways."""

    def __init__(self, zero: str = "end", scaled: bool = False, dtype: torch.dtype | None = None, **how: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)]
        self.net = nn.Sequential(*layers)
        self.net(torch.randn(2, 3, 6, 6))
        how = {"lr": 0.125, "momentum": 0.9, "weight_decay": 1e-2, "fused": True, **how}
        self.optimizer = torch.optim.SGD(self.net.parameters(), **how)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0, growth_interval=2)
        self.zero, self.dtype = zero, dtype
        self.then: Callable[[], Any] = lambda: None

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.zero == "start":
            self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype) if self.dtype else contextlib.nullcontext():
            scores = self.net(x)
        loss = F.cross_entropy(scores.float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.zero in ("end", "in place"):
            self.optimizer.zero_grad(set_to_none=self.zero == "end")
        self.then()
        return loss, scores

    def graphed(self, **options: Any) -> Graphed:
        return fastres.graphed(self.step, self.net, self.optimizer, self.scaler, **options)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: value.clone() for name, value in self.net.state_dict().items()}
        for i, p in enumerate(self.net.parameters()):
            found[f"gradient {i}"] = None if p.grad is None else p.grad.clone()
            found[f"state {i}"] = {k: v.clone() for k, v in self.optimizer.state[p].items()}
        return found | {"scaler": self.scaler.state_dict()}


def batch(i: int, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.arange(count) % 5


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def follow(
    ours: Training,
    call: Graphed,
    theirs: Training,
    calls: int = CALLS,
    count: Callable[[int], int] = lambda i: 4,
    between: Callable[[Training, int], Any] = lambda training, i: None,
    under: Callable[[], Any] = contextlib.nullcontext,
) -> None:
    """Check that results and state equal those of eager steps after each of `calls` calls.

    count: the batch size of call i. between: called with each training and i after call i. under: makes the context of
    each call.
    """
    for i in range(calls):
        with under():
            result = call(*batch(i, count(i)))
        with under():
            expected = theirs.step(*batch(i, count(i)))
        assert_equal(result, tuple(value.detach() for value in expected))
        assert_equal(ours.state(), theirs.state())
        for training in (ours, theirs):
            between(training, i)


STYLES: dict[str, dict[str, Any]] = {
    "end": {},
    "start": {"zero": "start"},
    "in place": {"zero": "in place"},
    "never": {"zero": "never"},
    "unfused": {"fused": False},
    "first momentum": {"dampening": 0.5},
    "scaled": {"scaled": True},
    "autocast": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("style", STYLES)
def test_calls_are_eager_steps(style: str, fake_cuda: FakeCuda) -> None:
    """Covers weights, running statistics, momenta, gradients and loss scale, for every way of zeroing gradients."""
    ours, theirs = Training(**STYLES[style]), Training(**STYLES[style])
    call = ours.graphed()
    follow(ours, call, theirs)
    assert len(call.graphs) == 1
    assert fake_cuda.modes == ["thread_local"]  # so that other threads may allocate pinned memory


def test_gradients_may_be_zeroed_and_accumulated_outside(fake_cuda: FakeCuda) -> None:
    """Gradients accumulate over two calls per update: the first call finds no gradients, the second adds to them. Each
    has its own graph."""

    def between(training: Training, i: int) -> None:
        if i % 2:
            training.optimizer.zero_grad()

    ours, theirs = Training(zero="never"), Training(zero="never")
    call = ours.graphed()
    follow(ours, call, theirs, 2 * CALLS, between=between)
    assert len(call.graphs) == 2


def test_gradients_that_moved_are_added_to_where_they_are(fake_cuda: FakeCuda) -> None:
    """A replay adds to the current gradients, not to the tensors that held them at the capture."""

    def between(training: Training, i: int) -> None:
        for p in training.net.parameters():
            p.grad = 2 * p.grad  # type: ignore[operator]

    ours, theirs = Training(zero="never"), Training(zero="never")
    call = ours.graphed()
    follow(ours, call, theirs, between=between)
    assert len(call.graphs) == 1


def test_all_of_python_runs_on_one_stream_aside(fake_cuda: FakeCuda) -> None:
    """Warm-ups and capture share one side stream, because autograd runs on the stream on which a parameter was first
    used."""
    training, streams = Training(), []
    training.then = lambda: streams.append(fake_cuda.stream)
    call, here = training.graphed(), fake_cuda.stream
    for i in range(CALLS):
        call(*batch(i))
        assert fake_cuda.stream is here
    assert len(streams) == WARM_UPS + 1
    assert {id(stream) for stream in streams} == {id(streams[0])} != {id(here)}


def test_a_result_is_the_callers_own(fake_cuda: FakeCuda) -> None:
    training = Training()
    call = training.graphed()
    kept = [call(*batch(i))[0] for i in range(CALLS)]  # type: ignore[index]
    copies = [loss.clone() for loss in kept]
    call(*batch(99))
    assert_equal(kept, copies)
    assert not any(loss.requires_grad for loss in kept)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_schedule_reaches_the_graph(tensor: bool, fake_cuda: FakeCuda) -> None:
    """The learning rate may be a number or a tensor. Halves of 1/8 are exact in float32, in which the graph reads
    numbers."""
    both = [Training(lr=torch.tensor(0.125) if tensor else 0.125) for _ in range(2)]
    schedules = {id(t): lr_scheduler.StepLR(t.optimizer, 1, 0.5) for t in both}
    call = both[0].graphed()
    follow(both[0], call, both[1], CALLS, between=lambda training, i: schedules[id(training)].step())
    assert len(call.graphs) == 1


def test_a_learning_rate_that_no_graph_reads_is_noticed(fake_cuda: FakeCuda) -> None:
    """Without fused=True, a changed learning rate gives a warning, and the call still gives the right result."""

    def between(training: Training, i: int) -> None:
        if i == CALLS:
            training.optimizer.param_groups[0]["lr"] = 0.5

    ours, theirs = Training(fused=False), Training(fused=False)
    with pytest.warns(RuntimeWarning, match="changes to lr of the optimizer's parameter group 0"):
        follow(ours, ours.graphed(), theirs, 2 * CALLS, between=between)


def test_a_short_batch_has_its_graph(fake_cuda: FakeCuda) -> None:
    ours, theirs = Training(), Training()
    call = ours.graphed()
    follow(ours, call, theirs, 3 * CALLS, count=lambda i: 2 + i % 2)
    assert len(call.graphs) == 2


def test_a_short_last_batch_of_an_epoch_leaves_the_graph_of_full_ones(fake_cuda: FakeCuda) -> None:
    """It runs eagerly at the end of two epochs, then has its own graph. Each step is the right one."""
    ours, theirs = Training(), Training()
    call = ours.graphed()
    graphs: list[set[int]] = []

    def note(training: Training, i: int) -> None:
        if training is ours and i % 4 == 3:
            graphs.append(set(map(id, call.graphs.values())))

    follow(ours, call, theirs, 16, count=lambda i: 3 if i % 4 == 3 else 4, between=note)
    assert [len(each) for each in graphs] == [1, 1, 2, 2]
    assert graphs[0] <= graphs[-1]


def test_batches_of_ever_new_sizes_run_eagerly_and_are_forgotten(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "MAX_COUNTED", 5)
    ours, theirs = Training(), Training()
    call = ours.graphed()
    follow(ours, call, theirs, 12, count=lambda i: 2 + i)
    assert not call.graphs
    assert len(call.calls) == 5


def test_beyond_the_limit_steps_are_eager(fake_cuda: FakeCuda) -> None:
    ours, theirs = Training(), Training()
    call = ours.graphed(limit=1)
    with pytest.warns(RuntimeWarning, match="there are 1 graphs already"):
        follow(ours, call, theirs, 3 * CALLS, count=lambda i: 2 + i % 2)
    assert len(call.graphs) == 1


def _other_memory(training: Training) -> None:
    weight = training.net[0].weight
    weight.data = 2 * weight.data


def _hook(training: Training) -> None:
    training.net[0].register_forward_hook(lambda module, args, result: 2 * result)


def _double(training: Training) -> None:
    training.net[2] = nn.LeakyReLU()


class Scaled(nn.Identity):
    def __init__(self, by: Any) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.by[0] if isinstance(self.by, tuple) else self.by)


def _double_gradient(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(2)


CHANGES: dict[str, tuple[str, Callable[[Training], Any]]] = {
    "eval": ("a layer, an attribute", lambda t: t.net.eval()),
    "momentum of BN": ("a layer, an attribute", lambda t: setattr(t.net[1], "momentum", 0.5)),
    "another layer": ("a layer, an attribute", _double),
    "hook": ("or hook of a layer", _hook),
    "hook of a parameter": ("hooks of a parameter", lambda t: t.net[0].weight.register_hook(lambda grad: 2 * grad)),
    "hook behind it": (
        "hooks of a parameter",
        lambda t: t.net[0].weight.register_post_accumulate_grad_hook(_double_gradient),
    ),
    "frozen": ("requires_grad or hooks of a parameter", lambda t: t.net[0].requires_grad_(False)),
    "memory": ("the memory", _other_memory),
    "decay": ("weight_decay of the opt", lambda t: t.optimizer.param_groups[0].update(weight_decay=0.5)),
    "lr a tensor": ("lr of the opt", lambda t: t.optimizer.param_groups[0].update(lr=torch.tensor(0.5))),
    "state": ("the optimizer's state", lambda t: t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict()))),
    "scaler": ("the GradScaler", lambda t: t.scaler.set_growth_factor(4.0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_noticed(change: str, fake_cuda: FakeCuda) -> None:
    """The warning names the change, the graph is dropped, and every call gives the right result."""
    said, do = CHANGES[change]
    ours, theirs = Training(scaled=True), Training(scaled=True)
    call = ours.graphed()
    with pytest.warns(RuntimeWarning, match=said) as warned:
        follow(ours, call, theirs, 2 * CALLS, between=lambda training, i: do(training) if i == CALLS else None)
    assert len(warned) == 1
    assert len(call.graphs) == 1


@pytest.mark.parametrize("by", [np.float64(0.25), (0.25, 1), torch.tensor(0.25)], ids=["numpy", "tuple", "tensor"])
def test_an_attribute_that_changes_is_noticed(by: Any, fake_cuda: FakeCuda) -> None:
    ours, theirs = Training(), Training()
    for training in (ours, theirs):
        training.net.insert(0, Scaled(type(by)((0.5, 1)) if isinstance(by, tuple) else 2 * by))
    call = ours.graphed()

    def between(training: Training, i: int) -> None:
        if i == CALLS:
            training.net[0].by = by

    with pytest.warns(RuntimeWarning, match="a layer, an attribute"):
        follow(ours, call, theirs, 2 * CALLS, between=between)


SWITCHES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "cuDNN": lambda: torch.backends.cudnn.flags(deterministic=True),
    "fastres.backend": lambda: fastres.backend("reference"),
    "fusions": lambda: fastres.ops.dispatch.fusions(prologue=False),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_noticed(switch: str, fake_cuda: FakeCuda) -> None:
    ours, theirs = Training(), Training()
    call = ours.graphed()
    follow(ours, call, theirs)
    with pytest.warns(RuntimeWarning, match="a switch of torch.backends or of fastres") as warned:
        follow(ours, call, theirs, under=SWITCHES[switch])
    assert len(warned) == 1
    assert len(call.graphs) == 1


def test_no_cached_cast_is_taken_for_a_weight(fake_cuda: FakeCuda) -> None:
    """Autocast is active around all calls, so the eager steps before the capture leave cached casts of the weights."""
    ours, theirs = Training(), Training(dtype=torch.bfloat16)
    call = ours.graphed()
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(WARM_UPS):
            call(*batch(i))
        theirs.net.load_state_dict(ours.net.state_dict())
        theirs.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
        losses = [call(*batch(i))[0] for i in range(CALLS)]  # type: ignore[index]
    assert_equal(losses, [theirs.step(*batch(i))[0].detach() for i in range(CALLS)])


def test_evaluation_between_calls_changes_nothing(fake_cuda: FakeCuda) -> None:
    ours, theirs = Training(), Training()

    def between(training: Training, i: int) -> None:
        training.net.eval()
        training.net(batch(0)[0])
        training.net.train()

    call = ours.graphed()
    follow(ours, call, theirs, between=between)
    assert len(call.graphs) == 1


class Counting(nn.Identity):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def _scheduler_inside(training: Training) -> None:
    schedule = lr_scheduler.StepLR(training.optimizer, 100)
    training.then = schedule.step


def _assigned(training: Training) -> None:
    training.then = lambda: training.optimizer.param_groups[0].__setitem__("momentum", 0.9)


def _counting(training: Training) -> None:
    training.net.append(Counting())


class Averaging(nn.Identity):
    mean = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.75 * self.mean + 0.25 * x.detach().mean()
        return x - self.mean


def _averaging(training: Training) -> None:
    training.net.append(Averaging())


def _input(training: Training) -> None:
    training.net.register_forward_pre_hook(lambda net, args: args[0].mul_(0.5))


def _judge(training: Training) -> None:
    """Add another model whose gradients accumulate although neither the model nor the optimizer has its parameters."""
    judge = nn.Linear(5, 1)
    with torch.no_grad():
        judge.weight.fill_(0.25)
        judge.bias.fill_(0.5)
    training.net.register_forward_hook(lambda net, args, scores: scores + judge(scores) * scores)


def _no_momentum(training: Training) -> None:
    training.net[1].momentum = None


CANT: dict[str, tuple[str, dict[str, Any], Callable[[Training], Any]]] = {
    "item": (r"not permitted.*\n.*\.item\(\)", {}, lambda t: setattr(t, "then", lambda: t.net[0].weight.sum().item())),
    "unfused scaler": (r"not permitted.*\n(.|\n)*GradScaler", {"fused": False, "scaled": True}, lambda t: None),
    "tensor lr": ("not permitted", {"fused": False, "foreach": False, "lr": torch.tensor(0.1)}, lambda t: None),
    "cumulative": ("momentum=None", {}, _no_momentum),
    "scheduler": ("sets a learning rate of the optimizer", {}, _scheduler_inside),
    "scheduler, unfused": ("sets lr of the optimizer", {"fused": False}, _scheduler_inside),
    "scheduler, tensor": ("sets a learning rate of", {"lr": torch.tensor(0.125)}, _scheduler_inside),
    "assigned": ("sets momentum of the optimizer", {}, _assigned),
    "Python's random": ("random numbers on the CPU", {}, lambda t: setattr(t, "then", random.random)),
    "numpy's random": ("random numbers on the CPU", {}, lambda t: setattr(t, "then", np.random.rand)),
    "torch's random": ("random numbers on the CPU", {}, lambda t: setattr(t, "then", lambda: torch.rand(1))),
    "counting": ("it changes a layer, an attribute", {}, _counting),
    "averaging": ("it changes a layer, an attribute", {}, _averaging),
    "input": ("it changes an input in place", {}, _input),
    "another model": ("gradients in parameters that neither(.|\n)*nn.ModuleList", {}, _judge),
}


@pytest.mark.parametrize("cause", CANT)
def test_what_no_graph_holds_is_refused(cause: str, fake_cuda: FakeCuda) -> None:
    """The capture raises an error that names the reason. All state is then as before, and eager steps still work."""
    said, how, do = CANT[cause]
    ours, theirs = (Training(zero="start", **how) for _ in range(2))
    for training in (ours, theirs):
        do(training)
    call, here = ours.graphed(), fake_cuda.stream
    drawn = random.getstate(), np.random.get_state()[2], torch.get_rng_state()  # noqa: NPY002
    calls = WARM_UPS + 1  # the first has another signature, because there are no gradients yet
    follow(ours, call, theirs, calls)
    before, groups = ours.state(), ours.optimizer.param_groups
    drawn = random.getstate(), np.random.get_state()[2], torch.get_rng_state()  # noqa: NPY002
    for _ in range(2):
        with pytest.raises(RuntimeError, match=said):
            call(*batch(calls))
    assert_equal(ours.state(), before)
    assert fake_cuda.stream is here
    assert ours.optimizer.param_groups is groups
    assert type(groups[0]) is dict
    assert (random.getstate(), np.random.get_state()[2]) == drawn[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert not call.graphs
    assert_equal(ours.step(*batch(calls)), theirs.step(*batch(calls)))
    assert_equal(ours.state(), theirs.state())


def test_a_refused_recording_leaves_attributes_and_other_gradients(fake_cuda: FakeCuda) -> None:
    """Tensors that a failed capture assigned are replaced by those from before, because their values were never
    computed."""
    training = Training()
    _averaging(training)
    layer, judge = training.net[-1], nn.Linear(5, 1)
    training.net.register_forward_hook(lambda net, args, scores: scores + judge(scores))
    call = training.graphed()
    for i in range(WARM_UPS):
        call(*batch(i))
    mean, gradient = layer.mean, judge.weight.grad
    assert gradient is not None
    values = mean.clone(), gradient.clone()
    with pytest.raises(RuntimeError, match="a layer, an attribute"):
        call(*batch(0))
    assert layer.mean is mean
    assert judge.weight.grad is gradient
    assert_equal((mean, gradient), values)


def test_a_step_may_have_no_inputs(fake_cuda: FakeCuda) -> None:
    ours, theirs, given = Training(), Training(), batch(0)
    call = fastres.graphed(lambda: ours.step(*given), ours.net, ours.optimizer, ours.scaler)
    for _ in range(CALLS):
        call()
        theirs.step(*given)
        assert_equal(ours.state(), theirs.state())


@pytest.mark.parametrize("name", ["cuda.matmul", "cudnn.conv"])
def test_the_newer_names_of_tf32_are_read(name: str, fake_cuda: FakeCuda) -> None:
    """Once the newer switches are set, PyTorch may raise an error when the older ones are read."""
    training, of = Training(), operator.attrgetter(name)(torch.backends)
    call, before = training.graphed(), of.fp32_precision
    call(*batch(0))
    try:
        of.fp32_precision = "tf32"
        with pytest.warns(RuntimeWarning, match="a switch of torch.backends"):
            call(*batch(0))
        found = dispatch.precision(torch.float32, torch.device("cuda"))
    finally:
        of.fp32_precision = before
    assert found == ("tf32" if name == "cudnn.conv" else "ieee")


def test_parameters_need_their_optimizer(fake_cuda: FakeCuda) -> None:
    """Without its optimizer, a graph would keep the learning rate of the capture."""
    training = Training()
    call = fastres.graphed(training.step, training.net)
    for i in range(WARM_UPS):
        call(*batch(i))
    with pytest.raises(RuntimeError, match="not given the SGD that steps"):
        call(*batch(0))


def test_errors_of_other_kinds_pass_through(fake_cuda: FakeCuda) -> None:
    training, calls, here = Training(), [], fake_cuda.stream

    def then() -> None:
        calls.append(None)
        if len(calls) > WARM_UPS:
            raise MemoryError

    training.then = then
    call = training.graphed()
    for i in range(WARM_UPS):
        call(*batch(i))
    with pytest.raises(MemoryError):
        call(*batch(0))
    assert len(calls) == WARM_UPS + 1
    assert fake_cuda.stream is here


def test_a_scaled_step_that_failed_leaves_no_scale(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler passes its scale to Adam as attributes before Adam refuses the capture; these attributes must be
    removed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    training = Training(scaled=True)
    training.optimizer = torch.optim.Adam(training.net.parameters(), fused=True)  # type: ignore[assignment]
    call = training.graphed()
    for i in range(WARM_UPS):
        call(*batch(i))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturable is False"):
            call(*batch(0))
    assert not {"grad_scale", "found_inf"} & vars(training.optimizer).keys()
    training.step(*batch(0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cumulative_average_is_refused_by_name(
    backend: str, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    units = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)) for _ in "ab")
    units[1][1].momentum = None
    call = fastres.graphed(lambda x: block.residual_block(x, [tuple(u) for u in units], None).sum(), units)
    x = torch.randn(2, 4, 5, 5)
    with fastres.backend(backend):
        for _ in range(WARM_UPS):
            call(x)
        with pytest.raises(RuntimeError, match=REFUSED):
            call(x)
    assert int(units[1][1].num_batches_tracked) == WARM_UPS


# without graphs


def test_on_a_cpu_the_step_is_called() -> None:
    ours, theirs = Training(), Training()
    call = ours.graphed()
    follow(ours, call, theirs)
    assert not call.graphs


@pytest.mark.parametrize(
    ("error", "said", "ask"),
    [
        (TypeError, "step must be a function", lambda t: fastres.graphed(3, t.net)),
        (TypeError, "model must be an nn.Module", lambda t: fastres.graphed(t.step, t.step)),
        (TypeError, "model must be an nn.Module that has param", lambda t: fastres.graphed(t.step, nn.ReLU())),
        (
            TypeError,
            "optimizer must be of type Optimizer or None, got",
            lambda t: fastres.graphed(t.step, t.net, t.net),
        ),
        (TypeError, "scaler must be of type GradScaler", lambda t: fastres.graphed(t.step, t.net, t.optimizer, 8.0)),
        (ValueError, "limit must be at least 1: got 0", lambda t: t.graphed(limit=0)),
        (ValueError, "does not accept DataParallel", lambda t: fastres.graphed(t.step, nn.DataParallel(t.net))),
        (ValueError, "does not accept SyncBatchNorm", lambda t: fastres.graphed(t.step, nn.SyncBatchNorm(3))),
        (TypeError, "tensors on cpu that do not require gradients, not int", lambda t: t.graphed()(3)),
        (TypeError, "not meta", lambda t: t.graphed()(batch(0)[0].to("meta"))),
        (TypeError, "requires_grad=True", lambda t: t.graphed()(batch(0)[0].requires_grad_())),
        (TypeError, "or None, not a float", lambda t: fastres.graphed(lambda x: 3.0, t.net)(batch(0)[0])),
        (TypeError, "or None, not a list", lambda t: fastres.graphed(lambda x: [x], t.net)(batch(0)[0])),
    ],
)
def test_bad_arguments_are_refused(error: type[Exception], said: str, ask: Callable[[Training], Any]) -> None:
    with pytest.raises(error, match=said):
        ask(Training())


# on a GPU


def cifar(momentum: float | None, dropout: float = 0.0, **how: Any) -> tuple[nn.Module, Any, Callable[..., Tensor]]:
    """Return a net on the GPU, its optimizer and its step."""
    torch.manual_seed(0)
    net = families.named("cifar-8").cuda().to(memory_format=torch.channels_last)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = momentum
    optimizer = torch.optim.SGD(net.parameters(), **{"lr": 0.125, "momentum": 0.9, "fused": True, **how})

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(F.dropout(net(x), dropout), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return net, optimizer, step


def images(i: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(i))
    return x.cuda().contiguous(memory_format=torch.channels_last), torch.arange(8, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("where", [None, "cpu", "cuda"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gpu_follows_the_eager_steps(dropout: float, where: str | None) -> None:
    """The learning rate falls, and dropout draws new random numbers in every replay."""
    losses, states = [], []
    for graph in (True, False):
        lr = 0.125 if where is None else torch.tensor(0.125, device=where)
        net, optimizer, step = cifar(0.1, dropout, lr=lr)
        schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
        call: Any = fastres.graphed(step, net, optimizer) if graph else step
        torch.cuda.manual_seed(1)
        losses.append([])
        for i in range(CALLS):
            losses[-1].append(call(*images(i)).detach())
            schedule.step()
        assert not graph or len(call.graphs) == 1
        states.append(net.state_dict())
    # Libraries may choose other algorithms during a capture. A stale learning rate would give a far larger error.
    torch.testing.assert_close(losses[0], losses[1], rtol=REPLAYED, atol=REPLAYED)
    torch.testing.assert_close(states[0], states[1], rtol=REPLAYED, atol=REPLAYED)


@pytest.mark.gpu
def test_gpu_adamw_and_autocast_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With capturable=True, gradients zeroed first and a short batch, parameters differ from eager ones by at most a
    tenth of the distance that training moved them. On a CPU, leaving out one step gives a quarter of it, and a stale
    batch half of it."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    nets = []
    for graph in (True, False):
        torch.manual_seed(0)
        net = fastres.resnet18(num_classes=10).cuda()
        start = [p.detach().clone() for p in net.parameters()]
        # With such a large eps, updates are proportional to the gradients. With a small one, rounding errors of bf16
        # would flip the signs of updates for small gradients.
        optimizer = torch.optim.AdamW(net.parameters(), 2**-10, eps=1.0, capturable=True)

        def step(x: Tensor, y: Tensor, net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            return loss

        call: Any = fastres.graphed(step, net, optimizer) if graph else step
        for i in range(2 * CALLS):
            x, y = images(i)
            last = call(x[: 8 - i % 2], y[: 8 - i % 2])
        assert torch.isfinite(last)
        assert not graph or len(call.graphs) == 2
        nets.append(net)
    ours, theirs = ([p.detach() for p in net.parameters()] for net in nets)
    apart, gone = (sum((a - b).square().sum() for a, b in zip(theirs, others, strict=True)) for others in (ours, start))
    assert apart.sqrt() <= 0.1 * gone.sqrt()
    assert all(p.grad is not None for p in nets[0].parameters())


@pytest.mark.gpu
def test_another_thread_may_allocate_pinned_memory() -> None:
    """A capture succeeds while another thread pins memory, and keeps it so that each allocation calls the driver."""
    started, done = threading.Event(), threading.Event()

    def pin() -> None:
        kept = []
        while not done.is_set():
            kept.append(torch.empty(1024).pin_memory())
            started.set()

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            assert started.wait(60)
            for _ in range(5):
                net, optimizer, step = cifar(0.1)
                call = fastres.graphed(step, net, optimizer)
                for i in range(WARM_UPS + 1):
                    call(*images(i))
                assert len(call.graphs) == 1
        finally:
            done.set()
        pinning.result()


@pytest.mark.gpu
@pytest.mark.parametrize("cause", ["cumulative", "item"])
def test_gpu_refuses_in_words(cause: str) -> None:
    """After the refusal, eager steps still work."""
    net, optimizer, step = cifar(None if cause == "cumulative" else 0.1)
    inner: Any = (lambda x, y: step(x, y)) if cause == "cumulative" else lambda x, y: step(x, y) * step(x, y).item()
    call, here = fastres.graphed(inner, net, optimizer), torch.cuda.current_stream()
    for i in range(WARM_UPS):
        call(*images(i))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=REFUSED if cause == "cumulative" else "can't be recorded"):
        call(*images())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.cuda.current_stream() == here
    with contextlib.suppress(RuntimeError):  # a second attempt may fail in the same way
        call(*images())
    assert torch.isfinite(step(*images()))
