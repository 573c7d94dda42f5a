"""`fastres.status` says what dispatch would do, and builds nothing."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres.ops import dispatch, extension
from fastres.status import FUSED


@pytest.fixture(autouse=True)
def _nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(device: str) -> bool:
        raise AssertionError("status() must not build the extension")

    monkeypatch.setattr(extension, "load", build)


def test_fields_and_words() -> None:
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
        status.extension.reason,
    ):
        assert word in str(status)
    if not torch.cuda.is_available():
        assert status.gpu.startswith("none: ")
        assert status.table == "none: no GPU runs kernels here"
        assert status.training.startswith("plain PyTorch")
        assert "cpu" in status.training or "interpreter" in status.training


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    status = fastres.status()
    assert torch.cuda.get_device_name() in status.gpu
    assert status.triton == "usable"
    assert status.table == dispatch.table_in_force(torch.device("cuda"))
    assert status.training == FUSED


def test_follows_the_forced_backend() -> None:
    with fastres.backend("reference"):
        assert fastres.status().training == FUSED
        assert fastres.status().inference == FUSED


def test_what_optimize_brings_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert fastres.status().training.endswith("its convolutions, most of the work, are oneDNN's already")
    monkeypatch.setattr(dispatch, "why_no_onednn", lambda dtype: "no oneDNN")
    assert "oneDNN" not in fastres.status().training


def test_a_model_block_by_block() -> None:
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


def test_other_models() -> None:
    frozen = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    assert fastres.status(frozen).blocks == {}
    with fastres.backend("reference"):
        blocks = fastres.status(fastres.convert(frozen).model).blocks
    assert blocks is not None
    assert all("FrozenBatchNorm2d" in path for path in blocks.values())
    with pytest.raises(TypeError, match="not str"):
        fastres.status("resnet18")  # type: ignore[arg-type]
