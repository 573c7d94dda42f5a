"""`python -m fastres experiment` with tiny trainings: results, files, resumption and rejected arguments."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres import experiments
from fastres.cli import experiment as experiment_command
from fastres.cli.main import main
from fastres.train.loop import Trainer
from fastres.train.recipe import QUICK, Steps

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = ["--depths", "8", "14", "--seeds", "2", "--iterations", "2", "--device", "cpu"]


SVG = b"<?xml"


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
    """A small, uninterrupted `degradation`: its folder and exit status."""
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
    assert code == 3 * ("claim was not confirmed" in table)
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
        ("net,seed,iteration,train_error,val_error\nplain-8,0,1", "an incomplete row"),
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


def test_finished_trainings_are_not_repeated(whole: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert experiment("degradation", whole[0], *TINY) == 130
    said = capsys.readouterr().err
    assert "[1/8]" in said
    assert "[2/8]" not in said


def test_runs_of_other_settings_are_not_taken_for_these(
    whole: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        experiment("degradation", whole[0], *TINY[:-3], "4", "--device", "cpu")
    assert stopped.value.code == 2
    assert "recipe.iterations is 2 in the checkpoint, 4 now" in capsys.readouterr().err


@pytest.mark.extra  # trains three ImageNet nets; the tests above cover the same code with digits
def test_shortcuts_stand_beside_table_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--depths", "18", "--seeds", "1", "--iterations", "1", "--device", "cpu"]
    assert experiment("shortcuts", tmp_path, *tiny) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"paper-18-{o}-seed0" for o in "ABC"]
    shutil.rmtree(tmp_path / "runs")
    assert [row["net"] for row in rows(tmp_path / "shortcuts.csv")] == [f"ResNet-18 {option}" for option in "ABC"]
    text = capsys.readouterr().out
    assert "| ResNet-18 A | 27.88 (Table 2) |" in text
    assert "testing: one centre crop (10 crops)" in text
    assert (tmp_path / "shortcuts.svg").read_bytes().startswith(SVG)


def test_responses_are_written_and_drawn(tmp_path: Path) -> None:
    tiny = ["--depths", "8", "14", "--iterations", "2", "--device", "cpu"]
    assert experiment("responses", tmp_path, *tiny) == 0
    found = rows(tmp_path / "responses.csv")
    assert [(row["net"], row["layer"]) for row in found] == [
        (net, str(i))
        for net, n in (("plain-8", 7), ("plain-14", 13), ("ResNet-8", 7), ("ResNet-14", 13))
        for i in range(1, n + 1)
    ]
    assert all(0 < float(row["std"]) < math.inf for row in found)
    assert "Here the responses of ResNet-8 are on average" in (tmp_path / "responses.md").read_text()
    assert (tmp_path / "responses.svg").read_bytes().startswith(SVG)


def test_quick_is_fixed() -> None:
    quick = planned("degradation", "--quick")
    assert (quick.data, quick.study, quick.options["device"]) == ("digits", QUICK["degradation"], "cpu")
    assert quick.study.seeds == 3
    assert quick.recipe.schedule == Steps((200, 300))
    assert len(quick.runs()) == 2 * 4 * 3
    shared = {str(run.out) for _, run in planned("responses", "--quick").runs()}
    assert shared < {str(run.out) for _, run in quick.runs()}


def test_cifar_settings_do_not_differ_from_the_paper() -> None:
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["depth"], "degradation"),
        (["degradation", "--quick", "--seeds", "1"], "leave out --seeds"),
        (["degradation", "--seeds", "0"], "--seeds: must be a whole number of at least 1: got 0"),
        (["degradation", "--iterations", "0"], "--iterations: must be a whole number of at least 1: got 0"),
        (["degradation", "--holdout", "-1"], "--holdout: must be a whole number of at least 0: got -1"),
        (["degradation", "--workers", "-1"], "--workers: must be a whole number of at least 0: got -1"),
        (["degradation", "--quick", "--root", "/nowhere"], "--data digits does not use --root"),
        (["degradation", "--depths", "21"], "20, 32, 44, 56, 110, 1202"),
        (["shortcuts", "--depths", "20"], "18, 34, 50"),
        (["degradation", "--data", "mnist"], "cifar10"),
        (["degradation", "--data", "cifar10"], "--root"),
        (["degradation", "--device", "tpu9"], "tpu9"),
    ],
)
def test_unusable_arguments_are_rejected(
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
    assert "run in one process only" in capsys.readouterr().err
