"""Entry point of `python -m fastres`."""

import sys

from fastres.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
