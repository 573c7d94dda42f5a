"""Fused operations. Start reading at `reference`, which defines each operation in plain PyTorch.

`block` has the functions that models call, `eligibility` decides whether a call may run fused, and `dispatch` chooses
the engine that computes it. Importing this package registers blocks and the option-A shortcut as PyTorch operators
(`operators`, `shortcut`). docs/architecture.md gives an overview.
"""

from fastres.ops import operators as operators
