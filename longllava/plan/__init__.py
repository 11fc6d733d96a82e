"""What a model and a prompt take, before anything is allocated: tokens, bytes, operations, and whether they fit."""

from longllava.plan.need import Need, check_fits, prompt_need
from longllava.plan.operations import Operations, operations

__all__ = ["Need", "Operations", "check_fits", "operations", "prompt_need"]
