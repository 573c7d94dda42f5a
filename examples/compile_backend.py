"""Compile a hand-written net with `torch.compile(backend="fastres")`, and show what `fastres.explain` reports.

    python examples/compile_backend.py
    python examples/compile_backend.py --rewrite never   # plain Inductor
    python examples/compile_backend.py --train           # with the backward pass

The backend replaces convolution, BatchNorm, addition and ReLU by fused operators and passes the rest to Inductor.
`explain` lists what is replaced and what is not, with the reasons. The script compares the scores (and the gradients)
with those of eager PyTorch. There are no fused kernels for CPUs, so by default nothing is replaced on a CPU; with
`--rewrite always` the operators call PyTorch's functions. Inductor needs a C++ compiler on a CPU; `--inner eager` does
not.
"""

import argparse
import copy
import signal

import torch
from torch import nn

import fastres

REWRITE = "when to use fused operators: auto (if kernels run on this device), always or never (default: auto)"
INNER = "the backend that compiles the rewritten graph (default: inductor)"


class Block(nn.Module):
    def __init__(self, channels, act):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """A hand-written net, not a known ResNet: a stem, a block with ReLU inside, a block with GELU, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Block(64, nn.ReLU()), Block(64, nn.GELU()))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.blocks(self.pool(self.stem(x))).mean((2, 3)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="in training mode, with gradients (default: inference)")
    parser.add_argument("--rewrite", choices=["auto", "always", "never"], default="auto", help=REWRITE)
    parser.add_argument("--inner", choices=["inductor", "aot_eager", "eager"], default="inductor", help=INNER)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Net().to(device, memory_format=torch.channels_last).train(options.train)
    images = torch.rand(4, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(options.train):
        print(fastres.explain(model, images))

        settings = {"fastres.rewrite": options.rewrite, "fastres.inner": options.inner}
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin, backend="fastres", options=settings)
        expected, scores = model(images), compiled(images)
    pairs = {"scores": (scores, expected)}
    if options.train:
        expected.square().sum().backward()
        scores.square().sum().backward()
        theirs, ours = ([p.grad.flatten() for p in net.parameters()] for net in (model, twin))
        pairs["gradients"] = (torch.cat(ours), torch.cat(theirs))
    for name, (got, expected) in pairs.items():
        error = float((got - expected).norm() / expected.norm())
        print(f"{name} of the compiled net differ from eager PyTorch's by {error:.1e}")
        assert error < (1e-4 if device.type == "cpu" else 1e-2)  # float32 on a GPU is rounded to TF32


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
