"""The training loop: compared with a plain loop, with CUDA graphs, compiled, on a GPU; losses that aren't finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training
from fake_cuda import FakeCuda
from tolerances import GPU_TRAINED, GPU_TRAINED_ZERO, NETS, ROUNDING, SUMS
from torch import Tensor, nn
from training import CPU, SHORT, assert_same, short, steps, trainer, weights

from fastres.models import families
from fastres.train import checkpoint
from fastres.train.data import Folder
from fastres.train.loop import (
    Errors,
    NonFiniteError,
    Trainer,
    errors,
    graph_choice,
    sgd,
    train,
)
from fastres.train.process import Place, Signals
from fastres.train.recipe import RECIPES, Ema, Warmup

pytestmark = pytest.mark.usefixtures("one_thread")
undisturbed = training.undisturbed


def test_the_command_to_run_next_names_the_images(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.run = dataclasses.replace(ours.run, root=Path("my images"))
    assert ours._then().endswith("best.pt --root 'my images'")
    ours.loader.train = object.__new__(Folder)
    assert ours._then().endswith("best.pt --data 'my images'")


@pytest.mark.parametrize(
    ("asked", "device", "world", "compile", "graphs", "why"),
    [
        ("auto", "cpu", 1, "none", False, "cpu has no CUDA graphs"),
        ("off", "cpu", 2, "none", False, "--cuda-graph off"),
        ("off", "cuda", 1, "none", False, "--cuda-graph off"),
        ("auto", "cuda", 1, "none", True, "one process on a GPU"),
        ("on", "cuda", 1, "inductor", True, "--cuda-graph on"),
        ("auto", "cuda", 1, "inductor", False, "--compile inductor launches the kernels itself"),
        ("auto", "cuda", 2, "none", False, "DistributedDataParallel exchanges gradients during the backward pass"),
        ("on", "cuda", 2, "none", True, "--cuda-graph on; gradients are averaged after it"),
    ],
)
def test_graphs_serve_where_the_table_says(
    asked: str, device: str, world: int, compile: str, graphs: bool, why: str, tmp_path: Path
) -> None:
    run = short(tmp_path, cuda_graph=asked, compile=compile)
    chosen, reason = graph_choice(run, Place(0, world, torch.device(device)))
    assert chosen == graphs
    assert reason.startswith(why)


def test_a_graphed_training_is_the_same(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with (fake) CUDA graphs gives the same bits, with two micro-batches per update, validation and EMA."""
    fake_cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr("fastres.train.loop.graph_choice", lambda run, place: (True, ""))
    train(short(tmp_path))
    assert len(fake_cuda.modes) == 2  # two graphs: the first micro-batch creates the gradients, the second adds to them
    ours, theirs = (torch.load(out / checkpoint.LAST, weights_only=True) for out in (tmp_path, undisturbed))
    for name in ("model", "ema"):
        assert_same(ours[name], theirs[name])
    for row, other in zip(ours["history"], theirs["history"], strict=True):
        assert {k: v for k, v in row.items() if "second" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "second" not in k}, rel=0, abs=0, nan_ok=True
        )


