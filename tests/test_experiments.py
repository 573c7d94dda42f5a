"""The paper's experiments: conclusions from errors, and the responses of layers."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import SUMS
from torch import nn

from fastres import experiments
from fastres.cli import experiment as experiment_command
from fastres.experiments import Net, Trained, degradation, layer_responses
from fastres.models import families
from fastres.train.loop import Summary

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(*arguments: str) -> experiments.Plan:
    parser = argparse.ArgumentParser()
    experiment_command.arguments(parser)
    return experiment_command.plan(parser.parse_args(arguments))


def ended(net: Net, seed: int, train_error: float) -> Trained:
    history = [{"iteration": i, "train_error": e} for i, e in ((50, 0.9), (100, train_error))]
    return Trained(net, seed, Path(), [*history, {"iteration": 100, "val_error": 0.5, "val_error_top5": 0.1}])


@pytest.mark.parametrize(
    ("plain", "residual", "seen", "said"),
    [
        ((0.1, 0.2, 0.8), (0.05, 0.059, 0.04), True, "claim is seen"),
        ((0.1, 0.2, 0.105), (0.05, 0.05, 0.04), False, "Not true here: all deeper plain nets train worse."),
        ((0.1, 0.2, 0.8), (0.05, 0.07, 0.04), False, "Not true here: no deeper residual net does."),
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


def test_seconds_that_were_not_recorded_are_left_out() -> None:
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


def test_the_paper_s_table_3_stands_beside() -> None:
    names = [net.errors_of_paper() for net in planned("shortcuts", "--device", "cpu").nets]
    assert names == ["25.03/7.76 (Tables 2, 3)", "24.52/7.46 (Table 3)", "24.19/7.4 (Table 3)"]


@torch.no_grad()
def by_hand(net: Any, x: torch.Tensor) -> list[float]:
    """Return the results of `layer_responses` for a CIFAR net, computed layer by layer."""
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
    assert list(found.values()) == pytest.approx(by_hand(net, x), rel=SUMS)
    assert not any(module._forward_hooks for module in net.modules())


def test_layer_responses_of_bottlenecks_are_those_of_the_3x3() -> None:
    found = layer_responses(families.build("paper", 50).eval(), [torch.randn(1, 3, 32, 32)])
    assert len(found) == 16
    assert {name.rpartition(".")[2] for name in found} == {"conv2"}
