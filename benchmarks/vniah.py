"""V-NIAH: one needle among N pictures, at every depth, by default with nano and the built-in picture world.

    python benchmarks/vniah.py --images 1000
    python benchmarks/vniah.py --images 100,250,500 --depths 0.25,0.75 --needles 5 --tokens-per-image 144
    python benchmarks/vniah.py --images 600 --haystack film.mp4

The same as `longllava eval vniah`. What it measures: longllava/evals/vniah.py.
"""

import _environment  # noqa: F401

import typer

from longllava.cli import run
from longllava.cli.evaluate import vniah

if __name__ == "__main__":
    run(lambda: typer.run(vniah), "vniah")
