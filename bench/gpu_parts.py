"""The parts of `bench/gpu.py`: their commands and time limits, and the plans that put them in order.

The limits are 1.3 to 2 times what an H200 took or is expected to take, with 14 processes for tests and compilation, so
that a part that hangs costs little more time than one that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLAN_S = 585  # seconds that a plan's parts take; the rest of ten minutes is for starting it and packing the results
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "-v", "--tb=short", "--continue-on-collection-errors"]
PYTEST += ["-m", "not slow"]  # includes the cases marked extra; a later -m replaces it


@dataclass(frozen=True)
class Part:
    """A command with a time limit.

    command: the arguments to Python. gpu.py replaces {out}, {jobs} and {seconds}.
    seconds: the time limit.
    watch: a command under which Python runs, such as a sanitizer.
    proof: whether later measurements are worthless if this part fails.
    """

    command: Sequence[str]
    seconds: float = 480
    watch: Sequence[str] = ()
    proof: bool = False


def checks(*arguments: str, seconds: float = 480, watch: Sequence[str] = (), proof: bool = False) -> Part:
    """Return a part that runs tests with these arguments to pytest."""
    return Part([*PYTEST, *arguments], seconds, watch, proof)


def bench(*arguments: str, record: str = "record", seconds: float = 480) -> Part:
    """Return a part that runs bench/run.py. Parts with the same record add rows to one file.

    The patience for a row is two minutes, or half of the limit if that is longer.
    """
    shared = ["--resume", "--json", f"{{out}}/{record}.json", "--patience", f"{max(120, seconds / 2):.0f}"]
    return Part(["bench/run.py", *shared, *arguments], seconds)


def tune(depth: str, *arguments: str, seconds: float = 480) -> Part:
    """Return a part that runs bench/tune.py."""
    command = ["bench/tune.py", "--depth", depth, *arguments]
    return Part([*command, "--jobs", "{jobs}", "--seconds", "{seconds}"], seconds)


def timeline(mode: str, backend: str, seconds: float) -> Part:
    """Return a part that runs bench/timeline.py."""
    command = ["bench/timeline.py", "--net", "resnet50", "--mode", mode, "--backend", backend]
    return Part([*command, "--csv", f"{{out}}/timeline-{mode}.csv"], seconds)


def counters(mode: str, seconds: float) -> Part:
    """Return a part that runs bench/counters.py."""
    return Part(["bench/counters.py", "--mode", mode, "--csv", f"{{out}}/counters-{mode}.csv"], seconds)


def kernels(depth: str, seconds: float) -> Part:
    """Return a part that runs bench/kernels.py."""
    return Part(["bench/kernels.py", "--depth", depth, "--csv", f"{{out}}/kernels-{depth}.csv"], seconds)


STATUS = ["-m", "fastres", "status"]
KERNELS = [f"tests/kernels/test_{name}.py" for name in ("fprop", "conv_backward", "batch_norm", "chain")]
KERNELS += [f"tests/kernels/test_{name}.py" for name in ("persistent", "stem")]
NETS = [f"tests/ops/test_{name}.py" for name in ("training", "operators")] + ["tests/compile"]
NETS += [f"tests/inference/test_{name}.py" for name in ("program", "optimized", "float8")]
OTHERS = ["tests", *(f"--ignore={file}" for file in (*KERNELS, *NETS, "tests/kernels/test_layers.py"))]
ON_GPU = ["-m", "(gpu or interpret) and not slow"]
# Every launch of ResNet-50 in bf16, with each tile that tuning tries, and the operator of option A.
OF_50 = "resnet50 and bfloat16"
FIRST = [f"tests/{name}.py" for name in ("kernels/test_layers", "kernels/test_shortcut", "ops/test_extension")]
FIRST += ["-k", f"({OF_50}) or cuda"]
FIRST_REST = ["tests/kernels/test_layers.py", "-m", "gpu and not slow", "-k", f"not ({OF_50})"]
# Whole nets at real sizes: 200 steps compared with stock PyTorch, identical bits in 20 runs, peak memory.
CURVES = ["tests/ops/test_training.py", "tests/ops/test_determinism.py", "-m", "gpu and not slow"]
CURVES += ["-k", "200_steps or 20_runs or peak_memory"]
# The sanitizer follows every kernel at small sizes, in all of pytest's processes, and names the kernel in its reports.
SANITIZER = ["compute-sanitizer", "--target-processes", "all", "--max-connections", "64"]
SANITIZER += ["--error-exitcode", "9", "--show-backtrace", "no", "--print-limit", "2000"]
# PyTorch's allocator doesn't pool memory here (gpu.py), and padding separates allocations, so that accesses out of
# bounds are seen. An error of the API raises an exception in Python anyway.
MEMCHECK = [*SANITIZER, "--tool", "memcheck", "--padding", "512", "--report-api-errors", "no"]
# Hazards in shared memory only: a report for each pair of conflicting accesses of a kernel, with their number.
RACECHECK = [*SANITIZER, "--tool", "racecheck", "--racecheck-report", "analysis"]

TRAIN_50, INFER_50 = (["--depth", "50", "--mode", mode] for mode in ("train", "infer"))
# The strongest peers and fastres. The other backends have their own parts, and max-autotune compiles for minutes.
TRAIN = "eager-channels-last,inductor,timm,eager-graph,fastres,fastres-graph"
INFER = "eager-channels-last,inductor,reduce-overhead,timm,fastres,fastres-optimize,fastres-optimize-fp8"
ONE_IMAGE = "eager-channels-last,inductor,reduce-overhead,fastres-optimize"
OTHER_TRAIN = "eager,timm-inductor,reduce-overhead,cudagraphs,fastres-compile"
OTHER_INFER = "eager,aot-eager,timm-inductor,cudagraphs,fastres-compile,fastres-inductor"
GRAPHS = "eager-channels-last,eager-graph,reduce-overhead,fastres,fastres-graph"
# The other depths in one call, with the strongest peer, eager PyTorch and fastres.
OTHER_DEPTHS = ["--net", "resnet18,resnet34,resnet101,resnet152"]
DEEP_TRAIN, DEEP_INFER = "inductor,eager-graph,fastres-graph", "inductor,eager-channels-last,fastres-optimize"
AUTOTUNE = "max-autotune,max-autotune-no-cudagraphs"

PARTS: dict[str, Part] = {
    "status": Part(STATUS, 25),
    "tests-first": checks(*FIRST, seconds=140, proof=True),
    "bench-first-train": bench(
        *TRAIN_50, "--backend", "inductor,eager-graph,fastres-graph", record="first", seconds=190
    ),
    "bench-first-infer": bench(
        *INFER_50, "--backend", "inductor,eager-channels-last,fastres-optimize", record="first", seconds=130
    ),
    "tests-first-rest": checks(*FIRST_REST, seconds=140),
    "tests-graph": checks(
        "tests/test_cuda_graph.py", "tests/ops/test_side_stream.py", "-m", "gpu and not slow", seconds=60
    ),
    "tests-kernels": checks(*KERNELS, "-k", "not every_tile", seconds=130),
    "tests-tiles-50": checks(
        *KERNELS[:2], "-k", "every_tile and bfloat16 and not resnet18 and not resnext", seconds=130
    ),
    "tests-nets": checks(*NETS, *ON_GPU, seconds=130),
    "tests-gpu": checks(*OTHERS, *ON_GPU),
    "tune-50": tune("50", seconds=255),
    "tune-all": tune("all", seconds=300),
    "tune-50-batch-1": tune("50", "--batch", "1", "--pass", "infer", seconds=100),
    "tests-tuned": checks("tests/kernels/test_layers.py", "-k", OF_50, seconds=120, proof=True),
    "bench-train-50": bench(*TRAIN_50, "--backend", TRAIN, seconds=330),
    "bench-infer-50": bench(*INFER_50, "--backend", INFER, seconds=270),
    "bench-infer-50-batch-1": bench(*INFER_50, "--batch", "1", "--backend", ONE_IMAGE, seconds=130),
    "kernels-50": kernels("50", 50),
    "timeline-train-50": timeline("train", "fastres-graph", 60),
    "timeline-infer-50": timeline("infer", "fastres-optimize", 60),
    "counters-train-50": counters("train", 150),
    "counters-infer-50": counters("infer", 120),
    "memory-bound": Part(["bench/memory_bound.py"], 70),
    "hopper": Part(["bench/hopper.py", "--markdown", "{out}/hopper.md"], 40),
    "ablate-50": Part(["bench/ablate.py", "--depth", "50", "--seconds", "5", "--json", "{out}/ablation-50.json"], 240),
    "bench-train-50-switches": bench(
        *TRAIN_50, "--backend", "fastres-graph,fastres-graph-keep,fastres-graph-overlap", record="switches", seconds=170
    ),
    "bench-train-50-fp16": bench(
        *TRAIN_50, "--dtype", "fp16", "--backend", "eager-channels-last,fastres-graph", seconds=120
    ),
    "bench-infer-50-fp16": bench(
        *INFER_50, "--dtype", "fp16", "--backend", "eager-channels-last,reduce-overhead,fastres-optimize", seconds=130
    ),
    "bench-train-50-batch-32": bench(*TRAIN_50, "--batch", "32", "--backend", TRAIN),
    "bench-infer-50-batch-32": bench(*INFER_50, "--batch", "32", "--backend", INFER),
    "bench-train-50-others": bench(*TRAIN_50, "--backend", OTHER_TRAIN),
    "bench-infer-50-others": bench(*INFER_50, "--backend", OTHER_INFER),
    "bench-cifar": bench("--net", "cifar-20,cifar-110", "--mode", "train", "--batch", "128", "--backend", GRAPHS),
    "bench-option-a": bench("--net", "paper-34-A", "--mode", "train", "--backend", f"{GRAPHS},inductor"),
    "bench-cifar-1202": bench("--net", "cifar-1202", "--mode", "train", "--batch", "32", "--backend", GRAPHS),
    "tests-memcheck": checks("tests/kernels/test_sanitized.py", seconds=120, watch=MEMCHECK),
    "tests-racecheck": checks("tests/kernels/test_sanitized.py", seconds=120, watch=RACECHECK),
    "tests-curves": checks(*CURVES, seconds=150),
    "tests-tiles": checks(*KERNELS, "-k", "every_tile"),
    "bench-infer-50-autotune": bench(*INFER_50, "--backend", AUTOTUNE),
    "bench-train-50-autotune": bench(*TRAIN_50, "--backend", AUTOTUNE),
    "kernels-18": kernels("18", 50),
    "bench-train-depths": bench(*OTHER_DEPTHS, "--mode", "train", "--backend", DEEP_TRAIN, seconds=580),
    "bench-infer-depths": bench(*OTHER_DEPTHS, "--mode", "infer", "--backend", DEEP_INFER, seconds=450),
    "bench-infer-all": bench("--depth", "all", "--mode", "infer"),
    "bench-train-all": bench("--depth", "all", "--mode", "train"),
    "bench-infer-all-batch-32": bench("--depth", "all", "--mode", "infer", "--batch", "32"),
    "bench-infer-all-batch-1": bench("--depth", "all", "--mode", "infer", "--batch", "1"),
    "bench-train-all-batch-32": bench("--depth", "all", "--mode", "train", "--batch", "32"),
    "degradation": Part(["-m", "fastres", "experiment", "degradation", "--out", "{out}/degradation"]),
    "tests-others": checks("tests", "-m", "not gpu and not interpret and not slow"),
    "shortcut": Part(["-m", "pytest", "-p", "no:cacheprovider", "bench/shortcut.py", "--benchmark-only"]),
}


@dataclass(frozen=True)
class Plan:
    """Parts that together take at most `PLAN_S` seconds, and spare parts that run if time is left."""

    says: str
    parts: tuple[str, ...]
    spare: tuple[str, ...]


PLANS = {
    1: Plan(
        "proof and a first number",
        ("status", "tests-first", "bench-first-train", "bench-first-infer"),
        ("tests-first-rest", "tests-graph", "tests-kernels", "tests-tiles-50"),
    ),
    2: Plan("tiles", ("tune-all", "tests-tuned", "timeline-train-50"), ("kernels-50", "memory-bound")),
    3: Plan(
        "the record of training, what each fusion is worth",
        ("bench-train-50", "ablate-50"),
        ("bench-train-50-switches", "bench-train-50-fp16"),
    ),
    4: Plan(
        "tiles for one image, the record of inference, each layer on its own",
        ("tune-50-batch-1", "bench-infer-50", "bench-infer-50-batch-1", "kernels-50"),
        ("timeline-infer-50", "hopper", "memory-bound"),
    ),
    5: Plan("training at every other depth", ("bench-train-depths",), ("timeline-train-50",)),
    6: Plan("inference at every other depth", ("bench-infer-depths",), ("bench-infer-50-fp16",)),
    7: Plan(
        "sanitizers, curves, counters",
        ("tests-memcheck", "tests-racecheck", "tests-curves", "counters-train-50"),
        ("counters-infer-50",),
    ),
}

ON_CPU = {"train": "eager-channels-last,fastres", "infer": "eager-channels-last,fastres,fastres-optimize"}


def rehearsed(command: Sequence[str]) -> list[str]:
    """Return what a part's command becomes without a GPU.

    Tests run as they are, measurements are reduced to tiny sizes, and for commands that can't run at all only the
    command line is checked (--help).
    """
    tiny = ["--batch", "1", "--size", "32"]
    if command[0] == "bench/run.py":
        mode = command[command.index("--mode") + 1]
        batch = "1" if "--batch" in command and command[command.index("--batch") + 1] == "1" else "2"
        where = ["--device", "cpu", "--dtype", "fp32", "--batch", batch, "--size", "64", "--seconds", "0.05"]
        return [*command, *where, "--isolate", "--backend", ON_CPU[mode]]
    if command[0] == "bench/tune.py":
        return ["bench/rehearse.py", *command, *tiny, "--tiles", "1"]
    if command[0] == "bench/kernels.py":
        return ["bench/rehearse.py", *command, *tiny]
    # On a GPU, FIRST makes every launch of ResNet-50. Here, some of these go to a stub driver, which runs nothing.
    if command[len(PYTEST) :] == FIRST:
        return [*command, "-m", "slow or not slow", "-k", "(driver and resnet50-1) or cuda"]
    runs = command[: len(PYTEST)] == PYTEST or command == STATUS
    return [*command] if runs else [*command, "--help"]
