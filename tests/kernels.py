"""For tests of what only the compiled CPU kernels do: without a C++ compiler plain torch stands in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longllava.ops import native

ROOT = Path(__file__).resolve().parents[1]

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


def run_in_form(form: str, code: str) -> None:
    """Python code in a process whose kernels are of that form: portable, avx2 or avx512. Skips where it cannot be."""
    environment = os.environ | {"LONGLLAVA_ISA": form}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "this processor runs" in done.stderr:
        pytest.skip(f"this processor does not run {form}")
    assert done.returncode == 0, done.stderr[-3000:]
