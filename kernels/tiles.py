"""Tiles: the class, the candidates for each kernel, and a small analytical model that ranks the candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from ..capability import TMA
from .problem import ConvProblem


@dataclass(frozen=True)
class Tile:
    """The compile-time sizes of a convolution kernel.

    BM: channels per tile. BN: pixels per tile. BK: elements of the reduction per step.
    warps: warps per program. stages: stages of the software pipeline.
    box: (TN, TH, TW), the box of images, rows and columns that the pixels of a tile form, for kernels that load by TMA;
        TN TH TW = BN. None for kernels that load by pointers, where the pixels are consecutive.
    splits: the number of parts that the reduction is cut into. Different programs sum different parts. fprop and wgrad
        only.
    taps: wgrad only, neighbouring filter taps per program (1 or 3).
    persistent: 1x1 convolutions only, in fprop and dgrad: programs per multiprocessor, which loop over tiles
        (`kernels.persistent`). 0 stands for one program per tile.

    For wgrad, BM are filters, BN channels of one filter tap, and BK pixels per step, which form the box. For the stem's
    wgrad, BN are values of a filter per product; a program computes all values.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    box: tuple[int, int, int] | None = None
    splits: int = 1
    taps: int = 1
    persistent: int = 0


class Gpu(NamedTuple):
    """The properties of a GPU that the choice of a tile depends on.

    sms: multiprocessors. shared: bytes of shared memory available to one program. capability: compute capability.
    """

    name: str
    sms: int
    shared: int
    capability: tuple[int, int]


H200 = Gpu("NVIDIA H200", 132, 232448, (9, 0))

STEM_WINDOW = 32  # values of one row of the stem's filter: 8 pixels of 4 channels

# Rates on Hopper, per multiprocessor and cycle. WGMMA, MMA, FMA: multiply-adds of 2-byte operands, scaled by
# 2 / itemsize for others; MMA is the older instruction, for tiles of fewer than 64 channels; FMA is for fp32 products.
# L2: bytes from L2. MEMORY: bytes from and to memory. Cycles per program: LATENCY, the wait for the first load and the
# last store, fitted to an H200's times by bench/predict.py; OVERHEAD, work that other programs can't hide.
WGMMA, MMA, FMA, L2, MEMORY, LATENCY, OVERHEAD = 2048, 1024, 128, 48, 18, 9500, 200

# REDUCE: cycles of the kernel that adds up the splits, assumed to be two microseconds. SPLITS: candidates for fprop.
REDUCE, SPLITS = 4000, (1, 2, 4, 8, 16)

# Instructions per element computed on load, from compiled code: COMPUTED for dz, AFFINE for fprop's activation. ISSUE:
# such instructions per multiprocessor and cycle. SMALL: bytes of shared memory for vectors and barriers.
COMPUTED, AFFINE, ISSUE, SMALL = 10, 6, 128, 4096


