"""Trained weights from wherever they are kept, and into a net, with clear words for what doesn't fit.

A source is a file (a checkpoint of `fastres train`, a state_dict saved by torch, safetensors) or the name of weights
that torchvision publishes.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models as published
from torchvision.models import WeightsEnum

__all__ = ["Weights", "load_into", "read"]

_SHOWN = 4  # names listed of each kind of mismatch


@dataclass(frozen=True)
class Weights:
    """state: parameters and buffers by name, on the CPU. preprocess: mean and std, where the source knows them; meta:
    what else it tells, for published weights their `meta`, for checkpoints of `fastres train` the settings of the run.
    preset: the resize and the size of the centre crop that they are tested with."""

    source: str
    state: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Tensor] = field(default_factory=dict)
    preset: dict[str, int] = field(default_factory=dict)

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


def read(source: str, model: str | None = None) -> Weights:
    """The weights of `source`: a file, `ResNet50_Weights.IMAGENET1K_V2`, or `IMAGENET1K_V2` of `model`.

    A training checkpoint gives its averaged weights where it has them. Files are read with `weights_only=True`. Raises
    ValueError for a source that doesn't exist, can't be fetched, is damaged or holds no weights.
    """
    path = Path(source)
    if not path.exists():
        enum = _published(source, model)
        if enum is not None:
            return _fetch(source, enum)
        raise ValueError(f"{source} does not exist, neither as a file nor as torchvision weights{_of(model)}")
    if path.is_dir():
        raise ValueError(f"{source} is a folder; a file with weights is expected")
    return _safetensors(path) if path.suffix == ".safetensors" else _torch(path)


def _of(model: str | None) -> str:
    if model not in published.list_models(module=published):
        return " (they are called like ResNet50_Weights.IMAGENET1K_V2)"
    return f" ({', '.join(str(weights) for weights in published.get_model_weights(model))})"


def _published(name: str, model: str | None) -> WeightsEnum | None:
    try:
        if "." in name:
            return published.get_weight(name)
        return published.get_model_weights(model)[name] if model else None
    except (ValueError, KeyError):
        return None


def _fetch(source: str, enum: WeightsEnum) -> Weights:
    try:
        state = enum.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(f"{source} can't be fetched from {enum.url} ({error}); put that file into {place}") from error
    transforms = enum.transforms()
    statistics = {name: torch.tensor(getattr(transforms, name))[:, None, None] for name in ("mean", "std")}
    preset = {"size": transforms.crop_size[0], "resize": transforms.resize_size[0]}
    return Weights(source, dict(state), dict(enum.meta), statistics, preset)


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
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from error
    return Weights(str(path), state, meta, preprocess, _preset(meta))


def _torch(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} is truncated, damaged or can't be read ({error})") from error
    except Exception as error:  # what is no pickle, a text say, may raise anything
        raise ValueError(f"{path} {_not_weights(error)}") from error
    content = content if isinstance(content, dict) else {}
    inner = {name: value for name, value in content.items() if isinstance(value, dict)}
    nested = inner.get("ema") or inner.get("model") or inner.get("state_dict") or content
    state = {str(name): value for name, value in nested.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no weights: a dict of tensors is expected, alone or under model or state_dict")
    if all(name.startswith("module.") for name in state):  # saved from inside DistributedDataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    meta = inner.get("meta", {})
    return Weights(str(path), state, meta, inner.get("preprocess", {}), _preset(meta))


def _not_weights(error: Exception) -> str:
    """What a file is that `torch.load` refuses with `error`, whose own advice is to run the code in it."""
    told = str(error)
    instead = "save its weights instead: torch.save(model.state_dict(), FILE)"
    if pickled := re.search(r"GLOBAL (\S+)", told):
        return f"holds a pickled module, or another object that isn't a tensor ({pickled[1]}); {instead}"
    if "TorchScript" in told:
        return f"holds a TorchScript module; {instead}"
    return "is truncated, damaged or no file with weights"


def _preset(meta: dict[str, Any]) -> dict[str, int]:
    """How the run that wrote `meta` validates."""
    return {"size": meta["val_size"], "resize": meta["resize"]} if {"val_size", "resize"} <= meta.keys() else {}


def load_into(model: nn.Module, weights: Weights, name: str) -> None:
    """`weights` become those of `model`, called `name`. Raises ValueError unless every tensor has its place."""
    own = model.state_dict()
    theirs = weights.state
    shapes = [
        f"{key} {list(theirs[key].shape)} for {list(own[key].shape)}"
        for key in own.keys() & theirs.keys()
        if own[key].shape != theirs[key].shape
    ]
    found = {
        "missing": sorted(own.keys() - theirs.keys()),
        "unexpected": sorted(theirs.keys() - own.keys()),
        "of another shape": sorted(shapes),
    }
    if any(found.values()):
        differences = "; ".join(f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in found.items() if keys)
        raise ValueError(f"{weights.source} is not of the architecture {name}: {differences}")
    model.load_state_dict(theirs)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
