"""The hybrid stack: Mamba layers with one attention layer in eight. It knows no media.

B batch, L tokens, D width, V vocabulary. Source: Lieber et al. 2024, "Jamba" (arXiv:2403.19887).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from longllava.config import BackboneConfig
from longllava.nn import Block, Context, State
from longllava.nn.linear import Linear, product
from longllava.nn.norm import RMSNorm
from longllava.nn.recompute import Recomputing, recomputed


class Backbone(nn.Module, Recomputing):
    """Embeddings in, hidden states out; state in, state out.

    A sequence cut anywhere, each piece given the state of the one before, yields the same hidden states and
    the same final state as in one call.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        # given its weight, it draws none, which on the meta device would import all of torch._dynamo: 1.4 s
        weight_VD = torch.empty(config.vocab_size, config.width)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width, _weight=weight_VD)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self.layer_devices: list[torch.device] | None = None  # where layers are that are not all on one device

    def forward(
        self, x_BLD: Tensor, ctx: Context, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State | None]:
        """With last_only the hidden state of each row's last token alone, (B, 1, D): the last layer then multiplies
        what its state needs, and no more. Without gradients."""
        if self.layer_devices is not None:
            return self.across_devices(x_BLD, ctx, state, last_only)
        if x_BLD.device.type != "cpu" and not torch.is_grad_enabled():
            return self.without_gradients(x_BLD, ctx, state, last_only)
        new_state: State = []
        for i, layer in enumerate(self.layers):
            learns = torch.is_grad_enabled() and (self.training or x_BLD.requires_grad)
            if self.gradient_checkpointing and learns and state is None:
                x_BLD, layer_state = recomputed(partial(layer, ctx=ctx), x_BLD, self.offload_activations)
            else:
                own = None if state is None else state[i]
                x_BLD, layer_state = layer(x_BLD, ctx, own, last_only and self.is_last(i))
            new_state.append(layer_state)
        return self.final_norm(x_BLD), None if state is None else new_state

    def is_last(self, layer: int) -> bool:
        return layer == len(self.layers) - 1

    def without_gradients(
        self, x_BLD: Tensor, ctx: Context, state: State | None, last_only: bool = False
    ) -> tuple[Tensor, State | None]:
        """`forward` with fewer passes over memory."""
        new_state: State = []
        fed_BLD = None
        for i, block in enumerate(self.blocks()):
            own, only = None if state is None else state[i], last_only and self.is_last(i)
            x_BLD, fed_BLD, layer_state = block.onward(x_BLD, fed_BLD, ctx, own, only)
            new_state.append(layer_state)
        y_BLD = self.final_norm(x_BLD) if fed_BLD is None else self.final_norm.added(fed_BLD, x_BLD)[0]
        return y_BLD, None if state is None else new_state

    def across_devices(
        self, x_BLD: Tensor, ctx: Context, state: State | None, last_only: bool = False
    ) -> tuple[Tensor, State | None]:
        """`forward` of a model that is split: hidden states go to where each layer is, and come back in the end."""
        assert self.layer_devices is not None
        new_state: State = []
        first, at = x_BLD.device, x_BLD.device
        for i, (layer, device) in enumerate(zip(self.layers, self.layer_devices, strict=True)):
            if device != at:
                x_BLD, ctx, at = x_BLD.to(device), ctx.to(device), device
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # Triton's choice
                own = None if state is None else state[i]
                x_BLD, layer_state = layer(x_BLD, ctx, own, last_only and self.is_last(i))
            new_state.append(layer_state)
        return self.final_norm(x_BLD.to(first)), None if state is None else new_state

    def place_(self, first: torch.device | str, layers: Sequence[torch.device | str]) -> None:
        """Each layer to its device, all else to the first, where hidden states begin and end."""
        for layer, device in zip(self.layers, layers, strict=True):
            layer.to(device)
        for part in (self.embed_tokens, self.final_norm, self.lm_head):
            if part is not None:
                part.to(first)
        devices = [torch.device(device) for device in layers]
        self.layer_devices = devices if {*devices} - {torch.device(first)} else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). Give it only the positions you need: all of 40,960 would be 10.7 GB in fp32."""
        # by a call: ZeRO-3 has a module's weights together only while it is called; an int8 head has no float weight
        if self.lm_head is not None and getattr(self.lm_head, "weight", hidden).dtype == hidden.dtype:
            return self.lm_head(hidden)
        weight_VD = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return product(hidden, weight_VD.to(hidden.dtype))

    def empty_state(self, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token; capacity: tokens the attention layers make room for.

        device: that of the layers, where they are not split over several.
        """
        devices = self.layer_devices or [torch.device(device)] * len(self.layers)
        return [
            block.mixer.empty_state(batch, capacity, own, dtype)
            for block, own in zip(self.blocks(), devices, strict=True)
        ]

    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    @torch.no_grad()
    def initialise_(self) -> None:
        """Normal weights of init_std, residual outputs smaller by sqrt(2 layers), Mamba's published values."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed_tokens.weight, std=self.config.embedding_std)
        for block in self.blocks():
            block.mixer.initialise_()
            for name, weight in block.named_parameters():
                if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                    weight.mul_((2 * len(self.layers)) ** -0.5)
