"""How far a result may be from what it should be: per dtype, what sums lose, and each exception by its name.

`cases.assert_close_to_reference` takes the table, `test_house.py` finds a tolerance that a test keeps to itself. Errors
are relative to the reference's largest value unless a line says otherwise. None may be widened to make a test pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-11  # float64: what sums in another order cost a deep net

# Per dtype, the error allowed over and above PyTorch's own: the result's last rounding, which a baseline that happens
# to be exact doesn't show.
TOLERANCES = {
    torch.float64: EXACT,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).eps,
}


def lost_in_sums(summed: int, operands: Tensor) -> float:
    """What a sum of `summed` products may lose on a GPU beyond the baseline's error, relative to its largest value.

    float32: the products are added one after the other and each sum is rounded, a walk that takes the worst of some
    thousand results about sqrt(summed) / 4 epsilons away (simulated); a library may add in blocks, and so round less.
    16 bits: tensor cores align 16 products at a time to the sum so far and cut them off in fp32, without rounding (Fasi
    et al. 2021, "Numerical behavior of NVIDIA tensor cores"). PyTorch's own sums in the operands' dtype lose as much,
    but their last rounding hides it.
    8 bits: on Hopper they are cut off 13 bits below the largest, 32 at a time (DeepSeek-V3's report, section 3.3.2):
    each by less than 2^-13, of deviation 2^-13 / sqrt(3); four deviations, and half a step of the sum each time.
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


# Factors of the error that PyTorch's own result in the same dtype has.
TWICE = 2.0  # the same number of roundings, which fell otherwise
FUSED = 3.0  # a convolution with what is fused around it: roundings stand elsewhere than in the steps one by one
GRADIENTS = 4.0  # dgrad and wgrad behind a BatchNorm's backward, whose differences cancel
ONEDNN_GRAPH = 4.0  # a whole net as oneDNN's compiler fused it
WHOLE_NETS = 8.0  # gradients and weights of whole nets: layers amplify what the first ones round

# float64, in which a fault of meaning is of order 1 and rounding of order 1e-14.
SLIDING = 1e-13  # scores in [0, 1], of crops beside windows of one image
EXACT_BLOCK = 1e-12  # a block, or a net of few layers
EXACT_BLOCK_GRADIENTS = 1e-10  # of a block, by its operator's backward
EXACT_GRADIENTS = 1e-9  # of a whole net, through each of its BatchNorms
EXACT_ANY_NET = 1e-8  # random nets, and torchvision's deepest in training
QUOTIENTS = 1e-12  # Python's floats, divided in another order
SCHEDULE = 1e-9  # a learning rate by its formula beside PyTorch's recurrence over 600 epochs
SCHEDULE_END = 1e-12  # the same where it ends near zero; absolute
AVERAGES = 1e-9  # of losses, added in another order
COUNTS = 1e-6  # of FLOPs, which launches hold as shares

# float32
RATE = 1e-7  # weights near 0, by a learning rate that a graph holds in float32, an eager step in float64; absolute
MEANS = 3e-7  # a channel's mean, beside a deviation far smaller than it
ROUNDING = 1e-6  # an operation or few, some epsilons; absolute, too, for pixels, scores and weights of about 1 or less
SCORES = 2e-6  # scores in [0, 1] after some ten layers, and as a table prints them; absolute
COLOURS = 2e-6  # pixels in [0, 1], shifted along the eigenvectors of their colours; absolute
MOMENTS = 5e-6  # variances beside a mean far larger; formulas that cancel are off by `CANCELLED`
CANCELLED = 1e-4  # at least, by the naive formula of the variance
SUMS = 1e-5  # some hundred products or a shallow net, in another order; absolute, too, where a net's weights are near 1
SERVED = 2e-5  # scores in [0, 1] from batches that requests happen to share; absolute
BORDERS = 1e-4  # stages that hand over to one another, with second derivatives; a lost mask or sum is off by tenths
NETS = 1e-4  # a whole net that something else runs, folds or compiles
PRODUCTS = 2.0**-20  # by the kernels' own products of float32
PRODUCTS_TF32 = 2.0**-9  # the same of factors cut to 10 bits
REPLAYED = 1e-3  # some steps from a graph, which amplify that a library chooses otherwise while a graph records
REPLAYED_16 = 2e-2  # the same in bfloat16 and float16
VALIDATION = 1e-3  # a loss behind steps whose sums have another order
KERNELS = 2e-3  # a block by kernels beside the same in float32, not in float64
KERNELS_GRADIENTS = 1e-2  # the same for gradients
GPU_TRAINED = 1e-2  # weights after four steps on a GPU, beside a CPU's: steps amplify what sums round
GPU_TRAINED_ZERO = 1e-3  # those near zero; absolute

# 16 bits and 8
GPU_HALF = 1e-2  # float16, a small net on a GPU beside the CPU
AUTOCAST = 0.05  # bfloat16: a small net, compiled beside eager
AUTOCAST_GRADIENTS = 0.02  # at least, where eager's own happen to be nearer
HALF_SCORES = 0.05  # bfloat16: scores in [0, 1]; absolute
CURVES = 0.02  # bfloat16: mean losses of 20 steps, beyond what stock differs from itself; absolute
INT8 = 0.03  # a few layers in 8 bits, beside float32
INT8_SIMULATED = 0.02  # a small net whose sums are oneDNN's or simulated
INT8_STEPS = 0.025  # two steps of a grid over [-1, 2]: one each on the way in and out; absolute
INT8_TOP1 = 0.005  # share of images that a trained net classifies right
HALF_STEP = 0.5001  # of a grid's step, and what float32 makes of it
TIES = 1e-3  # how far from a tie of two grid points rounding may fall to the other side, in steps; and how often

# Pictures and random draws; absolute
NEAR_A_PIXEL = 1e-3  # of a window's edges, in pixels
GREY_LEVELS = 0.01  # mean over a picture where some pixels round to the next grey level
RARELY = 1e-3  # share of pixels more than a grey level away
PILLOW = 2e-3  # scores, where training's pictures are resized by Pillow
DRAWN = 0.01  # the mean of 20,000 draws between 0 and 1; its deviation is 0.002
COLOUR_MEANS = 0.003  # the mean of 20,000 draws of deviation 0.1; its deviation is 0.0007
COLOUR_DEVIATIONS = 0.002  # and how far theirs is from 0.1
MIXED_AREA = 0.02  # the share of a picture that a rectangle of whole pixels covers

# Figures that somebody rounded, and models of them
PAPER = 0.02  # FLOPs in the paper's table: two digits
TILED = 0.02  # what tiles multiply, which hang over the last pixel
WINDOWED = 0.01  # the same of the stem's rows
RECORDED = 0.05  # the model beside the record, each ratio given with two digits; absolute
PRINTED = 0.06  # microseconds with one digit; absolute
PRINTED_2 = 0.02  # a difference of two figures with two digits each; absolute
PERCENT = 0.01  # a figure with two digits; absolute
