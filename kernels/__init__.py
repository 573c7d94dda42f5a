"""Triton kernels and their launchers, called by `fastres.ops`.

Besides the standard library and each other, these modules import only torch, triton, `fastres.paths` and
`fastres.capability`.
"""
