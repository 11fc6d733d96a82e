"""Int8 linear layers on an NVIDIA GPU by Triton kernels.

Mode "dynamic": rows are quantised in one pass, then multiplied on int8 tensor cores, scales and bias at the end of each
tile. Mode "weight_only", up to FEW_ROWS rows: int8 weights are read once and widened in registers; sums over parts of K
are added in a fixed order. More rows than that are multiplied by dequantised weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.dispatch import without_autocast
from longllava.ops.few_rows import triton as few_rows_triton
from longllava.ops.int8_linear import reference
from longllava.ops.triton_support import DTYPES, OPTIONS, rowed

FEW_ROWS = 64  # in mode "weight_only"
ROW_BLOCK = 16384  # numbers of a row that a program holds
MAX_ROTATED = 32768  # and where all of a row has to be held
FEW_OUTPUTS, FEW_INPUTS = 64, 128  # a block of weights in mode "weight_only": 8 KB, five programs a processor
PROGRAMS_WANTED = 4  # a processor, in mode "weight_only"
UNFUSED = {**OPTIONS, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Tiles:
    """How `product` is launched. described: tiles are fetched by the tensor memory accelerator (sm_90 and later)."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    described: bool = True
    persistent: bool = True
    flatten: bool = True  # the next tile's first loads are under way while a tile ends


WIDE = Tiles()
NARROW = Tiles(64, 128, 128, warps=4, stages=4)  # up to 64 rows, or where WIDE leaves half of the processors idle
# What `benchmarks/int8.py --tune` tries.
CANDIDATES = (
    WIDE,
    Tiles(stages=4),
    Tiles(flatten=False),
    Tiles(persistent=False, flatten=False),
    Tiles(256, 128),
    Tiles(128, 128, stages=4),
    Tiles(128, 128, warps=4, stages=4),
    Tiles(128, 256, 64, stages=4),
    Tiles(described=False, flatten=False),
    Tiles(described=False, persistent=False, flatten=False),
    Tiles(128, 128, warps=4, stages=4, described=False, persistent=False, flatten=False),
    Tiles(group=4),
    Tiles(group=16),
)


