"""The commands `eval` and `predict`: from arguments to nets, images and what is printed."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

from fastres.classes import IMAGENET, are_imagenet_ids, difference, out_of_order
from fastres.evaluate import CROPS, SCALES, Predictor, Result, Views, evaluate, require_metrics
from fastres.images import ClassFolders, ImageError, image_files, read_image, require_file
from fastres.inference import optimize
from fastres.models import families
from fastres.ops import dispatch
from fastres.table import Table, in_place_of
from fastres.terminal import printable, shows_bars
from fastres.train import data
from fastres.train.loop import DTYPES, place
from fastres.train.process import Place
from fastres.train.recipe import RECIPES, Recipe
from fastres.weights import Weights, load_into, read

_EMBEDDED = {name: meaning for name, meaning in data.DATA.items() if name not in ("imagenet", "folder")}
_CALIBRATED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # dtypes that need images to set their ranges by
_DTYPES = DTYPES | _CALIBRATED
_CALIBRATION_IMAGES = 256
_NOT_AS_EXPECTED = 3  # of __main__'s EXIT_STATUSES
_VALIDATION_IMAGES = 50_000  # of ImageNet
_MARGIN = 0.1  # points between two ways of computing the same accuracy: resizing, batches, dtypes
_USUAL = {"digits": "digits", "cifar10": "cifar-2015", "cifar100": "cifar-2015"}  # recipes by data


_GO_ON = "--ignore-class-names goes on, with class i of the one as class i of the other"
_MODEL = "resnet50, cifar-20, paper-34-B, ...; one for all weights or one each (default: as they say themselves)"
_WEIGHTS = "trained weights, or their torchvision name as ResNet50_Weights.IMAGENET1K_V2"


def _common_arguments(parser: argparse.ArgumentParser) -> None:
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
        choices=list(_DTYPES),
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
        help=f"how many of them, drawn with a fixed seed (default: {_CALIBRATION_IMAGES}, or all if fewer)",
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


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
examples:
  python -m fastres eval --checkpoint out/digits/best.pt
  python -m fastres eval --checkpoint best.pt --data DIR --crops 10 --csv classes.csv
  python -m fastres eval --checkpoint ResNet50_Weights.IMAGENET1K_V2 --model resnet50 --data DIR --optimize"""
    embedded = "; ".join(f"{name}: {meaning}" for name, meaning in _EMBEDDED.items())
    data_help = f"a folder, [val/]<class>/<image>, or {embedded} (default: as the checkpoint says, unless photographs)"
    parser.add_argument("--data", help=data_help)
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="where torchvision keeps CIFAR (default: other data need none)"
    )
    weights = f"{_WEIGHTS}; several make an ensemble"
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="FILE", help=weights)
    parser.add_argument("--model", nargs="+", metavar="NAME", help=_MODEL)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file for the figures per class (default: none)")
    parser.add_argument(
        "--expect",
        choices=["published"],
        help="published: compare with the accuracy that torchvision's weights tell of ImageNet's validation images; "
        f"exit status {_NOT_AS_EXPECTED} where they differ (default: none)",
    )
    _common_arguments(parser)


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
examples:
  python -m fastres predict photo.jpg --weights best.pt
  python -m fastres predict DIR --weights ResNet50_Weights.IMAGENET1K_V2 --model resnet50 --top 3 --csv out.csv"""
    parser.add_argument("images", nargs="*", type=Path, metavar="IMG_OR_FOLDER", help="images, or folders of images")
    weights = f"{_WEIGHTS}; several make an ensemble"
    parser.add_argument("--weights", action="extend", nargs="+", required=True, metavar="FILE", help=weights)
    parser.add_argument("--model", action="append", metavar="NAME", help=_MODEL)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per image (default: 5)")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="file with one class name per line (default: as the weights say)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file for the predictions (default: none)")
    _common_arguments(parser)


@data.hearing_workers()
def run_eval(args: argparse.Namespace) -> int:
    """Prints top-1 and top-5. Returns 1 if images could not be read, 3 for another accuracy than the expected one, else
    0; raises ValueError for what can't be, and for weights and data whose classes are not the same in the same order,
    as far as both name them.

    Under torchrun every process tests its share of the images and the first prints.
    """
    _check(args)
    try:
        require_metrics()
    except ImportError as error:
        raise ValueError(str(error)) from error
    with place(args.device) as here:
        _require_served(args, here)
        nets = _nets(args, args.checkpoint, here.device)
        name = args.data or _told_data(nets)
        images = _test_images(args, name, nets)
        for weights in nets.weights:
            _require_same_classes(args, weights, name, images.classes)
        views = nets.views(args)
        published = {} if args.expect is None else _published(nets, name, images, views)
        if here.rank == 0:
            nets.note(views)
        calibration = _calibration(args, images.training or (images.items, "images tested"), nets, views)
        preprocess = images.preprocess or _mean_image(args, name, nets)
        predictor = nets.predictor(args, views, preprocess, calibration)
        batches = _Batches(images.share(here.rank, here.world), args, nets, views)
        result = evaluate(predictor, batches, len(images.classes), here.device)
        compared, agrees = _compared(result, published)
        if here.rank == 0:
            for taken in nets.taken:
                print(f"weights: {taken}")
            where = name if args.data else f"{name}, as the checkpoint says"
            print(f"{nets.title} in {_dtype(args, here.device)}, {_described(views)}, on {where}")
            if calibration is not None:
                print(calibration.said)
            print(result)
            for line in compared:
                print(line)
            if args.csv is not None:
                result.write_csv(args.csv, images.classes)
        failed = batches.report() or (0 if calibration is None else calibration.report())
        return failed or (0 if agrees else _NOT_AS_EXPECTED)


@data.hearing_workers()
def run_predict(args: argparse.Namespace) -> int:
    """Prints the likeliest classes of each image. Returns 1 if images could not be read or got no finite scores, or
    folders could not be listed; else 0."""
    _check(args)
    if args.top < 1:
        raise ValueError(f"--top {args.top}: any whole number from 1 is accepted")
    weights, images = _apart(args)
    paths, unlisted = _image_files(images)
    for reason in unlisted:
        print(reason, file=sys.stderr)
    with place(args.device) as here:
        _require_served(args, here)
        nets = _nets(args, weights, here.device)
        names = _labels(args.labels, nets)
        views = nets.views(args)
        nets.note(views)
        for taken in nets.taken:
            print(f"note: weights: {taken}", file=sys.stderr)
        items = [(path, i) for i, path in enumerate(paths)]
        calibration = _calibration(args, (items, "images given"), nets, views)
        predictor = nets.predictor(args, views, None, calibration)
        if calibration is not None:
            print(f"note: {calibration.said}", file=sys.stderr)
        batches = _Batches(items, args, nets, views)
        broken = 0
        with nullcontext() if args.csv is None else Table(args.csv) as table:
            if table is not None:
                table.row("image", "rank", "class", "name", "score")
            for i, scores, classes in _predictions(predictor, batches, min(args.top, len(names))):
                if not all(map(math.isfinite, scores)):
                    tqdm.write(f"{printable(paths[i])}: the net's scores are not finite", file=sys.stderr)
                    broken += 1
                    continue
                print(printable(paths[i]))
                for rank, (score, k) in enumerate(zip(scores, classes, strict=True), 1):
                    print(f"  {score:7.2%}  {printable(names[k])}")
                    if table is not None:
                        table.row(paths[i], rank, k, names[k], f"{score:.6f}")
        if broken:
            print(f"{broken} of {len(paths)} images got no finite scores", file=sys.stderr)
        failed = [batches.report(), 0 if calibration is None else calibration.report(), broken, len(unlisted)]
        return int(any(failed))


def load_predictor(weights: str, model: str | None = None) -> tuple[Predictor, str, list[str]]:
    """What `predict --optimize` runs on a GPU, or else on the CPU; with the net's name and its classes' names.

    weights, model: as --weights and --model take them. Raises ValueError for weights that `predict` refuses.
    """
    parser = argparse.ArgumentParser()
    predict_arguments(parser)
    args = parser.parse_args([f"--weights={weights}", *([] if model is None else [f"--model={model}"]), "--optimize"])
    nets = _nets(args, args.weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return nets.predictor(args, nets.views(args), None, None), nets.title, _labels(None, nets)


def _predictions(predictor: Predictor, batches: _Batches, top: int) -> Iterator[tuple[int, list[float], list[int]]]:
    """Which image, the scores of its `top` likeliest classes, and which these are."""
    for images, places in batches:
        scores, classes = predictor(images).topk(top)
        yield from zip(places.tolist(), scores.tolist(), classes.tolist(), strict=True)


def _check(args: argparse.Namespace) -> None:
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
    calibrated = args.dtype in _CALIBRATED
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


def _dtype(args: argparse.Namespace, device: torch.device) -> str:
    return args.dtype or ("bf16" if device.type == "cuda" else "fp32")


def _require_served(args: argparse.Namespace, here: Place) -> None:
    """Raises ValueError where `optimize` refuses the dtype on the device, before anything is read. Says on stderr where
    it has no fused convolutions in that dtype on a CPU."""
    device, name = here.device, _dtype(args, here.device)
    dtype = _DTYPES[name]
    reason = dispatch.why_no_onednn(dtype) if args.optimize and device.type == "cpu" else None
    if name not in _CALIBRATED and reason is not None and here.rank == 0:
        print(f"note: --optimize fuses nothing in {name} here: {reason}", file=sys.stderr)
    if name in _CALIBRATED:
        net, pixel = nn.Sequential(nn.Conv2d(1, 1, 1, device=device)).eval(), torch.zeros(1, 1, 1, 1, device=device)
        optimize(net, dtype=dtype, calibration=[pixel], percentile=args.percentile)


@dataclass(frozen=True)
class _Nets:
    """The nets that the arguments name, with their weights loaded, and the recipe behind them (None: unknown)."""

    weights: list[Weights]
    models: list[nn.Module]
    names: list[str]
    recipe: Recipe | None
    channels: int

    @property
    def title(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"an ensemble of {', '.join(self.names)}"

    @property
    def taken(self) -> list[str]:
        """Which weights were read of each file with averaged ones, or several."""
        return [f"{each.taken} of {each.source}" for each in self.weights if each.taken is not None]

    def note(self, views: Views) -> None:
        """Says on stderr which views of an image add nothing, or are unlike all that a net was trained on."""
        if views.crops == "10" and views.size == views.resize:
            print(
                f"note: crops of {views.size} from a shorter side of {views.resize} coincide: the 10 are one crop and "
                "its mirror image, five times each",
                file=sys.stderr,
            )
        recipes = {each.source: each.meta.get("recipe", "") for each in self.weights}
        unlike = [source for source, recipe in recipes.items() if recipe in RECIPES and not RECIPES[recipe].flip]
        if unlike and (views.crops == "10" or (views.crops == "multiscale" and views.flip)):
            mend = "--crops center" if views.crops == "10" else "--no-flip"
            print(
                f"note: {', '.join(unlike)}: trained without mirror images, which these views hold; {mend} has none",
                file=sys.stderr,
            )

    def views(self, args: argparse.Namespace) -> Views:
        preset = self.weights[0].preset
        if args.recipe is not None or (not preset and self.recipe is not None):
            assert self.recipe is not None
            preset = {"size": self.recipe.val_size, "resize": self.recipe.resize}
        size = args.size or preset.get("size", 224)
        resize = args.resize or max(size, preset.get("resize", 256))
        scales = tuple(args.scales or (round(side * size / SCALES[0]) for side in SCALES))
        return Views(args.crops, size, resize, scales, flip=not args.no_flip)

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def predictor(
        self, args: argparse.Namespace, views: Views, preprocess: nn.Module | None, calibration: _Batches | None
    ) -> Predictor:
        """preprocess: of the data, for nets whose weights don't tell their own."""
        own = [_preprocess(weights) or preprocess or self._by_recipe(weights) for weights in self.weights]
        dtype = _DTYPES[_dtype(args, self.device)]
        how: dict[str, Any] = {"calibration": calibration, "percentile": args.percentile}
        return Predictor(self.models, views, own, dtype=dtype, fast=args.optimize, **how)

    def _by_recipe(self, weights: Weights) -> nn.Module:
        if self.recipe is not None and self.recipe.normalise == "pixel":
            raise ValueError(
                f"{weights.source} doesn't hold the mean image that its recipe subtracts, and no training images are "
                "at hand to compute it from; all files that fastres train writes hold it"
            )
        if self.channels != 3:
            raise ValueError(f"{weights.source} reads images of {self.channels} channels and doesn't hold their mean")
        return data.by_channel()


