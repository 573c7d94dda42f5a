"""Fused operations: their meaning (`reference`), the calls (`conv_bn_act`, `shortcut`), the choice (`dispatch`).

All are operators too (`registered`, `shortcut`), which exist from the import on.
"""

from fastres.ops import registered as registered
