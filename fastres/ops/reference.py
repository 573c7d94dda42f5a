"""The meaning of every fused op, in plain PyTorch: CPU path, test oracle, benchmark baseline and documentation at once.

Shapes: x [N, C, H, W]; a conv weight [K, C/groups, R, S]; z = conv(x) and everything after it [N, K, P, Q].
Every function is differentiable, works in any floating dtype and any memory format, and changes nothing but the running
statistics of a BatchNorm in training mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """z = conv2d(x, weight, bias), zero-padded."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def count_batch(bn: nn.BatchNorm2d) -> float:
    """Count this batch where `bn` keeps count; returns the weight of its statistics in the running ones.

    Raises RuntimeError where that weight depends on the count and a CUDA graph is being captured.
    """
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        if bn.momentum is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"BatchNorm2d({bn.num_features}, momentum=None) averages over all batches: the host reads their number "
                "in every step, which a CUDA graph can't do. Give the layer a momentum, or don't capture the step"
            )
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # cumulative average
            return 1.0 / float(bn.num_batches_tracked)
    return bn.momentum or 0.0


def batch_norm(z: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """(z - mean) rstd weight + bias per channel, with `nn.BatchNorm2d`'s choice of statistics and their update."""
    momentum = count_batch(bn)
    use_batch = bn.training or bn.running_mean is None
    moved = not bn.training or bn.track_running_stats
    mean, var = (bn.running_mean, bn.running_var) if moved else (None, None)
    return F.batch_norm(z, mean, var, bn.weight, bn.bias, use_batch, momentum, bn.eps)


def conv_bn_act(
    x: Tensor, conv_: nn.Conv2d, bn: nn.BatchNorm2d, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """relu(bn(conv(x)) + residual): paper, section 3.4 ("BN right after each convolution and before activation")."""
    y = batch_norm(conv(x, conv_), bn)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def pad_shortcut(x: Tensor, stride: int, channels: int) -> Tensor:
    """Option A (section 3.3): every `stride`-th pixel of x [N, C, H, W], zero channels appended.

    Returns [N, channels, ceil(H/stride), ceil(W/stride)].
    """
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


def pad_shortcut_add_relu(y: Tensor, x: Tensor, stride: int) -> Tensor:
    """relu(y + pad_shortcut(x)): the block's end with an option-A shortcut; y [N, K, P, Q]."""
    return F.relu(y + pad_shortcut(x, stride, y.shape[1]))


def residual_block(
    x: Tensor, units: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], shortcut: nn.Module | None = None
) -> Tensor:
    """relu(F(x) + shortcut(x)) (paper, equations 1 and 2): F is conv-BN pairs with ReLU between them.

    shortcut: None for the identity, else a module: `Sequential(conv, bn)` for a projection, or an option-A module.
    """
    y = x
    for conv_, bn in units[:-1]:
        y = conv_bn_act(y, conv_, bn)
    conv_, bn = units[-1]
    return conv_bn_act(y, conv_, bn, residual=x if shortcut is None else shortcut(x))


def plain_block(x: Tensor, units: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]) -> Tensor:
    """relu(F(x)): the same layers without a shortcut (the plain nets of section 3.3)."""
    for conv_, bn in units:
        x = conv_bn_act(x, conv_, bn)
    return x


def stem(x: Tensor, conv_: nn.Conv2d, bn: nn.BatchNorm2d, pool: nn.MaxPool2d) -> Tensor:
    """maxpool(relu(bn(conv(x)))): the net's 7x7 entrance (paper, Table 1, conv1 and the pool of conv2_x)."""
    y = conv_bn_act(x, conv_, bn)
    return F.max_pool2d(y, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


__all__ = [
    "batch_norm",
    "conv",
    "conv_bn_act",
    "count_batch",
    "pad_shortcut",
    "pad_shortcut_add_relu",
    "plain_block",
    "residual_block",
    "stem",
]