def _preprocess(weights: Weights) -> nn.Module | None:
    if not weights.preprocess:
        return None
    mean, std = weights.preprocess["mean"], weights.preprocess["std"]
    return data.Preprocess(mean, std, torch.zeros(len(mean), len(mean)))


def _nets(args: argparse.Namespace, sources: Sequence[str], device: torch.device) -> _Nets:
    given = args.model or []
    if len(given) not in (0, 1, len(sources)):
        raise ValueError(f"--model names {len(given)} nets for {len(sources)} files: one for all or one each")
    named = given * len(sources) if len(given) == 1 else given or [None] * len(sources)
    weights = [read(source, name) for source, name in zip(sources, named, strict=True)]
    _require_ensemble(args, weights)
    names = [name or _told(each) for name, each in zip(named, weights, strict=True)]
    models = []
    for name, each in zip(names, weights, strict=True):
        sizes = {"num_classes": each.classes, "in_channels": each.channels}
        model = families.named(name, **{key: size for key, size in sizes.items() if size is not None})
        load_into(model, each, name)
        models.append(model.to(memory_format=torch.channels_last).to(device).eval())  # type: ignore[call-overload]
    channels = {each.channels for each in weights}
    if len(channels) != 1:
        raise ValueError(f"the nets of an ensemble read images of {', '.join(map(str, channels))} channels")
    meta = weights[0].meta
    recipe = args.recipe or meta.get("recipe") or _USUAL.get(getattr(args, "data", None) or meta.get("data", ""))
    return _Nets(weights, models, names, RECIPES.get(recipe or ""), channels.pop() or 3)


