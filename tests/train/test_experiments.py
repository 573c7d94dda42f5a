"""The paper's experiments in miniature: what they train, measure, conclude and write."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastres import experiments
from fastres.cli import experiment as experiment_command
from fastres.cli.main import main
from fastres.experiments import Net, Trained, degradation, layer_responses
from fastres.models import families
from fastres.train.loop import Summary, Trainer
from fastres.train.recipe import QUICK, RECIPES, Steps, lasting

TINY = ["--depths", "8", "14", "--seeds", "2", "--iterations", "2", "--device", "cpu"]
SVG = b"<?xml"


pytestmark = pytest.mark.usefixtures("one_thread")


def experiment(name: str, out: Path, *more: str) -> int:
    return main(["experiment", name, "--out", str(out), *more])


def planned(*arguments: str) -> experiments.Plan:
    parser = argparse.ArgumentParser()
    experiment_command.arguments(parser)
    return experiment_command.plan(parser.parse_args(arguments))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A small `degradation` in one go: its folder and exit code."""
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    code = experiment("degradation", out, *TINY)
    torch.set_num_threads(threads)
    return out, code


def test_degradation_writes_table_rows_and_picture(whole: tuple[Path, int]) -> None:
    out, code = whole
    found = rows(out / "degradation.csv")
    assert {(row["net"], row["seed"]) for row in found} == {
        (net, seed) for net in ("plain-8", "plain-14", "ResNet-8", "ResNet-14") for seed in "01"
    }
    for row in found:
        net, seed = (row["family"], row["depth"]), row["seed"]
        log = rows(out / "runs" / f"{'-'.join(net)}-seed{seed}" / "log.csv")
        assert row["train_error"] == [line["train_error"] for line in log if line["train_error"]][-1]
        assert row["val_error"] == [line["val_error"] for line in log if line["val_error"]][-1]
    table = (out / "degradation.md").read_text()
    mean = sum(100 * float(row["train_error"]) for row in found if row["net"] == "plain-14") / 2
    line = next(line for line in table.splitlines() if line.startswith("| plain-14 |"))
    assert f"| {mean:.2f} ± " in line
    assert "| digits | images, crop" in line
    assert "iterations: 2 (64000)" in table
    assert code == 3 * ("claim is not seen" in table)
    assert (out / "degradation.svg").read_bytes().startswith(SVG)