def fprop_tiles(
    problem: ConvProblem,
    itemsize: int,
    tma: bool,
    gpu: Gpu = H200,
    ieee: bool = False,
    computed: int = 0,
    split: bool = False,
) -> list[Tile]:
    """Return the candidate tiles for `conv_fprop`, the most promising first: BM output channels, BN output pixels.

    A model ranks them: programs run in waves, and a wave takes the longest of its tensor-core, L2 and memory times.
    Persistent tiles, which only some problems have, come last, ranked among themselves.

    tma: True for tiles of the TMA kernel, False for those of the gather kernel.
    ieee: whether fp32 products run on FMA units, which keep their operands in registers and therefore require small
        tiles.
    computed: the number of tensors that a prologue computes the activation from: 0 without one; 1 for x; 2 for x and a
        shortcut (a join), where the activation is stored, too. Computing takes instructions and registers.
    split: also return tiles with splits, for shapes whose whole sums would give fewer programs than multiprocessors.
        The partial sums of the splits are written, and read again by a second launch.
    """
    channels, outputs = problem.C // problem.groups, problem.K // problem.groups
    if ieee:
        BK, shapes = 16, [(64, 64, 4), (32, 64, 4)]
    elif tma:
        BK = 128 // itemsize  # one swizzle span
        while problem.C % BK and not problem.pointwise:
            BK //= 2
        shapes = [(64, 128, 4), (64, 64, 4), (64, 32, 4), (128, 128, 8), (128, 64, 4), (256, 128, 8)]
        shapes += [(64, 256, 8)] if computed else [(64, 256, 4), (128, 256, 8)]
    else:
        BK = max(32 if itemsize == 1 else 16, min(64, _power_of_2(problem.S * row_channels(problem) or channels)))
        shapes = [(64, 64, 4), (64, 32, 4), (128, 64, 4)]
        # The addresses of pixels take registers: with groups and a prologue, there are too few for the widest tiles.
        shapes += [] if computed and problem.groups > 1 else [(64, 128, 8 if computed else 4), (128, 128, 8)]
    if not ieee:
        widths = (128, 64, 256) if tma else (64,) if computed else (128, 64)
        shapes += [(BM, BN, 4) for BM in (16, 32) for BN in widths if outputs <= BM]

    timed = []
    for (BM, BN, warps), parts in product(shapes, SPLITS if split else (1,)):
        box = best_box(problem, BN) if tma else None
        in_all = reduction_steps(problem, Tile(BM, BN, BK, warps, 1, box))
        steps = math.ceil(in_all / parts)
        splits = math.ceil(in_all / steps)
        step_bytes = (BM + max(computed, 1) * BN) * BK * itemsize
        # What is left for the pipeline besides the computed activation and, for a join, the buffer from which TMA
        # stores it.
        shared = gpu.shared - computed * BN * BK * itemsize - SMALL
        tiles = math.ceil(outputs / BM) * problem.groups * pixel_tiles(problem, BN, box)
        programs = tiles * splits
        if parts > 1 and (steps < 2 or tiles >= gpu.sms or programs > 2 * gpu.sms):
            continue
        # A program that is alone on its multiprocessor needs a deeper pipeline to hide its loads.
        depth = 3 if programs > gpu.sms else 4 if computed and not tma else 6
        least = 2 if tma else 3  # with 1, the operands are loaded one after the other; with 2, the gather kernel spills
        stages = min(depth, max(least, steps), shared // step_bytes)
        if stages < max(least, min(3, steps)) and BM * BN > 64 * 64:
            continue
        resident = max(1, min(shared // (stages * step_bytes), 65536 // (BM * BN + 64 * 32 * warps)))
        rate = (FMA if ieee else WGMMA if BM >= 64 else MMA) * 2 / itemsize
        compute = BM * BN * BK / rate
        compute = max(compute, computed * AFFINE * BN * BK / ISSUE)
        stored = min(BM, outputs)
        memory = itemsize * BN * (stored + max(computed, 1) * channels * stored / outputs)
        if computed == 2:
            memory += itemsize * BN * channels
        busy = max(steps * compute, steps * step_bytes / L2, memory / MEMORY)
        reduce = 0.0
        if splits > 1:
            busy += 4 * BN * stored / MEMORY
            reduce = 4 * problem.y_numel * splits / MEMORY / gpu.sms + REDUCE
        timed.append((_cycles(programs, resident, busy, gpu) + reduce, Tile(BM, BN, BK, warps, stages, box, splits)))
    found = [tile for _, tile in sorted(timed, key=lambda pair: pair[0])]
    if tma and problem.pointwise and itemsize == 2 and gpu.capability[0] == 9:
        residuals = int(not computed)  # without a prologue, the epilogue may add a residual
        found += persistent_tiles(problem, channels, outputs, max(computed, 1), residuals, computed * AFFINE, 4, gpu)
    return found


def stem_tiles(columns: ConvProblem, itemsize: int, tma: bool, gpu: Gpu = H200, ieee: bool = False) -> list[Tile]:
    """Return the candidate tiles for `conv_stem`, the most promising first.

    columns: the convolution that the kernel computes (`stem.stem_columns`). The tiles for TMA come first, if it can
    serve. The tiles for pointers follow; their steps cover one or two rows of the filter. Every program reads all
    filters, so these include a wide tile of 256 pixels, which reads them for the most pixels.
    """
    by_pointers = fprop_tiles(columns, itemsize, False, gpu, ieee)
    if itemsize == 2:
        pairs = [replace(tile, BK=2 * tile.BK, stages=3) for tile in by_pointers]
        if gpu.capability < TMA:  # tiles of 64 pixels and one row spill 8 bytes there, at 80 registers
            by_pointers = [tile for tile in by_pointers if tile.BN != 64]
        by_pointers += [Tile(64, 256, STEM_WINDOW, 8, 3), *pairs]
    return (fprop_tiles(columns, itemsize, True, gpu, ieee) if tma else []) + by_pointers


def stem_wgrad_tiles(problem: ConvProblem, itemsize: int, gpu: Gpu = H200, ieee: bool = False) -> list[Tile]:
    """Return the candidate tiles for `conv_stem_wgrad`, the most promising first, with splits for one to three waves.

    A tile has BM filters, BN of a filter's values per product and BK pixels per step. The order follows the compiled
    instructions: a product of one row of the filter (BN = 32) takes the fewest. Also, one request to L2 then loads
    several neighbouring windows, which overlap. wgmma keeps no operand in registers, which allows longer steps.
    """
    BM = max(16, min(64, _power_of_2(problem.K)))
    if ieee or itemsize > 2:
        shapes = [(32, 16, 8, 2)]
    elif gpu.capability >= TMA:
        shapes = [(32, 64, 4, 3), (32, 32, 4, 4), (64, 64, 8, 3), (32, 64, 8, 3), (256, 32, 8, 4)]
    else:
        shapes = [(32, 32, 4, 3), (32, 32, 4, 4), (32, 32, 4, 2)]
    tiles = []
    for waves in (1, 2, 3):
        for BN, BK, warps, stages in shapes:
            values = math.ceil(problem.R * STEM_WINDOW / BN) * BN
            buffers = stages if gpu.capability >= TMA else stages - 1  # mma first copies operands to registers
            shared = buffers * (BM + values) * BK * itemsize + SMALL
            if shared > gpu.shared:
                continue
            resident = max(1, min(gpu.shared // shared, 65536 // (BM * values + 56 * 32 * warps)))
            programs = waves * gpu.sms * resident // math.ceil(problem.K / BM)
            splits = max(1, min(math.ceil(problem.pixels / BK), programs))
            tiles.append(Tile(BM, BN, BK, warps, stages, None, splits))
    return tiles


def row_channels(problem: ConvProblem) -> int:
    """Return C/groups if a reduction step of the gather kernel covers a row of the filter, else 0 (one tap).

    With fewer than 16 channels per group, a single tap would not fill a step.
    """
    channels = problem.C // problem.groups
    return channels if problem.S > 1 and channels < 16 else 0


def reduction_steps(problem: ConvProblem, tile: Tile) -> int:
    """Return the number of steps of BK that `conv_fprop` sums over."""
    if tile.box is None and row_channels(problem):
        return problem.R * math.ceil(problem.S * row_channels(problem) / tile.BK)
    return problem.R * problem.S * math.ceil(problem.C // problem.groups / tile.BK)


def best_box(problem: ConvProblem, pixels: int) -> tuple[int, int, int]:
    """Return the best box (TN, TH, TW) of `pixels` output pixels."""
    if problem.pointwise:  # a plain GEMM, whose pixels are viewed as one row
        return (1, 1, pixels)
    return cover(problem.N, problem.P, problem.Q, pixels)


@lru_cache(maxsize=4096)
def cover(N: int, P: int, Q: int, pixels: int) -> tuple[int, int, int]:
    """Return the box (TN, TH, TW), powers of two with product `pixels`, that covers [N, P, Q] with the fewest boxes.

    Among equals, prefer sides of at most 8 pixels, then few images, then a square, because the windows of neighbouring
    pixels overlap.
    """
    sides = [2**i for i in range(pixels.bit_length())]
    shapes = [(pixels // (h * w), h, w) for h in sides for w in sides if h * w <= pixels]

    def rank(box: tuple[int, int, int]) -> tuple[int, bool, int, int]:
        return boxes(N, P, Q, box), max(box[1:]) > 8, box[0], abs(box[1] - box[2])

    return min(shapes, key=rank)


def boxes(N: int, P: int, Q: int, box: tuple[int, int, int]) -> int:
    """Return the number of boxes that cover [N, P, Q]."""
    return math.ceil(N / box[0]) * math.ceil(P / box[1]) * math.ceil(Q / box[2])


def pixel_tiles(problem: ConvProblem, BN: int, box: tuple[int, int, int] | None) -> int:
    """Return the number of tiles of BN output pixels that cover a problem."""
    if box is None or problem.pointwise:
        return math.ceil(problem.pixels / BN)
    return boxes(problem.N, problem.P, problem.Q, box)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def dgrad_tiles(
    problem: ConvProblem,
    itemsize: int,
    tma: bool,
    gpu: Gpu = H200,
    ieee: bool = False,
    operands: int = 1,
    epilogue: int = 0,
) -> list[Tile]:
    """Return the candidate tiles for `conv_dgrad`, the most promising first: BM input channels, BN pixels of one class.

    operands: the number of tensors read for dz, 1 (dy) or 2 (dy and z, so dz is computed). epilogue: the number of
    tensors of dx's shape that the epilogue reads. Both take registers and so exclude the largest tiles. The model of
    `fprop_tiles` ranks the tiles; persistent tiles, which only some problems have, come last.
    """
    channels, outputs = problem.K // problem.groups, problem.C // problem.groups
    rows, cols = math.ceil(problem.H / problem.stride), math.ceil(problem.W / problem.stride)
    BK = 128 // itemsize if tma else 16 if ieee else 32
    if ieee:
        shapes = [(64, 32, 4), (32, 64, 4)]
    elif not tma and channels < BK:  # a step covers several taps, whose addresses take registers
        shapes = [(64, 64, 4)]
    else:
        shapes = [(64, 128, 4), (64, 64, 4), (128, 128, 8)]
        shapes += [(128, 64, 4), (64, 128, 8), (64, 256, 8)] if tma else []
        shapes += [(128, 256, 8), (256, 128, 8)] if tma and operands == 1 and not epilogue else []
    shapes += [(BM, 64, 4) for BM in (16, 32) if outputs <= BM and not ieee]
    steps = math.ceil(problem.R * problem.S / problem.stride**2) * math.ceil(channels / BK)

    timed = []
    for BM, BN, warps in shapes:
        if problem.pointwise:
            box, pixels = (1, 1, BN), math.ceil(problem.pixels / BN)
        else:
            box = cover(problem.N, rows, cols, BN)
            pixels = boxes(problem.N, rows, cols, box) if tma else math.ceil(problem.N * rows * cols / BN)
        for stages in range(max(2, min(3, steps)), 0, -1):  # 2 suffice for few steps; fewer if memory is short
            shared = (stages * BM + buffered(stages, operands) * BN) * BK * itemsize + SMALL
            if max(shared, BM * BN * itemsize) <= gpu.shared:
                break
        else:
            continue
        resident = max(1, min(gpu.shared // shared, 65536 // (BM * BN + 64 * 32 * warps)))
        rate = (FMA if ieee else WGMMA if BM >= 64 else MMA) * 2 / itemsize
        compute = BM * BN * BK / rate + (COMPUTED * BN * BK / ISSUE if operands > 1 else 0)
        memory = itemsize * (BM * BN * (1 + epilogue) + operands * BN * channels * BM / outputs)
        busy = max(steps * compute, steps * (BM + operands * BN) * BK * itemsize / L2, memory / MEMORY)
        programs = math.ceil(outputs / BM) * problem.groups * problem.stride**2 * pixels
        tile = Tile(BM, BN, BK, warps, stages, box if tma else None)
        timed.append((_cycles(programs, resident, busy, gpu), tile))
    found = [tile for _, tile in sorted(timed, key=lambda pair: pair[0])]
    if tma and problem.pointwise and itemsize == 2 and gpu.capability[0] == 9:
        instructions = COMPUTED if operands > 1 else 0
        found += persistent_tiles(problem, channels, outputs, operands, epilogue, instructions, 2, gpu)
    return found


# Candidate (BM, BN, BK, warps) of persistent programs.
PERSISTENT = [(64, 128, 64, 4), (64, 128, 64, 8), (64, 64, 64, 4), (64, 32, 64, 4), (128, 128, 64, 8)]
PERSISTENT += [(128, 128, 128, 8), (128, 64, 128, 8), (128, 32, 128, 4), (256, 64, 64, 8)]


def persistent_tiles(
    problem: ConvProblem, reduced: int, outputs: int, operands: int, added: int, instructions: int, width: int, gpu: Gpu
) -> list[Tile]:
    """Return the most promising tiles, at most four, for `kernels.persistent`: fprop or dgrad of a 1x1, 16 bits.

    Call this for Hopper only, because Triton 3.6 does not compile all of them for Blackwell.

    reduced: the number of channels that are summed over. If there are more than 256, a sum takes too many steps, and
        the list is empty.
    outputs: the number of channels of the result.
    operands: the number of tensors that the second operand is read or computed from.
    instructions: instructions per element to compute it, 0 if it is only read.
    added: the number of tensors that the epilogue reads. They are loaded ahead only if BM = BK (`load_ahead`).
    width: the largest size in bytes of a stored value.
    """
    timed = []
    for BM, BN, BK, warps in PERSISTENT:
        if reduced > 256 or max(64, outputs) < BM or max(64, reduced) < BK or (added and BM != BK):
            continue
        steps, tiles_k, tiles = math.ceil(reduced / BK), math.ceil(outputs / BM), math.ceil(problem.pixels / BN)
        # Shared memory in bytes: two buffers for all that is read per tile; for the operand that wgmma reads, one more
        # step if it is computed and a third buffer if not; the result; the filters.
        operand, result, sums = 2 * BN * BK * steps, 2 * BN * BM, BM * BN // (32 * warps)
        shared = 2 * (operands * operand + added * result) + (2 * BN * BK if instructions else operand)
        shared += result + 2 * BM * BK * steps + 1024
        registers = 16 + sums * 5 // 4 + sums * added + (24 + BK // 8) * steps * (instructions > 0)
        resident = min((gpu.shared + 1024) // (shared + 1024), 65536 // (32 * warps * registers))
        if shared + (width - 2) * BN * BM > gpu.shared or registers > 255:
            continue
        tiles_each = math.ceil(tiles / max(1, gpu.sms * resident // tiles_k))
        if tiles_each == 1:
            continue
        compute = BM * BN * BK * steps / WGMMA + instructions * BN * BK * steps / ISSUE
        memory = (1 + added) * result + operands * operand * min(1, BM / outputs)
        busy = max(compute, (operands * operand + (1 + added) * result) / L2, memory / MEMORY)
        cycles = tiles_each * resident * (busy + OVERHEAD) + LATENCY  # only the first tile waits for its loads
        timed.append((cycles, Tile(BM, BN, BK, warps, 3, (1, 1, BN), persistent=resident)))
    return [tile for _, tile in sorted(timed, key=lambda pair: pair[0])][:4]


def wgrad_tiles(
    problem: ConvProblem,
    itemsize: int,
    tma: bool,
    gpu: Gpu = H200,
    ieee: bool = False,
    operands: int = 1,
    prologue: bool = False,
) -> list[Tile]:
    """Return the candidate tiles for `conv_wgrad`, the most promising first: BM filters, BN channels, BK pixels a step.

    operands: the number of tensors read for dz, 1 (dy) or 2 (dy and z). prologue: whether the activation is computed.

    The model of `fprop_tiles` ranks the tiles, each with the splits that fill one to four waves; the partial sums of
    splits are written and read once. The model does not depend on the number of stages. If TMA loads the operands,
    neither of them is computed and a program needs more than half of the registers, then a tile with one more stage, if
    shared memory allows it, is a candidate, too. Of the shapes 128 x 256 and 256 x 128, which load the same number of
    bytes, only the one with more channels gets it.
    """
    channels, outputs = problem.C // problem.groups, problem.K // problem.groups
    taps = problem.R * problem.S
    one_tap, plain = tma or channels >= 64, operands == 1 and not prologue
    if ieee:
        BK, shapes = 16, [(64, 32, 4, 1), (32, 32, 4, 1)]
    else:
        BK = 128 // itemsize if tma else 32
        shapes = [(64, 64, 4, 1), (64, 128, 4, 1), (128, 64, 4, 1), (128, 128, 8, 1)]
        if tma and problem.S == 3 and itemsize == 2:
            shapes += [(64, 64, 4, 3), (128, 64, 8, 3)]
            shapes += [(128, 128, 8, 3)] if plain else []
        shapes += [(128, 256, 8, 1), (256, 128, 8, 1)] if tma and itemsize == 2 else []
        shapes += [(BM, BN, 4, 1) for BM in (16, 32) for BN in (16, 32, 64) if outputs <= BM] if not tma else []

    timed = []
    for BM, BN, warps, row in shapes:
        box = (1, 1, BK) if problem.pointwise else cover(problem.N, problem.P, problem.Q, BK)
        steps = math.ceil(problem.pixels / BK)
        if tma and not problem.pointwise:
            steps = boxes(problem.N, problem.P, problem.Q, box)
        columns = math.ceil(channels / BN) * taps // row if one_tap else math.ceil(channels * taps / BN)
        tiles = math.ceil(outputs / BM) * columns * problem.groups
        computed = (BM if operands > 1 else 0) + (BN if prologue else 0)
        # Tiles of dz and of a that a step loads for a row of taps. One operand stays in place for all taps: a if only a
        # is computed, else dz.
        of_dz, of_a = (row, 1) if prologue and operands == 1 else (1, row)
        for stages in (3, 2, 1):
            buffers = buffered(stages, operands) * of_dz * BM + stages * of_a * BN
            shared = buffers * BK * itemsize + SMALL
            if shared <= gpu.shared:
                break
        else:
            continue
        by_registers = 65536 // (BM * BN * row + 64 * 32 * warps)
        resident = max(1, min(gpu.shared // shared, by_registers))
        deeper = tma and plain and by_registers < 2 and max(128, BN) >= BM
        deeper = deeper and (shared - SMALL) // stages * (stages + 1) + SMALL <= gpu.shared
        rate = (FMA if ieee else WGMMA if min(BM, BN) >= 64 else MMA) * 2 / itemsize
        step_bytes = (BM * operands * of_dz + BN * of_a) * BK * itemsize
        step = max(row * BM * BN * BK / rate + COMPUTED * computed * BK / ISSUE, step_bytes / L2)
        for waves in (1, 2, 3, 4):
            splits = min(steps, max(1, waves * gpu.sms * resident // tiles))
            busy = math.ceil(steps / splits) * step + row * BM * BN * 4 / MEMORY
            reduce = 2 * 4 * problem.w_numel * splits / MEMORY / gpu.sms + REDUCE if splits > 1 else 0
            cycles = _cycles(tiles * splits, resident, busy, gpu) + reduce
            for depth in (stages, stages + 1) if deeper else (stages,):
                timed.append((cycles, Tile(BM, BN, BK, warps, depth, box if tma else None, splits, row)))
    # If steps are few, different numbers of waves give equal splits: keep each tile once.
    return [*dict.fromkeys(tile for _, tile in sorted(timed, key=lambda pair: pair[0]))]


def buffered(stages: int, operands: int) -> int:
    """Return the number of buffers for tiles of dz in shared memory.

    If dz is only read (operands = 1), that is one per stage. If it is computed, each of its operands needs stages - 1
    buffers, and the result needs one.
    """
    return (stages - 1) * operands + 1 if operands > 1 else stages


def _cycles(programs: int, resident: int, busy: float, gpu: Gpu) -> float:
    """Return the estimated cycles of a launch of `programs` programs that take `busy` cycles of a multiprocessor each.

    At most `resident` programs share a multiprocessor. Up to eight waves are rounded up to whole waves.
    """
    resident = max(1, min(resident, math.ceil(programs / gpu.sms)))
    waves = programs / (gpu.sms * resident)
    waves = waves if waves > 8 else math.ceil(waves)
    return waves * max(resident * (busy + OVERHEAD), busy + LATENCY)
