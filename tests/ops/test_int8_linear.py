"""Int8 linear layers: exact integer sums, the rule of quantisation, gradients, every backend against the reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.dispatch import Backend
from longllava.ops.int8_linear import (
    BACKENDS,
    MAX_INPUTS,
    QUANTIZE_BACKENDS,
    Quantized,
    cases,
    int8_grouped_linear,
    int8_linear,
    quantize_rows,
    quantize_weight,
    reference,
    triton,
)
from tests.ops.parity import error, poison_empty
from tests.ops.test_triton import needs_interpreter

ROOT = Path(__file__).resolve().parents[2]


def available(backends: tuple[Backend, ...], *args) -> list[str]:
    return [backend.name for backend in backends if backend.why_not(*args) is None]


HERE = available(BACKENDS, *cases.CASES[0].inputs_of())
QUANTIZERS_HERE = available(QUANTIZE_BACKENDS, torch.ones(1, 1), None)


def rows_and_weights(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-128, 128, (rows, inputs)).to(torch.int8), torch.randint(-128, 128, (outputs, inputs)).to(torch.int8)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [
    (1, 1, 1), (1, 64, 16), (3, 63, 17), (7, 129, 33), (13, 256, 65), (12, 48, 32), (31, 7, 5), (2, 20_003, 3),
])  # fmt: skip
def test_sums_are_the_integers(rows: int, inputs: int, outputs: int, backend: str) -> None:
    values, weight = rows_and_weights(rows, inputs, outputs)
    truth = values.long() @ weight.long().T
    ones, x = torch.ones(outputs), Quantized(values, torch.ones(rows), torch.float32)
    assert torch.equal(int8_linear(x, weight, ones, backend=backend).long(), truth.float().long())


@pytest.mark.parametrize("backend", HERE)
def test_the_largest_sums_do_not_wrap(backend: str) -> None:
    for sign in (1, -1):
        x = Quantized(torch.full((5, MAX_INPUTS), -128, dtype=torch.int8), torch.ones(5), torch.float32)
        weight = torch.full((3, MAX_INPUTS), -128 if sign > 0 else 127, dtype=torch.int8)
        truth = float(-128 * int(weight[0, 0]) * MAX_INPUTS)
        assert abs(truth) < 2**31
        assert torch.equal(int8_linear(x, weight, torch.ones(3), backend=backend), torch.full((5, 3), truth))
    with pytest.raises(LongLLaVAError, match="may leave int32; at most 131071"):
        wide = torch.zeros(1, MAX_INPUTS + 1, dtype=torch.int8)
        int8_linear(torch.zeros(1, MAX_INPUTS + 1), wide, torch.ones(1))


@needs_interpreter
@pytest.mark.parametrize("part", ["product or tiles", "not product and not tiles"])
def test_kernels_in_the_interpreter(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "tests/ops/int8_interpreted.py", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "-k", part], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
