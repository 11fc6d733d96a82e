"""`python -m longllava` is the command line, as a launcher such as torchrun needs it."""

import sys

try:
    from longllava.cli import main
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing.name} is not installed for {sys.executable}: run `make setup` once and start with .venv/bin/python, "
        f"or run `pip install -e .` in the repository."
    )

main()
