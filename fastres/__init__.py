"""fastres: ResNets on fused Triton kernels.

`from fastres import resnet50` replaces `from torchvision.models import resnet50`; the rest of a program stays the same.
"""

from fastres.compile import explain
from fastres.cuda_graph import graphed
from fastres.inference import optimize
from fastres.models import paper
from fastres.models.convert import convert, restore
from fastres.models.resnet import *  # noqa: F403
from fastres.models.resnet import __all__ as _builders
from fastres.ops.dispatch import backend
from fastres.report import status

__version__ = "0.1.0.dev0"
__all__ = [*_builders, "backend", "convert", "explain", "graphed", "optimize", "paper", "restore", "status"]
