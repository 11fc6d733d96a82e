"""Floating point operations of reading a prompt, by a model's config alone.

A multiplication and an addition are two; exp, softplus and SiLU are one each. Left out, because they are below one
hundredth: norms, residuals, activations of MLPs, softmax, pooling, routing's choice.
T tokens, D width, E inner channels, N scan states, R rank of delta, K head size, H heads, G key-value heads, F hidden
width of an MLP, X experts, C encoder width, S pixels a side.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from longllava.config import BackboneConfig, EncoderConfig, ModelConfig


@dataclass(frozen=True)
class Operations:
    """products: of the language model's matrices, output layer included. scan: with its gates and convolution."""

    products: int
    attention: int
    scan: int
    encoder: int
    bridge: int

    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def operations(
    config: ModelConfig, n_tokens: int, n_images: int = 0, tokens_per_image: int | None = None, *, n_past: int = 0
) -> Operations:
    """Of reading n_tokens (those of the images among them) after n_past others, up to the first answer's token. What
    the last layer adds to the hidden state is made of the last token alone."""
    backbone, mixers = config.backbone, config.backbone.mixers()
    n_attention = mixers.count("attention")
    once = output_weights(backbone, backbone.n_layers - 1)
    multiplied = sum(layer_weights(backbone, layer) for layer in range(backbone.n_layers)) - once
    seen = n_tokens * n_past + n_tokens * (n_tokens + 1) // 2  # pairs of a query and a key, the causal half alone
    bridge = 0
    if config.bridge is not None and config.encoder is not None:
        per_token = config.bridge.hidden * (config.encoder.width + backbone.width)
        bridge = 2 * n_images * (tokens_per_image or config.bridge.tokens_per_image) * per_token
    return Operations(
        products=2 * (n_tokens * multiplied + once + backbone.vocab_size * backbone.width),
        attention=4 * n_attention * backbone.n_heads * backbone.head_dim * seen,
        scan=n_tokens * (backbone.n_layers - n_attention) * scan_operations(backbone),
        encoder=n_images * encoder_operations(config.encoder) if config.encoder is not None else 0,
        bridge=bridge,
    )


def layer_weights(config: BackboneConfig, layer: int) -> int:
    """Weights of one layer that a token is multiplied with: of a mixture, the router's and those of its few experts."""
    width, inner = config.width, config.d_inner()
    if config.mixers()[layer] == "attention":
        state = width * config.head_dim * (config.n_heads + 2 * config.n_kv_heads)
    else:
        state = inner * (2 * width + 2 * config.dt_rank + 2 * config.state_size)
    return state + output_weights(config, layer)


def output_weights(config: BackboneConfig, layer: int) -> int:
    """Those among them that come after the layer's state: the mixer's output and the MLP."""
    is_attention = config.mixers()[layer] == "attention"
    mixer = config.width * (config.n_heads * config.head_dim if is_attention else config.d_inner())
    mlp = 3 * config.width * config.mlp_width
    if config.has_experts(layer):
        mlp = mlp * config.n_experts_per_token + config.width * config.n_experts
    return mixer + mlp


def scan_operations(config: BackboneConfig) -> int:
    """Of one token in one layer: of each state seven (dt A, exp, times the state, dt u B, their sum, times C, sum), of
    each channel seven (bias, softplus, dt u, D u and its sum, SiLU and product of the gate), and the convolution."""
    inner = config.d_inner()
    convolution = inner * (2 * config.conv_size + config.conv_bias + 1)  # products and sums, bias, SiLU
    return 7 * inner * (config.state_size + 1) + convolution


def encoder_operations(config: EncoderConfig) -> int:
    """Of one picture, in the layers up to the selected one."""
    width, grid = config.width, config.grid()
    n_tokens = grid**2
    if config.stem_widths:
        patches = stem_operations(config)
    else:
        patches = 2 * 3 * config.patch_size**2 * width * n_tokens
        n_tokens += config.class_token
    layer = 2 * n_tokens * (4 * width**2 + 2 * width * config.mlp_width) + 4 * n_tokens**2 * width
    return patches + config.n_layers_used() * layer


def stem_operations(config: EncoderConfig) -> int:
    sides, previous, total = config.stem_sides(), 3, 0
    stages = zip(config.stem_widths, config.stem_strides, config.stem_blocks, sides, strict=True)
    for width, stride, n_blocks, side in stages:
        total += 2 * side**2 * width * (previous * (2 * stride) ** 2 + n_blocks * 2 * 9 * width)
        previous = width
    return total + 2 * sides[-1] ** 2 * previous * config.width
