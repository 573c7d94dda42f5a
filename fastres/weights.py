"""Read trained weights from a file or from torchvision, and load them into a net, with errors that name what is wrong.

A source is a file (a checkpoint of `fastres train`, a state dict saved by torch, safetensors) or the name of weights
that torchvision publishes.
"""

from __future__ import annotations

import base64
import difflib
import json
import pickle
import re
import reprlib
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as published
from torchvision.models import WeightsEnum

__all__ = ["Weights", "load_into", "read"]

_SHOWN = 4  # number of names that a message lists for each kind of mismatch
_AVERAGED = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "model_ema_state_dict")
_WRAPPERS = (*_AVERAGED, "model", "state_dict", "model_state_dict", "net", "module")  # in order of preference
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel and AveragedModel, torch.compile, Lightning
_COUNTER = "num_batches_tracked"  # buffer of a BatchNorm that no score depends on; files before PyTorch 0.4.1 lack it
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACCEPTED = "dense tensors of float16, bfloat16, float32 or float64 are accepted, with at least one element"
_INSTEAD = "save its weights instead: torch.save(model.state_dict(), FILE)"
_LARGEST = 10_000  # limit of a depth or an image side in a file's metadata
_FOREIGN = 100  # limit of classes in a file that aren't torch's; a pickled module has a few dozen


@dataclass(frozen=True)
class Weights:
    """Trained weights with the metadata of their source.

    source: the file or name that they were read from.
    state: name -> parameter or buffer, on the CPU.
    meta: metadata; for published weights their `meta`, for checkpoints of `fastres train` the settings of the run.
    preprocess: "mean" and "std" of the preprocessing, if the source has them.
    preset: "resize" and "size", the side of the centre crop, with which the weights are tested, if known.
    taken: the key in the file under which the weights are stored, if they are averaged or the file has several.
    net: for published weights, torchvision's name of their net.
    """

    source: str
    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Tensor] = field(default_factory=dict)
    preset: dict[str, int] = field(default_factory=dict)
    taken: str | None = None
    net: str | None = None

    @property
    def classes(self) -> int | None:
        """Number of classes: the rows of the last matrix in the state dict; None without a matrix."""
        matrices = [value for name, value in self.state.items() if value.dim() == 2 and name.endswith("weight")]
        return len(matrices[-1]) if matrices else None

    @property
    def channels(self) -> int | None:
        """Number of image channels, from the first convolution weight; None without one."""
        filters = (value for value in self.state.values() if value.dim() == 4)
        first = next(filters, None)
        return None if first is None else first.shape[1]

    @property
    def names(self) -> list[str] | None:
        """Names of the classes; None unless the metadata has a name for every class."""
        names = self.meta.get("categories", self.meta.get("classes"))
        return list(map(str, names)) if isinstance(names, (list, tuple)) and len(names) == self.classes else None

    @property
    def published(self) -> dict[int, float]:
        """Published accuracy on ImageNet's validation images: k -> top-k accuracy in percent, for k = 1, 5 if known."""
        metrics = self.meta.get("_metrics")
        metrics = metrics.get("ImageNet-1K") if isinstance(metrics, dict) else None
        rates = {k: metrics.get(f"acc@{k}") for k in (1, 5)} if isinstance(metrics, dict) else {}
        return {k: float(rate) for k, rate in rates.items() if isinstance(rate, (int, float)) and 0 <= rate <= 100}


def read(source: str, model: str | None = None) -> Weights:
    """Read trained weights.

    source: a file, a name like `ResNet50_Weights.IMAGENET1K_V2`, or a name like `IMAGENET1K_V2`, which requires
    `model`. model: the name of the net; None if unknown. Published weights of another net of torchvision are refused.

    A file has a dict of tensors, at the top level or under one of the keys `_WRAPPERS`. If it has several, averaged
    weights come first. Prefixes that all names share, such as "module.", are removed. Files are read with
    `weights_only=True`: no code in them runs.

    Raises ValueError for a source that doesn't exist, can't be downloaded, is damaged or has no weights, and for
    tensors or metadata that can't belong to a net.
    """
    path = Path(source)
    if not path.exists():
        enum = _published(source, model)
        if enum is not None:
            return _fetch(source, enum, model)
        raise ValueError(
            f"{source} does not exist, neither as a file nor as torchvision weights{_meant(source, model)}"
        )
    if not path.is_file():
        raise ValueError(f"{source} is {'a folder' if path.is_dir() else 'no file'}; a file with weights is expected")
    return _safetensors(path) if path.suffix.lower() == ".safetensors" else _torch(path)


