"""Feature extractors: containers that run parts of a net in order and return some of their outputs.

torchvision builds the backbones of detectors and segmentation nets as `IntermediateLayerGetter`. timm's containers are
in `fastres.models.timm`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import _utils

from fastres.models.resnet import run_stages
from fastres.ops import eligibility
from fastres.ops.block import plain_block, stem


def stem_parts(children: Mapping[str, nn.Module] | nn.ModuleDict, returned: Container[str]) -> eligibility.Parts | None:
    """Return the stem with which `children` begin: a convolution, its BatchNorm, an activation, and a max pool.

    returned: names of the children whose outputs are returned. The pool is not part of the stem if it isn't there or if
    the activation's output is returned. None if an output before the activation's is, or if there are too few children.
    """
    names, modules = [*children][:4], [*children.values()][:4]
    if len(modules) < 3 or names[0] in returned or names[1] in returned:
        return None
    conv, norm, act, *rest = modules
    pools = [module for module in rest if type(module) is nn.MaxPool2d and names[2] not in returned]
    return eligibility.Parts([(conv, norm)], [act], pool=next(iter(pools), None))


def outputs(
    x: Tensor, children: Mapping[str, nn.Module] | nn.ModuleDict, returned: Container[str]
) -> Iterator[tuple[str, Any]]:
    """Run `children` in order, each on the output of the one before; yield (name, output) of those in `returned`.

    x: [N, C, H, W]. The stem runs fused where possible, and so do consecutive stages up to a returned output.
    """
    modules, start = [*children.values()], 0
    parts = stem_parts(children, returned)
    if parts is not None and eligibility.serves(x, parts):
        x, start = (plain_block(x, parts.pairs), 3) if parts.pool is None else (stem(x, *parts.pairs[0], parts.pool), 4)
    for end, name in enumerate(children, 1):
        if name in returned:
            x = run_stages(x, *modules[start:end])
            start = end
            yield name, x
    run_stages(x, *modules[start:])  # nobody reads the result, but BatchNorms' statistics move and hooks run


class IntermediateLayerGetter(_utils.IntermediateLayerGetter):
    """torchvision's `IntermediateLayerGetter`, in which the stem and whole stages of a ResNet can run fused.

    `forward` maps images [N, C, H, W] to a dict of features.
    """

    def parts(self) -> eligibility.Parts | None:
        """Return the stem's modules by role, for `eligibility`."""
        return stem_parts(self, self.return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not torch.jit.is_scripting():
            if not torch.compiler.is_compiling():
                found = outputs(x, self, self.return_layers)
                return OrderedDict((self.return_layers[name], y) for name, y in found)
        features = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                features[self.return_layers[name]] = x
        return features