def why_not(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    if x.dtype == torch.int8:
        x = weight  # values that are quantised already: weights are int8 too
    elif x.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got x in {str(x.dtype).removeprefix('torch.')}"
    return _elsewhere(x, "x") or _elsewhere(weight, "weight") or triton_support.missing()


def why_not_quantize(x: Tensor, absmax: Tensor | None = None, rotated: bool = False) -> str | None:
    if rotated and x.shape[1] > MAX_ROTATED:
        return f"rotates rows of at most {MAX_ROTATED}, got {x.shape[1]}"
    return triton_support.why_not(x=x, absmax=absmax)


def why_not_rotate(x: Tensor) -> str | None:
    return why_not_quantize(x, None, True)


def _elsewhere(x: Tensor, name: str) -> str | None:
    if x.device.type == "cuda" or (triton_support.interpreted() and x.device.type == "cpu"):
        return None
    return f"needs CUDA tensors, got {name} on {x.device.type}"


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    y = x.new_empty((x.shape[0], weight.shape[-2]), dtype=dtype)
    if y.numel() == 0:
        return y
    if x.shape[1] == 0:
        return reference.run(x, weight, scale, bias, x_scale, offsets, mode, dtype)
    weight, scale = weight.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        if mode == "weight_only" and x.shape[0] > FEW_ROWS:
            return _widened(x, weight, scale, bias, offsets, y)
        if mode == "weight_only":
            return _few_rows(rowed(x), weight, scale, bias, offsets, y)
        if x_scale is None:
            x, x_scale = quantize_rows(x)
        return _product(x.contiguous(), x_scale.contiguous(), weight, scale, bias, offsets, y, tiles)


def quantize_rows(x: Tensor, absmax: Tensor | None = None, rotated: bool = False) -> tuple[Tensor, Tensor]:
    from longllava.ops.int8_linear.triton_kernels import quantize_rows as kernel
    from longllava.ops.triton_rotate import rotate

    n_rows, n_inputs = x.shape
    values = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((n_rows,), dtype=torch.float32)
    if rotated:
        rotate(x, None, values, scale)
        return values, scale
    if n_inputs == 0:
        return values, scale.fill_(1)
    if n_rows == 0:
        return values, scale
    x = rowed(x)
    block = min(ROW_BLOCK, _power_of_two(n_inputs))
    rows = max(1, 1024 // block)
    with torch.cuda.device_of(x):
        kernel[(-(-n_rows // rows),)](
            x, None if absmax is None else absmax.contiguous(), values, scale, n_rows, x.stride(0),
            K=n_inputs, ROWS=rows, BLOCK=block, num_warps=max(4, min(16, block // 1024)), **UNFUSED,
        )  # fmt: skip
    return values, scale


def rotate_rows(x: Tensor) -> Tensor:
    from longllava.ops.triton_rotate import rotate

    y = x.new_empty(x.shape)
    rotate(x, None, y, None)
    return y


def choose_tiles(n_rows: int, n_outputs: int, n_inputs: int, aligned: bool, device: torch.device) -> Tiles:
    """WIDE where it fills the processors, else NARROW. aligned: the accelerator can fetch tiles."""
    processors = triton_support.n_processors(device)
    enough = -(-n_rows // WIDE.block_m) * -(-n_outputs // WIDE.block_n) * 2 > processors
    chosen = WIDE if n_rows > 64 and enough and _roomy(device) else NARROW
    described = aligned and _has_accelerator(device)
    if described and n_inputs >= chosen.block_k:
        return chosen
    return Tiles(
        chosen.block_m, chosen.block_n, min(chosen.block_k, max(32, _power_of_two(n_inputs))), warps=chosen.warps,
        stages=chosen.stages if _roomy(device) else 2, described=False, flatten=False,
    )  # fmt: skip


def _product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    y: Tensor,
    tiles: Tiles | None,
) -> Tensor:
    from longllava.ops.int8_linear.triton_kernels import product

    n_rows, n_inputs = x.shape
    n_experts, n_outputs = (1 if offsets is None else weight.shape[0]), weight.shape[-2]
    weight_2d = weight.view(n_experts * n_outputs, n_inputs)
    aligned = n_inputs % 16 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    tiles = tiles or choose_tiles(n_rows, n_outputs, n_inputs, aligned, x.device)
    n_tiles = (-(-n_rows // tiles.block_m) + n_experts - 1) * -(-n_outputs // tiles.block_n)
    n_programs = min(n_tiles, triton_support.n_processors(x.device)) if tiles.persistent else n_tiles
    # fp32 on its way out takes 128 KB, which leaves the next tile's loads no room. Where one step makes a tile, Triton
    # lets tiles overlap by itself: two stages have room then
    wide = y.element_size() == 4
    flatten = tiles.flatten and offsets is None and not wide
    n_stages = 2 if wide and n_inputs <= tiles.block_k else tiles.stages
    product[(n_programs,)](
        _tiled(x, tiles.block_m, tiles), _tiled(weight_2d, tiles.block_n, tiles), x_scale, scale, bias, offsets, y,
        n_rows, n_outputs, n_programs, y.stride(0), K=n_inputs, EXPERTS=n_experts, PADDED=_power_of_two(n_experts),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP=tiles.group,
        DESCRIBED=tiles.described, FLATTEN=flatten,
        num_warps=tiles.warps, num_stages=n_stages, **OPTIONS,
    )  # fmt: skip
    return y


def _tiled(x: Tensor, height: int, tiles: Tiles) -> Any:
    if not tiles.described:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [height, tiles.block_k])


def _few_rows(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, offsets: Tensor | None, y: Tensor
) -> Tensor:
    from longllava.ops.int8_linear.triton_kernels import few_rows, finish

    if offsets is None and x.shape[0] <= few_rows_triton.MAX_ROWS:  # too few for a tensor core's tile
        return few_rows_triton.product(x, weight, scale, bias)
    n_rows, n_inputs = x.shape
    n_experts, n_outputs = (1 if offsets is None else weight.shape[0]), weight.shape[-2]
    block_k = min(FEW_INPUTS, max(16, _power_of_two(n_inputs)))
    across = -(-n_outputs // FEW_OUTPUTS)
    # of the experts no more than the rows are read
    programs = across * min(n_experts, n_rows)
    wanted = PROGRAMS_WANTED * triton_support.n_processors(x.device) // programs
    n_splits = max(1, min(wanted, -(-n_inputs // (4 * block_k))))
    span = -(-n_inputs // (n_splits * block_k)) * block_k
    n_splits = max(1, -(-n_inputs // span))
    whole = n_splits == 1
    parts = y if whole else y.new_empty((n_splits, *y.shape), dtype=torch.float32)
    few_rows[(across, n_splits, n_experts)](
        x, weight, scale, bias, offsets, parts, n_rows, n_outputs, n_splits, span, x.stride(0),
        K=n_inputs, BLOCK_M=max(16, _power_of_two(n_rows)), BLOCK_N=FEW_OUTPUTS, BLOCK_K=block_k, WHOLE=whole,
        num_warps=4, num_stages=4 if _roomy(x.device) else 2, **OPTIONS,
    )  # fmt: skip
    if not whole:
        block = 256
        finish[(-(-n_outputs // block), n_rows)](
            parts, scale, bias, offsets, y, n_rows, n_outputs, SPLITS=n_splits, EXPERTS=n_experts,
            PADDED=_power_of_two(n_experts), BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y


@without_autocast
def _widened(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, offsets: Tensor | None, y: Tensor
) -> Tensor:
    """Weights in floats, which hold int8 exactly; scales after the product, in fp32."""
    if offsets is not None:
        ends = offsets.tolist()
        for expert, (start, end) in enumerate(zip(ends, ends[1:])):
            bias_N = None if bias is None else bias[expert]
            _widened(x[start:end], weight[expert], scale[expert], bias_N, None, y[start:end])
        return y
    # fp16 has no room for sums of products that are not yet scaled
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    product = (x.to(wide) @ weight.to(wide).T).float() * scale
    return y.copy_(product if bias is None else product + bias.float())


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache
def _has_accelerator(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _roomy(device: torch.device) -> bool:
    return triton_support.stages(device) == 3