def _require_ensemble(args: argparse.Namespace, weights: Sequence[Weights]) -> None:
    """Raises ValueError unless class i is the same to all of them, as far as they name their classes."""
    if len({each.classes for each in weights}) != 1:
        found = ", ".join(f"{each.source} has {each.classes}" for each in weights)
        raise ValueError(f"the nets of an ensemble have one number of classes: {found}")
    named = [(each.source, each.names) for each in weights if each.names is not None]
    for source, names in named[1:]:
        said = difference(named[0][1], names, (named[0][0], source))
        if said is not None and not args.ignore_class_names:
            raise ValueError(f"the nets of an ensemble have different classes: {said}. {_GO_ON}")


def _require_same_classes(args: argparse.Namespace, weights: Weights, name: str, classes: Sequence[str]) -> None:
    """Raises ValueError unless class i is the same to the weights and to the data called `name`.

    Numbers of classes always must agree. Names are compared where the weights tell them, but not with those of
    synthetic images, which show nothing. Weights that tell none fit folders called by numbers only if the folders are
    read in the order of the numbers: otherwise class i might as well be meant to be folder i.
    """
    told = weights.names
    said = None if told is None or name == "synthetic" else difference(told, classes, ("the net", "the data"))
    order = None if name in _EMBEDDED else out_of_order(classes)
    if weights.classes != len(classes):
        raise ValueError(
            f"{weights.source} holds a net of {weights.classes} classes, the data {name} has {len(classes)}"
            + (f": {said}" if said else "")
        )
    if args.ignore_class_names:
        return
    if said is not None:
        said = "; ".join(part for part in (said, order) if part)
        raise ValueError(f"{weights.source} and the data {name} have different classes: {said}. {_GO_ON}")
    if told is None and order is not None:
        raise ValueError(f"{weights.source} doesn't name its classes, and {name}'s {order}. {_GO_ON}")


