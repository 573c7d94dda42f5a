"""`predict`, `eval` and training name bad files on disk and continue, or refuse them."""

from __future__ import annotations

import csv
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import SMALL, refused
from PIL import Image
from tolerances import GREY_LEVELS
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from fastres import crop, paper
from fastres.cli import batches
from fastres.cli import eval as eval_command
from fastres.cli.main import main
from fastres.evaluate import Predictor, Views
from fastres.images import ClassFolders, ImageError, image_files, read_image
from fastres.table import Table
from fastres.terminal import printable, utf8
from fastres.train import data, loop
from fastres.train.recipe import RECIPES, ScaleCrop

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"size": 32, "val_size": 32, "resize": 40, "epochs": None, "iterations": 2, "batch": 4}
IDS = ("n01440764", "n01443537")  # of ImageNet classes
ODD, HOSTILE = b"caf\xe9.png", "a\nb\x1b[31m\u202ec.png"  # Latin-1; a line break, a colour code, right-to-left text


def picture(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.save(paper.cifar(8, num_classes=2).eval().state_dict(), tmp_path / "net.pt")
    return str(tmp_path / "net.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three good images."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# files that are no images


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    at = os.getcwd()
    os.chdir(path.parent)  # paths of sockets have a length limit
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(at)


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path, "PNG")  # 50 KB


def cut(path: Path) -> None:
    picture().save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-300])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (pipe, "can't be read: it is a pipe, not a file"),
    "socket": (listening, "can't be read: it is a socket, not a file"),
    "device": (lambda path: path.symlink_to(os.devnull), "can't be read: it is a device, not a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "can't be read: No such file or directory"),
    "loop": (lambda path: path.symlink_to(path.name), "can't be read: Too many levels of symbolic links"),
    "empty": (
        Path.touch,
        "is not a readable image (not in a format that Pillow supports); fetch it again or remove it",
    ),
    "text": (lambda path: path.write_text("text"), "is not a readable image (not in a format that Pillow supports)"),
    "cut": (cut, "is not a readable image (image file is truncated"),
    "no pixels": (
        lambda path: path.write_bytes(b"P5 0 7 255\n"),
        "is not a readable image (not in a format that Pillow supports)",
    ),
    "bomb": (bomb, "could be decompression bomb DOS attack); make it smaller or remove it"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_named_in_one_line(
    kind: str, folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other images get an answer, and reading a pipe does not block."""
    make, said = BAD[kind]
    bad = folder / "1b.JPEG"
    make(bad)
    assert main(["predict", str(folder), "--weights", weights, *SMALL]) == 1
    out, err = capsys.readouterr()
    assert out.count(".png\n") == 3
    (line, count) = err.splitlines()
    assert line.startswith(f"{bad} {said}" if kind != "bomb" else str(bad))
    assert said in line
    assert count == "1 of 4 images could not be read"


@pytest.mark.parametrize("kind", BAD)
def test_training_names_what_is_no_image_too(kind: str, folder: Path) -> None:
    make, said = BAD[kind]
    bad = folder / "1b.JPEG"
    make(bad)
    transforms = [data.train_transform(RECIPES[name]) for name in ("imagenet-2015", "imagenet-modern")]
    files = ClassFolders(str(folder.parent))
    (index,) = (i for i, (path, _) in enumerate(files.samples) if path == str(bad))
    for transform in [*transforms, data.CentreCrop(256, 224)]:
        found = data.Folder(files, transform)[index, 0]
        assert isinstance(found, Exception)
        assert str(bad) in str(found)
        assert said in str(found)
        assert "\n" not in str(found)


def test_an_image_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error is simulated, because root may read every file."""

    def forbidden(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(ImageError, match=r"a\.png can't be read: Permission denied$"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("pipe", "is a pipe, not a file"), ("dangling", "does not exist"), ("loop", "Too many levels of symbolic links")],
)
def test_what_is_named_itself_is_refused_before_any_work(
    kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BAD[kind][0](tmp_path / "a.png")
    message = refused(["predict", str(tmp_path / "a.png"), "--weights", "none.pt"], capsys)
    assert str(tmp_path / "a.png") in message
    assert said in message


def test_pillow_warns_of_nothing(tmp_path: Path) -> None:
    """Pillow's warning about images of 90 to 179 million pixels, which are read, names no file and is suppressed."""
    command = f"""
import warnings
from PIL import Image
from fastres.images import read_image
Image.new("1", (80, 2)).save({str(tmp_path / "a.png")!r})
Image.MAX_IMAGE_PIXELS = 100
print(read_image({str(tmp_path / "a.png")!r}).size)
warnings.warn("others are heard")
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "(80, 2)\n"
    assert "DecompressionBomb" not in done.stderr
    assert "others are heard" in done.stderr


# folders


def test_folders_are_searched_once(tmp_path: Path, folder: Path) -> None:
    """Links to folders are followed, even in cycles, and a folder with an image's name is a folder."""
    deep = folder / "album.jpg"
    deep.mkdir()
    picture().save(deep / "x.png")
    (deep / "back").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "elsewhere" / "y.PNG")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "notes.txt").touch()
    expected = {str(folder / name) for name in ("0.png", "1.png", "2.png", "album.jpg/x.png", "linked/y.PNG")}
    found = image_files(folder, pytest.fail)
    assert (set(found), len(found)) == (expected, 5)
    files = ClassFolders(str(tmp_path))
    assert files.classes == ["elsewhere", "photos"]
    assert {path for path, label in files.samples if label == 1} == expected


def test_the_order_is_torchvisions(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/x/1.png", "a/x-1/2.JPG", "a/X/é.png", "a/.png", "a b/10.png", "a b/2.png", "a-1/z.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert ClassFolders(str(tmp_path)).samples == ImageFolder(str(tmp_path)).samples
    found, _ = batches.named_images([tmp_path])
    assert [Path(path) for path in found] == sorted(map(Path, found))
    assert len(found) == 8


def test_a_folder_that_can_t_be_listed_is_named(
    folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`predict` names the folder and continues, because it may have no images (e.g. lost+found). Commands that count
    images refuse it."""
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def listed(path: Any) -> Any:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)
    assert main(["predict", str(folder), "--weights", weights, *SMALL]) == 1
    out, err = capsys.readouterr()
    assert out.count(".png\n") == 3
    assert err == f"{folder / 'lost+found'} can't be listed: Permission denied\n"
    message = refused(["predict", str(folder / "lost+found"), "--weights", weights, *SMALL], capsys)
    assert "lost+found can't be listed: Permission denied" in message
    with pytest.raises(ValueError, match=r"lost\+found"):
        eval_command._image_folder(folder.parent, "to test on")
    with pytest.raises(data.DataError, match=r"lost\+found"):
        data._image_folder("folder", folder.parent)


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    for name in ("full", "album.jpg"):
        (tmp_path / name).mkdir()
    picture().save(tmp_path / "full" / "a.png")
    with pytest.raises(ValueError, match=r"has no classes to test on: no images in album\.jpg; accepted: \.jpg"):
        eval_command._image_folder(tmp_path, "to test on")


# an ImageNet-shaped tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An ImageNet-like tree: train/ and val/ with 6 images in each of 2 classes, of the unusual kinds that ImageNet
    has."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for part in ("train", "val"):
        for k, name in enumerate(IDS):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            image = picture(seed=k)
            image.convert("CMYK").save(place / f"{name}_0.JPEG")
            image.convert("L").save(place / f"{name}_1.JPEG")
            image.quantize(16).save(place / f"{name}_2.png")
            image.save(place / f"{name}_3.JPEG", exif=turned)
            image.save(place / f"{name}_4.JPEG", format="PNG")
            picture(2, 6000).save(place / f"{name}_5.JPEG")
    return tmp_path


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_imagenet_tree_is_tested_on(
    workers: str, tree: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    arguments = [*SMALL, "--workers", workers]
    assert main(["eval", "--data", str(tree), "--checkpoint", weights, *arguments]) == 0
    out, err = capsys.readouterr()
    assert "(12 images, 2 classes)" in out
    assert not err
    assert main(["predict", str(tree), "--weights", weights, *arguments, "--crops", "10", "--top", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.count(".JPEG\n") + out.count(".png\n") == 24
    assert not err


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["imagenet-2015", "imagenet-modern"])
def test_an_imagenet_tree_is_trained_on(name: str, workers: int, tree: Path) -> None:
    small = {"crop": ScaleCrop(40, 60)} if name == "imagenet-2015" else {"repeats": 1}
    recipe = dataclasses.replace(RECIPES[name], **SETTINGS, bn_batch=2, **small)
    where: dict[str, Any] = {"data": "folder", "root": tree, "cache": tree / "cache", "workers": workers}
    summary = loop.train(loop.Run(name, recipe, tree / "run", family="cifar", depth=8, device="cpu", **where))
    assert summary.iterations == 2


# an image of 6000x2


def full(image: Any, side: int, box: tuple[int, int, int, int]) -> Any:
    return tvf.crop(tvf.resize(image, [side], antialias=True), *box)


SHAPES = [(480, 640), (640, 427), (33, 200), (32, 32), (90, 3001), (3, 1000), (2501, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_ordinary_crops_are_torchvisions(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    pixels = tvf.pil_to_tensor(image)
    theirs = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(32)])
    assert data.CentreCrop(40, 32)(image).tobytes() == theirs(image).tobytes()
    assert torch.equal(Views("center", 32, 40).prepare(pixels), theirs(pixels))
    square = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(40)])
    assert torch.equal(Views("10", 32, 40).prepare(pixels), square(pixels))
    ours = data.ScaledCrop(40, 60, 32)
    for word in range(5):
        with data.seeded(word):
            side = int(torch.randint(40, 61, ()))
            expected = v2.RandomCrop(32)(tvf.resize(image, [side], antialias=True))
        with data.seeded(word):
            assert ours(image).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_window_alone_is_cut_as_from_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels differ by at most 1/255, wherever the window is."""
    image = picture(*shape)
    pixels = tvf.pil_to_tensor(image)
    height, width = size = crop.resized(shape, 64)
    for box in (crop.centre(size, 48), (0, 0, 48, 48), (height - 48, width - 50, 48, 50), (3, 1, 40, 30)):
        whole = [full(each, 64, box) for each in (image, pixels)]
        with monkeypatch.context() as patch:
            patch.setattr(crop, "MOST_PIXELS", 0)
            patch.setattr(crop.tvf, "resize", None)
            alone = [crop.resized_crop(each, size, box) for each in (image, pixels)]
        away = np.abs(np.asarray(whole[0], dtype=int) - np.asarray(alone[0]))
        assert away.max() <= 1
        assert away.mean() < GREY_LEVELS
        assert (whole[1].int() - alone[1].int()).abs().max() <= 1


def test_a_crop_takes_no_more_than_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the full size is allocated for an image that would have 200 million pixels after resizing, or for one
    with the most pixels that Pillow opens."""
    own = tvf.resize

    def resize(image: Any, size: list[int], **options: Any) -> Any:
        assert np.prod(size) <= crop.MOST_PIXELS
        return own(image, size, **options)

    monkeypatch.setattr(crop.tvf, "resize", resize)
    strip = picture(2, 6000)
    pixels = tvf.pil_to_tensor(strip)
    assert Views().prepare(pixels).shape == (3, 224, 224)
    assert Views("10").prepare(pixels).shape == (3, 256, 256)
    assert Views().prepare(pixels.mT[None, :1]).shape == (1, 1, 224, 224)
    for name in ("imagenet-2015", "imagenet-modern"):
        assert data.train_transform(RECIPES[name])(strip).size == (RECIPES[name].size, RECIPES[name].size)
    expected = strip.crop((2990, 0, 3010, 2)).resize(
        (224, 224), Image.Resampling.BILINEAR, (9.125, 0.125, 10.875, 1.875)
    )
    assert data.CentreCrop(256, 224)(strip).tobytes() == expected.tobytes()
    longest = torch.zeros(1, 1, 2**26, dtype=torch.uint8)
    longest[..., 2**25 :] = 255
    halves = Views("center", 32, 32).prepare(longest)[0]
    assert halves[:, 0].max() < 30
    assert halves[:, -1].min() > 225


@pytest.mark.parametrize("crops", ["center", "10", "multiscale"])
@pytest.mark.parametrize("side", [4097, 100_000, 10**30])
def test_crops_that_no_memory_holds_are_refused(
    crops: str,
    side: int,
    folder: Path,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(batches, "read_image", None)
    common = ["--model", "cifar-8", "--device", "cpu", "--size", str(side), "--crops", crops]
    message = refused(["predict", str(folder), "--weights", weights, *common], capsys)
    assert "are too large: up to 4096x4096 are accepted, for which a first layer's output has 1 GB" in message


def test_a_whole_image_that_no_memory_holds_is_named(
    tree: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tree / "val" / IDS[0]
    arguments = ["--model", "cifar-8", "--device", "cpu", "--size", "32", "--crops", "multiscale", "--no-flip"]
    assert main(["predict", str(place), "--weights", weights, *arguments, "--scales", "32", "100"]) == 1
    out, err = capsys.readouterr()
    assert out.count(".JPEG\n") == 4
    bad = place / f"{IDS[0]}_5.JPEG"
    said = f"{bad} can't be prepared for the net (an image of 2x6000 becomes 100x300000, more than 16,777,216 pixels)"
    assert err.splitlines() == [said, "1 of 6 images could not be read"]


# names


def test_any_name_can_be_shown_and_kept() -> None:
    odd = os.fsdecode(ODD)
    assert printable(odd) == utf8(odd) == r"caf\xe9.png"
    assert printable(HOSTILE) == r"a\nb\x1b[31m\u202ec.png"
    assert utf8(HOSTILE) == HOSTILE
    assert printable(utf8("\ud83d é 日本\t🙂")) == "\\ud83d é 日本\t🙂"


def test_predict_takes_names_that_are_not_utf8(folder: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (ODD, HOSTILE.encode()):
        picture().save(folder / "0.png")
        os.link(folder / "0.png", os.path.join(os.fsencode(folder), name))
    Path(folder / os.fsdecode(b"\xff\nempty.jpg")).touch()
    (folder.parent / "labels.txt").write_bytes(b"p\xe2t\xe9\nb\x1b]0;c\n")
    table = folder.parent / "out.csv"
    arguments = ["--weights", weights, *SMALL, "--csv", str(table), "--labels", str(folder.parent / "labels.txt")]
    assert main(["predict", str(folder), *arguments]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[::3] == [
        f"{folder}/{name}" for name in ("0.png", "1.png", "2.png", printable(HOSTILE), r"caf\xe9.png")
    ]
    assert {line.split()[-1] for line in lines if line.startswith("  ")} == {r"p\xe2t\xe9", r"b\x1b]0;c"}
    assert err.splitlines()[0].startswith(rf"{folder}/\xff\nempty.jpg is not a readable image")
    assert len(err.splitlines()) == 2
    rows = rows_of(table)
    assert [row["image"] for row in rows[::2]] == [
        f"{folder}/{name}" for name in ("0.png", "1.png", "2.png", HOSTILE, r"caf\xe9.png")
    ]
    assert {row["name"] for row in rows} == {r"p\xe2t\xe9", "b\x1b]0;c"}


def test_classes_may_have_names_that_are_not_utf8(
    tree: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training and evaluation accept such names, and the checkpoint has the class names of the folders."""
    pytest.importorskip("torchmetrics")
    for part in ("train", "val"):
        os.rename(tree / part / IDS[1], os.path.join(os.fsencode(tree / part), b"z\xff"))
    table = tmp_path / "classes.csv"
    assert main(["eval", "--data", str(tree), "--checkpoint", weights, *SMALL, "--csv", str(table)]) == 0
    assert [row["name"] for row in rows_of(table)] == [IDS[0], r"z\xff"]
    recipe = dataclasses.replace(RECIPES["imagenet-2015"], **SETTINGS, bn_batch=2, crop=ScaleCrop(40, 60))
    where: dict[str, Any] = {"data": "folder", "root": tree, "cache": tree / "cache", "workers": 0}
    loop.train(loop.Run("imagenet-2015", recipe, tree / "run", family="cifar", depth=8, device="cpu", **where))
    capsys.readouterr()
    for name in ("best.pt", "weights.safetensors"):
        given = ["--data", str(tree), "--checkpoint", str(tree / "run" / name), "--device", "cpu"]
        assert main(["eval", *given]) == 0
        assert main(["predict", str(tree / "val"), "--weights", given[3], "--device", "cpu"]) == 0
        assert "%  z\\xff\n" in capsys.readouterr().out


def test_an_output_in_ascii_escapes_what_it_lacks(folder: Path, weights: str) -> None:
    os.rename(folder / "0.png", folder / "é日.png")
    os.rename(folder / "1.png", os.path.join(os.fsencode(folder), ODD))
    command = [sys.executable, "-m", "fastres", "predict", str(folder), "--weights", weights, *SMALL, "--top", "1"]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert found == [f"{folder}/{name}" for name in ("2.png", r"caf\xe9.png", r"\xe9\u65e5.png")]


def test_refusals_are_one_line_that_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["predict", f"no/{HOSTILE}", "--weights", "none.pt"], capsys)
    assert message.endswith(rf"error: no/{printable(HOSTILE)} does not exist")


# scores


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_answer(
    value: float, folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Predictor.__call__

    def broken(self: Any, images: Any) -> Tensor:
        scores = call(self, images).clone()
        scores[1, 0] = value
        return scores

    monkeypatch.setattr(Predictor, "__call__", broken)
    table = folder.parent / "out.csv"
    assert main(["predict", str(folder), "--weights", weights, *SMALL, "--csv", str(table)]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line[0] != " "] == [str(folder / "0.png"), str(folder / "2.png")]
    said = [f"{folder / '1.png'}: the net's scores are not finite", "1 of 3 images got no finite scores"]
    assert err.splitlines() == said
    assert len(rows_of(table)) == 4


# tables


def test_a_table_is_whole_or_called_otherwise(tmp_path: Path) -> None:
    path, part = tmp_path / "a.csv", tmp_path / "a.csv.part"
    path.write_text("of the last run")
    with suppress(KeyboardInterrupt), Table(path) as table:
        table.row("a", 1)
        assert part.read_bytes() == b"a,1\r\n"  # each row is written immediately
        raise KeyboardInterrupt
    assert path.read_text() == "of the last run"
    assert part.read_bytes() == b"a,1\r\n"
    with Table(path) as table:
        table.row("b", Path("c"), 0.5)
    assert path.read_bytes() == b"b,c,0.5\r\n"
    assert not part.exists()


def test_a_disk_that_fills_up_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path / "a.csv")
    table.row("whole")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table, "_writer", type("Full", (), {"writerow": full}))
    said = r"a\.csv\.part can't be written: No space left on device; it holds 1 complete rows"
    with pytest.raises(OSError, match=said), table:
        table.row("cut")
    assert (tmp_path / "a.csv.part").read_text() == "whole\n"
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_a_table_may_go_to_a_device(
    command: str, tree: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device, or a link to one, is written in place and stays a device."""
    pytest.importorskip("torchmetrics")
    given = ["--data", str(tree), "--checkpoint"] if command == "eval" else [str(tree), "--weights"]
    (tmp_path / "link.csv").symlink_to("/dev/full")
    for name in ("/dev/full", str(tmp_path / "link.csv")):
        assert main([command, *given, weights, *SMALL, "--csv", name]) == 1
        said = (
            f"python -m fastres {command}: {name} can't be written: No space left on device; it holds 0 complete rows"
        )
        assert capsys.readouterr().err.splitlines()[-1].startswith(said)
    assert Path("/dev/full").is_char_device()
    assert (tmp_path / "link.csv").is_symlink()


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_the_reader_of_the_output_may_leave(command: str, workers: str, tree: Path, weights: str) -> None:
    """A reader such as `head` may close the pipe early; that is not an error."""
    pytest.importorskip("torchmetrics")
    given = ["--data", str(tree), "--checkpoint"] if command == "eval" else [str(tree), "--weights"]
    run = [
        sys.executable,
        "-u",
        "-m",
        "fastres",
        command,
        *given,
        weights,
        *SMALL,
        "--workers",
        workers,
        "--batch",
        "1",
    ]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if command == "predict":
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 141)


# labels


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfcat\ndog\n", b"cat\r\ndog\r\n", b"cat\ndog", b"cat\ndog\n\n \n", b"\xef\xbb\xbfcat\rdog\r"],
)
def test_labels_are_read_as_editors_write_them(
    content: bytes, folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "labels.txt").write_bytes(content)
    given = ["predict", str(folder), "--weights", weights, *SMALL, "--labels", str(folder.parent / "labels.txt")]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[11:] for line in lines if line.startswith("  ")} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("cat\ndog\n".encode("utf-16"), "it is not text, or it is UTF-16; UTF-8 is accepted"),
        ("cat\ndog\n".encode("utf-16-be"), "it is not text, or it is UTF-16; UTF-8 is accepted"),
        (b"cat\n\ndog", "line 2 is empty"),
        (b"", "names 0 classes"),
        (b"cat\ndog\nbird", "names 3 classes"),
    ],
)
def test_labels_that_name_no_class_are_refused(
    content: bytes, said: str, folder: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "labels.txt").write_bytes(content)
    given = ["predict", str(folder), "--weights", weights, *SMALL, "--labels", str(folder.parent / "labels.txt")]
    assert said in refused(given, capsys)
