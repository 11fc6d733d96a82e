"""State of the layers: what a sequence leaves behind for its next token.

B batch, S tokens seen, G key-value heads, K head size, E inner channels, N scan states.
A Mamba layer keeps its convolution tail and scan state, both replaced at every call. An attention layer keeps
keys and values: read-only segments that forks share, and a buffer of its own that grows in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longllava.ops.int8_linear import quantize_rows
from longllava.ops.quantized import Quantized

GROWTH = 256  # tokens added when a buffer is full: decoding past the planned end, never prefill


class MambaState(NamedTuple):
    """conv_BKE: the last K-1 inputs of the convolution. scan_BEN: fp32."""

    conv_BKE: Tensor
    scan_BEN: Tensor


class StaticMambaState(MambaState):
    """A Mamba layer's state that each call replaces in place, so that a CUDA graph finds it at its address."""


class Segment(NamedTuple):
    """Keys and values of consecutive tokens; seq_idx_BS marks padding (-1) and is None when there is none.

    In int8 each token and head has an fp32 scale for its key and one for its value.
    """

    keys_BSGK: Tensor
    values_BSGK: Tensor
    seq_idx_BS: Tensor | None
    key_scale_BSG: Tensor | None = None
    value_scale_BSG: Tensor | None = None

    def part(self, begin: int, end: int) -> Segment:
        return Segment._make(None if tensor is None else tensor[:, begin:end] for tensor in self)

    def rows(self, rows_B: Tensor) -> Segment:
        return Segment._make(None if tensor is None else tensor.index_select(0, rows_B) for tensor in self)

    def quantized(self) -> Segment:
        """In int8. Keys and values that are so already stay as they are."""
        if self.key_scale_BSG is not None:
            return self
        keys, values = quantize_rows(self.keys_BSGK), quantize_rows(self.values_BSGK)
        return Segment(keys.values, values.values, self.seq_idx_BS, keys.scale, values.scale)

    def dequantized(self, dtype: torch.dtype) -> Segment:
        if self.key_scale_BSG is None or self.value_scale_BSG is None:
            return self
        keys = Quantized(self.keys_BSGK, self.key_scale_BSG, dtype).dequantized()
        return Segment(keys, Quantized(self.values_BSGK, self.value_scale_BSG, dtype).dequantized(), self.seq_idx_BS)


