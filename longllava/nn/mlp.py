"""SwiGLU (Shazeer 2020, arXiv:2002.05202), and a mixture of them with Jamba's routing.

T tokens, D width, F hidden width, X experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longllava.config import BackboneConfig
from longllava.nn.context import Context
from longllava.nn.linear import Linear
from longllava.ops.fused import swiglu


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.ModuleList):
    """The MLPs of a mixture."""

    def __init__(self, config: BackboneConfig):
        super().__init__(SwiGLU(config.width, config.mlp_width) for _ in range(config.n_experts))

    def forward(self, x_BLD: Tensor, token_S: Tensor, offsets: Tensor) -> Tensor:
        """(S, D): row s is token token_S[s] (of B * L) through its expert. Rows are sorted by expert; offsets: (X + 1,)
        int32, where each expert's rows begin."""
        x_SD = x_BLD.reshape(-1, x_BLD.shape[-1])[token_S]
        ends = offsets.tolist()
        # while training, experts without a token run on none: in ZeRO every process calls the same modules, or waits
        every = self.training and torch.is_grad_enabled()
        parts = [expert(x_SD[a:b]) for expert, a, b in zip(self, ends, ends[1:]) if a < b or every]
        return torch.cat(parts) if parts else x_SD

    def asks_host(self, n_rows: int) -> bool:
        """Whether a GPU would be waited for, with so many rows of one token a sequence: no CUDA graph can hold that."""
        return True


class MixtureOfExperts(nn.Module):
    """Softmax over all experts in fp32, the top few taken and not renormalised (modeling_jamba.py).

    Tokens are sorted by expert once, so that each expert is one product, and rows come back without atomics: a
    token's results are added in the experts' order, as the published loop does, whatever the device.
    J experts a token, S = T * J rows.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.n_per_token = config.n_experts_per_token
        self.router = nn.Linear(config.width, config.n_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x_BLD: Tensor, ctx: Context | None = None) -> Tensor:
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        weights_TX = torch.softmax(self.router(x_TD).float(), dim=-1)
        weight_TJ, expert_TJ = weights_TX.topk(self.n_per_token, dim=-1)
        if ctx is not None and self.training:
            ctx.report("router", balance_loss(weights_TX, expert_TJ, ctx))
        expert_TJ, rank_TJ = expert_TJ.sort(dim=-1)
        weight_TJ = weight_TJ.gather(-1, rank_TJ).to(x_TD.dtype)
        sorted_S, order_S = expert_TJ.flatten().sort(stable=True)
        # not bincount: on a GPU it waits for the largest number
        numbers = torch.arange(weights_TX.shape[-1] + 1, device=x_TD.device)
        offsets = torch.searchsorted(sorted_S, numbers, out_int32=True)
        y_SD = self.experts(x_BLD, order_S // self.n_per_token, offsets)
        place_TJ = torch.empty_like(order_S)
        place_TJ[order_S] = torch.arange(len(order_S), device=x_TD.device)
        place_TJ = place_TJ.view_as(expert_TJ)
        y_TD = torch.zeros_like(x_TD)
        for j in range(self.n_per_token):
            y_TD = y_TD + (y_SD[place_TJ[:, j]] * weight_TJ[:, j, None]).to(x_TD.dtype)
        return y_TD.view_as(x_BLD)


def balance_loss(weights_TX: Tensor, expert_TJ: Tensor, ctx: Context) -> Tensor:
    """Switch's load balance (arXiv:2101.03961 eq. 4-6) over top-k choices: 1 x k when perfectly even.

    Padding (seq_idx -1) is not counted.
    """
    n_experts = weights_TX.shape[-1]
    chosen_TX = F.one_hot(expert_TJ, n_experts).sum(1).float()
    if ctx.seq_idx_BL is not None:
        real_T = (ctx.seq_idx_BL.reshape(-1) >= 0).float()[:, None]
        share, probability = ((chosen_TX * real_T).sum(0), (weights_TX * real_T).sum(0))
        total = real_T.sum().clamp(min=1)
        return n_experts * (share / total * (probability / total)).sum()
    return n_experts * (chosen_TX.mean(0) * weights_TX.mean(0)).sum()
