"""Loads the compiled CUDA kernels, `longllava/lib/liblongllava_cuda.so`, built from csrc/*.cu by csrc/build.py.

Like the CPU library it has a plain C interface and knows nothing of torch. It holds code for sm_80 and sm_90, and for
what comes after them a form that the driver compiles when it is first used.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longllava.errors import BackendError
from longllava.ops import upstream_support
from longllava.ops.dispatch import constant_when_traced

PATH = Path(__file__).resolve().parent.parent / "lib" / "liblongllava_cuda.so"
ABI = 7  # csrc/trial.cu holds the same number; raise both when the C interface changes
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/device.cuh
DEVICE = "cuda"  # tests set "cpu" and load the kernels' emulation
REBUILD = "run `LONGLLAVA_CUDA=1 python csrc/build.py` in a clone, where nvcc is on PATH"


def why_not(others: dict[str, Tensor | None], **tensors: Tensor | None) -> str | None:
    """None when the kernels can run on these tensors, else one sentence. others: of any dtype, on the same GPU."""
    for name, x in tensors.items():
        if x is not None and x.device.type != DEVICE:
            return f"needs CUDA tensors, got {name} on {x.device.type}"
        if x is not None and x.dtype not in DTYPES:
            return f"takes float32, bfloat16 or float16, got {name} in {str(x.dtype).removeprefix('torch.')}"
    return elsewhere(**tensors, **others) or missing()


def elsewhere(**tensors: Tensor | None) -> str | None:
    """A sentence where not all are on one device: a kernel is given addresses, and a wrong one ends the process."""
    there = [(name, x) for name, x in tensors.items() if x is not None]
    first = there[0][1].get_device()
    for name, x in there:
        if x.get_device() != first:
            return f"takes tensors on one device, got {name} on {x.device} and {there[0][0]} on {there[0][1].device}"
    return None


@constant_when_traced
def missing() -> str | None:
    """None where the kernels are built, fit this package and have once run on the GPU; else a sentence."""
    return _loaded()[1]


@functools.lru_cache(maxsize=1)
def _loaded() -> tuple[Any, str | None]:
    if not PATH.exists():
        return None, f"the CUDA kernels are not built ({PATH}); {REBUILD}"
    try:
        library = ctypes.CDLL(str(PATH))
        abi = library.longllava_cuda_abi()
    except (OSError, AttributeError) as error:
        return None, f"the CUDA kernels cannot be loaded ({error}); {REBUILD}"
    if abi != ABI:
        return None, f"the CUDA kernels speak interface {abi}, this longllava needs {ABI}; {REBUILD}"
    library.longllava_cuda_error.restype = ctypes.c_char_p
    if DEVICE == "cuda":
        mend = "they need an Ampere GPU or a newer one, and a driver for CUDA 13 or newer"
        first_call = functools.partial(_try, library)
        reason = upstream_support.tried("the CUDA library", first_call, torch.device("cuda"), mend)
        if reason is not None:
            return None, reason
    return library, None


def _try(library: Any, device: torch.device) -> None:
    x = torch.zeros(1, device=device)
    code = library.longllava_cuda_trial(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(stream(x)))
    if code:
        raise RuntimeError(library.longllava_cuda_error(code).decode())
    if x.item() != 1:
        raise RuntimeError("a kernel ran and wrote nothing")


def has(name: str) -> bool:
    """Whether the library holds an entry: those for one kind of GPU are left out where it was not built for it."""
    return hasattr(_loaded()[0], name)


@functools.lru_cache
def function(name: str) -> Any:
    """An entry that takes the address of its arguments' struct. Raises BackendError without a library."""
    library, reason = _loaded()
    if library is None:
        raise BackendError(str(reason))
    entry = getattr(library, name)
    entry.argtypes = [ctypes.c_char_p]
    return entry


@functools.lru_cache
def constant(name: str, *of: int) -> int:
    """A number that the library states by a function of small integers. Raises BackendError without a library."""
    library, reason = _loaded()
    if library is None:
        raise BackendError(str(reason))
    entry = getattr(library, name)
    entry.restype = ctypes.c_int64
    return int(entry(*of))


def succeed(code: int, op: str) -> None:
    """Turn an entry's return code into an exception."""
    if code < 0:
        raise BackendError(f"{op}: the CUDA kernels are of another version; {REBUILD}")
    if code:
        words = _loaded()[0].longllava_cuda_error(code).decode()
        raise BackendError(f"{op}: a CUDA kernel could not be launched: {words}")


def stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor | None) -> tuple[int, int, int]:
    """The fields of Rows in csrc/device.cuh: address, stride of the batch and of a token in elements."""
    if x is None:
        return 0, 0, 0
    batch_stride, step, _ = x.stride()
    return x.data_ptr(), batch_stride, step


def rowed(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`x` itself if it is of `dtype`, its last axis contiguous and its tokens at most 1 GB apart, else such a copy."""
    if x is None:
        return None
    if x.dtype is not dtype:  # `to` that has nothing to do costs as much as all else here
        x = x.to(dtype)
    *_, step, column = x.stride()
    return x if (column == 1 or x.shape[-1] <= 1) and step < 2**28 else x.contiguous()


def plain(x: Tensor | None) -> Tensor | None:
    """`x` itself if it is contiguous fp32 at an address that 16 divides, else a copy that is."""
    if x is None:
        return None
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def is_wide(n_bytes: int, *tensors: Tensor | None) -> bool:
    """Whether every row of the (B, L, columns) tensors can be read `n_bytes` at a time, a power of two."""
    for x in tensors:
        if x is not None and x.numel():
            (batch, length, columns), (batch_stride, step, _) = x.shape, x.stride()
            elements = columns | (batch_stride if batch > 1 else 0) | (step if length > 1 else 0)
            if (x.data_ptr() | elements * x.element_size()) % n_bytes:
                return False
    return True


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The tensors' dtype where they agree, else fp32, which holds all of them exactly."""
    found = {x.dtype for x in tensors if x is not None}
    return found.pop() if len(found) == 1 else torch.float32


@functools.lru_cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the emulation."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
