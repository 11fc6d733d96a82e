"""Work beside the current CUDA stream: an encoder that runs ahead of the language model."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Lane:
    """A second stream of a GPU. On other devices work is done where it is called.

    What `run` returns is safe to use on the current stream. Work begins after what the current stream was given
    before the lane was made, and waits for nothing that came later.
    """

    def __init__(self, device: torch.device):
        self.stream = side_stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        if self.stream is None:
            return work()
        with torch.cuda.stream(self.stream):
            result = work()
        current = torch.cuda.current_stream(result.device)
        current.wait_stream(self.stream)
        result.record_stream(current)
        return result


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: the allocator keeps each stream's memory apart, and another stream would start with none."""
    return torch.cuda.Stream(device)


class Throttle:
    """Keeps the host at most `ahead` marks in front of a GPU, so that what is queued takes constant memory."""

    def __init__(self, device: torch.device, ahead: int):
        self.device, self.ahead = device, ahead
        self.marks: deque[torch.cuda.Event] = deque()

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.current_stream(self.device).record_event())

    def wait(self) -> None:
        while len(self.marks) > self.ahead:
            self.marks.popleft().synchronize()


def uploaded(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape, stacked on the device. To a GPU the way leads through pinned memory, without waiting."""
    if device.type != "cuda" or tensors[0].device.type != "cpu":
        return torch.stack(list(tensors)).to(device)
    staged = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
    torch.stack(list(tensors), out=staged)
    return staged.to(device, non_blocking=True)
