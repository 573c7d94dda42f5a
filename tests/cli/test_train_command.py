"""`python -m fastres train`: options, rejected arguments, and the command that it suggests next."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
from training import SHORT, short

from fastres.cli.main import main
from fastres.train import checkpoint
from fastres.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("given", "asked"), [("", "auto"), ("--cuda-graph", "on"), ("--cuda-graph off", "off"), ("--cuda-graph on", "on")]
)
def test_cuda_graph_alone_is_on(
    given: str, asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastres.train.loop.train", lambda run: run.cuda_graph)
    assert main(["train", *given.split()]) == 0
    assert capsys.readouterr().out == f"{asked}\n"


@pytest.mark.extra  # 440 steps instead of 8
def test_resnet_20_reads_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default recipe reaches an accuracy of at least 97 % on the validation digits."""
    assert main(["train", "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "440 iterations, validation error" in said
    assert f"; {tmp_path} holds log.csv, curves.png, last.pt, best.pt, weights.safetensors\n" in said
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert saved["latest"]["count"] == 359
    assert saved["latest"]["top1"] <= 0.03


@pytest.mark.parametrize(("rank", "said"), [("0", "as trained\n"), ("1", "")])
def test_one_process_speaks(
    rank: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("fastres.train.loop.train", lambda run: "as trained")
    assert main(["train", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == said


def test_train_runs_on_synthetic_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    arguments = "--recipe cifar-2015 --data synthetic --depth 8 --batch 16 --iterations 2 --deterministic --device cpu"
    assert main(["train", "--out", str(tmp_path), *arguments.split()]) == 0
    assert "2 iterations, validation error" in capsys.readouterr().out
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    saved = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert (saved["meta"]["data"], saved["latest"]["count"], saved["iteration"]) == ("synthetic", 256, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe alexnet", "invalid choice: 'alexnet'"),
        ("--depth 21", "depth 21 is not 6n+2"),
        ("--family vgg", "invalid choice: 'vgg'"),
        ("--family torchvision --depth 18", "takes images of 3 channels, not 1"),
        ("--shortcut C", "family cifar has no choice of shortcut"),
        ("--data mnist", "invalid choice: 'mnist'"),
        ("--batch 0", "--batch: must be a whole number of at least 1: got 0"),
        ("--batch 60 --micro-batch 7", "got batch 60, micro-batch 7, 1 process(es)"),
        ("--batch many", "--batch: must be a whole number of at least 1: got many"),
        ("--lr -1", "--lr: must be a finite number above 0: got -1"),
        ("--lr nan", "--lr: must be a finite number above 0: got nan"),
        ("--iterations 0", "--iterations: must be a whole number of at least 1: got 0"),
        ("--epochs 0", "--epochs: must be a whole number of at least 1: got 0"),
        ("--iterations 5 --epochs 5", "exclude each other"),
        ("--seed -1", "--seed: must be a whole number of at least 0: got -1"),
        (f"--seed {2**70}", f"seed must be a whole number from 0 to 2**63 - 1: got {2**70}"),
        (f"--seed {2**63}", "seed must be a whole number from 0 to 2**63 - 1"),
        ("--micro-batch 0", "--micro-batch: must be a whole number of at least 1: got 0"),
        ("--log-every 0", "--log-every: must be a whole number of at least 1: got 0"),
        ("--eval-every 0", "--eval-every: must be a whole number of at least 1: got 0"),
        ("--save-every 0", "--save-every: must be a whole number of at least 1: got 0"),
        ("--workers -1", "--workers: must be a whole number of at least 0: got -1"),
        ("--holdout -1", "--holdout: must be a whole number of at least 0: got -1"),
        ("--holdout 1438", "--holdout must be from 1 to 1437, as there are 1438 training images: got 1438"),
        ("--device tpu", "device"),
        ("--cuda-graph", "--cuda-graph on requires a GPU, but this training runs on cpu"),
        ("--cuda-graph never", "invalid choice: 'never'"),
        ("--recipe cifar-2015", "data cifar10 needs --root"),
        ("--recipe imagenet-2015 --root /nowhere", "image-net.org"),
    ],
)
def test_rejected_arguments_create_no_folder(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "--out", str(tmp_path / "run"), *arguments.split()]
    with pytest.raises(SystemExit) as end:
        main([*given, *([] if "--device" in arguments else ["--device", "cpu"])])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_to_run_next_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=2), eval_every=1))
    assert str(done).splitlines()[-1] == f"next: {done.then}"
    words = shlex.split(done.then)
    assert words[:3] == ["python", "-m", "fastres"]
    capsys.readouterr()
    assert main([*words[3:], "--device", "cpu"]) == 0
    assert f"error {done.best:.2%}; top-5" in capsys.readouterr().out
