"""The DALI loader: crop windows, pixels compared with Pillow's, bit-exact resumption, errors."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tolerances import NEAR_A_PIXEL, RARELY

from fastres.cli.main import main
from fastres.train import checkpoint, dali, data
from fastres.train.data import DataError, Dataset, Loader, ReadError, Stream
from fastres.train.loop import Run, Trainer, train
from fastres.train.recipe import RECIPES, Recipe, ScaleCrop

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    RECIPES["imagenet-2015"], size=64, val_size=64, resize=72, crop=ScaleCrop(72, 120), batch=4, bn_batch=2
)
PHOTOS = [np.asarray(image) for image in load_sample_images().images]


def needs_dali() -> None:
    pytest.importorskip("nvidia.dali")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders train and val with two classes each, and photographs in common file formats and colour modes."""
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF orientation, which Pillow doesn't apply
    codings: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "jpg", {"quality": 90}),
        ("RGB", "jpeg", {"quality": 75, "progressive": True, "subsampling": 0, "exif": turned}),
        ("L", "JPEG", {}),
        ("CMYK", "jpg", {}),
        ("RGB", "png", {}),
        ("RGBA", "png", {}),
        ("P", "png", {}),
        ("RGB", "webp", {}),
    ]
    for i, (mode, suffix, options) in enumerate(codings * 2):
        place = tmp_path / ("train" if i < len(codings) else "val") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        y, x = 9 * i, 17 * i
        picture = Image.fromarray(PHOTOS[i % 2][y : y + 150 + i, x : x + 200 - 2 * i])
        picture.convert(mode).save(place / f"{i}.{suffix}", **options)
    return tmp_path


def loaders(dataset: Dataset, recipe: Recipe = SMALL, workers: int = 0) -> tuple[Loader, Loader]:
    """Return a loader that decodes with Pillow and the same one with DALI."""
    stream = Stream(len(dataset.train), recipe.batch, recipe.batch // recipe.micro_batch(1), 0, recipe.repeats)
    torch_s = Loader(dataset, recipe, stream, CPU, workers)
    return torch_s, dataclasses.replace(torch_s, decode=dali.decoded)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 500), (256, 300)])
def test_windows_are_those_that_the_transform_draws(size: tuple[int, int]) -> None:
    """The window agrees with the pixels that the transform shows of an image whose pixels are their coordinates."""
    transform: Any = data.train_transform(RECIPES["imagenet-2015"])
    width, height = size
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")) + 0.5
    mirrors = 0
    for word in range(40):
        with data.seeded(word):
            top, left, bottom, right, down, across, mirrored = dali.window(transform, width, height).tolist()
        with data.seeded(word):
            shown = transform(places)
        mirrors += int(mirrored)
        assert (down, across) == shown.shape[1:] == (224, 224)
        row = shown[1, 112].flip(0) if mirrored else shown[1, 112]
        for line, first, last in ((shown[0, :, 112], top, bottom), (row, left, right)):
            expected = first + (torch.arange(224) + 0.5) * (last - first) / 224
            # The filter is cut off at the image's edge, and inside it is discretised to whole pixels.
            inner = slice(4, -4)
            torch.testing.assert_close(line[inner], expected[inner], rtol=0, atol=0.1)
    assert 8 <= mirrors <= 32


def test_the_window_of_validation_is_the_centre() -> None:
    top, left, bottom, right, down, across, mirrored = dali.window(data.CentreCrop(256, 224), 640, 427).tolist()
    assert (down, across, mirrored) == (224, 224, 0)
    scale = 427 / 256
    assert (bottom - top, right - left) == pytest.approx((224 * scale, 224 * 640 / 383), abs=NEAR_A_PIXEL)
    assert ((top + bottom) / 2, (left + right) / 2) == pytest.approx((427 / 2, 320), abs=scale)


