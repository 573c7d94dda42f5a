"""`dispatch` chooses each engine for the documented reason.

The GPU is simulated, and nothing runs. test_onednn_served.py checks what oneDNN serves on a CPU.
"""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conv_cases import put
from torch import Tensor, nn

import fastres
from fastres.kernels import checks, tables
from fastres.kernels.problem import FLOATS, ConvProblem
from fastres.kernels.tables import Measurement
from fastres.kernels.tiles import H200, Gpu, Tile
from fastres.ops import dispatch
from fastres.ops.dispatch import BACKENDS, Candidate, Engines, Fusions
from fastres.ops.quantised import FLOAT8

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
H100 = H200._replace(name="NVIDIA H100 80GB HBM3")
SQUARE = ConvProblem(8, 14, 14, 64, 64, 3, 3, 1, 1)
ARITHMETIC = ConvProblem(256, 15, 15, 256, 256, 3, 3, 1, 1)  # compute-bound; in no table
MEMORY = ConvProblem(256, 57, 57, 64, 64)
STEM = ConvProblem(32, 224, 224, 3, 64, 7, 7, 2, 3)


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate an H200 with only the shipped table, no interpreter, and oneDNN for all dtypes.

    Calling the fixture's value with a `Gpu` simulates that one instead.
    """
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: None)

    def found(gpu: Gpu) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu.capability)
        monkeypatch.setattr(checks, "_gpu", lambda _: gpu)
        tables.forget_tables()

    found(H200)
    yield found
    tables.forget_tables()


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_an_unknown_backend_is_refused_with_those_accepted() -> None:
    accepted = "unknown backend 'fastest'; accepted: 'auto', 'triton', 'cudnn', 'reference'"
    with pytest.raises(ValueError, match=accepted), fastres.backend("fastest"):
        pass


def test_an_unknown_fusion_is_refused_with_those_accepted() -> None:
    accepted = ", ".join(field.name for field in fields(Fusions))
    with pytest.raises(ValueError, match=f"unknown fusion blocks, pool; accepted: {accepted}$"):  # noqa: SIM117
        with dispatch.fusions(prologue=False, pool=True, blocks=True):
            pass


def test_a_context_ends_with_its_block() -> None:
    def in_force() -> tuple[bool, Fusions]:
        return dispatch.wants_reference(), dispatch.engines(SQUARE, BF16, CUDA).fusions

    def nested() -> None:
        with fastres.backend("reference"), dispatch.fusions(prologue=False):
            with fastres.backend("cudnn"), dispatch.fusions(statistics=False):
                assert in_force() == (False, Fusions(statistics=False, prologue=False))
            assert in_force() == (True, Fusions(prologue=False))
            raise KeyError

    with pytest.raises(KeyError):
        nested()
    assert in_force() == (False, Fusions())


def test_a_backend_holds_for_its_own_thread() -> None:
    answers = []
    with fastres.backend("reference"):
        thread = threading.Thread(target=lambda: answers.append(dispatch.wants_reference()))
        thread.start()
        thread.join()
    assert answers == [False]


def test_every_setting_that_engines_depend_on_changes_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {dispatch.choice(FP32, CUDA)}
    for name in BACKENDS:
        with fastres.backend(name):
            choices.add(dispatch.choice(FP32, CUDA))
    for field in fields(Fusions):
        with dispatch.fusions(**{field.name: not field.default}):
            choices.add(dispatch.choice(FP32, CUDA))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choices.add(dispatch.choice(FP32, CUDA))
    assert len(choices) == len(BACKENDS) + len(fields(Fusions)) + 1


@pytest.mark.parametrize(
    ("backend", "switches", "fuses"),
    [
        ("auto", {}, True),
        ("triton", {}, True),
        ("cudnn", {}, False),
        ("reference", {}, False),
        ("auto", {"block_end": False}, False),
        ("cudnn", {"recompute": True}, True),
    ],
)
def test_blocks_are_fused_for_kernels_or_to_save_memory(backend: str, switches: dict[str, bool], fuses: bool) -> None:
    with fastres.backend(backend), dispatch.fusions(**switches):
        assert dispatch.fuses_blocks() == fuses


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((8, 0), True, None),
        ((7, 5), True, "compute capability 7.5 is below 8.0"),
        ((9, 0), False, "Triton is not installed"),
    ],
)
def test_a_gpu_without_kernels_runs_plain(
    capability: tuple[int, int], triton: bool, reason: str | None, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(H200._replace(capability=capability))
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    assert dispatch.why_unfused(FP32, CUDA) == reason
    assert dispatch.passes_engine(FP32, CUDA) == ("triton" if reason is None else "aten")
    if reason is not None:
        assert dispatch.why_engine("infer", SQUARE, BF16, CUDA) == ("cudnn", reason)
        with fastres.backend("triton"), pytest.raises(RuntimeError, match=reason):
            dispatch.why_unfused(FP32, CUDA)


def test_there_are_kernels_for_three_dtypes_on_a_gpu() -> None:
    assert [dispatch.why_unfused(dtype, CUDA) for dtype in (FP32, BF16, FP16)] == [None] * 3
    assert dispatch.why_unfused(torch.float64, CUDA) == "there are no fused kernels for torch.float64"
    assert dispatch.why_engine("fprop", SQUARE, torch.float64, CUDA)[0] == "cudnn"
    assert dispatch.passes_engine(torch.float64, CUDA) == "aten"


def test_dispatch_knows_the_dtypes_of_the_kernels() -> None:
    """`dispatch` has its own list, because importing it must not load the kernels."""
    assert {*dispatch._DTYPES} == {*FLOATS}


def test_there_are_no_kernels_on_a_cpu_without_the_interpreter() -> None:
    assert dispatch.why_unfused(FP32, CPU) == "there are no fused kernels for cpu"
    assert dispatch.why_engine("fprop", SQUARE, FP32, CPU) == ("aten", "there are no fused kernels for cpu")
    assert dispatch.passes_engine(FP32, CPU) == "aten"
    with fastres.backend("triton"), pytest.raises(RuntimeError, match="for cpu; use a CUDA GPU or TRITON_INTERPRET=1"):
        dispatch.why_unfused(FP32, CPU)


def test_the_interpreter_serves_only_a_forced_triton_backend(interpreter: None) -> None:
    reason = "Triton's interpreter is used only under backend('triton')"
    assert dispatch.why_unfused(FP32, CPU) == reason
    assert dispatch.why_engine("fprop", SQUARE, FP32, CPU) == ("aten", reason)
    with fastres.backend("triton"):
        assert dispatch.why_unfused(FP32, CPU) is None
        assert dispatch.why_engine("fprop", SQUARE, FP32, CPU) == ("triton", "backend('triton')")
        assert dispatch.passes_engine(FP32, CPU) == "triton"
        assert dispatch.why_unfused(BF16, META) is None, "nothing is multiplied there"
        with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly; use a CUDA GPU, float16"):
            dispatch.why_engine("fprop", SQUARE, BF16, CPU)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_reference_serves_every_dtype_by_the_library(device: torch.device) -> None:
    library = "cudnn" if device == CUDA else "aten"
    with fastres.backend("reference"):
        for dtype in (FP32, BF16, torch.float64, torch.int8, FLOAT8):
            assert dispatch.why_engine("infer", SQUARE, dtype, device) == (library, "backend('reference')")
            assert dispatch.why_unfused(dtype, device) is None
        assert dispatch.passes_engine(BF16, device) == "aten"
        assert not dispatch.optimizes_by_onednn(FP32, CPU)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_onednn_computes_inference_on_a_cpu_that_supports_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatch.why_engine("infer", SQUARE, dtype, CPU) == ("onednn", "one fused primitive")
    assert dispatch.conv_engine("fprop", SQUARE, dtype, CPU) == "aten", "training"
    assert dispatch.optimizes_by_onednn(dtype, CPU)
    assert not dispatch.optimizes_by_onednn(dtype, CUDA)
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: f"not {dtype}")
    assert dispatch.why_engine("infer", SQUARE, dtype, CPU) == ("aten", f"not {dtype}")
    assert not dispatch.optimizes_by_onednn(dtype, CPU)


def test_onednn_computes_int8_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.why_no_int8(CPU) is None
    assert dispatch.why_engine("infer", SQUARE, torch.int8, CPU) == ("onednn", "8 bits")
    none = "there are no int8 convolutions for cuda"
    assert dispatch.why_no_int8(CUDA) == none
    assert dispatch.why_engine("infer", SQUARE, torch.int8, CUDA) == ("cudnn", none)
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: f"no {dtype}")
    assert dispatch.why_engine("infer", SQUARE, torch.int8, CPU) == ("aten", "no torch.int8")


def test_our_kernels_compute_float8_unless_cudnn_is_forced() -> None:
    why = dispatch.why_engine("infer", ARITHMETIC, FLOAT8, CUDA)
    assert why == ("triton", "the library has no float8 convolution")
    with fastres.backend("cudnn"):
        assert dispatch.why_engine("infer", ARITHMETIC, FLOAT8, CUDA) == ("cudnn", "backend('cudnn')")


@pytest.mark.parametrize("pass_", ["infer", "fprop", "dgrad", "wgrad"])
def test_a_forced_backend_wins_over_table_and_rule(pass_: Any) -> None:
    put({(pass_, ARITHMETIC): Measurement("cudnn", None), (pass_, MEMORY): Measurement("triton", None)})
    for problem in (ARITHMETIC, MEMORY):
        with fastres.backend("triton"):
            assert dispatch.why_engine(pass_, problem, BF16, CUDA) == ("triton", "backend('triton')")
        with fastres.backend("cudnn"):
            assert dispatch.why_engine(pass_, problem, BF16, CUDA) == ("cudnn", "backend('cudnn')")


def test_unmeasured_convolutions_use_our_kernels_if_memory_bound() -> None:
    grouped = replace(ARITHMETIC, groups=32)
    for problem, engine, rule in (
        (MEMORY, "triton", "memory-bound"),
        (ARITHMETIC, "cudnn", "compute-bound"),
        (grouped, "cudnn", "grouped"),
        (replace(MEMORY, groups=2), "cudnn", "grouped"),
    ):
        assert dispatch.why_engine("fprop", problem, FP16, CUDA) == (engine, f"unmeasured: {rule}")
    # In 16 bits, a 1x1 convolution of 256 channels has 128 operations per byte, one of 512 has 256; in 32 bits half.
    deep = ConvProblem(1024, 14, 14, 512, 512)
    assert dispatch.conv_engine("fprop", replace(deep, C=256, K=256), FP16, CUDA) == "triton"
    assert dispatch.conv_engine("fprop", deep, FP16, CUDA) == "cudnn"
    assert dispatch.conv_engine("fprop", deep, FP32, CUDA) == "triton"


def test_a_measured_winner_wins_over_the_rule() -> None:
    put({("fprop", ARITHMETIC): Measurement("triton", None), ("fprop", MEMORY): Measurement("cudnn", None)})
    why = "measured fastest on this GPU"
    assert dispatch.why_engine("fprop", ARITHMETIC, BF16, CUDA) == ("triton", why)
    assert dispatch.why_engine("fprop", MEMORY, BF16, CUDA) == ("cudnn", why)
    assert dispatch.conv_engine("fprop", ARITHMETIC, FP16, CUDA) == "cudnn", "another dtype"
    assert dispatch.conv_engine("dgrad", MEMORY, BF16, CUDA) == "triton", "another pass"


def test_the_library_computes_tf32_regardless_of_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {("fprop", ARITHMETIC, dtype): Measurement("triton", None) for dtype in (BF16, FP32)}
    tables.write_table(table, tables.table_file(H200.name), H200)  # type: ignore[arg-type]
    tables.forget_tables()

    def engines(dtype: torch.dtype = FP32) -> list[str]:
        return [dispatch.conv_engine("fprop", problem, dtype, CUDA) for problem in (ARITHMETIC, MEMORY)]

    assert engines() == engines(BF16) == ["triton", "triton"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert engines() == ["cudnn", "cudnn"]
    assert dispatch.why_engine("fprop", MEMORY, FP32, CUDA)[1].startswith("TF32: the library rounds")
    assert engines(BF16) == ["triton", "triton"]
    with fastres.backend("triton"):
        assert engines() == ["triton", "triton"]


def test_float32_precision_follows_pytorchs_switch_for_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.precision(FP32, CUDA) == "ieee"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert dispatch.precision(FP32, CUDA) == "tf32"
    assert {dispatch.precision(BF16, CUDA), dispatch.precision(FP32, CPU)} == {"ieee"}
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert dispatch.precision(FP32, CUDA) == "ieee", "without cuDNN nothing rounds to TF32"


def test_which_engine_computes_the_stem(gpu: Any) -> None:
    """The stem's own kernels compute it on Ampere and later, in 16 bits, unless another engine is forced or faster."""

    def engines(problem: ConvProblem, dtype: torch.dtype = BF16) -> list[str]:
        return [dispatch.conv_engine(pass_, problem, dtype, CUDA) for pass_ in ("infer", "fprop", "wgrad")]

    for found in (H200, H200._replace(name="NVIDIA A100", capability=(8, 0))):
        gpu(found)
        assert engines(STEM) == engines(STEM, FP16) == engines(replace(STEM, C=1)) == ["stem"] * 3
        assert engines(STEM, FP32) == engines(replace(STEM, stride=1), FP32) == ["triton"] * 3
        assert dispatch.conv_engine("dgrad", STEM, BF16, CUDA) != "stem"
        measured = "measured fastest on this GPU at N=256, the nearest measured"
        why = measured if found is H200 else "unmeasured: few channels, packed"
        assert dispatch.why_engine("wgrad", STEM, BF16, CUDA) == ("stem", why)
        for other in (replace(STEM, stride=1), replace(STEM, C=5), replace(STEM, R=1, S=1, pad=0)):
            assert "stem" not in engines(other)
        with fastres.backend("triton"):
            assert engines(STEM) == ["stem"] * 3
            assert engines(STEM, FP32) == engines(replace(STEM, C=8)) == ["triton"] * 3
        with fastres.backend("cudnn"):
            assert engines(STEM) == ["cudnn"] * 3
    put({("wgrad", STEM): Measurement("cudnn", None), ("fprop", STEM): Measurement("triton", None)})
    gpu(H200)
    assert engines(STEM) == ["stem", "triton", "cudnn"]


