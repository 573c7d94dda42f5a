"""Triton kernels. They know torch, triton and the ground only; `fastres.ops` calls them."""
