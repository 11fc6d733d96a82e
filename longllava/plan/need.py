"""The bytes that a prompt takes beside the weights, and the refusal of one that cannot fit.

T tokens, c of a chunk, D width, E inner channels, N scan states, R rank of delta, K head size, H heads, G key-value
heads, F hidden width of an MLP, C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longllava.config import BackboneConfig, EncoderConfig, ModelConfig
from longllava.errors import InputError
from longllava.plan.memory import free_bytes, sized

if TYPE_CHECKING:
    import torch

FLOAT = 4  # bytes
# glibc takes blocks below this from its heap, where freed ones stay and others do not fit into their places: measured
# with nano, 1.4 to 3 times what lives at once, in half of twelve runs less than 1.7. Larger ones are given back.
HEAP_BLOCK, HEAP_FACTOR = 32 << 20, 2.0
HEAP_KEPT = 24 << 20  # of up to 64 MB that it keeps free at its end (heap.py), in the middle of 24 runs
# Of plain torch, where there are no compiled kernels: the blocked scan's span, of which five tensors are held; and a
# block of attention's queries, whose masks are held three times in bool and once in fp32.
SPAN_ELEMENTS, QUERY_BLOCK, MASKS = 1 << 20, 512, 3 + FLOAT


@dataclass(frozen=True)
class Need:
    """Bytes. keys_values grow with the tokens; state is the Mamba layers'; workspace is freed chunk by chunk."""

    keys_values: int
    state: int
    workspace: int

    def total(self) -> int:
        return self.keys_values + self.state + self.workspace

    def __str__(self) -> str:
        parts = ("keys and values", self.keys_values), ("state", self.state), ("workspace", self.workspace)
        return ", ".join(f"{name} {sized(value)}" for name, value in parts if value)


def prompt_need(
    config: ModelConfig,
    n_tokens: int,
    *,
    value_bytes: int,
    chunk_tokens: int,
    images_per_batch: int = 0,
    rows: int = 1,
    layers: Sequence[int] | None = None,
    ends: bool = True,
    on_host: bool = False,
    int8_cache: bool = False,
    plain: bool = False,
) -> Need:
    """Of n_tokens more (prompt and answer) in each of `rows`.

    value_bytes: of an activation, and of a key or value. images_per_batch: that the encoder sees at once, 0 for none.
    layers, ends: of a device that has those layers only, and encoder, embeddings and output layer or not. on_host: of
    the host's memory, whose allocator keeps small blocks. int8_cache: keys and values in int8, with scales. plain:
    by plain torch, where a kernel's one pass is several, each with a tensor of its own.
    """
    backbone = config.backbone
    mixers = [backbone.mixers()[layer] for layer in (range(backbone.n_layers) if layers is None else layers)]
    chunk = rows * min(chunk_tokens, n_tokens)
    # bytes of an element's copies in fp32 in the passes that plain torch makes of one kernel: five where rows are
    # rotated and quantised, three in the convolution and SwiGLU
    quantized = 5 * FLOAT if plain and config.int8 else 0
    copies = quantized or (3 * FLOAT if plain else 0)
    at_once = [
        mixer_workspace(backbone, mixer, chunk, value_bytes, quantized if mixer == "attention" else copies)
        for mixer in set(mixers)
    ]
    if mixers:
        # int8 experts multiply the rows of all of them at once, beside what they read and what they make of it; floats'
        # one expert after the other, and join what they made in the end
        several = any(map(backbone.has_experts, range(backbone.n_layers)))
        rows_fed = chunk * (backbone.n_experts_per_token if several else 1)
        gathered = rows_fed * backbone.width * value_bytes if several else 0
        widened = copies - FLOAT * (value_bytes == FLOAT) if plain else value_bytes  # what is in fp32 needs no copy
        hidden_bytes = backbone.mlp_width * (2 * value_bytes + widened)
        if config.int8 is not None:
            at_once.append(2 * gathered + rows_fed * hidden_bytes)
        else:
            at_once += [chunk * hidden_bytes, 3 * gathered]
    if ends:
        at_once.append(2 * rows * backbone.vocab_size * FLOAT)
    if ends and config.encoder is not None and images_per_batch:
        at_once.append(images_per_batch * encoder_workspace(config.encoder, value_bytes))
    # the first layer's input and this one's, the mixer's output, their sum and its norm
    hidden = 5 * chunk * backbone.width * value_bytes
    workspace = hidden + max(at_once, default=0)
    largest = chunk * max(2 * backbone.d_inner(), backbone.mlp_width) * value_bytes
    if on_host and largest < HEAP_BLOCK:
        workspace = int(workspace * HEAP_FACTOR) + HEAP_KEPT
    masks = min(QUERY_BLOCK * rows, chunk) * n_tokens * MASKS if plain and "attention" in mixers else 0
    return Need(
        keys_values=rows * n_tokens * mixers.count("attention") * token_bytes(backbone, value_bytes, int8_cache),
        state=rows * mixers.count("mamba") * state_bytes(backbone, value_bytes),
        workspace=workspace + masks,
    )


def token_bytes(config: BackboneConfig, value_bytes: int, int8: bool = False) -> int:
    """Keys and values of one token in one attention layer; in int8 each head's key and value has a scale."""
    return 2 * config.n_kv_heads * (config.head_dim + FLOAT if int8 else config.head_dim * value_bytes)


def state_bytes(config: BackboneConfig, value_bytes: int) -> int:
    """Of one Mamba layer: the convolution's last inputs, and the scan's state in fp32."""
    return config.d_inner() * ((config.conv_size - 1) * value_bytes + config.state_size * FLOAT)


def mixer_workspace(config: BackboneConfig, mixer: str, n_tokens: int, value_bytes: int, copies: int) -> int:
    if mixer == "attention":
        width = config.n_heads * config.head_dim
        return n_tokens * ((3 * width + 2 * config.n_kv_heads * config.head_dim) * value_bytes + width * copies)
    # x and z, x convolved, delta, y; and what delta, B and C come from, normed too
    inner = n_tokens * config.d_inner()
    span = 5 * FLOAT * min(SPAN_ELEMENTS, inner * config.state_size) if copies else 0
    scan = 5 * inner + 2 * n_tokens * (config.dt_rank + 2 * config.state_size)
    return max(scan * value_bytes + span, inner * (3 * value_bytes + copies))


def encoder_workspace(config: EncoderConfig, value_bytes: int) -> int:
    """Of one picture: its pixels as they come and normalised, and one layer's tensors."""
    pixels = 3 * config.image_size**2
    n_tokens = config.grid() ** 2 + (config.class_token and not config.stem_widths)
    attention = 5 * n_tokens * config.width
    mlp = 2 * n_tokens * config.width + 3 * n_tokens * config.mlp_width
    stem = max((4 * width * side**2 for width, side in zip(config.stem_widths, config.stem_sides())), default=0)
    return pixels * (1 + FLOAT + value_bytes) + max(attention, mlp, stem) * value_bytes


def check_fits(need: Need, device: torch.device | str, what: str) -> None:
    """Raises: InputError when `device` has less memory free than is needed. Where that is unknown, nothing."""
    free = free_bytes(device)
    if free is not None and need.total() > free:
        raise InputError(
            f"{what} need {sized(need.total())} of memory on {device} ({need}), {sized(free)} are free;"
            " give fewer pictures, fewer tokens for each, or free some memory"
        )
