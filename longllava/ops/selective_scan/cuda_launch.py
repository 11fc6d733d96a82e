"""How the scan's CUDA kernels are called: spans of time, buffers, the arguments' struct.

Time is walked serially where blocks of channels fill the GPU. Where they do not, it is cut into spans: one launch finds
what each span adds to an empty state, one carries the state from span to span, and a last one does the work. The
exponentials are then computed twice, so fewer than three spans would gain nothing.
"""

from __future__ import annotations

import functools
import os
import struct

import torch
from torch import Tensor

from longllava.errors import BackendError
from longllava.ops import native_cuda
from longllava.ops.dispatch import constant_when_traced
from longllava.ops.native_cuda import address, plain, rowed, rows
from longllava.ops.selective_scan.triton_launch import flags_of

MAX_STATES = 16
CHANNELS, CHUNK = 64, 32  # SCAN_CHANNELS and SCAN_CHUNK of csrc/selective_scan_cuda.cuh
MIN_SPAN = 128  # tokens: a shorter span does not pay for filling the pipeline of tiles twice
FIELDS = struct.Struct("@57q")  # ScanArguments there
NO_ROWS = (0, 0, 0)
NO_GRADIENTS = (*NO_ROWS, *[0] * 10)
# How y becomes int8, where int8.scan_epilogue asks the kernels for it. "maxima": the kernel writes y and each token's
# largest |y|, and a pass over y does the rest. "int8": its blocks wait for each other's maxima, and write int8. 36,000
# tokens of 8,192 channels on an H100: 2.7 and 5.5 ms, and 2.3 with a pass that finds the maxima itself, the default.
EPILOGUE = os.environ.get("LONGLLAVA_SCAN_EPILOGUE", "maxima")
# Whether the forward kernel may begin while the one ahead of it in the stream ends (Hopper's programmatic dependent
# launch), and then bring its first tiles into the second cache before it may read them. Not measured.
EARLY = os.environ.get("LONGLLAVA_SCAN_EARLY", "no")
EARLY_FIELDS = {"no": 0, "yes": 1, "prefetch": 2}  # Early of csrc/selective_scan_cuda.cuh


def epilogue() -> str:
    if EPILOGUE not in ("maxima", "int8"):
        raise BackendError(f"LONGLLAVA_SCAN_EPILOGUE: got {EPILOGUE!r}, allowed: maxima, int8; or unset it")
    return EPILOGUE


def early() -> int:
    if EARLY not in EARLY_FIELDS:
        raise BackendError(f"LONGLLAVA_SCAN_EARLY: got {EARLY!r}, allowed: {', '.join(EARLY_FIELDS)}; or unset it")
    return EARLY_FIELDS[EARLY]


