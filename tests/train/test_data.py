"""Data sets for training: the order of images, augmentations against slow references, and error messages."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from tolerances import COLOUR_DEVIATIONS, COLOUR_MEANS, COLOURS, DRAWN, MIXED_AREA, ROUNDING
from torchvision import datasets

from fastres.train import data
from fastres.train.data import COLOUR, SAMPLE, DataError, Dataset, Loader, Moments, ReadError, Resident, Stream
from fastres.train.recipe import IMAGENET_MEAN, IMAGENET_STD, RECIPES, Recipe, ScaleCrop

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    RECIPES["imagenet-2015"], size=48, val_size=48, resize=56, crop=ScaleCrop(56, 72), batch=4, bn_batch=2
)


def photographs() -> list[np.ndarray]:
    """Return scikit-learn's two sample photographs, uint8 [427, 640, 3]."""
    return [np.asarray(image) for image in load_sample_images().images]


def patches(count: int, size: int) -> torch.Tensor:
    """Return random crops of the photographs, uint8 [count, 3, size, size]."""
    generator = np.random.default_rng(0)
    photos = photographs()
    squares = []
    for i in range(count):
        y, x = generator.integers(0, (427 - size, 640 - size))
        squares.append(photos[i % 2][y : y + size, x : x + size])
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders train and val with two classes of three photographs each."""
    pictures = patches(12, 100).permute(0, 2, 3, 1).numpy()
    for i, picture in enumerate(pictures):
        place = tmp_path / ("train" if i < 6 else "val") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[:, : 80 + 2 * i]).save(place / f"{i}.png")
    return tmp_path


def loader(
    dataset: Dataset, recipe: Recipe, *, workers: int = 0, rank: int = 0, world: int = 1, seed: int = 0
) -> Loader:
    stream = Stream(len(dataset.train), recipe.batch, recipe.batch // recipe.micro_batch(world), seed, recipe.repeats)
    return Loader(dataset, recipe, stream, CPU, workers, rank, world)


def test_each_epoch_shows_each_image_once_in_another_order() -> None:
    stream = Stream(n=10, batch=4, blocks=2, seed=3)
    shown = np.concatenate([stream.indices(np.sort(_of(stream, i))) for i in range(5)]).reshape(2, 10)
    assert [sorted(epoch) for epoch in shown.tolist()] == [list(range(10))] * 2
    assert shown[0].tolist() != shown[1].tolist()
    assert Stream(10, 4, 2, seed=4).indices(np.arange(10)).tolist() != shown[0].tolist()


def _of(stream: Stream, iteration: int) -> np.ndarray:
    return np.concatenate([stream.positions(iteration, block) for block in range(stream.blocks)])


def test_micro_batches_share_out_the_batch_and_part_the_repeats() -> None:
    stream = Stream(n=64, batch=16, blocks=4, seed=0, repeats=4)
    assert sorted(_of(stream, 3)) == list(range(48, 64))
    blocks = [stream.indices(stream.positions(3, block)).tolist() for block in range(4)]
    assert blocks[0] == blocks[1] == blocks[2] == blocks[3]
    assert len(set(blocks[0])) == 4


def test_random_words_depend_only_on_the_position() -> None:
    whole = Stream(100, 12, 1, 7)
    words = whole.words(np.arange(24, 36), SAMPLE)
    for blocks in (2, 3, 12):
        split = Stream(100, 12, blocks, 7)
        for block in range(blocks):
            positions = split.positions(2, block)
            assert (split.words(positions, SAMPLE) == words[positions - 24]).all()
    assert not (whole.words(np.arange(24, 36), COLOUR) == words).any()
    assert not (Stream(100, 12, 1, 8).words(np.arange(24, 36), SAMPLE) == words).any()
    assert len(np.unique(whole.words(np.arange(5000), SAMPLE))) == 20000
    u = data.uniform(whole.words(np.arange(5000), SAMPLE)).numpy()
    assert 0 < u.min() < 0.001 < 0.999 < u.max() < 1
    assert abs(u.mean() - 0.5) < DRAWN
    ends = data.uniform(np.array([0, 2**64 - 1], np.uint64)).tolist()
    assert 0 < ends[0] < ends[1] < 1


@pytest.mark.parametrize(("pad", "flip"), [(4, True), (1, False), (0, True)])
def test_pad_crop_flip(pad: int, flip: bool) -> None:
    x = patches(300, 16).float()
    words = Stream(300, 300, 1, 0).words(np.arange(300), SAMPLE)
    ours = data.crop_and_flip(x, words, pad, flip)
    seen = set()
    for i in range(300):
        top, left, mirror = (int(word) / 2**64 for word in words[i, :3])
        y, z, flipped = int(top * (2 * pad + 1)), int(left * (2 * pad + 1)), flip and mirror < 0.5
        padded = np.zeros((3, 16 + 2 * pad, 16 + 2 * pad), np.float32)
        padded[:, pad : pad + 16, pad : pad + 16] = x[i].numpy()
        crop = padded[:, y : y + 16, z : z + 16]
        np.testing.assert_array_equal(ours[i].numpy(), crop[:, :, ::-1] if flipped else crop)
        seen.add((y, z, flipped))
    assert len(seen) > 0.8 * (2 * pad + 1) ** 2 * (1 + flip)


def _find(crop: np.ndarray, image: np.ndarray) -> tuple[int, int] | None:
    """Return the row and column of `crop` in `image`, or None if it isn't there."""
    side = len(crop)
    span_y, span_x = image.shape[0] - side + 1, image.shape[1] - side + 1
    for y, x in np.argwhere((image[:span_y, :span_x] == crop[0, 0]).all(-1)):
        if (image[y : y + side, x : x + side] == crop).all():
            return int(y), int(x)
    return None


