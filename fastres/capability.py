"""The compute capabilities of GPUs that decide what runs."""

LEAST = (8, 0)  # of the kernels: bfloat16, asynchronous copies
FLOAT8 = (8, 9)  # of their products in float8
TMA = (9, 0)  # of the tensor memory accelerator, and of wgmma


def spelt(capability: tuple[int, int]) -> str:
    """(8, 0) as "8.0"."""
    return "{}.{}".format(*capability)
