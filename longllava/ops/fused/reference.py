"""The fused elementwise ops in plain torch: the specification and the judge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.ops.quantized import quantize

Found = tuple[Tensor, Tensor | None, Tensor | None]  # y or its int8 values; the scale of these; the new residual


def why_not_rms_norm(x: Tensor, *args: object) -> str | None:
    return None


def why_not_swiglu(gate: Tensor, *args: object) -> str | None:
    return None


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    quantized: bool,
    dtype: torch.dtype | None = None,
) -> Found:
    total_TD = None if residual_TD is None else residual_TD + x_TD
    summed_TD = x_TD if total_TD is None else total_TD
    if x_TD.dtype in (torch.float32, torch.float64):
        y_TD = F.rms_norm(summed_TD, weight_D.shape, weight_D, eps)
    else:  # the published order: normalise in fp32, round, then scale in the weights' dtype
        y_TD = weight_D * F.rms_norm(summed_TD.float(), weight_D.shape, eps=eps).to(x_TD.dtype)
    return (*_finished(y_TD if dtype is None else y_TD.to(dtype), quantized), total_TD)


def why_not_rms_norm_parts(x: Tensor, *args: object) -> str | None:
    return None


def rms_norm_parts(x_TD: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    parts = x_TD.split([len(weight) for weight in weights], -1)
    return tuple(rms_norm(part, weight, eps, None, False)[0] for part, weight in zip(parts, weights))


def swiglu(
    gate_TF: Tensor, up_TF: Tensor, absmax_T: Tensor | None, quantized: bool, rotated: bool = False
) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(gate_TF.dtype, torch.float32)
    y_TF = (F.silu(gate_TF.to(wide)) * up_TF.to(wide)).to(gate_TF.dtype)
    return _finished(y_TF, quantized, absmax_T, rotated)


def _finished(
    y: Tensor, quantized: bool, absmax: Tensor | None = None, rotated: bool = False
) -> tuple[Tensor, Tensor | None]:
    return quantize(y, absmax, rotated) if quantized else (y, None)
