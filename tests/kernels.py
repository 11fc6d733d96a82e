"""For tests of what only the compiled CPU kernels do: without a C++ compiler plain torch stands in."""

from __future__ import annotations

import pytest

from longllava.ops import native

needs_kernels = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
