"""C++ and CUDA sources of the option-A shortcut; `fastres.ops.shortcut` builds and loads them."""
