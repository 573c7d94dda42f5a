"""Test that `Optimized` gives the results of the original in all modes, threads and recordings, and explains itself."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close_to_reference, relative_error
from nets import DEVICE, NETS, Adds, Asks, answers, images, lived_in, tiny
from tolerances import EXACT_BLOCK, GPU_HALF, SUMS, lost_in_sums
from torch import Tensor, nn
from torchvision.tv_tensors import Image

import fastres
from fastres import optimize
from fastres.inference.optimized import MAX_SHAPES, Optimized


@pytest.mark.parametrize("name", NETS)
def test_the_result_is_exact_in_float64(name: str) -> None:
    model = lived_in(NETS[name]()).double()
    x = images(2, 33, torch.float64)
    (expected,) = answers(model, x)
    net = optimize(model)
    assert relative_error(net(x), expected) <= EXACT_BLOCK
    assert relative_error(net(x.contiguous(memory_format=torch.channels_last)), expected) <= EXACT_BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torchvision resnext", "paper cifar"])
def test_the_error_is_within_twice_the_librarys(name: str, dtype: torch.dtype) -> None:
    model = lived_in(NETS[name]())
    x = images(2, 32)
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert_close_to_reference(optimize(model, dtype=dtype)(x), reference, baseline)


def test_the_result_has_the_dtype_passed_or_that_of_the_convolutions() -> None:
    model, x = tiny(), images()
    assert optimize(model)(x.double()).dtype == torch.float32
    assert optimize(copy.deepcopy(model).bfloat16())(x).dtype == torch.bfloat16
    net = optimize(model, dtype=torch.float16)
    assert net(x).dtype == torch.float16
    assert torch.equal(net(x.half().float()), net(x.half()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(optimize(model)(x), optimize(model)(x.clone()))
        assert optimize(model)(x).dtype == torch.float32
    mixed = copy.deepcopy(model).bfloat16()
    mixed[1].float()  # the dtype of a BatchNorm is irrelevant
    assert optimize(mixed)(x).dtype == torch.bfloat16


def test_a_net_made_in_inference_mode_works_outside_of_it() -> None:
    model, x = tiny().to(DEVICE), images().to(DEVICE)
    with torch.inference_mode():
        net = optimize(model, x)
        expected = net(x).clone()
    assert torch.equal(net(x), expected)
    with torch.inference_mode():
        assert torch.equal(net(x.clone()), expected)
    net(x).add_(1)
    net.load_state_dict(model.state_dict())


def test_empty_batches_and_odd_sizes_work() -> None:
    model = tiny().double()
    net = optimize(model)
    for shape in ((0, 3, 16, 16), (1, 3, 9, 23), (3, 3, 17, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert net(x).shape == (shape[0], 10)
        assert relative_error(net(x), answers(model, x)[0]) <= EXACT_BLOCK


def test_the_original_is_not_changed() -> None:
    model = tiny()
    before = copy.deepcopy(model)
    state = {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    net = optimize(model, images(), dtype=torch.bfloat16)
    net(images())
    assert {name: (t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()} == state
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert not net(images().requires_grad_()).requires_grad


def test_explain_shows_the_engine_of_each_step() -> None:
    net = optimize(tiny())
    with pytest.raises(ValueError, match=r"^no plan yet; call the net on a batch first$"):
        net.explain()
    net(images())
    lines = net.explain().splitlines()
    assert lines[0] == "Sequential in torch.float32, step by step"
    assert lines[1].split() == ["step", "layer", "operation", "output", "engine", "why"]
    row = next(line for line in lines if "4.conv2" in line)
    assert "3x3 8->8 /2 + relu" in row
    assert "[2, 8, 4, 4]" in row
    assert ("onednn" in row and "one fused primitive" in row) or torch.cuda.is_available()
    net(images(1))
    assert "[1, 8, 4, 4]" in net.explain()
    assert net.explain((2, 3, 16, 16)).splitlines() == lines
    with pytest.raises(ValueError, match=r"\[5, .* \[2, 3, 16, 16\], \[1, 3, 16, 16\]\); call the net on"):
        net.explain((5, 3, 16, 16))


def test_the_caller_owns_results() -> None:
    for model in (tiny(), tiny()[:7].eval()):  # scores and a feature map
        net, x = optimize(model), images()
        first = net(x)
        kept = first.clone()
        second = net(images())
        assert torch.equal(first, kept)
        assert not torch.equal(second, kept)
        first.fill_(7)
        assert torch.equal(net(x), kept)


def test_threads_may_call_one_net_concurrently() -> None:
    net = optimize(tiny(), torchscript=False)
    inputs = [images(1 + i % 3) for i in range(12)]
    expected = [optimize(tiny_like(net))(x) for x in inputs]
    results: list[list[Tensor | None]] = [[None] * len(inputs) for _ in range(4)]
    start = threading.Barrier(4)

    def work(row: list[Tensor | None]) -> None:
        start.wait()
        for i, x in enumerate(inputs):
            row[i] = net(x)

    threads = [threading.Thread(target=work, args=(row,)) for row in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in results:
        assert all(r is not None and torch.equal(r, e) for r, e in zip(row, expected, strict=True))


def tiny_like(net: nn.Module) -> nn.Module:
    model = tiny()
    model.load_state_dict(net.state_dict())
    return model


def test_the_number_of_shapes_is_bounded() -> None:
    model = tiny()
    net = optimize(model)
    for size in range(8, 8 + MAX_SHAPES + 3):
        x = images(1, size)
        assert_close_to_reference(net(x), answers(copy.deepcopy(model).double(), x.double())[0], answers(model, x)[0])
    assert len(net._programs) == MAX_SHAPES
    with pytest.raises(ValueError, match="no plan yet"):
        net.explain((1, 3, 8, 8))


def test_the_state_dict_is_the_originals() -> None:
    model, x = tiny(), images()
    net = optimize(model)
    state = net.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert tiny_like(net).state_dict().keys() == state.keys()
    other = tiny()
    assert not torch.equal(optimize(other)(x), net(x))
    assert str(net.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(net(x), optimize(other)(x))
    nested = nn.ModuleDict({"net": optimize(model)})
    nested.load_state_dict({f"net.{key}": value for key, value in other.state_dict().items()})
    assert torch.equal(nested["net"](x), net(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


def test_copies_and_pickles_give_the_same_results() -> None:
    net, x = optimize(tiny(), dtype=torch.bfloat16), images()
    expected = net(x)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert isinstance(twin, Optimized)
        assert twin.dtype == torch.bfloat16
        assert torch.equal(twin(x), expected)
        twin.load_state_dict(tiny().state_dict())
        assert not torch.equal(twin(x), expected)
    assert torch.equal(net(x), expected)


def test_a_net_stays_in_eval_mode_and_dtype() -> None:
    net = optimize(tiny())
    assert net.eval() is net
    assert not net.training
    with pytest.raises(RuntimeError, match="frozen for inference"):
        net.train()
    with pytest.raises(TypeError, match=r"stays in torch\.float32"):
        net.half()
    assert net.to("cpu", memory_format=torch.channels_last) is net
    assert not any(p.requires_grad for p in net.parameters())
    assert "dtype=torch.float32" in repr(net)


def test_an_input_that_does_not_fit_is_refused() -> None:
    net = optimize(tiny())
    with pytest.raises(TypeError, match=r"must have a floating dtype, got torch\.uint8"):
        net(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be \[N, C, H, W\], got shape \[3, 16, 16\]"):
        net(images()[0])
    with pytest.raises(ValueError, match=r"requires an input with 3 channels \[N, 3, H, W\], got \[2, 5, 16, 16\]"):
        net(torch.zeros(2, 5, 16, 16))
    with pytest.raises(ValueError, match="the net is on cpu, but the input is on meta"):
        net(images().to("meta"))
    large = optimize(nn.Sequential(nn.Conv2d(3, 3, 7)).eval())
    with pytest.raises(ValueError, match="layer '0': the 7x7 filter is larger than the padded input"):
        large(images(1, 4))


@pytest.mark.parametrize(
    "tells",
    [
        lambda x: isinstance(x, Tensor),
        torch.is_tensor,
        lambda x: type(x) is Tensor,
        lambda x: not hasattr(x, "decoded"),
        lambda x: not callable(x),
        lambda x: "tensor" in f"{x}",
    ],
)
def test_a_model_that_distinguishes_tensors_from_proxies_is_refused(tells: Callable[[Any], bool]) -> None:
    model = Asks(lambda m, x, *_: m.conv(x) if tells(x) else m.conv(x) * 2.0).eval()
    with pytest.raises(ValueError, match="the plan of Asks gives other results than Asks"):
        optimize(model)(images())
    with pytest.raises(ValueError, match="the plan of Asks gives other results than Asks"):
        optimize(model, images())


def test_a_net_for_one_batch_size_is_accepted() -> None:
    model, x = Asks(lambda m, x, *_: m.conv(x).reshape(1, 12, 16, 16)).double().eval(), images(4, dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= EXACT_BLOCK


def test_it_works_under_function_transforms() -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    y, _ = torch.func.jvp(optimize(model), (x,), (torch.ones_like(x),))
    assert relative_error(y, answers(model, x)[0]) <= EXACT_BLOCK


def test_a_failed_comparison_is_repeated_at_the_next_call() -> None:
    net = optimize(Asks(lambda m, x, *_: m.conv(x) if type(x) is Tensor else m.conv(x) * 2.0).eval())
    for other in (net, copy.deepcopy(net)):
        for _ in range(2):
            with pytest.raises(ValueError, match="gives other results than Asks"):
                other(images())


class Normalises(nn.Module):
    """A net that normalises its own input, by registered buffers or by numbers."""

    def __init__(self, body: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.net, self.body = tiny(), body
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(shape or 3))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(shape or 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.body(self, x))


def _in_place(m: Any, x: Tensor) -> Tensor:
    x -= m.mean
    x /= m.std
    return x


FRONTS: dict[str, Callable[[], nn.Module]] = {
    "[1, C, 1, 1]": lambda: Normalises(lambda m, x: (x - m.mean) / m.std, 1, 3, 1, 1),
    "[C, 1, 1]": lambda: Normalises(lambda m, x: (x - m.mean) / m.std, 3, 1, 1),
    "[C]": lambda: Normalises(lambda m, x: (x - m.mean[None, :, None, None]) / m.std.view(1, -1, 1, 1)),
    "numbers": lambda: Normalises(lambda m, x: x / 255 - 0.5),
    "from -1 to 1": lambda: Normalises(lambda m, x: 1 - 2 * x / 255),
    "methods": lambda: Normalises(lambda m, x: x.sub(m.mean).div(m.std), 3, 1, 1),
    "methods in place": lambda: Normalises(lambda m, x: x.sub_(m.mean).div_(m.std), 3, 1, 1),
    "operators in place": lambda: Normalises(_in_place, 3, 1, 1),
}

HEADS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 16), nn.ReLU()).append(
        nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))
    ),
    "its kinds": lambda: nn.Sequential(nn.BatchNorm1d(32, affine=False), nn.BatchNorm1d(32, eps=0.1, momentum=None)),
}


def _with_head(head: nn.Module) -> nn.Module:
    model = nn.Sequential(*tiny()[:-1], head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.track_running_stats:
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", [*FRONTS, *HEADS])
def test_normalising_fronts_and_batch_norm_heads_are_supported(name: str, dtype: torch.dtype) -> None:
    model = FRONTS[name]().eval() if name in FRONTS else _with_head(HEADS[name]())
    x = torch.rand(6, 3, 16, 16) * (255 if "numbers" in name or "from" in name else 1)
    kept, (reference,) = x.clone(), answers(copy.deepcopy(model).double(), x.double())
    if dtype == torch.int8:
        with fastres.backend("reference"):
            net = optimize(model, dtype=dtype, calibration=[x])
            assert relative_error(net(x), reference) < 0.1
    else:
        net = optimize(model, dtype=dtype)
        got = net(x)
        assert torch.equal(x, kept)
        (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype, copy=True))
        if dtype == torch.float64:
            assert relative_error(got, reference) <= EXACT_BLOCK
        else:
            assert_close_to_reference(got, reference, baseline)
    assert torch.equal(x, kept)
    assert net._by_image == (name != "[C]")


class Embeds(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.body = nn.Sequential(*tiny()[:-2]), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.net(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.normalize(x.flatten(1)),
        lambda x: F.normalize(x.flatten(1), p=1, dim=-1),
        lambda x: x.squeeze(-1).squeeze(-1),
        torch.squeeze,
    ],
)
def test_embeddings_are_supported(body: Callable[[Tensor], Tensor]) -> None:
    model, x = Embeds(body).double().eval(), images(dtype=torch.float64)
    assert relative_error(optimize(model)(x), answers(model, x)[0]) <= EXACT_BLOCK


def test_a_constant_has_no_batch_dimension() -> None:
    """A batch is not split if a step reads only model tensors, because its result has no images."""
    body: Any = lambda m, x: F.relu(m.mean) if m.net is not None else x  # noqa: E731
    for front in (lambda m, x: m.mean - m.std, body):
        steps_of = Normalises(lambda m, x, front=front: x * front(m, x), 1, 3, 1, 1).eval()
        assert not optimize(steps_of)._by_image


def _exported(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()


def _compiled(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(net, backend="eager", dynamic=True, fullgraph=True)


def _as_onnx(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    runtime, file = pytest.importorskip("onnxruntime"), io.BytesIO()
    torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


RECORDERS: dict[str, Callable[..., Any]] = {
    "torch.jit.trace": torch.jit.trace,
    "torch.export": _exported,
    "torch.compile": _compiled,
    "vmap": lambda net, x: lambda x: torch.func.vmap(lambda image: net(image[None])[0])(x),
    "onnx": pytest.param(_as_onnx, marks=pytest.mark.extra),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("called", [False, True], ids=["cold", "called before"])
@pytest.mark.parametrize("recorder", RECORDERS.values(), ids=RECORDERS)
def test_a_recording_works_for_any_batch_size(recorder: Any, called: bool) -> None:
    model = tiny()
    net = optimize(model, images(2) if called else None)
    recorded = recorder(net, images(2))
    assert {key[0] for key in net._programs} <= {(2, 3, 16, 16)}  # jit.trace checks with a call
    for n in (1, 2, 5):
        x = images(n)
        assert relative_error(recorded(x), answers(model, x)[0]) <= SUMS
    assert relative_error(net(x), answers(model, x)[0]) <= SUMS


def test_recording_works_under_autocast_inference_mode_and_with_gradients() -> None:
    net, x = optimize(tiny()), images()
    for mode in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with mode:
            assert torch.equal(_compiled(net, x)(x), net._run_recorded(x))
    exported = torch.export.export(optimize(tiny(), dtype=torch.bfloat16), (x.requires_grad_(),)).module()
    assert exported(x).dtype == torch.bfloat16
    assert not exported(x).requires_grad


def test_recording_an_int8_net_raises() -> None:
    model, x = tiny(), images()
    with fastres.backend("reference"):
        small = optimize(model, dtype=torch.int8, calibration=[x])
    for recorder in (torch.jit.trace, _exported):
        with pytest.raises(RuntimeError, match="this int8 net can't be traced, exported, compiled or transformed"):
            recorder(small, x)


def test_a_tensor_subclass_with_metadata_counts_as_a_plain_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Image from torchvision's transforms, or a Parameter, runs on the engines, and the result is a plain tensor."""
    net, x = optimize(tiny()), images()
    expected = net(x)
    monkeypatch.setattr(Optimized, "_run_recorded", None)
    for given in (Image(x), nn.Parameter(x)):
        y = net(given)
        assert type(y) is Tensor
        assert torch.equal(y, expected)


