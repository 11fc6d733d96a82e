"""The encoder's passes on an NVIDIA GPU by Triton kernels.

Int8 output has the bits that quantising the float output would have: the same kernels in the same shape, without fusion
of multiply and add, which the rule of int8 rows forbids. In fp32 a norm's threads hold more numbers for it, and add
them in another order: there the last bits may differ.

The product with its activation: 36,928 rows (64 pictures), 1,024 inputs, 4,096 outputs in bf16 take 0.515 ms on an
H100, where cuBLAS takes 0.432 and quick_gelu in its own pass 0.197 more (benchmarks/results/encoder-h100.json).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.triton_support import OPTIONS, rowed

MAX_WIDTH = 16384  # of a row that one program holds in registers
BLOCK = 4096  # elements of a program of activate_
UNFUSED = {**OPTIONS, "enable_fp_fusion": False}
TILE_ROWS, TILE_OUTPUTS, TILE_INPUTS = 128, 256, 64  # of linear_activated
LEAST_TILES = 512  # 4,096 rows of 4,096 outputs: four rounds of an H100. Fewer were not measured
SHARED_BYTES = 180_248  # three tiles of inputs in flight and half a tile on its way out


def why_not_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, quantized: bool = False
) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, delta, weight, bias)):
        return "has no backward, and gradients are wanted"
    return _why_not(x) or _too_wide(x)


def why_not_activation(x: Tensor, activation: str, quantized: bool = False) -> str | None:
    return _why_not(x) or (_too_wide(x) if quantized else None)


def why_not_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> str | None:
    if torch.compiler.is_compiling():
        return "is not traced"
    if (reason := triton_support.why_not(x=x, weight=weight, bias=bias)) is not None:
        return reason
    if x.dtype == torch.float32 or any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, weight, bias) if t is not None)
        return f"takes one dtype, bfloat16 or float16, got {dtypes}"
    n_outputs, n_inputs = weight.shape
    if n_outputs % 8 or n_inputs % 8 or n_inputs == 0 or any(t.data_ptr() % 16 for t in (x, weight)):
        return f"takes rows that begin at multiples of 16 bytes, got {n_inputs} inputs and {n_outputs} outputs"
    n_tiles = -(-x.shape[:-1].numel() // TILE_ROWS) * -(-n_outputs // TILE_OUTPUTS)
    if n_tiles < LEAST_TILES:
        return f"takes {LEAST_TILES} tiles of {TILE_ROWS} rows x {TILE_OUTPUTS} outputs at least, got {n_tiles}"
    if not _has_room(x.device):
        return f"needs Hopper's tensor memory accelerator and {SHARED_BYTES} bytes of shared memory a block"
    return None


@functools.lru_cache
def _has_room(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED_BYTES


def _too_wide(x: Tensor) -> str | None:
    return f"takes rows of at most {MAX_WIDTH}, got {x.shape[-1]}" if x.ndim and x.shape[-1] > MAX_WIDTH else None


def _why_not(x: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "is not traced"
    return triton_support.why_not(x=x)


def add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, quantized: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    from longllava.ops.vision.triton_kernels import add_layer_norm as kernel

    x, delta = x.contiguous(), delta.contiguous()
    total = torch.empty_like(x)
    y, scale = _int8_outputs(x) if quantized else (torch.empty_like(x), None)
    width = x.shape[-1]
    if y.numel():
        block, rows, warps = norm_shape(width)
        n_rows = x.numel() // width
        with torch.cuda.device_of(x):
            kernel[(-(-n_rows // rows),)](
                x, delta, weight.contiguous(), bias.contiguous(), y, scale, total, n_rows, float(eps), WIDTH=width,
                ROWS=rows, BLOCK=block, num_warps=warps, **UNFUSED,
            )  # fmt: skip
    return y, scale, total


def activate_(x: Tensor, activation: str) -> Tensor:
    from longllava.ops.vision.triton_kernels import activate as kernel

    flat = x if x.is_contiguous() else x.contiguous()
    if flat.numel():
        with torch.cuda.device_of(x):
            kernel[(-(-flat.numel() // BLOCK),)](
                flat, flat.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=8, **UNFUSED
            )
    return x if flat is x else x.copy_(flat)


def activated_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from longllava.ops.vision.triton_kernels import activated_rows as kernel

    values, scale = _int8_outputs(x)
    if x.numel():
        width = x.shape[-1]
        rows_TF = rowed(x.reshape(-1, width))
        block, rows, warps = rows_shape(width)
        with torch.cuda.device_of(x):
            kernel[(-(-len(rows_TF) // rows),)](
                rows_TF, values, scale, len(rows_TF), rows_TF.stride(0), ACTIVATION=activation, WIDTH=width, ROWS=rows,
                BLOCK=block, num_warps=warps, **UNFUSED,
            )  # fmt: skip
    return values, scale


def linear_activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from longllava.ops.vision.triton_kernels import linear_activated as kernel

    n_outputs, n_inputs = weight.shape
    x_MK = x.reshape(-1, n_inputs).contiguous()
    y_MN = x.new_empty((len(x_MK), n_outputs))
    n_tiles = -(-len(x_MK) // TILE_ROWS) * -(-n_outputs // TILE_OUTPUTS)
    n_programs = min(n_tiles, triton_support.n_processors(x.device))
    x_tiles = TensorDescriptor.from_tensor(x_MK, [TILE_ROWS, TILE_INPUTS])
    weight_tiles = TensorDescriptor.from_tensor(weight.contiguous(), [TILE_OUTPUTS, TILE_INPUTS])
    y_tiles = TensorDescriptor.from_tensor(y_MN, [TILE_ROWS, TILE_OUTPUTS // 2])
    with torch.cuda.device_of(x):
        kernel[(n_programs,)](
            x_tiles, weight_tiles, None if bias is None else bias.contiguous(), y_tiles, len(x_MK), n_outputs,
            n_programs, K=n_inputs, ACTIVATION=activation, BLOCK_M=TILE_ROWS, BLOCK_N=TILE_OUTPUTS,
            BLOCK_K=TILE_INPUTS, GROUP=8, WHOLE=n_outputs % TILE_OUTPUTS == 0, num_warps=8, num_stages=3, **OPTIONS,
        )  # fmt: skip
    return y_MN.view(*x.shape[:-1], n_outputs)


def norm_shape(width: int) -> tuple[int, int, int]:
    """(numbers, rows, warps) of a program: 1,024 numbers at least, 8 a thread, 32 a thread at most for wide rows."""
    block = _power_of_two(width)
    return block, max(1, 1024 // block), max(4, min(16, block // 256))


def rows_shape(width: int) -> tuple[int, int, int]:
    """As norm_shape, with 16 numbers a thread."""
    block = _power_of_two(width)
    return block, max(1, 2048 // block), max(4, min(16, block // 512))


def _power_of_two(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


def _int8_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """values and scale; rows of no numbers have scale 1."""
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale if x.shape[-1] else scale.fill_(1)
