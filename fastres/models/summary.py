"""The paper's Table 1 for any net: layer names, output sizes, blocks, and the cost that `flops.count` computes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastres.models.flops import PAPER_TABLE, Cost


def table(model: nn.Module, cost: Cost) -> str:
    """Return a table of `model`, a net of `fastres.models`, as aligned text in the form of the paper's Table 1.

    cost: the result of `flops.count`.
    """
    pool, head = model.get_submodule("maxpool") if hasattr(model, "maxpool") else None, _head(model)
    stages = [name for name, _ in model.named_children() if name.startswith("layer")]
    rows = [("layer", "output", "blocks", "multiply-adds", "parameters")]
    rows.append(_row("conv1", cost.under("conv1"), _conv(model.get_submodule("conv1")), cost.under("bn1")))
    for i, name in enumerate(stages):
        stage = model.get_submodule(name)
        if i == 0 and pool is not None:
            rows.append(("", "", f"{pool.kernel_size}x{pool.kernel_size} max pool, stride {pool.stride}", "", ""))
        rows.append(_row(f"conv{i + 2}_x", cost.under(name), _blocks(stage)))
    classes = model.get_submodule(head).out_features
    rows.append(_row("", cost.under("avgpool"), f"average pool, {classes}-d fc", cost.under(head)))
    rows.append(("total", "", "", f"{cost.multiply_adds:,}", f"{cost.parameters:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [_line(row, widths) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def beside_the_paper(family: str, depth: int, shortcut: str | None, cost: Cost) -> str:
    """Return the paper's figures for a net, with ours and the relative difference; "" if the paper prints none.

    family, depth, shortcut: the net, as for `families.build`. cost: of our net, for images of the paper's size, 224x224
    or 32x32 for the CIFAR nets.
    """
    lines = []
    for row in PAPER_TABLE:
        if (row.family, row.depth, row.shortcut) != (family, depth, shortcut):
            continue
        if row.gflops is not None:
            ours = cost.multiply_adds / 1e9
            lines.append(f"FLOPs (multiply-adds): {ours:.3f}e9, paper {row.gflops}e9, {ours / row.gflops - 1:+.1%}")
        if row.mparams is not None:
            ours = cost.parameters / 1e6
            lines.append(f"parameters: {ours:.3f}M, paper {row.mparams}M, {ours / row.mparams - 1:+.1%}")
        for error in row.errors:
            rates = [f"top-{k} {rate}%" for k, rate in ((1, error.top1), (5, error.top5)) if rate is not None]
            text = ", ".join([*rates, error.note] if error.note else rates)
            lines.append(f"the paper's error, {error.protocol} ({error.source}): {text}")
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(cells).rstrip()


def _row(name: str, shown: Cost, blocks: str, more: Cost | None = None) -> tuple[str, str, str, str, str]:
    """Return the row of a part of the net.

    shown: the cost of the part, whose last layer gives the output size. more: a cost to add to it, None for none.
    """
    shares = [shown] if more is None else [shown, more]
    p, q = shown.layers[-1].output[-2:]
    work, parameters = sum(share.multiply_adds for share in shares), sum(share.parameters for share in shares)
    return name, f"{p}x{q}", blocks, f"{work:,}", f"{parameters:,}"


def _head(model: nn.Module) -> str:
    return next(name for name, module in model.named_children() if isinstance(module, nn.Linear))


def _conv(conv: nn.Module, stride: bool = True) -> str:
    assert isinstance(conv, nn.Conv2d)
    r, s = conv.kernel_size
    text = f"{r}x{s}, {conv.out_channels}"
    if conv.groups > 1:
        text += f", groups {conv.groups}"
    return f"{text}, stride {conv.stride[0]}" if stride and conv.stride[0] > 1 else text


def _blocks(stage: nn.Module) -> str:
    """Return a stage as in Table 1, e.g. [3x3, 64; 3x3, 64] x 3, without strides, which the output sizes show."""
    blocks = list(stage.children())
    convs = [conv for conv in blocks[0].children() if isinstance(conv, nn.Conv2d)]
    return f"[{'; '.join(_conv(conv, stride=False) for conv in convs)}] x {len(blocks)}"
