"""Loads the compiled CPU kernels, `longllava/lib/liblongllava_cpu.so`, built from csrc/ by csrc/build.py.

The library has a plain C interface and knows nothing of torch, so one build serves every torch and Python.
Which instruction set it uses is chosen when it is loaded; LONGLLAVA_ISA=portable|avx2|avx512 forces one,
LONGLLAVA_AMX=0 forbids AMX, which int8 products and attention in bf16 use beside AVX-512.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch

from longllava.errors import BackendError
from longllava.ops.dispatch import constant_when_traced

PATH = Path(__file__).resolve().parent.parent / "lib" / "liblongllava_cpu.so"
ABI = 8  # csrc/isa.h holds the same number; raise both when the C interface changes
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in csrc/vector.h


_loaded: tuple[ctypes.CDLL | None, str | None] | None = None


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    global _loaded
    if _loaded is None:
        _loaded = _open()
    return _loaded


def _open() -> tuple[ctypes.CDLL | None, str | None]:
    rebuild = "run `python csrc/build.py` in a clone, or reinstall longllava where a C++ compiler is found"
    if not PATH.exists():
        return None, f"the compiled kernels are missing ({PATH}); {rebuild}"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return None, f"the compiled kernels cannot be loaded ({error}); {rebuild}"
    library.longllava_abi.restype = ctypes.c_int
    if (abi := library.longllava_abi()) != ABI:
        return None, f"the compiled kernels speak interface {abi}, this longllava needs {ABI}; {rebuild}"
    library.longllava_isa_error.restype = ctypes.c_char_p
    library.longllava_isa_name.restype = ctypes.c_char_p
    if (problem := library.longllava_isa_error()) is not None:
        raise BackendError(problem.decode())
    return library, None


def library() -> ctypes.CDLL:
    """The loaded library. Raises BackendError when there is none, or for an impossible LONGLLAVA_ISA."""
    loaded, reason = _load()
    if loaded is None:
        raise BackendError(str(reason))
    return loaded


@functools.lru_cache
def function(name: str) -> Any:
    """An entry that takes the address of its arguments' struct. Raises BackendError without a library."""
    entry = getattr(library(), name)
    entry.argtypes = [ctypes.c_char_p]
    return entry


@constant_when_traced
def why_not() -> str | None:
    """None when the kernels can be used, else one sentence. Raises for an impossible LONGLLAVA_ISA."""
    return _load()[1]


def isa() -> str:
    """The form of the kernels in use: 'portable', 'avx2' or 'avx512'."""
    return str(library().longllava_isa_name().decode())


def uses_amx() -> bool:
    """Whether int8 products and attention in bf16 go to AMX: the processor and the system have it, and LONGLLAVA_AMX is
    not 0."""
    return bool(library().longllava_uses_amx())


_said = False


def say_once_if_missing() -> None:
    """For the plain torch stand-ins: one line on stderr, once per process, when the kernels are missing."""
    global _said
    if not _said and not torch.compiler.is_compiling() and (reason := why_not()) is not None:
        _said = True
        logging.getLogger("longllava").warning("longllava runs its slower plain-torch code: %s", reason)


def readable(x_BLE: torch.Tensor) -> torch.Tensor:
    """`x` itself if the kernels can read it in place (fp32 or bf16, last stride 1), else a copy they can."""
    if x_BLE.dtype not in DTYPES:
        x_BLE = x_BLE.float()
    return x_BLE if x_BLE.stride(2) == 1 or x_BLE.shape[2] <= 1 else x_BLE.contiguous()


def plain(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`x` itself if it is contiguous and of `dtype`, else a copy that is."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def ids(seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    """seq_idx as the kernels read it, int32. Raises BackendError for a value that would become another one."""
    if seq_idx is None:
        return None
    found = plain(seq_idx, torch.int32)
    if found.dtype is not seq_idx.dtype and bool((found != seq_idx).any()):
        raise BackendError(
            f"the compiled kernels take seq_idx in 32 bits, got {seq_idx.min()} to {seq_idx.max()}; "
            "number the samples from 0"
        )
    return found


def rows(x_BLE: torch.Tensor | None) -> tuple[int, int, int, int]:
    """The fields of csrc/rows.h's Rows: address, element type, stride of batch and of token in elements."""
    if x_BLE is None:
        return 0, 0, 0, 0
    return address(x_BLE), DTYPES[x_BLE.dtype], x_BLE.stride(0), x_BLE.stride(1)


def address(x: torch.Tensor | None) -> int:
    """Where a kernel finds it, 0 for None. Raises BackendError for one that is not on the CPU."""
    if x is None:
        return 0
    if not x.is_cpu:
        raise BackendError(f"the compiled kernels need CPU tensors, got one on {x.device} beside others on the CPU")
    return x.data_ptr()


def succeed(status: int, op: str) -> None:
    """Turn a kernel's return code into an exception."""
    if status == 1:
        raise MemoryError(f"{op}: out of memory")
    if status:
        raise BackendError(f"{op}: the compiled kernels are of another version; run `python csrc/build.py`")
