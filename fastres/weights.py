"""Trained weights from wherever they are kept, and into a net, with clear words for what doesn't fit.

A source is a file (a checkpoint of `fastres train`, a state_dict saved by torch, safetensors) or the name of weights
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

_SHOWN = 4  # names listed of each kind of mismatch
_AVERAGED = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "model_ema_state_dict")
_WRAPPERS = (*_AVERAGED, "model", "state_dict", "model_state_dict", "net", "module")  # in the order of preference
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel and AveragedModel, compile, Lightning
_COUNTER = "num_batches_tracked"  # of a BatchNorm; no scores depend on it, and files older than PyTorch 0.4.1 lack it
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACCEPTED = "dense tensors of float16, bfloat16, float32 or float64 are accepted, with at least one element"
_INSTEAD = "save its weights instead: torch.save(model.state_dict(), FILE)"
_LARGEST = 10_000  # layers, or pixels on a side, that a file may tell
_FOREIGN = 100  # classes that aren't torch's in one file; a pickled module has a few dozen


@dataclass(frozen=True)
class Weights:
    """state: parameters and buffers by name, on the CPU. preprocess: mean and std, where the source knows them; meta:
    what else it tells, for published weights their `meta`, for checkpoints of `fastres train` the settings of the run.
    preset: the resize and the size of the centre crop that they are tested with. taken: the name in the file of what
    was read, where it holds averaged weights or several; net: torchvision's name of the net that published weights are
    of."""

    source: str
    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Tensor] = field(default_factory=dict)
    preset: dict[str, int] = field(default_factory=dict)
    taken: str | None = None
    net: str | None = None

    @property
    def classes(self) -> int | None:
        """Rows of the classifier: the last matrix of the state; None without one."""
        matrices = [value for name, value in self.state.items() if value.dim() == 2 and name.endswith("weight")]
        return len(matrices[-1]) if matrices else None

    @property
    def channels(self) -> int | None:
        """Of the images, by the first filter; None without one."""
        filters = (value for value in self.state.values() if value.dim() == 4)
        first = next(filters, None)
        return None if first is None else first.shape[1]

    @property
    def names(self) -> list[str] | None:
        """Of the classes, where the source tells them."""
        names = self.meta.get("categories", self.meta.get("classes"))
        return list(map(str, names)) if isinstance(names, (list, tuple)) and len(names) == self.classes else None

    @property
    def published(self) -> dict[int, float]:
        """Top-1 and top-5 accuracy on ImageNet's validation images, in percent, as far as the source tells it."""
        told = self.meta.get("_metrics")
        told = told.get("ImageNet-1K") if isinstance(told, dict) else None
        rates = {k: told.get(f"acc@{k}") for k in (1, 5)} if isinstance(told, dict) else {}
        return {k: float(rate) for k, rate in rates.items() if isinstance(rate, (int, float)) and 0 <= rate <= 100}


def read(source: str, model: str | None = None) -> Weights:
    """The weights of `source`: a file, `ResNet50_Weights.IMAGENET1K_V2`, or `IMAGENET1K_V2` of `model`.

    A file holds a dict of tensors, alone or in one of `_WRAPPERS`, the averaged weights before the others; prefixes
    that all its names carry are taken off. Files are read with `weights_only=True`. Raises ValueError for a source that
    doesn't exist, can't be fetched, is damaged or holds no weights, and for tensors and metadata that can't be those of
    a net.
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
    """What there is instead of the weights called `name`, which don't exist."""
    if model in published.list_models(module=published):
        return f" ({', '.join(str(weights) for weights in published.get_model_weights(model))})"
    known = [str(each) for net in published.list_models(module=published) for each in published.get_model_weights(net)]
    close = difflib.get_close_matches(name, known, n=2) if "weights." in name.lower() else []
    return f" (they are called like ResNet50_Weights.IMAGENET1K_V2{'; there is ' * bool(close)}{' and '.join(close)})"


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
        raise ValueError(f"{source} is of {net}, not of {model}")
    place = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state = enum.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, or any that reading may raise
        if (file := place / Path(enum.url).name).exists():
            raise ValueError(f"{file} is truncated or damaged; delete it, and it is fetched again") from error
        raise ValueError(f"{source} can't be fetched from {enum.url} ({error}); put that file into {place}") from error
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
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        meta = json.loads(known.get("fastres", "{}"))
        preprocess = load(base64.b64decode(known["preprocess"], validate=True)) if "preprocess" in known else {}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from error
    return _checked(str(path), state, meta, preprocess)


