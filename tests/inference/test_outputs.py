"""Test nets that return several tensors: detection backbones, segmenters, features, and who owns what they return."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import assert_close_to_reference, relative_error
from nets import answers, images, lived_in, tiny
from tolerances import EXACT_BLOCK, INT8, ONEDNN_GRAPH, SUMS
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fastres
from fastres import optimize
from fastres.inference import optimized, program
from fastres.inference.plan import by_image, leaves, mapped
from fastres.inference.trace import trace
from fastres.ops import dispatch

detection, segmentation = torchvision.models.detection, torchvision.models.segmentation
Getter = torchvision.models._utils.IntermediateLayerGetter


def _frozen(model: nn.Module) -> nn.Module:
    """Draw the statistics and parameters of every FrozenBatchNorm2d, as `lived_in` does for BatchNorm2d."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2.0), ("weight", 0.5, 1.2)):
                getattr(module, name).uniform_(low, high)
            module.bias.uniform_(-0.3, 0.3)
    return lived_in(model)


def _pyramid(**options: Any) -> nn.Module:
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    return _frozen(_resnet_fpn_extractor(resnet, trainable_layers=3, **options))


def _segmenter(name: str, aux: bool = False) -> nn.Module:
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=aux)


def _features(name: str = "resnet18", **options: Any) -> nn.Module:
    return timm.create_model(name, features_only=True, **options)


MANY: dict[str, Callable[[], nn.Module]] = {
    "layers of torchvision's": lambda: Getter(torchvision.models.resnet50(), {"layer1": "low", "layer4": "high"}),
    "layers of ours": lambda: Getter(fastres.resnet18(), {"layer1": "low", "layer4": "high"}),
    "pyramid": _pyramid,
    "pyramid with P6 and P7": lambda: _pyramid(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)),
    "pyramid of ours": lambda: _resnet_fpn_extractor(fastres.resnet18(), trainable_layers=3),
    "pyramid with norms": lambda: _pyramid(norm_layer=nn.BatchNorm2d),
    "DeepLab": lambda: _segmenter("deeplabv3_resnet50"),
    "FCN with aux": lambda: _segmenter("fcn_resnet50", aux=True),
    "extractor": lambda: create_feature_extractor(torchvision.models.resnet18(), {"layer2.0.relu": "mid", "fc": "fc"}),
    "timm list": _features,
    "timm dict": lambda: _features(feature_cls="dict"),
    "timm getter": lambda: _features(feature_cls="getter"),
    "timm dilated": lambda: _features("resnet26", output_stride=8, out_indices=(1, 4)),
}


def _exact(model: nn.Module, x: Tensor) -> Any:
    return answers(copy.deepcopy(model).eval().double(), x.double())[0]


