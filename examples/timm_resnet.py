"""Use a ResNet of timm with fastres: `convert` for training, `optimize` for inference.

    python examples/timm_resnet.py
    python examples/timm_resnet.py --model seresnet50   # blocks with attention stay timm's

The script builds the net without pretrained weights, converts its blocks in place, optimizes it, and compares the
scores with those of an unconverted copy. Then it lists which blocks of timm's variants can be converted.
"""

import argparse
import copy
import signal
import sys

import torch

import fastres

try:
    import timm
except ImportError:
    sys.exit("timm_resnet.py needs timm: pip install timm")

VARIANTS = ("resnet18", "resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2", "resnetaa50", "seresnet50")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet26", metavar="NAME", help="one of timm's nets (default: resnet26)")
    parser.add_argument("--size", type=int, default=160, help="side of the images (default: 160)")
    options = parser.parse_args()
    if not timm.is_model(options.model):
        parser.error(f"--model {options.model}: timm has no such net; timm.list_models('*resnet*') names its ResNets")
    if options.size < 32:
        parser.error("--size must be at least 32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    theirs = timm.create_model(options.model, pretrained=False, num_classes=10)
    theirs.to(device, memory_format=torch.channels_last).eval()
    ours = copy.deepcopy(theirs)
    print(f"{options.model}, {fastres.convert(ours)}")
    images = torch.rand(4, 3, options.size, options.size, device=device).contiguous(memory_format=torch.channels_last)
    try:
        fast = fastres.optimize(ours, images)
    except ValueError as error:
        parser.error(f"--model {options.model}: {error}")
    with torch.inference_mode():
        expected = theirs(images)
        for label, net in {"convert": ours, "optimize": fast}.items():
            error = float((net(images) - expected).abs().max() / expected.abs().max())
            print(f"{label}: scores differ from timm's by {error:.1e} of the largest score")
            assert error < (1e-4 if device.type == "cpu" else 1e-2)  # float32 on a GPU is rounded to TF32
    print(fast.explain().splitlines()[0])

    print("\nBlocks and stems that are converted, by variant")
    for name in VARIANTS:
        with torch.device("meta"):
            net = timm.create_model(name, pretrained=False)
        done = fastres.convert(net)
        reasons = ": " + "; ".join(sorted(set(done.kept.values()))) if done.kept else ""
        print(f"  {name:16} {len(done.converted):2} converted, {len(done.kept):2} stay timm's{reasons}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
