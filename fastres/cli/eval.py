"""`python -m fastres eval`: compute top-1 and top-5 accuracy of trained nets."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastres.classes import IGNORE, IMAGENET, are_imagenet_ids, difference, out_of_order
from fastres.cli import testing_options as options
from fastres.cli.batches import Batches, Items, calibrating, count_images
from fastres.cli.testing_options import CALIBRATED, MODEL, WEIGHTS
from fastres.evaluate import Result, Views, evaluate, require_metrics
from fastres.images import ClassFolders
from fastres.pretrained import TrainedNets
from fastres.train.data import DATA, Resident, hearing_workers, load
from fastres.train.process import place
from fastres.train.recipe import RECIPES
from fastres.weights import Weights

_NAMED = {name: meaning for name, meaning in DATA.items() if name not in ("imagenet", "folder")}
_NOT_AS_EXPECTED = 3  # exit status, a key of main.EXIT_STATUSES
_VALIDATION_IMAGES = 50_000  # of ImageNet
_MARGIN = 0.1  # percentage points that resizing, batch size and dtype may change an accuracy by


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
examples:
  python -m fastres eval --checkpoint out/digits/best.pt
  python -m fastres eval --checkpoint best.pt --data DIR --crops 10 --csv classes.csv
  python -m fastres eval --checkpoint ResNet50_Weights.IMAGENET1K_V2 --model resnet50 --data DIR --optimize"""
    named = "; ".join(f"{name}: {meaning}" for name, meaning in _NAMED.items())
    data_help = (
        f"a folder, [val/]<class>/<image>, or {named} (default: the checkpoint's data, unless that is photographs)"
    )
    parser.add_argument("--data", help=data_help)
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder where torchvision stores CIFAR (default: none; only CIFAR needs it)",
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, metavar="FILE", help=WEIGHTS)
    parser.add_argument("--model", nargs="+", metavar="NAME", help=MODEL)
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the accuracy of each class to this file (default: none)"
    )
    parser.add_argument(
        "--expect",
        choices=["published"],
        help="published: compare with the accuracy that torchvision publishes for its weights on ImageNet's validation "
        f"images; exit status {_NOT_AS_EXPECTED} if they differ (default: none)",
    )
    options.add_testing(parser)


@hearing_workers()
def run(args: argparse.Namespace) -> int:
    """Print top-1 and top-5 accuracy; return the exit status.

    It is 1 if images could not be read, else 3 if the accuracy isn't the expected one, else 0. Under torchrun every
    process tests a share of the images, and rank 0 prints.

    Raises ValueError for arguments that can't be used together or on this machine, and if weights and data differ in
    the names or order of their classes (if both have names).
    """
    options.check(args)
    try:
        require_metrics()
    except ImportError as error:
        raise ValueError(str(error)) from error
    with place(args.device) as here:
        options.require_served(args, here)
        nets = options.load_nets(args, args.checkpoint, here.device, args.data)
        name = args.data or _trained_on(nets)
        images = _test_images(args, name, nets)
        for weights in nets.weights:
            _require_same_classes(args, weights, name, images.classes)
        views = nets.views(args.crops, args.size, args.resize, args.scales, flip=not args.no_flip)
        published = {} if args.expect is None else _published(nets, name, images, views)
        if here.rank == 0:
            options.note_views(nets, views)
        calibration = calibrating(args, images.training or (images.items, "images tested"), nets, views)
        preprocess = images.preprocess or _mean_image(args, name, nets)
        how = options.running(args, here.device)
        predictor = nets.predictor(views, preprocess, calibration=calibration, **how)
        batches = Batches(images.share(here.rank, here.world), args, nets, views)
        result = evaluate(predictor, batches, len(images.classes), here.device)
        compared, agrees = _compared(result, published)
        if here.rank == 0:
            for taken in nets.taken:
                print(f"weights: {taken}")
            where = name if args.data else f"{name}, as the checkpoint says"
            print(f"{nets.title} in {options.dtype_name(args, here.device)}, {_described(views)}, on {where}")
            if calibration is not None:
                print(calibration.said)
            print(result)
            for line in compared:
                print(line)
            if args.csv is not None:
                result.write_csv(args.csv, images.classes)
        failed = batches.report() or (0 if calibration is None else calibration.report())
        return failed or (0 if agrees else _NOT_AS_EXPECTED)


def _trained_on(nets: TrainedNets) -> str:
    """Return the name of the data set that all checkpoints were trained on.

    Raises ValueError if they don't agree on one, or if it is photographs, whose folder isn't known.
    """
    names = {each.source: each.meta.get("data") for each in nets.weights}
    if len(set(names.values())) == 1 and (name := next(iter(names.values()))) in _NAMED:
        return str(name)
    why = "; ".join(f"{source} says {name or 'nothing'}" for source, name in names.items())
    raise ValueError(f"--data is needed ({why}): a folder, [val/]<class>/<image>, or {', '.join(_NAMED)}")


def _require_same_classes(args: argparse.Namespace, weights: Weights, name: str, classes: Sequence[str]) -> None:
    """Raise ValueError unless class i is the same class in the weights and in the data set `name`.

    The numbers of classes must always be equal. Unless --ignore-class-names is given, two more things are checked. If
    the weights have class names, these must equal the data's, except for synthetic images, which show nothing. If they
    have none, and the data's folders are named by numbers, the folders must be in numerical order: otherwise class i of
    the weights could also be meant to be the folder named i.
    """
    names, sides = weights.names, ("the net", "the data")
    differing = None if names is None or name == "synthetic" else difference(names, classes, sides)
    order = None if name in _NAMED else out_of_order(classes)
    if weights.classes != len(classes):
        raise ValueError(
            f"{weights.source} contains a net with {weights.classes} classes, but the data {name} has {len(classes)}"
            + (f": {differing}" if differing else "")
        )
    if args.ignore_class_names:
        return
    if differing is not None:
        why = "; ".join(part for part in (differing, order) if part)
        raise ValueError(f"{weights.source} and the data {name} have different classes: {why}. {IGNORE}")
    if names is None and order is not None:
        raise ValueError(f"{weights.source} doesn't name its classes, and {name}'s {order}. {IGNORE}")


