"""Import this first: a script started without the library's environment ends with one sentence."""

import importlib.util
import sys

for needed in ("torch", "longllava"):
    if importlib.util.find_spec(needed) is None:
        sys.exit(
            f"{needed} is not installed for {sys.executable or 'this Python'}: run `make setup` once and "
            f"start the script with .venv/bin/python, or run `pip install -e .` in the repository."
        )

import longllava  # noqa: F401  before torch: what it sets for torch's waiting threads is what users have
