"""Convert torchvision's Faster R-CNN with `fastres.convert`.

    python examples/detector.py

The script converts the ResNet-50 inside the detector in place: its blocks, and the container that runs its stem and its
stages. Then it compares a training step and an inference with those of an unconverted copy. At the end it restores the
detector, whose pickle no longer needs fastres. The net has random weights, because nothing is downloaded.
"""

import argparse
import copy
import pickle
import signal
from collections import Counter

import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import fastres


def scenes(count, size):
    """Return images of noise, each with a bright box, and the targets: coordinates and labels of the boxes."""
    images, targets = [], []
    for i in range(count):
        image = torch.rand(3, size, size) / 2
        low, high = 10 + 5 * i, size // 2 + 5 * i
        image[:, low:high, low:high] += 0.5
        images.append(image)
        targets.append({"boxes": torch.tensor([[low, low, high, high]]).float(), "labels": torch.tensor([1])})
    return images, targets


def step(model, images, targets, autocast):
    """Run one training step. Return its losses by name, and the boxes and scores that the updated net finds."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(0)  # the detector samples its proposals at random
    with autocast:
        losses = model.train()(images, targets)
    sum(losses.values()).backward()
    optimizer.step()
    with torch.no_grad(), autocast:
        found = model.eval()(images)
    return {name: loss.item() for name, loss in losses.items()}, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="images per batch (default: 2)")
    parser.add_argument("--size", type=int, default=160, help="side of the images (default: 160)")
    options = parser.parse_args()
    if not 1 <= options.images <= 8 or options.size < 128:
        parser.error("--images must be from 1 to 8, and --size at least 128")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    torch.manual_seed(0)
    sizes = {"min_size": options.size, "max_size": options.size}
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2, box_score_thresh=0.0, **sizes)
    theirs.to(device, memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    conversion = fastres.convert(ours)
    print(conversion)
    print("  converted:", ", ".join(conversion.converted))
    for path, count in Counter(fastres.status(ours).blocks.values()).items():
        print(f"  {count} of them run {path}")

    images, targets = scenes(options.images, options.size)
    images = [image.to(device) for image in images]
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    (losses, found), (their_losses, their_found) = (step(net, images, targets, autocast) for net in (ours, theirs))
    for name, loss in losses.items():
        print(f"{name}: {loss:.6f} converted, {their_losses[name]:.6f} unconverted")
    print("boxes found:", [len(each["boxes"]) for each in found])
    if device.type == "cpu":
        assert losses == their_losses
        assert all(torch.equal(a[key], b[key]) for a, b in zip(found, their_found, strict=True) for key in a)
        print("same losses, same boxes and scores after the step")
    else:  # rounding errors in bf16 change which proposals are sampled
        assert abs(sum(losses.values()) / sum(their_losses.values()) - 1) < 0.1
        print("same sum of losses, within 10 %")

    print(fastres.restore(ours))
    assert b"fastres" not in pickle.dumps(ours)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