def _torch(path: Path) -> Weights:
    try:
        content = _load(path)
    except OSError as error:
        raise ValueError(f"{path} is truncated, damaged or can't be read ({error})") from error
    except Exception as error:  # what is no pickle, a text say, may raise anything
        raise ValueError(f"{path} {_not_weights(path, error)}") from error
    content = content if isinstance(content, dict) else {"": content}
    states = _states(content)
    if not states:
        raise ValueError(f"{path} {_no_state(content)}")
    taken, state = next(iter(states.items()))
    said = taken if len(states) > 1 or {*taken.split(".")} & {*_AVERAGED} else None
    known = {name: value for name, value in content.items() if isinstance(value, dict)}  # what else there is isn't ours
    return _checked(str(path), state, known.get("meta", {}), known.get("preprocess", {}), said)


class _StandIn:
    """In place of an object whose class isn't torch's: `argparse.Namespace`, NumPy's numbers, a pickled module.

    Files hold settings, numbers and dates beside their weights, and `weights_only=True` refuses all of it. No class is
    allowed instead, however harmless it looks: to be named in a file must not make anything run. Each name is bound to
    an empty class made here, which takes any arguments and any state and keeps nothing.
    """

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _DictStandIn(_StandIn):
    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()  # the unpickler sets items of dicts that are torch's own kinds only


class _ListStandIn(_StandIn):
    def __new__(cls, *_: Any) -> Any:
        return []


def _load(path: Path) -> Any:
    """What `path` holds, with stand-ins for what isn't torch's. Raises what torch does, and BadZipFile for tensors that
    changed since they were saved, which torch doesn't notice."""
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
                warnings.simplefilter("ignore")  # of pickle protocols, and of kinds of tensors that are refused later
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, TypeError, AttributeError) as error:
            refusals.append(error)
            name, kind = _stand_in(str(error))
            if name is None or kinds.get(name) is kind or len(refusals) > _FOREIGN:
                raise refusals[0] from error  # which names what is foreign, where no stand-in goes on
            kinds[name] = kind


def _stand_in(refusal: str) -> tuple[str | None, type[_StandIn]]:
    """What an object that the unpickler refuses is called, and what goes on in its place."""
    if missing := re.search(r"GLOBAL (\S+) was not an allowed", refusal):
        name = missing[1]
        return (name if "." in name else f"builtins.{name}"), _StandIn
    filled = re.search(r"Can only (SETITEM|append|extend).* got <class '(\S+)'>", refusal)
    if filled is None:
        return None, _StandIn
    return filled[2], _DictStandIn if filled[1].startswith("SETITEM") else _ListStandIn


def _not_weights(path: Path, error: Exception) -> str:
    """What a file is that `_load` refuses with `error`; torch's own advice is to run the code in it."""
    told = str(error)
    if pickled := re.search(r"GLOBAL (\S+)", told):
        return _pickled(pickled[1])
    if "TorchScript" in told:
        return f"holds a TorchScript module; {_INSTEAD}"
    if "DTensor" in told:
        return "holds DTensors, the parts of several processes; save the whole state_dict of one instead"
    if "Unsupported operand" in told and zipfile.is_zipfile(path):
        return f"is saved with another pickle_protocol than torch.save's own; {_INSTEAD}"
    return f"is truncated, damaged or no file with weights{f' ({error})' * isinstance(error, zipfile.BadZipFile)}"


def _pickled(name: str) -> str:
    return f"holds a pickled module, or another object that isn't a tensor ({name}); {_INSTEAD}"


