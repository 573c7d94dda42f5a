"""Triton kernels. They know torch and triton only; `fastres.ops` calls them."""
