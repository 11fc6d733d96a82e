"""Other authors' kernels as backends: what is refused, how tensors are handed over, and that trying comes first.

Stub modules stand in for the packages, which need a GPU: their functions are the references on channel-major tensors.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from longllava.errors import BackendError
from longllava.ops import upstream_support
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.causal_conv1d import causal_conv1d
from longllava.ops.causal_conv1d import reference as conv_reference
from longllava.ops.causal_conv1d import upstream as conv
from longllava.ops.selective_scan import cases as scan_cases
from longllava.ops.selective_scan import reference as scan_reference
from longllava.ops.selective_scan import selective_scan
from longllava.ops.selective_scan import upstream as scan
from tests.ops.parity import error

BARE_SCAN = replace(scan_cases.PLAIN, state=False, length=7, channels=16)
BARE_CONV = replace(conv_cases.PLAIN, length=7, channels=16)


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """As mamba-ssm's, whose backward knows only the gradient of y."""
    assert return_last_state and u.is_contiguous() and A.dtype == torch.float32
    turned = [x if x is None else x.transpose(1, 2) for x in (u, delta, B, C, z)]
    u, delta, B, C, z = turned
    y, state = scan_reference.run(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y.transpose(1, 2), state


def causal_conv1d_fn(x, weight, bias, initial_states, activation):
    assert x.stride(1) == 1, "channel-last"
    assert bias is None or bias.dtype == weight.dtype
    state = None if initial_states is None else initial_states.transpose(1, 2)
    assert state is None or state.stride(2) == 1
    y, _ = conv_reference.run(x.transpose(1, 2), weight, bias, state, None, activation)
    return y.transpose(1, 2)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    package = ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    for module in (ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops"), interface, package):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("case", [BARE_SCAN, replace(BARE_SCAN, gate=False, skip=False, delta_bias=False)], ids=str)
def test_scan_hands_over_and_takes_back(case, stubs) -> None:
    args = case.inputs()
    for got, truth in zip(scan.run(*args), scan_reference.run(*args)):
        assert got.is_contiguous() and error(got, truth) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("state", [True, False])
def test_convolution_hands_over_and_keeps_the_state(length, state, stubs) -> None:
    args = replace(BARE_CONV, length=length, state=state).inputs()
    for got, truth in zip(conv.run(*args), conv_reference.run(*args)):
        assert got.is_contiguous() and error(got, truth) < 1e-6


def test_a_gradient_of_the_state_that_would_be_left_out_raises(stubs) -> None:
    args = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in BARE_SCAN.inputs()]
    y, state = scan.run(*args)
    y.sum().backward(retain_graph=True)
    assert args[0].grad is not None
    with pytest.raises(BackendError, match="no gradient of the returned state"):
        (y.sum() + state.sum()).backward()


def far_rows(length: int, stride: int) -> torch.Tensor:
    """Only its shape and strides are looked at."""
    return torch.empty(0, device="meta").as_strided((1, length, 8192), (stride * length, stride, 1))


def test_what_it_cannot_do_is_refused_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_support, "tried", lambda *_: pytest.fail("tried"))
    for change, words in (
        ({"state": True}, "starts from an empty state only"),
        ({"packing": "packed"}, "knows no padding and no packed sequences"),
        ({"length": 0}, "at least one token"),
        ({"n_states": 300}, "at most 256 states"),
        ({}, "needs CUDA tensors, got u on cpu"),
    ):
        with pytest.raises(BackendError, match=f"upstream: .*{words}"):
            selective_scan(*replace(BARE_SCAN, **change).inputs(), backend="upstream")
    u, delta, *rest = BARE_SCAN.inputs()
    assert "got delta in torch.bfloat16" in str(scan.why_not(u, delta.bfloat16(), *rest))
    for change, words in (
        ({"packing": "packed"}, "no padding that a window passes over"),
        ({"length": 0}, "at least one token"),
        ({"n_taps": 5}, "2 to 4 taps, got 5"),
        ({"channels": 12}, "that 8 divides"),
        ({"layout": "transposed"}, "that 8 divides"),
        ({}, "needs CUDA tensors, got x on cpu"),
    ):
        with pytest.raises(BackendError, match=f"upstream: .*{words}"):
            causal_conv1d(*replace(BARE_CONV, **change).inputs(), backend="upstream")


def test_offsets_that_would_wrap_are_refused() -> None:
    weight = torch.ones(8192, 4)
    assert "needs CUDA tensors" in str(conv.why_not(far_rows(262_144, 16_384), weight))
    assert "counts offsets in 32 bits: 262145 tokens" in str(conv.why_not(far_rows(262_145, 16_384), weight))
    u = torch.empty(1, 524_288, 8192, device="meta")
    A, B = torch.empty(8192, 16, device="meta"), torch.empty(1, 524_288, 16, device="meta")
    assert "counts elements in 32 bits" in str(scan.why_not(u, u, A, B, B))
    many = torch.empty(64, 526_336, 8192, device="meta")
    B = torch.empty(64, 526_336, 16, device="meta")
    assert "counts saved states in 32 bits" in str(scan.why_not(many, many, A, B, B))


class OnGPU:  # a tensor as why_not sees it
    device = torch.device("cuda")


def test_installed_is_not_working_and_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def first_call(device: torch.device) -> None:
        calls.append(device)
        if len(calls) == 1:
            raise ModuleNotFoundError("No module named 'selective_scan_cuda'")
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(upstream_support, "_verdicts", {})
    for _ in range(2):
        answer = upstream_support.why_not("a-package", first_call, x=OnGPU())
        assert answer.startswith("a-package is not installed, or was built without its kernels (No module named")
    answer = upstream_support.why_not("another", first_call, x=OnGPU())
    assert answer.startswith("another is installed and fails: RuntimeError: no kernel image is available; pip install")
    assert len(calls) == 2


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch):
    """A call that fails for that alone would be remembered as one that never works."""
    monkeypatch.setattr(upstream_support, "_verdicts", {})
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(BackendError, match="a-package has not been tried yet, .*; make the call once before"):
        upstream_support.why_not("a-package", lambda device: pytest.fail("tried"), x=OnGPU())
    assert not upstream_support._verdicts
