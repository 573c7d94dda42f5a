"""Peers that are not PyTorch: a net exported to ONNX and run on the CPU by ONNX Runtime or OpenVINO.

Each function takes a net in fp32 and its batches [N, 3, H, W] (NCHW), and returns a callable that runs a batch of that
shape. All use as many threads as PyTorch.
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
    """Return the net run by ONNX Runtime in fp32, with its own optimisations.

    `profile` is the beginning of the name of the file that `end_profiling()` of the callable's `session` writes.
    """
    with exported(model, inputs[0]) as file:
        return session(file, profile)


def onnxruntime_int8(
    model: nn.Module, inputs: Sequence[Tensor], profile: Path | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the net run by ONNX Runtime in int8, quantised statically.

    It has QDQ nodes, int8 weights with a scale per output channel, and uint8 activations with their range over the
    batches. `profile` is as in `onnxruntime`.
    """
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
    """Return the net run by OpenVINO in fp32. By default OpenVINO would use bf16 where the CPU supports it."""
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
    """Export the net to an ONNX file for batches of the shape of `batch`, in a folder that is removed with the context.
    The input is called "images"."""
    with TemporaryDirectory(prefix="fastres-onnx-") as folder, quiet():
        file = Path(folder, "net.onnx")
        torch.onnx.export(model, (batch,), file, dynamo=True, verbose=False, input_names=["images"])
        yield file


def session(file: Path, profile: Path | None = None) -> Callable[[Tensor], Tensor]:
    """Return a callable that runs the net in `file`, with the session as its attribute `session`.

    Its threads spin while they wait for work during a call, as by default, but not after it. Otherwise they would take
    cores from the code that runs next: on two cores, eager PyTorch's next call took twice as long.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    net = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(net.run(None, {"images": x.numpy()})[0])  # no copies: tensors and arrays share memory

    run.session = net  # type: ignore[attr-defined]
    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of exporter and quantiser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
