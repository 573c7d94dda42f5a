"""Show what fastres fuses on this machine, and how much time and memory that saves.

    python examples/first_look.py
    python examples/first_look.py --depth 18 --batch 8

The script prints which blocks of a ResNet run fused, the steps of the net after `fastres.optimize`, the memory that a
training step saves for its backward pass, and the measured time of inference, compared with eager PyTorch.
"""

import argparse
import operator
import re
import signal
import time
from collections import Counter
from statistics import median, quantiles

import torch
import torch.fx
import torchvision
from torch import nn

import fastres


def kept_by_autograd(net, images):
    """Return the bytes that autograd saves for the backward pass, without the weights."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage(), t), lambda t: t):
        net(images)
    weights = {parameter.untyped_storage() for parameter in net.parameters()}
    return sum(storage.nbytes() for storage in kept.keys() - weights)


def kept_when_fused(net, images):
    """Return the bytes that the fused blocks would save, computed from shapes, for machines without a GPU.

    The fused blocks save the images, the output of every convolution and block, the output of the max pool and one byte
    per value of it. This ignores some vectors per BatchNorm (0.3 %).
    """
    kept = [images.nbytes]
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, fastres.BasicBlock, fastres.Bottleneck)):
            module.register_forward_hook(lambda _module, _inputs, y: kept.append(y.nbytes))
    net.maxpool.register_forward_hook(lambda _module, _inputs, y: kept.append(y.nbytes + y.numel()))
    net(images)
    return sum(kept)


def passes(step):
    """Return how many memory-bound operations a line of `explain` has: BatchNorm, ReLU or addition in a separate
    kernel.

    After a convolution of PyTorch or cuDNN, each operation after a " + " is a separate kernel. With "cudnn + triton",
    one Triton kernel runs all of them.
    """
    _, _, what, _, engine, *_ = re.split(" {2,}", step.strip())
    alone = what in ("BatchNorm2d", "ReLU", "relu", "relu_", "add")
    return alone + {"aten": what.count(" + "), "cudnn": what.count(" + "), "cudnn + triton": 1}.get(engine, 0)


def seconds(net, images):
    begin = time.perf_counter()
    with torch.inference_mode():
        net(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=[18, 34, 50, 101, 152], default=50, help="layers (default: 50)")
    parser.add_argument("--batch", type=int, default=4, help="images in a timed call (default: 4)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (default: 224)")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each net (default: 10)")
    options = parser.parse_args()
    if options.batch < 1 or options.size < 64 or options.rounds < 4:
        parser.error("--batch must be at least 1, --size 64, --rounds 4")
    name, shape = f"resnet{options.depth}", (options.batch, 3, options.size, options.size)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def built(models, device, dtype):
        """Return a net and images. On the device "meta" they have no data: a forward takes almost no time or memory."""
        with torch.device(device):
            net, images = getattr(models, name)(), torch.rand(shape)
        return [each.to(dtype, memory_format=torch.channels_last) for each in (net, images)]

    ours, images = built(fastres, device, dtype)
    theirs, _ = built(torchvision.models, device, dtype)
    theirs.load_state_dict(ours.state_dict())

    status = fastres.status(ours)
    print(f"THIS MACHINE\n  GPU: {status.gpu}\n  optimize: {status.optimize}")
    for path, blocks in Counter(status.blocks.values()).items():
        print(f"  {blocks} of {len(status.blocks)} blocks and stems of {name}: {path}")

    fast = fastres.optimize(ours.eval(), images)
    _, *steps = fast.explain().splitlines()
    nodes = torch.fx.symbolic_trace(theirs.eval()).graph.nodes
    calls = Counter(type(theirs.get_submodule(n.target)) if n.op == "call_module" else n.target for n in nodes)
    norms, relus, adds = (calls[each] for each in (nn.BatchNorm2d, nn.ReLU, operator.add))
    print(f"\nINFERENCE, {len(steps) - 1} steps after fastres.optimize; the first of them:")
    print("\n".join(f"  {step}" for step in steps[:7]))
    print(f"  Memory-bound operations between the {calls[nn.Conv2d]} convolutions:")
    print(f"    eager PyTorch: {norms + relus + adds} ({norms} BatchNorms, {relus} ReLUs, {adds} additions)")
    print(f"    fastres.optimize: {sum(map(passes, steps[1:]))}")

    eager = kept_by_autograd(*built(torchvision.models, "meta", torch.bfloat16))
    if device == "cuda":
        fused, how = kept_by_autograd(*built(fastres, device, torch.bfloat16)), "counted in a forward on this GPU"
    else:
        fused, how = kept_when_fused(*built(fastres, "meta", torch.bfloat16)), "computed from shapes; needs a GPU"
    print(f"\nTRAINING, saved for the backward pass, bf16, {list(shape)}\n  eager PyTorch: {eager / 2**20:.1f} MiB")
    print(f"  fused: {fused / 2**20:.1f} MiB, {fused / eager:.2f} x ({how})")

    nets = {"eager PyTorch": theirs, "fastres.optimize": fast}
    spent = [{label: seconds(net, images) for label, net in nets.items()} for _ in range(options.rounds + 3)][3:]
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"\nSPEED of inference, {dtype}, {list(shape)}, on {where}, medians of {options.rounds} calls in turn")
    for label in nets:
        print(f"  {label}: {1000 * median(each[label] for each in spent):.1f} ms")
    low, middle, high = quantiles((each["eager PyTorch"] / each["fastres.optimize"] for each in spent), n=4)
    if high > 1.5 * low:
        print("  NOISY: another program uses this machine; don't trust the next line, and try again when it is idle")
    print(f"  fastres.optimize is {middle:.2f} x as fast (median of the ratios; middle half: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
