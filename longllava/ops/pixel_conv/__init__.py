"""The convolution that pixels meet first, from their bytes: normalised, multiplied, cut off at 0 in one pass."""

from __future__ import annotations

from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.dispatch import Backend, choose
from longllava.ops.pixel_conv import cpu, reference

__all__ = ["BACKENDS", "pixel_conv"]

# best first; the last is the judge
BACKENDS = tuple(Backend(name, module.run, module.why_not) for name, module in (("cpu", cpu), ("reference", reference)))


def pixel_conv(
    pixels: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = ((pixels - mean) / std) * weight + bias; below 0 cut off with relu.

    Shapes:  pixels (N, C, H, W); mean, std (C); weight (K, C, S, S); bias (K). `stride` and `padding` are the same
             both ways; the padding is zeros, which stand for pixels of the mean.
    dtypes:  pixels uint8; the rest fp32, bf16 or fp16 (fp64 in plain torch), all the same. The CPU kernel takes fp32.
    Returns: (N, K, (H + 2 padding - S) // stride + 1, the same of W), in weight's dtype; channels_last by the kernel.
    Gradients go to weight and bias (by the reference).
    """
    n_channels, side = pixels.shape[1] if pixels.ndim == 4 else -1, weight.shape[-1]
    if weight.ndim != 4 or weight.shape[1:] != (n_channels, side, side):
        raise LongLLaVAError(
            "pixel_conv: pixels must be (N, C, H, W) and weight (K, C, S, S), got"
            f" {tuple(pixels.shape)} and {tuple(weight.shape)}"
        )
    for name, tensor, n in (("mean", mean, n_channels), ("std", std, n_channels), ("bias", bias, len(weight))):
        if tensor.shape != (n,):
            raise LongLLaVAError(f"pixel_conv: {name} must be ({n},), got {tuple(tensor.shape)}")
    if stride < 1 or padding < 0 or side < 1 or min(pixels.shape[2:]) + 2 * padding < side:
        raise LongLLaVAError(
            f"pixel_conv: a kernel of {side} pixels, stride {stride} and padding {padding} do not fit"
            f" {pixels.shape[2]} x {pixels.shape[3]} pixels"
        )
    args = (pixels, mean, std, weight, bias, stride, padding, relu)
    y: Tensor = choose("pixel_conv", BACKENDS, *args, forced=backend).run(*args)
    return y
