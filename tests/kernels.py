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


FORMS = ("portable", "avx2", "avx512", "avx512 without tiles")


def run_in_form(form: str, code: str) -> None:
    """Python code in a process whose kernels are of that form, one of FORMS. Skips where it cannot be."""
    isa, _, without = form.partition(" without ")
    code += f"from longllava.ops import native; assert native.isa() == {isa!r}\n"
    environment = os.environ | {"LONGLLAVA_ISA": isa, "LONGLLAVA_AMX": "0" if without else "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "this processor runs" in done.stderr:
        pytest.skip(f"this processor does not run {form}")
    assert done.returncode == 0, done.stderr[-3000:]