def n_blocks(channels: int) -> int:
    return -(-channels // CHANNELS)


def spans(batch: int, length: int, channels: int, device: torch.device) -> tuple[int, int]:
    """(number of spans of time, tokens of each, a multiple of CHUNK)."""
    missing = native_cuda.n_processors(device) // max(1, batch * n_blocks(channels))
    wanted = min(missing, length // MIN_SPAN)
    wanted = wanted if wanted >= 3 else 1
    span = -(-max(1, length) // (wanted * CHUNK)) * CHUNK
    return -(-max(1, length) // span), span


def compute(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor | None,
    seq_idx: Tensor | None,
    end: Tensor,
    saved: Tensor | None,
    maxima: Tensor | None = None,
    int8: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y; the state after each row goes to `end`, which may be `state`, the states for backward to `saved`, the largest
    |y| of each token to `maxima` (B, L), fp32, which must hold zeros. With int8 rows (B, L, E) and their scales (B, L)
    these are written, and no y; `writes_int8` says where that is possible."""
    batch, length, channels = u.shape
    n_states = A.shape[1]
    dtype, wanted = native_cuda.common_dtype(u, delta, B, C, z), u.dtype
    y = u.new_empty(u.shape if int8 is None else (0, 0, 0), dtype=dtype)
    values, scales = (None, None) if int8 is None else int8
    arrived = None if int8 is None else u.new_zeros((batch, -(-length // CHUNK)), dtype=torch.int32)
    if u.numel() == 0:
        end.zero_() if state is None else end.copy_(state)
        return y.to(wanted)
    u, delta, B, C, z = (rowed(x, dtype) for x in (u, delta, B, C, z))  # type: ignore[assignment]
    parameters = [plain(x) for x in (A, D, delta_bias, state)]
    flags = flags_of(seq_idx)
    n_spans, span = spans(batch, length, channels, u.device)
    pieces = sums = None
    if n_spans > 1:
        pieces = u.new_empty((batch, n_spans, channels, n_states), dtype=torch.float32)
        sums = u.new_empty((batch, n_spans, channels), dtype=torch.float32)
    arguments = FIELDS.pack(
        FIELDS.size, native_cuda.DTYPES[dtype], batch, length, channels, n_states, delta_softplus, n_spans, span,
        is_wide(u, delta, B, C, z), CHANNELS, early(), native_cuda.stream(u),
        *rows(u), *rows(delta), *rows(z), *rows(B), *rows(C), *rows(y),
        *map(address, (*parameters, flags, end, saved, pieces, sums, maxima, values, scales, arrived)), *NO_GRADIENTS,
    )  # fmt: skip
    with torch.cuda.device_of(u):
        native_cuda.succeed(native_cuda.function("longllava_cuda_scan_forward")(arguments), "selective_scan")
    return y if dtype is wanted else y.to(wanted)


def is_wide(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, *more: Tensor | None) -> bool:
    """Whether the kernels may read rows of channels 16 bytes at a time, and all 16 states four at a time."""
    states = B.shape[2] == MAX_STATES and native_cuda.is_wide(4 * B.element_size(), B, C)
    return states and native_cuda.is_wide(16, u, delta, z, *more)


def writes_int8(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, seq_idx: Tensor | None) -> bool:
    """Whether the forward kernel can write y as int8. A token's blocks wait for each other, so that all blocks must be
    on the device at once, one a processor: a row of LongLLaVA-9B takes 128 of an H100's 132."""
    batch, length, channels = u.shape
    return (
        native_cuda.common_dtype(u, delta, B, C, z) in (torch.bfloat16, torch.float16)
        and seq_idx is None
        and length > 1
        and is_wide(u, delta, B, C, z)
        and 0 < batch * n_blocks(channels) <= native_cuda.n_processors(u.device)
        and spans(batch, length, channels, u.device)[0] == 1
        and shared_memory(u.device) >= native_cuda.constant("longllava_cuda_scan_int8_bytes")
    )


@functools.lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a block may have: an H100's for the emulation, an A100's where torch does not say."""
    if device.type != "cuda":
        return 227 * 1024
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 163 * 1024)


def backward_block(device: torch.device) -> int:
    """Channels of a block: 64 where its 190 KB of shared memory are to be had (H100), half of it elsewhere (A100)."""
    wanted = native_cuda.constant("longllava_cuda_scan_backward_bytes", CHANNELS)
    return CHANNELS if shared_memory(device) >= wanted else CHANNELS // 2


@constant_when_traced
def lacks_room(device: torch.device, dtype: torch.dtype, gradients: bool) -> str | None:
    """A sentence where the smallest blocks need more shared memory than there is. GPUs of capability 8.6, 8.9 and 12.0
    have 99 KB for a block: for 16 bits forward just enough."""
    return _lacks_room(device, dtype, gradients)


@functools.lru_cache
def _lacks_room(device: torch.device, dtype: torch.dtype, gradients: bool) -> str | None:
    number = native_cuda.DTYPES[dtype]
    wanted = {str(dtype).removeprefix("torch."): ("longllava_cuda_scan_forward_bytes", number)}
    if gradients:
        wanted["gradients"] = ("longllava_cuda_scan_backward_bytes", CHANNELS // 2)
    for what, of in wanted.items():
        if native_cuda.constant(*of) > shared_memory(device):
            return (
                f"needs {native_cuda.constant(*of)} bytes of shared memory for {what}, and {device} has "
                f"{shared_memory(device)} for a block"
            )
    return None


def gradients(
    grad_y: Tensor,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial state; zero-sized where there is no input."""
    batch, length, channels = u.shape
    n_states = A.shape[1]

    def fp32(*sizes: int) -> Tensor:
        return u.new_empty(sizes, dtype=torch.float32)

    grad_start = fp32(batch, channels, n_states)
    if u.numel() == 0:
        zeros = [fp32(0) if x is None else torch.zeros_like(x) for x in (u, delta, A, B, C, D, z, delta_bias)]
        first = grad_start.zero_() if grad_state is None else grad_state.to(torch.float32, copy=True)
        return (*zeros, first)  # type: ignore[return-value]
    dtype = native_cuda.common_dtype(u, delta, B, C, z, grad_y)
    rows_of = [rowed(x, dtype) for x in (u, delta, z, B, C)]
    grad_rows = rowed(grad_y, dtype)
    parameters = [plain(x) for x in (A, D, delta_bias)]
    end, flags = plain(grad_state), flags_of(seq_idx)
    n_spans, span = spans(batch, length, channels, u.device)
    block = backward_block(u.device)
    pieces = fp32(batch, n_spans, channels, n_states) if n_spans > 1 else None
    sums = fp32(batch, n_spans, channels) if n_spans > 1 else None
    grad_u, grad_delta = (u.new_empty(u.shape, dtype=dtype) for _ in range(2))
    grad_z = None if z is None else u.new_empty(u.shape, dtype=dtype)
    grad_A = fp32(batch, n_spans, channels, n_states)
    grad_D, grad_bias = (None if x is None else fp32(batch, n_spans, channels) for x in (D, delta_bias))
    grad_B, grad_C = (fp32(-(-channels // block), batch, length, n_states) for _ in range(2))
    first_u, first_delta, first_z, first_B, first_C = rows_of
    wide = is_wide(first_u, first_delta, first_B, first_C, first_z, grad_rows)  # type: ignore[arg-type]
    arguments = FIELDS.pack(
        FIELDS.size, native_cuda.DTYPES[dtype], batch, length, channels, n_states, delta_softplus, n_spans, span,
        wide, block, 0, native_cuda.stream(u), *(field for x in rows_of for field in rows(x)), *NO_ROWS,
        *map(address, (*parameters, None, flags, None, saved, pieces, sums, None, None, None, None)),
        *rows(grad_rows),
        *map(address, (grad_u, grad_delta, grad_z, end, grad_A, grad_D, grad_bias, grad_B, grad_C, grad_start)),
    )  # fmt: skip
    with torch.cuda.device_of(u):
        native_cuda.succeed(native_cuda.function("longllava_cuda_scan_backward")(arguments), "selective_scan")

    def total(grad: Tensor | None, x: Tensor | None, axes: int | tuple[int, int]) -> Tensor:
        return fp32(0) if grad is None or x is None else grad.sum(axes).to(x.dtype)

    return (
        grad_u.to(u.dtype),
        grad_delta.to(delta.dtype),
        total(grad_A, A, (0, 1)),
        total(grad_B, B, 0),
        total(grad_C, C, 0),
        total(grad_D, D, (0, 1)),
        fp32(0) if grad_z is None or z is None else grad_z.to(z.dtype),
        total(grad_bias, delta_bias, (0, 1)),
        grad_start,
    )
