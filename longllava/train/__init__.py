"""Training in stages: each a YAML that says what trains, on what, from which stage, for how long."""

from longllava.train.stage import main

__all__ = ["main"]