def test_the_reason_names_the_gpu_and_batch_size_of_the_measurement(gpu: Any) -> None:
    hung, one = (replace(SQUARE, H=H, W=H) for H in (16, 18))
    tile = Tile(64, 128, 64, 4, 2, (2, 8, 8))
    measured = {(pass_, SQUARE): Measurement("triton", tile) for pass_ in ("infer", "chain")}
    measured["infer", hung] = Measurement("cudnn", None, note="hung")
    measured["infer", one] = Measurement("cudnn", None, note="unfinished")
    put(measured)  # type: ignore[arg-type]
    on_lent = "NVIDIA H200 (same compute capability and multiprocessor count)"

    def why(problem: ConvProblem) -> tuple[str, str]:
        return dispatch.why_engine("infer", problem, BF16, CUDA)

    for found, where in ((H200, "this GPU"), (H100, on_lent)):
        gpu(found)
        assert why(SQUARE) == ("triton", f"measured fastest on {where}")
        nearest = f"measured fastest on {where} at N=8, the nearest measured"
        assert why(replace(SQUARE, N=32)) == ("triton", nearest)
        assert dispatch.why_chained(SQUARE, BF16, CUDA) == f"measured fastest on {where}"
        assert dispatch.why_chained(replace(SQUARE, N=32), BF16, CUDA) == nearest
        assert why(hung) == ("cudnn", f"unmeasured: tuning on {where} hung")
        assert why(one) == why(replace(hung, N=9)) == ("cudnn", "unmeasured: compute-bound")