def _described(views: Views) -> str:
    if views.crops == "multiscale":
        flips = ", with mirror images" if views.flip else ""
        return f"fully convolutional at {', '.join(map(str, views.scales))}{flips}"
    return f"{views.crops} crop{'s' * (views.crops == '10')} of {views.size}, shorter side {views.resize}"


def _published(nets: TrainedNets, name: str, images: _TestImages, views: Views) -> dict[int, float]:
    """Return k -> published top-k accuracy in percent, for k = 1 and, if known, 5.

    Raises ValueError for an ensemble, if none is published for the weights, and if `images` or `views` are not those
    that it was measured with.
    """
    weights = nets.weights[0]
    if len(nets.weights) > 1:
        raise ValueError("--expect published requires a single net: no accuracy is published for an ensemble")
    if 1 not in weights.published:
        raise ValueError(
            f"--expect published: no accuracy is published for {weights.source}. Name weights of torchvision, as in "
            f"--checkpoint ResNet50_Weights.IMAGENET1K_V2; their file may be in {torch.hub.get_dir()}/checkpoints"
        )
    imagenet = tuple(images.classes) == IMAGENET or are_imagenet_ids(images.classes)
    if name in _NAMED or not imagenet or count_images(images.items) > _VALIDATION_IMAGES:
        raise ValueError(
            f"--expect published: the accuracy of {weights.source} was measured on ImageNet's {_VALIDATION_IMAGES:,} "
            f"validation images in 1000 classes, and the data must be these or some of them; {name} has "
            f"{count_images(images.items):,} images of {len(images.classes):,} classes"
        )
    preset = weights.preset
    if not preset or (views.crops, views.size, views.resize) != ("center", preset["size"], preset["resize"]):
        usual = _described(Views("center", preset["size"], preset["resize"])) if preset else "unknown views"
        raise ValueError(
            f"--expect published: the accuracy of {weights.source} was measured with {usual}, not with "
            f"{_described(views)}; leave out --crops, --size, --resize and --recipe"
        )
    return weights.published


def _compared(result: Result, published: dict[int, float]) -> tuple[list[str], bool]:
    """Return one line for each accuracy that compares it with the published one, and whether all of them agree.

    They agree if they differ by at most `_MARGIN`. If only n of the N validation images were tested, the margin grows
    by three standard errors of a random sample without replacement.
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


@dataclass(frozen=True)
class _TestImages:
    """The images to test on, with their class names.

    items: paths with labels, or (images uint8 [N, C, H, W], labels [N]). preprocess: the data set's normalisation, None
    if it doesn't have one. training: the training images, for calibration, and their description; None if there are
    none or they aren't needed.
    """

    items: Items
    classes: Sequence[str]
    preprocess: nn.Module | None
    training: tuple[Items, str] | None

    def share(self, rank: int, world: int) -> Items:
        """Return the share of process `rank` of `world`; the shares differ by at most one image in size."""
        if isinstance(self.items, tuple):
            return self.items[0][rank::world], self.items[1][rank::world]
        return self.items[rank::world]


def _test_images(args: argparse.Namespace, name: str, nets: TrainedNets) -> _TestImages:
    """Load the data set `name`, or list the folder `name`. Raises ValueError if it is neither."""
    if name in _NAMED:
        recipe = nets.recipe or RECIPES["imagenet-modern"]
        dataset = load(name, recipe, args.root)
        assert isinstance(dataset.train, Resident)
        assert isinstance(dataset.val, Resident)
        train, test = ((part.images, part.labels) for part in (dataset.train, dataset.val))
        return _TestImages(test, dataset.classes, dataset.preprocess, (train, f"training images of {name}"))
    root = Path(name)
    if not root.is_dir():
        raise ValueError(f"--data {root} is neither an existing folder nor one of {', '.join(_NAMED)}")
    place = root / "val" if (root / "val").is_dir() else root
    items, classes = _image_folder(place, "to test on")
    training = None
    if args.dtype in CALIBRATED and args.calibration is None and place != root and (root / "train").is_dir():
        training = _image_folder(root / "train", "to calibrate with")[0], f"training images in {root / 'train'}"
    return _TestImages(items, classes, None, training)


def _image_folder(place: Path, what_for: str) -> tuple[list[tuple[str, int]], list[str]]:
    try:
        files = ClassFolders(str(place))
    except OSError as error:
        raise ValueError(f"{place} has no classes {what_for}: {error}") from error
    return files.samples, files.classes


def _mean_image(args: argparse.Namespace, name: str, nets: TrainedNets) -> nn.Module | None:
    """Return a `Preprocess` with the mean image of the folder's training images, or None.

    It is computed only if the data are a folder that has train/, the recipe subtracts a mean image, and some weights
    don't contain their normalisation. `name`: the data set or folder.
    """
    pixel = nets.recipe is not None and nets.recipe.normalise == "pixel"
    if (
        name in _NAMED
        or not pixel
        or not (Path(name) / "train").is_dir()
        or all(each.preprocess for each in nets.weights)
    ):
        return None
    assert nets.recipe is not None
    return load("folder", nets.recipe, Path(name), workers=args.workers).preprocess
