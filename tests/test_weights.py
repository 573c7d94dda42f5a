"""Weight files in the forms that users have: nested dicts, prefixes, other content besides the weights.

Files whose tensors or metadata can't belong to a net are refused in one line. Also `eval --expect published`.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import enum
import json
import os
import pickle
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import CLASSES, SMALL, refused
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import ResNet18_Weights, ResNet50_Weights, WeightsEnum

import fastres
from fastres import paper, weights
from fastres.classes import IMAGENET
from fastres.cli import eval as eval_command
from fastres.cli.main import main
from fastres.evaluate import Result

pytestmark = pytest.mark.usefixtures("one_thread")

WRAPPERS = ["ema", "ema_state_dict", "state_dict_ema", "model_ema", "model_ema_state_dict"]
WRAPPERS += ["model", "state_dict", "model_state_dict", "net", "module"]


def net(classes: int = 2, channels: int = 3) -> nn.Module:
    return paper.cifar(8, num_classes=classes, in_channels=channels).eval()


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(net().state_dict())


def written(path: Path, content: Any, **how: Any) -> str:
    torch.save(content, path, **how)
    return str(path)


def loads(source: str, state: dict[str, Tensor]) -> weights.Weights:
    """Load `source` into a net of eight layers, check that its values equal `state`, and return the `Weights`."""
    model, read = net(), weights.read(source)
    weights.load_into(model, read, "cifar-8")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    return read


def unread(source: str) -> str:
    """Return the single line that refuses a file. It must not contain torch's advice to run the code in the file."""
    with warnings.catch_warnings(record=True) as warned, pytest.raises(ValueError, match=re.escape(source)) as refusal:
        weights.read(source)
    said = str(refusal.value)
    assert said.startswith(source)
    assert said.isprintable()
    assert "weights_only" not in said
    assert not warned
    return said


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