def _meant(name: str, model: str | None) -> str:
    """Return a hint for a message about `name`, which doesn't exist: names of weights that do."""
    if model in published.list_models(module=published):
        return f" ({', '.join(str(weights) for weights in published.get_model_weights(model))})"
    known = [str(each) for net in published.list_models(module=published) for each in published.get_model_weights(net)]
    close = difflib.get_close_matches(name, known, n=2) if "weights." in name.lower() else []
    return f" (a name looks like ResNet50_Weights.IMAGENET1K_V2{'; there is ' * bool(close)}{' and '.join(close)})"


def _published(name: str, model: str | None) -> WeightsEnum | None:
    try:
        if "." in name:
            return published.get_weight(name)
        return published.get_model_weights(model)[name] if model else None
    except (ValueError, KeyError):
        return None


def _fetch(source: str, enum: WeightsEnum, model: str | None) -> Weights:
    nets = published.list_models(module=published)
    net = next(name for name in nets if published.get_model_weights(name) is type(enum))
    if model in nets and model != net:
        raise ValueError(f"{source} has weights of {net}, not of {model}")
    place = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state = enum.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # from the network, or any type from reading the file
        if (file := place / Path(enum.url).name).exists():
            raise ValueError(f"{file} is truncated or damaged; delete it to download it again") from error
        raise ValueError(
            f"{source} can't be downloaded from {enum.url} ({error}); put the file into {place}"
        ) from error
    transforms = enum.transforms()
    statistics: dict[str, Any] = {
        name: torch.tensor(getattr(transforms, name))[:, None, None] for name in ("mean", "std")
    }
    preset = {"size": transforms.crop_size[0], "resize": transforms.resize_size[0]}
    return Weights(source, dict(state), dict(enum.meta), statistics, preset, net=net)


def _safetensors(path: Path) -> Weights:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load
    except ImportError as error:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        with safe_open(str(path), framework="pt") as file:
            known = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        meta = json.loads(known.get("fastres", "{}"))
        preprocess = load(base64.b64decode(known["preprocess"], validate=True)) if "preprocess" in known else {}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    return _checked(str(path), state, meta, preprocess)


def _torch(path: Path) -> Weights:
    try:
        content = _load(path)
    except OSError as error:
        raise ValueError(f"{path} is truncated, damaged or can't be read ({error})") from error
    except Exception as error:  # a file that is not a pickle, such as a text, may raise any type
        raise ValueError(f"{path} {_not_weights(path, error)}") from error
    content = content if isinstance(content, dict) else {"": content}
    states = _states(content)
    if not states:
        raise ValueError(f"{path} {_no_state(content)}")
    key, state = next(iter(states.items()))
    taken = key if len(states) > 1 or {*key.split(".")} & {*_AVERAGED} else None
    known = {name: value for name, value in content.items() if isinstance(value, dict)}  # ours are dicts
    return _checked(str(path), state, known.get("meta", {}), known.get("preprocess", {}), taken)


class _StandIn:
    """Placeholder for an object whose class isn't torch's: `argparse.Namespace`, NumPy numbers, a pickled module.

    Checkpoints have settings, numbers and dates besides their weights, and `weights_only=True` refuses these objects.
    Their classes are never allowed, however harmless they look, so that a file can't run code by naming a class.
    Instead, the unpickler gets an empty class for each name, which accepts any arguments and any state and drops them.
    """

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _DictStandIn(_StandIn):
    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()  # the unpickler sets items only of dict types that torch allows


class _ListStandIn(_StandIn):
    def __new__(cls, *_: Any) -> Any:
        return []


def _load(path: Path) -> Any:
    """Return the content of `path`, with placeholders for objects whose class isn't torch's.

    Raises the exceptions of `torch.load`, and BadZipFile if the data of a tensor fails its checksum, which torch
    doesn't check.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
    kinds: dict[str, type[_StandIn]] = {}
    refusals = []
    while True:
        stand_ins: list[Any] = [(type(name, (kind,), {"__module__": "builtins"}), name) for name, kind in kinds.items()]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")  # about pickle protocols, and about tensor types that are refused later
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, TypeError, AttributeError) as error:
            refusals.append(error)
            name, kind = _stand_in(str(error))
            if name is None or kinds.get(name) is kind or len(refusals) > _FOREIGN:
                raise refusals[0] from error  # the first error names the foreign class; no placeholder helped
            kinds[name] = kind


def _stand_in(refusal: str) -> tuple[str | None, type[_StandIn]]:
    """Parse the unpickler's message: return the name of the refused class, or None, and a placeholder for it."""
    if missing := re.search(r"GLOBAL (\S+) was not an allowed", refusal):
        name = missing[1]
        return (name if "." in name else f"builtins.{name}"), _StandIn
    filled = re.search(r"Can only (SETITEM|append|extend).* got <class '(\S+)'>", refusal)
    if filled is None:
        return None, _StandIn
    return filled[2], _DictStandIn if filled[1].startswith("SETITEM") else _ListStandIn


