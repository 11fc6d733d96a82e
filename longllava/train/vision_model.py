"""The encoder with what is read from it while it learns: heads over the mean of some of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longllava.bridges.pool import pool_features
from longllava.config import EncoderConfig
from longllava.data.worlds.render import COLOURS, MAX_COUNT, PLACES
from longllava.data.worlds.sheets import things
from longllava.encoders import build_encoder


class Readout(nn.Module):
    """Linear heads over a token mean: (N, C) -> logits by name. The thing's head is the table of names."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        sizes = {"thing": len(things()), "digit": 10, "colour": len(COLOURS), "count": MAX_COUNT, "place": len(PLACES)}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, x_NC: Tensor) -> dict[str, Tensor]:
        x_NC = self.norm(x_NC)
        return {name: head(x_NC) for name, head in self.heads.items()}


class NameReadout(nn.Module):
    """Cosines with a fixed code of each name: (N, C) -> (N, n_things) logits, scale * (cosine - threshold)."""

    def __init__(self, width: int):
        super().__init__()
        self.codes: Tensor
        self.map = nn.Linear(width, width, bias=False)
        self.register_buffer("codes", torch.zeros(len(things()), width))
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.threshold = nn.Parameter(torch.tensor(0.4))

    @torch.no_grad()
    def begin_(self, table: Tensor) -> None:
        """Codes from a learned table (n_things, C): centred and whitened, so that names lie far from each other
        (797 codes in 128 dimensions: cosines of 0.08 RMS, 0.17 before); the map undoes the whitening."""
        u, s, v = torch.linalg.svd(table - table.mean(0), full_matrices=False)
        self.codes.copy_(F.normalize(u @ v, dim=-1))
        self.map.weight.copy_((v.T * s) @ v)

    def forward(self, x_NC: Tensor) -> Tensor:
        return self.log_scale.exp() * (F.normalize(self.map(x_NC), dim=-1) @ self.codes.T - self.threshold)


class VisionFoundation(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.readout = Readout(config.width)
        self.crop_readout = Readout(config.width)
        self.name_readout = NameReadout(config.width)

    def crops(self, pixels: Tensor) -> Tensor:
        """Logits of the thing from the stem's mean token: (N, 3, 56, 56) uint8 -> (N, n_things)."""
        encoder = self.encoder
        x = (pixels.float() - encoder.mean) / encoder.std
        x = encoder.patches(x.contiguous(memory_format=torch.channels_last))
        return self.crop_readout(x.mean(dim=(2, 3)))["thing"]

    def whole(self, pixels: Tensor, pool_tokens: int, pick_NT: Tensor, by_name: bool) -> dict[str, Tensor]:
        """Logits by label from the picked tokens' mean. by_name: the thing's from its name's fixed code."""
        tokens_NTC = pool_features(self.encoder(pixels), pool_tokens, "2d")
        mean_NC = torch.einsum("nt,ntc->nc", pick_NT, tokens_NTC)
        logits = self.readout(mean_NC)
        return logits | {"thing": self.name_readout(self.readout.norm(mean_NC))} if by_name else logits
