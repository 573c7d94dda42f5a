"""`optimize` freezes a model for inference.

`trace` turns the model into a plan (a list of steps), `plan` fuses and quantises the steps, and `program` binds them to
engines for one input shape. `freeze` holds `optimize` itself, `optimized` the module that it returns.
"""

from fastres.inference.freeze import optimize
from fastres.inference.optimized import Optimized

__all__ = ["Optimized", "optimize"]
