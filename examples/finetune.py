"""Fine-tune a ResNet on a folder of images.

    python examples/finetune.py                                          # on synthetic photographs, to try it out
    python examples/finetune.py --data DIR --weights FILE --freeze       # train only the new classifier
    python examples/finetune.py --data DIR --depth 50 --weights ResNet50_Weights.IMAGENET1K_V2 --size 224 --epochs 10
    python -m fastres eval --checkpoint out/finetune/best.pt --data DIR  # afterwards: test the net

DIR must contain train/<class>/<image> and val/<class>/<image>. The weights are a state dict of torchvision's net, a
checkpoint of fastres, or the name of torchvision weights, which are downloaded. A new classifier replaces theirs. The
script writes best.pt with the weights of the best epoch, the class names and the preprocessing, so that `python -m
fastres eval` and `predict` need no further options.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fastres
from fastres import weights
from fastres.evaluate import Predictor, Views
from fastres.images import read_image
from fastres.train.checkpoint import CheckpointError, prepare, write_atomically
from fastres.train.data import by_channel


def photographs(folder, side=160):
    """Write 96 JPEGs to train/ and 30 to val/: checks, rings and stripes of random size, colour and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for i in range(126):
        f, a, b = rng.uniform((15, 0.2, 0.2), (40, 0.8, 0.8))
        waves = {"checks": np.sin(f * x) * np.sin(f * y), "rings": np.sin(f * np.hypot(x - a, y - b))}
        waves["stripes"] = np.sin(f * (a * x + b * y))
        name = list(waves)[i % 3]
        pixels = 128 + waves[name][..., None] * rng.uniform(40, 90, 3) + rng.normal(0, 15, (side, side, 3))
        path = folder / ("train" if i < 96 else "val") / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def folders(data, **steps):
    """Return the data sets in data/train and data/val, of uint8 images [3, size, size] and labels.

    Raises ValueError if a folder or its images are missing, or if the two folders have different classes.
    """
    try:
        train, val = (ImageFolder(data / part, v2.Compose(steps[part]), loader=read_image) for part in ("train", "val"))
    except OSError as error:
        raise ValueError(f"--data {data}: {error}; it must contain train/<class>/ and val/<class>/") from error
    if train.classes != val.classes:
        raise ValueError(f"--data {data}: train/ has the classes {train.classes}, val/ has {val.classes}")
    return train, val


def pretrained(source, name):
    """Return the net with the weights of `source`, and its preprocessing, which maps uint8 images to its input."""
    known, before = weights.read(source, name), by_channel()
    model = getattr(fastres, name)(num_classes=known.classes or 1000)
    weights.load_into(model, known, name)
    for key, value in known.preprocess.items():
        setattr(before, key, value.float())
    return model, before


def run(options):
    torch.manual_seed(0)
    prepare(options.out)
    if options.data is None:
        options.data = options.out / "photographs"
        photographs(options.data)
        print(f"no --data: made synthetic photographs in {options.data}")
    views = Views("center", options.size, round(options.size * 256 / 224))
    augment = [v2.RandomResizedCrop(options.size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    train, val = folders(options.data, train=augment, val=[v2.PILToTensor(), views.prepare])
    name = f"resnet{options.depth}"
    model, before = pretrained(options.weights, name) if options.weights else (getattr(fastres, name)(), by_channel())
    model.requires_grad_(not options.freeze)
    model.fc = nn.Linear(model.fc.in_features, len(train.classes))  # new, so trained even with --freeze
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", None)
    model, before = model.to(device, memory_format=torch.channels_last), before.to(device)
    batches = DataLoader(train, options.batch, True, num_workers=options.workers, drop_last=len(train) > options.batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, options.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.epochs * len(batches))
    best = -1.0
    for epoch in range(1, options.epochs + 1):
        model.train(not options.freeze)  # in eval mode, frozen BatchNorms keep their statistics
        total = 0.0
        for images, labels in batches:
            with torch.autocast(device, torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(before(images.to(device))), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.detach()
        if not (mean := float(total / len(batches))) < float("inf"):
            raise ValueError(f"the loss is {mean} with --lr {options.lr}: choose a smaller learning rate")
        predict = Predictor(model, views, before, dtype=dtype)
        tested = DataLoader(val, options.batch, num_workers=options.workers)
        accuracy = sum(int((predict(x).argmax(1).cpu() == labels).sum()) for x, labels in tested) / len(val)
        if accuracy >= best:
            best, meta = accuracy, {"family": "torchvision", "depth": options.depth, "classes": train.classes}
            meta |= {"data": "folder", "size": views.size, "val_size": views.size, "resize": views.resize}
            preprocess = {"mean": before.mean.cpu(), "std": before.std.cpu()}
            torch.save({"model": model.state_dict(), "meta": meta, "preprocess": preprocess}, file := io.BytesIO())
            write_atomically(options.out / "best.pt", file.getvalue())
        print(f"epoch {epoch} of {options.epochs}: loss {mean:.4f}, validation {accuracy:.2%}", flush=True)
    print(f"best epoch: {best:.2%}; to test or use the net:")
    print(f"  python -m fastres eval --checkpoint {options.out / 'best.pt'} --data {options.data}")
    print(f"  python -m fastres predict {options.data / 'val'} --weights {options.out / 'best.pt'} --top 1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="train/ and val/ (default: synthetic photographs)")
    parser.add_argument("--depth", type=int, choices=[18, 34, 50, 101, 152], default=18, help="layers (default: 18)")
    parser.add_argument("--weights", metavar="FILE_OR_NAME", help="weights to start from (default: random weights)")
    parser.add_argument("--freeze", action="store_true", help="train only the classifier (default: the whole net)")
    parser.add_argument("--size", type=int, default=96, help="side of the crops (default: 96)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--lr", type=float, default=0.01, help="highest learning rate (default: 0.01)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="where to write (default: out/finetune)")
    options = parser.parse_args()
    if options.epochs < 1 or options.batch < 2 or options.size < 32 or options.workers < 0 or not options.lr > 0:
        parser.error("--epochs is at least 1, --batch 2, --size 32, --workers 0, and --lr must be positive")
    if options.freeze and options.weights is None:
        parser.error("--freeze needs --weights: a frozen net with random weights has no useful features")
    try:
        run(options)
    except (ValueError, OSError, CheckpointError) as error:
        parser.error(str(error).splitlines()[-1])
    except KeyboardInterrupt:
        print("\nfinetune.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
