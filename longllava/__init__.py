"""Multimodal language models that look at a thousand images at once on one device.

`import longllava` takes milliseconds: torch and transformers load when a name below is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from longllava.heap import keep_freed
from longllava.version import __version__

# Torch's threads, when they have nothing to do, spin for milliseconds on cores that another process could use: two
# prompts at once on two cores take 7.5 s each, and 3.7 s where waiting threads sleep; one alone takes up to 1.08 times
# as long as with spinning ones. Heeded where torch is imported later than this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
keep_freed()

if TYPE_CHECKING:
    from longllava.api import LongLLaVA
    from longllava.config import Int8Config, ModelConfig
    from longllava.errors import LongLLaVAError
    from longllava.quant import quantize_

__all__ = ["Int8Config", "LongLLaVA", "LongLLaVAError", "ModelConfig", "__version__", "quantize_"]

HOMES = {
    "Int8Config": "longllava.config",
    "LongLLaVA": "longllava.api",
    "LongLLaVAError": "longllava.errors",
    "ModelConfig": "longllava.config",
    "quantize_": "longllava.quant",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'longllava' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
