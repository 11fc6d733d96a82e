"""The version, in one place: setup.py, results and checkpoints read it here."""

__version__ = "0.1.0"