def test_a_chain_is_one_kernel_only_if_measured_faster() -> None:
    slower = replace(SQUARE, H=16)
    put({("chain", SQUARE): Measurement("triton", None), ("chain", slower): Measurement("cudnn", None)})
    assert dispatch.why_chained(SQUARE, BF16, CUDA) == "measured fastest on this GPU"
    assert dispatch.why_chained(slower, BF16, CUDA) is None
    assert dispatch.why_chained(replace(SQUARE, H=18), BF16, CUDA) is None, "not measured"
    assert dispatch.why_chained(SQUARE, BF16, CPU) is None
    for name, serves in (("triton", True), ("cudnn", False), ("reference", False)):
        with fastres.backend(name):
            assert (dispatch.why_chained(SQUARE, BF16, CUDA) is not None) == serves


def test_which_table_is_in_force(gpu: Any) -> None:
    def said(found: Gpu) -> str:
        gpu(found)
        return dispatch.table_in_force(CUDA)

    put({("infer", SQUARE): Measurement("cudnn", None, note="hung")})
    assert said(H200) == "this GPU's own, measured problems: 140, failed: 1"
    tables.table_file(H200.name).unlink()
    assert said(H200) == "this GPU's own, measured problems: 140"
    lent = "NVIDIA H200's (same compute capability and multiprocessor count), measured problems: 140"
    assert said(H100) == lent
    put({("infer", SQUARE): Measurement("cudnn", None)}, H100)
    assert said(H100) == f"this GPU's own, measured problems: 1; for others {lent}"
    other = H100._replace(name="NVIDIA H100 PCIe", sms=114)
    assert said(other).startswith("none: heuristics")
    tables.table_file(other.name).write_text("[]")
    assert said(other).startswith("broken: ")


