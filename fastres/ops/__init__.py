"""Fused operations: their meaning (`reference`), the calls (`conv_bn_act`, `shortcut`), the choice (`dispatch`)."""
