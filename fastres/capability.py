"""Minimum CUDA compute capabilities of the kernels and of their optional features."""

LEAST = (8, 0)  # all kernels: they use bfloat16 and asynchronous copies
FLOAT8 = (8, 9)  # matrix products in float8
TMA = (9, 0)  # the tensor memory accelerator and wgmma


def spelt(capability: tuple[int, int]) -> str:
    """Return (8, 0) as "8.0"."""
    return "{}.{}".format(*capability)