def test_unusual_files_are_decoded_by_pillow(folder: Path) -> None:
    dataset = data.load("folder", dataclasses.replace(SMALL, normalise="channel"), folder)
    assert isinstance(dataset.train, data.Folder)
    coded = dali.Encoded(dataset.train)
    kinds = {}
    for index, (path, _) in enumerate(dataset.train.files.samples):
        item = coded[index, 0]
        assert not isinstance(item, ReadError)
        content = item[1].numpy().tobytes()
        kinds[int(Path(path).stem)] = content[:2]
        same = Image.open(io.BytesIO(content)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(same), np.asarray(Image.open(path).convert("RGB")))
    assert [kinds[i] for i in range(8)] == [b"\xff\xd8"] * 3 + [b"P6", b"\x89P"] + [b"P6"] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_pillows(folder: Path, tmp_path: Path, workers: int) -> None:
    """Pixels differ from Pillow's by at most 1/255: both use the same filter, but Pillow rounds each pass to integers.

    Larger differences are allowed in the outermost pixels of a window at the image's edge: where the filter extends
    beyond the edge, Pillow omits those taps and DALI repeats the last pixel.
    """
    needs_dali()
    dataset = data.load("folder", SMALL, folder, cache=tmp_path / "cache")
    ours, theirs = loaders(dataset, workers=workers)
    levels = []
    pairs = [*zip(ours.training(0, 12), theirs.training(0, 12), strict=True)]
    pairs += zip(ours.validation(), theirs.validation(), strict=True)
    for (x, y), (xx, yy) in pairs:
        assert torch.equal(y, yy)
        assert (xx.dtype, xx.shape, xx.is_contiguous(memory_format=torch.channels_last)) == (x.dtype, x.shape, True)
        levels.append(255 * (x - xx).abs())
    differences = torch.cat([level.flatten() for level in levels])
    assert len(levels) == 24 + 2
    assert differences[differences > 1.01].numel() < RARELY * differences.numel()
    assert differences.mean() < 0.25
    inner = torch.cat([level[:, :, 2:-2, 2:-2].flatten() for level in levels])
    assert inner.max() < 1.01


def test_another_window_would_be_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_dali()
    dataset = data.load("folder", SMALL, folder, cache=tmp_path / "cache")
    right = dali.window

    def shifted(*args: Any) -> torch.Tensor:
        return right(*args) + torch.tensor([0, 0.5, 0, 0.5, 0, 0, 0])

    monkeypatch.setattr(dali, "window", shifted)
    ours, theirs = loaders(dataset)
    worst = max(
        float((x - xx).abs().max()) for (x, _), (xx, _) in zip(ours.validation(), theirs.validation(), strict=True)
    )
    assert 255 * worst > 8


def run(root: Path, out: Path, **options: Any) -> Run:
    recipe = dataclasses.replace(SMALL, normalise="channel", iterations=5)
    how: dict[str, Any] = {"data": "folder", "root": root, "family": "cifar", "depth": 8, "device": "cpu", "workers": 0}
    return Run("imagenet-2015", recipe, out, **{**how, "loader": "dali", "eval_every": 2, "log_every": 1, **options})


