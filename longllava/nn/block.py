"""One layer: norm, mixer, norm, feed-forward, each on a residual."""

from __future__ import annotations

from torch import Tensor, nn

from longllava.config import BackboneConfig
from longllava.nn.attention import Attention
from longllava.nn.cache import LayerState
from longllava.nn.context import Context
from longllava.nn.mamba import Mamba
from longllava.nn.mlp import MixtureOfExperts, SwiGLU
from longllava.nn.norm import RMSNorm

MIXERS: dict[str, type[Mamba] | type[Attention]] = {"mamba": Mamba, "attention": Attention}


class Block(nn.Module):
    """(B, L, D), context, state -> (B, L, D), state. The config says which mixer and feed-forward it holds.

    With last_only the mixer takes all tokens into its state, and only the last one's hidden state is made: (B, 1, D).
    """

    def __init__(self, config: BackboneConfig, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = MIXERS[config.mixers()[layer]](config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = (
            MixtureOfExperts(config) if config.has_experts(layer) else SwiGLU(config.width, config.mlp_width)
        )

    def forward(
        self, x_BLD: Tensor, ctx: Context, state: LayerState | None = None, last_only: bool = False
    ) -> tuple[Tensor, LayerState]:
        mixed_BLD, state = self.mixer(self.mixer_norm(x_BLD), ctx, state, last_only)
        x_BLD = (x_BLD[:, -1:] if last_only else x_BLD) + mixed_BLD
        return x_BLD + self.ffn(self.ffn_norm(x_BLD), ctx), state

    def onward(
        self, x_BLD: Tensor, fed_BLD: Tensor | None, ctx: Context, state: LayerState | None, last_only: bool = False
    ) -> tuple[Tensor, Tensor, LayerState]:
        """`forward` of x + fed, whose own last sum is left to the next layer: each sum is made where it is normalised.

        Without gradients. Returns: x and what is to be added to it, and the state.
        """
        if fed_BLD is None:
            normed_BLD = self.mixer_norm(x_BLD)
        else:
            normed_BLD, x_BLD = self.mixer_norm.added(fed_BLD, x_BLD)
        mixed_BLD, state = self.mixer(normed_BLD, ctx, state, last_only)
        normed_BLD, x_BLD = self.ffn_norm.added(mixed_BLD, x_BLD[:, -1:] if last_only else x_BLD)
        return x_BLD, self.ffn(normed_BLD, ctx), state
