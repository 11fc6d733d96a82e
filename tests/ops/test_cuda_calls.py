"""Calls at the edges of what the CUDA backends take: tensors that lie oddly, elsewhere, or on GPUs with less memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.causal_conv1d import cuda as conv
from longllava.ops.causal_conv1d import reference as conv_reference
from longllava.ops.selective_scan import cases as scan_cases
from longllava.ops.selective_scan import cuda as scan
from longllava.ops.selective_scan import reference as scan_reference
from tests.ops.emulation import emulated
from tests.ops.parity import assert_matches, poison_empty


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_empty(monkeypatch)
    with emulated(monkeypatch):
        yield


@pytest.mark.parametrize(("op", "reference", "cases"), [
    (scan, scan_reference, scan_cases), (conv, conv_reference, conv_cases),
], ids=("scan", "convolution"))  # fmt: skip
def test_seq_idx_may_lie_column_by_column(op, reference, cases, on_cpu) -> None:
    args = list(replace(cases.PLAIN, batch=3, length=40, packing="wild").inputs())
    at = cases.NAMES.index("seq_idx")
    args[at] = args[at].t().contiguous().t()
    assert_matches(op.run, reference.run, cases.NAMES, args, 2e-6)
