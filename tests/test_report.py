"""`fastres.status` reports the decisions of dispatch, and builds nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres import report
from fastres.ops import dispatch, extension
from fastres.report import FUSED, INSTALL_TRITON, TRAIN, TUNE


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(device: str) -> bool:
        raise AssertionError("status() must not build the extension")

    monkeypatch.setattr(extension, "load", build)


def test_every_field_is_said_in_words() -> None:
    before = torch.get_rng_state()
    status = fastres.status()
    assert torch.equal(torch.get_rng_state(), before)
    assert status.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert status.versions["torchvision"].split("+")[0] == torchvision.__version__.split("+")[0]
    assert status.blocks is None
    assert status.extension == extension.status()
    for word in (
        "GPU:",
        "versions:",
        "Triton:",
        "table:",
        "extension:",
        "training:",
        "inference:",
        "optimize:",
        "next:",
        status.extension.reason,
    ):
        assert word in str(status)
    assert str(status).startswith(f"{status.summary}\n\n")
    assert f"next:       {status.next_step}   (" in str(status).splitlines()[-1]
    if not torch.cuda.is_available():
        assert status.gpu.startswith("none: ")
        assert status.table == "none: no kernels run on a GPU here"
        assert status.training.startswith("plain PyTorch")
        assert "cpu" in status.training or "interpreter" in status.training


@pytest.mark.gpu
def test_a_gpu_is_named() -> None:
    status = fastres.status()
    assert torch.cuda.get_device_name() in status.gpu
    assert status.triton == "usable"
    assert status.table == dispatch.table_in_force(torch.device("cuda"))
    assert status.training == FUSED


def test_a_status_follows_the_forced_backend() -> None:
    with fastres.backend("reference"):
        assert fastres.status().training == FUSED
        assert fastres.status().inference == FUSED


def test_a_status_says_what_optimize_brings_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    why: dict[torch.dtype, str | None] = {torch.bfloat16: None, torch.float16: "no fp16", torch.int8: "no VNNI"}
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: why.get(dtype))
    told = fastres.status().optimize
    assert told == "oneDNN's fused convolutions on this CPU in fp32, bf16; not in fp16: no fp16; not in int8: no VNNI"
    why[torch.int8] = "no fp16"
    assert fastres.status().optimize.endswith("in fp32, bf16; not in fp16, int8: no fp16")
    why[torch.float32] = "no oneDNN"
    assert fastres.status().optimize == "plain PyTorch, layer by layer, on this CPU: no oneDNN"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains")
def test_training_on_a_cpu_stays_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: None)
    assert fastres.status().training.endswith("its convolutions, which are most of the work, are oneDNN's")
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: "no oneDNN")
    assert "oneDNN" not in fastres.status().training


def test_a_status_begins_with_what_runs_fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why: dict[torch.dtype, str | None] = {}
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: why.get(dtype))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    served = "fastres.optimize serves ResNets on the CPU with oneDNN in {}; training runs as plain PyTorch."
    assert fastres.status().summary == f"This machine has no GPU.\n{served.format('fp32, bf16, fp16 and int8')}"
    why |= {torch.bfloat16: "no", torch.float16: "no", torch.int8: "no"}
    assert fastres.status().summary == f"This machine has no GPU.\n{served.format('fp32')}"
    why[torch.float32] = "no"
    assert fastres.status().summary == "This machine has no GPU.\nModels run as plain PyTorch on the CPU."
    monkeypatch.setattr(torch.version, "cuda", None)
    assert fastres.status().summary.startswith("This PyTorch is built without CUDA and uses no GPU.\n")


FUSED_HERE = "ResNets run on fused Triton kernels on this machine's NVIDIA X1, in training and inference.\n"


@pytest.mark.parametrize(
    ("capability", "triton", "table", "summary", "next_step"),
    [
        (
            (9, 0),
            True,
            "this GPU's own, measured problems: 7",
            f"{FUSED_HERE}Measurements choose the kernels: this GPU's own, measured problems: 7.",
            TRAIN,
        ),
        (
            (8, 0),
            True,
            "none: heuristics",
            f"{FUSED_HERE}No kernels have been measured on such a GPU, so heuristics choose them.",
            TUNE,
        ),
        ((9, 0), True, "broken: no JSON", f"{FUSED_HERE}Its table of measured kernels can't be read.", TUNE),
        (
            (7, 5),
            True,
            "",
            "Models run as plain PyTorch on this machine's NVIDIA X1.\n"
            "The fused kernels need compute capability 8.0, this GPU has 7.5.",
            TRAIN,
        ),
        (
            (9, 0),
            False,
            "",
            "Models run as plain PyTorch on this machine's NVIDIA X1.\n"
            "The fused kernels need Triton, which is not installed.",
            INSTALL_TRITON,
        ),
    ],
)
def test_a_status_begins_with_what_runs_fused_on_a_gpu(
    capability: tuple[int, int],
    triton: bool,
    table: str,
    summary: str,
    next_step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(dispatch, "table_in_force", lambda device: table)
    monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
    assert report._on_gpu(torch.device("cuda")) == (summary, next_step)
    assert next_step in report.WHAT_FOR


def test_the_interpreter_does_not_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the interpreter's `tl.dot` would return wrong values."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    net, cpu = fastres.resnet18().bfloat16(), torch.device("cpu")
    assert "in fp32 and fp16" in fastres.status().triton
    with fastres.backend("triton"):
        for refuse in (
            lambda: net(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)),
            lambda: fastres.optimize(net.eval())(torch.zeros(1, 3, 32, 32)),
            lambda: dispatch.why_unfused(torch.bfloat16, cpu),
        ):
            with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly; use a CUDA GPU, float16"):
                refuse()
        blocks = fastres.status(net).blocks
        assert blocks is not None
        assert all("refused: backend('triton')" in path for path in blocks.values())
        assert dispatch.why_unfused(torch.float16, cpu) is None
        assert set((fastres.status(net.half()).blocks or {}).values()) == {FUSED}


def test_a_status_says_what_a_forced_backend_refuses() -> None:
    with fastres.backend("triton"):
        assert fastres.status().training.startswith(("fused", "refused: backend('triton') is in force but"))


def test_a_model_is_told_block_by_block() -> None:
    net = fastres.resnet18()
    net.layer1[0].relu.register_forward_hook(lambda *_: None)
    net.layer2[0].bn1 = nn.SyncBatchNorm(128)
    net.maxpool = nn.Identity()
    with fastres.backend("reference"):
        status = fastres.status(net)
    assert status.blocks is not None
    assert list(status.blocks) == ["", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))]
    assert "hook" in status.blocks["layer1.0"]
    assert "SyncBatchNorm" in status.blocks["layer2.0"]
    assert "Identity" in status.blocks[""]
    assert sum(path == FUSED for path in status.blocks.values()) == 6
    assert "6 of 9" in str(status)
    assert "layer2.0: plain" in str(status)


@pytest.mark.parametrize("build", [fastres.paper.cifar, fastres.paper.resnet], ids=["cifar", "paper"])
def test_stems_of_the_papers_nets_are_told(build: Callable[[int], nn.Module]) -> None:
    with fastres.backend("reference"):
        blocks = fastres.status(build(20 if build is fastres.paper.cifar else 18)).blocks
    assert blocks is not None
    assert blocks[""] == FUSED


def test_other_models_have_no_blocks_until_they_are_converted() -> None:
    frozen = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    assert fastres.status(frozen).blocks == {}
    with fastres.backend("reference"):
        blocks = fastres.status(fastres.convert(frozen).model).blocks
    assert blocks is not None
    assert set(blocks.values()) == {FUSED}
    with pytest.raises(TypeError, match="got str"):
        fastres.status("resnet18")  # type: ignore[arg-type]