def test_a_bad_loss_in_a_graph_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bad loss, the buffers changed by a graph replay are restored, too."""
    fake_cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr("fastres.train.loop.graph_choice", lambda run, place: (True, ""))
    checkpoint.prepare(tmp_path)
    ours = trainer(tmp_path)
    batches = list(ours.loader.training(0, 8))
    steps(ours, iter(batches), 6)
    assert len(fake_cuda.modes) == 2
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    x, y = batches[12]
    with pytest.raises(NonFiniteError, match="iteration 6"):
        ours.step(iter([(x * float("nan"), y), batches[13]]))
    assert_same(ours.model.state_dict(), before)


def test_a_plain_loop_gives_the_same_weights(tmp_path: Path) -> None:
    """The weights equal those of a plain loop with two micro-batches, unfused SGD and a hand-written EMA."""
    ours = trainer(tmp_path)
    batches = list(ours.loader.training(0, 4))
    torch.manual_seed(0)
    net = families.build("cifar", 8, in_channels=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1.0, momentum=0.9, weight_decay=5e-4)
    averaged: list[Tensor] = []
    moving = ours.loader.training(0, 4)
    for i in range(4):
        ours.step(moving)
        optimizer.param_groups[0]["lr"] = ours.lr(i)
        optimizer.zero_grad()
        for x, y in batches[2 * i : 2 * i + 2]:
            (F.cross_entropy(net(x), y) / 2).backward()
        optimizer.step()
        if i % 2 == 0:
            values = [p.detach().clone() for p in net.parameters()]
            averaged = [0.9 * a + 0.1 * v for a, v in zip(averaged, values, strict=True)] if averaged else values
    for name, value in net.state_dict().items():  # fp32 operations in another order
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=SUMS, atol=ROUNDING)
    assert ours.ema is not None
    for p, value in zip(ours.ema.module.parameters(), averaged, strict=True):
        torch.testing.assert_close(p, value, rtol=SUMS, atol=ROUNDING)


def test_the_average_copies_while_it_warms(tmp_path: Path) -> None:
    ours = trainer(tmp_path, dataclasses.replace(SHORT, ema=Ema(0.9, every=2, warm=1)))
    moving = ours.loader.training(0, 3)
    steps(ours, moving, 3)
    assert ours.ema is not None
    assert_same(ours.ema.module.state_dict(), ours.model.state_dict())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_keeps_fp32_weights(tmp_path: Path, dtype: str) -> None:
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=2), dtype=dtype))
    assert math.isfinite(done.error)
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert all(value.dtype == torch.float32 for value in saved["model"].values() if value.is_floating_point())
    assert bool(saved["scaler"]) == (dtype == "fp16")


def test_warmup_ends_by_the_training_error(tmp_path: Path) -> None:
    rule = Warmup(lr=0.05, error=0.88, from_depth=8, window=2)
    recipe = dataclasses.replace(SHORT, warmup=rule, lr=0.2, iterations=12)
    train(short(tmp_path, recipe, log_every=4))
    rows = [row for row in torch.load(tmp_path / checkpoint.LAST, weights_only=True)["history"] if "train_error" in row]
    below = [row["train_error"] < 0.88 for row in rows]
    end = int(rows[below.index(True)]["iteration"])
    assert 2 <= end < 12
    assert [int(row["iteration"]) for row in rows if row["iteration"] <= end] == list(range(2, end + 1, 2))
    assert all((row["lr"] == 0.05) == (row["iteration"] <= end) for row in rows)


def test_errors_are_counted() -> None:
    scores = torch.randn(50, 7)
    labels = torch.randint(7, (50,))
    found = errors(lambda x: x, [(scores[:32], labels[:32]), (scores[32:], labels[32:])], CPU, 7)
    ranks = [int((row > row[label]).sum()) for row, label in zip(scores, labels, strict=True)]
    loss = F.cross_entropy(scores, labels).item()
    expected = Errors(loss, sum(r >= 1 for r in ranks) / 50, sum(r >= 5 for r in ranks) / 50, 50)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=SUMS)
    assert errors(lambda x: x, [(scores[:, :4], labels.clamp(max=3))], CPU, 4).top5 is None


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(tmp_path: Path, lag: int, what: str) -> None:
    ours = trainer(tmp_path)
    ours.lag = lag  # 1 as on a GPU, where the host reads the result one iteration later
    checkpoint.prepare(tmp_path)

    def poisoned() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(ours.loader.training(0, 8)):
            yield (x * float("nan") if what == "loss" and i == 2 * 3 + 1 else x), y

    def explode(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if ours.iteration == 3 else gradient

    if what == "gradient":
        next(ours.model.parameters()).register_hook(explode)
    batches = poisoned()
    with pytest.raises(NonFiniteError, match=rf"iteration 3 is not finite .*{tmp_path / checkpoint.LAST}") as stopped:
        steps(ours, batches, 8)
    assert str(stopped.value).endswith("A lower lr may help, but that is another run: start it with another --out")
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    good = trainer(tmp_path / "good")
    clean = good.loader.training(0, 3)
    steps(good, clean, 3)
    assert saved["iteration"] == 3
    assert_same(saved["model"], good.model.state_dict())
    for state, expected in zip(saved["optimizer"]["state"].values(), good.optimizer.state.values(), strict=True):
        assert torch.equal(state["momentum_buffer"], expected["momentum_buffer"])
    assert torch.equal(saved["meter"], good.meter)


def test_an_unknown_backend_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    with pytest.raises(ValueError, match="no backend 'fastres' here; available are inductor"):
        trainer(tmp_path, compile="fastres")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "fastres"])
def test_a_compiled_net_trains_alike(tmp_path: Path, backend: str) -> None:
    """A compiled net trains alike, and its checkpoint is that of the plain net, which can resume without compiling."""
    recipe = dataclasses.replace(SHORT, iterations=3, ema=None)
    train(short(tmp_path / "plain", recipe))
    train(short(tmp_path / "compiled", recipe, compile=backend))
    ours, theirs = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # fp32 operations in another order
        torch.testing.assert_close(ours[name], value, rtol=NETS, atol=SUMS)
    train(short(tmp_path / "compiled", recipe, resume=True))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["off", "on"])
def test_a_gpu_trains_as_the_cpu_does(tmp_path: Path, graph: str) -> None:
    """A GPU gives the weights of the CPU up to rounding, with and without a CUDA graph."""
    # Each has two micro-batches, and the second adds to the gradients.
    recipe = dataclasses.replace(SHORT, iterations=4)
    train(short(tmp_path / "gpu", recipe, device="cuda", dtype="fp32", cuda_graph=graph))
    train(short(tmp_path / "cpu", recipe))
    ours, theirs = weights(tmp_path / "gpu"), weights(tmp_path / "cpu")
    for name, value in theirs.items():
        # Four steps amplify rounding errors: weights changed by one epsilon end up to 5e-6 apart.
        torch.testing.assert_close(ours[name].cpu(), value, rtol=GPU_TRAINED, atol=GPU_TRAINED_ZERO)
    done = train(short(tmp_path / "bf16", recipe, device="cuda", cuda_graph=graph))
    assert math.isfinite(done.error)


@pytest.mark.gpu
def test_a_bad_loss_on_a_gpu_stops_at_good_weights(tmp_path: Path) -> None:
    checkpoint.prepare(tmp_path)
    ours = Trainer(short(tmp_path, device="cuda"), Place(0, 1, torch.device("cuda", 0)), Signals())
    ours.model.train()
    poisoned = ((x * float("nan") if i == 7 else x, y) for i, (x, y) in enumerate(ours.loader.training(0, 8)))
    with pytest.raises(NonFiniteError, match="iteration 3"):
        steps(ours, poisoned, 8)
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_norms_have_their_own_decay_if_a_recipe_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    groups = sgd(net, RECIPES["imagenet-modern"]).param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert [decays[p] for p in net.parameters()] == [2e-5, 2e-5, 0.0, 0.0, 2e-5, 2e-5]
    (group,) = sgd(net, RECIPES["cifar-2015"]).param_groups
    assert (group["weight_decay"], group["momentum"], len(group["params"])) == (1e-4, 0.9, 6)


def test_the_first_update_from_zero_momentum_is_torchs() -> None:
    nets, recipe = [], RECIPES["cifar-2015"]
    for make in (lambda net: sgd(net, recipe), lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9, 0, 1e-4)):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = make(net)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        nets.append(net.weight.detach())
    torch.testing.assert_close(*nets)
