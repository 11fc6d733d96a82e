"""What backends of packages that may be missing or broken share: each is tried once on the GPU before it is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longllava.errors import BackendError

BEYOND_UINT32 = 2**32  # elements; their kernels count in 32 bits and go on with a wrong address, without a word

_verdicts: dict[str, str | None] = {}


def why_not(package: str, first_call: Callable[[torch.device], object], **tensors: Tensor | None) -> str | None:
    """None when every tensor is on a GPU, of a dtype that all such kernels take, and `first_call` has once worked
    there. Its answer is kept for the life of the process."""
    for name, x in tensors.items():
        if x is not None and x.device.type != "cuda":
            return f"needs CUDA tensors, got {name} on {x.device.type}"
    device = next(x.device for x in tensors.values() if x is not None)
    if package not in _verdicts:
        mend = "pip install --no-build-isolation 'longllava[cuda]'"
        _verdicts[package] = tried(package, first_call, device, mend)
    return _verdicts[package]


def tried(package: str, first_call: Callable[[torch.device], object], device: torch.device, mend: str) -> str | None:
    """None when the call works on the device, else what went wrong, and what to do. Raises: BackendError while a CUDA
    graph is captured, where no answer could be had, and the wrong one would be kept."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise BackendError(
            f"{package} has not been tried yet, and cannot be while a CUDA graph is captured; make the call once before"
        )
    try:
        first_call(device)
        torch.cuda.synchronize(device)
    except ModuleNotFoundError as error:
        return f"{package} is not installed, or was built without its kernels ({error}); {mend}"
    except Exception as error:  # whatever a foreign binary raises, the sentence says it
        first_line = (str(error).splitlines() or [""])[0]
        return f"{package} is installed and fails: {type(error).__name__}: {first_line}; {mend}"
    return None


def reach(x: Tensor) -> int:
    """Elements from x's first to one past its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
