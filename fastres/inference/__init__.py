"""`optimize`: a net for inference, traced to a plan (`plan`) whose steps are bound to engines (`program`)."""

from fastres.inference.optimized import Optimized, optimize

__all__ = ["Optimized", "optimize"]
