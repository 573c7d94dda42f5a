"""Fine-tune a ResNet on a folder of images.

    python examples/finetune.py                                          # on synthetic photographs, to try it
    python examples/finetune.py --data DIR --weights FILE --freeze       # train the new classifier only
    python examples/finetune.py --data DIR --depth 50 --weights ResNet50_Weights.IMAGENET1K_V2 --size 224 --epochs 10
    python -m fastres eval --checkpoint out/finetune/best.pt --data DIR  # then

DIR holds train/<class>/<image> and val/<class>/<image>. The weights are a state_dict of torchvision's net, a checkpoint
of fastres, or a name of torchvision's, which is downloaded; their classifier is replaced by a new one. best.pt holds
the weights of the best epoch, the names of the classes and how images are prepared: `python -m fastres eval` and
`predict` need no other option.
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
from fastres.images import read_image
from fastres.train.checkpoint import CheckpointError, prepare, write_atomically
from fastres.train.data import by_channel


def photographs(folder, side=160):
    """Writes train/ and val/ with stripes, rings and checks of random size, colour and noise: 96 and 30 JPEGs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    for part, count in (("train", 32), ("val", 10)):
        for name in ("checks", "rings", "stripes"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                f, a, b = rng.uniform((15, 0.2, 0.2), (40, 0.8, 0.8))
                wave = {"checks": np.sin(f * x) * np.sin(f * y), "rings": np.sin(f * np.hypot(x - a, y - b))}
                shape = wave.get(name, np.sin(f * (a * x + b * y)))[..., None] * rng.uniform(40, 90, 3)
                pixels = np.clip(128 + shape + rng.normal(0, 15, shape.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")


def net(options, classes):
    """The net with a new classifier, and how its weights want images: a module from uint8 to what the net reads."""
    name = f"resnet{options.depth}"
    if options.weights is None:
        return getattr(fastres, name)(num_classes=classes), by_channel()
    known = weights.read(options.weights, name)
    model = getattr(fastres, name)(num_classes=known.classes or 1000)
    weights.load_into(model, known, name)
    model.fc = nn.Linear(model.fc.in_features, classes)
    before = by_channel()
    if known.preprocess:
        before.mean, before.std = (known.preprocess[key].float() for key in ("mean", "std"))
    return model.requires_grad_(not options.freeze), before


def folders(options, resize):
    """The training and the validation images, as uint8 [3, size, size]. Raises ValueError where there are none."""
    augment = [v2.RandomResizedCrop(options.size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    centre = [v2.PILToTensor(), v2.Resize(resize), v2.CenterCrop(options.size)]  # as `python -m fastres eval` does
    try:
        train, val = (
            ImageFolder(options.data / part, v2.Compose(steps), loader=read_image)
            for part, steps in (("train", augment), ("val", centre))
        )
    except OSError as error:
        raise ValueError(f"--data {options.data}: {error}; expected are train/<class>/ and val/<class>/") from error
    if train.classes != val.classes:
        raise ValueError(f"--data {options.data}: train/ has the classes {train.classes}, val/ has {val.classes}")
    return train, val


def run(options):
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare(options.out)
    if options.data is None:
        options.data = options.out / "photographs"
        photographs(options.data)
        print(f"no --data: made synthetic photographs in {options.data}")
    resize = round(options.size * 256 / 224)
    train, val = folders(options, resize)
    model, before = net(options, len(train.classes))
    model.fc.requires_grad_(True)
    model, before = model.to(device, memory_format=torch.channels_last), before.to(device)
    how = {"num_workers": options.workers, "pin_memory": device.type == "cuda"}
    batches = DataLoader(train, options.batch, shuffle=True, drop_last=len(train) > options.batch, **how)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, options.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.epochs * len(batches))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    best = -1.0
    for epoch in range(options.epochs):
        model.train(not options.freeze)  # frozen BatchNorms keep their statistics, too
        losses = []
        for images, labels in batches:
            with autocast:
                loss = F.cross_entropy(model(before(images.to(device))), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        model.eval()
        right = 0
        with torch.inference_mode(), autocast:
            for images, labels in DataLoader(val, options.batch, **how):
                right += int((model(before(images.to(device))).argmax(1) == labels.to(device)).sum())
        mean, accuracy = float(torch.stack(losses).mean()), right / len(val)
        if not np.isfinite(mean):
            raise ValueError(f"the loss is {mean} at --lr {options.lr}: choose a smaller one")
        written = ""
        if accuracy >= best:
            best, written = accuracy, f" (written to {options.out / 'best.pt'})"
            about = {"family": "torchvision", "depth": options.depth, "classes": train.classes, "data": "folder"}
            about |= {"size": options.size, "val_size": options.size, "resize": resize}
            preprocess = {"mean": before.mean.cpu(), "std": before.std.cpu()}
            torch.save({"model": model.state_dict(), "meta": about, "preprocess": preprocess}, file := io.BytesIO())
            write_atomically(options.out / "best.pt", file.getvalue())
        print(f"epoch {epoch + 1} of {options.epochs}: loss {mean:.4f}, validation {accuracy:.2%}{written}", flush=True)
    print(f"best epoch: {best:.2%}; test it, or use it:")
    print(f"  python -m fastres eval --checkpoint {options.out / 'best.pt'} --data {options.data}")
    print(f"  python -m fastres predict {options.data / 'val'} --weights {options.out / 'best.pt'} --top 1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="train/ and val/ (default: synthetic photographs)")
    parser.add_argument("--depth", type=int, choices=[18, 34, 50, 101, 152], default=18, help="layers (default: 18)")
    parser.add_argument("--weights", metavar="FILE_OR_NAME", help="what to start from (default: random weights)")
    parser.add_argument("--freeze", action="store_true", help="train the classifier only (default: all of the net)")
    parser.add_argument("--size", type=int, default=96, help="side of the crops (default: 96)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--lr", type=float, default=0.01, help="highest learning rate (default: 0.01)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="where to write (default: out/finetune)")
    options = parser.parse_args()
    if options.epochs < 1 or options.batch < 2 or options.size < 32 or options.workers < 0 or not options.lr > 0:
        parser.error("--epochs starts at 1, --batch at 2, --size at 32, --workers at 0, and --lr is positive")
    if options.freeze and options.weights is None:
        parser.error("--freeze needs --weights: features of random weights are of no use")
    try:
        run(options)
    except (ValueError, CheckpointError) as error:
        parser.error(str(error).splitlines()[-1])
    except KeyboardInterrupt:
        print("\nfinetune.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