def _not_weights(path: Path, error: Exception) -> str:
    """Describe a file that `_load` refuses with `error`. torch's own message advises to run the code in the file."""
    message = str(error)
    if pickled := re.search(r"GLOBAL (\S+)", message):
        return _pickled(pickled[1])
    if "TorchScript" in message:
        return f"contains a TorchScript module; {_INSTEAD}"
    if "DTensor" in message:
        return "contains DTensors, which are shards of several processes; save a full state dict instead"
    if "Unsupported operand" in message and zipfile.is_zipfile(path):
        return f"was saved with another pickle_protocol than torch.save's default; {_INSTEAD}"
    return f"is truncated, damaged or not a file of weights{f' ({error})' * isinstance(error, zipfile.BadZipFile)}"


def _pickled(name: str) -> str:
    return f"contains a pickled module, or another object that isn't a tensor ({name}); {_INSTEAD}"


def _states(content: dict[Any, Any], depth: int = 2) -> dict[str, dict[str, Tensor]]:
    """Return the dicts of tensors in `content` by dotted key, e.g. "model.state_dict", in the order of `_WRAPPERS`.

    If there are none, returns `content` itself under the key "", provided that it has tensors. depth: levels to search.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in _WRAPPERS if depth else ():
        inner = content.get(name)
        if isinstance(inner, dict):
            found |= {f"{name}.{below}".rstrip("."): state for below, state in _states(inner, depth - 1).items()}
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return found or ({"": own} if any(value.dim() for value in own.values()) else {})


def _no_state(content: dict[Any, Any]) -> str:
    """Describe a file without a dict of tensors."""
    for name in ("", *_WRAPPERS):
        if isinstance(pickled := content.get(name), _StandIn):
            return _pickled(type(pickled).__name__)
    there = _few([f"{name} ({type(value).__name__})" for name, value in content.items()])
    known = ", ".join(_WRAPPERS)
    return f"has no weights: expected a dict of tensors, alone or under {known}; it has {there or 'nothing'}"


def _checked(
    source: str, state: dict[str, Tensor], meta: Any, preprocess: dict[str, Any], taken: str | None = None
) -> Weights:
    """Check the content of a file, and return it as `Weights` whose names have no prefixes.

    Raises ValueError that names the tensors and metadata that can't belong to a net.
    """
    state = {bare: state[name] for bare, name in _bare(state).items()}
    if not state:
        raise ValueError(f"{source} has no weights")
    wrong = [f"{name} is {what}" for name, value in state.items() if (what := _no_weight(name, value)) is not None]
    if wrong:
        raise ValueError(f"{source} has tensors that can't be loaded: {_few(wrong)}; {_ACCEPTED}")
    if not isinstance(meta, dict):
        raise ValueError(f"{source}: its metadata must be a dict: got {reprlib.repr(meta)}")
    for key, value in meta.items():
        if (expected := _misfit(key, value)) is not None:
            raise ValueError(f"{source}: {key} in its metadata must be {expected}: got {reprlib.repr(value)}")
    preset = {"size": meta["val_size"], "resize": meta["resize"]} if {"val_size", "resize"} <= meta.keys() else {}
    statistics: dict[str, Any] = {name: preprocess[name] for name in ("mean", "std") if name in preprocess}
    weights = Weights(source, state, meta, statistics, preset, taken)
    if statistics and not _are_statistics(statistics, weights.channels):
        found = " and ".join(f"a {name} of shape {_described(value)}" for name, value in reversed(statistics.items()))
        raise ValueError(
            f"{source} has {found} for a net of {weights.channels} channels; expected a finite mean [channels, "
            "height, width] and a positive std [channels, 1, 1]"
        )
    return weights


def _no_weight(name: str, value: Tensor) -> str | None:
    """Describe `value` if it can't be a parameter or buffer; else return None."""
    plain = type(value) in (Tensor, nn.Parameter) and not value.is_nested and value.device.type == "cpu"
    if not plain or value.layout != torch.strided:
        return _described(value)
    counts = name.endswith(_COUNTER) and not (value.is_quantized or value.is_complex())
    return None if (value.dtype in _DTYPES or counts) and value.numel() else _described(value)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return reprlib.repr(value)
    if type(value) not in (Tensor, nn.Parameter) or value.is_nested:
        return "nested" if value.is_nested else f"a {type(value).__name__}"
    kind = [str(each).removeprefix("torch.") for each in (value.dtype, value.layout, value.device.type)]
    return " ".join([*(each for each in kind if each not in ("float32", "strided", "cpu")), str(list(value.shape))])


