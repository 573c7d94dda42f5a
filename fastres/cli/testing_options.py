"""Options that `eval` and `predict` share, whether they fit together, and what they ask for: nets, views, dtypes."""

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

CALIBRATED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # dtypes that need images to set their ranges by
CALIBRATION_IMAGES = 256
MODEL = "resnet50, cifar-20, paper-34-B, ...; one for all weights or one each (default: as they say themselves)"
WEIGHTS = "trained weights, or their torchvision name as ResNet50_Weights.IMAGENET1K_V2; several make an ensemble"


def add_testing(parser: argparse.ArgumentParser) -> None:
    crops = "; ".join(f"{name}: {meaning}" for name, meaning in CROPS.items())
    views = parser.add_argument_group("how images are shown")
    views.add_argument(
        "--recipe",
        choices=list(RECIPES),
        metavar="NAME",
        help=f"whose image size and normalisation: {', '.join(RECIPES)} (default: as the weights say)",
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
        help=f"shorter sides of multiscale (default: the paper's {', '.join(map(str, SCALES))} for crops of 224, in "
        "proportion for others)",
    )
    views.add_argument("--no-flip", action="store_true", help="multiscale without mirror images")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    how.add_argument(
        "--dtype",
        choices=list(DTYPES | CALIBRATED),
        help="int8 (CPUs with AVX512-VNNI) and fp8 (GPUs of compute capability 8.9 and above) need --optimize "
        "(default: bf16 on a GPU, fp32 on a CPU)",
    )
    how.add_argument("--optimize", action="store_true", help="run the nets through fastres.optimize")
    how.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="for int8 and fp8: images like those to come, from which ranges of activations are taken "
        "(default: eval takes the data's training images, if there are any; otherwise the images themselves)",
    )
    how.add_argument(
        "--calibration-images",
        type=int,
        metavar="N",
        help=f"how many of them, drawn with a fixed seed (default: {CALIBRATION_IMAGES}, or all if fewer)",
    )
    how.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="the share of the values met, in percent, that the ranges hold (default: 100, all of them)",
    )
    parser.add_argument(
        "--ignore-class-names",
        action="store_true",
        help="go on although weights and data, or two of the weights, call class i by different names",
    )


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that exclude each other, or that nothing here can serve."""
    for name in ("batch", "size", "resize", "calibration_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: any whole number from 1 is accepted")
    for name in ("scales", "no_flip"):
        if getattr(args, name) and args.crops != "multiscale":
            raise ValueError(f"--{name.replace('_', '-')} belongs to --crops multiscale, not to --crops {args.crops}")
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu", "cuda", *cards] if cards else ["cpu"]
    if args.device not in (None, *there):
        raise ValueError(f"--device {args.device} is not there: this machine has {', '.join(there)}")
    calibrated = args.dtype in CALIBRATED
    if calibrated and not args.optimize:
        raise ValueError(f"--dtype {args.dtype} needs --optimize")
    for name in ("calibration", "calibration_images", "percentile"):
        if getattr(args, name) is not None and not calibrated:
            raise ValueError(f"--{name.replace('_', '-')} is for --optimize with --dtype int8 or fp8 only")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: any whole number from 0 is accepted")
    if args.csv is not None:
        folder = args.csv.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"--csv {args.csv}: the folder {folder} does not exist")
        if args.csv.is_dir() or not os.access(folder if in_place_of(args.csv) else args.csv, os.W_OK):
            raise ValueError(f"--csv {args.csv} can't be written")


def dtype_name(args: argparse.Namespace, device: torch.device) -> str:
    return args.dtype or default_dtype(device)


def require_served(args: argparse.Namespace, here: Place) -> None:
    """Raises ValueError where `optimize` refuses the dtype on the device, before anything is read. Says on stderr where
    it has no fused convolutions in that dtype on a CPU."""
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
    how: dict[str, Any] = {"recipe": args.recipe, "data": data, "ignore_class_names": args.ignore_class_names}
    return pretrained.load(sources, args.model or [], device, **how)


def running(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """How a `Predictor` is to run."""
    dtype = (DTYPES | CALIBRATED)[dtype_name(args, device)]
    return {"dtype": dtype, "fast": args.optimize, "percentile": args.percentile}


def note_views(nets: TrainedNets, views: Views) -> None:
    """Says on stderr which views of an image add nothing, or are unlike all that a net was trained on."""
    if views.crops == "10" and views.size == views.resize:
        print(
            f"note: crops of {views.size} from a shorter side of {views.resize} coincide: the 10 are one crop and its "
            "mirror image, five times each",
            file=sys.stderr,
        )
    recipes = {each.source: each.meta.get("recipe", "") for each in nets.weights}
    unlike = [source for source, recipe in recipes.items() if recipe in RECIPES and not RECIPES[recipe].flip]
    if unlike and (views.crops == "10" or (views.crops == "multiscale" and views.flip)):
        mend = "--crops center" if views.crops == "10" else "--no-flip"
        print(
            f"note: {', '.join(unlike)}: trained without mirror images, which these views hold; {mend} has none",
            file=sys.stderr,
        )