@pytest.mark.parametrize("body", [lambda x, m: x, lambda x, m: m.shift.expand_as(x), lambda x, m: m.shift])
def test_the_caller_owns_results_that_are_views_of_the_input_or_the_model(body: Callable[[Tensor, Any], Any]) -> None:
    class Returned(Adds):
        def forward(self, x: Tensor) -> Tensor:
            return body(x, self)[:, :] if self.conv(x) is not None else x

    net, x = optimize(Returned(body).eval()), images()
    kept = x.clone()
    first = net(x)
    want = first.clone()
    first.add_(1.0)
    assert torch.equal(x, kept)
    assert torch.equal(net(x), want)


def on_gpu() -> Optimized:
    return optimize(tiny().cuda(), dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton", "cudnn", "reference"])
def test_gpu_gives_the_results_of_the_original(backend: str, dtype: torch.dtype) -> None:
    model = lived_in(fastres.resnet50()).cuda()
    x = images(4, 96).cuda()
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastres.backend("reference"):
        (baseline,) = answers(copy.deepcopy(model).to(dtype), x.to(dtype))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastres.backend(backend):
        graphed, stepped = optimize(model, x, dtype=dtype), optimize(model, dtype=dtype, cuda_graph=False)
        for net in (graphed, stepped):
            assert_close_to_reference(net(x), reference, baseline, lost=lost_in_sums(9 * 512, baseline))
        assert "replayed as a CUDA graph" in graphed.explain()
        assert "step by step" in stepped.explain()


@pytest.mark.gpu
def test_gpu_results_survive_later_calls_threads_and_streams() -> None:
    net = on_gpu()
    inputs = [images(1 + i % 3).cuda() for i in range(12)]
    expected = [net(x).clone() for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                results = [net(x) for x in inputs]
                wrong.extend(i for i, (r, e) in enumerate(zip(results, expected, strict=True)) if not torch.equal(r, e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_gpu_number_of_graphs_is_bounded() -> None:
    net = on_gpu()
    for _ in range(2):
        for size in range(8, 8 + MAX_SHAPES + 2):
            x = images(1, size).cuda()
            assert torch.equal(net(x), net(x))
    assert sum(program.graph is not None for program in net._programs.values()) == MAX_SHAPES
    assert len(net._programs) <= 2 * MAX_SHAPES
    assert net(images(0).cuda()).shape == (0, 10)


@pytest.mark.gpu
def test_gpu_calls_can_be_captured_in_the_callers_graph() -> None:
    net = on_gpu()
    x = images().cuda()
    expected = net(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_gpu_switches_of_pytorch_are_obeyed() -> None:
    model = lived_in(fastres.resnet18()).cuda()  # wide enough for cuDNN to have TF32 kernels
    net, x = optimize(model), images(8, 64).cuda()
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    errors = {}
    for tf32 in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            errors[tf32] = relative_error(net(x), reference)
    assert errors[False] < SUMS < errors[True]
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False), fastres.backend("cudnn"):
        assert relative_error(net(x), reference) < SUMS
        assert "cudnn.enabled is off" in net.explain()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False), fastres.backend("cudnn"):
        net(x)
        assert "cudnn fused" not in net.explain()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), fastres.backend("cudnn"):
        net.ready(x)
        assert "measured: fused" in net.explain()


@pytest.mark.gpu
def test_gpu_nets_can_be_moved_and_copied() -> None:
    net, x = optimize(tiny(), dtype=torch.float16), images()
    expected = net(x)
    moved = copy.deepcopy(net).cuda()
    assert relative_error(moved(x.cuda()).cpu(), expected.double()) < GPU_HALF
    assert torch.equal(copy.deepcopy(moved)(x.cuda()), moved(x.cuda()))
    assert torch.equal(pickle.loads(pickle.dumps(moved))(x.cuda()), moved(x.cuda()))
