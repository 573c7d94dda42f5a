"""Compare the option-A shortcut with `ops.reference`: values, layouts, derivatives, graphs, errors.

The tests run on the CPU and on a GPU, if there is one, with the kernels of csrc/ and with their ATen fallbacks.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import assert_close_to_reference
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from fastres.ops import extension, reference, shortcut
from fastres.ops.shortcut import PadShortcut, pad_shortcut, pad_shortcut_add_relu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = torch.ops.fastres


class Case(NamedTuple):
    N: int
    C: int
    H: int
    W: int
    K: int
    stride: int

    @property
    def out(self) -> tuple[int, int, int, int]:
        return self.N, self.K, -(-self.H // self.stride), -(-self.W // self.stride)


CASES = [
    Case(2, 5, 9, 8, 7, 2),  # odd height, odd channels
    Case(1, 3, 1, 1, 3, 2),
    Case(2, 4, 7, 7, 4, 1),  # the identity
    Case(1, 8, 6, 10, 20, 3),
    Case(2, 16, 8, 16, 32, 2),  # 16-byte packs in every dtype and layout
    Case(2, 16, 6, 8, 24, 1),
    Case(3, 64, 14, 14, 128, 2),
    Case(1, 1, 5, 5, 4, 2),
    Case(2, 3, 1, 9, 8, 100),  # stride beyond the image
    Case(1, 0, 4, 4, 2, 2),  # nothing but zeros
    Case(0, 3, 4, 4, 5, 2),
    Case(2, 3, 0, 4, 5, 2),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda t: t.contiguous(),
    "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "nhwc sliced": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, t.shape[1] :],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    """Build and load the CPU kernel before the first test, so that no test runs the ATen fallback by accident."""
    if os.environ.get("FASTRES_CUDA_EXT") != "0":
        assert extension.load("cpu"), extension.status().reason


def integers(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Return small random integers, whose sums are exact in every dtype and often zero."""
    return torch.randint(-4, 5, shape, device=device).to(dtype)


