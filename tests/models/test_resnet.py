"""The drop-in nets have torchvision's interface and numerical results, and work wherever torchvision's nets work.

Most tests run their nets twice: with the path that dispatch chooses ("auto"), and with all supported calls on the fused
entry points ("reference"). The second run checks that unsupported calls still take the plain path.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
import torchvision.models.resnet as tv
from cases import assert_close_to_reference, preload_children
from covering import covered, extra
from nets import PATHS
from tolerances import NETS, SUMS
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FrozenBatchNorm2d

import fastres
from fastres.models import resnet

BUILDERS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
BLOCKS = ["BasicBlock", "Bottleneck"]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of the fused entry points."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> None:
        entry = getattr(resnet, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls[name] += 1
            return entry(*args, **kwargs)

        monkeypatch.setattr(resnet, name, call)

    counting("residual_block")
    counting("stem")
    return calls


def pair(block: str = "Bottleneck", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return fastres's ResNet and torchvision's with equal weights. Both have only the stem, two stages and the head,
    so that tests are quick.

    The stages have projection and identity shortcuts, and stride 1 and 2. The BatchNorms have weights and statistics as
    after training, so that no term is 0 or 1 by accident.
    """
    nets = []
    for family in (fastres, tv):
        torch.manual_seed(1)
        net = family.ResNet(getattr(family, block), [2, 1, 1, 1], **kwargs)
        net.fc = nn.Linear(net.layer3[0].conv1.in_channels, 5)
        net.layer3, net.layer4 = nn.Sequential(), nn.Sequential()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_mean is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        nets.append(net)
    return nets[0], nets[1]


