"""Reading a prompt into a model's state, and answering from it."""

from longllava.generation.sampling import Sampling
from longllava.generation.session import Score, Session

__all__ = ["Sampling", "Score", "Session"]
