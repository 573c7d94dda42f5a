"""Helpers for tests of the command line: small nets in files, expected scores on photographs, rejected commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastres import paper
from fastres.cli.main import main
from fastres.evaluate import Predictor, Views

SMALL = ["--model", "cifar-8", "--size", "32", "--resize", "40", "--device", "cpu"]
CLASSES = ["flower", "temple"]


def net(classes: int = 2, depth: int = 8, in_channels: int = 3) -> nn.Module:
    return paper.cifar(depth, num_classes=classes, in_channels=in_channels).eval()


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def images_of(folder: Path) -> list[tuple[Path, Tensor]]:
    """Return the path and pixels [3, H, W] of every PNG below `folder`, in alphabetical order."""
    paths = sorted(folder.rglob("*.png"))
    return [(path, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)) for path in paths]


def scores_of(models: list[nn.Module], views: Views, folder: Path, preprocess: nn.Module) -> Tensor:
    return Predictor(models, views, preprocess)([views.prepare(image) for _, image in images_of(folder)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder val/<class>/<n>.png with four crops of each of scikit-learn's two photographs."""
    temple, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    for name, photo in (("temple", temple), ("flower", flower)):
        folder = tmp_path / "photos" / "val" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(photo[40 * i : 40 * i + 240, 60 * i : 60 * i + 400]).resize((72, 48)).save(
                folder / f"{i}.png"
            )
    return tmp_path / "photos"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The scores of every batch that commands compute, of which they print only a few, rounded, or an accuracy."""
    batches: list[Tensor] = []
    call = Predictor.__call__

    def recorded(self: Predictor, images: Any) -> Tensor:
        batches.append(call(self, images))
        return batches[-1]

    monkeypatch.setattr(Predictor, "__call__", recorded)
    return batches


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Assert that the command line rejects the arguments with exit code 2; return the last line of the message."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
