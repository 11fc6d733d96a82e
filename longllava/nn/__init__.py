"""The parts a backbone is made of: mixers, feed-forwards, norms, and the state they carry."""

from longllava.nn.block import Block
from longllava.nn.cache import (
    AttentionState,
    MambaState,
    State,
    StaticAttentionState,
    StaticMambaState,
    fork_state,
    join_states,
)
from longllava.nn.context import Context

__all__ = [
    "AttentionState",
    "Block",
    "Context",
    "MambaState",
    "State",
    "StaticAttentionState",
    "StaticMambaState",
    "fork_state",
    "join_states",
]
