"""Fused operations. Start at `reference`, which says what each one means in plain PyTorch.

`block` has the calls that models make, `eligibility` says which of them may run fused, `dispatch` by what. Blocks and
option A's shortcut are operators, too (`operators`, `shortcut`), from the import on. docs/architecture.md is the map.
"""

from fastres.ops import operators as operators
