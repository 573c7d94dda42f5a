"""A window of a resized image, without the rest of it where that would be large.

A picture of 2x6000 pixels whose shorter side becomes 256 has 200 million of them, of which a crop shows 50,000. Up to
`MOST_PIXELS` the picture is resized and cropped by torchvision; beyond that, Pillow makes the window alone, which comes
out as it would be cut from the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

__all__ = ["MOST_PIXELS", "centre", "resized", "resized_crop"]

MOST_PIXELS = 2**24  # that an image is resized to: a net's first layer makes 1 GB of it, 16 channels per pixel in fp32


def resized(size: Sequence[int], side: int) -> tuple[int, int]:
    """Height and width of an image of `size` whose shorter side has become `side`, rounded as by torchvision."""
    height, width = size
    longer = int(side * max(height, width) / min(height, width))
    return (side, longer) if height <= width else (longer, side)


def centre(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the square in the middle of an image of `size`, placed as by torchvision."""
    return round((size[0] - side) / 2), round((size[1] - side) / 2), side, side


def resized_crop(image: Any, size: tuple[int, int], box: tuple[int, int, int, int]) -> Any:
    """What `box`, (top, left, height, width), holds of the image resized to `size`, (height, width).

    image: of Pillow, uint8 [..., H, W], or anything else that torchvision resizes; the result is of the same kind.
    """
    if size[0] * size[1] > MOST_PIXELS:
        if isinstance(image, Image.Image):
            return _window(image, size, box)
        if type(image) is Tensor:
            planes = image.reshape(-1, *image.shape[-2:]).cpu().numpy()
            windows = [np.asarray(_window(Image.fromarray(plane), size, box)) for plane in planes]
            return torch.from_numpy(np.stack(windows)).reshape(*image.shape[:-2], *box[2:])
    return tvf.crop(tvf.resize(image, list(size), antialias=True), *box)


def _window(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    top, left, height, width = box
    x0, x1, x, right = _span(image.width, size[1], left, width)
    y0, y1, y, bottom = _span(image.height, size[0], top, height)
    return image.crop((x0, y0, x1, y1)).resize((width, height), Image.Resampling.BILINEAR, (x, y, right, bottom))


def _span(length: int, resized: int, start: int, extent: int) -> tuple[int, int, float, float]:
    """Along one side: from which pixel to which is read, and where the window lies therein. Pillow knows windows in
    float32 only, so they must not lie far from zero."""
    scale = length / resized
    first, last = start * scale, min((start + extent) * scale, length)
    reach = max(scale, 1) + 1  # of the filter, and of rounding
    low, high = max(0, math.floor(first - reach)), min(length, math.ceil(last + reach))
    return low, high, first - low, last - low
