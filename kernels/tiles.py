"""Tiles: what one is, which ones a kernel may run with, and a small analytical model that puts them in order."""

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
    """One specialisation of a conv kernel.

    BM: channels per tile, BN: pixels per tile, BK: reduction step, all in elements; `warps` per program, `stages` of
    the software pipeline; box: how BN pixels are cut out of [N, P, Q] as (TN, TH, TW), or None for the gather kernel,
    which takes BN consecutive pixels.

    splits: parts that the reduction is cut into, each summed by programs of its own; fprop and wgrad alone have them.

    wgrad: BM filters, BN channels of one filter tap, BK pixels per step and in a box; taps: neighbouring filter taps
    per program. The stem's: BN of a filter's values per product, all of them per program.

    persistent, fprop and dgrad of 1x1: programs per multiprocessor that go through the tiles (`kernels.persistent`); 0:
    one program a tile.
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
    """What the choice of a tile knows of a GPU: its name, multiprocessors, bytes of shared memory one program may take,
    compute capability."""

    name: str
    sms: int
    shared: int
    capability: tuple[int, int]


H200 = Gpu("NVIDIA H200", 132, 232448, (9, 0))

STEM_WINDOW = 32  # values of one row of the stem's filter: 8 pixels of 4 channels

# Per multiprocessor and cycle, on Hopper: 16-bit multiply-adds of wgmma, of the older mma (tiles of less than 64
# channels), of fp32 FMA; bytes from L2; bytes from and to memory. Per program: cycles of waiting for its first load and
# last store, as fitted to an H200's times by bench/predict.py, and of work that other programs can't hide.
WGMMA, MMA, FMA, L2, MEMORY, LATENCY, OVERHEAD = 2048, 1024, 128, 48, 18, 9500, 200

# Cycles that the small kernel behind a split sum adds: assumed, two microseconds. Parts that fprop's sum is cut into.
REDUCE, SPLITS = 4000, (1, 2, 4, 8, 16)

# Instructions of a thread per element of dz computed on load, per element of fprop's activation, as compiled; such
# instructions issued per cycle; bytes of shared memory for vectors and barriers.
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
    """Tiles for `conv_fprop`, the most promising first: BM output channels, BN output pixels.

    Ordered by a model: programs run in waves, a wave takes the longest of tensor-core, L2 and memory time. ieee: fp32
    products on the FMA units, which hold their operands in registers and so want small tiles. computed: tensors that
    the activation is computed from on load, which takes instructions and registers; 2 where it is the end of a block
    and stored as well. split: also tiles with splits, where there are fewer programs than multiprocessors; their sums
    are written and read once, by a second launch.
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
        # Addresses of pixels take registers: the widest tiles hold them only without a prologue on top of groups.
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
        shared = gpu.shared - computed * BN * BK * itemsize - SMALL  # the result, and where its store starts from
        tiles = math.ceil(outputs / BM) * problem.groups * pixel_tiles(problem, BN, box)
        programs = tiles * splits
        if parts > 1 and (steps < 2 or tiles >= gpu.sms or programs > 2 * gpu.sms):
            continue
        # Alone on a multiprocessor, a program hides its loads by itself.
        depth = 3 if programs > gpu.sms else 4 if computed and not tma else 6
        least = 2 if tma else 3  # with 1 operands load one after the other; with 2 the gather kernel spills
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
        met = int(not computed)  # a residual, perhaps
        found += persistent_tiles(problem, channels, outputs, max(computed, 1), met, computed * AFFINE, 4, gpu)
    return found


def stem_tiles(columns: ConvProblem, itemsize: int, tma: bool, gpu: Gpu = H200, ieee: bool = False) -> list[Tile]:
    """Tiles for `conv_stem`, which convolves as `columns` does, the most promising first: by TMA where that serves,
    then by pointers, which take one row of the filter at a step or two. Every program reads all filters: the widest
    tile does it for the most pixels."""
    by_pointers = fprop_tiles(columns, itemsize, False, gpu, ieee)
    if itemsize == 2:
        pairs = [replace(tile, BK=2 * tile.BK, stages=3) for tile in by_pointers]
        if gpu.capability < TMA:  # 64 pixels of one row spill 8 bytes there, at 80 registers
            by_pointers = [tile for tile in by_pointers if tile.BN != 64]
        by_pointers += [Tile(64, 256, STEM_WINDOW, 8, 3), *pairs]
    return (fprop_tiles(columns, itemsize, True, gpu, ieee) if tma else []) + by_pointers