# Tensors that a file may lack.


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_published_weights_may_lack_counters_of_batches(
    command: str,
    image: str,
    imagenet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torchvision's IMAGENET1K_V1 weights have no counters, neither by name nor as files. By name, no --model is
    needed."""
    pytest.importorskip("torchmetrics")
    model = fastres.resnet18()
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state)
    given = ["predict", image, "--weights"]
    if command == "eval":
        given = ["eval", "--data", str(imagenet / "other"), "--ignore-class-names", "--batch", "500", "--checkpoint"]
        monkeypatch.setattr(eval_command, "evaluate", lambda *_: Result(*[torch.ones(1000, dtype=torch.int64)] * 3))
    assert main([*given, "ResNet18_Weights.IMAGENET1K_V1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    file = written(tmp_path / "resnet18-f37072fd.pth", state)
    more = ["--model", "resnet18", "--device", "cpu"]
    if command == "eval":
        assert "resnet18 in fp32, center crop of 224" in out
        assert main([*given, file, *more]) == 0
    else:
        (tmp_path / "labels").write_text("\n".join(IMAGENET))
        assert main([*given, file, *more, "--labels", str(tmp_path / "labels")]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("name", ["bn1.running_mean", "bn1.running_var", "bn1.weight", "fc.bias", "conv1.weight"])
def test_nothing_else_may_be_absent(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    del state[name], state["layer1.0.bn1.num_batches_tracked"]
    read = weights.read(written(tmp_path / "a.pt", state))
    with pytest.raises(ValueError, match=rf"does not fit the architecture cifar-8: 1 missing: {name}$"):
        weights.load_into(net(), read, "cifar-8")


def test_counters_that_are_absent_stay(state: dict[str, Tensor]) -> None:
    model = net()
    model.bn1.num_batches_tracked.fill_(7)
    known = {name: value for name, value in state.items() if "num_batches" not in name}
    weights.load_into(model, weights.Weights("a", known), "cifar-8")
    assert int(model.bn1.num_batches_tracked) == 7


# Wrappers.


@pytest.mark.parametrize("inside", ["", "state_dict"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_weights_are_found_within_wrappers(name: str, inside: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"epoch": 3, name: {inside: state, "step": torch.tensor(1)} if inside else state, "x": torch.zeros(2)}
    read = loads(written(tmp_path / "a.pt", content), state)
    averaged = "ema" in name
    assert read.taken == ((f"{name}.{inside}".strip(".") if averaged else None) if not inside or averaged else None)


def test_averaged_weights_come_first_and_it_is_said(
    state: dict[str, Tensor], image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dict(net().state_dict())
    for k, name in enumerate(WRAPPERS):
        content: dict[str, Any] = dict.fromkeys(WRAPPERS[:k:-1], other) | {name: state}
        file = written(tmp_path / "a.pt", content)
        read = loads(file, state)
        assert read.taken == (None if k == len(WRAPPERS) - 1 else name)
    file = written(tmp_path / "a.pt", {"state_dict": other, "state_dict_ema": state})
    assert main(["predict", image, "--weights", file, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: weights: state_dict_ema of {file}\n"
    alone = written(tmp_path / "b.pt", state)
    assert main(["predict", image, "--weights", alone, *SMALL]) == 0
    assert capsys.readouterr() == (out, "")


def test_eval_says_which_weights_it_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics")
    models = [dict(net(10).state_dict()) for _ in range(2)]
    files = [written(tmp_path / "a.pt", {"model": models[0], "model_ema": models[1]})]
    files.append(written(tmp_path / "b.pt", {"net": models[1]}))
    lines = []
    for file in files:
        given = ["eval", "--data", "synthetic", "--checkpoint", file, "--recipe", "cifar-2015", "--model", "cifar-8"]
        assert main([*given, "--device", "cpu", "--batch", "500"]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert lines[0] == [f"weights: model_ema of {files[0]}", *lines[1]]


@pytest.mark.parametrize("empty", [None, {}, {"decay": 0.9, "updates": torch.tensor(3)}, "resnet50", 3, [1]])
def test_wrappers_without_weights_are_passed_over(empty: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    assert loads(written(tmp_path / "a.pt", {"ema": empty, "model": empty, "net": state}), state).taken is None


def test_what_is_under_other_names_is_told(state: dict[str, Tensor], tmp_path: Path) -> None:
    said = unread(written(tmp_path / "a.pt", {"encoder": state, "epoch": 3, 7: torch.zeros(2), "li\nne": 1}))
    assert "has no weights: expected a dict of tensors, alone or under ema, " in said
    assert said.endswith(r"; it has encoder (dict), epoch (int), 7 (Tensor), li\nne (int)")


def test_a_dict_within_itself_holds_no_weights(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    assert "has no weights" in unread(written(tmp_path / "a.pt", content))


# Prefixes.


def wrapped(model: nn.Module, kinds: str) -> nn.Module:
    for kind in kinds:
        if kind == "a":
            model = AveragedModel(model)
        else:
            holder = nn.Module()
            holder.register_module({"d": "module", "c": "_orig_mod", "l": "model"}[kind], model)
            model = holder
    return model


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("kinds", ["d", "c", "l", "a", "cd", "dc", "ac", "ca", "lc", "cl", "cdla", "adcl", "dd"])
def test_prefixes_of_wrappers_are_taken_off(kinds: str, form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    model = net()
    model.load_state_dict(state)
    theirs = wrapped(model, kinds).state_dict()
    assert not {*theirs} & {*state}
    path = tmp_path / f"a.{form}"
    if form == "pt":
        loads(written(path, {"state_dict": theirs}), state)
    else:
        pytest.importorskip("safetensors.torch").save_file(dict(theirs), path)
        loads(str(path), state)


def test_what_compile_saves_loads(state: dict[str, Tensor], tmp_path: Path) -> None:
    model = net()
    model.load_state_dict(state)
    assert loads(written(tmp_path / "a.pt", torch.compile(model).state_dict()), state).state.keys() == state.keys()


@pytest.mark.parametrize("kinds", ["d", "c", "l", "a"])
def test_a_net_may_have_prefixes_of_its_own(kinds: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    model = wrapped(net(), kinds)
    for file in (state, model.state_dict()):
        weights.load_into(model, weights.read(written(tmp_path / "a.pt", file)), "wrapped")
        for name, value in model.state_dict().items():
            assert name == "n_averaged" or torch.equal(value, file.get(name, file.get(name.partition(".")[2])))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("criterion.weight", r"missing: .*; 45 unexpected: .*; these prefixes would fit on their own: model; save"),
        ("n_averaged", r"missing: .*would fit on their own: model;"),
        ("ema_model.", r"88 unexpected: .*; these prefixes would fit on their own: model, ema_model; save .* prefix$"),
    ],
)
def test_what_not_all_names_carry_is_no_prefix(
    beside: str, said: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Lightning's files, for example, have a loss or a second net besides the net."""
    content = {f"model.{name}": value for name, value in state.items()}
    if beside == "n_averaged":
        content[beside + ".x"] = torch.zeros(2)
    else:
        content |= {f"{beside}{name}": value for name, value in state.items()} if beside[-1] == "." else {}
        content |= {} if beside[-1] == "." else {beside: torch.ones(2)}
    read = weights.read(written(tmp_path / "a.pt", {"state_dict": content}))
    with pytest.raises(ValueError, match=said):
        weights.load_into(net(), read, "cifar-8")


# Other content besides the weights.


class Colour(enum.Enum):
    RED = 1


class Settings(dict):
    def __init__(self, **known: Any) -> None:
        super().__init__(known)
        self.__dict__.update(known)


class Rows(list):
    pass


def with_items(holder: Any, *items: Any) -> Any:
    for item in items:
        holder.append(item) if hasattr(holder, "append") else holder[item].append(1)
    return holder


BESIDE: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=0.1, out=Path("out")),
    "NumPy numbers": [np.float64(1), np.float32(1), np.int64(1), np.bool_(True), np.str_("a")],
    "array": np.zeros(3),
    "array of objects": np.array([1, None], object),
    "defaultdict": with_items(collections.defaultdict(list), "a", "b"),
    "deque": with_items(collections.deque(), 1, 2),
    "enum": Colour.RED,
    "date": datetime.datetime(2026, 1, 1),
    "dict of one's own": Settings(lr=0.1),
    "list of one's own": with_items(Rows(), 1, 2),
    "class": torch.optim.SGD,
    "generator": np.random.default_rng(0),
    "module": nn.Linear(2, 2),
    "many": [argparse.Namespace(), np.float64(1), Settings(a=np.int64(1)), Colour.RED, slice(2)],
}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("kind", BESIDE)
def test_objects_beside_the_weights_do_no_harm(
    kind: str, modern: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    if kind == "module" and not modern:
        pytest.skip("files of old hold a module's source: refused")
    before = {*torch.serialization.get_safe_globals()}
    for content in ({"args": BESIDE[kind], "model": state}, {"model": state, "args": BESIDE[kind]}):
        loads(written(tmp_path / "a.pt", content, _use_new_zipfile_serialization=modern), state)
    assert {*torch.serialization.get_safe_globals()} == before


class Run:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.how = function, (argument,)

    def __reduce__(self) -> Any:
        return self.how


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("function", [exec, subprocess.getoutput, os.mkdir, os.system])
def test_nothing_that_a_file_names_is_run(
    function: Callable[..., Any], modern: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    made = tmp_path / "made"
    code = {exec: f"open({str(made)!r}, 'w')", os.mkdir: str(made)}.get(function, f"touch {made}")
    held = Run(function, code)
    file = written(tmp_path / "a.pt", {"args": held, "model": state}, _use_new_zipfile_serialization=modern)
    if function in (exec, subprocess.getoutput):
        loads(file, state)
    else:  # modules that torch refuses with its own message
        assert f"contains a pickled module, or another object that isn't a tensor ({os.name}." in unread(file)
    assert not made.exists()


def test_pickled_modules_are_named(tmp_path: Path) -> None:
    for content in (net(), {"ema": None, "model": net()}, {"net": nn.Linear(2, 2), "model": 3}):
        said = unread(written(tmp_path / "a.pt", content))
        assert "contains a pickled module, or another object that isn't a tensor (" in said
        assert said.endswith("; save its weights instead: torch.save(model.state_dict(), FILE)")


def test_arrays_are_no_weights(state: dict[str, Tensor], tmp_path: Path) -> None:
    said = unread(written(tmp_path / "a.pt", {name: value.numpy() for name, value in state.items()}))
    assert "has no weights: " in said
    assert "it has conv1.weight (numpy." in said


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_of_pickle_are_read_or_refused(protocol: int, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = written(tmp_path / "a.pt", state, pickle_protocol=protocol)
    if protocol == 3:
        loads(file, state)
    else:
        assert "another pickle_protocol than torch.save's default; save its weights" in unread(file)


def test_one_flipped_bit_is_noticed(state: dict[str, Tensor], tmp_path: Path) -> None:
    """torch.load doesn't check the checksums that torch.save writes."""
    path = Path(written(tmp_path / "a.pt", state))
    content = bytearray(path.read_bytes())
    content[content.find(state["conv1.weight"].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["conv1.weight"], state["conv1.weight"])
    assert "is truncated, damaged or not a file of weights (a/data/0 fails its checksum)" in unread(str(path))


# Tensors.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes_load(dtype: torch.dtype, state: dict[str, Tensor], tmp_path: Path) -> None:
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    loads(written(tmp_path / "a.pt", cast), cast)


def test_strides_and_shared_storage_load(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["fc.weight"] = state["fc.weight"].t().contiguous().t()
    state["conv1.weight"] = nn.Parameter(state["conv1.weight"].contiguous(memory_format=torch.channels_last))
    state["bn1.bias"] = state["bn1.running_mean"]
    state["bn1.weight"] = torch.arange(100.0)[3:51:3]
    state["bn1.num_batches_tracked"] = torch.tensor(3.0)
    loads(written(tmp_path / "a.pt", state), state)


def nested(value: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(value))


class Own(Tensor):
    pass


UNFIT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"qint8 \[2, 64\]"),
    "sparse": (Tensor.to_sparse, "sparse_coo"),
    "compressed": (Tensor.to_sparse_csr, "sparse_csr"),
    "meta": (lambda x: x.to("meta"), "meta"),
    "complex": (lambda x: x.to(torch.complex64), "complex64"),
    "integers": (lambda x: x.to(torch.int8), "int8"),
    "booleans": (lambda x: x > 0, "bool"),
    "8 bits": (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "nested": (nested, "nested"),
    "no rows": (lambda x: x[:0], r"\[0, 64\]"),
    "no columns": (lambda x: x[:, :0], r"\[2, 0\]"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_tensors_that_are_no_weights_are_refused(
    kind: str, state: dict[str, Tensor], image: str, tmp_path: Path
) -> None:
    make, described = UNFIT[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state["fc.weight"] = make(state["fc.weight"])
        file = written(tmp_path / "a.pt", {"model": state})
    with pytest.raises(ValueError, match=rf"can't be loaded: fc.weight is {described}.*; dense tensors of float16, "):
        weights.read(file)


def test_tensors_of_classes_of_their_own_are_no_weights(state: dict[str, Tensor], tmp_path: Path) -> None:
    state["fc.weight"] = state["fc.weight"].as_subclass(Own)
    assert "isn't a tensor (test_weights.Own)" in unread(written(tmp_path / "a.pt", state))


def test_a_classifier_without_rows_is_refused(
    state: dict[str, Tensor], image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:0], state["fc.bias"][:0]
    file = written(tmp_path / "a.pt", state)
    message = refused(["predict", image, "--weights", file, *SMALL], capsys)
    assert "fc.weight is [0, 64], fc.bias is [0]" in message


@pytest.mark.parametrize("make", ["fifo", "device"])
def test_what_is_no_file_is_refused(make: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt" if make == "fifo" else Path("/dev/zero")
    if make == "fifo":
        os.mkfifo(path)
    assert "is no file; a file with weights is expected" in unread(str(path))


# Metadata.

META = {"family": "cifar", "depth": 8, "val_size": 32, "resize": 32, "classes": ["a", "b"]}


def with_metadata(path: Path, meta: Any, state: dict[str, Tensor], preprocess: Any = None) -> str:
    if path.suffix == ".pt":
        return written(path, {"model": state, "meta": meta, "preprocess": preprocess})
    said = meta if isinstance(meta, str) else json.dumps(meta)
    pytest.importorskip("safetensors.torch").save_file(state, path, {"fastres": said})
    return str(path)


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null", '"a"', "{", "[" * 100_000, "NaN", "\ud800"[:0] + "{}{}"])
def test_metadata_that_are_no_dict_are_refused(text: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.safetensors", text, state)
    assert "its metadata must be a dict" in (said := unread(file)) or "is truncated, damaged" in said


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("val_size", "big", "a whole number from 1 to 10,000"),
        ("val_size", 0, "a whole number"),
        ("val_size", -32, "a whole number"),
        ("val_size", True, "a whole number"),
        ("val_size", 32.0, "a whole number"),
        ("val_size", 10**30, "a whole number"),
        ("val_size", None, "a whole number"),
        ("resize", float("nan"), "a whole number"),
        ("resize", [32], "a whole number"),
        ("depth", "8", "a whole number"),
        ("depth", {}, "a whole number"),
        ("depth", 10**9 + 4, "a whole number"),
        ("recipe", ["digits"], "a string"),
        ("recipe", {"name": "digits"}, "a string"),
        ("family", 7, "a string"),
        ("shortcut", ["A"], "a string"),
        ("data", ["digits"], "a string"),
        ("data", {}, "a string"),
        ("classes", 2, "a list of names"),
        ("classes", "ab", "a list of names"),
        ("classes", [["a"], "b"], "a list of names"),
        ("classes", {"a": 1}, "a list of names"),
        ("categories", [None, "b"], "a list of names"),
    ],
)
def test_metadata_of_other_types_are_refused(
    form: str,
    key: str,
    value: Any,
    expected: str,
    state: dict[str, Tensor],
    image: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = with_metadata(tmp_path / f"a.{form}", META | {key: value}, state)
    message = refused(["predict", image, "--weights", file, "--device", "cpu"], capsys)
    assert f"{file}: {key} in its metadata must be {expected}" in message


def test_objects_in_the_metadata_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.pt", META | {"val_size": np.int64(32)}, state)
    assert "val_size in its metadata must be a whole number from 1 to 10,000: got <numpy." in unread(file)


MEAN, STD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)


@pytest.mark.parametrize(
    "preprocess",
    [
        {"mean": MEAN},
        {"std": STD},
        {"mean": [0.5] * 3, "std": [0.25] * 3},
        {"mean": MEAN.flatten(), "std": STD},
        {"mean": MEAN[:2], "std": STD},
        {"mean": MEAN, "std": STD[:, 0]},
        {"mean": MEAN, "std": STD.expand(3, 5, 5)},
        {"mean": MEAN, "std": 0 * STD},
        {"mean": MEAN, "std": -STD},
        {"mean": MEAN * float("nan"), "std": STD},
        {"mean": MEAN, "std": STD / 0},
        {"mean": MEAN.to(torch.int64), "std": STD},
        {"mean": MEAN.to("meta"), "std": STD},
        {"mean": MEAN.to_sparse(), "std": STD},
        {"mean": MEAN, "std": STD.to(torch.complex64)},
        {"mean": MEAN[:, :0], "std": STD},
        {"mean": np.zeros((3, 1, 1)), "std": STD},
    ],
)
def test_statistics_that_are_none_are_refused(preprocess: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    file = with_metadata(tmp_path / "a.pt", META, state, preprocess)
    assert "for a net of 3 channels; expected a finite mean [channels, height, width] and a positive std" in unread(
        file
    )
    good = with_metadata(tmp_path / "a.pt", META, state, {"mean": MEAN, "std": STD, "axes": 3})
    assert loads(good, state).preprocess.keys() == {"mean", "std"}


@pytest.mark.parametrize("beside", [{"meta": "by hand"}, {"meta": [1]}, {"preprocess": "resize 256"}])
def test_what_others_keep_under_our_names_is_not_ours(beside: Any, state: dict[str, Tensor], tmp_path: Path) -> None:
    read = loads(written(tmp_path / "a.pt", {"model": state, **beside}), state)
    assert (read.meta, read.preprocess) == ({}, {})


# Published weights.


@pytest.mark.parametrize(
    ("name", "model", "said"),
    [
        ("ResNet18_Weights.IMAGENET1K_V2", "resnet18", "torchvision weights (ResNet18_Weights.IMAGENET1K_V1)"),
        ("Resnet50_weights.IMAGENET1K_V2", None, "; there is ResNet50_Weights.IMAGENET1K_V2 and ResNet50_Weights"),
        ("ResNet5O_Weights.IMAGENET1K_V1", None, "; there is ResNet50_Weights.IMAGENET1K_V1 and "),
        ("IMAGENET1K_V2", None, "(a name looks like ResNet50_Weights.IMAGENET1K_V2)"),
        ("outt/best.pt", None, "(a name looks like ResNet50_Weights.IMAGENET1K_V2)"),
        ("ResNet18_Weights.IMAGENET1K_V1", "resnet50", "has weights of resnet18, not of resnet50"),
    ],
)
def test_misspelt_names_are_refused_with_those_meant(
    name: str, model: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightsEnum, "get_state_dict", None)  # nothing is downloaded
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        weights.read(name, model)
    assert str(refusal.value).startswith(name)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4 cut off"])
def test_a_fetched_file_that_is_damaged_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file} is truncated or damaged; delete it to download it again$"):
        weights.read("ResNet18_Weights.IMAGENET1K_V1")


def test_a_fetched_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(Run(os.mkdir, str(tmp_path / "made"))))
    with pytest.raises(ValueError, match="is truncated or damaged"):
        weights.read("ResNet18_Weights.IMAGENET1K_V1")
    assert not (tmp_path / "made").exists()


# eval --expect published.


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders val/<WordNet id>/a.png for the 1000 classes of ImageNet, and other/<number>/a.png for 1000 numbers."""
    ids = pytest.importorskip("timm.data").ImageNetInfo().label_names()
    root = tmp_path_factory.mktemp("imagenet")
    Image.new("RGB", (40, 40)).save(root / "a.png")
    for place, names in (("val", ids), ("other", [f"{k:03}" for k in range(1000)])):
        for name in names:
            (root / place / name).mkdir(parents=True)
            os.link(root / "a.png", root / place / name / "a.png")
    return root


def counted(top1: float, top5: float, images: int) -> Result:
    """Return a `Result` of `evaluate` with the given accuracies in percent."""
    counts = torch.full((1000,), images // 1000)
    right = torch.zeros(2, 1000, dtype=torch.int64)
    right[:, 0] = torch.tensor([top1, top5]).mul(images / 100).round().long()
    return Result(counts, right[0], right[1])


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """The results that evaluations return instead of running the net; empty at first."""
    pytest.importorskip("torchmetrics")
    results: list[Result] = []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: fastres.resnet18().state_dict())
    monkeypatch.setattr(eval_command, "evaluate", lambda *_: results.pop())
    return results


PUBLISHED = ["--checkpoint", "ResNet18_Weights.IMAGENET1K_V1", "--device", "cpu", "--expect", "published"]


@pytest.mark.parametrize(
    ("result", "status", "said"),
    [
        (
            (69.758, 89.078, 50_000),
            0,
            [
                "top-1: 69.76% here, 69.76% published, difference +0.00 points, within the margin of 0.10",
                "top-5: 89.08% here, 89.08% published, difference +0.00 points, within the margin of 0.10",
            ],
        ),
        ((69.68, 89.16, 50_000), 0, ["difference -0.08 points, within", "difference +0.08 points, within"]),
        ((69.64, 89.08, 50_000), 3, ["difference -0.12 points, beyond the margin of 0.10", "within"]),
        ((69.76, 89.28, 50_000), 3, ["within", "difference +0.20 points, beyond the margin of 0.10"]),
        ((67.0, 88.0, 1000), 0, ["within the margin of 4.41 for 1,000 of 50,000 images", "within the margin of 3.03"]),
        ((64.0, 88.0, 1000), 3, ["beyond the margin of 4.41 for 1,000 of 50,000 images", "within"]),
    ],
)
def test_eval_holds_the_published_accuracy_against_its_own(
    result: tuple[float, float, int],
    status: int,
    said: list[str],
    imagenet: Path,
    found: list[Result],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found.append(counted(*result))
    assert main(["eval", "--data", str(imagenet), *PUBLISHED]) == status
    title, _, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("resnet18 in fp32, center crop of 224, shorter side 256")
    assert len(lines) == 2
    for line, part in zip(lines, said, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--crops", "10"], "with center crop of 224, shorter side 256, not with 10 crops of 224, shorter side 256"),
        (["--size", "192"], "not with center crop of 192, shorter side 256; leave out --crops, --size, --resize and"),
        (["--resize", "232"], "not with center crop of 224, shorter side 232"),
        (["--recipe", "cifar-2015"], "not with center crop of 32, shorter side 32"),
        (
            ["--data", "synthetic"],
            "ImageNet's 50,000 validation images in 1000 classes, and the data must be these or some of them; ",
        ),
        (["--checkpoint", *["ResNet18_Weights.IMAGENET1K_V1"] * 2], "requires a single net"),
        (["--checkpoint", "{0}/a.pt", "--model", "resnet18"], "a.pt. Name weights of torchvision, as in --checkpoint"),
        (["--checkpoint", "{0}/b.pt", "--model", "resnet18"], "no accuracy is published for "),
        (["--data", "{1}/other", "--ignore-class-names"], "other has 1,000 images of 1,000 classes"),
        (["--expect", "90"], "invalid choice: '90'"),
    ],
)
def test_what_can_not_be_compared_is_refused(
    more: list[str], said: str, imagenet: Path, found: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before any evaluation, for which the test has no result."""
    state = fastres.resnet18().state_dict()
    written(tmp_path / "a.pt", state)
    crafted = {"_metrics": {"ImageNet-1K": {"acc@1": "high", "acc@5": float("nan")}}}
    written(tmp_path / "b.pt", {"model": state, "meta": crafted})
    given = ["eval", "--data", str(imagenet), *PUBLISHED, *(each.format(tmp_path, imagenet) for each in more)]
    assert said in refused(given, capsys)


def test_weights_tell_their_accuracy() -> None:
    state = copy.deepcopy(net().state_dict())
    for published, rates in ((ResNet18_Weights.IMAGENET1K_V1, (69.758, 89.078)), (ResNet50_Weights.DEFAULT, None)):
        told = weights.Weights("a", state, dict(published.meta)).published
        assert told == (dict(zip((1, 5), rates, strict=True)) if rates else {1: 80.858, 5: 95.434})
    for metrics in (None, 3, {}, {"ImageNet-1K": [1]}, {"ImageNet-1K": {"acc@1": 101}}, {"COCO": {"acc@1": 50}}):
        assert weights.Weights("a", state, {"_metrics": metrics}).published == {}


def test_safetensors_hold_what_training_knows(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    model, meta = net(), {"family": "cifar", "depth": 8, "classes": CLASSES, "val_size": 32, "resize": 36}
    path = tmp_path / "weights.safetensors"
    torch_files.save_file(model.state_dict(), str(path), {"fastres": json.dumps(meta)})
    read = weights.read(str(path))
    assert (read.classes, read.channels, read.names, read.preset) == (2, 3, CLASSES, {"size": 32, "resize": 36})
    other = net()
    weights.load_into(other, read, "cifar-8")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated, damaged or not a safetensors"):
        weights.read(str(path))


def truncated(path: Path) -> str:
    written(path, net().state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    return str(path)


def text(path: Path) -> str:
    path.write_text("hello")
    return str(path)


def folder(path: Path) -> str:
    path.mkdir()
    return str(path)


STATE_DICT = r"torch\.save\(model\.state_dict\(\), FILE\)$"


SOURCES: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda path: str(path), "does not exist, neither as a file nor as torchvision weights"),
    "unknown name": (lambda path: "ResNet18_Weights.IMAGENET1K_V9", "a name looks like ResNet50_Weights.IMAGENET1K_V2"),
    "folder": (folder, "is a folder"),
    "empty": (lambda path: (path.touch(), str(path))[1], "truncated, damaged"),
    "truncated": (truncated, "truncated, damaged"),
    "text": (text, "truncated, damaged"),
    "another text": (lambda path: (path.write_text("root:x:0:0"), str(path))[1], "truncated, damaged"),
    "pickle": (lambda path: (path.write_bytes(pickle.dumps({"a": 1})), str(path))[1], "not a file of weights$"),
    "module": (lambda path: written(path, net()), rf"a pickled module.*CifarResNet.*{STATE_DICT}"),
    "module in a dict": (lambda path: written(path, {"model": net()}), rf"a pickled module.*CifarResNet.*{STATE_DICT}"),
    "module of old": (
        lambda path: (torch.save(net(), path, _use_new_zipfile_serialization=False), str(path))[1],
        rf"a pickled module.*CifarResNet.*{STATE_DICT}",
    ),
    "script": (
        lambda path: (torch.jit.script(nn.Linear(2, 2)).save(str(path)), str(path))[1],
        f"a TorchScript module.*{STATE_DICT}",
    ),
    "number": (lambda path: written(path, 5), "has no weights"),
    "numbers": (lambda path: written(path, {"model": 3, "meta": 1}), "has no weights"),
    "no tensors": (lambda path: written(path, {"a": 1}), "has no weights"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_that_hold_no_weights(kind: str, tmp_path: Path) -> None:
    make, named = SOURCES[kind]
    source = make(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=named) as refusal:
        weights.read(source)
    assert source in str(refusal.value)
    assert len(str(refusal.value)) < 600
    for advice in ("weights_only", "torch.load", "\x1b", "\n"):  # torch's advice, which would run the code in the file
        assert advice not in str(refusal.value)


def test_another_architecture_is_summarised(tmp_path: Path) -> None:
    read = weights.read(written(tmp_path / "a.pt", paper.cifar(14, num_classes=2).state_dict()))
    with pytest.raises(
        ValueError, match=r"does not fit the architecture cifar-8: 36 unexpected: layer1\.1\.bn1\.bias, .*\.\.\.$"
    ):
        weights.load_into(net(), read, "cifar-8")
    read = weights.read(written(tmp_path / "a.pt", net(5).state_dict()))
    with pytest.raises(ValueError, match=r"2 of another shape: fc\.bias \[5\] for \[2\], fc\.weight"):
        weights.load_into(net(), read, "cifar-8")
    read = weights.read(written(tmp_path / "a.pt", {"fc.weight": torch.zeros(2, 64)}))
    with pytest.raises(ValueError, match=r"missing: bn1\.bias, "):
        weights.load_into(net(), read, "cifar-8")
