"""Decode, resize and flip photographs with NVIDIA DALI: on the GPU if the training runs on one, else on the CPU.

The order of images and their random crops are the same as with `fastres.train.data`. Worker processes read the bytes of
each file and apply the usual torchvision transform to the corners of the image instead of its pixels. The transformed
corners give the crop window and the flip. DALI draws no random numbers; it only decodes the image and resizes that
window.

    bytes, window ─► decode ─► resize the window ─► flip ─► uint8 [N, H, W, 3]

On a CPU, decoded pixels equal Pillow's exactly. Resized ones differ by at most 1/255, and by more only at the edge of
an image, where Pillow shortens the filter and DALI repeats the last pixel. A GPU's decoder rounds differently. Files
that DALI might decode differently from Pillow are decoded by `fastres.images` and passed on as PPM; that module also
defines which files are rejected, and explains why EXIF orientation is ignored.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastres.images import ImageError, eight_bits, opened
from fastres.train.data import Batches, DataError, Dataset, Folder, Pairs, ReadError, fetched, seeded
from fastres.train.recipe import Recipe, ScaleCrop

Item = tuple[int, Tensor, Tensor, int]  # index, bytes of the file (uint8), result of `window`, label


def chosen(asked: str, dataset: Dataset, recipe: Recipe, device: torch.device) -> str:
    """Return the loader that decodes photographs: "torch" or "dali".

    asked: a key of `LOADERS`. "auto" selects "dali" on a GPU if DALI is installed and supports the data and recipe,
    else "torch". Raises DataError if "dali" is asked for and DALI doesn't support them or isn't installed.
    """
    if asked == "torch" or (asked == "auto" and device.type != "cuda"):
        return "torch"
    reason = refusal(recipe) if isinstance(dataset.train, Folder) else f"{dataset.name} has no files to decode"
    if reason is None:
        return "dali"
    if asked == "dali":
        raise DataError(f"--loader dali: {reason}")
    return "torch"


def refusal(recipe: Recipe) -> str | None:
    """Return why DALI can't load photographs for `recipe`, or None if it can."""
    if not isinstance(recipe.crop, ScaleCrop) or recipe.trivial_augment or recipe.erase:
        return "DALI supports only the augmentation scale, crop and flip, and the recipe has more"
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"DALI is not installed ({error}): pip install 'fastres[dali]'"
    return None


def window(transform: v2.Transform, width: int, height: int) -> Tensor:
    """Return the window of an image that `transform` selects, drawn from torch's CPU generator.

    transform: scales, crops and flips only. The result is float32 [7]: top, left, bottom and right of the window, in
    pixels of the original image; height and width of the result; 1 if it is mirrored, else 0.
    """
    corners = tv_tensors.KeyPoints([[0, 0], [width, height]], canvas_size=(height, width), dtype=torch.float64)
    moved = transform(corners)
    rows, columns = moved.canvas_size
    (left, top), (right, bottom) = moved.tolist()
    mirrored = right < left
    if mirrored:
        left, right = columns - 1 - left, columns - 1 - right
    down, across = height / (bottom - top), width / (right - left)
    box = (-top * down, -left * across, (rows - top) * down, (columns - left) * across)
    return torch.tensor([*box, rows, columns, mirrored], dtype=torch.float32)


class Encoded:
    """The images of a `Folder`, undecoded: `dataset[(index, word)]` is an `Item`, or a ReadError if reading failed.

    word: the seed of the image's random crop and flip.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, item: tuple[int, int]) -> Item | ReadError:
        index, word = item
        path, label = self.folder.files.samples[index]
        try:
            content = io.BytesIO()
            with opened(path) as image:
                if _is_common(image):
                    size = image.size
                    content.write(Path(path).read_bytes())
                else:
                    picture = eight_bits(image)
                    size = picture.size
                    picture.save(content, "PPM")
        except ImageError as error:
            return ReadError(str(error))
        with seeded(word):
            return (
                index,
                torch.frombuffer(content.getbuffer(), dtype=torch.uint8),
                window(self.folder.transform, *size),
                label,
            )


def _is_common(image: Image.Image) -> bool:
    """Return whether all decoders agree on the file, judging by its header.

    They do for PNG and JPEG with 8 bits of grey, or of RGB without transparency. A JPEG must store YCbCr, because a
    GPU's decoder assumes it.
    """
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        return False
    if image.format == "JPEG":
        components = [layer[0] for layer in image.layer]  # type: ignore[attr-defined]
        return image.info.get("adobe_transform") != 0 and bytes(components) != b"RGB"
    if image.format == "PNG":
        layout = image.tile[0][3]  # type: ignore[attr-defined]
        return layout == image.mode  # otherwise the file has another bit depth
    return False


def collate(items: Sequence[Item | ReadError]) -> tuple[list[int], Tensor, list[int], Tensor, Tensor] | ReadError:
    """Return (indices, bytes of all files in one uint8 tensor, length of each file, windows [N, 7], labels [N, 1]).

    If an item is a ReadError, return the first one instead.
    """
    whole = []
    for item in items:
        if isinstance(item, ReadError):
            return item
        whole.append(item)
    which, data, windows, labels = zip(*whole, strict=True)
    return (
        list(which),
        torch.cat(data),
        [len(each) for each in data],
        torch.stack(windows),
        torch.tensor(labels)[:, None],
    )


def decoded(folder: Folder, batches: Batches, workers: int, device: torch.device) -> Pairs:
    """Yield (images, labels) on the device: uint8 [N, 3, H, W] in channels_last strides, and integers [N].

    A replacement for `fastres.train.data.decoded`. Raises ReadError if an image can't be read or decoded.
    """
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    coming = fetched(Encoded(folder), batches, workers, collate)
    first = next(coming, None)  # starts the workers, before DALI starts its threads
    if first is None:
        return
    under_way: deque[list[int]] = deque()

    def source() -> Iterator[tuple[Any, ...]]:
        for which, data, lengths, windows, labels in chain([first], coming):
            under_way.append(which)
            start, end, size, mirrored = (
                np.ascontiguousarray(part) for part in np.split(windows.numpy(), (2, 4, 6), 1)
            )
            yield [part.numpy() for part in data.split(lengths)], start, end, size, mirrored[:, 0], labels.numpy()

    try:
        pipeline = _pipeline(source(), len(first[0]), max(1, workers), device)
        for (batch,) in DALIClassificationIterator(pipeline):
            under_way.popleft()
            yield batch["data"].permute(0, 3, 1, 2), batch["label"][:, 0]
    except RuntimeError as error:
        for index in chain(*under_way):
            culprit = folder[index, 0]
            if isinstance(culprit, ReadError):
                raise culprit from error
        raise
    finally:
        coming.close()  # ends the workers even if a reference to the pipeline survives


def _pipeline(source: Iterator[tuple[Any, ...]], most: int, threads: int, device: torch.device) -> Any:
    """Return a DALI pipeline of decoded, resized and flipped images, uint8 [H, W, 3], with their labels.

    source: yields the batches of (bytes, start, end, size, mirrored, labels). most: the largest batch size.
    """
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def(batch_size=most, num_threads=threads, device_id=device.index if gpu else None)
    def photographs() -> tuple[Any, Any]:
        data, start, end, size, mirrored, labels = fn.external_source(source=source, num_outputs=6)
        x = fn.decoders.image(data, device="mixed" if gpu else "cpu", output_type=types.RGB, adjust_orientation=False)
        x = fn.resize(x, roi_start=start, roi_end=end, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(x, horizontal=fn.cast(mirrored, dtype=types.INT32)), labels.gpu() if gpu else labels

    return photographs()
