"""Test `Optimized` on inputs whose shape varies: what a call at a new shape does, and what the net keeps and drops."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from typing import Any

import pytest
import torch
from cases import assert_close_to_reference, relative_error
from fake_cuda import FakeCuda
from nets import answers, images, tiny
from tolerances import EXACT_BLOCK
from torch import Tensor, nn

import fastres
from fastres import optimize, resnet50
from fastres.inference import optimized, program
from fastres.inference.optimized import MAX_KNOWN, MAX_SHAPES, PREPARED_AFTER, REPLACED_AFTER, Optimized
from fastres.ops import dispatch, onednn, quantised


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work that a call at a new shape should not do, as it is done; the graph of a compiled plan always wins."""
    done: list[str] = []

    def noting(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            w = given[0]
            small = isinstance(w, Tensor) and w.dtype == torch.float32 and w.shape[2:] == (1, 1)
            done.append(f"{what} 1x1" if small else what)
            return function(*given, **options)

        monkeypatch.setattr(owner, name, call)

    noting(torch.ops.mkldnn, "_reorder_convolution_weight", "packed float")
    noting(torch.ops.mkldnn, "_reorder_linear_weight", "packed float")
    noting(quantised.ByOneDNN, "__init__", "packed int8")
    noting(onednn, "script", "compiled")
    monkeypatch.setattr(program, "_seconds", lambda calls: done.append("timed") or [1.0, 2.0])
    return done


def net_in(dtype: torch.dtype, model: nn.Module | None = None, **options: Any) -> Optimized:
    """`model`, by default a small one, optimized in `dtype` for oneDNN. The test is skipped if this CPU can't."""
    if (why := dispatch.why_no_onednn(dtype)) is not None:
        pytest.skip(why)
    if dtype == torch.int8:
        options["calibration"] = [torch.rand(4, 3, 32, 32)]
    return optimize(model or tiny(), dtype=dtype, **options)


DTYPES = (torch.float32, torch.bfloat16, torch.int8)
# Of batches and of images; tiny's last convolution has outputs of a quarter of this width, all of one kind to oneDNN.
SHAPES = [(n, 3, h, w) for n in (1, 2, 7) for h, w in ((40, 40), (64, 48), (33, 61))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_at_a_new_shape_neither_packs_nor_compiles_nor_times(dtype: torch.dtype, work: list[str]) -> None:
    net = net_in(dtype, example=torch.rand(2, 3, 56, 56))
    assert "compiled" in work
    net(torch.rand(1, 3, 56, 56))  # oneDNN wants another classifier for a single image
    work.clear()
    for _ in range(2):
        for shape in SHAPES:
            net(torch.rand(shape))
    assert {*work} == ({"packed float 1x1"} if dtype == torch.float32 else set()), "see `onednn.format_for`"
    net(torch.rand(SHAPES[0]))
    work.clear()
    for _ in range(PREPARED_AFTER["cpu"] - 3):
        net(torch.rand(SHAPES[0]))
    assert not work
    net(torch.rand(SHAPES[0]))
    assert "compiled" in work, "the shape has come often"
    work.clear()
    net(torch.rand(SHAPES[0]))
    assert not work
    net.ready(torch.rand(SHAPES[1]))
    assert "compiled" in work, "asked for"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_weights_are_converted_by_onednns_slow_code(dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights packed for another shape may be converted in each call, but not by code that takes up to 60 ms."""
    net = net_in(dtype, resnet50().eval(), example=torch.rand(1, 3, 96, 96), torchscript=False)
    for shape in ((1, 3, 152, 112), (1, 3, 120, 112), (2, 3, 109, 150), (1, 3, 219, 81)):
        x = torch.rand(shape)
        net(x)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            net(x)
        executed = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
        assert sum(",convolution," in line for line in executed) == 53
        assert not [line for line in executed if ",reorder,simple" in line]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_engine_is_chosen_once_for_all_sizes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except where oneDNN may want filters in another format: for 1x1 filters."""
    net = net_in(dtype, torchscript=False)
    for size in (32, 48):
        net(torch.rand(2, 3, size, size))
    engine, chosen = dispatch.folded_engine, []

    def noting(problem: Any, *given: Any, **options: Any) -> Any:
        chosen.append(problem)
        return engine(problem, *given, **options)

    monkeypatch.setattr(dispatch, "folded_engine", noting)
    net(torch.rand(2, 3, 49, 35))
    assert all(problem.R == problem.S == 1 for problem in chosen)
    assert dtype == torch.float32 or not chosen
    with dispatch.backend("reference"):
        net(torch.rand(2, 3, 49, 35))
    assert len(chosen) > 3, "the engines of another backend are not used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_size_that_an_engine_refuses_runs_on_another(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine was chosen for another size, so the refusal comes from a step that programs share."""
    net, conv = net_in(dtype, torchscript=False), onednn.conv
    small, x = images(2, 24), images(2, 40)
    model = tiny()
    model.load_state_dict(net.state_dict())
    (reference,) = answers(copy.deepcopy(model).double(), x.double())
    (theirs,) = answers(model.to(dtype), x.to(dtype))

    def refusing(x: Tensor, *given: Any, **options: Any) -> Tensor:
        if x.shape[1] >= 40:
            raise RuntimeError("not at this size\nsecond line")
        return conv(x, *given, **options)

    monkeypatch.setattr(onednn, "conv", refusing)
    before = net(small)
    assert_close_to_reference(net(x), reference, theirs)
    assert "oneDNN: not at this size" in net.explain((2, 3, 40, 40))
    assert torch.equal(net(small), before)
    assert "oneDNN: " not in net.explain((2, 3, 24, 24))


def test_an_image_smaller_than_a_filter_is_refused_by_name_at_any_call() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 7)).eval()
    net = optimize(model)
    for good in (9, 16):
        with pytest.raises(ValueError, match=r"layer '2': the 7x7 filter is larger than the padded input"):
            net(images(1, 8))
        net(images(1, good))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_answers_do_not_depend_on_the_shapes_that_came_before(dtype: torch.dtype) -> None:
    """Weights that were packed for other shapes serve, whether the net is prepared for this one or not."""
    net = net_in(dtype, torchscript=False)
    model = tiny()
    model.load_state_dict(net.state_dict())
    for x in map(torch.rand, SHAPES):
        (reference,) = answers(copy.deepcopy(model).double(), x.double())
        alone = copy.deepcopy(net)(x)  # a copy has bound nothing
        for prepare in (False, False, True):
            if prepare:
                net.ready(x)
            if dtype == torch.int8:
                assert torch.equal(net(x), alone)
            else:
                theirs = answers(copy.deepcopy(model).to(dtype), x.to(dtype))[0]
                assert_close_to_reference(net(x), reference, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_what_a_net_keeps_does_not_grow_with_the_number_of_shapes(dtype: torch.dtype) -> None:
    net = net_in(dtype, torchscript=False)
    held = []
    for i in range(4):
        for n, size in itertools.product((1, 2), range(32, 32 + MAX_KNOWN // 2)):
            net(torch.rand(n, 3, size, size + i))
        gc.collect()
        tensors = sum(issubclass(type(each), Tensor | quantised.ByOneDNN) for each in gc.get_objects())
        shared = [len(net._unbound.packings._first), *map(len, net._bound.values())]
        held.append((tensors, len(net._programs), len(net._image_bytes), *shared))
    assert len(set(held[1:])) == 1, held
    assert held[-1][1:3] == (MAX_SHAPES, MAX_KNOWN)


def test_inputs_of_ever_new_shapes_drop_no_prepared_program() -> None:
    net = optimize(tiny(), example=images(2, 16), torchscript=False)
    assert "dropped" not in net.explain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(17, 17 + 3 * MAX_SHAPES):
            net(images(1, size))
    assert net.explain((2, 3, 16, 16))
    assert net.explain().endswith(f"\ndropped since for other shapes: 0 prepared programs, {2 * MAX_SHAPES} others")
    assert len(net._programs) == MAX_SHAPES + 1
    net.load_state_dict(net.state_dict())
    net(images(1))
    assert "dropped" not in net.explain()


def test_many_prepared_shapes_are_dropped_with_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    net = optimize(tiny(), torchscript=False)
    for size in range(16, 16 + 4 * MAX_SHAPES):
        net.ready(images(1, size))
    said = [str(each.message) for each in recwarn if "Pad images" in str(each.message)]
    last = 16 + MAX_SHAPES - 1
    assert len(said) == 1
    assert f"has dropped {MAX_SHAPES} prepared programs for other input shapes" in said[0]
    assert f"(the last one for [1, 3, {last}, {last}])" in said[0]
    assert f"dropped since for other shapes: {3 * MAX_SHAPES} prepared programs, 0 others" in net.explain()


class Captures:
    """A net in float64 on a GPU that `FakeCuda` simulates. captured: the shape of each CUDA graph so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.cuda = FakeCuda(monkeypatch)
        self.captured: list[tuple[int, ...]] = []
        capture = program.Program.capture

        def noting(one: Any, x: Tensor, *memory: Any) -> None:
            capture(one, x, *memory)
            self.captured.append(tuple(x.shape))

        monkeypatch.setattr(program.Program, "capture", noting)
        self.model = tiny().double()
        self.net = optimize(self.model, **options)
        self.net(images(1, 12, torch.float64))  # compares the plan with the model
        self.net._drop_programs()
        self.net._last_use, self.net._graph_memory = torch.cuda.Event(), (object(), torch.cuda.Stream())
        monkeypatch.setattr(Tensor, "is_cuda", True)

    def __call__(self, n: int, size: int) -> None:
        """Call the net on random images, and check its answer."""
        x = images(n, size, torch.float64)
        with fastres.backend("reference"):
            y = self.net._on_cuda(x)
        (answer,) = y
        assert relative_error(answer, answers(self.model, x)[0]) <= EXACT_BLOCK


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Captures:
    return Captures(monkeypatch)


def test_a_graph_is_captured_in_the_third_call_with_a_shape(gpu: Captures) -> None:
    for call in range(6):
        gpu(1, 16)
        gpu(2, 16)
        assert len(gpu.captured) == (2 if call >= PREPARED_AFTER["cuda"] else 0)
    assert "replayed as a CUDA graph" in gpu.net.explain()


def test_ready_captures_at_once(gpu: Captures) -> None:
    gpu.net._on_cuda(images(1, 16, torch.float64), calls=float("inf"))
    assert len(gpu.captured) == 1
    gpu(1, 16)
    assert len(gpu.captured) == 1


def test_a_short_last_batch_leaves_the_graph_of_full_ones(gpu: Captures) -> None:
    """Its steps run one by one, until it has come at the end of several epochs."""
    for epoch in range(4):
        for _ in range(5):
            gpu(4, 16)
        gpu(1, 16)
        assert [shape[0] for shape in gpu.captured] == ([4] if epoch < PREPARED_AFTER["cuda"] else [4, 1])


def test_a_detectors_shapes_are_captured_only_if_they_come_again(gpu: Captures) -> None:
    """Hundreds of sizes, none of which comes again soon, capture nothing and drop no graph."""
    for _ in range(3):
        gpu(2, 16)
    for size in range(17, 77):
        gpu(1, size)
        if size % 10 == 0:
            gpu(2, 16)
    assert [shape[0] for shape in gpu.captured] == [2]
    assert gpu.net._dropped[True] == 0


def test_more_shapes_than_it_keeps_are_not_captured_in_turns(gpu: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimized, "REPLACED_AFTER", 60)
    assert REPLACED_AFTER > 60
    sizes = range(12, 12 + MAX_SHAPES + 2)
    calls = 0
    for _ in range(12):
        for size in sizes:
            gpu(1, size)
            calls += 1
    assert MAX_SHAPES < len(gpu.captured) <= MAX_SHAPES + calls // 60


def test_a_capture_that_fails_is_tried_again(gpu: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory for a graph")

    for _ in range(2):
        gpu(1, 16)
    with monkeypatch.context() as within:
        within.setattr(program.Program, "capture", fails)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="no memory for a graph"):
                gpu(1, 16)
    gpu(1, 16)
    assert len(gpu.captured) == 1