def test_computation_on_load_follows_the_measurements() -> None:
    put(
        {
            (pass_, SQUARE): Measurement("triton", None, on_load=pass_ == "dgrad")
            for pass_ in ("fprop", "wgrad", "dgrad")
        }
    )

    def answers(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> list[bool]:
        return [dispatch.on_load(pass_, problem, dtype, device) for pass_ in ("fprop", "wgrad", "dgrad")]

    assert answers(SQUARE, BF16, CUDA) == [False, False, True], "as measured"
    assert answers(SQUARE, FP16, CUDA) == answers(SQUARE, BF16, CPU) == [True, True, False], "by rule: a 3x3"
    assert answers(MEMORY, FP16, CUDA) == [True, True, True], "by rule: a 1x1 has one tap"
    put({("fprop", SQUARE): Measurement("cudnn", None, on_load=False, note="hung")})
    assert dispatch.on_load("fprop", SQUARE, BF16, CUDA), "by rule: not measured"


@pytest.mark.parametrize(
    ("change", "joins"),
    [
        ({}, True),
        ({"K": 256}, True),
        ({"K": 257}, False),
        ({"stride": 2}, False),
        ({"R": 3, "S": 3, "pad": 1}, False),
        ({"groups": 2}, False),
    ],
)
def test_a_1x1_with_few_output_channels_computes_the_previous_end(change: dict[str, int], joins: bool) -> None:
    assert dispatch.joins(replace(MEMORY, **change)) == joins


OURS = Engines("triton", "triton", "triton", "triton", "triton", True, True, True, True, Fusions(), "ieee")


@pytest.mark.parametrize(
    ("change", "joins"),
    [
        ({}, True),
        ({"joins": False}, False),
        ({"fprop_on_load": False}, False),
        ({"fprop": "cudnn"}, False),
        ({"fusions": Fusions(block_end=False)}, False),
    ],
)
def test_a_block_end_is_joined_only_if_all_conditions_hold(change: dict[str, Any], joins: bool) -> None:
    assert replace(OURS, **change).joins_block_end == joins


KEEP, KEEP_STORED = Fusions(keep_activation=True), Fusions(keep_activation=True, prologue=False)
BY_LIBRARY = {"fprop": "cudnn", "wgrad": "cudnn"}


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        (BY_LIBRARY | {"fusions": KEEP}, True),
        (BY_LIBRARY, False),
        ({"fusions": KEEP}, False),
        ({"fusions": KEEP, "fprop": "cudnn"}, False),
        ({"fusions": KEEP, "wgrad": "cudnn"}, False),
        ({"fusions": KEEP, "fprop": "stem", "wgrad": "cudnn"}, False),
        ({"fusions": KEEP, "fprop_on_load": False, "wgrad_on_load": False}, True),
        ({"fusions": KEEP_STORED}, True),
    ],
)
def test_an_activation_is_kept_if_both_convolutions_read_it_stored(change: dict[str, Any], keeps: bool) -> None:
    assert replace(OURS, **change).keeps_activation == keeps