def _told(weights: Weights) -> str:
    """The net's name as the weights tell it."""
    if weights.net is not None:
        return weights.net
    meta = weights.meta
    if "family" not in meta or "depth" not in meta:
        raise ValueError(f"{weights.source} doesn't say which net it is of: give --model")
    parts = (meta["family"], meta["depth"], meta.get("shortcut"))
    return "-".join(str(part) for part in parts if part is not None)


def _published(nets: _Nets, name: str, images: _TestImages, views: Views) -> dict[int, float]:
    """The accuracy to expect, in percent at top-1 and top-5. Raises ValueError where the weights tell none, and for
    other images or views than those that it was measured on."""
    weights = nets.weights[0]
    if len(nets.weights) > 1:
        raise ValueError("--expect published is for one net; for an ensemble no accuracy is published")
    if 1 not in weights.published:
        raise ValueError(
            f"--expect published: {weights.source} tells no accuracy. torchvision's weights do under their names, as "
            f"--checkpoint ResNet50_Weights.IMAGENET1K_V2, whose file may lie in {torch.hub.get_dir()}/checkpoints"
        )
    imagenet = tuple(images.classes) == IMAGENET or are_imagenet_ids(images.classes)
    if name in _EMBEDDED or not imagenet or _count(images.items) > _VALIDATION_IMAGES:
        raise ValueError(
            f"--expect published: what {weights.source} tells is of ImageNet's {_VALIDATION_IMAGES:,} validation "
            f"images, or some of them, in their 1000 classes; {name} has {_count(images.items):,} images of "
            f"{len(images.classes):,} classes"
        )
    preset = weights.preset
    if not preset or (views.crops, views.size, views.resize) != ("center", preset["size"], preset["resize"]):
        usual = _described(Views("center", preset["size"], preset["resize"])) if preset else "views it doesn't tell"
        raise ValueError(
            f"--expect published: what {weights.source} tells is of {usual}, not of {_described(views)}; leave out "
            "--crops, --size, --resize and --recipe"
        )
    return weights.published


