"""The pieces that conv kernels share: where a tile lies, which filter tap a step is, prologue, epilogue, statistics.

A tile is [BM channels, BN pixels]; a pixel is a position (n, p, q) of the output. Vectors over pixels or channels are
one-dimensional; who needs them as rows or columns broadcasts.
"""

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter runs no inline assembly


@triton.jit
def unravel(pixel, P, Q):
    """(n, p, q) of a flat pixel index of [N, P, Q]."""
    row = pixel // Q
    return row // P, row % P, pixel % Q


@triton.jit
def box_origin(tile, tiles_p, tiles_q, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """(n, p, q) of the first pixel of box number `tile`; boxes run along q first, then p, then n."""
    n, p, q = unravel(tile, tiles_p, tiles_q)
    return n * TN, p * TH, q * TW


@triton.jit
def box_pixels(n0, p0, q0, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """(n, p, q) of all pixels of a box, each [TN * TH * TW]."""
    n, p, q = unravel(tl.arange(0, TN * TH * TW), TH, TW)
    return n0 + n, p0 + p, q0 + q


@triton.jit
def filter_tap(step, S: tl.constexpr, TAPS: tl.constexpr):
    """(r, s, block) of a reduction step. Taps run fastest, so that neighbouring steps read the same channels of nearly
    the same pixels, from L2."""
    tap = step % TAPS
    return tap // S, tap % S, step // TAPS


@triton.jit
def relu(x):
    """NaN stays NaN, as in torch."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def affine_relu(x, scale, shift, valid, PADDED: tl.constexpr):
    """relu(scale x + shift) in x's dtype for x [BN, BK], scale and shift fp32 [BK]; computed in fp32.

    PADDED: zero where not valid (broadcastable to x), because a conv pads with zeros after BatchNorm and ReLU. x must
    have been read as 0 there; a shift of -inf then gives 0 at no instruction more, a select of the result costs two.
    """
    shift = shift[None, :]
    if PADDED:
        shift = tl.where(valid, shift, float("-inf"))
    return relu(x.to(tl.float32) * scale[None, :] + shift).to(x.dtype)


@triton.jit
def wait_for_wgmma(acc, WAIT: tl.constexpr):
    """acc, unchanged; where WAIT, only once the wgmma that makes it is done.

    Triton 3.6 lets a pipelined wgmma run on while the registers of its first operand are overwritten (triton#9433). An
    empty instruction on the result makes it wait.
    """
    if WAIT:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def join_relu(x, shortcut, scale, shift, shortcut_scale, shortcut_shift, c, c_valid):
    """The end of a residual block, in x's dtype: relu(scale x + shift + shortcut), or for a projection
    relu(scale x + shift + (shortcut_scale shortcut + shortcut_shift)). x, shortcut: [BN, BK] of channels c [BK]. In
    fp32 and in `normalize`'s order."""
    out = x.to(tl.float32) * tl.load(scale + c, mask=c_valid, other=0.0)[None, :]
    out += tl.load(shift + c, mask=c_valid, other=0.0)[None, :]
    shortcut = shortcut.to(tl.float32)
    if shortcut_scale is not None:
        shortcut = shortcut * tl.load(shortcut_scale + c, mask=c_valid, other=0.0)[None, :]
        shortcut += tl.load(shortcut_shift + c, mask=c_valid, other=0.0)[None, :]
    return relu(out + shortcut).to(x.dtype)


@triton.jit
def store_statistics(partials, y, tile, count, valid, channel, channel_valid, K, FULL: tl.constexpr):
    """partials[tile, :, channel] = (count, mean, M2) of the stored values y [BM, BN] over the `count` pixels that are
    valid [BN], for FULL all of them; partials is fp32 [tiles, 3, K]. M2, the sum of squared distances from the tile's
    own mean, merges without cancellation: Chan, Golub, LeVeque (1979)."""
    mean, squares = tile_statistics(y, count, valid, FULL)
    at = partials + tile.to(tl.int64) * 3 * K + channel
    tl.store(at, tl.zeros_like(mean) + count, mask=channel_valid)
    tl.store(at + K, mean, mask=channel_valid)
    tl.store(at + 2 * K, squares, mask=channel_valid)


@triton.jit
def tile_statistics(y, count, valid, FULL: tl.constexpr):
    """mean and M2 [BM] for `store_statistics`."""
    y = y.to(tl.float32)
    if FULL:
        mean = tl.sum(y, 1) * (1.0 / y.shape[1])
        distance = y - mean[:, None]
    else:
        mean = tl.sum(tl.where(valid[None, :], y, 0.0), 1) / count
        distance = tl.where(valid[None, :], y - mean[:, None], 0.0)
    return mean, tl.sum(distance * distance, 1)


@triton.jit
def bn_affine(mean, var, weight, bias, eps, channel, valid):
    """(rstd, scale, shift) of a BatchNorm with these statistics, fp32 like mean; weight, bias: pointers or None."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    shift = -mean * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    return rstd, scale, shift


@triton.jit
def finish(
    acc, res, scale, shift, mean, var, eps, channel, channel_valid, residual_scale, out_scale,
    RELU: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The value to store for a conv's sums acc [BM, BN] fp32:

        out_scale [relu](scale[channel] acc + shift[channel] + residual_scale res)

    Whatever is None is left out; res is [BM, BN], the scales of quantised tensors are numbers. With mean and var, scale
    and shift are the weight and bias of a BatchNorm.
    """
    if var is not None:
        centre = tl.load(mean + channel, mask=channel_valid, other=0.0).to(tl.float32)
        spread = tl.load(var + channel, mask=channel_valid, other=1.0).to(tl.float32)
        _, slope, start = bn_affine(centre, spread, scale, shift, eps, channel, channel_valid)
        acc = acc * slope[:, None] + start[:, None]
    else:
        if scale is not None:
            acc *= tl.load(scale + channel, mask=channel_valid, other=0.0)[:, None]
        if shift is not None:
            acc += tl.load(shift + channel, mask=channel_valid, other=0.0)[:, None]
    if res is not None:
        res = res.to(tl.float32)
        if residual_scale is not None:
            res *= residual_scale
        acc += res
    if RELU:
        acc = relu(acc)
    if out_scale is not None:
        acc *= out_scale
    if COMPILED and DTYPE.is_fp16() and var is None and scale is None and shift is None and res is None:
        # wgmma's own sums, rounded one by one and widened again for statistics: ptxas 12.8 takes that for reading them
        # in flight and serialises wgmma (C7514). Rounded by pairs, as bf16 is by itself, they are not.
        pair: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(pair, "=r,r,r", [acc], dtype=tl.float16, is_pure=True, pack=2)
    return acc.to(DTYPE)  # e4m3 has no infinity: the conversion saturates at +-448