def _plain(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model's own result in `dtype` and channels_last, the memory format of plans."""
    model = copy.deepcopy(model).eval().to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return answers(model, x.to(dtype, memory_format=torch.channels_last))[0]


def _shapes(result: Any) -> str:
    """Describe a result: its containers with their keys and order, and the shapes of its tensors."""
    return str(mapped(result, lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf))


def assert_same(got: Any, want: Any, tolerance: float = EXACT_BLOCK) -> None:
    assert _shapes(got) == _shapes(want)
    for y, right in zip(leaves(got), leaves(want), strict=True):
        assert relative_error(y, right.double()) <= tolerance if isinstance(right, Tensor) else y == right


@pytest.mark.parametrize("name", MANY)
def test_nets_with_several_outputs_return_what_the_model_does(name: str) -> None:
    model, x = lived_in(MANY[name]()), images(2, 40)[..., :33]
    want, theirs = _exact(model, x), _plain(model, x)
    assert_same(optimize(model, dtype=torch.float64)(x), want)
    net = optimize(model)
    got = net(x)
    assert _shapes(got) == _shapes(want)
    for y, right, their in zip(leaves(got), leaves(want), leaves(theirs), strict=True):
        assert_close_to_reference(y, right, their)
    assert net._by_image


@pytest.mark.parametrize("name", ["pyramid with P6 and P7", "timm list"])
def test_every_output_is_close_in_bfloat16(name: str) -> None:
    model, x = lived_in(MANY[name]()), images(2, 32)
    got = optimize(model, dtype=torch.bfloat16)(x)
    want, theirs = _exact(model, x), _plain(model, x, torch.bfloat16)
    for y, right, their in zip(leaves(got), leaves(want), leaves(theirs), strict=True):
        assert_close_to_reference(y, right, their)


def test_a_detector_finds_the_same_boxes_with_an_optimized_backbone() -> None:
    backbone = _pyramid()
    detector = detection.FasterRCNN(backbone, 3, box_score_thresh=0.0, min_size=64, max_size=96).double().eval()
    pictures = [torch.rand(3, 60, 70).double(), torch.rand(3, 50, 90).double()]
    (want,) = answers(detector, pictures)  # type: ignore[arg-type]
    detector.backbone = optimize(backbone)
    (got,) = answers(detector, pictures)  # type: ignore[arg-type]
    assert all(len(each["boxes"]) for each in want)
    assert_same(got, want, SUMS)
    assert detector.state_dict().keys() == detection.FasterRCNN(backbone, 3).state_dict().keys()
    assert detection.FasterRCNN(detector.backbone, 3).backbone.out_channels == 256


def test_attributes_that_describe_the_model_can_be_read() -> None:
    net = optimize(_features().eval())
    assert net.feature_info.channels() == [64, 64, 128, 256, 512]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.feature_info.reduction() == [2, 4, 8, 16, 32]
    model = tiny()
    model.dtype, model.ready, model.explain, model.out_channels = "other", True, 3, 10  # names that `Optimized` uses
    model.tensor, model.function = torch.ones(3), lambda: None
    net = optimize(model)
    assert net.dtype == torch.float32
    assert callable(net.ready)
    assert callable(net.explain)
    assert net.out_channels == 10
    assert not hasattr(net, "tensor")
    assert not hasattr(net, "function")


class Features(NamedTuple):
    low: Any
    high: Any


class Returns(nn.Module):
    """A net that returns body(x, z, self); z is the output of its convolution."""

    def __init__(self, body: Callable[[Tensor, Tensor, Any], Any]) -> None:
        super().__init__()
        self.conv, self.next, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.upsample, self.body = nn.Upsample(scale_factor=2, mode="bilinear"), body
        self.register_buffer("shift", torch.randn(1, 4, 1, 1))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Any:
        return self.body(x, self.conv(x), self)


def _added(z: Tensor, other: Any) -> Tensor:
    z += other
    return z


STRUCTURES: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "tuple": lambda x, z, m: (z, F.relu(z)),
    "list": lambda x, z, m: [F.relu(z)],
    "dict": lambda x, z, m: {"b": z, "a": F.relu(z), 3: m.next(z)},
    "OrderedDict": lambda x, z, m: OrderedDict(b=z, a=F.relu(z)),
    "NamedTuple": lambda x, z, m: Features(F.relu(z), high=(z, None)),
    "nested": lambda x, z, m: {"aux": None, "levels": [z, (m.next(z), {"n": 3, "name": "p3", "on": True})]},
    "the input": lambda x, z, m: (x, z),
    "model tensors": lambda x, z, m: [z, m.shift, m.count, m.shift, m.flags],
    "a tensor twice": lambda x, z, m: {"a": z, "b": z, "c": m.next(z)},
    "contiguous": lambda x, z, m: (z, z.contiguous()),
    "read later": lambda x, z, m: (F.relu(m.norm(z)), m.next(F.relu(z)), z),
    "a residual": lambda x, z, m: (z, F.relu(m.next(F.relu(z)) + z)),
    "an unmerged sum": lambda x, z, m: (s := m.next(z) + z, F.relu(s)),
    "changed afterwards": lambda x, z, m: (z, m.next(z), _added(z, 1.0)),
    "changed by a ReLU": lambda x, z, m: (m.norm(z), F.relu(z, inplace=True), z),
    "a view": lambda x, z, m: (z, z[:, 1:], z.flatten(2)),
    "views alone": lambda x, z, m: [z[:, :2], z[:, 1:], z.reshape(z.shape[0], -1)],
    "a view of the input": lambda x, z, m: (z, x[:, :1], x.flatten(1)),
    "a size of the image": lambda x, z, m: F.interpolate(z, size=x.shape[2:]),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_results_keep_their_structure_and_belong_to_the_caller(structure: str) -> None:
    model, x = lived_in(Returns(STRUCTURES[structure])).double(), images(5, 9, torch.float64)
    kept = x.clone()
    want = answers(model, x.clone())[0]
    net = optimize(model)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        first = net(given)
        assert_same(first, want)
        tensors = {id(y): y for y in leaves(first) if isinstance(y, Tensor)}.values()
        memory = {y.untyped_storage().data_ptr() for y in (*tensors, given, *net.buffers())}
        assert len(memory) == len(tensors) + 1 + len(list(net.buffers())), "no two tensors share memory"
        for y in tensors:
            y.fill_(7)
        assert_same(net(given), want)
    assert torch.equal(x, kept)


def test_a_tensor_returned_twice_is_one_tensor() -> None:
    result = optimize(Returns(STRUCTURES["a tensor twice"]).eval())(images())
    assert result["a"] is result["b"]
    z, contiguous = optimize(Returns(STRUCTURES["contiguous"]).eval())(images())
    assert z is not contiguous


@pytest.mark.parametrize("convert", [False, True])
def test_timms_features_by_hooks_are_refused(convert: bool) -> None:
    model = _features(feature_cls="hook", out_indices=(2, 4)).eval()
    if convert:
        fastres.convert(model)
    with pytest.raises(ValueError, match=r"layer 'body\.layer2' has a hook"):
        optimize(model)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda x, z, m: (z, z.shape), "a size or number computed from tensors"),
        (lambda x, z, m: {"z": z, "n": z.shape[0] * 2}, "a size or number computed from tensors"),
        (lambda x, z, m: (z, torch.float32), "dtype"),
        (lambda x, z, m: torch.nn.utils.rnn.PackedSequence, "type"),
        (lambda x, z, m: [None, {}], "no tensor"),
        (lambda x, z, m: {1, 2}, "set"),
    ],
)
def test_other_results_are_refused(body: Callable[..., Any], what: str) -> None:
    with pytest.raises(ValueError, match=rf"or dicts, lists and tuples of tensors .*; Returns returns {what}$"):
        optimize(Returns(body).eval())