def _compared(result: Result, published: dict[int, float]) -> tuple[list[str], bool]:
    """A line for each accuracy beside the published one, and whether all of them agree.

    They do within `_MARGIN`, and for n of the N validation images three standard errors of a random sample more.
    """
    lines, agrees, n, total = [], True, result.count, _VALIDATION_IMAGES
    for k, expected in published.items():
        share, found = expected / 100, 100 * result.accuracy(k)
        margin = _MARGIN + 300 * math.sqrt(share * (1 - share) / n * (1 - n / total))
        within = abs(found - expected) <= margin
        agrees &= within
        lines.append(
            f"top-{k}: {found:.2f}% here, {expected:.2f}% published, difference {found - expected:+.2f} points, "
            f"{'within' if within else 'beyond'} the margin of {margin:.2f}"
            + (f" for {n:,} of {total:,} images" if n < total else "")
        )
    return lines, agrees


def _told_data(nets: _Nets) -> str:
    """The data that all checkpoints tell they were trained on, if it has a name of its own."""
    told = {each.source: each.meta.get("data") for each in nets.weights}
    if len(set(told.values())) == 1 and (name := next(iter(told.values()))) in _EMBEDDED:
        return str(name)
    said = "; ".join(f"{source} says {name or 'nothing'}" for source, name in told.items())
    raise ValueError(f"--data is needed ({said}): a folder, [val/]<class>/<image>, or {', '.join(_EMBEDDED)}")


def _described(views: Views) -> str:
    if views.crops == "multiscale":
        flips = ", with mirror images" if views.flip else ""
        return f"fully convolutional at {', '.join(map(str, views.scales))}{flips}"
    return f"{views.crops} crop{'s' * (views.crops == '10')} of {views.size}, shorter side {views.resize}"


_Items = list[tuple[str, int]] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _TestImages:
    """items: paths with labels, or the images themselves, uint8 [N, C, H, W], with theirs. preprocess: of images whose
    training images are at hand. training: the training images and what to call them, where the data has any."""

    items: _Items
    classes: Sequence[str]
    preprocess: nn.Module | None
    training: tuple[_Items, str] | None

    def share(self, rank: int, world: int) -> _Items:
        """What process `rank` of `world` tests: the shares differ by at most one image."""
        if isinstance(self.items, tuple):
            return self.items[0][rank::world], self.items[1][rank::world]
        return self.items[rank::world]