def tensors(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return y, x and a gradient of the output."""
    arrange = LAYOUTS[layout]
    x = arrange(integers((case.N, case.C, case.H, case.W), dtype, device))
    return arrange(integers(case.out, dtype, device)), x, arrange(integers(case.out, dtype, device))


def same(actual: Tensor, expected: Tensor) -> None:
    """Assert equal values; NaN equals NaN, and 0 equals -0, whose sign differs among PyTorch's own ReLU kernels."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def has_format(actual: Tensor, like: Tensor) -> bool:
    return actual.stride() == torch.empty(actual.shape, memory_format=shortcut._memory_format(like)).stride()


class Bodies(NamedTuple):
    pad: Callable[..., Tensor]
    pad_backward: Callable[..., Tensor]
    add_relu: Callable[..., Tensor]
    add_relu_backward: Callable[..., tuple[Tensor, Tensor]]


THROUGH_DISPATCHER = Bodies(
    OPS.pad_shortcut, OPS.pad_shortcut_backward, OPS.pad_shortcut_add_relu, OPS.pad_shortcut_add_relu_backward
)


@pytest.fixture(params=["kernel", "aten"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bodies:
    if request.param == "kernel":
        return THROUGH_DISPATCHER
    monkeypatch.setattr(extension, "load", lambda device: False)
    return Bodies(
        shortcut._pad_aten, shortcut._pad_backward_aten, shortcut._add_relu_aten, shortcut._add_relu_backward_aten
    )


@pytest.fixture
def poisoned_empty(poisoned: None) -> Iterator[None]:
    """Fill uninitialised memory with NaN, allocated from Python or from C++ through the dispatcher."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def expected_of(case: Case, y: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the reference's pad_shortcut and its dx, then pad_shortcut_add_relu and its dy and dx by autograd."""
    y, x = y.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    pad = reference.pad_shortcut(x, case.stride, case.K)
    fused = reference.pad_shortcut_add_relu(y, x, case.stride)
    (dx,) = torch.autograd.grad(pad, x, grad)
    return [pad.detach(), dx, fused.detach(), *torch.autograd.grad(fused, (y, x), grad)]


def actual_of(bodies: Bodies, case: Case, y: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
    sizes = case.C, case.H, case.W
    fused = bodies.add_relu(y, x, case.stride)
    return [
        bodies.pad(x, case.stride, case.K),
        bodies.pad_backward(grad, case.stride, *sizes),
        fused,
        *bodies.add_relu_backward(grad, fused, case.stride, *sizes),
    ]


def hold(bodies: Bodies, case: Case, y: Tensor, x: Tensor, grad: Tensor) -> None:
    before = y.clone(), x.clone(), grad.clone()
    actual = actual_of(bodies, case, y, x, grad)
    for result, expected, like in zip(
        actual, expected_of(case, y, x, grad), (x, grad, y, actual[2], actual[2]), strict=True
    ):
        same(result, expected)
        assert has_format(result, like)
    for t, t_before in zip((y, x, grad), before, strict=True):
        same(t, t_before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", shortcut.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_equals_the_reference(
    bodies: Bodies, poisoned_empty: None, dtype: torch.dtype, layout: str, device: str
) -> None:
    for case in CASES:
        hold(bodies, case, *tensors(case, dtype, layout, device))


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_layouts(bodies: Bodies, device: str) -> None:
    case = Case(2, 16, 9, 8, 32, 2)
    for a in LAYOUTS:
        for b in LAYOUTS:
            y, _, _ = tensors(case, torch.float32, a, device)
            _, x, _ = tensors(case, torch.float32, b, device)
            grad = integers((1, 1, 1, 1), torch.float32, device).expand(case.out)  # as from a sum()
            hold(bodies, case, y, x, grad)
            hold(bodies, case, y, x[:1].expand_as(x), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", shortcut.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_special_values(bodies: Bodies, dtype: torch.dtype, device: str) -> None:
    """All pairs of NaN, infinities, both zeros, tiny and huge values, whose sums may overflow or round."""
    info = torch.finfo(dtype)
    nan, inf = float("nan"), float("inf")
    values = [nan, inf, -inf, 0.0, -0.0, info.tiny, -info.tiny, info.max, info.min, 1.0, -1.0, 1 + info.eps, info.eps]
    special = torch.tensor(values, dtype=torch.float64).to(dtype)
    special = torch.cat([special, special.abs().neg()])  # NaN of either sign
    y, x = (
        t.reshape(1, 1, len(special), len(special)).to(device) for t in torch.meshgrid(special, special, indexing="ij")
    )
    case = Case(1, 1, len(special), len(special), 2, 1)
    y = torch.cat([y, x], 1)
    for layout in ("nchw", "nhwc"):
        hold(bodies, case, LAYOUTS[layout](y), LAYOUTS[layout](x), LAYOUTS[layout](y.flip(0, 1)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(dtype: torch.dtype, device: str) -> None:
    y, x = torch.randn(2, 24, 5, 4, device=device, dtype=dtype), torch.randn(2, 9, 9, 8, device=device, dtype=dtype)
    expected = reference.pad_shortcut_add_relu(y.double(), x.double(), 2)
    assert_close_to_reference(pad_shortcut_add_relu(y, x, 2), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("net", "batch"), [("paper-34-A", 256), ("cifar-110", 128)])
def test_every_shortcut_of_the_nets(net: str, batch: int, dtype: torch.dtype, layout: str, device: str) -> None:
    """The sizes of the nets' shortcuts, with two images on the CPU."""
    assert extension.load(device), extension.status().reason
    batch = batch if device == "cuda" else 2
    sizes = {"paper-34-A": [(64, 56), (128, 28), (256, 14)], "cifar-110": [(16, 32), (32, 16)]}[net]
    for channels, size in sizes:
        case = Case(batch, channels, size, size, 2 * channels, 2)
        hold(THROUGH_DISPATCHER, case, *tensors(case, dtype, layout, device))


@pytest.mark.parametrize("device", DEVICES)
def test_fuzz(bodies: Bodies, device: str) -> None:
    first = int(os.environ.get("FASTRES_FUZZ_SEED", "0"))
    for seed in range(first, first + int(os.environ.get("FASTRES_FUZZ_COUNT", "60"))):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        N, C, H, W = rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 20), rng.randint(1, 40)
        case = Case(N, C, H, W, C + rng.choice([0, 1, C, rng.randint(0, 70)]), rng.choice([1, 2, 2, 2, 3, 5]))
        dtype = rng.choice(shortcut.DTYPES)
        layouts = [rng.choice(list(LAYOUTS)) for _ in range(3)]
        try:
            y, x, grad = (tensors(case, dtype, layout, device)[i] for i, layout in enumerate(layouts))
            hold(bodies, case, y, x, grad)
        except Exception:
            print(f"{case} {dtype} {layouts}")
            print(f"FASTRES_FUZZ_SEED={seed} FASTRES_FUZZ_COUNT=1 python -m pytest {__file__} -k 'fuzz and {device}'")
            raise


def test_threads_agree() -> None:
    """Results of a tensor that is large enough for several threads don't depend on their number."""
    threads = torch.get_num_threads()
    case = Case(4, 40, 31, 30, 80, 2)
    try:
        for layout in ("nchw", "nhwc"):
            y, x, grad = tensors(case, torch.float32, layout)
            results = []
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                out = OPS.pad_shortcut_add_relu(y, x, 2)
                results.append([out, *OPS.pad_shortcut_add_relu_backward(grad, out, 2, 40, 31, 30)])
            for result in results:
                for actual, expected in zip(result, expected_of(case, y, x, grad)[2:], strict=True):
                    same(actual, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    """x has 2^32 elements, which selects the 64-bit kernels. The rows with the largest offsets are checked."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    x = torch.randint(-4, 5, (1, 4, 32768, 32768), dtype=torch.int8, device="cuda").to(torch.bfloat16)
    y = torch.randint(-4, 5, (1, 6, 16384, 16384), dtype=torch.int8, device="cuda").to(torch.bfloat16)
    out = OPS.pad_shortcut_add_relu(y, x, 2)
    same(out[:, 3, -9:], torch.relu(y[:, 3, -9:] + x[:, 3, -18::2, ::2]))
    same(out[:, 5, -9:], torch.relu(y[:, 5, -9:]))
    dy, dx = OPS.pad_shortcut_add_relu_backward(y, out, 2, 4, 32768, 32768)
    same(dy[:, 5, -9:], y[:, 5, -9:] * (out[:, 5, -9:] > 0) + 0.0)
    same(dx[:, 3, -18::2, ::2], dy[:, 3, -9:])
    assert not dx[:, 3, -17::2].any()
    assert not dx[:, 3, -18:, 1::2].any()


@pytest.fixture
def smooth() -> tuple[Tensor, Tensor]:
    """Return y and x in float64 such that y plus the shortcut of x is not near 0, where ReLU has no derivative."""
    y, x = torch.randn(2, 4, 3, 2, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = y + 0.1 * torch.sign(y + reference.pad_shortcut(x, 2, 4))
    return y.requires_grad_(), x.requires_grad_()


def test_gradients(smooth: tuple[Tensor, Tensor]) -> None:
    y, x = smooth
    for f, inputs in ((lambda x: pad_shortcut(x, 2, 4), (x,)), (lambda y, x: pad_shortcut_add_relu(y, x, 2), (y, x))):
        assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("needs", ["y", "x"])
def test_gradient_of_one_input(smooth: tuple[Tensor, Tensor], needs: str) -> None:
    y, x = smooth
    (x if needs == "y" else y).requires_grad_(False)
    assert gradcheck(lambda y, x: pad_shortcut_add_relu(y, x, 2), (y, x), check_forward_ad=True)


def cubes(f: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, x: (f(y, x, 2) ** 3).sum()


@pytest.mark.parametrize("through", ["function", "op"])
def test_functorch(smooth: tuple[Tensor, Tensor], through: str) -> None:
    """functorch transforms, nested ones too, equal the reference's: a custom operator may silently give zeros there."""
    func = torch.func
    y, x = (t.detach() for t in smooth)
    tangents = torch.randn_like(y), torch.randn_like(x)
    transforms: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
        "grad": lambda f: func.grad(cubes(f), (0, 1))(y, x),
        "jvp": lambda f: func.jvp(lambda y, x: f(y, x, 2), (y, x), tangents),
        "jvp of one": lambda f: func.jvp(lambda x: f(y, x, 2), (x,), tangents[1:]),
        "jvp of the other": lambda f: func.jvp(lambda y: f(y, x, 2), (y,), tangents[:1]),
        "jvp of grad": lambda f: func.jvp(func.grad(cubes(f), (0, 1)), (y, x), tangents),
        "grad of jvp": lambda f: func.grad(lambda y: func.jvp(lambda x: cubes(f)(y, x), (x,), tangents[1:])[1])(y),
        "hessian": lambda f: func.hessian(lambda x: cubes(f)(y[:1], x))(x[:1]),
        "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(lambda x: cubes(f)(y[:1, :, :1], x)))(x[:1, :, :2]),
        "vmap": lambda f: func.vmap(lambda y, x: f(y, x, 2), (1, None))(torch.stack([y, y + 1], 1), x),
        "vmap of vmap": lambda f: func.vmap(func.vmap(lambda y, x: f(y, x, 2), (None, 1)), (1, None))(
            torch.stack([y, y + 1], 1), torch.stack([x, x + 1, x + 2], 1)
        ),
        "vmap of grad": lambda f: func.vmap(func.grad(cubes(f), (0, 1)), (None, 2))(y, torch.stack([x, x + 1], 2)),
    }
    ours = pad_shortcut_add_relu if through == "function" else OPS.pad_shortcut_add_relu
    for name, transform in transforms.items():
        actual, expected = transform(ours), transform(reference.pad_shortcut_add_relu)
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_forward_mode_outside_functorch(smooth: tuple[Tensor, Tensor]) -> None:
    y, x = (t.detach() for t in smooth)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        for f in (lambda x: OPS.pad_shortcut(x, 2, 4), lambda x: pad_shortcut_add_relu(y, x, 2)):
            assert torch.autograd.forward_ad.unpack_dual(f(dual)).tangent is not None


def test_only_the_output_is_saved() -> None:
    saved: list[Tensor] = []
    y, x = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pad_shortcut(x, 2, 6)
        assert not saved
        out = pad_shortcut_add_relu(y, x, 2)
    assert [t.data_ptr() for t in saved] == [out.data_ptr()]


def test_inputs_changed_after_the_forward() -> None:
    """Backward needs neither input, so both may be overwritten. Overwriting the output raises."""
    y, x = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    a, b = y * 1, x * 1
    out = pad_shortcut_add_relu(a, b, 2)
    a.zero_()
    b.zero_()
    out.sum().backward()
    same(y.grad, (out > 0).float())
    out = pad_shortcut_add_relu(y * 1, x * 1, 2)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_opcheck(layout: str) -> None:
    case = Case(2, 5, 9, 8, 7, 2)
    y, x, grad = (t.requires_grad_() for t in tensors(case, torch.float64, layout))
    out = grad.detach().relu()
    torch.library.opcheck(OPS.pad_shortcut.default, (x, 2, 7))
    torch.library.opcheck(OPS.pad_shortcut_backward.default, (grad, 2, 5, 9, 8))
    torch.library.opcheck(OPS.pad_shortcut_add_relu.default, (y, x, 2))
    torch.library.opcheck(OPS.pad_shortcut_add_relu_backward.default, (grad, out, 2, 5, 9, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_has_the_kernels_strides(layout: str) -> None:
    """Fake tensors have the kernels' strides, on which compiled graphs rely. opcheck doesn't compare all strides."""
    for case in CASES:
        y, x, grad = tensors(case, torch.float32, layout)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (y, x, grad)]
            fake = actual_of(THROUGH_DISPATCHER, case, *fakes)
        for f, real in zip(fake, actual_of(THROUGH_DISPATCHER, case, y, x, grad), strict=True):
            assert (f.shape, f.stride(), f.dtype) == (real.shape, real.stride(), real.dtype)


def block(y: Tensor, x: Tensor) -> Tensor:
    return pad_shortcut_add_relu(y * 2, x, 2) + PadShortcut(2, y.shape[1])(x)


def plain_block(y: Tensor, x: Tensor) -> Tensor:
    return reference.pad_shortcut_add_relu(y * 2, x, 2) + reference.pad_shortcut(x, 2, y.shape[1])


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_compile(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    for layout in ("nchw", "nhwc"):
        y, x, grad = tensors(Case(2, 6, 9, 8, 12, 2), torch.float32, layout)
        y.requires_grad_()
        x.requires_grad_()
        out, expected = compiled(y, x), plain_block(y, x)
        same(out, expected)
        for a, e in zip(
            torch.autograd.grad(out, (y, x), grad), torch.autograd.grad(expected, (y, x), grad), strict=True
        ):
            same(a, e)


def test_module_in_graphs_is_aten_only() -> None:
    module, x = PadShortcut(2, 8), torch.randn(2, 3, 7, 9)
    expected = reference.pad_shortcut(x, 2, 8)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(t.startswith("aten.") or "sym_" in t for t in targets)
    scripted, traced = torch.jit.script(module), torch.jit.trace(module, x)
    for graph in (scripted.inlined_graph, traced.inlined_graph, torch.fx.symbolic_trace(module).graph):
        assert "fastres::" not in str(graph)
    for form in (exported.module(), scripted, traced, torch.fx.symbolic_trace(module), module):
        same(form(x), expected)


def test_module() -> None:
    module = PadShortcut(2, 8)
    assert str(module) == "PadShortcut(stride=2, channels=8)"
    assert not list(module.parameters())
    assert not module.state_dict()
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        PadShortcut(0, 8)


def test_flop_counter_counts_zero() -> None:
    y, x = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        pad_shortcut_add_relu(y, x, 2).sum().backward()
    assert counter.get_total_flops() == 0


def test_autocast_leaves_dtypes_alone() -> None:
    y, x = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert pad_shortcut_add_relu(y, x, 2).dtype == torch.float32
        assert pad_shortcut_add_relu(y.bfloat16(), x.bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    y, x, _ = tensors(CASES[0], torch.float32, "nchw")
    with mode():
        same(pad_shortcut_add_relu(y, x, 2), reference.pad_shortcut_add_relu(y, x, 2))
        same(OPS.pad_shortcut(x, 2, 7), reference.pad_shortcut(x, 2, 7))
        assert not pad_shortcut(x.requires_grad_(), 2, 7).requires_grad


X, Y = torch.zeros(2, 3, 9, 8), torch.zeros(2, 6, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pad_shortcut(X, 0, 6), ValueError, "stride must be at least 1, got 0"),
        (lambda: pad_shortcut(X, 2, 2), ValueError, "channels must be at least x's 3 .* got 2"),
        (lambda: pad_shortcut(X[0], 2, 6), ValueError, r"x must have 4 dimensions \[N, C, H, W\], got \(3, 9, 8\)"),
        (lambda: pad_shortcut(X.int(), 2, 6), TypeError, "x is int32; accepted: float64, float32, bfloat16, float16"),
        (lambda: pad_shortcut(X.to(torch.cfloat), 2, 6), TypeError, "x is complex64"),
        (lambda: pad_shortcut_add_relu(Y.half(), X, 2), TypeError, "same dtype, got torch.float16 and torch.float32"),
        (lambda: pad_shortcut_add_relu(Y[:, :2], X, 2), ValueError, "at least x's 3"),
        (lambda: pad_shortcut_add_relu(Y, X, 3), ValueError, r"y must be \(2, 6, 3, 3\) .* got \(2, 6, 5, 4\)"),
        (lambda: pad_shortcut_add_relu(Y[:1], X, 2), ValueError, r"y must be \(2, 6, 5, 4\)"),
        (lambda: pad_shortcut_add_relu(Y[0], X, 2), ValueError, r"y must have 4 dimensions"),
        (lambda: pad_shortcut_add_relu(Y.to("meta"), X, 2), ValueError, "same device, got meta and cpu"),
        (lambda: OPS.pad_shortcut(X, 0, 6), RuntimeError, "stride must be at least 1, got 0"),
        (lambda: OPS.pad_shortcut(X, 2, 2), RuntimeError, "channels must be at least x's 3, got 2"),
        (lambda: OPS.pad_shortcut(X.int(), 2, 6), RuntimeError, "float64, float32, bfloat16 or float16"),
        (lambda: OPS.pad_shortcut_add_relu(Y.half(), X, 2), RuntimeError, "y must have the dtype"),
        (lambda: OPS.pad_shortcut_add_relu(Y, X, 3), RuntimeError, r"y must be \[2, 6, 3, 3\], got \[2, 6, 5, 4\]"),
        (lambda: OPS.pad_shortcut_backward(Y, 3, 3, 9, 8), RuntimeError, r"grad must be \[2, 6, 3, 3\]"),
        (lambda: OPS.pad_shortcut_add_relu_backward(Y[:1], Y, 2, 3, 9, 8), RuntimeError, "grad must be"),
    ],
)
def test_errors(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


SWITCHED_OFF = """
import os, torch
from fastres.ops import extension, reference, shortcut
assert not extension._outcome, "import loads nothing"
y, x = torch.randn(2, 7, 5, 4, requires_grad=True), torch.randn(2, 5, 9, 8, requires_grad=True)
def gradients(module):
    out = module.pad_shortcut_add_relu(y, x, 2) + module.pad_shortcut(x, 2, 7)
    return out, *torch.autograd.grad((out ** 2).sum(), (y, x))
for actual, expected in zip(gradients(shortcut), gradients(reference), strict=True):
    assert torch.equal(actual, expected)
assert not os.listdir(os.environ["FASTRES_CACHE_DIR"]), "nothing is built"
assert extension.status() == extension.Status(False, False, extension.status().reason)
assert "off by FASTRES_CUDA_EXT=0" in extension.status().reason
"""


def test_switched_off(tmp_path: Any) -> None:
    """With FASTRES_CUDA_EXT=0 the operators run their ATen fallbacks, give the same values and build nothing."""
    environment = {**os.environ, "FASTRES_CUDA_EXT": "0", "FASTRES_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", SWITCHED_OFF],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
