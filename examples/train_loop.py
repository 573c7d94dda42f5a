"""Train fastres's ResNet-18 in a plain PyTorch loop. Only the import differs from a loop with torchvision's net.

    python examples/train_loop.py                 # fastres's ResNet-18 on scikit-learn's digits
    python examples/train_loop.py --torchvision   # the same loop with torchvision's ResNet-18, to compare the losses

On a CPU both print the same losses, digit for digit. On a GPU the blocks run fused in bf16, and the losses agree up to
rounding errors.
"""

import argparse
import signal
import sys

import torch
import torch.nn.functional as F

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("train_loop.py needs scikit-learn: pip install scikit-learn")


def digits():
    """Return (images, labels) for training and for testing: 1,797 handwritten digits, of which every fifth is for
    tests.

    Images are fp32 [N, 3, 32, 32] in [-1, 1].
    """
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target).long()
    test = torch.arange(len(labels)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchvision", action="store_true", help="use torchvision's ResNet-18 instead of fastres's")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images (default: 3)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--lr", type=float, default=0.02, help="initial learning rate (default: 0.02)")
    options = parser.parse_args()
    if options.epochs < 1 or options.batch < 2 or not options.lr > 0:
        parser.error("--epochs must be at least 1, --batch 2, and --lr positive")

    if options.torchvision:
        from torchvision.models import resnet18
    else:
        from fastres import resnet18

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = resnet18(num_classes=10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    (images, labels), (test_images, test_labels) = [[part.to(device) for part in parts] for parts in digits()]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        batches = torch.randperm(len(labels)).to(device).split(options.batch)
        for batch in batches:
            x = images[batch].contiguous(memory_format=torch.channels_last)
            with autocast:
                loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        scheduler.step()
        model.eval()
        with torch.no_grad(), autocast:
            right = (model(test_images).argmax(1) == test_labels).float().mean()
        print(f"epoch {epoch + 1}: loss {total / len(batches):.6f}, test accuracy {right:.1%}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
