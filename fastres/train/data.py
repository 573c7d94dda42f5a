"""Data sets for training: load the images, order and augment them, and copy them to the device.

All randomness is a function of (seed, position). The n-th image of a training takes its crop and flip from the four
words that a Philox generator returns at counter n, and its colour from those of another generator. So the number of
workers or processes, or a restart, doesn't change what a net is trained on, and a checkpoint only needs to store the
position.

There are two kinds of images. `Resident` images are small and all of one size; they stay on the device and are cropped
there. `Folder` images are photographs that workers decode and crop; they are copied to the device as uint8, and are
normalised and coloured there.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from fastres.classes import IMAGENET, are_imagenet_ids
from fastres.crop import centre, resized, resized_crop
from fastres.images import READING, ClassFolders, ImageError, read_image
from fastres.paths import cache_folder
from fastres.terminal import shows_bars
from fastres.train.checkpoint import write_atomically
from fastres.train.recipe import DATA, IMAGENET_MEAN, IMAGENET_STD, AreaCrop, PadCrop, Recipe, ScaleCrop

SYNTHETIC_IMAGES = 1024
PR_SET_PDEATHSIG = 1
ORDER, SAMPLE, COLOUR, MIX = range(4)  # purposes of random numbers; each has its own Philox key


class DataError(ValueError):
    """Images are missing or don't fit the recipe. The message names what is wrong and what is accepted."""


class ReadError(OSError):
    """A photograph can't be read while iterating over a data set. The message names the file and the remedy."""


class WorkerError(ChildProcessError):
    """A worker process that reads images has died, or couldn't be started or run."""


@contextmanager
def hearing_workers() -> Iterator[None]:
    """Raise WorkerError for a DataLoader worker that died inside the context.

    torch reports it as a RuntimeError from a signal handler, so it can come from any line of the main process. Other
    RuntimeErrors pass through unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error).strip(" .")
        if not message.startswith("DataLoader worker (pid"):
            raise
        raise _died(message) from error


def _died(message: str) -> WorkerError:
    return WorkerError(f"a process that reads images has died ({message}); fewer --workers use less memory")


@contextmanager
def seeded(word: int) -> Iterator[None]:
    """Seed torch's CPU generator, which torchvision's transforms use, with `word`; restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(word)
        yield


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, ORDER], counter=[0, epoch, 0, 0])).permutation(n)