def _test_images(args: argparse.Namespace, name: str, nets: _Nets) -> _TestImages:
    if name in _EMBEDDED:
        recipe = nets.recipe or RECIPES["imagenet-modern"]
        found = data.load(name, recipe, args.root)
        assert isinstance(found.train, data.Resident)
        assert isinstance(found.val, data.Resident)
        train, test = ((part.images, part.labels) for part in (found.train, found.val))
        return _TestImages(test, found.classes, found.preprocess, (train, f"training images of {name}"))
    root = Path(name)
    if not root.is_dir():
        raise ValueError(f"--data {root}: there is no such folder, and no data of that name; {', '.join(_EMBEDDED)}")
    place = root / "val" if (root / "val").is_dir() else root
    items, classes = _image_folder(place, "to test on")
    training = None
    if args.dtype in _CALIBRATED and args.calibration is None and place != root and (root / "train").is_dir():
        training = _image_folder(root / "train", "to calibrate with")[0], f"training images in {root / 'train'}"
    return _TestImages(items, classes, None, training)


def _image_folder(place: Path, what_for: str) -> tuple[list[tuple[str, int]], list[str]]:
    try:
        files = ClassFolders(str(place))
    except OSError as error:
        raise ValueError(f"{place} has no classes {what_for}: {error}") from error
    return files.samples, files.classes


def _calibration(args: argparse.Namespace, default: tuple[_Items, str], nets: _Nets, views: Views) -> _Batches | None:
    """The images that calibrate: a sample of --calibration's, or of `default` and what to call them; None for dtypes
    without calibration."""
    if args.dtype not in _CALIBRATED:
        return None
    items, what = default
    if args.calibration is not None:
        paths, unlisted = _image_files([args.calibration])
        if unlisted:
            raise ValueError(unlisted[0])
        items, what = [(path, 0) for path in paths], f"images in {printable(args.calibration)}"
    count = _count(items)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    picked = order[: args.calibration_images or _CALIBRATION_IMAGES].sort().values
    sample = (items[0][picked], items[1][picked]) if isinstance(items, tuple) else [items[i] for i in picked.tolist()]
    within = "" if args.percentile is None else f", percentile {args.percentile:g}"
    return _Batches(sample, args, nets, views, sample_of=f"{count:,} {what}{within}")


def _count(items: _Items) -> int:
    return len(items[1]) if isinstance(items, tuple) else len(items)


def _mean_image(args: argparse.Namespace, name: str, nets: _Nets) -> nn.Module | None:
    """The recipe's preprocessing, from the folder's own training images, if a net needs it and they are there."""
    pixel = nets.recipe is not None and nets.recipe.normalise == "pixel"
    if (
        name in _EMBEDDED
        or not pixel
        or not (Path(name) / "train").is_dir()
        or all(each.preprocess for each in nets.weights)
    ):
        return None
    assert nets.recipe is not None
    return data.load("folder", nets.recipe, Path(name), workers=args.workers).preprocess


