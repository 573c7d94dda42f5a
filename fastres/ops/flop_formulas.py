"""What a fused convolution counts as in `torch.utils.flop_counter`, which counts an op without a formula as nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverloadPacket
from torch.utils.flop_counter import register_flop_formula


def register_conv_flops(op: OpOverloadPacket, *products: tuple[str | int, str | int]) -> None:
    """Let FlopCounterMode count `op` (`torch.ops.fastres.<name>`) as the convolutions `products` inside it.

    Each is a pair (z, w) that says where to read two shapes: z has as many elements as the convolution's output
    [N, K, P, Q], w those of its weight, K first ([K, C/groups, R, S] or KRSC). A str is an argument's name, an int a
    result's position. The count, 2 numel(z) numel(w) / K, is that of fprop, dgrad and wgrad alike:

        fprop  z = conv(x, w)    (0, "w")
        dgrad  dx from (dz, w)   ("dz", "w")
        wgrad  dw from (dz, x)   ("dz", 0)

    Raises ValueError for a name that is no argument of op, RuntimeError if op has a formula already.
    """
    names = [argument.name for argument in op.default._schema.arguments]
    unknown = sorted({end for pair in products for end in pair if isinstance(end, str)} - set(names))
    if unknown:
        raise ValueError(f"{op} has no argument {', '.join(unknown)}; it has {', '.join(names)}")

    def formula(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        results: Sequence[torch.Size] = [out_shape] if isinstance(out_shape, torch.Size) else out_shape

        def shape(end: str | int) -> torch.Size:
            return arguments[end] if isinstance(end, str) else results[end]

        return sum(conv_flops(shape(z), shape(w)) for z, w in products)

    register_flop_formula(op)(formula)


def conv_flops(z: torch.Size, w: torch.Size) -> int:
    """2 numel(z) numel(w) / K of a convolution with output z and weight w, K first: its fprop, dgrad or wgrad."""
    return 2 * z.numel() * w[1:].numel()