@pytest.mark.parametrize(
    ("change", "batch_statistics", "running_statistics"),
    [
        ({}, True, True),
        ({"dz_on_load": False}, False, True),
        ({"dgrad": "cudnn"}, False, True),
        ({"wgrad": "cudnn"}, False, True),
        ({"fusions": Fusions(bn_backward=False)}, False, False),
    ],
)
def test_a_batch_norms_backward_is_fused_on_load_or_into_the_filters(
    change: dict[str, Any], batch_statistics: bool, running_statistics: bool
) -> None:
    engines = replace(OURS, **change)
    assert engines.fuses_bn_backward(True) == batch_statistics
    assert engines.fuses_bn_backward(False) == running_statistics


def test_a_blocks_engines_are_those_of_each_pass() -> None:
    put(
        {
            ("infer", MEMORY): Measurement("cudnn", None),
            ("fprop", MEMORY): Measurement("triton", None, on_load=False),
            ("dgrad", MEMORY): Measurement("cudnn", None),
            ("wgrad", MEMORY): Measurement("triton", None),
        }
    )
    with dispatch.fusions(overlap=True):
        want = Engines(
            "cudnn", "triton", "cudnn", "triton", "triton", False, True, True, True, Fusions(overlap=True), "ieee"
        )
        assert dispatch.engines(MEMORY, BF16, CUDA) == want


