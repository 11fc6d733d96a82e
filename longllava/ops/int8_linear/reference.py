"""Int8 linear layers in plain torch: the specification and the judge. Integer sums are exact: int8 products of a block
of 1,024 inputs stay below 2^24 in fp32, blocks are added in int32."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.dispatch import without_autocast
from longllava.ops.quantized import quantize, rotate

BLOCK = 1024  # 1,024 x 128 x 128 = 2^24


def why_not(x: Tensor, *args: object) -> str | None:
    return None


def why_not_quantize(x: Tensor, *args: object) -> str | None:
    return None


def why_not_rotate(x: Tensor) -> str | None:
    return None


def quantize_rows(x: Tensor, absmax: Tensor | None = None, rotated: bool = False) -> tuple[Tensor, Tensor]:
    return quantize(x, absmax, rotated)


def rotate_rows(x: Tensor) -> Tensor:
    return rotate(x).to(x.dtype)


@without_autocast
def run(
    x_TK: Tensor,
    weight_XNK: Tensor,
    scale_XN: Tensor,
    bias_XN: Tensor | None,
    x_scale_T: Tensor | None,
    offsets_X: Tensor | None,
    mode: str,
    dtype: torch.dtype,
) -> Tensor:
    """Without offsets there is one expert, and its axis X is missing."""
    if x_TK.device.type == "cpu":
        native.say_once_if_missing()
    if offsets_X is None:
        return product(x_TK, weight_XNK, scale_XN, bias_XN, x_scale_T, mode, dtype)
    ends = offsets_X.tolist()
    y_TN = x_TK.new_empty(x_TK.shape[0], weight_XNK.shape[1], dtype=dtype)
    for expert, (start, end) in enumerate(zip(ends, ends[1:])):
        bias_N = None if bias_XN is None else bias_XN[expert]
        rows_scale = None if x_scale_T is None else x_scale_T[start:end]
        y_TN[start:end] = product(
            x_TK[start:end], weight_XNK[expert], scale_XN[expert], bias_N, rows_scale, mode, dtype
        )
    return y_TN


def product(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    x_scale_T: Tensor | None,
    mode: str,
    dtype: torch.dtype,
) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if mode == "weight_only":
        y_TN = (x_TK.to(wide) @ weight_NK.to(wide).T) * scale_N
    else:
        if x_scale_T is None:
            x_TK, x_scale_T = quantize(x_TK)
        y_TN = integer_product(x_TK, weight_NK).to(wide) * scale_N * x_scale_T[:, None]
    if bias_N is not None:
        y_TN = y_TN + bias_N.to(wide)
    return y_TN.to(dtype)


def integer_product(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Exact x W^T in int32."""
    y_TN = torch.zeros(x_TK.shape[0], weight_NK.shape[0], dtype=torch.int32, device=x_TK.device)
    for x_TB, weight_NB in zip(x_TK.split(BLOCK, 1), weight_NK.split(BLOCK, 1)):
        y_TN += (x_TB.float() @ weight_NB.float().T).to(torch.int32)
    return y_TN


def grad_input(grad_TN: Tensor, weight_XNK: Tensor, scale_XN: Tensor, offsets_X: Tensor | None) -> Tensor:
    """Gradient of the rows, as if y were x times the dequantised weights: rounding of x passes it through."""
    scaled = scale_XN.to(grad_TN.dtype)
    if offsets_X is None:
        return (grad_TN * scaled) @ weight_XNK.to(grad_TN.dtype)
    ends = offsets_X.tolist()
    parts = [
        (grad_TN[start:end] * scaled[expert]) @ weight_XNK[expert].to(grad_TN.dtype)
        for expert, (start, end) in enumerate(zip(ends, ends[1:]))
    ]
    return torch.cat(parts)