def test_a_result_written_after_a_view_of_it_was_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="'flatten' may share its memory and is read later"):
        optimize(Returns(lambda x, z, m: (z.flatten(1), _added(z, 1.0))).eval())


@pytest.mark.parametrize(
    "other",
    [
        lambda x, z, m: {"b": z, "a": m.next(z)},
        lambda x, z, m: OrderedDict(a=z, b=m.next(z)),
        lambda x, z, m: {"a": z, "b": m.next(z) * 2.0},
        lambda x, z, m: {"a": z},
    ],
)
def test_a_plan_with_another_result_is_refused(other: Callable[..., Any]) -> None:
    expected = lambda x, z, m: {"a": z, "b": m.next(z)}  # noqa: E731
    model = Returns(lambda x, z, m: (other if type(x) is Tensor else expected)(x, z, m)).eval()
    with pytest.raises(ValueError, match="the plan of Returns gives other results than Returns"):
        optimize(model)(images())


RESIZED: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "nearest": lambda x, z, m: F.interpolate(z, size=(20, 13), mode="nearest"),
    "bilinear": lambda x, z, m: F.interpolate(m.next(z), scale_factor=2, mode="bilinear", align_corners=False),
    "corners": lambda x, z, m: F.interpolate(z, (5, 7), mode="bilinear", align_corners=True),
    "to a number": lambda x, z, m: F.interpolate(F.max_pool2d(z, 2), size=(z.shape[-2], z.size(3))),
    "to a size": lambda x, z, m: m.next(z) + F.interpolate(F.max_pool2d(z, 2), size=z.size()[2:], mode="nearest"),
    "Upsample": lambda x, z, m: m.upsample(z),
    "joined": lambda x, z, m: m.next(torch.cat([z[:, :1], F.relu(z), x], dim=1)[:, :4]),
    "joined channels": lambda x, z, m: F.relu(torch.cat((z, F.adaptive_avg_pool2d(z, 1).expand_as(z)), 1)),
    "joined images": lambda x, z, m: torch.cat([z, m.next(z)]),
    "every second pixel": lambda x, z, m: F.max_pool2d(z, kernel_size=1, stride=2, padding=0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", RESIZED)
def test_resizing_and_joining_give_the_models_results(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 1)  # images run one by one, where the plan allows it
    monkeypatch.setattr(optimized, "FIRST_SLICE", 1)
    model, x = Returns(RESIZED[name]).eval(), images(3, 12)
    want = _exact(model, x)
    if dtype == torch.int8:
        with fastres.backend("reference"):
            assert relative_error(optimize(model, dtype=dtype, calibration=[x])(x), want) < INT8
        return
    assert_close_to_reference(optimize(model, dtype=dtype)(x), want, _plain(model, x, dtype))


@pytest.mark.parametrize(
    ("body", "splits"),
    [
        (RESIZED["nearest"], True),
        (RESIZED["to a number"], True),
        (RESIZED["to a size"], True),
        (RESIZED["joined images"], False),
        (lambda x, z, m: torch.cat([z, z], -3), True),
        (lambda x, z, m: torch.cat([z, z], -4), False),
        (lambda x, z, m: torch.cat([z, m.shift.expand_as(z)], 1), False),
        (lambda x, z, m: z / z.shape[1], True),
        (lambda x, z, m: z / z.shape[0], False),
        (lambda x, z, m: z / z.size(0), False),
        (lambda x, z, m: z / z.shape[:2][1], True),
        (lambda x, z, m: z / z.shape[-4], False),
        (lambda x, z, m: m.next(z) + z.shape[0], False),
        (lambda x, z, m: z / z.mean(3).shape[1], False),
    ],
)
def test_a_batch_is_split_only_if_no_step_depends_on_its_size(body: Callable[..., Any], splits: bool) -> None:
    model = Returns(body).eval()
    assert by_image(trace(copy.deepcopy(model))[0], model) == splits


def test_slices_of_a_batch_are_joined_for_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimized, "MAX_ALIVE_BYTES", 1)
    model, x = _pyramid(), images(6, 32)
    assert_same(optimize(model)(x), answers(model, x)[0], SUMS)