def folded(
    dtype: torch.dtype = BF16, device: torch.device = CUDA, problem: ConvProblem = ARITHMETIC, **how: Any
) -> Candidate:
    return dispatch.folded_engine(problem, dtype, device, **{"relu": True, "added": False} | how)


def test_a_plan_uses_our_kernels_where_they_win() -> None:
    assert folded(problem=MEMORY) == ("triton", "unmeasured: memory-bound", None, (), None)
    assert folded(problem=STEM).engine == "stem"
    assert folded(problem=STEM, added=True).engine == "triton", "the stem's kernel adds nothing"


def test_cudnns_fused_convolution_is_timed_against_its_steps() -> None:
    why = "unmeasured: compute-bound"
    for added in (False, True):
        found = folded(added=added)
        assert found[:2] == ("cudnn fused", why)
        assert found.otherwise == Candidate("cudnn + triton", f"{why}; not fused: cuDNN: {{error}}")
        assert found.timed[:4] == (ARITHMETIC, BF16, CUDA, added)
    assert folded(relu=False) == Candidate("cudnn", why)
    with fastres.backend("cudnn"):
        assert folded().engine == "cudnn fused"
    with fastres.backend("reference"):
        assert folded().otherwise == Candidate("cudnn", "backend('reference'); not fused: cuDNN: {error}")


@pytest.mark.parametrize(
    ("switch", "value", "why"),
    [
        ("enabled", False, "cudnn.enabled is off"),
        ("deterministic", True, "the fused op is not guaranteed to be deterministic"),
    ],
)
def test_cudnns_switches_forbid_its_fused_convolution(
    switch: str, value: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, switch, value)
    assert folded() == Candidate("cudnn + triton", f"unmeasured: compute-bound; not fused: {why}")


def test_timings_are_keyed_by_everything_they_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    put({("infer", ARITHMETIC): Measurement("cudnn", None)})
    facts = {
        folded().timed,
        folded(added=True).timed,
        folded(FP16).timed,
        folded(problem=replace(ARITHMETIC, N=1)).timed,
    }
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    facts.add(folded().timed)
    assert len(facts) == 5


def test_onednns_convolution_falls_back_to_aten_with_the_error() -> None:
    aten = Candidate("aten", "oneDNN: {error}")
    assert folded(device=CPU) == Candidate("onednn", "one fused primitive", aten)


def test_onednn_computes_an_int8_convolution_or_it_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Candidate("aten", "oneDNN: {error}; int8 simulated in float32", wide=FP32)
    assert folded(torch.int8, CPU) == Candidate("onednn int8", "8 bits", narrow)
    other_shape = folded(torch.int8, CPU, added=True, alike=False)
    assert other_shape == Candidate("aten", "the residual has another shape; int8 simulated in float32", wide=FP32)
    none = "there are no int8 convolutions for cuda; int8 simulated in float64"
    assert folded(torch.int8) == Candidate("cudnn", none, wide=torch.float64)
    with fastres.backend("reference"):
        said = "backend('reference'); int8 simulated in float64"
        assert folded(torch.int8, CPU) == Candidate("aten", said, wide=torch.float64)


def test_a_float8_convolution_without_our_kernels_is_simulated() -> None:
    assert folded(FLOAT8) == Candidate("triton", "the library has no float8 convolution")
    with fastres.backend("cudnn"):
        assert folded(FLOAT8) == Candidate("cudnn", "backend('cudnn'); float8 simulated in float32", wide=FP32)


