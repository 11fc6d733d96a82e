"""How much memory a device has, and how much of it is free. LONGLLAVA_MEMORY=80GB says so instead of the system."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from longllava.errors import ConfigError

if TYPE_CHECKING:
    import torch

VARIABLE = "LONGLLAVA_MEMORY"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip
MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # a container's own limit, where there is one
UNLIMITED = 1 << 60  # the first version of control groups says "none" with a number beyond this


def parse_size(text: str, name: str = VARIABLE) -> int:
    """ "80GB" in bytes. Raises: ConfigError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"{name}: got {text!r}, expected a size such as 80GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def sized(n_bytes: int) -> str:
    """For people: "16.6 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"


def free_bytes(device: torch.device | str) -> int | None:
    """What can still be allocated there; None where no one knows (neither Linux nor CUDA)."""
    if said := os.environ.get(VARIABLE):
        return parse_size(said)
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_on_host() if device.type == "cpu" else None


def free_on_host() -> int | None:
    """As Linux estimates it, swap included, or what a container's limit leaves, if that is less."""
    try:
        lines = [line.split() for line in MEMINFO.read_text("ascii").splitlines()]
        known = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
        free = known["MemAvailable:"] + known.get("SwapFree:", 0)
    except (OSError, ValueError, KeyError):
        return None
    return min([free, *left_in_group()])


def left_in_group() -> list[int]:
    names = (("memory.max", "memory.current"),
             ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # fmt: skip
    for limit, used in names:
        try:
            limit_bytes, used_bytes = (int((GROUP / name).read_text("ascii")) for name in (limit, used))
            statistics = (GROUP / limit).with_name("memory.stat").read_text("ascii").split()
        except (OSError, ValueError):  # no such group, or "max"
            continue
        # files that were read once are given up first, and are not in the way
        cached = int(statistics[statistics.index("inactive_file") + 1]) if "inactive_file" in statistics else 0
        if limit_bytes < UNLIMITED:
            return [max(0, limit_bytes - used_bytes + cached)]
    return []