def test_resumed_to_the_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is interrupted after its fourth iteration resumes from the checkpoint of the second and ends with the
    same weights and history as an uninterrupted one, although DALI had prefetched more batches.

    The number of workers may differ.
    """
    needs_dali()
    train(run(folder, tmp_path / "whole"))
    assert "photographs are decoded by NVIDIA DALI" in capsys.readouterr().err
    whole = Trainer.step

    def step(self: Trainer, batches: Any) -> None:
        whole(self, batches)
        if self.iteration == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(run(folder, tmp_path / "cut"))
    monkeypatch.setattr(Trainer, "step", whole)
    assert torch.load(tmp_path / "cut" / checkpoint.LAST, weights_only=True)["iteration"] == 2
    train(run(folder, tmp_path / "cut", resume=True, workers=1))
    ours, theirs = (torch.load(tmp_path / name / checkpoint.LAST, weights_only=True) for name in ("cut", "whole"))
    assert ours["iteration"] == theirs["iteration"] == 5
    assert [name for name, value in theirs["model"].items() if not torch.equal(ours["model"][name], value)] == []
    rows = [[{k: v for k, v in row.items() if "second" not in k} for row in one["history"]] for one in (ours, theirs)]
    assert rows[0] == rows[1]


def test_a_signal_ends_it_with_its_workers(folder: Path, tmp_path: Path) -> None:
    """SIGTERM ends the training, although the workers ignore signals.

    If the workers weren't ended explicitly, Python would wait for them forever at exit.
    """
    needs_dali()
    out, log = tmp_path / "run", tmp_path / "run" / "log.csv"
    arguments = "--recipe imagenet-2015 --data folder --family cifar --depth 8 --device cpu --loader dali --workers 1"
    arguments += " --batch 2 --micro-batch 2 --iterations 10000 --eval-every 10000 --log-every 1"
    where = ["--root", str(folder), "--out", str(out), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen([sys.executable, "-m", "fastres", "train", *arguments.split(), *where])
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (log.exists() and "\n2," in log.read_text()):
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert torch.load(out / checkpoint.LAST, weights_only=True)["iteration"] >= 2


@pytest.mark.parametrize("what", ["cut", "text"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_picture_is_named(folder: Path, workers: int, what: str) -> None:
    """A damaged file is named, whether the worker that reads it notices the damage or only DALI does."""
    needs_dali()
    bad = folder / "train" / "class0" / "0.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if what == "cut" else b"no picture")
    recipe = dataclasses.replace(SMALL, normalise="channel")
    _, theirs = loaders(data.load("folder", recipe, folder), recipe, workers)
    with pytest.raises(ReadError, match=rf"^{bad} is not a readable image .* fetch it again"):
        list(theirs.training(0, 3))


def test_which_loader_is_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(SMALL, normalise="channel")
    photos = data.load("folder", recipe, folder)
    digits = data.load("digits", RECIPES["digits"])
    gpu = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert {dali.chosen(asked, photos, recipe, device) for asked in ("auto", "torch") for device in (CPU, gpu)} == {
        "torch"
    }
    with pytest.raises(DataError, match=r"--loader dali: DALI is not installed .*fastres\[dali\]"):
        dali.chosen("dali", photos, recipe, CPU)
    with pytest.raises(DataError, match="digits has no files to decode"):
        dali.chosen("dali", digits, RECIPES["digits"], CPU)
    with pytest.raises(DataError, match="supports only the augmentation scale, crop and flip"):
        dali.chosen("dali", photos, RECIPES["imagenet-modern"], CPU)
    for name in ("nvidia", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    assert [dali.chosen("auto", photos, recipe, device) for device in (CPU, gpu)] == ["torch", "dali"]
    assert dali.chosen("dali", photos, recipe, CPU) == "dali"
    assert dali.chosen("auto", photos, RECIPES["imagenet-modern"], gpu) == "torch"
    assert dali.chosen("auto", digits, RECIPES["digits"], gpu) == "torch"


def test_the_command_refuses_what_dali_can_t(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--loader", "dali"])
    assert end.value.code == 2
    assert "--loader dali: digits has no files to decode" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    """On a GPU, pixels differ only a little from those on the CPU, as nvJPEG rounds differently."""
    needs_dali()
    device = torch.device("cuda", 0)
    dataset = data.load("folder", SMALL, folder, cache=tmp_path / "cache")
    ours, _ = loaders(dataset)
    theirs = dataclasses.replace(ours, device=device, decode=dali.decoded)
    for (x, y), (xx, yy) in zip(loaders(dataset)[0].training(0, 6), theirs.training(0, 6), strict=True):
        assert torch.equal(y, yy.cpu())
        assert (xx.device, xx.is_contiguous(memory_format=torch.channels_last)) == (device, True)
        difference = 255 * (x - xx.cpu()).abs()
        assert difference.mean() < 2
        assert difference.max() < 40
