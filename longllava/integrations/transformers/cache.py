"""The state of our layers as a Cache of transformers: generate hands it back at every step and asks its length.

B rows. A Mamba layer's state is replaced at every call, so nothing can be taken back: no crop, no assisted decoding.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from longllava.errors import InputError
from longllava.nn import AttentionState, Context, MambaState, State
from longllava.nn.cache import LayerState

# Its name in what models take and give: transformers 5.24 calls it cache, which was past_key_values.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class LongLLaVACache(Cache):
    """capacity: tokens that the attention layers make room for at the first call; more make room later, by a copy."""

    def __init__(self, capacity: int = 0):
        super().__init__(layers=[])
        self.capacity = capacity
        self.state: State | None = None
        self.n_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    @property
    def is_linear(self) -> list[bool]:
        """Of layers. Were all so, as of none, transformers 5.24 would not cut a prompt to what the cache lacks."""
        return [False]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before 5.10

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def __len__(self) -> int:
        return len(self.state or ())

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        if self.state is None:
            return -1
        first = self.state[0]
        return len(first.scan_BEN if isinstance(first, MambaState) else first.segments()[-1].keys_BSGK)

    def state_of(self, rows: int) -> State | None:
        """The state, to go on from. Raises: InputError where the call has another number of rows."""
        if self.state is not None and self.batch_size != rows:
            raise InputError(f"{CACHE}: its rows are {self.batch_size}, those of this call {rows}; for beams"
                             " and several answers repeat them with batch_repeat_interleave")  # fmt: skip
        return self.state

    def mask(self, length: int) -> Tensor | None:
        """(B, S): 1 for each token that is held, 0 for padding, and `length` ones; None where nothing is padding."""
        attention = next((layer for layer in self.state or () if isinstance(layer, AttentionState)), None)
        if attention is None or attention.buffer.seq_idx_BS is None:
            return None
        return F.pad((attention.buffer.seq_idx_BS[:, : attention.length] >= 0).long(), (0, length), value=1)

    def reset(self) -> None:
        self.state, self.n_tokens = None, 0

    def crop(self, *arguments: object, **named: object) -> None:
        raise InputError("cache: tokens cannot be taken back out of a Mamba layer's state; decode without an assistant")

    activate_past_recording = crop

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = [select_rows(layer, indices) for layer in self.state]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))


def select_rows(layer: LayerState, rows_B: Tensor) -> LayerState:
    """The state of some rows, in memory of its own; a row may be taken several times."""
    if isinstance(layer, MambaState):
        rows_B = rows_B.to(layer.scan_BEN.device)
        return MambaState(*(part.index_select(0, rows_B) for part in layer))
    assert isinstance(layer, AttentionState), "the state of a CUDA graph stays in its graph"
    keys_BSGK = layer.buffer.keys_BSGK
    _, room, heads, head_dim = keys_BSGK.shape
    rows_B = rows_B.to(keys_BSGK.device)
    room = max(room, layer.n_tokens())
    new = AttentionState.empty(len(rows_B), room, heads, head_dim, keys_BSGK.device, keys_BSGK.dtype)
    for segment in layer.segments():
        new = new.extended(segment.rows(rows_B))
    return new


def check_padding(mask_BS: Tensor | None) -> None:
    """Raises: InputError for rows that end in padding."""
    if mask_BS is not None and mask_BS.ndim == 2 and not bool((mask_BS[:, -1] != 0).all()):
        raise InputError("attention_mask: rows end in padding, and an answer would follow that; pad on the left"
                         " (padding_side='left')")  # fmt: skip


def check_prompt(length: int, cache: object) -> None:
    """Raises: InputError for a prompt that is in the cache to its end, of which generate would hand over all again."""
    if isinstance(cache, LongLLaVACache) and cache.n_tokens >= length:
        raise InputError(f"{CACHE}: it holds {cache.n_tokens} tokens, the prompt has {length}; give all tokens so far,"
                         " and at least one that the cache does not hold")  # fmt: skip


def context(mask_BS: Tensor | None, start: int, batch: int, length: int) -> Context:
    """What a mask over cached and new tokens says about the new ones; nothing where no token is padding."""
    if mask_BS is not None and (mask_BS.ndim != 2 or mask_BS.shape != (batch, start + length)):
        raise InputError(
            f"attention_mask: got {tuple(mask_BS.shape)}, expected ({batch}, {start + length}): all tokens, those of"
            " the cache too"
        )
    if mask_BS is None or bool((mask_BS != 0).all()):
        return Context(start=start)
    real_BS = mask_BS != 0
    positions_BL = (real_BS.cumsum(1) - 1).clamp(min=0)[:, start:]
    return Context(real_BS[:, start:].int() - 1, positions_BL, start=start)