def test_scale_crop_flip() -> None:
    """Every crop equals, pixel by pixel, a part of the photograph resized by Pillow to a side from [256, 480]."""
    transform: Any = data.train_transform(RECIPES["imagenet-2015"])
    scale = transform.transforms[0]
    photos = [Image.fromarray(photo) for photo in photographs()]
    flips, places, sides = 0, [], []
    for word in range(60):
        photo = photos[word % 2]
        with data.seeded(word):
            crop = np.asarray(transform(photo))
        with data.seeded(word):
            side = min(scale.make_params([photo])["size"])
        height, width = side, int(side * 640 / 427)
        resized = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
        assert crop.shape == (224, 224, 3)
        place, mirrored = _find(crop, resized), _find(crop[:, ::-1], resized)
        assert place or mirrored, f"word {word}: no crop of the image at {side}"
        flips += place is None
        y, x = place or mirrored or (0, 0)
        places.append((y / (height - 224), x / (width - 224)))
        sides.append(side)
    assert 15 <= flips <= 45
    assert 256 <= min(sides) < 266
    assert 470 < max(sides) <= 480
    assert (np.min(places, 0) < 0.1).all()
    assert (np.max(places, 0) > 0.9).all()
    with data.seeded(0):
        many = [min(scale.make_params([Image.new("L", (9, 9))])["size"]) for _ in range(3000)]
    assert set(many) == set(range(256, 481))


def test_mean_image_and_pca_colour() -> None:
    x = patches(40, 24)
    moments = Moments.of(x.split(7), 3, 24)
    preprocess = moments.preprocess()
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy() / 255
    slow_mean = sum(image.double().numpy() / 255 for image in x) / 40
    np.testing.assert_allclose(preprocess.mean.numpy(), slow_mean, atol=ROUNDING)
    values, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
    alphas = np.array([0.3, -0.2, 0.1])
    signs = np.sign((preprocess.axes.numpy() * vectors).sum(0))
    shift = sum(
        alpha * value * sign * vectors[:, i]
        for i, (alpha, value, sign) in enumerate(zip(alphas, values, signs, strict=True))
    )
    ours = preprocess(x, torch.tensor(alphas).float().expand(40, 3)).permute(0, 2, 3, 1).numpy()
    for i in (0, 39):
        for h, w in ((0, 0), (23, 5), (11, 12)):
            slow = x[i, :, h, w].numpy() / 255 + shift - slow_mean[:, h, w]
            np.testing.assert_allclose(ours[i, h, w], slow, atol=COLOURS)


