"""Triton kernels. They know torch, triton and `fastres.paths` only; `fastres.ops` calls them."""