@dataclass(frozen=True)
class Stream:
    """The endless sequence of training images, by position.

    Each epoch of n positions has a new permutation of the n images. With repeats > 1, only the first n / repeats images
    of the permutation are used, each `repeats` times in a row.

    Iteration i has the positions [i batch, (i + 1) batch). They are dealt out in turn to `blocks` micro-batches, so
    that the repeats of an image are normalised with different BN statistics. Each block belongs to one process; a
    process may have several, which it runs one after another.
    """

    n: int
    batch: int
    blocks: int
    seed: int
    repeats: int = 1

    def positions(self, iteration: int, block: int) -> np.ndarray:
        """Return the positions of one micro-batch, int64 [batch / blocks]."""
        return iteration * self.batch + np.arange(block, self.batch, self.blocks)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the image at each position."""
        epochs, places = positions // self.n, positions % self.n // self.repeats
        found = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = _permutation(self.n, self.seed, int(epoch))[places[here]]
        return found

    def words(self, positions: np.ndarray, purpose: int) -> np.ndarray:
        """Return four random words for each position, uint64 [len(positions), 4].

        purpose: ORDER, SAMPLE, COLOUR or MIX. The words of all positions from the first to the last are generated, so
        the positions should be close together.
        """
        first, last = int(positions.min()), int(positions.max())
        philox = np.random.Philox(key=[self.seed, purpose], counter=first)
        return philox.random_raw(4 * (last - first + 1)).reshape(-1, 4)[positions - first]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a GPU through pinned memory without waiting for the copy; for a CPU, return it unchanged."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def uniform(words: np.ndarray) -> Tensor:
    """Convert random words, uint64, to uniform numbers above 0 and below 1, float64 of the same shape.

    52 bits of a word and the half fill the 53 bits of a float64, so that nothing is rounded, to 1 for example.
    """
    return torch.from_numpy(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


class Preprocess(nn.Module):
    """Normalise images on the device, in training and validation, and optionally shift their colour (in training).

    All buffers are float32, for pixels in [0, 1]:

    mean: [C, H, W], the mean image, which is resized for images of another size; or [C, 1, 1].
    std: [C, 1, 1].
    axes: [C, C]. Column k is the k-th eigenvector of the covariance of the training set's pixels, times its eigenvalue
    (Krizhevsky et al. 2012, section 4.1).
    """

    mean: Tensor
    std: Tensor
    axes: Tensor

    def __init__(self, mean: Tensor, std: Tensor, axes: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std), ("axes", axes)):
            self.register_buffer(name, value.float())

    def forward(self, x: Tensor, colour: Tensor | None = None) -> Tensor:
        """Return (x / 255 + colour @ axes.T - mean) / std, float32 [N, C, H, W] in channels_last format.

        x: uint8 [N, C, H, W]. colour: [N, C], one random coefficient per image and principal component; None for no
        colour shift.
        """
        mean = self.mean
        if mean.shape[1] > 1 and mean.shape[1:] != x.shape[2:]:
            mean = F.interpolate(mean[None], x.shape[2:], mode="bilinear", antialias=True)[0]
        y = x.to(torch.float32, memory_format=torch.channels_last) / 255
        if colour is not None:
            y = y + (colour @ self.axes.T)[:, :, None, None]
        return (y - mean) / self.std


@dataclass(frozen=True)
class Moments:
    """Sums over images with pixels in [0, 1], in float64, from which the mean image and the PCA of colours follow.

    count: the number of images. image: the sum of the images, [C, H, W]. products: the sum over all pixels of the outer
    product of a pixel's channels with itself, [C, C].
    """

    count: int
    image: Tensor
    products: Tensor

    @classmethod
    def of(cls, images: Iterable[Tensor], channels: int, size: int) -> Moments:
        """Return the sums over `images`, which are uint8 batches [N, C, size, size]."""
        count, image = 0, torch.zeros(channels, size, size, dtype=torch.float64)
        products = torch.zeros(channels, channels, dtype=torch.float64)
        for batch in images:
            x = batch.double() / 255
            pixels = x.transpose(0, 1).reshape(channels, -1)
            count += len(x)
            image += x.sum(0).cpu()
            products += (pixels @ pixels.T).cpu()
        return cls(count, image, products)

    def preprocess(self) -> Preprocess:
        """Return a `Preprocess` that subtracts the mean image, with std 1 and the axes of the PCA colour shift.

        The signs of the eigenvectors are arbitrary, which doesn't matter: the colour shift is symmetric.
        """
        channels, pixels = len(self.products), self.count * self.image[0].numel()
        mean = self.image.sum((1, 2)) / pixels
        values, vectors = torch.linalg.eigh(self.products / pixels - torch.outer(mean, mean))
        return Preprocess(self.image / self.count, torch.ones(channels, 1, 1), vectors * values)


@dataclass(frozen=True)
class Resident:
    """All images of a data set in one tensor, uint8 [N, C, size, size], and their labels, int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Resident:
        images = self.images.to(device, memory_format=torch.channels_last)
        return Resident(images, self.labels.to(device))