def test_mean_image_is_resized_for_other_sizes() -> None:
    preprocess = Moments.of([patches(8, 24)], 3, 24).preprocess()
    x = patches(2, 36)
    mean = F.interpolate(preprocess.mean[None], (36, 36), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(preprocess(x), x.float() / 255 - mean)
    assert preprocess(x).is_contiguous(memory_format=torch.channels_last)


def test_channel_statistics() -> None:
    x = patches(2, 8)
    slow = (x.permute(0, 2, 3, 1).numpy() / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(data.by_channel()(x).permute(0, 2, 3, 1).numpy(), slow, atol=ROUNDING)


def test_small_images_with_all_augmentations() -> None:
    """cifar-2015 subtracts the mean, pads with zeros, crops and mirrors, in this order; labels match their images."""
    recipe = RECIPES["cifar-2015"]
    train = Resident(patches(150, 32), torch.arange(150))
    dataset = Dataset("x", ("a",) * 150, 3, train, train, Moments.of([train.images], 3, 32).preprocess())
    batches = loader(dataset, recipe, seed=5)
    stream = batches.stream
    mean = train.images.double().mean(0).numpy() / 255
    micro = list(batches.training(1, 3))
    assert [len(y) for _, y in micro] == [64] * 4
    for block, (x, y) in enumerate(micro[:2]):
        positions = stream.positions(1, block)
        assert y.tolist() == stream.indices(positions).tolist()
        words = stream.words(positions, SAMPLE)
        for i in range(0, 64, 9):
            top, left, mirror = (int(word) / 2**64 for word in words[i, :3])
            padded = np.zeros((3, 40, 40))
            padded[:, 4:36, 4:36] = train.images[int(y[i])].numpy() / 255 - mean
            crop = padded[:, int(9 * top) :, int(9 * left) :][:, :32, :32]
            np.testing.assert_allclose(x[i].numpy(), crop[:, :, ::-1] if mirror < 0.5 else crop, atol=ROUNDING)


def assert_coloured(batches: Loader) -> None:
    """Assert that the colour shift adds one constant per image and channel, which the image's draws determine."""
    plain = dataclasses.replace(batches, recipe=dataclasses.replace(batches.recipe, colour=0.0))
    for block, ((x, _), (y, _)) in enumerate(zip(batches.training(0, 1), plain.training(0, 1), strict=True)):
        alphas = batches._colour(batches.stream.positions(0, block))
        assert alphas is not None
        shifts = torch.stack([batches.preprocess.axes @ alpha for alpha in alphas])
        assert shifts.abs().max() > 1e-4
        torch.testing.assert_close(x - y, shifts[:, :, None, None].expand_as(x), rtol=0, atol=ROUNDING)


def test_colour_draws_have_deviation_one_tenth() -> None:
    recipe = dataclasses.replace(RECIPES["imagenet-2015"], size=8, val_size=8)
    images = Resident(patches(4, 8), torch.zeros(4, dtype=torch.int64))
    batches = loader(Dataset("x", ("a",), 3, images, images, Moments.of([images.images], 3, 8).preprocess()), recipe)
    assert_coloured(batches)
    draws = batches._colour(np.arange(20_000))
    assert draws is not None
    assert draws.mean(0).abs().max() < COLOUR_MEANS
    assert ((draws.std(0) - 0.1).abs() < COLOUR_DEVIATIONS).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing(kind: str) -> None:
    """The pixels of a mixed batch agree with the shares in its labels."""
    recipe = dataclasses.replace(
        RECIPES["imagenet-modern"], mixup=0.0, cutmix=0.0, size=32, flip=False, repeats=1, batch=8
    )
    recipe = dataclasses.replace(recipe, bn_batch=8, **{kind: 1.0})
    images = Resident(patches(8, 32), torch.arange(8))
    dataset = Dataset("x", tuple("abcdefgh"), 3, images, images, data.by_channel())
    batches = loader(dataset, recipe)
    before = torch.get_rng_state()
    shares = set()
    for x, y in batches.training(0, 6):
        positions = batches.stream.positions(len(shares), 0)
        labels = torch.from_numpy(batches.stream.indices(positions))
        clean = data.by_channel()(images.images[labels])
        share = y[torch.arange(8), labels]
        torch.testing.assert_close(y.sum(1), torch.ones(8))
        assert (share == share[0]).all()
        other = clean.roll(1, 0)
        if kind == "mixup":
            torch.testing.assert_close(x, share[0] * clean + (1 - share[0]) * other)
        else:
            own = (x == clean).all(1)
            assert (own | (x == other).all(1)).all()
            assert (own.float().mean((1, 2)) - share).abs().max() < MIXED_AREA
        assert x.is_contiguous(memory_format=torch.channels_last)
        shares.add(float(share[0]))
    assert len(shares) == 6
    assert torch.equal(before, torch.get_rng_state())


def test_erasing_fills_with_the_mean() -> None:
    erase = data.erasing(dataclasses.replace(RECIPES["imagenet-modern"], erase=1.0))
    assert erase is not None
    image = patches(1, 64)[0]
    erased = erase(image)
    changed = (erased != image).any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    inside = erased[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert inside.shape[1:].numel() >= 0.02 * 64 * 64 * 0.8
    assert (inside == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]).all()
    assert data.erasing(RECIPES["imagenet-2015"]) is None


def test_photographs_from_a_folder(folder: Path, tmp_path: Path) -> None:
    """Batches don't depend on workers, two processes share the micro-batches of one, validation uses centre crops."""
    dataset = data.load("folder", SMALL, folder, cache=tmp_path / "cache")
    assert dataset.classes == ("class0", "class1")
    assert_coloured(loader(dataset, SMALL))
    one = list(loader(dataset, SMALL).training(0, 3))
    assert len(one) == 6
    for x, y in one:
        assert x.shape == (2, 3, 48, 48)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.int64
    again = list(loader(dataset, SMALL, workers=2).training(1, 3))
    for rank in range(2):
        shares = list(loader(dataset, SMALL, rank=rank, world=2).training(1, 3))
        for ours, theirs in zip(shares, one[2 + rank :: 2], strict=True):
            assert torch.equal(ours[0], theirs[0])
    for (x, y), (xx, yy) in zip(one[2:], again, strict=True):
        assert torch.equal(x, xx)
        assert torch.equal(y, yy)
    files = dataset.val.files.samples  # type: ignore[union-attr]
    shown = [loader(dataset, SMALL, rank=rank, world=2).validation() for rank in range(2)]
    assert sorted(y for rank in shown for _, ys in rank for y in ys.tolist()) == sorted(y for _, y in files)
    x, y = (torch.cat(parts) for parts in zip(*loader(dataset, SMALL).validation(), strict=True))
    for i, (path, label) in enumerate(files):
        image = Image.open(path)
        scale = 56 / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (round((side - 48) / 2) for side in image.size)
        slow = torch.from_numpy(np.array(image)[top : top + 48, left : left + 48]).permute(2, 0, 1) / 255
        torch.testing.assert_close(x[i], slow - dataset.preprocess.mean)
        assert y[i] == label


def test_statistics_are_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = data.load("folder", SMALL, folder, cache=cache).preprocess
    files = [path for path, _ in datasets.ImageFolder(str(folder / "train")).samples]
    crops = [np.asarray(data.CentreCrop(56, 48)(Image.open(path))) / 255 for path in files]
    np.testing.assert_allclose(first.mean.permute(1, 2, 0).numpy(), np.mean(crops, 0), atol=ROUNDING)
    kept = next(cache.iterdir())

    def refuse(*args: object) -> Moments:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(Moments, "of", refuse)
        again = data.load("folder", SMALL, folder, cache=cache).preprocess
        assert torch.equal(first.mean, again.mean)
        assert torch.equal(first.axes, again.axes)
        with pytest.raises(AssertionError, match="computed again"):
            data.load("folder", dataclasses.replace(SMALL, resize=60), folder, cache=cache)
        # The cached mean image came from another version of the reading rules.
        patch.setattr(data, "READING", data.READING + 1)
        with pytest.raises(AssertionError, match="computed again"):
            data.load("folder", SMALL, folder, cache=cache)
    content = bytearray(kept.read_bytes())
    for damage in (content[: len(content) // 2], content[:2000] + b"x" + content[2001:], b""):
        kept.write_bytes(bytes(damage))
        with pytest.warns(UserWarning, match=r"statistics.*damaged"):
            mended = data.load("folder", SMALL, folder, cache=cache).preprocess
        assert torch.equal(first.mean, mended.mean)
    (folder / "train" / "class0" / "more.png").write_bytes(Path(files[0]).read_bytes())
    assert not torch.equal(first.mean, data.load("folder", SMALL, folder, cache=cache).preprocess.mean)


def test_a_checksum_guards_the_numbers(tmp_path: Path) -> None:
    place = tmp_path / "statistics.npz"
    data.keep_moments(place, Moments.of([patches(3, 8)], 3, 8))
    with np.load(place) as kept:
        arrays = dict(kept)
    arrays["image"] = arrays["image"] + 1
    np.savez(place, **arrays)
    with pytest.warns(UserWarning, match="checksum is wrong"):
        assert data.read_moments(place) is None
    assert data.read_moments(tmp_path / "none.npz") is None
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="can't be cached"):
        data.keep_moments(tmp_path / "file" / "statistics.npz", Moments.of([patches(3, 8)], 3, 8))


def test_modern_augmentations_in_workers(folder: Path) -> None:
    recipe = dataclasses.replace(RECIPES["imagenet-modern"], size=32, batch=8, bn_batch=4, erase=1.0)
    dataset = data.load("folder", recipe, folder)
    (x, y), *others = loader(dataset, recipe, workers=1).training(0, 2)
    assert x.shape == (4, 3, 32, 32)
    assert y.shape == (4, 2)
    assert len(others) == 3
    assert torch.equal(next(loader(dataset, recipe).training(0, 1))[0], x)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_picture_is_named(folder: Path, tmp_path: Path, workers: int) -> None:
    bad = folder / "train" / "class1" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    recipe = dataclasses.replace(SMALL, normalise="channel")
    with pytest.raises(ReadError, match=rf"^{bad} is not a readable image .* fetch it again"):
        list(loader(data.load("folder", recipe, folder), recipe, workers=workers).training(0, 3))
    with pytest.raises(ReadError, match=str(bad)):
        data.load("folder", SMALL, folder, cache=tmp_path / "cache")


def test_missing_or_unfit_images(folder: Path, tmp_path: Path) -> None:
    cifar, imagenet, digits = (RECIPES[name] for name in ("cifar-2015", "imagenet-2015", "digits"))
    nowhere = tmp_path / "nowhere"
    cases: list[tuple[str, Recipe, Path | None, int, str]] = [
        ("mnist", digits, None, 0, "unknown data 'mnist'; accepted: digits, cifar10"),
        ("imagenet", imagenet, None, 0, "needs --root. ImageNet .* image-net.org"),
        ("imagenet", imagenet, nowhere, 0, f"{nowhere}/train: .* image-net.org"),
        ("imagenet", imagenet, folder, 0, "2 classes, but ImageNet has 1000"),
        ("folder", imagenet, nowhere, 0, f"{nowhere}/train: .* One folder of images per class"),
        ("folder", cifar, folder, 0, "has photographs, but this recipe requires small images, 32x32"),
        ("cifar10", cifar, None, 0, "needs --root"),
        ("cifar10", cifar, nowhere, 0, f"{nowhere}/cifar-10-batches-py is missing, .* use --download, or unpack"),
        ("cifar100", cifar, nowhere, 0, f"{nowhere}/cifar-100-python is missing"),
        ("digits", imagenet, None, 0, "digits has small images"),
        ("digits", cifar, None, 0, "images of 8x8, but this recipe requires 32x32"),
        ("digits", digits, None, 5000, "--holdout must be from 1 to 1437, as there are 1438 training images: got 5000"),
        ("digits", digits, folder, 0, "--data digits does not use --root"),
        ("synthetic", cifar, folder, 0, "--data synthetic does not use --root"),
    ]
    for name, recipe, root, holdout, message in cases:
        with pytest.raises(DataError, match=message):
            data.load(name, recipe, root, holdout=holdout, download=False)
    (folder / "val" / "class1").rename(folder / "val" / "class2")
    with pytest.raises(DataError, match="must have the same classes, but only one has class1, class2"):
        data.load("folder", imagenet, folder)


def test_download_is_suggested_only_where_it_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages suggest --download only to commands that have this option; `eval` (download=None) hasn't."""

    def refuse(self: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
    recipe = RECIPES["cifar-2015"]
    for root, said in ((None, "needs --root"), (tmp_path, "unpack https")):
        for download in (None, False, True):
            with pytest.raises(DataError, match=said) as refusal:
                data.load("cifar10", recipe, root, download=download)
            advised = "--download" in str(refusal.value)
            assert advised == (download is not None if root is None else download is False)
    for name in ("digits", "synthetic", "folder"):
        with pytest.raises(DataError, match=f"--download fetches cifar10 and cifar100, not {name}"):
            data.load(name, recipe, download=True)


def _cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write files like CIFAR-10's, with 4 patches of photographs each, and make torchvision accept their checksums."""
    place = root / "cifar-10-batches-py"
    place.mkdir()
    pixels = patches(24, 32).numpy().reshape(6, 4, -1)
    sums = []
    names = [name for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]
    for i, name in enumerate(names):
        content = pickle.dumps({"data": pixels[i], "labels": [i, 1, 2, 3]})
        (place / name).write_bytes(content)
        sums.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (place / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return pixels


def test_cifar_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = _cifar(tmp_path, monkeypatch)
    dataset = data.load("cifar10", RECIPES["cifar-2015"], tmp_path)
    assert isinstance(dataset.train, Resident)
    assert isinstance(dataset.val, Resident)
    assert (dataset.train.images.flatten(1).numpy() == pixels[:5].reshape(20, -1)).all()
    assert dataset.train.labels.tolist() == [label for i in range(5) for label in (i, 1, 2, 3)]
    assert (len(dataset.val), dataset.classes) == (4, tuple("abcdefghij"))
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match="missing, incomplete or corrupt"):
        data.load("cifar10", RECIPES["cifar-2015"], tmp_path)


def test_digits_and_their_holdout() -> None:
    whole, split = (data.load("digits", RECIPES["digits"], holdout=h) for h in (0, 200))
    assert isinstance(whole.train, Resident)
    assert isinstance(split.train, Resident)
    assert isinstance(split.val, Resident)
    assert (len(whole.train), len(whole.val), whole.channels) == (1438, 359, 1)
    assert (len(split.train), len(split.val)) == (1238, 200)
    assert int(whole.train.images.max()) == 255
    together = torch.cat([split.train.images, split.val.images]).flatten(1).tolist()
    assert sorted(together) == sorted(whole.train.images.flatten(1).tolist())
    again = data.load("digits", RECIPES["digits"], holdout=200)
    assert torch.equal(again.val.images, split.val.images)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", RECIPES)
def test_synthetic_images_suit_every_recipe(name: str) -> None:
    recipe = dataclasses.replace(RECIPES[name], batch=4, bn_batch=None)
    if recipe.size > 32:
        recipe = dataclasses.replace(recipe, size=40, val_size=48)
    dataset = data.load("synthetic", recipe)
    batches = loader(dataset, recipe)
    x, y = next(batches.training(0, 1))
    assert x.shape == (4, 3, recipe.size, recipe.size)
    assert len(y) == 4
    assert next(batches.validation())[0].shape[2:] == (recipe.val_size, recipe.val_size)
