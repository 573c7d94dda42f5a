"""Triton kernels and their launchers, called by `fastres.ops`.

They import torch, triton, `fastres.paths` and `fastres.capability` only.
"""
