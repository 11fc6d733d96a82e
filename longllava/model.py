"""A model: encoder, bridge, fusion and backbone as one module.

N images, T encoder tokens, C encoder width, M tokens an image, B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longllava.backbone import Backbone
from longllava.bridges import build_bridge
from longllava.config import ModelConfig
from longllava.encoders import build_encoder
from longllava.errors import InputError
from longllava.fusion import build_fusion
from longllava.nn import Context, State


class Model(nn.Module):
    """Built from its config alone; weights are whatever torch left there until loaded or `initialise_`d."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder: nn.Module | None = None
        self.bridge: nn.Module | None = None
        if config.encoder is not None and config.bridge is not None:
            self.encoder = build_encoder(config.encoder)
            self.bridge = build_bridge(config.bridge, config.encoder.width, config.backbone.width)
        self.fusion = build_fusion(config.fusion)
        self.backbone = Backbone(config.backbone)
        for i, block in enumerate(self.backbone.blocks()):
            self.backbone.layers[i] = self.fusion.adapt(block, i)

    def place_(self, first: torch.device | str, layers: Sequence[torch.device | str]) -> None:
        """Each layer of the backbone to its device, all else to the first."""
        self.backbone.place_(first, layers)
        for part in (self.encoder, self.bridge):
            if part is not None:
                part.to(first)

    def encode(self, pixels_N3SS: Tensor) -> Tensor:
        """uint8 pixels -> features (N, T, C), before pooling, without gradients: the encoder is frozen."""
        if self.encoder is None:
            raise InputError("this model has no encoder: it reads text only")
        with torch.no_grad():
            return self.encoder(pixels_N3SS)

    def image_tokens(self, features_NTC: Tensor, tokens_per_image: int | None = None) -> Tensor:
        """Features (pooled already, or not) -> image tokens (N, M, D)."""
        if self.bridge is None:
            raise InputError("this model has no bridge: it reads text only")
        return self.bridge(features_NTC.to(self.backbone.embed_tokens.weight.dtype), tokens_per_image)

    def embed(self, ids_BL: Tensor, spans_S4: Tensor | None = None, image_tokens_NMD: Tensor | None = None) -> Tensor:
        """Word embeddings with the image tokens in their places: (B, L, D)."""
        text_BLD = self.backbone.embed_tokens(ids_BL)
        if spans_S4 is None:
            return text_BLD
        return self.fusion.embed(text_BLD, spans_S4, image_tokens_NMD)

    def forward(
        self, x_BLD: Tensor, ctx: Context, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State | None]:
        """Embedded tokens -> hidden states after the final norm, (B, L, D) or with last_only (B, 1, D), and the state
        when one was given."""
        return self.backbone(x_BLD, ctx, state, last_only)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.backbone.logits(hidden)

    @torch.no_grad()
    def initialise_(self, seed: int = 0) -> None:
        """Fresh weights for backbone and bridge (an encoder comes from elsewhere); the same for a seed."""
        torch.manual_seed(seed)
        self.backbone.initialise_()
        if self.bridge is not None:
            for module in self.bridge.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    nn.init.zeros_(module.bias)
