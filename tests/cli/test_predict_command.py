"""`python -m fastres predict`: output, files, rejected arguments, and weights given by name."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cli_cases
import numpy as np
import pytest
import torch
from cli_cases import CLASSES, SMALL, images_of, net, refused, saved, scores_of
from PIL import Image
from tolerances import SCORES
from torchvision.models import ResNet18_Weights, WeightsEnum

import fastres
from fastres import weights
from fastres.cli.main import main
from fastres.evaluate import Views
from fastres.train import checkpoint, loop
from fastres.train.data import Preprocess, by_channel
from fastres.train.recipe import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")
photos = cli_cases.photos


@pytest.mark.parametrize("recipe", ["digits", "imagenet-modern"])
def test_weights_alone_predict_what_the_checkpoint_does(recipe: str, photos: Path, tmp_path: Path) -> None:
    """weights.safetensors has the mean image, or the channel means, as metadata; its tensors are only the net's."""
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
    assert f"{path} doesn't contain the mean image that its recipe subtracts" in message
    tensors.save_file(net().state_dict(), str(path), {"fastres": json.dumps(meta), "preprocess": "AAAA"})
    message = refused(["predict", str(photos), "--weights", str(path), "--device", "cpu"], capsys)
    assert f"{path} is truncated, damaged or not a safetensors file" in message


def test_predict_names_and_writes_the_likeliest(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
            assert float(row["score"]) == pytest.approx(score, abs=SCORES)


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


def test_predict_needs_images_and_weights(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert "no images are given: python -m fastres predict IMG" in refused(["predict", "--weights", file], capsys)
    message = refused(["predict", str(photos), "--weights", str(photos)], capsys)
    assert f"--weights {photos}: a file with weights is expected" in message


def test_predict_continues_after_a_corrupt_image(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = photos / "bad.jpg", photos / "val" / "flower" / "1.png"
    bad.write_bytes(b"no image")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["predict", str(bad), str(good), "--weights", file, *SMALL]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == str(good)
    assert {line.split()[-1] for line in out.splitlines()[1:]} == {"0", "1"}  # without class names, indices are printed
    assert f"{bad} is not a readable image" in err
    assert "1 of 2 images could not be read" in err


def test_predict_of_16_bits_is_that_of_8(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16-bit and 8-bit grey give the same scores; a float image, whose white is unknown, is rejected."""
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
    assert f"{images[3]} is not a readable image (mode F in a TIFF file" in err


def test_a_net_of_one_channel_gets_grey_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A net with one channel gets grey images; class names come from the checkpoint."""
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
def test_published_weights_are_read_by_name(
    name: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published weights bring class names, crops and normalisation. Random weights replace the download."""
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


def test_weights_that_cannot_be_fetched_are_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: WeightsEnum, **_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    message = refused(["predict", str(photos), "--model", "resnet18", "--weights", "DEFAULT"], capsys)
    assert "can't be downloaded from https://" in message
    assert "no network" in message
    assert "checkpoints" in message


@pytest.mark.parametrize(
    ("images", "more", "named"),
    [
        ("nowhere.png", [], "nowhere.png does not exist"),
        ("empty", [], "empty contains no images; accepted: .jpg"),
        ("photos", ["--top", "0"], "--top must be a whole number of at least 1: got 0"),
        ("photos", ["--labels", "net.pt"], "net.pt can't be read"),
        ("photos", ["--labels", "one.txt"], "one.txt names 1 classes, but net.pt has 2"),
    ],
)
def test_predict_refuses_with_what_is_accepted(
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
    assert "doesn't say which net it belongs to: give the net's name (--model)" in refused(
        ["predict", str(photos), "--weights", file], capsys
    )
