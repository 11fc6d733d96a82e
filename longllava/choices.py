"""What callers say about devices and dtypes, checked. Torch loads when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from longllava.config import Int8Config
from longllava.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def checked_map(
    device_map: str | Mapping[str, str | torch.device] | None, device: str | torch.device | None
) -> str | dict[str, str] | None:
    if device_map is not None and device is not None:
        raise InputError("device and device_map: give one of them")
    if device_map is None or isinstance(device_map, str):
        return device_map
    if not isinstance(device_map, Mapping):
        raise InputError(f"device_map: got {device_map!r}, allowed: 'auto' or a table such as {{'': 'cuda:0'}}")
    return {key: str(checked_device(on)) for key, on in device_map.items()}


def checked_device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: got {device!r}, allowed: cpu, cuda, cuda:1 ...") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: got {device!r}, but torch sees no GPU; use device='cpu'")
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"device: got {device!r}, allowed: cpu, cuda, cuda:1 ...")
    return target


def checked_dtype(dtype: str | torch.dtype | None, device: torch.device | None) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.bfloat16 if device is not None and multiplies_bf16(device) else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    return getattr(torch, name)


def checked_int8(int8: bool | Int8Config) -> Int8Config | None:
    if isinstance(int8, bool):
        return Int8Config() if int8 else None
    if not isinstance(int8, Int8Config):
        raise InputError(f"int8: got {int8!r}, expected True, False or an Int8Config")
    return int8


def checked_kv_dtype(kv_dtype: str | None) -> bool:
    if kv_dtype not in (None, "int8"):
        raise InputError(f"kv_dtype: got {kv_dtype!r}, allowed: int8, or None for the model's own")
    return kv_dtype == "int8"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware: on these CPUs they are four times as fast as float32."""
    if device.type == "cuda":
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags
