"""Device functions shared by the convolution kernels: tile coordinates, filter taps, prologues, epilogues, statistics.

A tile is [BM channels, BN pixels]. A pixel is a position (n, p, q) of the output. Vectors over pixels or channels are
one-dimensional; callers broadcast them to rows or columns of a tile.
"""

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter can't run inline assembly


@triton.jit
def unravel(pixel, P, Q):
    """Return (n, p, q) of a flat pixel index into [N, P, Q]."""
    row = pixel // Q
    return row // P, row % P, pixel % Q


@triton.jit
def box_origin(tile, tiles_p, tiles_q, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Return (n, p, q) of the first pixel of box number `tile`. Boxes are numbered along q first, then p, then n."""
    n, p, q = unravel(tile, tiles_p, tiles_q)
    return n * TN, p * TH, q * TW


@triton.jit
def box_pixels(n0, p0, q0, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Return (n, p, q) of all pixels of the box that starts at (n0, p0, q0), each [TN * TH * TW]."""
    n, p, q = unravel(tl.arange(0, TN * TH * TW), TH, TW)
    return n0 + n, p0 + p, q0 + q


@triton.jit
def filter_tap(step, S: tl.constexpr, TAPS: tl.constexpr):
    """Return (r, s, block) of a reduction step: its filter tap and its block of channels.

    Taps vary fastest, so that consecutive steps read the same channels of nearly the same pixels, from L2.
    """
    tap = step % TAPS
    return tap // S, tap % S, step // TAPS


@triton.jit
def relu(x):
    """Return max(x, 0); NaN stays NaN, as in torch."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def affine_relu(x, scale, shift, valid, PADDED: tl.constexpr):
    """Return relu(scale x + shift) for x [BN, BK] in x's dtype, computed in fp32. scale, shift: fp32 [BK].

    PADDED: the result is zero where `valid` (broadcastable to x) is False, because a convolution pads with zeros after
    BatchNorm and ReLU. x must be 0 there. A shift of -inf then makes the ReLU return 0. This adds no instruction; a
    select on the result would add two.
    """
    shift = shift[None, :]
    if PADDED:
        shift = tl.where(valid, shift, float("-inf"))
    return relu(x.to(tl.float32) * scale[None, :] + shift).to(x.dtype)


@triton.jit
def wait_for_wgmma(acc, WAIT: tl.constexpr):
    """Return acc unchanged. If WAIT, force the wgmma that computes acc to finish first.

    Triton 3.6 lets a pipelined wgmma continue while the registers of its first operand are overwritten (triton#9433).
    Empty inline assembly that reads the result makes the program wait for it.
    """
    if WAIT:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def join_relu(x, shortcut, scale, shift, shortcut_scale, shortcut_shift, c, c_valid):
    """Return relu(scale x + shift + shortcut), the end of a residual block, in x's dtype.

    With a projection the shortcut is shortcut_scale shortcut + shortcut_shift. x, shortcut: [BN, BK] at channels c
    [BK]. The arithmetic is fp32 and has the order of `batch_norm.normalize`.
    """
    out = x.to(tl.float32) * tl.load(scale + c, mask=c_valid, other=0.0)[None, :]
    out += tl.load(shift + c, mask=c_valid, other=0.0)[None, :]
    shortcut = shortcut.to(tl.float32)
    if shortcut_scale is not None:
        shortcut = shortcut * tl.load(shortcut_scale + c, mask=c_valid, other=0.0)[None, :]
        shortcut += tl.load(shortcut_shift + c, mask=c_valid, other=0.0)[None, :]
    return relu(out + shortcut).to(x.dtype)


@triton.jit
def store_statistics(partials, y, tile, count, valid, channel, channel_valid, K, FULL: tl.constexpr):
    """Store (count, mean, M2) of each row of y [BM, BN] to partials[tile, :, channel]; partials is fp32 [tiles, 3, K].

    y are the values as stored, and `count` is the number of valid [BN] pixels. FULL: all pixels are valid. M2 is the
    sum of squared distances from the tile's own mean, which merges without cancellation (Chan, Golub & LeVeque, 1979).
    """
    mean, squares = tile_statistics(y, count, valid, FULL)
    at = partials + tile.to(tl.int64) * 3 * K + channel
    tl.store(at, tl.zeros_like(mean) + count, mask=channel_valid)
    tl.store(at + K, mean, mask=channel_valid)
    tl.store(at + 2 * K, squares, mask=channel_valid)


@triton.jit
def tile_statistics(y, count, valid, FULL: tl.constexpr):
    """Return mean and M2, each fp32 [BM], of the rows of y [BM, BN]. Arguments as for `store_statistics`."""
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
    """Return (rstd, scale, shift) of a BatchNorm with statistics mean and var. All are fp32 vectors over `channel`.

    weight, bias: pointers, or None for 1 and 0.
    """
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
    """Apply the epilogue of a convolution to its sums acc, fp32 [BM, BN], and return the values to store, in DTYPE:

        out_scale [relu](scale[channel] acc + shift[channel] + residual_scale res)

    Terms that are None are left out. res: [BM, BN]. scale, shift: pointers to [K]; with mean and var, also pointers,
    they are the weight and bias of a BatchNorm in eval mode. residual_scale, out_scale: scalars of quantised tensors.
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
        # Without any arithmetic in between, the sums would be rounded to fp16 one by one, and statistics widen them
        # again. ptxas 12.8 mistakes this for a read of sums that wgmma is still computing, and serialises wgmma
        # (warning C7514). Rounding in pairs avoids this; bf16 is rounded in pairs anyway.
        pair: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        return tl.inline_asm_elementwise(pair, "=r,r,r", [acc], dtype=tl.float16, is_pure=True, pack=2)
    return acc.to(DTYPE)  # e4m3 has no infinity, so the conversion saturates at +-448
