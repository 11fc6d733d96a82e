"""The causal convolution against its fp64 reference, and what it promises about states, padding and threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.causal_conv1d import BACKENDS, causal_conv1d, causal_conv1d_, cpu, reference
from longllava.ops.causal_conv1d.cases import CASES, NAMES, Case
from longllava.ops.dispatch import choose
from tests.ops.parity import assert_matches, error, outputs_and_gradients, poison_empty, split_equals_whole
from tests.ops.test_selective_scan import first_of_same_sequence, skip_if_it_cannot

CPU = next(backend for backend in BACKENDS if backend.name == "cpu")
ALL_RUNS = [pytest.param(backend, id=backend.name) for backend in BACKENDS]


def test_the_reference_is_torchs_own_convolution() -> None:
    x, weight, bias, _, _, _ = Case("torch", batch=2, state=False).inputs()
    theirs = F.silu(F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=40)).transpose(1, 2)
    y, state = reference.run(x, weight, bias, activation="silu")
    assert error(y, theirs) < 1e-6
    assert torch.equal(state, x[:, -3:])


def test_the_reference_passes_padding_by_and_forgets_at_resets() -> None:
    """By hand: taps 1, 10, 100 (the last on the token itself), state (1, 2), tokens 3 x 4 | 5 x 6 (x padding)."""
    x = torch.tensor([3.0, torch.nan, 4, 5, torch.nan, 6])[None, :, None]
    seq_idx = torch.tensor([[0, -1, 0, 7, -1, 7]], dtype=torch.int32)
    state = torch.tensor([1.0, 2])[None, :, None]
    for backend in BACKENDS:
        args = (x, torch.tensor([[1.0, 10, 100]]), None, state, seq_idx, None)
        if backend.why_not(*args) is None:
            y, new_state = backend.run(*args)
            assert y.flatten().tolist() == [321, 0, 432, 500, 0, 650], backend.name
            assert new_state.flatten().tolist() == [5, 6], backend.name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case, monkeypatch) -> None:
    args = case.inputs()
    skip_if_it_cannot(CPU, args)
    poison_empty(monkeypatch)
    assert_matches(cpu.run, reference.run, NAMES, args, slack=2e-6)


def test_sums_far_out_saturate() -> None:
    args = list(Case("far-out", length=10).inputs())
    skip_if_it_cannot(CPU, args)
    args[0] = args[0] * torch.tensor([1.0, 30, 1e3, 1e9, 1e30]).repeat(8)
    truth = outputs_and_gradients(reference.run, NAMES, args, torch.float64)
    for name, got in outputs_and_gradients(cpu.run, NAMES, args).items():
        assert error(got, truth[name]) < 1e-5, name


@pytest.mark.parametrize("packing", [None, "wild"])
def test_gradcheck_of_the_reference(packing) -> None:
    x, weight, bias, state, seq_idx, silu = Case("tiny", 2, 6, 2, n_taps=3, packing=packing).inputs()
    args = [t.double().nan_to_num(0.5).requires_grad_() for t in (x, weight, bias, state)]
    assert torch.autograd.gradcheck(reference.run, (*args, seq_idx, silu))


@given(
    kind=st.sampled_from([None, "left", "middle", "right", "packed", "wild"]),
    cuts=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    n_taps=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40)
@pytest.mark.parametrize("backend", ALL_RUNS)
def test_any_split_equals_one_call(backend, kind, cuts, n_taps, seed) -> None:
    args = Case("split", batch=2, length=70, channels=20, n_taps=n_taps, packing=kind).inputs(seed)
    if kind is not None:
        cuts = [first_of_same_sequence(args[NAMES.index("seq_idx")], cut % 71) for cut in cuts]
    skip_if_it_cannot(backend, args)
    with torch.no_grad():
        split_equals_whole(backend.run, NAMES, args, cuts, slack=1e-6)


@pytest.mark.parametrize("kind", [None, "wild"])
def test_threads_change_no_bit(kind) -> None:
    args = Case("threads", batch=2, length=3000, channels=200, packing=kind).inputs()
    skip_if_it_cannot(CPU, args)
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(outputs_and_gradients(cpu.run, NAMES, args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("backend", ALL_RUNS)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_the_state_returned_is_a_new_tensor(backend, length) -> None:
    args = Case("fresh", length=length).inputs()
    skip_if_it_cannot(backend, args)
    before = args[0].clone(), args[NAMES.index("state")].clone()
    _, state = backend.run(*args)
    state.fill_(7)
    assert torch.equal(args[0], before[0]) and torch.equal(args[NAMES.index("state")], before[1])


@pytest.mark.parametrize(("batch", "length", "name"), [
    (1, 1, "triton"), (200, 1, "triton"), (1, 256, "triton"), (1, 257, "cuda"), (2, 200, "cuda"), (1, 36_000, "cuda"),
])  # fmt: skip
def test_where_all_could_run_a_few_tokens_are_tritons_and_a_prompt_is_cudas(batch, length, name) -> None:
    able = [replace(backend, why_not=lambda *args: None) for backend in BACKENDS]
    assert choose("causal_conv1d", able, torch.empty(batch, length, 8, device="meta"), torch.ones(8, 4)).name == name
    assert choose("causal_conv1d", able, torch.empty(batch, length, 8), torch.ones(8, 4), forced="cpu").name == "cpu"


def test_a_state_replaced_in_place_is_the_new_state() -> None:
    args = list(Case("in-place", batch=2, length=5).inputs())
    y, state = causal_conv1d(*args)
    given = args[NAMES.index("state")]
    assert torch.equal(causal_conv1d_(*args), y)
    assert torch.equal(given, state)


def test_gradients_beside_a_long_end_of_padding() -> None:
    """Whole steps of the kernel lie in it, and what follows the row is the gradient of its last real tokens alone."""
    x, weight = torch.randn(2, 150, 5), torch.randn(5, 4)
    seq_idx = torch.zeros(2, 150, dtype=torch.int32)
    seq_idx[0, 3:], seq_idx[1, 70:] = -1, -1
    skip_if_it_cannot(CPU, (x, weight))
    found = []
    for backend in ("cpu", "reference"):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y, state = causal_conv1d(*inputs, seq_idx=seq_idx, backend=backend)
        (y.square().sum() + state.sin().sum()).backward()
        found.append([tensor.grad for tensor in inputs])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not found[0][0][seq_idx < 0].any()


@pytest.mark.parametrize("packing", [None, "wild"])
def test_custom_ops_keep_torchs_rules(packing) -> None:
    x, weight, bias, state, seq_idx, _ = Case("rules", 2, 34, 5, packing=packing).inputs()
    skip_if_it_cannot(CPU, (x, weight))
    args = [t.detach().requires_grad_() for t in (x, weight, bias, state)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cpu.causal_conv1d, (*args, seq_idx, True), test_utils=tests)


def test_traces_without_graph_breaks() -> None:
    x, weight, bias, state, _, _ = Case("traced", 1, 12, 8).inputs()
    skip_if_it_cannot(CPU, (x, weight))
    torch.compiler.reset()
    traced = torch.compile(causal_conv1d, backend="aot_eager", fullgraph=True)
    weight.requires_grad_()
    y, new_state = traced(x, weight, bias, state, None, "silu")
    y.sum().backward()
    expected, expected_state = causal_conv1d(x, weight, bias, state, None, "silu")
    assert torch.equal(y, expected) and torch.equal(new_state, expected_state)
    assert weight.grad is not None


def test_is_exported_for_any_length() -> None:
    """A bound on the tokens that means something on GPUs alone became one of the program."""
    _, weight, *_ = Case("exported", channels=8).inputs()
    skip_if_it_cannot(CPU, (weight[None], weight))

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return causal_conv1d(x, weight)[0]

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Layer(), (torch.randn(2, 12, 8),), dynamic_shapes=({1: length},)).module()
    x = torch.randn(2, 300, 8)
    assert torch.equal(program(x), Layer()(x))


def test_the_callers_default_dtype_and_device_change_nothing() -> None:
    args = Case("defaults", length=5).inputs()
    skip_if_it_cannot(CPU, args)
    expected = outputs_and_gradients(cpu.run, NAMES, args)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        y, state = cpu.run(*args)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(y, expected["y"]) and torch.equal(state, expected["state"])


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^26 elements apart, as in the selective scan's test."""
    x, *rest = Case("far", length=34, channels=8, dtype=torch.bfloat16).inputs()
    skip_if_it_cannot(CPU, (x, *rest))
    try:
        far = torch.empty(33 * 2**26 + 8, dtype=torch.bfloat16).as_strided(x.shape, (1, 2**26, 1))
    except RuntimeError as refused:
        pytest.skip(f"4 GiB of address space: {refused}")
    far.copy_(x)
    for got, expected in zip(cpu.run(far, *rest), cpu.run(x, *rest)):
        assert torch.equal(got, expected)


def test_wrong_calls_say_what_is_wrong(monkeypatch) -> None:
    x, weight, bias, state, _, _ = Case("wrong").inputs()
    with pytest.raises(LongLLaVAError, match=r"weight must be \(E, K\) = \(40, 4\), got \(39, 4\)"):
        causal_conv1d(x, weight[:-1])
    with pytest.raises(LongLLaVAError, match=r"state must be \(B, K-1, E\) = \(1, 3, 40\), got \(1, 2, 40\)"):
        causal_conv1d(x, weight, bias, state[:, 1:])
    with pytest.raises(LongLLaVAError, match="activation must be None or 'silu', got 'relu'"):
        causal_conv1d(x, weight, activation="relu")
    with pytest.raises(BackendError, match="cpu: takes at most 8 taps, got 9"):
        causal_conv1d(x, torch.zeros(40, 9), backend="cpu")
    monkeypatch.setenv("LONGLLAVA_CAUSAL_CONV1D", "abacus")
    with pytest.raises(BackendError, match="no backend 'abacus'; allowed are .*, cpu, reference"):
        causal_conv1d(x, weight)
