"""`python -m fastres eval` and `predict`: what they print and write, how they refuse; weights from their sources."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, WeightsEnum

import fastres
from fastres import evaluate, paper, weights
from fastres.cli import batches, testing_options
from fastres.cli.main import main
from fastres.evaluate import Predictor, Views
from fastres.models import families
from fastres.ops import dispatch
from fastres.ops.dispatch import why_no_onednn
from fastres.train import checkpoint, loop
from fastres.train.data import Preprocess, by_channel
from fastres.train.recipe import RECIPES

SMALL = ["--model", "cifar-8", "--size", "32", "--resize", "40", "--device", "cpu"]
CLASSES = ["flower", "temple"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder val/<class>/<n>.png of crops of scikit-learn's two photographs, four of each."""
    temple, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    for name, photo in (("temple", temple), ("flower", flower)):
        folder = tmp_path / "photos" / "val" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(photo[40 * i : 40 * i + 240, 60 * i : 60 * i + 400]).resize((72, 48)).save(
                folder / f"{i}.png"
            )
    return tmp_path / "photos"


def net(classes: int = 2, depth: int = 8, in_channels: int = 3) -> nn.Module:
    return paper.cifar(depth, num_classes=classes, in_channels=in_channels).eval()


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def images_of(folder: Path) -> list[tuple[Path, Tensor]]:
    """Path and pixels, classes and files in alphabetical order."""
    paths = sorted(folder.rglob("*.png"))
    return [(path, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)) for path in paths]


def scores_of(models: list[nn.Module], views: Views, folder: Path, preprocess: nn.Module) -> Tensor:
    return Predictor(models, views, preprocess)([views.prepare(image) for _, image in images_of(folder)])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The scores of all batches that a command computes; what it prints of them is the likeliest class."""
    batches: list[Tensor] = []
    call = Predictor.__call__

    def recorded(self: Predictor, images: Any) -> Tensor:
        batches.append(call(self, images))
        return batches[-1]

    monkeypatch.setattr(Predictor, "__call__", recorded)
    return batches


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the arguments are refused, exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("crops", ["center", "10", "multiscale"])
def test_eval_of_an_ensemble(
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
    torch.testing.assert_close(printed, scores, rtol=0, atol=1e-6)
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


def test_eval_goes_on_past_a_corrupt_image(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    (photos / "val" / "temple" / "bad.jpg").write_bytes(b"no image")
    whole = (photos / "val" / "flower" / "0.png").read_bytes()
    (photos / "val" / "flower" / "cut.png").write_bytes(whole[: len(whole) // 2])
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["eval", "--data", str(photos), "--checkpoint", file, *SMALL, "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    assert "(8 images, 2 classes)" in out
    for name in ("bad.jpg", "cut.png"):
        assert f"{name} is no image that can be read" in err
    assert "2 of 10 images could not be read" in err


def test_eval_of_a_training_checkpoint_needs_no_further_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Net, size and normalisation come from the file, the averaged weights before the others."""
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
    saved(tmp_path / "last.pt", {**content, "ema": None})  # without the mean image: that of the data
    assert main(["eval", "--data", "digits", "--checkpoint", file, "--device", "cpu", "--crops", "multiscale"]) == 0
    assert "at 8, 9, 14, 17, 23, with mirror images" in capsys.readouterr().out


def of_digits(path: Path, **meta: Any) -> str:
    """A checkpoint as training on digits writes it, and what else its metadata are to say (None: not that)."""
    known = {"family": "cifar", "depth": 8, "recipe": "digits", "data": "digits", "val_size": 8, "resize": 8} | meta
    content = {name: value for name, value in known.items() if value is not None}
    preprocess = Preprocess(torch.rand(1, 8, 8), torch.ones(1, 1, 1), torch.zeros(1, 1))
    state = net(10, in_channels=1).state_dict()
    return saved(path, {"meta": content, "model": state, "preprocess": preprocess.state_dict()})


