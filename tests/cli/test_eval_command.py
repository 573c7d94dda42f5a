"""`python -m fastres eval`: output, files and rejected arguments."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_cases
import numpy as np
import pytest
import torch
from cli_cases import SMALL, images_of, net, refused, saved, scores_of
from tolerances import PILLOW, ROUNDING
from torch import Tensor

from fastres.cli.main import main
from fastres.evaluate import Views
from fastres.train import checkpoint, loop
from fastres.train.data import Preprocess, by_channel
from fastres.train.recipe import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")
photos, scored = cli_cases.photos, cli_cases.scored


@pytest.mark.parametrize("crops", ["center", "10", "multiscale"])
def test_eval_averages_an_ensemble(
    crops: str, photos: Path, tmp_path: Path, scored: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    models = [net(), net(depth=14)]
    files = [saved(tmp_path / f"{i}.pt", model.state_dict()) for i, model in enumerate(models)]
    table = tmp_path / "classes.csv"
    arguments = ["eval", "--data", str(photos), "--checkpoint", *files, *SMALL, "--crops", crops, "--csv", str(table)]
    arguments += ["--batch", "3", "--model", "cifar-8", "cifar-14"]
    assert main(arguments) == 0
    views = Views(crops, 32, 40, (32, 37, 55, 69, 91))
    printed = torch.cat(scored)
    scores = scores_of(models, views, photos, by_channel())
    torch.testing.assert_close(printed, scores, rtol=0, atol=ROUNDING)
    found = scores.argmax(1).tolist()
    right = [found[:4].count(0), found[4:].count(1)]
    out = capsys.readouterr().out
    assert "an ensemble of cifar-8, cifar-14 in fp32" in out
    assert f"top-1 accuracy {sum(right) / 8:.2%}, error {1 - sum(right) / 8:.2%} (8 images, 2 classes)" in out
    if crops == "multiscale":
        assert "32, 37, 55, 69, 91, with mirror images" in out
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["images"], int(row["top1_correct"])) for row in rows] == [
        ("flower", "4", right[0]),
        ("temple", "4", right[1]),
    ]


def test_eval_continues_after_a_corrupt_image(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    (photos / "val" / "temple" / "bad.jpg").write_bytes(b"no image")
    whole = (photos / "val" / "flower" / "0.png").read_bytes()
    (photos / "val" / "flower" / "cut.png").write_bytes(whole[: len(whole) // 2])
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["eval", "--data", str(photos), "--checkpoint", file, *SMALL, "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    assert "(8 images, 2 classes)" in out
    for name in ("bad.jpg", "cut.png"):
        assert f"{name} is not a readable image" in err
    assert "2 of 10 images could not be read" in err


def test_eval_of_a_training_checkpoint_needs_no_other_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Net, image size and normalisation come from the file, and the averaged weights are preferred."""
    pytest.importorskip("torchmetrics")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    model, other = net(10, in_channels=1), net(10, in_channels=1)
    meta = {"family": "cifar", "depth": 8, "shortcut": None, "recipe": "digits", "val_size": 8, "resize": 8}
    preprocess = Preprocess(torch.rand(1, 8, 8), torch.ones(1, 1, 1), torch.zeros(1, 1))
    content = {"meta": meta, "model": other.state_dict(), "ema": model.state_dict(), "iteration": 7}
    file = saved(tmp_path / "last.pt", {**content, "preprocess": preprocess.state_dict()})
    assert main(["eval", "--data", "digits", "--checkpoint", file, "--device", "cpu"]) == 0
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[4::5, None]
    with torch.no_grad():
        scores = model(preprocess(images))
    right = (scores.argmax(1) == torch.from_numpy(digits.target[4::5])).sum()
    out = capsys.readouterr().out
    assert (
        f"cifar-8 in fp32, center crop of 8, shorter side 8, on digits\ntop-1 accuracy {right / len(images):.2%}" in out
    )
    assert f"({len(images)} images, 10 classes)" in out
    saved(tmp_path / "last.pt", {**content, "ema": None})  # without preprocess: the data's mean image is used
    assert main(["eval", "--data", "digits", "--checkpoint", file, "--device", "cpu", "--crops", "multiscale"]) == 0
    assert "at 8, 9, 14, 17, 23, with mirror images" in capsys.readouterr().out


