"""Loads the compiled CPU kernels, `longllava/lib/liblongllava_cpu.so`, built from csrc/ by csrc/build.py.

The library has a plain C interface and knows nothing of torch, so one build serves every torch and Python.
Which instruction set it uses is chosen when it is loaded; LONGLLAVA_ISA=portable|avx2|avx512 forces one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

from longllava.errors import BackendError

PATH = Path(__file__).resolve().parent.parent / "lib" / "liblongllava_cpu.so"
ABI = 1  # csrc/isa.h holds the same number; raise both when the C interface changes


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
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


def why_not() -> str | None:
    """None when the kernels can be used, else one sentence. An impossible LONGLLAVA_ISA raises BackendError."""
    return _load()[1]


def isa() -> str:
    """The form of the kernels in use: 'portable', 'avx2' or 'avx512'."""
    return str(library().longllava_isa_name().decode())


@functools.lru_cache(maxsize=1)
def say_once_if_missing() -> None:
    """For the plain torch stand-ins: one line on stderr, once per process, when the kernels are missing."""
    if (reason := why_not()) is not None:
        logging.getLogger("longllava").warning("longllava runs its slower plain-torch code: %s", reason)
