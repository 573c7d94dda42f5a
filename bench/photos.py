"""Batches of real photographs: random crops and flips of scikit-learn's two sample images, with a seed.

Real images rather than zeros or plain noise, because the data decides how often ReLU is zero, and because a GPU is
faster on zeros than on pictures.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def originals() -> list[Tensor]:
    """Return the photographs, each [3, H, W] in fp32, normalised by ImageNet's channel means and standard deviations.

    Raises ImportError if scikit-learn is missing.
    """
    from sklearn.datasets import load_sample_images

    images = [(np.float32(image) / 255 - np.float32(MEAN)) / np.float32(STD) for image in load_sample_images().images]
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def batches(count: int, n: int, size: int, seed: int) -> list[Tensor]:
    """Return `count` different batches [n, 3, size, size] in fp32 on the CPU. Equal arguments give equal batches.

    Each image is a square crop of 8 to 100 % of the largest square's area, mirrored with probability 1/2, as in the
    usual training augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    photos = originals()

    def crop() -> Tensor:
        which, area, top, left, mirror = torch.rand(5, generator=generator).tolist()
        photo = photos[int(which * len(photos))]
        height, width = photo.shape[1:]
        side = round(math.sqrt(0.08 + 0.92 * area) * min(height, width))
        y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
        piece = photo[None, :, y : y + side, x : x + side]
        piece = F.interpolate(piece, (size, size), mode="bilinear", antialias=True)[0]
        return piece.flip(2) if mirror < 0.5 else piece

    return [torch.stack([crop() for _ in range(n)]) for _ in range(count)]
