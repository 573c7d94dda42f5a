"""C++ and CUDA sources of the option-A shortcut; `fastres.ops.extension` builds and loads them."""