@pytest.mark.parametrize("body", [STRUCTURES["nested"], STRUCTURES["model tensors"]])
def test_broken_images_are_nan_in_every_output_of_an_int8_net(body: Callable[..., Any]) -> None:
    model, x = Returns(body).eval(), images(3)
    with fastres.backend("reference"):
        net = optimize(model, dtype=torch.int8, calibration=[x])
        whole = [y for y in leaves(net(x)) if isinstance(y, Tensor)]
        x[1, 0, 2, 2] = float("nan")
        broken = [y for y in leaves(net(x)) if isinstance(y, Tensor)]
    for y, before in zip(broken, whole, strict=True):
        if not y.is_floating_point():
            assert torch.equal(y, before)
        elif net._by_image:
            assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
            assert torch.equal(y[::2], before[::2])
        else:
            assert y.isnan().all()


def test_a_net_in_8_bits_returns_wide_values() -> None:
    model, x = tiny(), images(4)
    extractor = create_feature_extractor(model, {"3": "pooled", "7": "last", "10": "scores"}).eval()
    want = _exact(extractor, x)
    with fastres.backend("reference"):
        small = optimize(extractor, dtype=torch.int8, calibration=[x])(x)
    assert list(small) == list(want)
    for y, right in zip(small.values(), want.values(), strict=True):
        assert y.dtype == torch.float32
        assert relative_error(y, right) < INT8


@pytest.mark.skipif(dispatch.why_no_int8(torch.device("cpu")) is not None, reason="this CPU computes no int8")
def test_torchscript_gives_all_outputs_of_an_int8_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_seconds", lambda calls: [1.0, 2.0])
    model, x = create_feature_extractor(tiny(), {"3": "pooled", "7": "last", "10": "scores"}).eval(), images(4)
    steps = optimize(model, dtype=torch.int8, calibration=[x], torchscript=False)
    net = optimize(model, x, dtype=torch.int8, calibration=[x])
    assert "by TorchScript, step by step" in net.explain()
    for y, right in zip(net(x).values(), steps(x).values(), strict=True):
        assert torch.equal(y, right)


