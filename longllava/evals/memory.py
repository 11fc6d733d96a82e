"""Peak memory of this process: resident, or on the GPU when there is one in use."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peaks between two points. Where the system cannot forget an older peak (not Linux), it counts on."""

    def __init__(self) -> None:
        self.highest = 0

    def start(self) -> None:
        self.bytes()
        with contextlib.suppress(OSError):
            RESET.write_text("5")  # proc(5): VmHWM begins anew
        if (cuda := cuda_in_use()) is not None:
            cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """The peak since `start`; `highest` is that since the object, or on Linux the process, was made."""
        cuda = cuda_in_use()
        peak = resident_peak() if cuda is None else int(cuda.max_memory_allocated())
        self.highest = max(self.highest, peak)
        return peak


def resident_peak() -> int:
    """Bytes. VmHWM is this program's; ru_maxrss also counts the process before it became this program."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cuda_in_use() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