def _apart(args: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """The weights, and the images, among which those named after the weights: folders and *.png etc."""
    after = [text for text in args.weights if Path(text).is_dir() or Path(text).suffix.lower() in IMG_EXTENSIONS]
    weights, images = [text for text in args.weights if text not in after], [*args.images, *map(Path, after)]
    if not weights:
        raise ValueError(f"--weights {' '.join(after)}: a file with weights is expected, no image and no folder")
    if not images:
        raise ValueError("the images are missing: python -m fastres predict IMG_OR_FOLDER ... --weights FILE ...")
    return weights, images


def _image_files(given: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The images named, and those in the folders named, sorted, at any depth; and which folders can't be listed, and
    why. Raises ValueError for what is neither an image nor a folder with images."""
    paths: list[str] = []
    errors: list[OSError] = []
    for path in given:
        if os.path.isdir(path):
            before = len(errors)
            found = image_files(path, errors.append)
            if not found and len(errors) == before:
                raise ValueError(f"{path} holds no images; accepted are {', '.join(IMG_EXTENSIONS)}")
            paths += sorted(found, key=lambda file: file.split(os.sep))
            continue
        try:
            require_file(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist") from error
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror}") from error
        paths.append(str(path))
    unlisted = [f"{printable(error.filename)} can't be listed: {error.strerror}" for error in errors]
    if not paths:
        raise ValueError("; ".join(unlisted))
    return paths, unlisted


def _labels(file: Path | None, nets: _Nets) -> list[str]:
    classes = nets.weights[0].classes or 0
    if file is None:
        return next((each.names for each in nets.weights if each.names), [str(k) for k in range(classes)])
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"--labels {file} can't be read: {error.strerror}") from error
    if "\0" in text:
        raise ValueError(f"--labels {file} can't be read: it is no text, or in UTF-16; UTF-8 is accepted")
    names = text.split("\n")
    while names and not names[-1].strip():
        names.pop()
    empty = [line for line, name in enumerate(names, 1) if not name.strip()]
    if empty:
        raise ValueError(f"--labels {file}: line {empty[0]} is empty; a class on each line is accepted")
    if len(names) != classes:
        raise ValueError(f"--labels {file} names {len(names)} classes, {nets.weights[0].source} has {classes}")
    return names


class _Files(Dataset):
    """Item i: the image of the i-th path, prepared, or the reason why there is none; and its label."""

    def __init__(self, items: Sequence[tuple[str, int]], views: Views, channels: int) -> None:
        self.items = items
        self.views = views
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.items[index]
        try:
            return self.views.prepare(tvf.pil_to_tensor(read_image(path, self.mode))), label
        except ImageError as error:
            return str(error), label
        except (ValueError, MemoryError) as error:
            return f"{printable(path)} can't be shown to the net ({printable(error)})", label


def _collate(pairs: Sequence[tuple[Tensor | str, int]]) -> tuple[Tensor | list[Tensor], Tensor, list[str]]:
    """Images, as one tensor where they are of one shape, their labels, and the reasons for those that are missing."""
    images = [image for image, _ in pairs if not isinstance(image, str)]
    labels = [label for image, label in pairs if not isinstance(image, str)]
    reasons = [reason for reason, _ in pairs if isinstance(reason, str)]
    together = len({image.shape for image in images}) == 1
    return torch.stack(images) if together else images, torch.tensor(labels), reasons


class _Batches:
    """Batches (images, labels) of a data set; what can't be read is named on stderr as it is met, and counted anew in
    each pass.

    sample_of: of images that calibrate, from which they are taken.
    """

    def __init__(
        self, items: _Items, args: argparse.Namespace, nets: _Nets, views: Views, sample_of: str | None = None
    ) -> None:
        self.items, self.size, self.workers = items, args.batch, args.workers
        self.channels, self.views, self.device = nets.channels, views, nets.device
        self.sample_of = sample_of
        self.failed = 0

    @property
    def count(self) -> int:
        return _count(self.items)

    @property
    def said(self) -> str:
        """Of images that calibrate, after a pass: how many did, and of which."""
        return f"calibrated with {self.count - self.failed:,} of {self.sample_of}"

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        self.failed = 0
        if isinstance(self.items, tuple):
            images, labels = self.items
            if images.shape[1] != self.channels:
                raise ValueError(f"the net reads images of {self.channels} channels, the data has {images.shape[1]}")
            starts = range(0, len(labels), self.size)
            for i in self._shown(starts, len(starts)):
                yield self.views.prepare(images[i : i + self.size]), labels[i : i + self.size]
            return
        files = _Files(self.items, self.views, self.channels)
        starts = range(0, self.count, self.size)
        places = (list(range(i, min(i + self.size, self.count))) for i in starts)
        pinned = self.device.type == "cuda"
        with closing(data.fetched(files, places, self.workers, _collate, pinned=pinned)) as batches:
            for images, labels, reasons in self._shown(batches, len(starts)):
                for reason in reasons:
                    tqdm.write(f"calibration: {reason}" if self.sample_of else reason, file=sys.stderr)
                self.failed += len(reasons)
                if len(labels):
                    yield images, labels
        if self.sample_of and self.failed == self.count:
            raise ValueError(f"{self.said}: none that was tried can be read")

    def _shown(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        title = "calibration" if self.sample_of else None
        return tqdm(batches, title, total, unit="batch", disable=not shows_bars(), leave=False)

    def report(self) -> int:
        """The exit status: 1 if some of the images could not be read."""
        if self.failed:
            which = "images that calibrate" if self.sample_of else "images"
            print(f"{self.failed} of {self.count} {which} could not be read", file=sys.stderr)
        return int(self.failed > 0)