NO_KERNEL = Candidate("aten", "no fused kernel")


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda x: x, True),
        (lambda x: x.double(), False),
        (lambda x: x[0], False),
        (lambda x: x.transpose(1, 2), False),
        (lambda x: x[:0], False),
        (lambda x: x[:, :, :0], False),
    ],
    ids=["NHWC", "float64", "3 dimensions", "strided", "no image", "no pixel"],
)
def test_our_kernel_computes_a_max_pool_if_the_images_fit(change: Any, serves: bool, interpreter: None) -> None:
    x = change(torch.zeros(2, 6, 5, 8))
    with fastres.backend("triton"):
        found = dispatch.layer_engine(nn.MaxPool2d(3, 2, 1), (3, 2, 1), [x])
        assert found == (Candidate("triton", "writes no indices") if serves else NO_KERNEL)
        assert dispatch.layer_engine(nn.MaxPool2d(3, 2, 1), None, [x]) == NO_KERNEL
        assert dispatch.layer_engine(nn.MaxPool2d(9), (9, 9, 1), [x]) == NO_KERNEL, "larger than the padded images"
    assert dispatch.layer_engine(nn.MaxPool2d(3, 2, 1), (3, 2, 1), [x]) == NO_KERNEL


def test_the_library_computes_an_8_bit_pool_on_a_cpu() -> None:
    x = torch.quantize_per_tensor(torch.zeros(1, 4, 4, 8), 1.0, 0, torch.quint8)
    assert dispatch.layer_engine(nn.MaxPool2d(2), (2, 2, 0), [x]) == Candidate("aten", "8 bits")
    with fastres.backend("reference"):
        simulated = Candidate("aten", "int8 simulated in float32", wide=FP32)
        assert dispatch.layer_engine(nn.MaxPool2d(2), (2, 2, 0), [x]) == simulated


@pytest.mark.parametrize(
    ("layer", "inputs", "packs"),
    [
        (nn.Linear(3, 2), [torch.zeros(4, 3)], True),
        (nn.Linear(3, 2), [torch.zeros(0, 3)], False),
        (nn.Linear(3, 2), [torch.zeros(1, 4, 3)], False),
        (nn.Linear(3, 2), [torch.zeros(4, 3).double()], False),
        (nn.Linear(3, 2), [torch.zeros(4, 3)] * 2, False),
        (nn.Linear(3, 2), [3], False),
        (None, [torch.zeros(4, 3)], False),
        (nn.Identity(), [torch.zeros(4, 3)], False),
    ],
    ids=["rows", "none", "3 dimensions", "another dtype", "two inputs", "a number", "a function", "another layer"],
)
def test_a_linear_layers_weights_are_packed_for_onednn(
    layer: nn.Module | None, inputs: list[Tensor], packs: bool
) -> None:
    want = Candidate("onednn", "weights packed", NO_KERNEL) if packs else NO_KERNEL
    assert dispatch.layer_engine(layer, None, inputs) == want
    with fastres.backend("reference"):
        assert dispatch.layer_engine(layer, None, inputs) == NO_KERNEL


def test_torchscript_is_used_if_it_rounds_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [dispatch.why_not_scripted(dtype) for dtype in (FP32, BF16, torch.int8)] == [None] * 3
    assert dispatch.why_not_scripted(FP16) == "it is not used for torch.float16"
    monkeypatch.setattr(torch.backends.mkldnn, "conv", SimpleNamespace(fp32_precision="bf16"))
    assert dispatch.why_not_scripted(FP32) == "it would not round float32 to bf16"


def test_a_convolution_computes_in_autocasts_dtype_if_autocast_is_on() -> None:
    x = torch.zeros(1)
    assert dispatch.compute_dtype(x) == FP32
    with torch.autocast("cpu", BF16):
        assert dispatch.compute_dtype(x) == dispatch.compute_dtype(x.half()) == BF16
        assert dispatch.compute_dtype(x.double()) == torch.float64
        assert dispatch.compute_dtype(x.int()) == torch.int32
        with torch.autocast("cpu", enabled=False):
            assert dispatch.compute_dtype(x) == FP32
        assert dispatch.compute_dtype(x.to("meta")) == FP32, "another device"
