"""Reading a prompt into a model's state, and answering from it."""

from longllava.generation.sampling import Sampling
from longllava.generation.scoring import Score
from longllava.generation.session import Session

__all__ = ["Sampling", "Score", "Session"]