def of_digits(path: Path, **meta: Any) -> str:
    """Write a checkpoint like that of a training on digits. meta: changes to its metadata; None removes an entry."""
    known = {"family": "cifar", "depth": 8, "recipe": "digits", "data": "digits", "val_size": 8, "resize": 8} | meta
    content = {name: value for name, value in known.items() if value is not None}
    preprocess = Preprocess(torch.rand(1, 8, 8), torch.ones(1, 1, 1), torch.zeros(1, 1))
    state = net(10, in_channels=1).state_dict()
    return saved(path, {"meta": content, "model": state, "preprocess": preprocess.state_dict()})


def test_eval_takes_the_data_that_the_checkpoint_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("sklearn")
    files = [of_digits(tmp_path / f"{i}.pt") for i in range(2)]
    assert main(["eval", "--checkpoint", *files, "--device", "cpu"]) == 0
    first, told = capsys.readouterr().out.splitlines()
    assert first.endswith("shorter side 8, on digits, as the checkpoint says")
    assert main(["eval", "--checkpoint", *files, "--device", "cpu", "--data", "digits"]) == 0
    assert capsys.readouterr().out.splitlines() == [first.removesuffix(", as the checkpoint says"), told]


@pytest.mark.parametrize(
    ("data", "said"),
    [((None,), "says nothing"), (("imagenet",), "says imagenet"), (("digits", "cifar10"), "says digits; .* cifar10")],
)
def test_data_that_no_checkpoint_names_must_be_given(
    data: tuple[str | None, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    files = [of_digits(tmp_path / f"{i}.pt", data=name) for i, name in enumerate(data)]
    message = refused(["eval", "--checkpoint", *files, "--device", "cpu"], capsys)
    assert re.search(rf"--data is needed \(.*0\.pt {said}\): a folder, .*, or digits, cifar10, ", message)


COINCIDE, MIRRORED = "crops of 8 from a shorter side of 8 coincide", "trained without mirror images"


@pytest.mark.parametrize(
    ("more", "meta", "notes"),
    [
        ([], {}, []),
        (["--crops", "10"], {}, [COINCIDE, MIRRORED]),
        (["--crops", "10", "--resize", "9"], {}, [MIRRORED]),
        (["--crops", "10", "--recipe", "digits"], {"recipe": "cifar-2015"}, [COINCIDE]),
        (["--crops", "10"], {"recipe": None}, [COINCIDE]),
        (["--crops", "multiscale"], {}, [MIRRORED]),
        (["--crops", "multiscale", "--no-flip"], {}, []),
    ],
)
def test_views_that_add_nothing_are_noted(
    more: list[str], meta: dict[str, Any], notes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("sklearn")
    file = of_digits(tmp_path / "a.pt", **meta)
    assert main(["eval", "--checkpoint", file, "--device", "cpu", "--batch", "400", *more]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes, strict=True):
        assert line.startswith("note: ")
        assert note in line
        assert note == COINCIDE or f"{file}: trained" in line


def test_eval_repeats_the_error_of_what_training_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For each file of a training, `eval` prints the validation error that the training reported."""
    for package in ("torchmetrics", "sklearn", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    recipe = dataclasses.replace(RECIPES["digits"], epochs=None, iterations=1, batch=32)
    summary = loop.train(loop.Run("digits", recipe, tmp_path / "run", depth=8, device="cpu"))
    capsys.readouterr()
    for name in (checkpoint.LAST, checkpoint.BEST, checkpoint.WEIGHTS):
        assert main(["eval", "--data", "digits", "--checkpoint", str(tmp_path / "run" / name), "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert (
            f"cifar-8 in fp32, center crop of 8, shorter side 8, on digits\ntop-1 accuracy {1 - summary.error:.2%}"
            in out
        )
        assert f"top-5 accuracy {1 - summary.top5:.2%}" in out


def test_eval_computes_the_mean_image_that_its_recipe_subtracts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: list[Tensor]
) -> None:
    """The mean image comes from train/ next to val/, at the recipe's size, and is resized to the crops of this test."""
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(photos / "val", photos / "train")
    model = net()
    file = saved(tmp_path / "net.pt", model.state_dict())
    assert main(["eval", "--data", str(photos), "--checkpoint", file, *SMALL, "--recipe", "imagenet-2015"]) == 0
    (printed,) = scored
    images = [Views("center", 224, 256).prepare(image) for _, image in images_of(photos / "train")]
    mean = torch.stack(images).double().mean(0) / 255
    way = Preprocess(mean, torch.ones(3, 1, 1), torch.zeros(3, 3))
    expected = scores_of([model], Views("center", 32, 40), photos / "val", way)
    # Training resizes with Pillow: pixels differ slightly.
    torch.testing.assert_close(printed, expected, rtol=0, atol=PILLOW)
    assert (expected - scores_of([model], Views("center", 32, 40), photos / "val", by_channel())).abs().max() > 0.02


def test_eval_runs_on_synthetic_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net(10).state_dict())
    arguments = ["eval", "--data", "synthetic", "--model", "cifar-8", "--checkpoint", file, "--recipe", "cifar-2015"]
    assert main([*arguments, "--device", "cpu", "--optimize", "--dtype", "bf16"]) == 0
    assert "cifar-8 in bf16, center crop of 32, shorter side 32, on synthetic" in capsys.readouterr().out


def test_two_processes_test_as_one(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net().state_dict())
    (photos / "val" / "flower" / "3.png").unlink()  # leaves 7 images, so that the two shares differ in size
    arguments = ["eval", "--data", str(photos), "--checkpoint", file, *SMALL, "--csv"]
    assert main([*arguments, str(tmp_path / "one.csv")]) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastres"]
    done = subprocess.run([*run, *arguments, str(tmp_path / "two.csv")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capfd.readouterr().out
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--model", "cifar-14"], "does not fit the architecture cifar-14: 36 missing: layer1.1.bn1.bias"),
        (["--model", "vgg"], "unknown model 'vgg'; accepted: resnet18, "),
        (
            ["--model", "cifar-8", "cifar-8"],
            "expected one net name (--model) for all files, or one per file: got 2 for 1",
        ),
        (["--data", "nowhere"], "--data nowhere is neither an existing folder nor one of digits, cifar10"),
        (["--data", "digits"], "net.pt contains a net with 2 classes, but the data digits has 10"),
        (["--size", "0"], "--size must be a whole number of at least 1: got 0"),
        (["--batch", "0"], "--batch must be a whole number of at least 1: got 0"),
        (["--workers", "-1"], "--workers must be a whole number of at least 0: got -1"),
        (["--size", "32", "--resize", "30"], "got size=32, resize=30"),
        (["--crops", "multiscale", "--scales", "16", "64"], "[16, 64]"),
        (["--csv", "nowhere/a.csv"], "nowhere does not exist"),
        (["--csv", "/"], "--csv / can't be written"),
        (["--device", "abacus"], "--device abacus is not available on this machine; accepted: cpu"),
        (["--device", "cuda:77"], "--device cuda:77 is not available on this machine; accepted: cpu"),
        (["--crops", "10", "--no-flip"], "--no-flip requires --crops multiscale: got --crops 10"),
        (["--scales", "32", "40"], "--scales requires --crops multiscale: got --crops center"),
        (["--recipe", "cifar-2015"], "mean image"),
    ],
)
def test_eval_refuses_with_what_is_accepted(
    more: list[str], named: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert named in refused(["eval", "--data", str(photos), "--checkpoint", file, *SMALL, *more], capsys)


def test_eval_says_how_to_get_torchmetrics(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    file = saved(tmp_path / "net.pt", net().state_dict())
    message = refused(["eval", "--data", str(photos), "--checkpoint", file, *SMALL], capsys)
    assert "pip install 'fastres[eval]'" in message


def test_a_folder_without_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert "has no classes to test on" in refused(
        ["eval", "--data", str(tmp_path), "--checkpoint", file, *SMALL], capsys
    )
