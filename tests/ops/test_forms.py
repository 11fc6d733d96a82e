"""Every form of the compiled library, one for each instruction set, computes right; one that cannot be had is said so.

Each test runs in a process of its own: the form is chosen when the library loads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import FORMS, ROOT, needs_kernels, run_in_form

every_form = pytest.mark.parametrize("form", FORMS[:3])

# these ops on a few ugly cases, against fp64
CHECK = """
import torch
from longllava.ops import causal_conv1d, selective_scan
from longllava.ops.causal_conv1d import cases as conv_cases, cpu as conv_cpu, reference as conv_reference
from longllava.ops.selective_scan import cases as scan_cases, cpu as scan_cpu, reference as scan_reference
from tests.ops.parity import assert_matches
from tests.ops.test_conv3x3 import compare as compare_convolutions
from tests.ops.test_fused import compare, compare_gradients
from tests.ops.test_pixel_conv import compare as compare_pixel_convolutions
chosen = ("plain", "two-tiles", "many-states", "bf16-wild", "wild", "two-taps-two-tiles")
for cases, cpu, reference in ((scan_cases, scan_cpu, scan_reference), (conv_cases, conv_cpu, conv_reference)):
    for case in cases.CASES:
        if case.name in chosen:
            assert_matches(cpu.run, reference.run, cases.NAMES, case.inputs(), slack=2e-6)
for dtype in (torch.float32, torch.bfloat16):
    compare(dtype)
    compare_gradients(dtype)
compare_convolutions(height=9, width=6, inputs=48, outputs=80)
compare_pixel_convolutions(height=25, width=31, outputs=48)
"""

# one token that lets nothing in leaves exp(A) of a state of 1
DECAYS = """
import torch
from longllava.ops.selective_scan import selective_scan
random = torch.Generator().manual_seed(0)
A = -(10 ** (torch.rand(4096, 16, generator=random) * 7.5 - 6))  # from 1e-6 to 32
A[:16, 0] = 0
zeros, ones = torch.zeros(1, 1, 4096), torch.ones(1, 1, 16)
_, state = selective_scan(zeros, zeros + 1, A, ones, ones, None, state=torch.ones(1, 4096, 16), backend="cpu")
left, exact = state[0].double(), A.double().exp()
assert (left[:16, 0] == 1).all() and (left <= 1).all()
error = left - exact
relative = (error / exact).abs() - 2.0**-23 * A.abs()  # A itself, times log2(e), is rounded
assert relative.max() < 4e-7, relative.max()
slow = (A < 0) & (A > -0.1)
lost = error[slow].abs() / (1 - exact[slow])
rounding = 2.0**-23 / (1 - exact[slow])
assert (lost - rounding).max() < 1e-6, (lost - rounding).max()
slowest = A > -1e-4
assert error[slowest].mean().abs() < 5e-9, error[slowest].mean()
"""

DENORMALS = """
import torch
from longllava.ops.selective_scan import selective_scan
torch.set_num_threads(1)
ones = torch.ones(1, 89, 16, requires_grad=True)
u = torch.zeros(1, 89, 16, requires_grad=True)
args = (ones, -torch.ones(16, 1), ones[..., :1], ones[..., :1])  # each token leaves 1/e: 2e-38 after 87
y, state = selective_scan(u, *args, None, state=torch.ones(1, 16, 1), backend="cpu")
assert 0 < float(y[0, 85, 0]) < 1e-36, y[0, 85, 0]
assert not y[0, 88].any() and not state.any(), state
y[:, -1].sum().backward()
assert float(u.grad[0, 2, 0]) > 0 and not u.grad[0, 0].any(), u.grad[0, :4, 0]
assert float(torch.tensor(1e-38) * 0.5) > 0
"""

# 100 and more at padding asks for clamped exponentials, whose products AVX2 rounds otherwise
PADDING = """
import torch
from longllava.ops.selective_scan import cases, cpu
for softplus in (True, False):
    inputs = cases.Case("padded", batch=2, length=47, packing="wild", layout="whole", softplus=softplus).inputs()
    padded = (inputs[-1] < 0)[..., None]
    found = []
    for garbage in (0.0, 100.0, -1e30, float("inf"), float("nan")):
        for name in ("u", "delta", "B", "C", "z"):
            inputs[cases.NAMES.index(name)].masked_fill_(padded, garbage)
        found.append(cpu.run(*inputs))
    for y, state in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(state, found[0][1]), (y - found[0][0]).abs().max()
"""


def python(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LONGLLAVA_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


@needs_kernels
@every_form
def test_every_form_matches_the_reference(form) -> None:
    run_in_form(form, CHECK)


@needs_kernels
@every_form
def test_decays_are_right_where_states_live_long(form) -> None:
    """What a state loses a token adds up over its life, and so does an error that always has one sign."""
    run_in_form(form, DECAYS)


@needs_kernels
@every_form
def test_a_state_that_decays_away_becomes_0_and_other_arithmetic_keeps_its_small_numbers(form) -> None:
    """Operations on denormal numbers take the processor a hundred times as long."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("denormals are flushed on x86-64 and ARM")
    run_in_form(form, DENORMALS)


@needs_kernels
@every_form
def test_what_stands_at_padding_changes_no_bit_of_a_scan(form) -> None:
    run_in_form(form, PADDING)


@needs_kernels
def test_amx_is_not_used_where_it_is_forbidden_or_absent() -> None:
    """What a processor has its flags say, on Linux."""
    code = "from longllava.ops import native; print(native.isa(), native.uses_amx())"
    assert python(code, "portable").stdout.split() == ["portable", "False"]
    assert python(f"import os; os.environ['LONGLLAVA_AMX'] = '0'; {code}", "").stdout.split()[1] == "False"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "amx_int8" not in flags.split():
        assert python(code, "").stdout.split()[1] == "False"


@needs_kernels
def test_a_form_that_does_not_exist_is_an_error() -> None:
    done = python("from longllava.ops import native; native.why_not()", "abacus")
    assert done.returncode == 1
    assert "BackendError: LONGLLAVA_ISA=abacus: this processor runs portable" in done.stderr
