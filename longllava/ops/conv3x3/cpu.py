"""The convolution on the CPU by the compiled kernels (csrc/conv3x3*): a quarter of the products."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import address, plain

FIELDS = struct.Struct("@13q")  # csrc/conv3x3.h, Conv3x3Arguments
PANEL = 16  # csrc/panel.h
LEAST_CHANNELS = 32  # with 16 the transforms take as long as the products they save (two Zen 3 cores)
MANY_WEIGHTS = 128 * 128  # pairs of channels from which transforming the weights, 4 times as large then, is no trifle
MANY_TILES = 256  # of 4 x 4 outputs, which pay for that: 256 x 256 channels, 128 tiles 0.99 of torch's time, 512 0.64


def why_not(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> str | None:
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    if any(t.device.type != "cpu" for t in tensors):
        return f"needs CPU tensors, got {', '.join(sorted({t.device.type for t in tensors}))}"
    if any(t.dtype != torch.float32 for t in tensors):
        return f"takes float32, got {', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors}))}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "has no backward, and gradients are wanted"
    if torch.compiler.is_compiling():
        return "is not traced"
    outputs, inputs = weight.shape[:2]
    if inputs % PANEL or outputs % PANEL or min(inputs, outputs) < LEAST_CHANNELS:
        return f"takes multiples of {PANEL} channels from {LEAST_CHANNELS} on, got {inputs} and {outputs}"
    n_tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    if inputs * outputs > MANY_WEIGHTS and n_tiles < MANY_TILES:
        return f"is slower than torch for {inputs} x {outputs} channels and {n_tiles} tiles of 4 x 4 pixels"
    return native.why_not()


def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    n, inputs, height, width = x.shape
    outputs = len(weight)
    layout = torch.channels_last
    x = x.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    y = x.new_empty((n, height, width, outputs)).permute(0, 3, 1, 2)
    weight, bias = plain(weight), plain(bias)
    status = native.function("longllava_conv3x3")(
        FIELDS.pack(
            FIELDS.size, n, height, width, inputs, outputs, torch.get_num_threads(), x.data_ptr(), weight.data_ptr(),
            bias.data_ptr(), address(residual), y.data_ptr(), relu,
        )
    )  # fmt: skip
    native.succeed(status, "conv3x3")
    return y