def _states(content: dict[Any, Any], depth: int = 2) -> dict[str, dict[str, Tensor]]:
    """The dicts of tensors in `content`, in the order of `_WRAPPERS`, by the names they lie under, as model.state_dict;
    if there are none, `content` itself under "", if it has tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in _WRAPPERS if depth else ():
        inner = content.get(name)
        if isinstance(inner, dict):
            found |= {f"{name}.{below}".rstrip("."): state for below, state in _states(inner, depth - 1).items()}
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return found or ({"": own} if any(value.dim() for value in own.values()) else {})


def _no_state(content: dict[Any, Any]) -> str:
    """What a file is that has no dict of tensors."""
    for name in ("", *_WRAPPERS):
        if isinstance(pickled := content.get(name), _StandIn):
            return _pickled(type(pickled).__name__)
    there = _few([f"{name} ({type(value).__name__})" for name, value in content.items()])
    known = ", ".join(_WRAPPERS)
    return f"holds no weights: a dict of tensors is expected, alone or under {known}; it has {there or 'nothing'}"


def _checked(
    source: str, state: dict[str, Tensor], meta: Any, preprocess: dict[str, Any], taken: str | None = None
) -> Weights:
    """What a file holds, with the names of its tensors bare. Raises ValueError that names what can't be a net's."""
    state = {bare: state[name] for bare, name in _bare(state).items()}
    if not state:
        raise ValueError(f"{source} holds no weights")
    wrong = [f"{name} is {what}" for name, value in state.items() if (what := _no_weight(name, value)) is not None]
    if wrong:
        raise ValueError(f"{source} holds tensors that can't be loaded: {_few(wrong)}; {_ACCEPTED}")
    if not isinstance(meta, dict):
        raise ValueError(f"{source}: its metadata are {reprlib.repr(meta)}; a dict is expected")
    for key, value in meta.items():
        if (expected := _misfit(key, value)) is not None:
            raise ValueError(f"{source}: its metadata have {reprlib.repr(value)} as {key}; {expected} is expected")
    preset = {"size": meta["val_size"], "resize": meta["resize"]} if {"val_size", "resize"} <= meta.keys() else {}
    statistics: dict[str, Any] = {name: preprocess[name] for name in ("mean", "std") if name in preprocess}
    weights = Weights(source, state, meta, statistics, preset, taken)
    if statistics and not _are_statistics(statistics, weights.channels):
        said = " and ".join(f"a {name} of shape {_described(value)}" for name, value in reversed(statistics.items()))
        raise ValueError(
            f"{source} holds {said} for a net of {weights.channels} channels; finite mean [channels, height, width] "
            "and positive std [channels, 1, 1] are expected"
        )
    return weights


def _no_weight(name: str, value: Tensor) -> str | None:
    """What `value` is, if it can't be a parameter or buffer; None if it can."""
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
    """What is expected as `key` of the metadata, if `value` isn't that."""
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
    """Names of a net's tensors without the prefixes that all of them carry: what each is in `names`.

    The counter that AveragedModel has beside its net goes with the prefix.
    """
    bare = {name: name for name in names}
    while True:
        net = [name for name in bare if name != "n_averaged"]
        prefix = next((each for each in _PREFIXES if net and all(name.startswith(each) for name in net)), None)
        if prefix is None:
            return bare
        bare = {name.removeprefix(prefix): bare[name] for name in net}


def load_into(model: nn.Module, weights: Weights, name: str) -> None:
    """`weights` become those of `model`, called `name`, which may carry prefixes of its own. Raises ValueError unless
    every tensor has its place; only a BatchNorm's counter of batches may be missing, and stays as it is."""
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
        raise ValueError(f"{source} is not of the architecture {name}: {differences}{_fitting(own, theirs)}")
    model.load_state_dict({places[key]: value for key, value in theirs.items()}, strict=False)


def _missing(own: Iterable[str], theirs: Iterable[str]) -> set[str]:
    """Names that `theirs` lacks, but for the counters of BatchNorms that it has."""
    known = {*theirs}
    return {key for key in {*own} - known if key.replace(_COUNTER, "running_mean") not in known}


def _fitting(own: Iterable[str], theirs: Iterable[str]) -> str:
    """Which of the nets that lie side by side in a file, each under a prefix of its own, fit by their names."""
    parts: dict[str, set[str]] = {}
    for key in theirs:
        prefix, _, rest = key.partition(".")
        parts.setdefault(prefix, set()).add(rest)
    fit = [prefix for prefix, part in parts.items() if part <= {*own} and not _missing(own, part)]
    return f"; the tensors under {_few(fit)} fit, each by itself: save them alone" if fit else ""


def _few(names: Sequence[str]) -> str:
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name[:100]) for name in names[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")
