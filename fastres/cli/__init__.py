"""The commands of `python -m fastres`: a file each, of which `main` loads the one that is called."""
