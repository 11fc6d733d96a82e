"""The two-layer MLP between encoder and language model: Linear, GELU, Linear (LLaVA-1.5's mlp2x_gelu)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longllava.bridges.pool import pool_features
from longllava.config import BridgeConfig
from longllava.nn.linear import Linear


class MLPBridge(nn.Module):
    """(N, T, C) features -> (N, M, D) image tokens, pooled first, as LongLLaVA pools before its projector."""

    def __init__(self, config: BridgeConfig, in_width: int, out_width: int):
        super().__init__()
        self.config = config
        self.up = Linear(in_width, config.hidden)
        self.down = Linear(config.hidden, out_width)

    def forward(self, features_NTC: Tensor, n_tokens: int | None = None) -> Tensor:
        """n_tokens: tokens an image, default the config's. Raises: InputError when T cannot be pooled so."""
        pooled_NMC = pool_features(features_NTC, n_tokens or self.config.tokens_per_image, self.config.pool)
        tokens_NMD = self.down(F.gelu(self.up(pooled_NMC)))
        if self.config.output_rms:
            tokens_NMD = F.rms_norm(tokens_NMD, tokens_NMD.shape[-1:]) * self.config.output_rms
        return tokens_NMD