def test_eval_on_the_data_that_the_checkpoint_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_data_that_no_checkpoint_tells_must_be_given(
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


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_ctrl_c_ends_with_130_and_one_line(
    command: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")

    def interrupted(self: Predictor, images: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    file = saved(tmp_path / "net.pt", net().state_dict())
    given = {
        "eval": ["--data", str(photos), "--checkpoint", file, *SMALL],
        "predict": [str(photos), "--weights", file, *SMALL],
    }
    assert main([command, *given[command]]) == 130
    assert capsys.readouterr().err == f"python -m fastres {command}: interrupted\n"


def test_eval_of_what_training_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is the one that the training itself reports, from each of its files."""
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


@pytest.mark.parametrize("recipe", ["digits", "imagenet-modern"])
def test_weights_alone_predict_what_the_checkpoint_does(recipe: str, photos: Path, tmp_path: Path) -> None:
    """weights.safetensors brings along its mean image, or its channels' means, and no tensor that no net has."""
    tensors = pytest.importorskip("safetensors.torch")
    if recipe == "digits":
        row = dataclasses.replace(RECIPES[recipe], epochs=None, iterations=2, batch=32)
        run = loop.Run(recipe, row, tmp_path / "run", depth=8, device="cpu")
    else:
        row = dataclasses.replace(
            RECIPES[recipe], size=32, val_size=32, resize=40, epochs=None, iterations=2, batch=4, bn_batch=2, repeats=1
        )
        shutil.copytree(photos / "val", photos / "train")
        where: dict[str, Any] = {"data": "folder", "root": photos, "workers": 0}
        run = loop.Run(recipe, row, tmp_path / "run", family="cifar", depth=8, device="cpu", **where)
    loop.train(run)
    rows = []
    for name in (checkpoint.BEST, checkpoint.WEIGHTS):
        table = tmp_path / f"{name}.csv"
        file = str(tmp_path / "run" / name)
        assert main(["predict", str(photos), "--weights", file, "--device", "cpu", "--csv", str(table)]) == 0
        rows.append(table.read_text())
    assert rows[0] == rows[1]
    path = tmp_path / "run" / checkpoint.WEIGHTS
    read, best = (weights.read(str(tmp_path / "run" / name)) for name in (checkpoint.WEIGHTS, checkpoint.BEST))
    assert read.preprocess["mean"].shape == ((1, 8, 8) if recipe == "digits" else (3, 1, 1))
    for name, value in read.preprocess.items():
        assert torch.equal(value, best.preprocess[name])
    assert tensors.load_file(path).keys() == best.state.keys()


def test_weights_without_their_mean_image_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = pytest.importorskip("safetensors.torch")
    meta = {"family": "cifar", "depth": 8, "recipe": "imagenet-2015", "classes": CLASSES}
    path = tmp_path / "weights.safetensors"
    tensors.save_file(net().state_dict(), str(path), {"fastres": json.dumps(meta)})
    message = refused(["predict", str(photos), "--weights", str(path), "--device", "cpu"], capsys)
    assert f"{path} doesn't hold the mean image that its recipe subtracts" in message
    tensors.save_file(net().state_dict(), str(path), {"fastres": json.dumps(meta), "preprocess": "AAAA"})
    message = refused(["predict", str(photos), "--weights", str(path), "--device", "cpu"], capsys)
    assert f"{path} is truncated, damaged or no safetensors file" in message


def test_eval_computes_the_mean_image_that_its_recipe_subtracts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: list[Tensor]
) -> None:
    """From train/ beside val/, at the recipe's own size; it is resized to the crops of this test."""
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
    torch.testing.assert_close(printed, expected, rtol=0, atol=2e-3)  # training resizes by Pillow: grey levels differ
    assert (expected - scores_of([model], Views("center", 32, 40), photos / "val", by_channel())).abs().max() > 0.02


def test_eval_on_synthetic_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net(10).state_dict())
    arguments = ["eval", "--data", "synthetic", "--model", "cifar-8", "--checkpoint", file, "--recipe", "cifar-2015"]
    assert main([*arguments, "--device", "cpu", "--optimize", "--dtype", "bf16"]) == 0
    assert "cifar-8 in bf16, center crop of 32, shorter side 32, on synthetic" in capsys.readouterr().out


def test_two_processes_test_as_one(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net().state_dict())
    (photos / "val" / "flower" / "3.png").unlink()  # 7 images: the shares differ
    arguments = ["eval", "--data", str(photos), "--checkpoint", file, *SMALL, "--csv"]
    assert main([*arguments, str(tmp_path / "one.csv")]) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastres"]
    done = subprocess.run([*run, *arguments, str(tmp_path / "two.csv")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capfd.readouterr().out
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


def test_predict_on_photographs(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = net(6)
    file = saved(tmp_path / "net.pt", {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}})
    names = [f"name {k}" for k in range(6)]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    (photos / "readme.txt").write_text("not an image, not named")
    table = tmp_path / "p.csv"
    arguments = ["predict", str(photos), "--weights", file, *SMALL, "--labels", str(tmp_path / "labels.txt")]
    assert main([*arguments, "--top", "3", "--crops", "10", "--csv", str(table)]) == 0
    scores = scores_of([model], Views("10", 32, 40), photos, by_channel())
    lines = capsys.readouterr().out.splitlines()
    with open(table, newline="") as csv_file:
        rows = list(csv.DictReader(csv_file))
    assert (len(lines), len(rows)) == (8 * 4, 8 * 3)
    for i, (path, _) in enumerate(images_of(photos)):
        top = scores[i].topk(3)
        assert lines[4 * i] == str(path)
        for rank in range(3):
            score, k = float(top.values[rank]), int(top.indices[rank])
            row = rows[3 * i + rank]
            assert lines[4 * i + 1 + rank] == f"  {score:7.2%}  {names[k]}"
            assert (row["image"], row["rank"], row["class"], row["name"]) == (
                str(path),
                str(rank + 1),
                str(k),
                names[k],
            )
            assert float(row["score"]) == pytest.approx(score, abs=2e-6)


def test_predict_takes_weights_and_images_in_any_order(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        saved(tmp_path / name, net().state_dict())
    image = str(photos / "val" / "temple" / "0.png")
    orders = [
        [image, str(photos), "--weights", "a.pt", "--weights", "b.pt"],
        [image, str(photos), "--weights", "a.pt", "b.pt"],
        ["--weights", "a.pt", "b.pt", image, str(photos)],
        [image, "--weights", "a.pt", "b.pt", str(photos)],
        ["--weights", "a.pt", "--weights", "b.pt", image, str(photos)],
    ]
    printed = []
    for order in orders:
        assert main(["predict", *SMALL, *order]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].count(".png") == 9
    assert set(printed) == {printed[0]}
    assert main(["predict", *SMALL, image, str(photos), "--weights", "a.pt"]) == 0
    assert capsys.readouterr().out != printed[0]


def test_predict_without_images_or_weights(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert "the images are missing: python -m fastres predict IMG" in refused(["predict", "--weights", file], capsys)
    message = refused(["predict", str(photos), "--weights", str(photos)], capsys)
    assert f"--weights {photos}: a file with weights is expected" in message


def test_predict_goes_on_past_a_corrupt_image(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = photos / "bad.jpg", photos / "val" / "flower" / "1.png"
    bad.write_bytes(b"no image")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["predict", str(bad), str(good), "--weights", file, *SMALL]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == str(good)
    assert {line.split()[-1] for line in out.splitlines()[1:]} == {"0", "1"}  # no names: indices
    assert f"{bad} is no image that can be read" in err
    assert "1 of 2 images could not be read" in err


def test_predict_of_16_bits_is_that_of_8(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what has no certain white gets no answer."""
    grey = np.asarray(Image.open(photos / "val" / "temple" / "0.png").convert("L"))
    images = [tmp_path / name for name in ("8.png", "16.png", "16.tif", "float.tif")]
    for path, pixels in zip(
        images, (grey, *[257 * grey.astype(np.uint16)] * 2, grey.astype(np.float32) / 255), strict=True
    ):
        Image.fromarray(pixels).save(path)
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["predict", *map(str, images), "--weights", file, *SMALL]) == 1
    out, err = capsys.readouterr()
    answers = [out.split(f"{path}\n")[1].splitlines()[:2] for path in images[:3]]
    assert answers[0] == answers[1] == answers[2]
    assert str(images[3]) not in out
    assert f"{images[3]} is no image that can be read (mode F in a TIFF file" in err


def test_predict_in_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A net of one channel gets grey images, and its checkpoint's class names."""
    Image.fromarray(np.full((20, 30, 3), (250, 30, 90), np.uint8)).save(tmp_path / "red.png")
    model = net(in_channels=1)
    meta = {"family": "cifar", "depth": 8, "classes": CLASSES, "val_size": 16, "resize": 16}
    way = Preprocess(torch.full((1, 1, 1), 0.3), torch.ones(1, 1, 1), torch.zeros(1, 1))
    file = saved(tmp_path / "a.pt", {"meta": meta, "model": model.state_dict(), "preprocess": way.state_dict()})
    assert main(["predict", str(tmp_path / "red.png"), "--weights", file, "--top", "1", "--device", "cpu"]) == 0
    grey = torch.full((1, 1, 16, 16), int(np.array(Image.new("RGB", (1, 1), (250, 30, 90)).convert("L"))[0, 0]))
    with torch.no_grad():
        scores = model(way(grey.to(torch.uint8))).softmax(1)[0]
    assert capsys.readouterr().out.splitlines()[1] == f"  {float(scores.max()):7.2%}  {CLASSES[int(scores.argmax())]}"


@pytest.mark.parametrize("name", ["ResNet18_Weights.IMAGENET1K_V1", "IMAGENET1K_V1", "DEFAULT"])
def test_published_weights_by_name(
    name: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their class names, crops and normalisation come with them. The fetching itself is replaced."""
    model = fastres.resnet18()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: model.state_dict())
    image = photos / "val" / "temple" / "0.png"
    arguments = ["predict", str(image), "--model", "resnet18", "--weights", name, "--top", "2", "--device", "cpu"]
    assert main(arguments) == 0
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad(), Image.open(image) as file:
        scores = model.eval()(preset(torch.from_numpy(np.array(file)).permute(2, 0, 1))[None]).softmax(1)[0]
    categories = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    first, second = scores.topk(2).indices.tolist()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"  {float(scores[first]):7.2%}  {categories[first]}"
    assert lines[2].endswith(categories[second])


def test_weights_that_cannot_be_fetched(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: WeightsEnum, **_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    message = refused(["predict", str(photos), "--model", "resnet18", "--weights", "DEFAULT"], capsys)
    assert "can't be fetched from https://" in message
    assert "no network" in message
    assert "checkpoints" in message


# Calibration.


SERVED = [
    pytest.param("int8", marks=pytest.mark.skipif(why_no_onednn(torch.int8) is not None, reason="needs VNNI")),
    "fp8",  # simulated
]


VIEWS = [["center"], ["10", "--resize", "9"], ["multiscale", "--no-flip", "--scales", "8", "9"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small net that reads digits, 19 of 20 and more of them right."""
    for package in ("torchmetrics", "sklearn", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    recipe = dataclasses.replace(RECIPES["digits"], epochs=None, iterations=200)
    out = tmp_path_factory.mktemp("digits")
    summary = loop.train(loop.Run("digits", recipe, out, depth=8, device="cpu", eval_every=200, save_every=200))
    assert summary.error < 0.05
    return str(out / checkpoint.BEST)


def top1(out: str) -> float:
    found = re.search(r"top-1 accuracy ([\d.]+)%", out)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("views", VIEWS, ids=" ".join)
@pytest.mark.parametrize("dtype", ["bf16", *SERVED])
def test_a_narrow_dtype_is_as_accurate(
    dtype: str, views: list[str], trained: str, capsys: pytest.CaptureFixture[str], scored: list[Tensor]
) -> None:
    """By a point of the accuracy in fp32 at most: 3 digits of 359. And the scores do show another dtype."""
    arguments = ["eval", "--checkpoint", trained, "--device", "cpu", "--crops", *views]
    assert main(arguments) == 0
    expected, exact = top1(capsys.readouterr().out), torch.cat(scored)
    scored.clear()
    with fastres.backend("reference" if dtype == "fp8" else "auto"):
        assert main([*arguments, "--optimize", "--dtype", dtype]) == 0
    first, *more, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"cifar-8 in {dtype}, ")
    assert more == ([] if dtype == "bf16" else ["calibrated with 256 of 1,438 training images of digits"])
    assert top1(last) == pytest.approx(expected, abs=1.0)
    assert 1e-4 < (torch.cat(scored) - exact).abs().max() < 0.5


@pytest.mark.parametrize("dtype", SERVED)
def test_the_percentile_reaches_the_net(
    dtype: str, trained: str, scored: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--checkpoint", trained, "--device", "cpu", "--optimize", "--dtype", dtype]
    scores = []
    with fastres.backend("reference" if dtype == "fp8" else "auto"):
        for more in ([], ["--percentile", "100"], ["--percentile", "90"]):
            scored.clear()
            assert main([*arguments, *more]) == 0
            scores.append(torch.cat(scored))
    assert "training images of digits, percentile 90\n" in capsys.readouterr().out
    assert torch.equal(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs().max() > 0.01


@dataclasses.dataclass
class Calibrated:
    """What `optimize` was given by each net of a command, in place of which the net itself runs."""

    shown: list[list[Tensor]]
    served: bool = True

    def tried(self, model: nn.Module, *, dtype: torch.dtype, **_: Any) -> None:
        if not self.served:
            raise ValueError(f"{dtype} isn't served")

    def optimize(self, model: nn.Module, *, dtype: torch.dtype, calibration: Any, **_: Any) -> nn.Module:
        assert dtype == torch.int8
        self.shown.append(list(calibration))
        return model


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> Calibrated:
    stand_in = Calibrated([])
    monkeypatch.setattr(testing_options, "optimize", stand_in.tried)
    monkeypatch.setattr(evaluate, "optimize", stand_in.optimize)
    return stand_in


INT8 = ["--optimize", "--dtype", "int8"]


def read_by(folder: Path, count: int = 256) -> Tensor:
    """What the net reads of a sample of the folder's images."""
    images = [Views("center", 32, 40).prepare(image) for _, image in images_of(folder)]
    picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values
    return by_channel()(torch.stack(images)[picked])


@pytest.fixture
def with_training_images(photos: Path) -> Path:
    """photos with train/: the images of val/, mirrored."""
    for path, image in images_of(photos / "val"):
        copied = photos / "train" / path.relative_to(photos / "val")
        copied.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.flip(2).permute(1, 2, 0).numpy()).save(copied)
    return photos


@pytest.mark.parametrize(
    ("data", "more", "folder", "count", "said"),
    [
        ("", [], "train", 8, "8 of 8 training images in {}/train"),
        ("", ["--calibration-images", "3"], "train", 3, "3 of 8 training images in {}/train"),
        ("", ["--calibration", "val/temple"], "val/temple", 4, "4 of 4 images in val/temple"),
        ("val", [], "val", 8, "8 of 8 images tested"),
        ("val", ["--calibration-images", "5"], "val", 5, "5 of 8 images tested"),
    ],
)
def test_which_images_calibrate_an_evaluation(
    data: str,
    more: list[str],
    folder: str,
    count: int,
    said: str,
    with_training_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibrated: Calibrated,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchmetrics")
    photos = with_training_images
    monkeypatch.chdir(photos)
    file = saved(tmp_path / "net.pt", net().state_dict())
    arguments = ["eval", "--data", str(photos / data), "--checkpoint", file, file, *SMALL, "--batch", "3"]
    assert main([*arguments, *INT8, *more]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("an ensemble of cifar-8, cifar-8 in int8, center crop")
    assert told[1] == f"calibrated with {said.format(photos)}"
    expected = read_by(photos / folder, count)
    assert len(calibrated.shown) == 2
    for shown in calibrated.shown:
        assert {len(batch) for batch in shown[:-1]} <= {3}
        assert torch.equal(torch.cat(shown), expected)


@pytest.mark.parametrize("own", [False, True])
def test_which_images_calibrate_a_prediction(
    own: bool,
    with_training_images: Path,
    tmp_path: Path,
    calibrated: Calibrated,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = with_training_images
    file = saved(tmp_path / "net.pt", net().state_dict())
    more = ["--calibration", str(photos / "train")] if own else []
    assert main(["predict", str(photos / "val"), "--weights", file, *SMALL, *INT8, *more]) == 0
    assert torch.equal(torch.cat(calibrated.shown[0]), read_by(photos / ("train" if own else "val")))
    whose = f"images in {photos / 'train'}" if own else "images given"
    assert capsys.readouterr().err == f"note: calibrated with 8 of 8 {whose}\n"


def test_images_that_calibrate_and_cannot_be_read(
    with_training_images: Path, tmp_path: Path, calibrated: Calibrated, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    bad = with_training_images / "train" / "temple" / "bad.jpg"
    bad.write_bytes(b"no image")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["eval", "--data", str(with_training_images), "--checkpoint", file, *SMALL, *INT8]) == 1
    out, err = capsys.readouterr()
    assert "calibrated with 8 of 9 training images" in out
    assert f"calibration: {bad} is no image that can be read" in err
    assert "1 of 9 images that calibrate could not be read" in err


def test_no_image_that_calibrates_can_be_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "why_no_int8", lambda device: None)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_bytes(b"no image")
    given = ["predict", str(photos), "--weights", saved(tmp_path / "net.pt", net().state_dict()), *SMALL, *INT8]
    told = refused([*given, "--calibration", str(bad)], capsys)
    assert f"calibrated with 0 of 1 images in {bad}: none that was tried can be read" in told


@pytest.mark.parametrize("more", [[], ["--dtype", "bf16"], ["--optimize"], ["--optimize", "--dtype", "bf16"]])
def test_a_dtype_that_optimize_does_not_fuse_is_noted(
    more: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dispatch, "why_no_onednn", {torch.float32: None, torch.bfloat16: "no AMX"}.get)
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["predict", str(photos), "--weights", file, *SMALL, *more]) == 0
    note = "note: --optimize fuses nothing in bf16 here: no AMX\n"
    assert capsys.readouterr().err == (note if len(more) == 3 else "")


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize(
    ("more", "served", "named"),
    [
        (["--dtype", "int8"], True, "--dtype int8 needs --optimize"),
        (["--dtype", "fp8"], True, "--dtype fp8 needs --optimize"),
        (INT8, False, "torch.int8 isn't served"),
        ([*INT8, "--calibration-images", "0"], True, "--calibration-images 0: any whole number from 1"),
        ([*INT8, "--calibration", "nowhere"], True, "nowhere does not exist"),
        (["--percentile", "99"], True, "--percentile is for --optimize with --dtype int8 or fp8 only"),
        (["--calibration", "."], True, "--calibration is for --optimize with --dtype int8 or fp8 only"),
        (
            ["--optimize", "--calibration-images", "9"],
            True,
            "--calibration-images is for --optimize with --dtype int8 or fp8 only",
        ),
    ],
)
def test_calibration_is_refused_before_an_image_is_read(
    command: str,
    more: list[str],
    served: bool,
    named: str,
    with_training_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibrated: Calibrated,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchmetrics")
    calibrated.served = served
    monkeypatch.setattr(batches, "read_image", None)
    file, images = saved(tmp_path / "net.pt", net().state_dict()), str(with_training_images)
    given = ["--data", images, "--checkpoint", file] if command == "eval" else [images, "--weights", file]
    assert named in refused([command, *given, *SMALL, *more], capsys)
    assert not calibrated.shown


@pytest.mark.parametrize(
    ("dtype", "more", "needed"),
    [
        ("int8", [], "VNNI"),
        ("fp8", [], "needs a CUDA GPU, the model is on cpu"),
        ("int8", ["--percentile", "0"], "percentile"),
    ],
)
def test_what_optimize_refuses_is_refused_first(
    dtype: str, more: list[str], needed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing needs to be there: neither weights nor data."""
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    arguments = ["eval", "--data", "nowhere", "--checkpoint", "none.pt", "--device", "cpu", "--optimize"]
    assert needed in refused([*arguments, "--dtype", dtype, *more], capsys)


# Weights.


def test_safetensors_hold_what_training_knows(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    model, meta = net(), {"family": "cifar", "depth": 8, "classes": CLASSES, "val_size": 32, "resize": 36}
    path = tmp_path / "weights.safetensors"
    torch_files.save_file(model.state_dict(), str(path), {"fastres": json.dumps(meta)})
    read = weights.read(str(path))
    assert (read.classes, read.channels, read.names, read.preset) == (2, 3, CLASSES, {"size": 32, "resize": 36})
    other = net()
    weights.load_into(other, read, "cifar-8")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated, damaged or no safetensors"):
        weights.read(str(path))


def truncated(path: Path) -> str:
    saved(path, net().state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    return str(path)


def text(path: Path) -> str:
    path.write_text("hello")
    return str(path)


def folder(path: Path) -> str:
    path.mkdir()
    return str(path)


STATE_DICT = r"torch\.save\(model\.state_dict\(\), FILE\)$"
SOURCES: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda path: str(path), "does not exist, neither as a file nor as torchvision weights"),
    "unknown name": (lambda path: "ResNet18_Weights.IMAGENET1K_V9", "called like ResNet50_Weights.IMAGENET1K_V2"),
    "folder": (folder, "is a folder"),
    "empty": (lambda path: (path.touch(), str(path))[1], "truncated, damaged"),
    "truncated": (truncated, "truncated, damaged"),
    "text": (text, "truncated, damaged"),
    "another text": (lambda path: (path.write_text("root:x:0:0"), str(path))[1], "truncated, damaged"),
    "pickle": (lambda path: (path.write_bytes(pickle.dumps({"a": 1})), str(path))[1], "no file with weights$"),
    "module": (lambda path: saved(path, net()), rf"a pickled module.*CifarResNet.*{STATE_DICT}"),
    "module in a dict": (lambda path: saved(path, {"model": net()}), rf"a pickled module.*CifarResNet.*{STATE_DICT}"),
    "module of old": (
        lambda path: (torch.save(net(), path, _use_new_zipfile_serialization=False), str(path))[1],
        rf"a pickled module.*CifarResNet.*{STATE_DICT}",
    ),
    "script": (
        lambda path: (torch.jit.script(nn.Linear(2, 2)).save(str(path)), str(path))[1],
        f"a TorchScript module.*{STATE_DICT}",
    ),
    "number": (lambda path: saved(path, 5), "holds no weights"),
    "numbers": (lambda path: saved(path, {"model": 3, "meta": 1}), "holds no weights"),
    "no tensors": (lambda path: saved(path, {"a": 1}), "holds no weights"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_that_hold_no_weights(kind: str, tmp_path: Path) -> None:
    make, named = SOURCES[kind]
    source = make(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=named) as refusal:
        weights.read(source)
    assert source in str(refusal.value)
    assert len(str(refusal.value)) < 600
    for advice in ("weights_only", "torch.load", "\x1b", "\n"):  # torch's own: to run what the file holds
        assert advice not in str(refusal.value)


def test_another_architecture_is_summarised(tmp_path: Path) -> None:
    read = weights.read(saved(tmp_path / "a.pt", paper.cifar(14, num_classes=2).state_dict()))
    with pytest.raises(
        ValueError, match=r"not of the architecture cifar-8: 36 unexpected: layer1\.1\.bn1\.bias, .*\.\.\.$"
    ):
        weights.load_into(net(), read, "cifar-8")
    read = weights.read(saved(tmp_path / "a.pt", net(5).state_dict()))
    with pytest.raises(ValueError, match=r"2 of another shape: fc\.bias \[5\] for \[2\], fc\.weight"):
        weights.load_into(net(), read, "cifar-8")
    read = weights.read(saved(tmp_path / "a.pt", {"fc.weight": torch.zeros(2, 64)}))
    with pytest.raises(ValueError, match=r"missing: bn1\.bias, "):
        weights.load_into(net(), read, "cifar-8")


# Arguments.


@pytest.mark.parametrize(
    "name", ["resnet18", "wide_resnet50_2", "cifar-8", "cifar-plain-8", "cifar-stem-18", "paper-34-C"]
)
def test_nets_by_name(name: str) -> None:
    with torch.device("meta"):
        model = families.named(name, num_classes=3)
    assert next(m for m in model.modules() if isinstance(m, nn.Linear)).out_features == 3


@pytest.mark.parametrize(
    "name", ["vgg16", "resnet", "ResNet", "cifar", "cifar-", "cifar-8-A", "cifar-9", "paper-34-D", "-8"]
)
def test_names_of_no_net_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"exist|6n|choice"):
        families.named(name)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--model", "cifar-14"], "not of the architecture cifar-14: 36 missing: layer1.1.bn1.bias"),
        (["--model", "vgg"], "'vgg' does not exist; there are resnet18, "),
        (["--model", "cifar-8", "cifar-8"], "--model names 2 nets for 1 files"),
        (["--data", "nowhere"], "--data nowhere: there is no such folder, and no data of that name; digits, cifar10"),
        (["--data", "digits"], "net.pt holds a net of 2 classes, the data digits has 10"),
        (["--size", "0"], "--size 0"),
        (["--batch", "0"], "--batch 0"),
        (["--workers", "-1"], "--workers -1"),
        (["--size", "32", "--resize", "30"], "shorter side of 30"),
        (["--crops", "multiscale", "--scales", "16", "64"], "[16, 64]"),
        (["--csv", "nowhere/a.csv"], "nowhere does not exist"),
        (["--csv", "/"], "--csv / can't be written"),
        (["--device", "abacus"], "--device abacus is not there: this machine has cpu"),
        (["--device", "cuda:77"], "--device cuda:77 is not there: this machine has cpu"),
        (["--crops", "10", "--no-flip"], "--no-flip belongs to --crops multiscale, not to --crops 10"),
        (["--scales", "32", "40"], "--scales belongs to --crops multiscale, not to --crops center"),
        (["--recipe", "cifar-2015"], "mean image"),
    ],
)
def test_eval_refuses(
    more: list[str], named: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert named in refused(["eval", "--data", str(photos), "--checkpoint", file, *SMALL, *more], capsys)


def test_eval_without_torchmetrics(
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


@pytest.mark.parametrize(
    ("images", "more", "named"),
    [
        ("nowhere.png", [], "nowhere.png does not exist"),
        ("empty", [], "empty holds no images; accepted are .jpg"),
        ("photos", ["--top", "0"], "--top 0"),
        ("photos", ["--labels", "net.pt"], "net.pt can't be read"),
        ("photos", ["--labels", "one.txt"], "one.txt names 1 classes, net.pt has 2"),
    ],
)
def test_predict_refuses(
    images: str,
    more: list[str],
    named: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("one\n")
    saved(tmp_path / "net.pt", net().state_dict())
    assert named in refused(["predict", images, "--weights", "net.pt", *SMALL, *more], capsys)


def test_a_net_that_does_not_say_what_it_is_needs_its_name(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert "doesn't say which net it is of: give --model" in refused(
        ["predict", str(photos), "--weights", file], capsys
    )
