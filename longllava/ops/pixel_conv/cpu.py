"""The convolution of pixels on the CPU by the compiled kernels (csrc/pixel_conv*)."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import plain

FIELDS = struct.Struct("@17q")  # csrc/pixel_conv.h, PixelConvArguments
PANEL = 16  # csrc/panel.h


def why_not(
    pixels: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, relu: bool
) -> str | None:
    floats = (mean, std, weight, bias)
    if any(t.device.type != "cpu" for t in (pixels, *floats)):
        return f"needs CPU tensors, got {', '.join(sorted({t.device.type for t in (pixels, *floats)}))}"
    if pixels.dtype != torch.uint8 or any(t.dtype != torch.float32 for t in floats):
        names = [str(t.dtype).removeprefix("torch.") for t in (pixels, *floats)]
        return f"takes pixels in uint8 and the rest in float32, got {names[0]} and {', '.join(sorted({*names[1:]}))}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in floats):
        return "has no backward, and gradients are wanted"
    if torch.compiler.is_compiling():
        return "is not traced"
    if len(weight) % PANEL or len(weight) == 0:
        return f"takes multiples of {PANEL} output channels, got {len(weight)}"
    return native.why_not()


def run(
    pixels: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, relu: bool
) -> Tensor:
    n, channels, height, width = pixels.shape
    outputs, side = len(weight), weight.shape[-1]
    rows, columns = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    pixels = pixels.contiguous()
    mean, std, weight, bias = (plain(t) for t in (mean, std, weight, bias))
    y = weight.new_empty((n, rows, columns, outputs)).permute(0, 3, 1, 2)
    status = native.function("longllava_pixel_conv")(
        FIELDS.pack(
            FIELDS.size, n, channels, height, width, outputs, side, stride, padding, torch.get_num_threads(),
            pixels.data_ptr(), mean.data_ptr(), std.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), relu,
        )
    )  # fmt: skip
    native.succeed(status, "pixel_conv")
    return y