def stem_wgrad_tiles(problem: ConvProblem, itemsize: int, gpu: Gpu = H200, ieee: bool = False) -> list[Tile]:
    """Tiles for `conv_stem_wgrad`, the most promising first: BM filters, BN of their values a product, BK pixels at a
    step, for the splits that fill one to three waves.

    By the instructions as compiled: one row of the filter a product takes the fewest, and neighbouring windows then
    stand in one request, which L2 answers once. wgmma holds no operand in registers and so takes longer steps.
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
            buffers = stages if gpu.capability >= TMA else stages - 1  # mma's operands leave shared memory first
            shared = buffers * (BM + values) * BK * itemsize + SMALL
            if shared > gpu.shared:
                continue
            resident = max(1, min(gpu.shared // shared, 65536 // (BM * values + 56 * 32 * warps)))
            programs = waves * gpu.sms * resident // math.ceil(problem.K / BM)
            splits = max(1, min(math.ceil(problem.pixels / BK), programs))
            tiles.append(Tile(BM, BN, BK, warps, stages, None, splits))
    return tiles


def row_channels(problem: ConvProblem) -> int:
    """C/groups where they are so few that a row of the filter makes a better reduction step than one tap; else 0."""
    channels = problem.C // problem.groups
    return channels if problem.S > 1 and channels < 16 else 0


def reduction_steps(problem: ConvProblem, tile: Tile) -> int:
    """Steps of BK that `conv_fprop` sums over."""
    if tile.box is None and row_channels(problem):
        return problem.R * math.ceil(problem.S * row_channels(problem) / tile.BK)
    return problem.R * problem.S * math.ceil(problem.C // problem.groups / tile.BK)


def best_box(problem: ConvProblem, pixels: int) -> tuple[int, int, int]:
    """The box of `pixels` output pixels."""
    if problem.pointwise:  # the pixels stand in one row
        return (1, 1, pixels)
    return cover(problem.N, problem.P, problem.Q, pixels)


@lru_cache(maxsize=4096)
def cover(N: int, P: int, Q: int, pixels: int) -> tuple[int, int, int]:
    """(TN, TH, TW), powers of two with product `pixels`, that cover [N, P, Q] with the least waste; among equals one
    with few images and a square of at most 8 x 8 pixels, because neighbours' windows overlap."""
    sides = [2**i for i in range(pixels.bit_length())]
    shapes = [(pixels // (h * w), h, w) for h in sides for w in sides if h * w <= pixels]

    def rank(box: tuple[int, int, int]) -> tuple[int, bool, int, int]:
        return boxes(N, P, Q, box), max(box[1:]) > 8, box[0], abs(box[1] - box[2])

    return min(shapes, key=rank)


def boxes(N: int, P: int, Q: int, box: tuple[int, int, int]) -> int:
    """How many boxes cover [N, P, Q]."""
    return math.ceil(N / box[0]) * math.ceil(P / box[1]) * math.ceil(Q / box[2])


def pixel_tiles(problem: ConvProblem, BN: int, box: tuple[int, int, int] | None) -> int:
    """How many tiles of BN output pixels a problem has."""
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
    """Tiles for `conv_dgrad`, the most promising first: BM input channels, BN input pixels of one class.

    operands: tensors read for dz, more than dy where dz is computed; epilogue: tensors that dx meets before it is
    stored. Either takes registers and so excludes the largest tiles. Ordered by the model of `fprop_tiles`.
    """
    channels, outputs = problem.K // problem.groups, problem.C // problem.groups
    rows, cols = math.ceil(problem.H / problem.stride), math.ceil(problem.W / problem.stride)
    BK = 128 // itemsize if tma else 16 if ieee else 32
    if ieee:
        shapes = [(64, 32, 4), (32, 64, 4)]
    elif not tma and channels < BK:  # a step goes through several taps, whose addresses take registers
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
        for stages in range(max(2, min(3, steps)), 0, -1):  # no more than there are steps: memory for other programs
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


# BM, BN, BK, warps of persistent programs.
PERSISTENT = [(64, 128, 64, 4), (64, 128, 64, 8), (64, 64, 64, 4), (64, 32, 64, 4), (128, 128, 64, 8)]
PERSISTENT += [(128, 128, 128, 8), (128, 64, 128, 8), (128, 32, 128, 4), (256, 64, 64, 8)]


def persistent_tiles(
    problem: ConvProblem, reduced: int, outputs: int, operands: int, met: int, instructions: int, width: int, gpu: Gpu
) -> list[Tile]:
    """The four most promising tiles for the programs of `kernels.persistent`: fprop and dgrad of a 1x1 convolution in
    16 bits, where `reduced` channels, a few steps, make `outputs`. Hopper's: Triton 3.6 compiles not all for Blackwell.

    operands: tensors that the second operand is made of, by `instructions` an element; met: tensors that the result
    meets before it is stored, which come ahead only where a step is as wide as a tile; width: bytes of a value stored,
    at most.
    """
    timed = []
    for BM, BN, BK, warps in PERSISTENT:
        if reduced > 256 or max(64, outputs) < BM or max(64, reduced) < BK or (met and BM != BK):
            continue
        steps, tiles_k, tiles = math.ceil(reduced / BK), math.ceil(outputs / BM), math.ceil(problem.pixels / BN)
        # In bytes. Of all that is read there are two, for the tiles ahead; then a step of wgmma's operand if it is
        # computed, else a third of it; the result, the filters.
        operand, result, sums = 2 * BN * BK * steps, 2 * BN * BM, BM * BN // (32 * warps)
        shared = 2 * (operands * operand + met * result) + (2 * BN * BK if instructions else operand)
        shared += result + 2 * BM * BK * steps + 1024
        registers = 16 + sums * 5 // 4 + sums * met + (24 + BK // 8) * steps * (instructions > 0)
        resident = min((gpu.shared + 1024) // (shared + 1024), 65536 // (32 * warps * registers))
        if shared + (width - 2) * BN * BM > gpu.shared or registers > 255:
            continue
        rounds = math.ceil(tiles / max(1, gpu.sms * resident // tiles_k))
        if rounds == 1:
            continue
        compute = BM * BN * BK * steps / WGMMA + instructions * BN * BK * steps / ISSUE
        memory = (1 + met) * result + operands * operand * min(1, BM / outputs)
        busy = max(compute, (operands * operand + (1 + met) * result) / L2, memory / MEMORY)
        cycles = rounds * resident * (busy + OVERHEAD) + LATENCY  # only the first tile is waited for
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
    """Tiles for `conv_wgrad`, the most promising first: BM filters, BN channels, BK pixels at a step.

    operands: tensors read for dz; prologue: whether the activation is computed. Ordered by the model of `fprop_tiles`
    for the splits that fill one to four waves, whose partial sums are written and read once. It knows nothing of
    stages: where both operands are plain and registers keep a program alone on its multiprocessor, a fourth is tried
    (of two tiles that fetch as much with the one of more channels).
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
            shapes += [(64, 64, 4, 3)] + ([(128, 64, 8, 3)] if operands + prologue < 4 else [])
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
        of_dz, of_a = (row, 1) if prologue and operands == 1 else (1, row)  # tiles per step; the computed one stays
        for stages in (3, 2, 1) if tma or operands < 3 else (2, 1):  # addresses of a third tensor take registers
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
    return [*dict.fromkeys(tile for _, tile in sorted(timed, key=lambda pair: pair[0]))]  # few steps: equal splits


def buffered(stages: int, operands: int) -> int:
    """Tiles of dz in shared memory: what it is computed from is held a stage less, and then the result."""
    return (stages - 1) * operands + 1 if operands > 1 else stages


def _cycles(programs: int, resident: int, busy: float, gpu: Gpu) -> float:
    """For programs that are busy so long, at most `resident` at a time on a multiprocessor."""
    resident = max(1, min(resident, math.ceil(programs / gpu.sms)))
    waves = programs / (gpu.sms * resident)
    waves = waves if waves > 8 else math.ceil(waves)
    return waves * max(resident * (busy + OVERHEAD), busy + LATENCY)
