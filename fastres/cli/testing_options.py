"""The options that `eval` and `predict` share: add them, check them, and load what they describe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres import pretrained
from fastres.evaluate import CROPS, SCALES, Views
from fastres.inference import optimize
from fastres.ops import dispatch
from fastres.pretrained import TrainedNets
from fastres.table import in_place_of
from fastres.train.loop import DTYPES, default_dtype
from fastres.train.process import Place
from fastres.train.recipe import RECIPES

CALIBRATED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # dtypes that need images to calibrate their ranges
CALIBRATION_IMAGES = 256
MODEL = (
    "the net: resnet50, cifar-20, paper-34-B, ...; one for all weights, or one each (default: the net in the weights)"
)
WEIGHTS = (
    "file with trained weights, or a torchvision name such as ResNet50_Weights.IMAGENET1K_V2; several: an ensemble"
)


def add_testing(parser: argparse.ArgumentParser) -> None:
    """Add the shared options."""
    crops = "; ".join(f"{name}: {meaning}" for name, meaning in CROPS.items())
    views = parser.add_argument_group("image sizes and crops")
    views.add_argument(
        "--recipe",
        choices=list(RECIPES),
        metavar="NAME",
        help=f"recipe that gives image sizes and normalisation: {', '.join(RECIPES)} (default: the weights')",
    )
    views.add_argument("--crops", choices=list(CROPS), default="center", help=f"{crops} (default: center)")
    views.add_argument("--size", type=int, metavar="PIXELS", help="side of the crops (default: as trained, else 224)")
    views.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shorter side before cropping (default: as trained, else 256)"
    )
    views.add_argument(
        "--scales",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help=f"shorter sides for multiscale (default: the paper's {', '.join(map(str, SCALES))} for crops of 224, in "
        "proportion for other sizes)",
    )
    views.add_argument("--no-flip", action="store_true", help="for multiscale: don't test mirror images")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--batch", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    how.add_argument(
        "--dtype",
        choices=list(DTYPES | CALIBRATED),
        help="int8 (CPUs with AVX512-VNNI) and fp8 (GPUs of compute capability 8.9 and above) require --optimize "
        "(default: bf16 on a GPU, fp32 on a CPU)",
    )
    how.add_argument("--optimize", action="store_true", help="run the nets through fastres.optimize")
    how.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="for int8 and fp8: folder of typical images, from which the ranges of activations are measured "
        "(default for eval: the data's training images, if there are any; otherwise the images themselves)",
    )
    how.add_argument(
        "--calibration-images",
        type=int,
        metavar="N",
        help=f"number of calibration images, drawn with a fixed seed (default: {CALIBRATION_IMAGES}, or all if fewer)",
    )
    how.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="percentage of the measured values that the ranges must cover (default: 100)",
    )
    parser.add_argument(
        "--ignore-class-names",
        action="store_true",
        help="continue even if weights and data, or two of the weights, have different names for class i",
    )


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for values out of range, options that exclude each other, and unusable devices and files."""
    for name in ("batch", "size", "resize", "calibration_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be a whole number of at least 1: got {value}")
    for name in ("scales", "no_flip"):
        if getattr(args, name) and args.crops != "multiscale":
            raise ValueError(f"--{name.replace('_', '-')} requires --crops multiscale: got --crops {args.crops}")
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu", "cuda", *cards] if cards else ["cpu"]
    if args.device not in (None, *there):
        raise ValueError(f"--device {args.device} is not available on this machine; accepted: {', '.join(there)}")
    calibrated = args.dtype in CALIBRATED
    if calibrated and not args.optimize:
        raise ValueError(f"--dtype {args.dtype} requires --optimize")
    for name in ("calibration", "calibration_images", "percentile"):
        if getattr(args, name) is not None and not calibrated:
            raise ValueError(f"--{name.replace('_', '-')} requires --optimize with --dtype int8 or fp8")
    if args.workers < 0:
        raise ValueError(f"--workers must be a whole number of at least 0: got {args.workers}")
    if args.csv is not None:
        folder = args.csv.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"--csv {args.csv}: the folder {folder} does not exist")
        if args.csv.is_dir() or not os.access(folder if in_place_of(args.csv) else args.csv, os.W_OK):
            raise ValueError(f"--csv {args.csv} can't be written")


def dtype_name(args: argparse.Namespace, device: torch.device) -> str:
    """Return the name of the dtype to run in: --dtype, or the default of the device."""
    return args.dtype or default_dtype(device)


def require_served(args: argparse.Namespace, here: Place) -> None:
    """Raise ValueError if `optimize` rejects the dtype on the device, before any file is read.

    On a CPU, print a note on stderr if `optimize` fuses nothing in that dtype.
    """
    device, name = here.device, dtype_name(args, here.device)
    dtype = (DTYPES | CALIBRATED)[name]
    reason = dispatch.why_no_onednn(dtype) if args.optimize and device.type == "cpu" else None
    if name not in CALIBRATED and reason is not None and here.rank == 0:
        print(f"note: --optimize fuses nothing in {name} here: {reason}", file=sys.stderr)
    if name in CALIBRATED:
        net, pixel = nn.Sequential(nn.Conv2d(1, 1, 1, device=device)).eval(), torch.zeros(1, 1, 1, 1, device=device)
        optimize(net, dtype=dtype, calibration=[pixel], percentile=args.percentile)


def load_nets(
    args: argparse.Namespace, sources: Sequence[str], device: torch.device, data: str | None = None
) -> TrainedNets:
    """Load the nets of `sources` with --model, --recipe and --ignore-class-names. Raises as `pretrained.load` does."""
    how: dict[str, Any] = {"recipe": args.recipe, "data": data, "ignore_class_names": args.ignore_class_names}
    return pretrained.load(sources, args.model or [], device, **how)


def running(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of `Predictor` for --dtype, --optimize and --percentile."""
    dtype = (DTYPES | CALIBRATED)[dtype_name(args, device)]
    return {"dtype": dtype, "fast": args.optimize, "percentile": args.percentile}


def note_views(nets: TrainedNets, views: Views) -> None:
    """Print a note on stderr if views coincide, or if they include mirror images that a net wasn't trained on."""
    if views.crops == "10" and views.size == views.resize:
        print(
            f"note: crops of {views.size} from a shorter side of {views.resize} coincide: the 10 are one crop and its "
            "mirror image, five times each",
            file=sys.stderr,
        )
    recipes = {each.source: each.meta.get("recipe", "") for each in nets.weights}
    unlike = [source for source, recipe in recipes.items() if recipe in RECIPES and not RECIPES[recipe].flip]
    if unlike and (views.crops == "10" or (views.crops == "multiscale" and views.flip)):
        remedy = "--crops center" if views.crops == "10" else "--no-flip"
        print(
            f"note: {', '.join(unlike)}: trained without mirror images, which these views include; {remedy} has none",
            file=sys.stderr,
        )
