"""timm's ResNets with fastres's blocks. Importing this module registers `fastres_resnet50` etc. with timm.

`timm.create_model("fastres_resnet50.a1_in1k", pretrained=True, num_classes=10)` creates timm's resnet50 with that tag
and converts it. Options, weights, methods and the names in the state dict stay timm's. The import raises ImportError if
timm is missing.
"""

from __future__ import annotations

from typing import Any

try:
    import timm.models.resnet as timm_resnet
    from timm.models import register_model
except ImportError as error:
    raise ImportError("fastres.timm needs timm: pip install timm") from error

from torch import nn

from fastres.models.convert import convert
from fastres.models.timm import BasicBlock, Bottleneck, ResNet

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]  # timm's registry adds the builders


def _register(name: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return convert(getattr(timm_resnet, name)(pretrained, **kwargs)).model

    build.__name__ = build.__qualname__ = f"fastres_{name}"
    build.__doc__ = f"timm's {name} with fastres's blocks. Options and weights are timm's."
    register_model(build)


for _name in (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
):
    _register(_name)
