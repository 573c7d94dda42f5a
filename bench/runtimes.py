"""Peers that are no PyTorch: a net exported to ONNX and run by ONNX Runtime or OpenVINO on the CPU.

Each function takes a net in fp32 and its batches [N, 3, H, W] (NCHW), and returns what runs a batch of that shape. All
use as many threads as PyTorch does.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn


def onnxruntime(model: nn.Module, inputs: Sequence[Tensor], profile: Path | None = None) -> Callable[[Tensor], Tensor]:
    """fp32, ONNX Runtime's own optimisations. profile: the beginning of the name of the file that `run.session`'s
    `end_profiling()` writes."""
    with exported(model, inputs[0]) as file:
        return session(file, profile)


def onnxruntime_int8(
    model: nn.Module, inputs: Sequence[Tensor], profile: Path | None = None
) -> Callable[[Tensor], Tensor]:
    """int8 by ONNX Runtime's static quantisation: QDQ nodes, int8 weights with a scale per output channel, uint8
    activations with the range they have over the batches."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    with exported(model, inputs[0]) as file, quiet():
        prepared, quantised = (file.with_name(name) for name in ("prepared.onnx", "int8.onnx"))
        quant_pre_process(file, prepared)
        quantize_static(
            prepared,
            quantised,
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        return session(quantised, profile)


def openvino(model: nn.Module, inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """fp32 by OpenVINO, which would choose bf16 by itself where the CPU has it."""
    import openvino

    with exported(model, inputs[0]) as file:
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        net = openvino.Core().compile_model(str(file), "CPU", options)
    return lambda x: torch.from_numpy(net([x.numpy()], share_inputs=True)[0])


@contextmanager
def exported(model: nn.Module, batch: Tensor) -> Iterator[Path]:
    """The net as an ONNX file for batches of this one's shape, in a folder that goes with the context. Its input is
    called "images"."""
    with TemporaryDirectory(prefix="fastres-onnx-") as folder, quiet():
        file = Path(folder, "net.onnx")
        torch.onnx.export(model, (batch,), file, dynamo=True, verbose=False, input_names=["images"])
        yield file


def session(file: Path, profile: Path | None = None) -> Callable[[Tensor], Tensor]:
    """What runs the net in `file`.

    Its threads spin while they wait for work within a call, as they do by default, but not after it: then they would
    take cores from whatever is called next (measured on two cores: eager PyTorch's next call took twice as long).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    net = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(net.run(None, {"images": x.numpy()})[0])  # no copy: both share the arrays' memory

    run.session = net  # type: ignore[attr-defined]
    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporter and quantiser say about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
