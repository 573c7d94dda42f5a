"""`fastres.paper`: the 2015 paper's nets, see `fastres.models.paper`."""

from fastres.models.paper import *  # noqa: F403
from fastres.models.paper import __all__ as __all__
