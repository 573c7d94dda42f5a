"""conv + BatchNorm (+ residual) + ReLU as one call, over a whole residual block or the stem.

A model asks `dispatch.serves` first and calls these only where the answer is yes; dispatch then names the
implementation, here it is called.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastres.ops import reference


def residual_block(x: Tensor, units: Sequence[tuple[nn.Module, nn.Module]], shortcut: nn.Module | None) -> Tensor:
    """relu(F(x) + shortcut(x)) with F the (conv, norm) `units`, ReLU between them. Equivalent to
    `reference.residual_block`, which gives shapes and dtypes."""
    return reference.residual_block(x, units, shortcut)  # type: ignore[arg-type]


def stem(x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module) -> Tensor:
    """maxpool(relu(bn(conv(x)))). Equivalent to `reference.stem`, which gives shapes and dtypes."""
    return reference.stem(x, conv, bn, pool)  # type: ignore[arg-type]
