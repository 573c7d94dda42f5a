"""The commands of `python -m fastres`, one module each. `main` imports only the one that is called."""