def images(n: int = 2, h: int = 33, w: int = 47, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, h, w, generator=generator, dtype=torch.float64).to(dtype)


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return all results of one step: scores, gradients, and the buffers after the step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    scores = net(x)
    weight = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype, device=scores.device).view_as(scores)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((scores * weight).sum(), [x, *parameters.values()])
    result = {"scores": scores.detach(), "images.grad": grads[0]}
    result |= {f"{name}.grad": grad for name, grad in zip(parameters, grads[1:], strict=True)}
    return result | {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        if value.is_floating_point():
            assert_close_to_reference(actual[name], value, what=name)
        else:
            assert torch.equal(actual[name], value), name


def assert_same_steps(ours: nn.Module, theirs: nn.Module, x: Tensor | None = None) -> None:
    """Check one step in train mode and one in eval mode, in float64, up to rounding errors."""
    x = (images() if x is None else x).double()
    ours.double()
    theirs.double()
    for mode in (True, False):
        assert_same(step(ours.train(mode), x), step(theirs.train(mode), x))


def outcome(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or the type and message of its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


# The interface


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_has_torchvisions_signature(name: str) -> None:
    ours, theirs = inspect.signature(getattr(fastres, name)), inspect.signature(getattr(tv, name))
    assert ours.parameters == theirs.parameters
    assert inspect.signature(fastres.ResNet) == inspect.signature(tv.ResNet)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_has_torchvisions_layers(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = (getattr(family, name)() for family in (fastres, tv))
    assert repr(ours).replace("fastres.", "") == repr(theirs)
    shapes = [{key: (value.shape, value.dtype) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert list(shapes[0].items()) == list(shapes[1].items())


# Deeper nets have more of the same blocks; other widths are in `test_options_are_torchvisions`.
KINDS = ["resnet18", "resnet50", "resnext50_32x4d"]


@pytest.mark.parametrize("name", [name if name in KINDS else extra(name) for name in BUILDERS])
def test_a_builder_makes_torchvisions_net(name: str) -> None:
    """Initialisation from a seed and state dict are torchvision's, and so are scores, gradients and statistics in both
    modes, in float64."""
    torch.manual_seed(3)
    theirs = getattr(tv, name)()
    torch.manual_seed(3)
    ours = getattr(fastres, name)()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    x = images(h=32, w=33, dtype=torch.float64)
    theirs.double()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # one copy in memory; the largest net has 127 M parameters
    before = {key: value.clone() for key, value in theirs.named_buffers()}
    expected = step(theirs.train(), x)
    after = {key: value.clone() for key, value in theirs.named_buffers()}
    with torch.no_grad():
        scores = theirs.eval()(x)
    for backend in PATHS:
        with fastres.backend(backend), torch.no_grad():
            assert_close_to_reference(ours.eval()(x), scores)
        ours.load_state_dict(before, strict=False)
        with fastres.backend(backend):
            assert_same(step(ours.train(), x), expected)
        ours.load_state_dict(after, strict=False)


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_are_torchvisions(name: str) -> None:
    weights = torchvision.models.get_model_weights(name)
    assert getattr(fastres, weights.__name__) is weights
    assert torchvision.models.get_model_weights(f"fastres_{name}") is weights
    assert torchvision.models.get_model_weights(getattr(fastres, name)) is weights
    wrong = fastres.ResNet18_Weights if name != "resnet18" else fastres.ResNet50_Weights
    with pytest.raises(TypeError, match=weights.__name__):
        getattr(fastres, name)(weights=wrong.DEFAULT)


def test_torchvisions_registry_builds_ours() -> None:
    net = torchvision.models.get_model("fastres_resnet18", num_classes=7)
    assert type(net) is fastres.ResNet
    assert net.fc.out_features == 7


@pytest.mark.parametrize("given", [fastres.ResNet18_Weights.IMAGENET1K_V1, "IMAGENET1K_V1", "DEFAULT"])
def test_published_weights_load(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tv.resnet18().state_dict()
    asked = []

    def download(url: str, **kwargs: Any) -> dict[str, Tensor]:
        asked.append((url, kwargs))
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    net = fastres.resnet18(weights=given, progress=False)
    assert asked == [(fastres.ResNet18_Weights.IMAGENET1K_V1.url, {"progress": False, "check_hash": True})]
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match="num_classes"):
        fastres.resnet18(weights=given, num_classes=7)
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        fastres.resnet18(pretrained=True)


@pytest.mark.parametrize(
    ("block", "options"),
    [
        ("Bottleneck", {"replace_stride_with_dilation": [True, False, False]}),
        ("Bottleneck", {"groups": 4, "width_per_group": 16}),
        ("Bottleneck", {"width_per_group": 32}),
        ("Bottleneck", {"zero_init_residual": True}),
        ("BasicBlock", {"zero_init_residual": True}),
        ("Bottleneck", {"norm_layer": partial(nn.GroupNorm, 16)}),
        ("BasicBlock", {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=None)}),
        ("Bottleneck", {"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}),
        ("BasicBlock", {"norm_layer": nn.InstanceNorm2d}),
    ],
    ids=str,
)
def test_options_are_torchvisions(path: str, block: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(block, **options)
    for (key, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b), key
    assert_same_steps(ours, theirs)


def test_dilation_is_torchvisions(path: str) -> None:
    """Dilation affects the stages that `pair` leaves out."""
    ours, theirs = (
        family.resnet50(replace_stride_with_dilation=[False, True, True], num_classes=5).eval()
        for family in (fastres, tv)
    )
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_close_to_reference(ours.double()(images().double()), theirs.double()(images().double()))


def test_wrong_options_fail_as_torchvisions() -> None:
    for kwargs in (
        {"groups": 2},
        {"replace_stride_with_dilation": [True]},
        {"replace_stride_with_dilation": [True] * 3},
    ):
        ours, theirs = (outcome(partial(family.resnet18, **kwargs)) for family in (fastres, tv))
        assert ours == theirs
        assert ours[0] in (ValueError, NotImplementedError)


# Which path


def test_fused_entry_points_are_reached_and_plain_nets_stay_plain(fused: Counter[str]) -> None:
    """If the fused entry points were never called, the "reference" half of all other tests would prove nothing."""
    ours, _ = pair()
    ours(images())
    with fastres.backend("reference"):
        before = Counter(fused)
        ours(images())
        assert fused - before == {"residual_block": 3, "stem": 1}
        for plain in (
            nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours)),
            pair(norm_layer=partial(nn.GroupNorm, 16))[0],
        ):
            before = Counter(fused)
            plain(images())
            assert fused == before


def _replace(net: nn.Module) -> None:
    """Replace submodules, as users do, by modules that compute something else."""
    net.maxpool = nn.Identity()
    net.layer1[0].relu = nn.Sequential()
    net.layer1[1].conv1 = nn.Sequential(nn.Conv2d(256, 8, 1), nn.Conv2d(8, 64, 1))
    net.layer2[0].bn1 = nn.Sequential(nn.BatchNorm2d(128), nn.SiLU())
    net.layer2[0].downsample.insert(0, nn.AvgPool2d(1))
    net.layer3 = copy.deepcopy(net.layer1[1:])
    net.layer3[0].conv1 = nn.Conv2d(512, 64, 1, padding="same", bias=False)
    net.layer3[0].conv3 = nn.Conv2d(64, 512, 1, bias=False)
    net.layer3[0].bn3 = nn.BatchNorm2d(512)
    net.layer4 = copy.deepcopy(net.layer3)
    net.layer4[0].conv2 = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")


def test_replaced_submodules_are_called(path: str) -> None:
    ours, theirs = pair()
    for net in (ours, theirs):
        torch.manual_seed(5)
        _replace(net)
    assert_same_steps(ours, theirs, images(h=64, w=64))


@pytest.mark.parametrize(
    "shortcut",
    [
        nn.Conv2d(64, 256, 1, bias=False),
        nn.Sequential(nn.Conv2d(64, 256, 1, bias=False)),
        nn.Sequential(nn.BatchNorm2d(64), nn.Conv2d(64, 256, 1, bias=False)),
        nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256), nn.Conv2d(256, 256, 1, bias=False)),
    ],
    ids=["conv", "conv without norm", "norm first", "one conv more"],
)
def test_shortcuts_that_are_no_projection_run_plain(shortcut: nn.Module, fused: Counter[str]) -> None:
    """The shortcuts have modules of a projection, but not exactly one convolution followed by one norm."""
    ours, theirs = pair()
    for net in (ours, theirs):
        net.layer1[0].downsample = copy.deepcopy(shortcut)
    with fastres.backend("reference"):
        assert_same_steps(ours, theirs)
        before = Counter(fused)
        ours(images().double())
        assert fused - before == {"residual_block": 2, "stem": 1}


def test_a_folded_batch_norm_is_obeyed(path: str) -> None:
    ours, theirs = (net.eval() for net in pair())
    for net in (ours, theirs):
        for block in (net.layer1[0], net.layer2[0]):
            block.conv1 = torch.nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1)
            block.bn1 = nn.Identity()
    assert torch.allclose(ours(images()), theirs(images()), rtol=NETS, atol=SUMS)


def test_a_forward_set_on_an_instance_is_called(path: str) -> None:
    ours, theirs = (net.double().eval() for net in pair())
    for net in (ours, theirs):
        net.layer1[0].bn1.forward = torch.sin
        net.layer2[0].forward = net.layer2[0].downsample
    with torch.no_grad():
        assert_close_to_reference(ours(images().double()), theirs(images().double()))


# Copies, dtypes, hooks, tracing, compilation, transforms, distributed training


@covered(
    indirect=["path"],
    path=PATHS,
    copied={
        "deepcopy": copy.deepcopy,
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "save the net": lambda net: torch.load(_saved(net), weights_only=False),
        "save the weights": lambda net: _loaded(net, torch.load(_saved(net.state_dict()), weights_only=True)),
    },
    block=BLOCKS,
)
def test_copies_are_nets_of_their_own(path: str, block: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    ours, theirs = (net.double() for net in pair(block))
    twin = copied(ours)
    assert type(twin) is fastres.ResNet
    step(ours, images(dtype=torch.float64))  # must not change the copy
    assert_same_steps(twin, theirs)


def _saved(what: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return file


def _loaded(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    twin = pair(type(net.layer1[0]).__name__)[0].double()
    twin.load_state_dict(state)
    return twin


@covered(
    indirect=["path"],
    path=PATHS,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    training=[True, False],
    channels_last=[False, True],
    block=BLOCKS,
)
def test_narrow_dtypes_are_as_near_as_torchvisions(
    path: str, block: str, channels_last: bool, training: bool, dtype: torch.dtype
) -> None:
    """The error against float64 is at most twice torchvision's in the same dtype, in both memory formats."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    nets = [net.to(dtype, memory_format=memory_format).train(training) for net in pair(block)]
    exact = copy.deepcopy(nets[1]).double()
    x = images(dtype=dtype).contiguous(memory_format=memory_format)
    reference = step(exact, x.double())
    ours, theirs = (step(net, x) for net in nets)
    for name in reference:
        if ours[name].is_floating_point():
            assert_close_to_reference(ours[name], reference[name], theirs[name], what=name)
    strides = [net.layer1(net.maxpool(net.bn1(net.conv1(x)))).stride() for net in nets]
    assert strides[0] == strides[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_near_as_torchvisions(path: str, training: bool, dtype: torch.dtype) -> None:
    nets = [net.train(training) for net in pair()]
    reference = step(copy.deepcopy(nets[1]).double(), images().double())
    with torch.autocast("cpu", dtype):
        ours, theirs = (step(net, images()) for net in nets)
    assert ours["scores"].dtype == dtype
    for name in reference:
        if ours[name].is_floating_point():
            assert_close_to_reference(ours[name], reference[name], theirs[name], what=name)


@pytest.mark.parametrize("block", BLOCKS)
def test_any_size_gives_torchvisions_result_or_error(path: str, block: str) -> None:
    """Images of unusual sizes, batches and shapes give torchvision's result, or torchvision's error."""
    nets = [net.double() for net in pair(block)]
    sizes = [(1, 3, 1, 1), (1, 3, 7, 9), (3, 3, 32, 32), (1, 3, 97, 8)]
    odd = [(0, 3, 32, 32), (3, 32, 32), (2, 4, 32, 32)]
    for shape, training in itertools.product(sizes + odd, (True, False)):
        x = torch.ones(shape, dtype=torch.float64)
        ours, theirs = (outcome(partial(step, net.train(training), x)) for net in nets)
        if isinstance(theirs, dict):
            assert isinstance(ours, dict), (shape, training, ours)
            assert_same(ours, theirs)
        else:
            assert ours == theirs


def test_modes_may_change_and_batch_norms_be_frozen(path: str) -> None:
    ours, theirs = (net.double() for net in pair())
    for training in (True, True, False, True, False):
        assert_same(step(ours.train(training), images().double()), step(theirs.train(training), images().double()))
    for net in (ours, theirs):  # BN frozen in a training net, some weights frozen too
        net.train()
        for name, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("layer2"):
                module.eval()
        net.conv1.requires_grad_(False)
        net.layer1.requires_grad_(False)
    assert_same(step(ours, images().double()), step(theirs, images().double()))


def test_frozen_batch_norm_layers_are_called(path: str) -> None:
    assert_same_steps(*pair(norm_layer=FrozenBatchNorm2d))


def test_synchronised_batch_norms_are_called(path: str) -> None:
    ours, theirs = (nn.SyncBatchNorm.convert_sync_batchnorm(net) for net in pair())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in ours.modules()) == 12
    assert_same_steps(ours, theirs)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@covered(indirect=["path"], path=PATHS, block=BLOCKS, register=HOOKS)
def test_a_hook_on_any_submodule_is_called(path: str, block: str, register: str) -> None:
    """A hook on any single submodule fires as often as in torchvision's net, with the same shapes."""
    ours, theirs = pair(block)
    fired = 0
    for name, _ in theirs.named_modules():
        seen = [_watch(net, getattr(net.get_submodule(name), register)) for net in (ours, theirs)]
        assert seen[0] == seen[1], name
        fired += bool(seen[1])
    assert fired > 15


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
)
@pytest.mark.parametrize("block", BLOCKS)
def test_global_hooks_are_called(path: str, block: str, register: Callable[..., Any]) -> None:
    ours, theirs = (_watch(net, register) for net in pair(block))
    assert ours == theirs
    assert theirs  # has the error if an in-place ReLU makes the step fail


def _watch(net: nn.Module, register: Callable[..., Any]) -> list[Any]:
    """Return the modules and shapes that a hook records in one step, and the error if the hook makes the step fail."""
    seen: list[Any] = []

    def hook(module: nn.Module, *values: Any) -> None:
        seen.append((type(module).__name__, torch.utils._pytree.tree_map_only(Tensor, lambda t: t.shape, values)))

    handle = register(hook)
    result = outcome(lambda: step(net.eval(), images(1, 16, 16)))
    handle.remove()
    return seen if isinstance(result, dict) else [*seen, result[0]]


def test_a_hook_may_change_an_output(path: str) -> None:
    ours, theirs = (net.double().eval() for net in pair())
    for net in (ours, theirs):
        net.layer1[0].bn2.register_forward_hook(lambda module, args, output: 2 * output)
        net.relu.register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    assert_same(step(ours, images().double()), step(theirs, images().double()))


def test_averaged_nets_are_torchvisions(path: str) -> None:
    nets = [net.double() for net in pair()]
    averages = [AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for net in nets]
    for _ in range(2):
        for net, average in zip(nets, averages, strict=True):
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
            net(images().double()).square().mean().backward()
            optimizer.step()
            average.update_parameters(net)
    assert_same_steps(*averages)


def test_features_can_be_extracted(path: str) -> None:
    ours, theirs = (net.double() for net in pair())
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    nodes = ["maxpool", "layer1.0.relu_2", "layer2.0.add", "layer2"]
    extractors = [create_feature_extractor(net, nodes).eval() for net in (ours, theirs)]
    features = [extractor(images().double()) for extractor in extractors]
    assert_same(*features)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_symbolic_trace_is_torchvisions(path: str, block: str) -> None:
    ours, theirs = (torch.fx.symbolic_trace(net) for net in pair(block))
    assert ours.code == theirs.code
    assert_same_steps(ours, theirs)


@pytest.mark.parametrize("block", BLOCKS)
def test_torchscript_records_and_compiles(path: str, block: str) -> None:
    ours, theirs = (net.double().eval() for net in pair(block))
    x = images().double()
    expected = theirs(x)
    traced = torch.jit.trace(ours, x)
    scripted = torch.jit.load(_scripted(ours))
    for compiled in (traced, scripted, torch.jit.freeze(torch.jit.script(ours))):
        assert_close_to_reference(compiled(x), expected)
    assert_same_steps(torch.jit.script(ours), theirs)


def _scripted(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    return file


@covered(indirect=["path"], path=PATHS, training=[False, True], strict=[False, True])
def test_an_export_answers_alike(path: str, strict: bool, training: bool) -> None:
    ours, theirs = (net.double().train(training) for net in pair())
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(ours, (images().double(),), dynamic_shapes=[{0: batch}], strict=strict)
    x = images(4).double()
    exported = program.module()
    assert_close_to_reference(exported(x), theirs(x))
    buffers = dict(exported.named_buffers())  # the graph of an eval net has only the buffers that it reads
    assert "layer2.0.bn2.running_var" in buffers
    assert_same(buffers, {name: buffer for name, buffer in theirs.named_buffers() if name in buffers})


@pytest.mark.parametrize("path", [extra("auto"), "reference"], indirect=True)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_file_answers_alike(path: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ours, theirs = (net.eval() for net in pair())
    file = tmp_path / "net.onnx"
    torch.onnx.export(ours, (images(),), file, dynamo=True, verbose=False)
    onnx.checker.check_model(str(file), full_check=True)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), theirs(images()), rtol=NETS, atol=NETS)


@covered(indirect=["path"], path=PATHS, training=[False, True], backend=["eager", "aot_eager"])
def test_a_compiled_net_steps_alike(path: str, backend: str, training: bool) -> None:
    torch._dynamo.reset()
    ours, theirs = (net.double().train(training) for net in pair())
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    result = step(compiled, images().double())
    result = {name.removeprefix("_orig_mod."): value for name, value in result.items()}
    assert_same(result, step(theirs, images().double()))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_stages_step_alike(path: str, block: str, use_reentrant: bool) -> None:
    """Gradients are those without checkpointing. As with torchvision's net, BatchNorm sees the batch twice and updates
    its statistics twice."""

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            for layer in (net.layer1, net.layer2):
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            return net.fc(net.avgpool(x).flatten(1))

    def run(net: nn.Module) -> dict[str, Tensor]:
        net.double().zero_grad()
        Checkpointed(net)(images().double().requires_grad_()).square().sum().backward()
        return {f"{name}.grad": p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())

    ours, theirs = pair(block)
    assert_same(run(ours), run(theirs))
    assert int(ours.layer1[0].bn1.num_batches_tracked) == 2


def test_functional_transforms_give_torchvisions_gradients(path: str) -> None:
    """Covers functional_call, reverse- and forward-mode transforms, and per-sample gradients."""
    ours, theirs = (net.double().eval() for net in pair())
    x = images(3, 16, 16).double()

    def run(net: nn.Module) -> dict[str, Tensor]:
        state = {name: 0.5 * value.detach() for name, value in net.named_parameters()} | dict(net.named_buffers())
        names = ["conv1.weight", "layer1.0.bn3.weight", "layer2.0.conv2.weight"]
        chosen = {name: state[name] for name in names}

        def loss(part: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(net, {**state, **part}, (x,)).square().sum()

        def one(part: dict[str, Tensor], image: Tensor) -> Tensor:
            return loss(part, image[None])

        result = {"scores": torch.func.functional_call(net, state, (x,)).detach()}
        result |= torch.func.grad(loss)(chosen, x)
        per_sample = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(chosen, x)
        result |= {f"{name} per sample": value for name, value in per_sample.items()}
        result["scores per sample"] = torch.func.vmap(lambda image: net(image[None]))(x)
        _, result["jvp"] = torch.func.jvp(lambda x: net(x), (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            result["dual"] = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
        return {name: value.detach() for name, value in result.items()}

    results = run(ours)
    assert_same(results, run(theirs))
    assert results["dual"].abs().max() > 0


def test_gradients_of_gradients_are_torchvisions(path: str) -> None:
    def run(net: nn.Module) -> Tensor:
        x = images(2, 16, 16).double().requires_grad_()
        (grad,) = torch.autograd.grad(net.double()(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), net.conv1.weight)[0]

    ours, theirs = (run(net) for net in pair())
    assert_close_to_reference(ours, theirs)


def _weight_norm(net: nn.Module) -> None:
    for block in (net.layer1[0], net.layer2[0]):
        parametrizations.weight_norm(block.conv2)


def _spectral_norm(net: nn.Module) -> None:
    torch.manual_seed(6)
    parametrizations.spectral_norm(net.layer1[1].conv1)


def _prune(net: nn.Module) -> None:
    prune.l1_unstructured(net.layer1[0].conv2, "weight", 0.5)
    prune.ln_structured(net.layer2[0].downsample[0], "weight", 0.25, n=2, dim=0)


@pytest.mark.parametrize("change", [_weight_norm, _spectral_norm, _prune])
def test_parametrized_and_pruned_nets_step_alike(path: str, change: Callable[[nn.Module], None]) -> None:
    ours, theirs = pair()
    for net in (ours, theirs):
        change(net)
    assert_same_steps(ours, theirs)


def test_two_processes_train_alike(tmp_path: Path) -> None:
    """Two processes train over gloo; `_rank` has the assertions."""
    preload_children()
    mp.start_processes(_rank, (str(tmp_path / "store"),), nprocs=2, start_method="forkserver")


def _rank(rank: int, store: str) -> None:
    """Compare one step with that of torchvision's net under the same DDP. In eval mode, also compare with one process
    that has both ranks' images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    everything = images(4).double()
    mine = everything.chunk(2)[rank]

    def run(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        F.mse_loss(net(x), x.new_ones(len(x), 5)).backward()
        return {f"{name}.grad".removeprefix("module."): p.grad for name, p in net.named_parameters()} | {
            name.removeprefix("module."): buffer for name, buffer in net.named_buffers()
        }

    for backend in PATHS:
        with fastres.backend(backend):
            for training in (True, False):
                ours, theirs = (net.double().train(training) for net in pair())
                alone = copy.deepcopy(theirs)
                result = run(nn.parallel.DistributedDataParallel(ours), mine)
                assert_same(result, run(nn.parallel.DistributedDataParallel(theirs), mine))
                if not training:
                    assert_same(result, run(alone, everything))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_may_come_from_a_hook(backend: str) -> None:
    block, x = resnet.BasicBlock(4, 4).eval(), torch.randn(1, 4, 5, 5)
    want = block(x)
    weight = block.conv1.weight.detach()
    del block.conv1.weight
    block.conv1.register_forward_pre_hook(lambda module, _: setattr(module, "weight", weight))
    with fastres.backend(backend):
        assert torch.equal(block(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_average_pool_keeps_the_layout_of_its_input(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """Forward and backward give the same bits as the modules, and the gradient has the memory format of the input."""
    pool, gradients = nn.AdaptiveAvgPool2d((1, 1)), []
    leaf = images(3, 7).to(dtype).repeat(1, 8, 1, 1).contiguous(memory_format=memory_format).requires_grad_()
    for call in (lambda x: torch.flatten(pool(x), 1), lambda x: resnet.pooled(x, pool)):
        x = leaf * 1
        x.register_hook(gradients.append)
        y = call(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype))
        gradients.append(y.detach())
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])
    assert gradients[2].is_contiguous(memory_format=memory_format)


def test_other_average_pools_are_called() -> None:
    x = images(2, 6).contiguous(memory_format=torch.channels_last)
    hooked, calls = nn.AdaptiveAvgPool2d(1), []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    for pool in (hooked, nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d((1, None)), nn.Identity(), nn.MaxPool2d(6)):
        assert torch.equal(resnet.pooled(x, pool), torch.flatten(pool(x), 1))
    assert len(calls) == 2
    with nn_module.register_module_forward_hook(lambda *_: calls.append(1)):
        resnet.pooled(x, nn.AdaptiveAvgPool2d(1))
    assert len(calls) == 3
