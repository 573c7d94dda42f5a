"""`python -m fastres predict`: print the most likely classes of images."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from fastres.cli import testing_options as options
from fastres.cli.batches import Batches, calibrating, named_images
from fastres.cli.testing_options import MODEL, WEIGHTS
from fastres.evaluate import Predictor
from fastres.pretrained import TrainedNets
from fastres.table import Table
from fastres.terminal import printable
from fastres.train.data import hearing_workers
from fastres.train.process import place


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
examples:
  python -m fastres predict photo.jpg --weights best.pt
  python -m fastres predict DIR --weights ResNet50_Weights.IMAGENET1K_V2 --model resnet50 --top 3 --csv out.csv"""
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMG_OR_FOLDER", help="image files, or folders of images"
    )
    parser.add_argument("--weights", action="extend", nargs="+", required=True, metavar="FILE", help=WEIGHTS)
    parser.add_argument("--model", action="append", metavar="NAME", help=MODEL)
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of classes to print per image (default: 5)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="file with one class name per line (default: the names in the weights)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the predictions to this file (default: none)")
    options.add_testing(parser)


@hearing_workers()
def run(args: argparse.Namespace) -> int:
    """Print the most likely classes of each image.

    Returns 1 if an image could not be read or got scores that aren't finite, or a folder could not be listed; else 0.
    Raises ValueError for arguments that can't be used.
    """
    options.check(args)
    if args.top < 1:
        raise ValueError(f"--top must be a whole number of at least 1: got {args.top}")
    weights, images = _weights_and_images(args)
    paths, unlisted = named_images(images)
    for reason in unlisted:
        print(reason, file=sys.stderr)
    with place(args.device) as here:
        options.require_served(args, here)
        nets = options.load_nets(args, weights, here.device)
        names = nets.classes if args.labels is None else _read_labels(args.labels, nets)
        views = nets.views(args.crops, args.size, args.resize, args.scales, flip=not args.no_flip)
        options.note_views(nets, views)
        for taken in nets.taken:
            print(f"note: weights: {taken}", file=sys.stderr)
        items = [(path, i) for i, path in enumerate(paths)]
        calibration = calibrating(args, (items, "images given"), nets, views)
        predictor = nets.predictor(views, calibration=calibration, **options.running(args, here.device))
        if calibration is not None:
            print(f"note: {calibration.said}", file=sys.stderr)
        batches = Batches(items, args, nets, views)
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


def _weights_and_images(args: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """Return the weights and the images.

    Arguments after --weights that are folders or have an image's suffix are images. Raises ValueError if there are no
    weights or no images.
    """
    after = [text for text in args.weights if Path(text).is_dir() or Path(text).suffix.lower() in IMG_EXTENSIONS]
    weights, images = [text for text in args.weights if text not in after], [*args.images, *map(Path, after)]
    if not weights:
        raise ValueError(f"--weights {' '.join(after)}: a file with weights is expected, not an image or a folder")
    if not images:
        raise ValueError("no images are given: python -m fastres predict IMG_OR_FOLDER ... --weights FILE ...")
    return weights, images


def _read_labels(file: Path, nets: TrainedNets) -> list[str]:
    """Return the class names in `file`, one per line.

    Raises ValueError if it can't be read, isn't UTF-8 text, or doesn't have one name for each class of the nets.
    """
    classes = nets.weights[0].classes or 0
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"--labels {file} can't be read: {error.strerror}") from error
    if "\0" in text:
        raise ValueError(f"--labels {file} can't be read: it is not text, or it is UTF-16; UTF-8 is accepted")
    names = text.split("\n")
    while names and not names[-1].strip():
        names.pop()
    empty = [line for line, name in enumerate(names, 1) if not name.strip()]
    if empty:
        raise ValueError(f"--labels {file}: line {empty[0]} is empty; each line must have a class name")
    if len(names) != classes:
        raise ValueError(f"--labels {file} names {len(names)} classes, but {nets.weights[0].source} has {classes}")
    return names


def _predictions(predictor: Predictor, batches: Batches, top: int) -> Iterator[tuple[int, list[float], list[int]]]:
    """Yield (index of the image, scores of its `top` most likely classes, indices of these classes)."""
    for images, places in batches:
        scores, classes = predictor(images).topk(top)
        yield from zip(places.tolist(), scores.tolist(), classes.tolist(), strict=True)
