"""`optimize` (`freeze`): a net for inference, traced (`trace`) to a `plan` that is bound to engines (`program`)."""

from fastres.inference.freeze import optimize
from fastres.inference.optimized import Optimized

__all__ = ["Optimized", "optimize"]
