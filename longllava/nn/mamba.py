"""The Mamba-1 mixer with Jamba's inner norms.

B batch, L tokens, D width, E inner channels, N scan states, R rank of delta, K conv taps.
Source: Gu & Dao 2023 (arXiv:2312.00752) Alg. 2; Lieber et al. 2024 (arXiv:2403.19887) for the norms on dt, B, C.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from longllava.config import BackboneConfig
from longllava.nn.cache import MambaState, StaticMambaState
from longllava.nn.context import Context
from longllava.nn.linear import Linear
from longllava.nn.norm import RMSNorm, normed_parts
from longllava.ops.causal_conv1d import causal_conv1d, causal_conv1d_
from longllava.ops.selective_scan import selective_scan, selective_scan_

NEVER = 2**31  # tokens: more than any call has


class Mamba(nn.Module):
    def __init__(self, config: BackboneConfig):
        super().__init__()
        width, inner, rank, states = config.width, config.d_inner(), config.dt_rank, config.state_size
        self.in_proj = Linear(width, 2 * inner, bias=config.proj_bias)
        self.conv_weight_EK = nn.Parameter(torch.empty(inner, config.conv_size))
        self.conv_bias_E = nn.Parameter(torch.zeros(inner)) if config.conv_bias else None
        self.x_proj = Linear(inner, rank + 2 * states, bias=False)
        self.dt_norm = RMSNorm(rank, config.norm_eps)
        self.B_norm = RMSNorm(states, config.norm_eps, feeds_products=False)
        self.C_norm = RMSNorm(states, config.norm_eps, feeds_products=False)
        self.dt_proj = Linear(rank, inner, bias=False)
        # kept in fp32 whatever the model's dtype: they enter the fp32 recurrence
        self.dt_bias_E = nn.Parameter(torch.empty(inner))
        self.A_log_EN = nn.Parameter(torch.empty(inner, states))
        self.D_E = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, width, bias=config.proj_bias)
        self.int8_rows_from = NEVER  # tokens a sequence from which out_proj gets int8 rows (longllava.quant)
        self.known_A: tuple[tuple[int, int, torch.device], Tensor, Tensor] | None = None

    def forward(
        self, x_BLD: Tensor, ctx: Context, state: MambaState | None = None, last_only: bool = False
    ) -> tuple[Tensor, MambaState]:
        u_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        taps = (self.conv_weight_EK, self.conv_bias_E)
        if isinstance(state, StaticMambaState):
            u_BLE = causal_conv1d_(u_BLE, *taps, state.conv_BKE, ctx.seq_idx_BL, "silu")
            y_BLE = selective_scan_(**self.scanned(u_BLE, z_BLE), state=state.scan_BEN, seq_idx=ctx.seq_idx_BL)
            return self.out_proj(y_BLE[:, -1:] if last_only else y_BLE), state
        u_BLE, conv_BKE = causal_conv1d(u_BLE, *taps, state and state.conv_BKE, ctx.seq_idx_BL, "silu")
        int8 = u_BLE.shape[1] >= self.int8_rows_from and not (torch.is_grad_enabled() and u_BLE.requires_grad)
        rows_BLE, scan_BEN = selective_scan(
            **self.scanned(u_BLE, z_BLE),
            state=state and state.scan_BEN,
            seq_idx=ctx.seq_idx_BL,
            quantized=int8 and not last_only,
        )
        if last_only:
            assert isinstance(rows_BLE, Tensor)
            rows_BLE = rows_BLE[:, -1:]
        if state is not None:
            conv_BKE = conv_BKE.to(state.conv_BKE.dtype)  # under autocast it is in 16 bits
        return self.out_proj(rows_BLE), MambaState(conv_BKE, scan_BEN)

    def scanned(self, u_BLE: Tensor, z_BLE: Tensor) -> dict[str, Any]:
        """What the scan takes beside its state."""
        delta_BLR, B_BLN, C_BLN = normed_parts(self.x_proj(u_BLE), [self.dt_norm, self.B_norm, self.C_norm])
        return {
            "u": u_BLE,
            "delta": self.dt_proj(delta_BLR),
            "A": self.A(),
            "B": B_BLN,
            "C": C_BLN,
            "D": self.D_E.float(),
            "z": z_BLE,
            "delta_bias": self.dt_bias_E.float(),
            "delta_softplus": True,
        }

    def A(self) -> Tensor:
        """-exp(A_log), (E, N) fp32: kept between calls that want no gradient, as long as A_log is the same."""
        log_EN = self.A_log_EN
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return -log_EN.float().exp()
        key = (log_EN.data_ptr(), 0 if log_EN.is_inference() else log_EN._version, log_EN.device)
        if self.known_A is None or self.known_A[0] != key:
            # A_log too: while it is held, no other tensor has its address
            self.known_A = (key, -log_EN.float().exp(), log_EN.detach())
        return self.known_A[1]

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles. They hold no A_log that lies where known_A says, so another may come to lie there."""
        return {**super().__getstate__(), "known_A": None}

    def train(self, mode: bool = True) -> Mamba:
        if mode != self.training:  # steps that write to A_log.data, as DeepSpeed's, leave its version as it was
            self.known_A = None
        return super().train(mode)

    def empty_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> MambaState:
        """State before the first token; `capacity` is attention's concern."""
        inner, taps = self.conv_weight_EK.shape
        return MambaState(
            torch.zeros(batch, taps - 1, inner, device=device, dtype=dtype),
            torch.zeros(batch, *self.A_log_EN.shape, device=device, dtype=torch.float32),
        )

    @torch.no_grad()
    def initialise_(self) -> None:
        """Published initial values: A = -(1..N), steps of 0.001 to 0.1, a uniform dt_proj."""
        inner, states = self.A_log_EN.shape
        self.A_log_EN.copy_(torch.arange(1, states + 1).float().log().expand(inner, states))
        self.D_E.fill_(1.0)
        step_E = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.dt_bias_E.copy_(step_E + torch.log(-torch.expm1(-step_E)))  # softplus of this is the step
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_proj.in_features**-0.5), self.dt_proj.in_features**-0.5)
        bound = self.conv_weight_EK.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight_EK, -bound, bound)
