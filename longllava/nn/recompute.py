"""Gradient checkpointing: a layer keeps only its input, here or in host memory, and runs again in the backward pass.

Chen et al. 2016 (arXiv:1604.06174). At 40,960 tokens of LongLLaVA-9B an input is 336 MB in bf16, a Mamba layer's
activations some 5 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Recomputing:
    """A stack of layers, each of which may keep its input alone for its backward pass; offload_activations: on the
    host."""

    gradient_checkpointing = False
    offload_activations = False


class Kept:
    """A layer's input from its forward pass to its backward pass. In between, `put_away` has it in host memory."""

    def __init__(self, x_BLD: Tensor):
        self.x_BLD: Tensor | None = x_BLD
        self.device, self.learns = x_BLD.device, x_BLD.requires_grad
        self.on_host: Tensor | None = None

    def take(self) -> Tensor:
        if self.x_BLD is not None:
            return self.x_BLD
        assert self.on_host is not None
        return self.on_host.to(self.device, non_blocking=True).requires_grad_(self.learns)

    def put_away(self) -> None:
        # pinned, so that the copy runs beside the next layer; both copies are on the stream that also reads and frees
        # the original, in this order
        assert self.x_BLD is not None
        self.on_host = torch.empty_like(self.x_BLD, device="cpu", pin_memory=self.device.type == "cuda")
        self.on_host.copy_(self.x_BLD.detach(), non_blocking=True)
        self.x_BLD = None


def recomputed(layer: Callable[[Tensor], Any], x_BLD: Tensor, offload: bool = False) -> Any:
    """layer(x_BLD), with activations made again in the backward pass. offload: x_BLD waits for it in host memory."""
    if not offload:
        return checkpoint(layer, x_BLD, use_reentrant=False)
    kept = Kept(x_BLD)
    there = x_BLD.new_empty(0)  # of the devices of its arguments the random state is restored, for dropout
    result = checkpoint(lambda _: layer(kept.take()), there, use_reentrant=False)
    kept.put_away()
    return result
