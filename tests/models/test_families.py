"""Nets are built by their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastres.models import families


@pytest.mark.parametrize(
    "name", ["resnet18", "wide_resnet50_2", "cifar-8", "cifar-plain-8", "cifar-stem-18", "paper-34-C"]
)
def test_nets_are_built_by_name(name: str) -> None:
    with torch.device("meta"):
        model = families.named(name, num_classes=3)
    assert next(m for m in model.modules() if isinstance(m, nn.Linear)).out_features == 3


@pytest.mark.parametrize(
    "name", ["vgg16", "resnet", "ResNet", "cifar", "cifar-", "cifar-8-A", "cifar-9", "paper-34-D", "-8"]
)
def test_names_of_no_net_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown|6n|choice"):
        families.named(name)