def _misfit(key: Any, value: Any) -> str | None:
    """Return what `key` of the metadata must be if `value` isn't that; else None."""
    if key in ("family", "shortcut", "recipe", "data"):
        return None if value is None or isinstance(value, str) else "a string"
    if key in ("depth", "val_size", "resize"):
        return None if type(value) is int and 1 <= value <= _LARGEST else f"a whole number from 1 to {_LARGEST:,}"
    if key in ("classes", "categories"):
        fits = isinstance(value, (list, tuple)) and all(isinstance(each, (str, int)) for each in value)
        return None if fits else "a list of names"
    return None


def _are_statistics(found: dict[str, Any], channels: int | None) -> bool:
    mean, std = found.get("mean"), found.get("std")
    return (
        isinstance(mean, Tensor)
        and isinstance(std, Tensor)
        and _no_weight("mean", mean) is _no_weight("std", std) is None
        and mean.dim() == 3
        and len(mean) == channels
        and std.shape == (channels, 1, 1)
        and bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all())
    )


def _bare(names: Iterable[str]) -> dict[str, str]:
    """Remove the prefixes that all names of a net's tensors share. Returns bare name -> name in `names`.

    AveragedModel's own counter, n_averaged, has no prefix and is dropped with it.
    """
    bare = {name: name for name in names}
    while True:
        net = [name for name in bare if name != "n_averaged"]
        prefix = next((each for each in _PREFIXES if net and all(name.startswith(each) for name in net)), None)
        if prefix is None:
            return bare
        bare = {name.removeprefix(prefix): bare[name] for name in net}


def load_into(model: nn.Module, weights: Weights, name: str) -> None:
    """Load `weights` into `model`, in place. The names of `model` may have prefixes that `weights` lack.

    name: name of the architecture, for messages. Raises ValueError unless names and shapes of all tensors match. Only
    the batch counter of a BatchNorm may be missing, and then keeps its value.
    """
    state = model.state_dict()
    places = _bare(state)
    own = {bare: state[full] for bare, full in places.items()}
    theirs = weights.state
    shapes = [
        f"{key} {list(theirs[key].shape)} for {list(own[key].shape)}"
        for key in own.keys() & theirs.keys()
        if own[key].shape != theirs[key].shape
    ]
    found = {
        "missing": sorted(_missing(own, theirs)),
        "unexpected": sorted(theirs.keys() - own.keys()),
        "of another shape": sorted(shapes),
    }
    if any(found.values()):
        differences = "; ".join(f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in found.items() if keys)
        source = weights.source if weights.taken is None else f"{weights.taken} of {weights.source}"
        raise ValueError(f"{source} does not fit the architecture {name}: {differences}{_fitting(own, theirs)}")
    model.load_state_dict({places[key]: value for key, value in theirs.items()}, strict=False)


def _missing(own: Iterable[str], theirs: Iterable[str]) -> set[str]:
    """Return the names that `theirs` lacks, except batch counters of BatchNorms whose running_mean it has."""
    known = {*theirs}
    return {key for key in {*own} - known if key.replace(_COUNTER, "running_mean") not in known}


def _fitting(own: Iterable[str], theirs: Iterable[str]) -> str:
    """Return a hint for a file of several nets, each under another prefix: the nets that fit. "" if there are none."""
    parts: dict[str, set[str]] = {}
    for key in theirs:
        prefix, _, rest = key.partition(".")
        parts.setdefault(prefix, set()).add(rest)
    fit = [prefix for prefix, part in parts.items() if part <= {*own} and not _missing(own, part)]
    return f"; these prefixes would fit on their own: {_few(fit)}; save the tensors of only one prefix" if fit else ""


def _few(names: Sequence[str]) -> str:
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name[:100]) for name in names[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")
