"""Decoding with states of static shapes: on a GPU one CUDA graph a step, sampling included, read with a delay.

Shapes: B rows, C places for new tokens, P segments of the prefix, V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from longllava.generation.prefill import Reader
from longllava.generation.sampling import Sampling, check_finite, drawn
from longllava.nn import Context, MambaState, State, StaticAttentionState, StaticMambaState
from longllava.nn.cache import AttentionState
from longllava.nn.mlp import MixtureOfExperts

PLACES = 512  # for new tokens at first, doubled when they are full: an answer's end is not known before
CAPTURING = threading.Lock()  # one answer's thread at a time: they share a device's stream for it
AHEAD = 4  # steps that a GPU is given before the oldest one's tokens are looked at


def is_static(reader: Reader, n_rows: int = 1) -> bool:
    """Whether so many answers are decoded here: on one GPU, unless a layer asks the host where its rows go."""
    if reader.model.backbone.layer_devices is not None or reader.device.type != "cuda":
        return False
    mixtures = [m for m in reader.model.modules() if isinstance(m, MixtureOfExperts)]
    return not any(m.experts.asks_host(n_rows * m.n_per_token) for m in mixtures)


def static_tokens(
    reader: Reader,
    hidden_BD: Tensor,
    state: State,
    next_B: Tensor,
    sampling: Sampling,
    generators: list[torch.Generator],
) -> Iterator[list[int]]:
    """Each row's next token, step after step, max_new_tokens times, whatever the tokens are.

    hidden_BD: of the last token read. next_B: the position of the first new token. The state is only read.
    Raises: LongLLaVAError when logits are not finite.
    """
    steps: Decoder | None = None
    waiting: deque[Result] = deque()
    for _ in range(sampling.max_new_tokens):
        with torch.inference_mode():  # inside the loop: between two tokens the caller's code runs
            if steps is None:
                steps = Decoder(reader, state, next_B, sampling, generators)
                steps.choose(hidden_BD)
            else:
                steps.advance()
            waiting.append(Result(steps.chosen_B))
        if len(waiting) > (AHEAD if reader.device.type == "cuda" else 0):
            yield check_finite(waiting.popleft().tokens())
    while waiting:
        yield check_finite(waiting.popleft().tokens())


class Decoder:
    """Buffers of one decoding, and the step that moves all rows on by one token."""

    def __init__(
        self, reader: Reader, state: State, next_B: Tensor, sampling: Sampling, generators: list[torch.Generator]
    ):
        self.reader, self.sampling, self.generators = reader, sampling, generators
        device, rows = reader.device, len(next_B)
        self.position_B = next_B.to(device, torch.int64, copy=True)
        self.token_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.chosen_B = torch.zeros_like(self.token_B)  # what the host reads: NOT_FINITE where no token can be chosen
        self.at_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.drawn_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.n_places, self.n_taken = 0, 0
        self.seen_1C = torch.zeros(1, 0, dtype=torch.int32, device=device)
        self.uniform_CB = torch.zeros(0, rows, dtype=torch.float64, device=device)
        self.state: State = [self.static(layer, rows) for layer in state]
        self.grow()

    def static(self, layer: object, rows: int) -> StaticMambaState | StaticAttentionState:
        if isinstance(layer, MambaState):
            return StaticMambaState(*(part.clone(memory_format=torch.contiguous_format) for part in layer))
        assert isinstance(layer, AttentionState)
        prefix = tuple(segment for segment in layer.segments() if segment.keys_BSGK.shape[1])
        keys_B0GK = layer.buffer.keys_BSGK[:, :0].to(self.reader.dtype)  # int8 is for what is read, not for an answer
        return StaticAttentionState(prefix, keys_B0GK, keys_B0GK, self.seen_1C.expand(rows, -1), self.at_1)

    def grow(self) -> None:
        """More places; tokens stay where they are. What was captured is captured again."""
        more = min(max(PLACES, self.n_places), self.sampling.max_new_tokens - self.n_places)
        rows, device = len(self.token_B), self.reader.device

        def longer(x: Tensor, axis: int, fill: float) -> Tensor:
            shape = list(x.shape)
            shape[axis] = more
            return torch.cat([x, x.new_full(shape, fill)], axis)

        self.n_places += more
        self.seen_1C = longer(self.seen_1C, 1, -1)
        if self.sampling.temperature:  # a row's draws are those it would make alone, one a token
            draws = [torch.rand(more, generator=g, dtype=torch.float64) for g in self.generators]
            self.uniform_CB = torch.cat([self.uniform_CB, torch.stack(draws, 1).to(device)])
        self.state = [
            StaticAttentionState(
                layer.prefix, longer(layer.keys_BCGK, 1, 0), longer(layer.values_BCGK, 1, 0),
                self.seen_1C.expand(rows, -1), self.at_1,
            )
            if isinstance(layer, StaticAttentionState) else layer
            for layer in self.state
        ]  # fmt: skip
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tried = False

    def choose(self, hidden_BD: Tensor) -> None:
        """The next tokens from hidden states."""
        logits_BV = self.reader.logits(hidden_BD)
        uniform_B = self.uniform_CB.index_select(0, self.drawn_1)[0] if self.sampling.temperature else None
        self.chosen_B.copy_(drawn(logits_BV, self.sampling, uniform_B))
        torch.clamp(self.chosen_B, min=0, out=self.token_B)
        self.drawn_1 += 1

    def step(self) -> None:
        self.seen_1C.index_fill_(1, self.at_1, 0)
        ctx = Context(positions_BL=self.position_B[:, None])
        hidden_B1D, _ = self.reader.model(self.reader.model.embed(self.token_B[:, None]), ctx, self.state)
        self.at_1 += 1
        self.position_B += 1
        self.choose(hidden_B1D[:, 0])

    def advance(self) -> None:
        """One step: the first as it stands, which also compiles kernels, the others as a graph."""
        if self.n_taken + 1 >= self.n_places and self.n_places < self.sampling.max_new_tokens:
            self.grow()
        self.n_taken += 1
        if self.graph is None and self.tried and self.reader.device.type == "cuda":
            self.graph = captured(self.step, self.reader.device)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.step()
        self.tried = True


def captured(step, device: torch.device) -> torch.cuda.CUDAGraph:  # type: ignore[no-untyped-def]
    """A graph of what `step` launches. Not torch.cuda.graph, which empties the allocator's cache each time."""
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(device), capture_stream(device)
    with CAPTURING:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:  # where the step ran out of memory, too: the stream is that of all later answers
                graph.capture_end()
        current.wait_stream(stream)
    return graph


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


class Result:
    """A step's tokens on their way to the host."""

    def __init__(self, chosen_B: Tensor):
        self.event: torch.cuda.Event | None = None
        if chosen_B.device.type == "cuda":
            self.tokens_B = torch.empty(chosen_B.shape, dtype=chosen_B.dtype, pin_memory=True)
            self.tokens_B.copy_(chosen_B, non_blocking=True)
            self.event = torch.cuda.current_stream(chosen_B.device).record_event()
        else:
            self.tokens_B = chosen_B.clone()

    def tokens(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.tokens_B.tolist()
