"""The checks that launchers make before they launch."""

from __future__ import annotations

import pytest
import torch

from fastres.kernels.chain import bottleneck_chain
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.fprop import conv_fprop
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import conv_stem, conv_stem_wgrad
from fastres.kernels.wgrad import conv_wgrad


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad", "stem", "stem's wgrad", "chain"])
def test_the_interpreter_does_not_multiply_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter launchers reject bfloat16, because `tl.dot` would multiply its bits as integers."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, w, dy = (torch.ones(size, dtype=torch.bfloat16) for size in ((1, 4, 4, 16), (16, 1, 1, 16), (1, 4, 4, 16)))
    problem = ConvProblem(1, 8, 8, 3, 16, 7, 7, 2, 3)
    packed = torch.ones(1, 8, 14, 4, dtype=torch.bfloat16)
    vector = torch.ones(16)
    w2, wide = torch.ones(16, 3, 3, 16, dtype=torch.bfloat16), torch.ones(64)
    w3, w1, y = (torch.ones(size, dtype=torch.bfloat16) for size in ((64, 1, 1, 16), (16, 1, 1, 64), (1, 4, 4, 64)))
    calls = {
        "fprop": lambda: conv_fprop(x, w, ConvProblem.of(x.shape, w.shape)),
        "dgrad": lambda: conv_dgrad(dy, w, ConvProblem.of(x.shape, w.shape)),
        "wgrad": lambda: conv_wgrad(dy, x, ConvProblem.of(x.shape, w.shape)),
        "stem": lambda: conv_stem(packed, torch.ones(16, 7, 8, 4, dtype=torch.bfloat16), problem),
        "stem's wgrad": lambda: conv_stem_wgrad(dy, packed, problem),
        "chain": lambda: bottleneck_chain(x, w2, vector, w3, wide, y, w1, vector),
    }
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        calls[name]()
