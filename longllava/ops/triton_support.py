"""What the Triton backends share. Nothing here imports triton: it is an extra, and comes with torch's CUDA builds."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from longllava.ops import upstream_support
from longllava.ops.dispatch import constant_when_traced

OLDEST = (3, 6)  # tuples of tensors in kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Kernels are called with these: multiply and add become one instruction, as Triton did by itself up to 3.9.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def why_not(**tensors: Tensor | None) -> str | None:
    """None when Triton can run on these tensors, else one sentence. TRITON_INTERPRET=1 lets it run on a CPU."""
    for name, x in tensors.items():
        if x is not None and x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
            return f"needs CUDA tensors, got {name} on {x.device.type}"
        if x is not None and x.dtype not in DTYPES:
            return f"takes float32, bfloat16 or float16, got {name} in {str(x.dtype).removeprefix('torch.')}"
    return missing()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_traced
def missing() -> str | None:
    """None where a triton is installed that can compile these kernels and, with a GPU, has run one; else a sentence."""
    return _missing()


@functools.lru_cache(maxsize=1)
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'longllava[cuda]'"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"needs triton {OLDEST[0]}.{OLDEST[1]} or newer, got {version}; pip install -U triton"
    if interpreted() or not torch.cuda.is_available():
        return None
    from longllava.ops import triton_trial

    mend = "Triton needs a C compiler, and a triton that fits the driver: pip install -U triton"
    return upstream_support.tried("triton", triton_trial.run, torch.device("cuda"), mend)


def rowed(x: Tensor) -> Tensor:
    """`x` itself if its last axis is contiguous, as the kernels read it, else a copy that is."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def plain(x: Tensor | None) -> Tensor | None:
    """`x` itself if it is contiguous fp32, else a copy that is."""
    return None if x is None else x.to(torch.float32).contiguous()


@functools.lru_cache
def stages(device: torch.device) -> int:
    """Tiles in flight of a loop that goes through shared memory: three where a block may have 160 KB (A100, H100)."""
    if device.type != "cuda":
        return 3
    properties = torch.cuda.get_device_properties(device)
    return 3 if getattr(properties, "shared_memory_per_block_optin", 0) >= 160 * 1024 else 2


@functools.lru_cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
