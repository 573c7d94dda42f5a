"""Compare int8's accuracy with fp32 on scikit-learn's digits, and its noise with ONNX Runtime's int8."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_int8 import int8, served, stepwise
from tolerances import INT8_TOP1
from torch import Tensor, nn

from fastres import paper
from fastres.inference.plan import Conv


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits as (images, labels, held-out images, held-out labels).

    Images are [N, 3, 8, 8] with values from -1 to 1. Every fifth image is held out.
    """
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = ((torch.from_numpy(data.images).float() - 8) / 8)[:, None].expand(-1, 3, -1, -1)
    y, held = torch.from_numpy(data.target), torch.arange(len(data.target)) % 5 == 0
    return x[~held], y[~held], x[held], y[held]


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            F.cross_entropy(model(torch.roll(x[batch], shift, (2, 3))), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@served
@pytest.mark.extra
@pytest.mark.parametrize(("depth", "epochs"), [(20, 10), (56, 14)])
def test_int8_keeps_its_accuracy_on_digits(depth: int, epochs: int) -> None:
    """Top-1 accuracy is close to fp32's (`INT8_TOP1`) on the held-out digits, also if shifted by up to one pixel."""
    x, y, held, labels = digits()
    model = trained(paper.cifar(depth), x, y, epochs)
    shifted = [torch.roll(held, (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    net = int8(model, *x.split(256))

    def top1(net: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
        with torch.no_grad():
            return float(torch.stack([(net(batch).argmax(1) == labels).double().mean() for batch in batches]).mean())

    assert top1(model, [held]) > 0.95
    assert abs(top1(net, shifted) - top1(model, shifted)) <= INT8_TOP1
    assert abs(top1(net, [held]) - top1(model, [held])) <= INT8_TOP1
    assert net.agreement(model, shifted) > 0.98


class Blocks(nn.Module):
    """Returns the logits and the output of each block of torchvision's ResNet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        m: Any = self.model
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        outputs = []
        for stage in (m.layer1, m.layer2, m.layer3, m.layer4):
            for block in stage:
                x = block(x)
                outputs.append(x)
        return [m.fc(torch.flatten(m.avgpool(x), 1)), *outputs]


def onnxruntime_int8(model: nn.Module, calibration: Sequence[Tensor], folder: Path) -> Callable[[Tensor], list[Tensor]]:
    """Return `Blocks(model)`, statically quantised and run by ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    plain, prepared, small = (str(folder / f"{name}.onnx") for name in ("plain", "prepared", "int8"))
    torch.onnx.export(Blocks(model).eval(), (calibration[0],), plain, dynamo=False, input_names=["x"], opset_version=17)
    quant_pre_process(plain, prepared)
    quantization.quantize_static(
        *(prepared, small, Reader()),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )
    session = runtime.InferenceSession(small, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()})]


def decibels(got: Tensor, want: Tensor) -> float:
    """Return the signal-to-noise ratio of `got` in dB, with `want` as the signal."""
    return 10 * math.log10(float(want.double().square().sum() / (got.double() - want.double()).square().sum()))


@served
@pytest.mark.extra
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*legacy TorchScript-based ONNX export")
def test_noise_is_no_more_than_onnxruntimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The signal-to-noise ratio of logits and of each block is at most 0.05 dB below ONNX Runtime's."""
    caplog.set_level(logging.ERROR)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    backends, photos = (importlib.import_module(name) for name in ("backends", "photos"))
    size = 96
    model = torchvision.models.resnet50(weights=None).eval()
    model.load_state_dict(backends.shared_weights("resnet50", photos.batches(2, 4, size, 1), 0))
    calibration, (x,) = photos.batches(3, 4, size, 2), photos.batches(1, 4, size, 3)
    theirs = onnxruntime_int8(model, calibration, tmp_path)(x)
    net = int8(model, *calibration)
    values = stepwise(net, x)
    ends = [step.out for step in net._steps if isinstance(step, Conv) and step.residual is not None]
    ours = [net(x), *(values[end].dequantize().permute(0, 3, 1, 2) for end in ends)]
    with torch.no_grad():
        wanted = Blocks(model)(x)
    assert len(ours) == len(theirs) == len(wanted) == 17
    for what, (mine, other, want) in enumerate(zip(ours, theirs, wanted, strict=True)):
        assert decibels(mine, want) >= decibels(other, want) - 0.05, what
