"""Class i of the weights must be class i of the data; otherwise the command reports the difference and stops."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastres import paper
from fastres.classes import IMAGENET, are_imagenet_ids, out_of_order
from fastres.cli import eval as eval_command
from fastres.cli.main import main
from fastres.evaluate import Predictor
from fastres.train import checkpoint, data, loop
from fastres.train.data import DataError, by_channel
from fastres.train.process import Place, Signals
from fastres.train.recipe import RECIPES
from fastres.weights import Weights

INSECTS = ["ant", "bee", "cow"]
NUMBERS = sorted(map(str, range(11)))
LATER = "n15075142"  # not a class of ImageNet


pytestmark = pytest.mark.usefixtures("one_thread")


def ids() -> list[str]:
    return list(pytest.importorskip("timm.data").ImageNetInfo().label_names())


def folders(root: Path, names: list[str]) -> Path:
    """Create <name>/0.png in `root` for each name, each with other noise; return `root`."""
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / "0.png")
    return root


def trained(path: Path, names: list[str] | None, classes: int = 3, **meta: Any) -> Path:
    """Write a checkpoint as training does, or its weights.safetensors. names: None for weights without class names."""
    state = paper.cifar(8, num_classes=classes).state_dict()
    known = {"family": "cifar", "depth": 8, "val_size": 32, "resize": 32, **meta}
    if names is not None:
        known["classes"] = names
    way = by_channel().state_dict()
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
        path.write_bytes(checkpoint._safetensors(state, way, known) or b"")
    else:
        torch.save({"meta": known, "model": state, "ema": None, "preprocess": way}, path)
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def evaluation(weights: Path, root: Path) -> list[str]:
    pytest.importorskip("torchmetrics")
    return ["eval", "--checkpoint", str(weights), "--data", str(root), "--device", "cpu"]


@pytest.mark.parametrize("file", ["best.pt", "weights.safetensors"])
@pytest.mark.parametrize(
    ("there", "said"),
    [
        (
            ["bee", "cow", "dog"],
            "only the net has ant; only the data has dog; class 0 is ant in the net, bee in the data",
        ),
        (
            ["ant", "cat", "cow"],
            "only the net has bee; only the data has cat; class 1 is bee in the net, cat in the data",
        ),
        (["ant", "bee"], "a net with 3 classes, but the data .* has 2: only the net has cow$"),
        (["0", "1", "2"], "only the net has ant, bee, cow; only the data has 0, 1, 2; class 0 is ant in the net, 0"),
    ],
)
def test_eval_refuses_other_classes(
    file: str, there: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, root = trained(tmp_path / file, INSECTS), folders(tmp_path / "there", there)
    message = refused(evaluation(weights, root), capsys)
    assert f"{weights} " in message
    assert re.search(said, message)
    assert ("--ignore-class-names (in Python: " in message) == (len(there) == 3)


def test_eval_refuses_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` refuses classes in another order, unless --ignore-class-names says to compare by index."""
    weights, root = trained(tmp_path / "a.pt", ["bee", "ant", "cow"]), folders(tmp_path / "there", INSECTS)
    message = refused(evaluation(weights, root), capsys)
    assert "they have the same classes in another order; class 0 is bee in the net, ant in the data" in message
    assert main([*evaluation(weights, root), "--ignore-class-names"]) == 0
    told = capsys.readouterr().out
    torch.save({**torch.load(weights), "meta": {**torch.load(weights)["meta"], "classes": INSECTS}}, weights)
    assert main(evaluation(weights, root)) == 0
    assert capsys.readouterr().out == told