class Folder:
    """Photographs of an ImageFolder, read by `fastres.images`.

    `dataset[(index, word)]` is (the transformed image, uint8 [H, W, C]; its label). word: the seed of the transform. If
    the file can't be read, the ReadError is returned and not raised, so that it gets from a worker to the main process.
    """

    def __init__(self, files: datasets.ImageFolder, transform: v2.Transform, erase: v2.Transform | None = None) -> None:
        self.files = files
        self.transform = transform
        self.erase = erase

    def __len__(self) -> int:
        return len(self.files.samples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | ReadError:
        index, word = item
        path, label = self.files.samples[index]
        try:
            image = read_image(path)
        except ImageError as error:
            return ReadError(str(error))
        with seeded(word):
            pixels = torch.from_numpy(np.array(self.transform(image)))
            if self.erase is not None:
                pixels = self.erase(pixels.permute(2, 0, 1)).permute(1, 2, 0)
        return pixels, label


def collate(items: Sequence[tuple[Tensor, int] | ReadError]) -> tuple[Tensor, Tensor] | ReadError:
    """Return (images, uint8 [N, C, H, W] in channels_last strides; labels, int64 [N]).

    If an item is a ReadError, return the first one instead, for the main process to raise.
    """
    pairs = []
    for item in items:
        if isinstance(item, ReadError):
            return item
        pairs.append(item)
    return torch.stack([pixels for pixels, _ in pairs]).permute(0, 3, 1, 2), torch.tensor([y for _, y in pairs])


class ScaledCrop(v2.Transform):
    """Resize the shorter side to a random whole number in [low, high], then crop [size, size] at a random place.

    Scale augmentation as in the paper, section 3.4. Not torchvision's own transforms, whose random sizes may be off by
    one.
    """

    def __init__(self, low: int, high: int, size: int) -> None:
        super().__init__()
        self.low, self.high, self.size = low, high, size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        side = int(torch.randint(self.low, self.high + 1, ()))
        whole = resized(v2.functional.get_size(flat_inputs[0]), side)
        top, left = (int(torch.randint(0, n - self.size + 1, ())) if n > self.size else 0 for n in whole)
        return {"size": whole, "box": (top, left, self.size, self.size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resized_crop(inpt, **params)


class CentreCrop(v2.Transform):
    """Resize the shorter side to `resize`, then crop [size, size] from the centre."""

    def __init__(self, resize: int, size: int) -> None:
        super().__init__()
        self.resize, self.size = resize, size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        whole = resized(v2.functional.get_size(flat_inputs[0]), self.resize)
        return {"size": whole, "box": centre(whole, self.size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return resized_crop(inpt, **params)


def train_transform(recipe: Recipe) -> v2.Transform:
    """Return the transform that crops and augments a PIL image as the recipe does, except for random erasing."""
    steps: list[v2.Transform] = []
    if isinstance(recipe.crop, ScaleCrop):
        steps.append(ScaledCrop(recipe.crop.low, recipe.crop.high, recipe.size))
    elif isinstance(recipe.crop, AreaCrop):
        steps.append(v2.RandomResizedCrop(recipe.size, antialias=True))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.trivial_augment:
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    return v2.Compose(steps)


def erasing(recipe: Recipe) -> v2.Transform | None:
    """Return the random erasing of the recipe, or None. It fills with ImageNet's mean colour, rounded to uint8."""
    grey = [float(round(255 * mean)) for mean in IMAGENET_MEAN]
    return v2.RandomErasing(recipe.erase, value=grey) if recipe.erase else None


def crop_and_flip(x: Tensor, words: np.ndarray, pad: int, flip: bool) -> Tensor:
    """Pad each image with zeros, crop it to its old size at a random place, and mirror it with probability 1/2.

    x: [N, C, H, W] of any dtype. words: uint64 [N, 3 or more]; the first three decide top, left and mirroring. pad: the
    zeros on each side. flip: whether to mirror at all. Returns [N, C, H, W] in channels_last strides.
    """
    n, _, height, width = x.shape
    top, left, mirror = (uniform(words[:, k]) for k in range(3))
    rows = (top * (2 * pad + 1)).long()[:, None] + torch.arange(height)
    columns = (left * (2 * pad + 1)).long()[:, None] + torch.arange(width)
    if flip:
        columns = torch.where(mirror[:, None] < 0.5, columns.flip(1), columns)
    rows, columns = send(rows, x.device), send(columns, x.device)
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def mixing(recipe: Recipe, classes: int) -> v2.Transform | None:
    """Return the recipe's MixUp or CutMix of a micro-batch, or None.

    If the recipe has both, one is chosen for each micro-batch, with equal probability.
    """
    choices: list[v2.Transform] = []
    if recipe.mixup:
        choices.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        choices.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    return v2.RandomChoice(choices) if choices else None


@dataclass(frozen=True)
class Dataset:
    """Training and validation images with their class names and normalisation.

    channels: the number of image channels. preprocess: on the CPU; `Loader` moves it to the device.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    train: Resident | Folder
    val: Resident | Folder
    preprocess: Preprocess


Batches = Iterable[list[tuple[int, int]]]  # lists of (index, word)
Pairs = Generator[tuple[Tensor, Tensor], None, None]  # (images, labels); the consumer must close it to end the workers
Decoder = Callable[[Folder, Batches, int, torch.device], Pairs]  # a function like `decoded`


@dataclass
class Loader:
    """Iterate over training and validation batches on the device.

    A batch is (x, float32 [n, C, H, W] in channels_last format; y, int64 [n], or in training with MixUp or CutMix
    probabilities [n, classes]).

    stream: the order of the training images. workers: processes that decode photographs. rank, world: this process's
    rank and the number of processes, which share the validation images. decode: the function that decodes photographs;
    None for `decoded`, which uses Pillow.
    """

    dataset: Dataset
    recipe: Recipe
    stream: Stream
    device: torch.device
    workers: int = 0
    rank: int = 0
    world: int = 1
    decode: Decoder | None = None
    preprocess: Preprocess = field(init=False)

    def __post_init__(self) -> None:
        self.preprocess = self.dataset.preprocess.to(self.device)
        self.mixing = mixing(self.recipe, len(self.dataset.classes))
        both = (self.dataset.train, self.dataset.val)
        self.train, self.val = (part.to(self.device) if isinstance(part, Resident) else part for part in both)

    def training(self, start: int, stop: int) -> Pairs:
        """Yield this process's micro-batches of iterations [start, stop), in order."""
        if isinstance(self.train, Resident):
            yield from (self._resident(self.train, positions) for positions in self._schedule(start, stop))
            return
        items = (
            list(zip(self.stream.indices(p).tolist(), self.stream.words(p, SAMPLE)[:, 0].tolist(), strict=True))
            for p in self._schedule(start, stop)
        )
        with closing((self.decode or decoded)(self.train, items, self.workers, self.device)) as batches:
            for positions, (x, y) in zip(self._schedule(start, stop), batches, strict=True):
                yield self._mixed(self.preprocess(x, self._colour(positions)), y, positions)

    def validation(self) -> Pairs:
        """Yield this process's share of the validation images, each image once."""
        batch = max(1, min(self.recipe.batch, 256))
        indices = range(self.rank, len(self.val), self.world)
        chunks = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        if isinstance(self.val, Resident):
            for chunk in chunks:
                index = torch.tensor(chunk, device=self.device)
                yield self.preprocess(self.val.images[index]), self.val.labels[index]
            return
        items = ([(index, 0) for index in chunk] for chunk in chunks)
        with closing((self.decode or decoded)(self.val, items, self.workers, self.device)) as batches:
            for x, y in batches:
                yield self.preprocess(x), y

    def _schedule(self, start: int, stop: int) -> Iterator[np.ndarray]:
        for iteration in range(start, stop):
            for block in range(self.rank, self.stream.blocks, self.world):
                yield self.stream.positions(iteration, block)

    def _resident(self, images: Resident, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        index = send(torch.from_numpy(self.stream.indices(positions)), self.device)
        x = self.preprocess(images.images[index], self._colour(positions))
        pad = self.recipe.crop.pad if isinstance(self.recipe.crop, PadCrop) else 0
        x = crop_and_flip(x, self.stream.words(positions, SAMPLE), pad, self.recipe.flip)
        return self._mixed(x, images.labels[index], positions)

    def _colour(self, positions: np.ndarray) -> Tensor | None:
        if not self.recipe.colour or self.dataset.channels != 3:
            return None
        normal = torch.special.ndtri(uniform(self.stream.words(positions, COLOUR)[:, :3]))
        return send((self.recipe.colour * normal).float(), self.device)

    def _mixed(self, x: Tensor, y: Tensor, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        if self.mixing is None:
            return x, y
        with seeded(int(self.stream.words(positions[:1], MIX)[0, 0])):
            x, y = self.mixing(x, y)
        return x.contiguous(memory_format=torch.channels_last), y


def _serve(worker: int) -> None:
    """Initialise a worker process: ignore Ctrl-C and SIGTERM, and die when the main process dies.

    The signals are sent to the whole process group, but the main process has to save a checkpoint first; it ends its
    workers afterwards.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's worker loop checks every five seconds if its parent is alive
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if (parent := multiprocessing.parent_process()) is not None and not parent.is_alive():
        os._exit(1)


def decoded(folder: Folder, batches: Batches, workers: int, device: torch.device) -> Pairs:
    """Yield the images and labels of each batch, on the device: uint8 [N, 3, H, W] in channels_last strides, int64 [N].

    batches: lists of (index, word), as `Folder` takes them. On a GPU, each batch is copied while the one before
    is used.
    """
    pinned = device.type == "cuda"
    pairs = fetched(folder, batches, workers, collate, pinned=pinned)
    return _ahead(pairs, device) if pinned else pairs


def fetched(
    dataset: Any,
    batches: Iterable[list[Any]],
    workers: int,
    collate: Callable[[Sequence[Any]], Any],
    *,
    pinned: bool = False,
) -> Generator[Any, None, None]:
    """Yield `collate([dataset[key] for key in batch])` for each batch of keys, in order, computed by worker processes.

    workers: the number of processes; 0 computes in this one. pinned: return tensors in pinned memory.

    Close the generator to end the workers: after an exception, its traceback could keep them alive for long. Raises a
    ReadError that `collate` returned, and WorkerError if workers can't be started, lack shared memory, or die while
    they send a batch. If a worker dies at another time, torch raises a RuntimeError that can come from any line; see
    `hearing_workers`.
    """
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_Shared(collate) if workers else collate,
        pin_memory=pinned,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_serve,
        generator=torch.Generator(),  # leaves the global generator to the model
    )
    if workers:
        gc.collect()  # frees old DALI pipelines: a forked worker must not free them, as it lacks their threads
    before = multiprocessing.active_children()
    try:
        coming = iter(loader)
    except OSError as error:
        _kill(set(multiprocessing.active_children()) - set(before))
        message = f"{workers} processes that read images can't be started ({error.strerror}): use fewer --workers"
        raise WorkerError(message) from error
    with _alive(coming) if workers else nullcontext():
        for batch in coming:
            if isinstance(batch, (ReadError, WorkerError)):
                raise batch
            yield batch


@dataclass(frozen=True)
class _Shared:
    """Call `collate` and move the resulting tensors to shared memory; return a WorkerError if there isn't enough.

    The queue of a worker would move them, too, but in a thread whose errors are lost: the main process would wait
    forever for the batch.
    """

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, items: Sequence[Any]) -> Any:
        batch = self.collate(items)
        try:
            _share(batch)
        except RuntimeError as error:
            return WorkerError(
                f"a process that reads images lacks shared memory ({str(error).splitlines()[0]}): enlarge /dev/shm, or "
                "use --workers 0, which needs none"
            )
        return batch


def _share(value: Any) -> None:
    if isinstance(value, Tensor):
        value.share_memory_()
    elif isinstance(value, (tuple, list)):
        for part in value:
            _share(part)


@contextmanager
def _alive(coming: Any) -> Iterator[None]:
    """End the workers of a DataLoader's iterator on exit from the context, or when the process exits.

    Raises WorkerError if the connection to a worker breaks because it dies while it sends a batch.
    """
    end = partial(_end, coming)
    atexit.register(end)  # runs before multiprocessing's own handler, which would wait forever for the workers
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        # A dying worker closes its sockets first, so torch may still have found it alive.
        workers = {worker.sentinel: worker for worker in coming._workers}
        dying = wait(list(workers), timeout=1)
        if not dying:
            raise
        # torch's SIGCHLD handler raises at any line: better here than in the shutdown, where a lock could stay locked.
        for sentinel in dying:
            workers[sentinel].join()
        raise _died("while it sent a batch") from error
    finally:
        atexit.unregister(end)
        end()


def _end(coming: Any) -> None:
    """Shut the workers down as torch does, then kill those that are still alive."""
    try:
        coming._shutdown_workers()
    finally:
        _kill(coming._workers)


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()


def _ahead(batches: Pairs, device: torch.device) -> Pairs:
    """Yield the batches on the device; copy batch k + 1 on a side stream while batch k is used.

    batches: in pinned memory.
    """
    copies = torch.cuda.Stream(device)

    def start() -> tuple[Tensor, Tensor] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copies):
            return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)

    with closing(batches):
        coming = start()
        while coming is not None:
            current = torch.cuda.current_stream(device)
            current.wait_stream(copies)
            for tensor in coming:
                tensor.record_stream(current)
            ready, coming = coming, start()
            yield ready


def load(
    name: str,
    recipe: Recipe,
    root: Path | None = None,
    *,
    holdout: int = 0,
    download: bool | None = None,
    cache: Path | None = None,
    workers: int = 0,
    device: torch.device | None = None,
) -> Dataset:
    """Load the data set `name`, a key of `DATA`, with the crops and normalisation of `recipe`.

    root: the folder of the data set. holdout: validate on that many of the training images, always the same ones,
    instead of the test or validation images (the paper's 45k/5k split of CIFAR-10 is 5000). download: whether to fetch
    CIFAR to `root`; None if the caller has no such option, so that error messages don't offer it. cache: the folder for
    mean images of photographs, None for `paths.cache_folder()`. workers, device: processes and device that compute a
    mean image. Collective under torch.distributed.

    Raises DataError if the images are missing, corrupt or don't fit the recipe, and for a `root` or `download` that the
    data set has no use for.
    """
    if name not in DATA:
        raise DataError(f"unknown data {name!r}; accepted: {', '.join(DATA)}")
    if root is not None and name in ("digits", "synthetic"):
        raise DataError(f"--data {name} does not use --root: leave it out")
    if download and name not in ("cifar10", "cifar100"):
        raise DataError(f"--download fetches cifar10 and cifar100, not {name}: leave it out")
    if name in ("imagenet", "folder"):
        return _photographs(name, recipe, root, holdout, cache or cache_folder(), workers, device)
    if name == "synthetic":
        classes, train, val = _synthetic(recipe)
    elif name == "digits":
        classes, train, val = _digits()
    else:
        classes, train, val = _cifar(name, root, download)
    if name != "synthetic" and not isinstance(recipe.crop, PadCrop):
        raise DataError(f"{name} has small images of one size, but this recipe crops photographs")
    if train.images.shape[2] != recipe.size:
        sides = f"{train.images.shape[2]}x{train.images.shape[3]}"
        raise DataError(f"{name} has images of {sides}, but this recipe requires {recipe.size}x{recipe.size}")
    if holdout:
        kept, held = _split(len(train), holdout)
        val = Resident(train.images[held], train.labels[held])
        train = Resident(train.images[kept], train.labels[kept])
    channels = train.images.shape[1]
    if recipe.normalise == "pixel":
        chunks = train.images.split(1024)
        preprocess = Moments.of(chunks, channels, recipe.size).preprocess()
    else:
        preprocess = by_channel()
    return Dataset(name, classes, channels, train, val, preprocess)


def _split(n: int, holdout: int) -> tuple[Tensor, Tensor]:
    """Return the sorted indices of the n - holdout images to train on and of those to validate on."""
    if not 0 < holdout < n:
        raise DataError(f"--holdout must be from 1 to {n - 1}, as there are {n} training images: got {holdout}")
    order = torch.from_numpy(_permutation(n, 0, 0))
    return order[holdout:].sort().values, order[:holdout].sort().values


def by_channel() -> Preprocess:
    """Return a `Preprocess` with ImageNet's mean and std per channel, as torchvision's weights expect."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Preprocess(mean, std, torch.zeros(3, 3))


def _digits() -> tuple[tuple[str, ...], Resident, Resident]:
    """Return scikit-learn's digits, uint8 [N, 1, 8, 8]: class names, training and validation images.

    Every fifth image is a validation image. Raises DataError if scikit-learn isn't installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data digits is part of scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target).long()
    held = torch.arange(len(labels)) % 5 == 4
    return tuple("0123456789"), Resident(images[~held], labels[~held]), Resident(images[held], labels[held])


def _cifar(name: str, root: Path | None, download: bool | None) -> tuple[tuple[str, ...], Resident, Resident]:
    """Return CIFAR-10 or CIFAR-100, uint8 [N, 3, 32, 32]: class names, training and test images."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if root is None:
        holds = "contains" if download is None else "contains (or, with --download, gets)"
        raise DataError(f"data {name} needs --root, the folder that {holds} {kind.base_folder}")
    parts = []
    for train in (True, False):
        try:
            part = kind(str(root), train=train, download=bool(download))
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            place = root / kind.base_folder
            fetch = "use --download, or " if download is False else ""
            how = f"{fetch}unpack {kind.url} in {root}"
            raise DataError(f"{place} is missing, incomplete or corrupt ({error}); {how}") from error
        parts.append(Resident(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)))
    return tuple(part.classes), parts[0], parts[1]


def _synthetic(recipe: Recipe) -> tuple[tuple[str, ...], Resident, Resident]:
    """Return random images: class names, training and validation images.

    The images are smooth, of the recipe's sizes, with random labels of 10 classes (1000 if the size is above 32).
    """
    classes = tuple(str(i) for i in range(10 if recipe.size <= 32 else 1000))
    generator = torch.Generator().manual_seed(0)

    def images(count: int, size: int) -> Resident:
        coarse = torch.rand(count, 3, 8, 8, generator=generator)
        pixels = (255 * F.interpolate(coarse, (size, size), mode="bilinear")).to(torch.uint8)
        return Resident(pixels, torch.randint(len(classes), (count,), generator=generator))

    return classes, images(SYNTHETIC_IMAGES, recipe.size), images(SYNTHETIC_IMAGES // 4, recipe.val_size)


HOW_TO_GET = {
    "imagenet": "ImageNet (ILSVRC 2012) is available from image-net.org after registration; unpack its archives to "
    "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
    "folder": "One folder of images per class is expected: train/<class>/* and val/<class>/*",
}


def _photographs(
    name: str, recipe: Recipe, root: Path | None, holdout: int, cache: Path, workers: int, device: torch.device | None
) -> Dataset:
    """Return the data set "imagenet" or "folder"; see `load`."""
    if root is None:
        raise DataError(f"data {name} needs --root. {HOW_TO_GET[name]}")
    if isinstance(recipe.crop, PadCrop):
        raise DataError(
            f"data {name} has photographs, but this recipe requires small images, {recipe.size}x{recipe.size}"
        )
    trained, held = (_image_folder(name, root / part) for part in ("train", "val"))
    if trained.classes != held.classes:
        differing = sorted(set(trained.classes) ^ set(held.classes))[:5]
        raise DataError(f"{root}: train and val must have the same classes, but only one has {', '.join(differing)}")
    if name == "imagenet" and len(trained.classes) != 1000:
        raise DataError(
            f"{root / 'train'} has {len(trained.classes)} classes, but ImageNet has 1000. {HOW_TO_GET[name]}"
        )
    if name == "imagenet" and not are_imagenet_ids(trained.classes):
        raise DataError(
            f"{root / 'train'} has 1000 classes ({', '.join(trained.classes[:3])}, ...), but their folders are not "
            f"named by ImageNet's WordNet ids; --data folder accepts any names. {HOW_TO_GET[name]}"
        )
    if holdout:
        kept, apart = _split(len(trained.samples), holdout)
        held.samples = [trained.samples[i] for i in apart.tolist()]
        trained.samples = [trained.samples[i] for i in kept.tolist()]
    classes = IMAGENET if name == "imagenet" else tuple(trained.classes)
    train = Folder(trained, train_transform(recipe), erasing(recipe))
    val = Folder(held, CentreCrop(recipe.resize, recipe.val_size))
    if recipe.normalise == "pixel":
        preprocess = _moments(trained, recipe, cache, workers, device or torch.device("cpu")).preprocess()
    else:
        preprocess = by_channel()
    return Dataset(name, classes, 3, train, val, preprocess)


def _image_folder(name: str, place: Path) -> datasets.ImageFolder:
    try:
        return ClassFolders(str(place))
    except OSError as error:
        raise DataError(f"{place}: {error}. {HOW_TO_GET[name]}") from error


def _moments(files: datasets.ImageFolder, recipe: Recipe, cache: Path, workers: int, device: torch.device) -> Moments:
    """Return the sums over the centre crops of the training images, from the cache if it has them.

    The cache's key consists of the file names, their labels, the version of the reading rules and the crop; so a file
    replaced under its old name goes unnoticed. Under torch.distributed, each process reads its share of the images.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = cache / f"statistics-{_fingerprint(files, recipe)}.npz"
    known = [read_moments(place) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    folder = Folder(files, CentreCrop(recipe.resize, recipe.size))
    mine = range(rank, len(folder), world)
    batches = [[(i, 0) for i in mine[k : k + 64]] for k in range(0, len(mine), 64)]
    with closing(decoded(folder, batches, workers, device)) as pairs:
        images = (x for x, _ in pairs)
        shown = tqdm(images, "mean image", len(batches), unit="batch", disable=rank > 0 or not shows_bars())
        moments = Moments.of(shown, 3, recipe.size)
    if world > 1:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, moments)
        moments = Moments(*(sum(getattr(m, name) for m in shares) for name in ("count", "image", "products")))
    if rank == 0:
        keep_moments(place, moments)
    return moments


def _fingerprint(files: datasets.ImageFolder, recipe: Recipe) -> str:
    digest = hashlib.sha256(f"{READING} {recipe.resize} {recipe.size}\n".encode())
    for path, label in files.samples:
        digest.update(f"{os.path.relpath(path, files.root)} {label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _checksum(count: np.ndarray, image: np.ndarray, products: np.ndarray) -> str:
    return hashlib.sha256(count.tobytes() + image.tobytes() + products.tobytes()).hexdigest()


def keep_moments(place: Path, moments: Moments) -> None:
    """Write the sums to the cache with a checksum; warn if the file can't be written."""
    arrays = (np.array(moments.count), moments.image.numpy(), moments.products.numpy())
    data = io.BytesIO()
    np.savez(data, count=arrays[0], image=arrays[1], products=arrays[2], checksum=_checksum(*arrays))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, data.getvalue())
    except OSError as error:
        warnings.warn(f"the mean image can't be cached in {place}: {error}", stacklevel=2)


def read_moments(place: Path) -> Moments | None:
    """Return the sums that `keep_moments` wrote, or None if the file doesn't exist or, with a warning, is damaged."""
    if not place.exists():
        return None
    try:
        with np.load(place, allow_pickle=False) as kept:
            arrays = (kept["count"], kept["image"], kept["products"])
            if str(kept["checksum"]) != _checksum(*arrays):
                raise ValueError("its checksum is wrong")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{place} is damaged ({error}) and will be computed again", stacklevel=2)
        return None
    return Moments(int(arrays[0]), torch.from_numpy(arrays[1]), torch.from_numpy(arrays[2]))