class Buffer:
    """Storage that grows in place. `filled` tells how far it was written, by whichever state wrote last.

    In int8, floats are quantised as they are written.
    """

    def __init__(self, batch: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.keys_BSGK = torch.empty(batch, capacity, heads, head_dim, device=device, dtype=dtype)
        self.values_BSGK = torch.empty_like(self.keys_BSGK)
        self.seq_idx_BS: Tensor | None = None
        self.key_scale_BSG: Tensor | None = None
        self.value_scale_BSG: Tensor | None = None
        if dtype == torch.int8:
            self.key_scale_BSG = torch.empty(batch, capacity, heads, device=device, dtype=torch.float32)
            self.value_scale_BSG = torch.empty_like(self.key_scale_BSG)
        self.filled = 0

    def segment(self, length: int) -> Segment:
        whole = (self.keys_BSGK, self.values_BSGK, self.seq_idx_BS, self.key_scale_BSG, self.value_scale_BSG)
        return Segment(*whole).part(0, length)

    def like(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> Buffer:
        """An empty one of another size, and perhaps dtype."""
        heads, head_dim = self.keys_BSGK.shape[2:]
        return Buffer(batch, capacity, heads, head_dim, self.keys_BSGK.device, dtype or self.keys_BSGK.dtype)

    def with_capacity(self, capacity: int, length: int) -> Buffer:
        """A copy of the first `length` tokens in a buffer of another size."""
        other = self.like(len(self.keys_BSGK), capacity)
        if length:
            other.write(self.segment(length), 0)
        return other

    def write(self, new: Segment, at: int) -> None:
        end = at + new.keys_BSGK.shape[1]
        if self.key_scale_BSG is not None and self.value_scale_BSG is not None:
            new = new.quantized()
            assert new.key_scale_BSG is not None and new.value_scale_BSG is not None
            self.key_scale_BSG[:, at:end] = new.key_scale_BSG
            self.value_scale_BSG[:, at:end] = new.value_scale_BSG
        self.keys_BSGK[:, at:end] = new.keys_BSGK
        self.values_BSGK[:, at:end] = new.values_BSGK
        if new.seq_idx_BS is not None and self.seq_idx_BS is None:
            self.seq_idx_BS = torch.zeros(self.keys_BSGK.shape[:2], dtype=torch.int32, device=self.keys_BSGK.device)
        if self.seq_idx_BS is not None:
            self.seq_idx_BS[:, at:end] = 0 if new.seq_idx_BS is None else new.seq_idx_BS
        self.filled = end


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of one attention layer: shared segments, then the first `length` tokens of a buffer.

    `append` writes into the buffer in place and returns the longer state. Appending twice to the same state
    would overwrite the first continuation's tokens, so the second one copies the buffer; `fork` avoids the copy
    by turning the tokens so far into a segment that both sides only read. Where gradients are wanted each copies it.
    """

    prefix: tuple[Segment, ...]
    buffer: Buffer
    length: int
    causal: ClassVar[bool] = True  # the queries are the last tokens of the last segment

    @classmethod
    def empty(cls, batch: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        return cls((), Buffer(batch, capacity, heads, head_dim, device, dtype), 0)

    def n_tokens(self) -> int:
        return self.length + sum(segment.keys_BSGK.shape[1] for segment in self.prefix)

    def append(self, keys_BSGK: Tensor, values_BSGK: Tensor, seq_idx_BS: Tensor | None) -> AttentionState:
        return self.extended(Segment(keys_BSGK, values_BSGK, seq_idx_BS))

    def extended(self, new: Segment) -> AttentionState:
        end = self.length + new.keys_BSGK.shape[1]
        buffer, capacity = self.buffer, self.buffer.keys_BSGK.shape[1]
        # gradients of earlier calls read what these saw, which a write in place would change
        watched = self.length > 0 and (torch.is_grad_enabled() or buffer.keys_BSGK.requires_grad)
        if buffer.filled != self.length or end > capacity or watched:
            buffer = buffer.with_capacity(capacity if end <= capacity else end + GROWTH, self.length)
        buffer.write(new, self.length)
        return replace(self, buffer=buffer, length=end)

    def segments(self) -> tuple[Segment, ...]:
        """All segments in order; the last one is the buffer's."""
        return (*self.prefix, self.buffer.segment(self.length))

    def merged(self) -> AttentionState:
        """The same keys and values in one copy of them all."""
        new = AttentionState((), self.buffer.like(len(self.buffer.keys_BSGK), self.n_tokens()), 0)
        for segment in self.segments():
            new = new.extended(segment)
        return new

    def fork(self, capacity: int = GROWTH, batch: int | None = None) -> AttentionState:
        """A state that reads the same tokens and writes to a buffer of its own.

        batch: expand a batch-1 state for so many continuations; the tokens so far are read by all, copied by none.
        """
        shared = self.segments() if self.length else self.prefix
        rows = len(self.buffer.keys_BSGK)
        if batch is not None:
            assert rows == 1, "only a batch of one can be expanded"
            shared = tuple(
                Segment._make(None if part is None else part.expand(batch, *part.shape[1:]) for part in segment)
                for segment in shared
            )
        return AttentionState(shared, self.buffer.like(batch or rows, capacity), 0)

    @classmethod
    def join(cls, states: Sequence[AttentionState], capacity: int) -> AttentionState:
        """Rows of several batch-1 states as one batch with room for `capacity` more; shorter rows end in padding."""
        lengths = [state.n_tokens() for state in states]
        buffer = states[0].buffer.like(len(states), max(lengths) + capacity)
        device = buffer.keys_BSGK.device
        buffer.seq_idx_BS = torch.full(buffer.keys_BSGK.shape[:2], -1, dtype=torch.int32, device=device)
        for row, state in enumerate(states):
            at = 0
            for segment in state.segments():
                end = at + segment.keys_BSGK.shape[1]
                buffer.keys_BSGK[row, at:end] = segment.keys_BSGK[0]
                buffer.values_BSGK[row, at:end] = segment.values_BSGK[0]
                buffer.seq_idx_BS[row, at:end] = 0 if segment.seq_idx_BS is None else segment.seq_idx_BS[0]
                for scale, of in ((buffer.key_scale_BSG, segment.key_scale_BSG),
                                  (buffer.value_scale_BSG, segment.value_scale_BSG)):  # fmt: skip
                    if scale is not None and of is not None:
                        scale[row, at:end] = of[0]
                at = end
            for tensor in (buffer.keys_BSGK, buffer.values_BSGK, buffer.key_scale_BSG, buffer.value_scale_BSG):
                if tensor is not None:
                    tensor[row, at : max(lengths)] = 0
        buffer.filled = max(lengths)
        return cls((), buffer, buffer.filled)


@dataclass(frozen=True)
class StaticAttentionState:
    """Keys and values whose shapes do not change, for decoding token by token, also in a CUDA graph.

    prefix: what was read, never changed. keys_BCGK, values_BCGK: room for C more tokens, zero at first; the token of a
    call goes to place at_1 (int64, on the device), which all layers share and the decoder moves on. seen_BC: int32, 0
    where a token stands, else -1; the decoder marks the place before it calls the layers.
    """

    prefix: tuple[Segment, ...]
    keys_BCGK: Tensor
    values_BCGK: Tensor
    seen_BC: Tensor
    at_1: Tensor
    causal: ClassVar[bool] = False  # seen_BC says what is visible

    def append(self, keys_B1GK: Tensor, values_B1GK: Tensor, seq_idx_B1: Tensor | None) -> StaticAttentionState:
        for places_BCGK, new_B1GK in ((self.keys_BCGK, keys_B1GK), (self.values_BCGK, values_B1GK)):
            places_BCGK.index_copy_(1, self.at_1, new_B1GK.to(places_BCGK.dtype))
        return self

    def segments(self) -> tuple[Segment, ...]:
        return (*self.prefix, Segment(self.keys_BCGK, self.values_BCGK, self.seen_BC))


LayerState = MambaState | AttentionState | StaticAttentionState
State = list[LayerState]


def fork_state(state: State, capacity: int = GROWTH, batch: int = 1) -> State:
    """An independent continuation of every layer; Mamba's small state is copied, keys and values are shared.

    batch > 1 expands a batch-1 state, for several questions on one prefix.
    """
    forked: State = []
    for layer in state:
        if isinstance(layer, MambaState):
            forked.append(MambaState(*(part.repeat(batch, 1, 1) for part in layer)))
        else:
            assert isinstance(layer, AttentionState), "a state of static shapes belongs to its decoder"
            forked.append(layer.fork(capacity, batch if batch > 1 else None))
    return forked


def int8_cache(state: State, capacity: int) -> State:
    """An empty state whose attention layers store int8, with room for `capacity` tokens."""
    return [
        AttentionState((), layer.buffer.like(len(layer.buffer.keys_BSGK), capacity, torch.int8), 0)
        if isinstance(layer, AttentionState) else layer
        for layer in state
    ]  # fmt: skip


def join_states(states: Sequence[State], capacity: int) -> State:
    """Batch-1 states of different lengths as the rows of one, with room for `capacity` more tokens in each."""
    joined: State = []
    for layers in zip(*states):
        if isinstance(layers[0], MambaState):
            joined.append(MambaState(*(torch.cat(parts) for parts in zip(*layers))))
        else:
            joined.append(AttentionState.join(layers, capacity))
    return joined