def test_a_picture_is_redrawn_from_its_table(
    whole: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = whole
    found = rows(out / "degradation-curves.csv")
    log = [line for line in rows(out / "runs" / "cifar-plain-8-seed1" / "log.csv") if line["val_error"]]
    mine = [row for row in found if (row["net"], row["seed"]) == ("plain-8", "1")]
    assert [(row["iteration"], row["val_error"]) for row in mine] == [(at["iteration"], at["val_error"]) for at in log]
    assert all(row["train_error"] for row in mine)
    shutil.copy(out / "degradation-curves.csv", tmp_path)
    assert main(["experiment", "degradation", "--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "degradation.svg").read_bytes() == (out / "degradation.svg").read_bytes()
    for name, other, message in (
        ("shortcuts", [], "shortcuts-curves.csv can't be read: No such file or directory; leave out --redraw"),
        ("degradation", ["--no-plot"], "give one of them"),
    ):
        with pytest.raises(SystemExit):
            main(["experiment", name, "--redraw", "--out", str(tmp_path), *other])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no rows"),
        ("net,seed,iteration,train_error,val_error\nplain-8,0,1", "one is cut short"),
        ("net,seed,iteration,train_error,val_error\nplain-8,0,1,x,0.5\n", "could not convert string to float: 'x'"),
        ("layer,std\n1,0.5\n", "'net'"),
    ],
)
def test_a_damaged_table_is_not_drawn(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "degradation-curves.csv").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", "degradation", "--redraw", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "degradation-curves.csv is damaged (" in err
    assert said in err
    assert not (tmp_path / "degradation.svg").exists()


def test_what_is_there_is_not_trained_again(whole: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    out, code = whole
    before = (out / "degradation.csv").read_bytes()
    monkeypatch.setattr(Trainer, "step", lambda self, batches: pytest.fail("an iteration"))
    assert experiment("degradation", out, *TINY) == code
    assert (out / "degradation.csv").read_bytes() == before


def test_an_interrupted_experiment_goes_on(
    whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = Trainer.step, 0

    def failing(self: Trainer, batches: Any) -> None:
        nonlocal done
        done += 1
        if done == 6:  # in the middle of the third training
            raise KeyboardInterrupt
        step(self, batches)

    monkeypatch.setattr(Trainer, "step", failing)
    assert experiment("degradation", tmp_path, *TINY) == 130
    assert not (tmp_path / "degradation.csv").exists()
    assert experiment("degradation", tmp_path, *TINY) == whole[1]
    assert (tmp_path / "degradation.csv").read_bytes() == (whole[0] / "degradation.csv").read_bytes()


def test_ctrl_c_stops_where_trainings_are_done(
    whole: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restore = Trainer.restore

    def interrupted(self: Trainer, path: Path) -> None:
        restore(self, path)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "restore", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist has another
    try:
        assert experiment("degradation", whole[0], *TINY) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert "[1/8]" in said
    assert "[2/8]" not in said


def test_runs_of_other_settings_are_not_taken_for_these(
    whole: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        experiment("degradation", whole[0], *TINY[:-3], "4", "--device", "cpu")
    assert stopped.value.code == 2
    assert "recipe.iterations: 2 there, 4 here" in capsys.readouterr().err


def ended(net: Net, seed: int, train_error: float) -> Trained:
    history = [{"iteration": i, "train_error": e} for i, e in ((50, 0.9), (100, train_error))]
    return Trained(net, seed, Path(), [*history, {"iteration": 100, "val_error": 0.5, "val_error_top5": 0.1}])


@pytest.mark.parametrize(
    ("plain", "residual", "seen", "said"),
    [
        ((0.1, 0.2, 0.8), (0.05, 0.059, 0.04), True, "claim is seen"),
        ((0.1, 0.2, 0.105), (0.05, 0.05, 0.04), False, "not so here: all deeper plain nets train worse."),
        ((0.1, 0.2, 0.8), (0.05, 0.07, 0.04), False, "not so here: no deeper residual net does."),
        ((0.8, 0.8, 0.8), (0.7, 0.8, 0.8), False, "too few iterations"),
        ((0.0, 0.0, 0.001), (0.0, 0.0, 0.0), False, "too easy"),
    ],
)
def test_the_verdict_is_on_means(plain: tuple[float, ...], residual: tuple[float, ...], seen: bool, said: str) -> None:
    trained = [
        ended(Net(family, depth), seed, error + shift)
        for family, errors in (("cifar-plain", plain), ("cifar", residual))
        for depth, error in zip((20, 32, 44), errors, strict=True)
        for seed, shift in enumerate((-0.03, 0.0, 0.03))
    ]
    finding = degradation(planned("degradation", "--device", "cpu"), trained)
    assert finding.seen is seen
    assert said in " ".join(finding.words)
    row = finding.body[0]
    assert row[:3] == ("plain-20", "none printed", f"{100 * plain[0]:.2f} ± 3.00")


def test_seconds_are_those_of_the_last_row() -> None:
    history = [{"iteration": 4.0, "seconds": 8.0}, {"iteration": 8.0, "seconds": 15.5}]
    assert Trained(Net("cifar", 20), 0, Path(), history).seconds == 15.5
    assert math.isnan(Trained(Net("cifar", 20), 0, Path(), [{"iteration": 8.0}]).seconds)


def test_seconds_that_nobody_recorded_are_left_out() -> None:
    wanted = planned("degradation", "--quick", "--device", "cpu")
    finding = experiments.Finding([], ["net"], [["plain-8"]], [])
    assert experiments.report(wanted, finding, 37.4).endswith("; the trainings took 37 s.\n")
    assert "took" not in experiments.report(wanted, finding, math.nan)
    ended = Summary(8, 0.1, 0.0, 0.1, Path("out"), 15.5, "the command")
    assert "best 10.00%, 0:00:16; out holds" in str(ended)
    assert "best 10.00%; out holds" in str(replace(ended, seconds=math.nan))


def test_a_single_depth_has_no_verdict() -> None:
    trained = [ended(Net(family, 20), 0, 0.5) for family in ("cifar-plain", "cifar")]
    finding = degradation(planned("degradation", "--depths", "20", "--seeds", "1", "--device", "cpu"), trained)
    assert finding.seen is None
    assert finding.body[1][1:3] == ("8.75 (Table 6)", "50.00")


@pytest.mark.extra  # a step of three ImageNet nets; what an experiment does the digits show above
def test_shortcuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--depths", "18", "--seeds", "1", "--iterations", "1", "--device", "cpu"]
    assert experiment("shortcuts", tmp_path, *tiny) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"paper-18-{o}-seed0" for o in "ABC"]
    shutil.rmtree(tmp_path / "runs")
    assert [row["net"] for row in rows(tmp_path / "shortcuts.csv")] == [f"ResNet-18 {option}" for option in "ABC"]
    text = capsys.readouterr().out
    assert "| ResNet-18 A | 27.88 (Table 2) |" in text
    assert "testing: one centre crop (10 crops)" in text
    assert (tmp_path / "shortcuts.svg").read_bytes().startswith(SVG)


def test_the_paper_s_table_3_stands_beside() -> None:
    names = [net.errors_of_paper() for net in planned("shortcuts", "--device", "cpu").nets]
    assert names == ["25.03/7.76 (Tables 2, 3)", "24.52/7.46 (Table 3)", "24.19/7.4 (Table 3)"]


@torch.no_grad()
def by_hand(net: Any, x: torch.Tensor) -> list[float]:
    """What `layer_responses` gives of a CIFAR net, layer by layer."""
    stds = []

    def seen(y: torch.Tensor) -> torch.Tensor:
        stds.append(y.double().std(correction=0).item())
        return y

    x = seen(net.bn1(net.conv1(x))).relu()
    for block in [*net.layer1, *net.layer2, *net.layer3]:
        y = seen(block.bn1(block.conv1(x))).relu()
        y = seen(block.bn2(block.conv2(y)))
        if hasattr(block, "downsample"):
            y = y + (x if block.downsample is None else block.downsample(x))
        x = y.relu()
    return stds


@pytest.mark.parametrize("family", ["cifar", "cifar-plain"])
@pytest.mark.parametrize("training", [False, True])
def test_layer_responses_equal_those_by_hand(family: str, training: bool) -> None:
    torch.manual_seed(0)
    net = families.build(family, 14).train(training)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.momentum = 0.0
    x = torch.randn(6, 3, 9, 8)
    found = layer_responses(net, [x] if training else [x[:2], x[2:]])
    assert list(found)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert list(found.values()) == pytest.approx(by_hand(net, x), rel=1e-5)
    assert not any(module._forward_hooks for module in net.modules())


def test_layer_responses_of_bottlenecks_are_those_of_the_3x3() -> None:
    found = layer_responses(families.build("paper", 50).eval(), [torch.randn(1, 3, 32, 32)])
    assert len(found) == 16
    assert {name.rpartition(".")[2] for name in found} == {"conv2"}


def test_responses(tmp_path: Path) -> None:
    tiny = ["--depths", "8", "14", "--iterations", "2", "--device", "cpu"]
    assert experiment("responses", tmp_path, *tiny) == 0
    found = rows(tmp_path / "responses.csv")
    assert [(row["net"], row["layer"]) for row in found] == [
        (net, str(i))
        for net, n in (("plain-8", 7), ("plain-14", 13), ("ResNet-8", 7), ("ResNet-14", 13))
        for i in range(1, n + 1)
    ]
    assert all(0 < float(row["std"]) < math.inf for row in found)
    assert "Here those of ResNet-8 are on average" in (tmp_path / "responses.md").read_text()
    assert (tmp_path / "responses.svg").read_bytes().startswith(SVG)


def test_quick_is_fixed() -> None:
    quick = planned("degradation", "--quick")
    assert (quick.data, quick.study, quick.options["device"]) == ("digits", QUICK["degradation"], "cpu")
    assert quick.study.seeds == 3
    assert quick.recipe.schedule == Steps((200, 300))
    assert len(quick.runs()) == 2 * 4 * 3
    shared = {str(run.out) for _, run in planned("responses", "--quick").runs()}
    assert shared < {str(run.out) for _, run in quick.runs()}


def test_cifar_by_the_paper_differs_in_nothing_known() -> None:
    full = planned("degradation", "--data", "cifar10", "--device", "cpu")
    assert full.differences() == {}
    assert full.study.depths == (20, 32, 44, 56, 110)
    assert [net.errors_of_paper() for net in full.nets[-2:]] == [
        "6.97 (Table 6)",
        "6.43, best of 5 runs; 6.61 +- 0.16 (Table 6)",
    ]
    assert {"images", "lr", "iterations"} < planned("degradation", "--device", "cpu").differences().keys()


def test_photographs_compare_figure_4_s_nets() -> None:
    nets = planned("degradation", "--data", "imagenet", "--device", "cpu").nets
    assert [str(net) for net in nets] == ["plain-18", "plain-34", "ResNet-18 A", "ResNet-34 A"]
    assert [net.errors_of_paper()[:5] for net in nets] == ["27.94", "28.54", "27.88", "25.03"]


def test_lasting_moves_milestones_in_proportion() -> None:
    short = lasting(RECIPES["cifar-2015"], 640)
    assert (short.iterations, short.schedule) == (640, Steps((320, 480)))
    assert lasting(RECIPES["digits"], 7).total(100) == 7


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["depth"], "degradation"),
        (["degradation", "--quick", "--seeds", "1"], "leave out --seeds"),
        (["degradation", "--seeds", "0"], "--seeds: 0: any whole number from 1"),
        (["degradation", "--iterations", "0"], "--iterations: 0: any whole number from 1"),
        (["degradation", "--holdout", "-1"], "--holdout: -1: any whole number from 0"),
        (["degradation", "--workers", "-1"], "--workers: -1: any whole number from 0"),
        (["degradation", "--quick", "--root", "/nowhere"], "data digits needs no --root"),
        (["degradation", "--depths", "21"], "20, 32, 44, 56, 110, 1202"),
        (["shortcuts", "--depths", "20"], "18, 34, 50"),
        (["degradation", "--data", "mnist"], "cifar10"),
        (["degradation", "--data", "cifar10"], "--root"),
        (["degradation", "--device", "tpu9"], "tpu9"),
    ],
)
def test_what_can_t_be_served_is_refused(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", *arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_so_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    with pytest.raises(SystemExit):
        experiment("degradation", tmp_path / "out", *TINY)
    assert "--no-plot" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        experiment("degradation", tmp_path, *TINY)
    assert "one process" in capsys.readouterr().err
