"""What travels beside the hidden states through every block."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Context:
    """Facts about the tokens of one call.

    seq_idx_BL: int32; -1 is padding, a change of value starts another packed sample. None: one sequence a row.
    A state that is given continues the sample of the row's first real token, whatever its value: packed rows are cut
    within a sample, never between two.
    positions_BL: int64, counted from 0 in each sequence; None: start, start + 1, ... (only the log-length scale
    of attention reads positions). start: tokens already in the state.
    grounding_G4: int64 rows of (row, query position, first key, end key): training aid, see nn/attention.py.
    losses: extra losses that layers report, summed by name; None once they were taken.
    """

    seq_idx_BL: Tensor | None = None
    positions_BL: Tensor | None = None
    start: int = 0
    grounding_G4: Tensor | None = None
    losses: dict[str, Tensor] | None = field(default_factory=dict)

    def to(self, device: torch.device) -> Context:
        """The same for layers on another device, without gradients: what layers report stays where it is."""
        return replace(
            self,
            seq_idx_BL=None if self.seq_idx_BL is None else self.seq_idx_BL.to(device),
            positions_BL=None if self.positions_BL is None else self.positions_BL.to(device),
        )

    def report(self, name: str, value: Tensor) -> None:
        if self.losses is not None:
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def close(self) -> dict[str, Tensor]:
        """What was reported. Layers that gradient checkpointing runs again report to nobody: kept, what they report
        would keep their activations."""
        losses, self.losses = self.losses or {}, None
        return losses
