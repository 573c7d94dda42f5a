"""Test that `explain` reports what is rewritten and why the rest stays."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import conv_bn
from torch import Tensor, nn

import fastres

pytestmark = pytest.mark.usefixtures("compiled_afresh")


def test_explain_is_a_table_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(conv_bn(3, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    before = copy.deepcopy(model.state_dict())
    explanation = fastres.explain(model, torch.randn(2, 3, 8, 8))
    assert [(f.layer, f.pattern, f.operator) for f in explanation.findings] == [
        ("0.0", "conv-BN-ReLU", "conv_bn_act"),
        ("2", "conv", None),
    ]
    text = str(explanation)
    assert text.splitlines()[0].startswith("1 rewritten, 1 left, in 1 graph(s)")
    assert "stays: no BatchNorm after it" in text
    if not torch.cuda.is_available():
        assert "not on this device: there are no fused kernels for cpu" in text
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastres.explain(torch.relu, torch.randn(1))


def test_explain_counts_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(3, 4), conv_bn(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    explanation = fastres.explain(Broken(), torch.randn(2, 3, 8, 8))
    assert explanation.graphs == 2
    assert len(explanation.hits) == 2
    assert len(explanation.graph_breaks) == 1
    assert "graph break" in str(explanation)
