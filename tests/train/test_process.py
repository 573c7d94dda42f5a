"""Signals that stop a training, and trainings with several processes."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from fake_cuda import FakeCuda
from tolerances import ROUNDING, SUMS, VALIDATION
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import SHORT, assert_same, ends, ranks, short, signalled, trainer, weights

import fastres
from fastres.train import checkpoint
from fastres.train.loop import Trainer, train
from fastres.train.process import average, place
from fastres.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
undisturbed = training.undisturbed


def test_sigterm_and_ctrl_c_save_first(tmp_path: Path, undisturbed: Path) -> None:
    for number, iteration, validating, code in (
        (signal.SIGTERM, 1, False, 143),
        (signal.SIGINT, 4, True, 130),
        (signal.SIGINT, 6, False, 130),
    ):
        assert ends(signalled, tmp_path, number, iteration, validating) == code
        saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
        assert saved["iteration"] == iteration + (not validating)
    train(short(tmp_path, resume=True))
    assert_same(weights(tmp_path), weights(undisturbed))


@pytest.mark.parametrize(("resume", "how"), [(False, "--resume"), (True, "the same command")])
def test_a_stopped_training_says_how_to_resume(
    resume: bool, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = trainer(tmp_path, resume=resume)
    checkpoint.prepare(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        training._leave(signal.SIGINT)
    assert f"saved {tmp_path / checkpoint.LAST}; {how} continues from it" in capsys.readouterr().err


def _ranked(out: Path, recipe: Recipe) -> None:
    train(short(out, recipe, eval_every=2))


def _one_rank_signalled(out: Path) -> None:
    if os.environ["RANK"] == "1":
        signalled(out, signal.SIGTERM, 4, False)
    train(short(out))


def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    assert ranks(_one_rank_signalled, tmp_path) == [(143, ""), (143, "")]
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["iteration"] == 5


def _one_rank_failing(out: Path) -> None:
    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == 3 and not self.main:
            raise torch.OutOfMemoryError("no memory")
        whole(self, batches)

    whole = Trainer.step
    Trainer.step = step  # type: ignore[method-assign]
    train(short(out))


def test_a_process_that_fails_ends_all(tmp_path: Path) -> None:
    (first, said), (second, why) = ranks(_one_rank_failing, tmp_path)
    assert (first, second) == (1, 1)
    assert said.startswith("PeerError: another process has ended; its own output says why (")
    assert why.startswith(
        f"OutOfMemoryError: no memory; --resume continues from {tmp_path / checkpoint.LAST}; a smaller"
    )


def test_two_processes_are_one_that_accumulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gloo, two processes train like one that accumulates gradients.

    Parameters agree up to rounding, running statistics are rank 0's, and validation covers each image once.
    """
    recipe = dataclasses.replace(SHORT, iterations=2, ema=None)
    assert ranks(_ranked, tmp_path / "two", recipe) == [(0, ""), (0, "")]

    calls = 0

    def micro(self: Trainer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        before = [buffer.clone() for buffer in self.model.buffers()]
        result = whole(self, x, y)
        if calls % 2:  # the micro-batch of rank 1, whose running statistics are discarded
            torch._foreach_copy_(list(self.model.buffers()), before)
        calls += 1
        return result

    whole = Trainer._micro
    monkeypatch.setattr(Trainer, "_micro", micro)
    train(short(tmp_path / "one", recipe, eval_every=2))
    one, two = (torch.load(tmp_path / name / checkpoint.LAST, weights_only=True) for name in ("one", "two"))
    assert calls == 4
    for name, value in one["model"].items():  # fp32 sums in another order, over two steps
        torch.testing.assert_close(
            two["model"][name], value, rtol=SUMS, atol=ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert one["history"][-1]["val_loss"] == pytest.approx(two["history"][-1]["val_loss"], rel=VALIDATION)
    assert two["latest"]["count"] == 359
    assert len(two["rng"]) == 2


def _graphed_rank(out: Path, recipe: Recipe, graphs: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if graphs:
            FakeCuda(patch)
            patch.setattr("fastres.train.loop.graph_choice", lambda run, place: (True, ""))
        train(short(out, recipe, eval_every=recipe.iterations))


def test_processes_with_graphs_train_as_with_ddp(tmp_path: Path) -> None:
    """Gradients averaged after a (fake) graph replay have the same bits as with DistributedDataParallel, with gloo.

    Two processes leave only one order of summation.
    """
    recipe = dataclasses.replace(SHORT, iterations=6, ema=None)
    for graphs in (True, False):
        assert ranks(_graphed_rank, tmp_path / str(graphs), recipe, graphs) == [(0, ""), (0, "")]
    ours, theirs = (torch.load(tmp_path / str(g) / checkpoint.LAST, weights_only=True) for g in (True, False))
    assert_same(ours["model"], theirs["model"])


def _averaged(rank: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shares = [torch.randn(2, 3, 5, 5) for _ in range(2)]
    gradients = [torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for x in shares]
    for p, gradient in zip(net.parameters(), gradients[rank], strict=True):
        p.grad = gradient.clone()
    average(net.parameters())
    for p, pair in zip(net.parameters(), zip(*gradients, strict=True), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, pair[0] / 2 + pair[1] / 2)
    net[0].bias.grad = None
    with pytest.raises(RuntimeError, match="1 of 2 parameters have no gradient"):
        average(net.parameters())
    wrapped = DistributedDataParallel(net)
    for model in (wrapped, nn.Sequential(wrapped), net):
        with pytest.raises(ValueError, match=r"does not accept DistributedDataParallel.*average the gradients"):
            fastres.graphed(lambda x: wrapped(x).sum(), model)


def _averaging() -> None:
    """In each rank, compare `average` with the mean, and check what `average` and `graphed` reject."""
    with place("cpu") as here:
        _averaged(here.rank)


def test_gradients_are_averaged_over_processes() -> None:
    assert ranks(_averaging) == [(0, ""), (0, "")]