def test_eval_refuses_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval` refuses before it computes a mean image or runs a net."""

    def work(*args: Any, **_: Any) -> None:
        raise AssertionError("work")

    weights, root = trained(tmp_path / "a.pt", INSECTS), tmp_path / "there"
    state = torch.load(weights)
    torch.save({**state, "preprocess": {}}, weights)
    for part in ("train", "val"):
        folders(root / part, ["bee", "cow", "dog"])
    monkeypatch.setattr(data, "load", work)
    monkeypatch.setattr(Predictor, "__call__", work)
    arguments = [*evaluation(weights, root), "--recipe", "imagenet-2015"]
    assert "only the net has ant" in refused(arguments, capsys)
    with pytest.raises(AssertionError, match="work"):
        main([*arguments, "--ignore-class-names"])


def test_an_ensemble_has_one_set_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = trained(tmp_path / "a.pt", INSECTS), trained(tmp_path / "b.pt", INSECTS[::-1])
    silent, more = trained(tmp_path / "c.pt", None), trained(tmp_path / "d.pt", None, 4)
    image = str(folders(tmp_path / "there", ["ant"]) / "ant" / "0.png")
    predict = ["predict", image, "--device", "cpu", "--weights"]
    message = refused([*predict, str(first), str(silent), str(other)], capsys)
    assert f"another order; class 0 is ant in {first}, cow in {other}. --ignore-class-names (in Python: " in message
    assert f"the same number of classes: {first} has 3, {more} has 4" in refused(
        [*predict, str(first), str(more)], capsys
    )
    for others in ([str(other), "--ignore-class-names"], [str(silent)]):
        assert main([*predict, str(first), *others]) == 0
    capsys.readouterr()
    assert main([*predict, str(silent), str(first)]) == 0  # uses the names of the net that has them
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} == set(INSECTS)


def same_classes(weights: Weights, name: str, there: list[str], *, ignore: bool = False) -> None:
    eval_command._require_same_classes(argparse.Namespace(ignore_class_names=ignore), weights, name, there)


def net_of(count: int, **meta: Any) -> Weights:
    return Weights("net.pt", {"fc.weight": torch.zeros(count, 1)}, meta)


def test_imagenets_words_are_its_ids() -> None:
    """The folders of ImageNet, named by WordNet ids, fit published weights and nets that were trained with either kind
    of name."""
    there = ids()
    assert are_imagenet_ids(there)
    published = net_of(1000, categories=list(IMAGENET))
    for net in (published, net_of(1000, classes=list(IMAGENET)), net_of(1000, classes=there)):
        same_classes(net, "here", there)
    with pytest.raises(ValueError, match="the data has WordNet ids, but not ImageNet's 1000"):
        same_classes(published, "here", [*there[:-1], LATER])
    with pytest.raises(ValueError, match=f"only the data has {LATER}; class 999 is n15075141 in the net, {LATER}"):
        same_classes(net_of(1000, classes=there), "here", [*there[:-1], LATER])
    with pytest.raises(ValueError, match="class 0 is tench in the net, 0 in the data; folders with numeric names"):
        same_classes(published, "here", sorted(map(str, range(1000))))
    with pytest.raises(ValueError, match="they have the same classes in another order"):
        same_classes(published, "here", sorted(IMAGENET))
    same_classes(published, "synthetic", list(map(str, range(1000))))  # their labels are arbitrary


def test_numbers_that_sort_as_text_are_noticed() -> None:
    """For a net without class names, folder i may mean class i, so numeric folders in text order are refused. A net
    trained on such folders knows their order."""
    assert NUMBERS[:4] == ["0", "1", "10", "2"]
    with pytest.raises(
        ValueError,
        match=r"net\.pt doesn't name its classes, and here's folders .*\(0, 1, 10, \.\.\.\), so class 2 is folder 10",
    ):
        same_classes(net_of(11), "here", NUMBERS)
    same_classes(net_of(11), "here", NUMBERS, ignore=True)
    same_classes(net_of(11, classes=NUMBERS), "here", NUMBERS)
    same_classes(net_of(11), "here", [f"{i:02}" for i in range(11)])
    same_classes(net_of(10), "here", list("0123456789"))
    assert out_of_order(["1", "10", "2", "a"]) is None


def test_training_says_in_which_order_numbers_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        folders(tmp_path / part, NUMBERS)
    recipe = dataclasses.replace(
        RECIPES["imagenet-modern"], size=32, val_size=32, resize=32, epochs=None, iterations=1, batch=2, repeats=1
    )
    how: dict[str, Any] = {"data": "folder", "root": tmp_path, "workers": 0, "family": "cifar", "depth": 8}
    loop.train(loop.Run("imagenet-modern", recipe, tmp_path / "run", device="cpu", micro_batch=2, **how))
    assert "note: folders with numeric names are sorted as text (0, 1, 10, ...)" in capsys.readouterr().err


def test_resuming_with_other_classes_is_refused(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES["digits"], epochs=None, iterations=1)
    trainer = loop.Trainer(
        loop.Run("digits", recipe, tmp_path, depth=8, device="cpu"), Place(0, 1, torch.device("cpu")), Signals()
    )
    trainer.save()
    trainer.restore(trainer.last)
    state = torch.load(trainer.last, weights_only=True)
    torch.save({**state, "meta": {**state["meta"], "classes": list("9876543210")}}, trainer.last)
    with pytest.raises(ValueError, match=r"another run: .* another order; class 0 is 9 in the checkpoint, 0"):
        trainer.restore(trainer.last)


def test_a_thousand_other_folders_are_not_imagenet(tmp_path: Path) -> None:
    """Otherwise their classes would get ImageNet's names."""
    for part in ("train", "val"):
        for k in range(1000):
            (tmp_path / part / f"n{k:08}").mkdir(parents=True)
            (tmp_path / part / f"n{k:08}" / "0.JPEG").touch()
    with pytest.raises(
        DataError, match=r"has 1000 classes \(n00000000, .*not named by ImageNet's WordNet ids; --data folder"
    ):
        data.load("imagenet", RECIPES["imagenet-modern"], tmp_path)


def test_a_mean_of_other_channels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mean with one channel would silently broadcast over the image's channels."""
    weights, root = trained(tmp_path / "a.pt", INSECTS), folders(tmp_path / "there", INSECTS)
    state = torch.load(weights)
    state["preprocess"] = {name: value[:1] for name, value in state["preprocess"].items()}
    torch.save(state, weights)
    assert "a mean of shape [1, 1, 1] for a net of 3 channels" in refused(evaluation(weights, root), capsys)