@pytest.mark.skipif(dispatch.why_no_onednn(torch.float32) is not None, reason="oneDNN is not used here")
def test_a_onednn_graph_gives_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_seconds", lambda calls: [1.0, 2.0])
    model, x = lived_in(MANY["timm dict"]()), images(2, 32)
    net = optimize(model, x)
    assert "by TorchScript, as a oneDNN graph" in net.explain()
    want, theirs = _exact(model, x), _plain(model, x)
    got = net(x)
    assert list(got) == list(want)
    for y, right, their in zip(got.values(), want.values(), theirs.values(), strict=True):
        assert_close_to_reference(y, right, their, factor=ONEDNN_GRAPH)
        y.zero_()
    assert all(bool(y.any()) for y in net(x).values())
    pyramid = optimize(_pyramid(), x)
    assert "is not a step that oneDNN's graph compiler may take" in pyramid.explain()


def test_a_graph_with_one_wrong_output_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    net = optimize(lived_in(MANY["timm list"]()), images(2, 32), torchscript=False)
    (plan,) = net._programs.values()
    x = torch.randn(2, 32, 32, 3)
    wrong = plan.run(x)
    wrong[1] = wrong[1] * 1.01
    outputs = plan.outputs.names
    of_graph = program.Compiled(lambda x: [y.permute(0, 2, 3, 1) for y in wrong], len(plan.bound), outputs, "")
    assert "its output differs" in str(plan._why_steps_serve(of_graph, x, plan.run(x), 1e-4))


def test_recordings_return_all_outputs() -> None:
    model, x = Returns(STRUCTURES["nested"]).eval(), images()
    (want,), net = answers(model, x), optimize(model)
    torch._dynamo.reset()
    assert_same(torch.compile(net, backend="eager", fullgraph=True)(x), want, SUMS)
    assert_same(torch.export.export(net, (x,)).module()(x), want, SUMS)
    pyramid, x = _pyramid(), images(2, 64)
    (want,), net = answers(pyramid, x), optimize(pyramid)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    assert_same(exported(x), want, SUMS)
    assert_same(exported(x[:1]), answers(pyramid, x[:1])[0], SUMS)


def test_values_are_observed_and_copies_give_the_same() -> None:
    model, x = Returns(STRUCTURES["NamedTuple"]).eval(), images()
    net, seen = optimize(model), []
    result = net.observed(x, lambda name, value: seen.append(name))
    assert_same(result, answers(model, x)[0], SUMS)
    assert {*net._outputs.names} <= {*seen}
    pyramid = optimize(_pyramid(), x)
    file = io.BytesIO()
    torch.save(pyramid, file)
    file.seek(0)
    for twin in (copy.deepcopy(pyramid), torch.load(file, weights_only=False)):
        assert _shapes(twin(x)) == _shapes(pyramid(x))
        assert all(torch.equal(a, b) for a, b in zip(leaves(twin(x)), leaves(pyramid(x)), strict=True))


def test_agreement_needs_one_tensor() -> None:
    net = optimize(Returns(STRUCTURES["dict"]).eval())
    with pytest.raises(ValueError, match="Returns returns a dict"):
        net.agreement(net, [images()])


def test_optional_arguments_have_their_defaults() -> None:
    """`trace` calls forward as Python does: containers, keyword-only and variable arguments keep their defaults."""

    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: Tensor, sizes: Any = (2, [3]), *more: Any, scale: float = 2.0, **rest: Any) -> Any:
            return {"y": self.net(x) * scale + sizes[1][0] * sizes[0] + len(more) + len(rest), "sizes": sizes[0]}

    model, x = Options().double().eval(), images(dtype=torch.float64)
    assert_same(optimize(model)(x), answers(model, x)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pyramid with P6 and P7", "FCN with aux", "timm list"])
def test_gpu_replays_return_all_outputs(name: str) -> None:
    model, x = lived_in(MANY[name]()).cuda(), images(2, 64).cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        net = optimize(model, x)
        first = net(x)
        assert "replayed as a CUDA graph" in net.explain()
        want = _exact(model, x)
        assert_same(first, want, SUMS)
        kept = [y.clone() for y in leaves(first)]
        net(torch.zeros_like(x))
        assert all(torch.equal(y, before) for y, before in zip(leaves(first), kept, strict=True))
