"""The tolerances of all tests: one per dtype, the rounding error of sums on a GPU, and names for special cases.

`cases.assert_close_to_reference` uses the table. `test_house.py` finds tolerances that are defined anywhere else.
Errors are relative to the reference's largest value unless a comment says otherwise. Never widen one to make a test
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-11  # float64: the effect of another order of summation on a deep net

# The error allowed in addition to that of PyTorch's own result, per dtype. It covers the result's last rounding, in
# case the baseline happens to be exact.
TOLERANCES = {
    torch.float64: EXACT,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).eps,
}


def lost_in_sums(summed: int, operands: Tensor) -> float:
    """Return the error that a sum of `summed` products may have on a GPU in addition to the baseline's.

    It is relative to the largest value, and 0 on a CPU. operands: a tensor with the products' dtype and device.

    float32: the products are added one after the other, and each sum is rounded. In a simulation this random walk takes
    the worst of some thousand results about sqrt(summed) / 4 epsilons away. A library may sum in blocks and round less.
    16 bits: tensor cores align 16 products at a time to the sum so far and truncate them in fp32 (Fasi et al. 2021,
    "Numerical behavior of NVIDIA tensor cores"). PyTorch's own sums in the operands' dtype lose as much, but their last
    rounding hides it.
    8 bits: Hopper aligns 32 products at a time and truncates them 13 bits below the largest (DeepSeek-V3's report,
    section 3.3.2). Each product loses less than 2^-13, with a standard deviation of 2^-13 / sqrt(3). Allowed are four
    standard deviations, plus half a step of the sum for every 32 products.
    """
    if not operands.is_cuda:
        return 0.0
    eps = torch.finfo(torch.float32).eps
    if operands.itemsize == 4:
        return summed**0.5 / 4 * eps
    if operands.itemsize == 2:
        return -(-summed // 16) * eps
    if operands.itemsize == 1:
        return (4 * (summed / 3) ** 0.5 + -(-summed // 32) / 2) * 2.0**-13
    return 0.0


# How many times the error of PyTorch's own result in the same dtype is allowed.
TWICE = 2.0  # the same number of roundings, at other places
FUSED = 3.0  # a convolution with fused steps: values are rounded at other places than in separate steps
GRADIENTS = 4.0  # dgrad and wgrad after BatchNorm's backward, in which differences cancel
ONEDNN_GRAPH = 4.0  # a whole net, fused by oneDNN's graph compiler
WHOLE_NETS = 8.0  # gradients and weights of whole nets: later layers amplify the rounding error of the first ones

# float64, in which a wrong formula gives an error of order 1 and rounding one of order 1e-14.
SLIDING = 1e-13  # scores in [0, 1] of separate crops, compared with windows of one image
EXACT_BLOCK = 1e-12  # a block, or a net of few layers
EXACT_BLOCK_GRADIENTS = 1e-10  # gradients of a block, from its operator's backward
EXACT_GRADIENTS = 1e-9  # gradients of a whole net, through all of its BatchNorms
EXACT_ANY_NET = 1e-8  # random nets, and torchvision's deepest ones in training
QUOTIENTS = 1e-12  # Python floats, divided in another order
SCHEDULE = 1e-9  # a learning rate from its formula, compared with PyTorch's recurrence over 600 epochs
SCHEDULE_END = 1e-12  # the same at the end of the schedule, near zero; absolute
AVERAGES = 1e-9  # averages of losses, summed in another order
COUNTS = 1e-6  # FLOPs, which launches store as fractions of a total

# float32
RATE = 1e-7  # weights near 0: a graph stores the learning rate in float32, an eager step in float64; absolute
MEANS = 3e-7  # the mean of a channel whose standard deviation is far smaller
ROUNDING = 1e-6  # a few operations, some epsilons; also absolute, for pixels, scores and weights of about 1 or less
SCORES = 2e-6  # scores in [0, 1] after about ten layers, and as a table prints them; absolute
COLOURS = 2e-6  # pixels in [0, 1], shifted along the eigenvectors of their colours; absolute
MOMENTS = 5e-6  # moments of a channel whose mean is far larger than its deviation; see `CANCELLED`
CANCELLED = 1e-4  # a lower bound: the error of the naive formula for the variance there
SUMS = 1e-5  # about a hundred products or a shallow net, in another order; also absolute, for weights near 1
SERVED = 2e-5  # scores in [0, 1] from a batch that several requests share; absolute
STAGES = 1e-4  # consecutive stages, with second derivatives; a missing mask or sum gives an error of tenths
NETS = 1e-4  # a whole net in another implementation, folded or compiled
PRODUCTS = 2.0**-20  # float32 products of our kernels
PRODUCTS_TF32 = 2.0**-9  # the same with operands truncated to 10 bits
REPLAYED = 1e-3  # some steps from a graph: they amplify the effect of other algorithms, chosen during its capture
REPLAYED_16 = 2e-2  # the same in bfloat16 and float16
VALIDATION = 1e-3  # a loss after steps whose sums have another order
KERNELS = 2e-3  # a block on our kernels, compared with float32 instead of float64
KERNELS_GRADIENTS = 1e-2  # the same for gradients
GPU_TRAINED = 1e-2  # weights after four steps on a GPU, compared with a CPU: steps amplify rounding errors
GPU_TRAINED_ZERO = 1e-3  # the same for weights near zero; absolute

# 16 bits and 8 bits.
GPU_HALF = 1e-2  # float16: a small net on a GPU, compared with the CPU
AUTOCAST = 0.05  # bfloat16: a small net, compiled, compared with eager
AUTOCAST_GRADIENTS = 0.02  # the smallest tolerance for its gradients, in case eager's happen to be more accurate
HALF_SCORES = 0.05  # bfloat16: scores in [0, 1]; absolute
CURVES = 0.02  # bfloat16: mean losses of 20 steps, in addition to the difference between two stock runs; absolute
INT8 = 0.03  # a few layers in 8 bits, compared with float32
INT8_SIMULATED = 0.02  # a small net in int8, simulated compared with oneDNN
INT8_STEPS = 0.025  # two steps of a quantisation grid over [-1, 2], for the input and the output; absolute
INT8_TOP1 = 0.005  # the top-1 accuracy of a trained net
HALF_STEP = 0.5001  # half a step of a quantisation grid, plus float32's rounding error
TIES = 1e-3  # rounding may miss by one step this close to a tie (in steps), for at most this fraction of the values

# Pictures and random draws; absolute.
NEAR_A_PIXEL = 1e-3  # the edges of a window, in pixels
GREY_LEVELS = 0.01  # the mean difference of pixels from 0 to 255, where some are rounded to the next value
RARELY = 1e-3  # the fraction of values that may differ by more than 1/255
PILLOW = 2e-3  # scores, where Pillow resizes training's pictures
DRAWN = 0.01  # the mean of 20,000 draws between 0 and 1, whose standard deviation is 0.002
COLOUR_MEANS = 0.003  # the mean of 20,000 draws with a standard deviation of 0.1; that of the mean is 0.0007
COLOUR_DEVIATIONS = 0.002  # the difference between these draws' standard deviation and 0.1
MIXED_AREA = 0.02  # the fraction of a picture that a rectangle of whole pixels covers

# Rounded figures, and models of them.
PAPER = 0.02  # FLOPs in the paper's table, which have two digits
TILED = 0.02  # the products that tiles compute, including those beyond the last pixel
WINDOWED = 0.01  # the same for the rows of the stem's kernels
RECORDED = 0.05  # ratios of predicted to measured times, given with two digits; absolute
PRINTED = 0.06  # microseconds with one decimal; absolute
PRINTED_2 = 0.02  # a difference of two figures with two decimals each; absolute
PERCENT = 0.01  # a figure with two decimals; absolute
