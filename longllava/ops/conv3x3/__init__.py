"""A 3 x 3 convolution of pictures with what follows it: bias, residual, ReLU. Most of what a convolution stem does."""

from __future__ import annotations

from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.conv3x3 import cpu, reference
from longllava.ops.dispatch import Backend, choose

__all__ = ["BACKENDS", "conv3x3"]

# best first; the last is the judge
BACKENDS = tuple(Backend(name, module.run, module.why_not) for name, module in (("cpu", cpu), ("reference", reference)))


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = x * weight + bias (+ residual), padded by a pixel of zeros on each side, stride 1; below 0 cut off with relu.

    Shapes:  x (N, C, H, W), best in torch.channels_last; weight (K, C, 3, 3); bias (K); residual (N, K, H, W).
    dtypes:  fp32, bf16 or fp16 (fp64 in plain torch), all the same. The CPU kernel takes fp32; its sums go through
             Winograd's transforms: twice the rounding of direct ones, and a pixel that is not finite spoils the outputs
             of its tile of 4 x 4, not its neighbours alone.
    Returns: (N, K, H, W), channels_last where x is.
    Gradients go to all tensors (by the reference).
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise LongLLaVAError(
            f"conv3x3: x must be (N, C, H, W) and weight (K, C, 3, 3), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise LongLLaVAError(f"conv3x3: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    n, _, height, width = x.shape
    if residual is not None and residual.shape != (n, len(weight), height, width):
        raise LongLLaVAError(
            f"conv3x3: residual must be {(n, len(weight), height, width)}, got {tuple(residual.shape)}"
        )
    args = (x, weight, bias, residual, relu)
    y: Tensor = choose("conv3x3", BACKENDS, *args, forced=backend).run(*args)
    return y
