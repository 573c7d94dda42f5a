"""What fastres fuses on this machine, and what that saves.

    python examples/first_look.py
    python examples/first_look.py --depth 18 --batch 8

Prints on which path the blocks of a ResNet run here, what `fastres.optimize` makes of the net, how much memory a
training step keeps for its backward pass, and the time of inference beside eager PyTorch, measured on this machine.
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
    """Bytes that the forward pass keeps for the backward pass, weights aside."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage(), t), lambda t: t):
        net(images)
    weights = {parameter.untyped_storage() for parameter in net.parameters()}
    return sum(storage.nbytes() for storage in kept.keys() - weights)


def kept_when_fused(net, images):
    """The same by the rule of the fused blocks, for machines without a GPU: the images, the output of each convolution
    and block, the pooled stem and a byte per value of it. The rule leaves out a few vectors per BatchNorm (0.3 %)."""
    kept = [images.nbytes]
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, fastres.BasicBlock, fastres.Bottleneck)):
            module.register_forward_hook(lambda _module, _inputs, y: kept.append(y.nbytes))
    net.maxpool.register_forward_hook(lambda _module, _inputs, y: kept.append(y.nbytes + y.numel()))
    net(images)
    return sum(kept)


def passes(step):
    """Those that only read and write activations, in a line of `explain`: the libraries alone add and clamp apart."""
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
        parser.error("--batch starts at 1, --size at 64, --rounds at 4")
    name, shape = f"resnet{options.depth}", (options.batch, 3, options.size, options.size)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def built(models, device, dtype):
        """Net and images. On the device "meta" they have shapes and no values: counting takes no time and no memory."""
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
    print(f"\nINFERENCE, {len(steps) - 1} steps after fastres.optimize; the first:")
    print("\n".join(f"  {step}" for step in steps[:7]))
    print(f"  Passes that only read and write activations, beside {calls[nn.Conv2d]} convolutions:")
    print(f"    eager PyTorch: {norms + relus + adds} ({norms} BatchNorms, {relus} ReLUs, {adds} additions)")
    print(f"    fastres.optimize: {sum(map(passes, steps[1:]))}")

    eager = kept_by_autograd(*built(torchvision.models, "meta", torch.bfloat16))
    if device == "cuda":
        fused, how = kept_by_autograd(*built(fastres, device, torch.bfloat16)), "counted as it ran here"
    else:
        fused, how = kept_when_fused(*built(fastres, "meta", torch.bfloat16)), "counted by shapes: it runs on GPUs only"
    print(f"\nTRAINING, kept for the backward pass, bf16, {list(shape)}\n  eager PyTorch: {eager / 2**20:.1f} MiB")
    print(f"  fused: {fused / 2**20:.1f} MiB, {fused / eager:.2f} x ({how})")

    nets = {"eager PyTorch": theirs, "fastres.optimize": fast}
    spent = [{label: seconds(net, images) for label, net in nets.items()} for _ in range(options.rounds + 3)][3:]
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"\nSPEED of inference, {dtype}, {list(shape)}, on {where}, medians of {options.rounds} calls in turn")
    for label in nets:
        print(f"  {label}: {1000 * median(each[label] for each in spent):.1f} ms")
    low, middle, high = quantiles((each["eager PyTorch"] / each["fastres.optimize"] for each in spent), n=4)
    if high > 1.5 * low:
        print("  NOISY: something else runs on this machine; do not trust the next line, try again when it is idle")
    print(f"  fastres.optimize is {middle:.2f} x as fast (median of the ratios; middle half: {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
