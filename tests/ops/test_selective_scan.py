"""The selective scan against its fp64 reference, and what it promises about states, padding, threads and bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.selective_scan import BACKENDS, blocked, cpu, reference, selective_scan, selective_scan_
from longllava.ops.selective_scan.cases import CASES, NAMES, Case
from tests.ops.parity import assert_matches, error, outputs_and_gradients, poison_empty, split_equals_whole

CPU = next(backend for backend in BACKENDS if backend.name == "cpu")
ALL_RUNS = [pytest.param(backend, id=backend.name) for backend in BACKENDS]
FAST_RUNS = ALL_RUNS[:-1]


def is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def skip_if_it_cannot(backend, args) -> None:
    if reason := backend.why_not(*args):
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST_RUNS)
def test_matches_reference(backend, case, monkeypatch) -> None:
    args = case.inputs()
    skip_if_it_cannot(backend, args)
    poison_empty(monkeypatch)
    assert_matches(backend.run, reference.run, NAMES, args, slack=2e-6)


@pytest.mark.parametrize("backend", FAST_RUNS)
def test_values_without_gradients_are_the_same_bits(backend) -> None:
    args = Case("packed", batch=2, length=70, packing="packed").inputs()
    skip_if_it_cannot(backend, args)
    with torch.no_grad():
        y, state = backend.run(*args)
    found = outputs_and_gradients(backend.run, NAMES, args)
    assert torch.equal(y, found["y"]) and torch.equal(state, found["state"])


@pytest.mark.parametrize("run", [reference.run, blocked.run], ids=["reference", "blocked"])
def test_gradcheck(run, monkeypatch) -> None:
    monkeypatch.setattr(blocked, "SPAN_ELEMENTS", 2 * 2 * 3 * 4)  # spans of 4 tokens
    args = Case("tiny", batch=2, length=9, channels=2, n_states=3, packing="wild").inputs()
    args = [x.double().nan_to_num(0.5).requires_grad_() if is_float(x) else x for x in args]
    assert torch.autograd.gradcheck(run, args)


@given(
    kind=st.sampled_from([None, "left", "middle", "right", "packed", "wild"]),
    cuts=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25)
@pytest.mark.parametrize("backend", ALL_RUNS)
def test_any_split_equals_one_call(backend, kind, cuts, seed) -> None:
    args = Case("split", batch=2, length=70, channels=20, n_states=5, packing=None).inputs(seed)
    if kind is not None:
        args = Case("split", batch=2, length=70, channels=20, n_states=5, packing=kind).inputs(seed)
        # a cut hides a change of sequence from both sides: cuts continue, resets happen inside a call only
        cuts = [first_of_same_sequence(args[-1], cut % 71) for cut in cuts]
    skip_if_it_cannot(backend, args)
    with torch.no_grad():
        split_equals_whole(backend.run, NAMES, args, cuts, slack=1e-6)


def first_of_same_sequence(seq_idx: torch.Tensor, cut: int) -> int:
    """The nearest cut at or before `cut` that separates no two sequences in any row."""
    while cut > 0:
        sides = [(row[:cut][row[:cut] >= 0], row[cut:][row[cut:] >= 0]) for row in seq_idx]
        if all(not len(a) or not len(b) or a[-1] == b[0] for a, b in sides):
            break
        cut -= 1
    return cut


@pytest.mark.parametrize("backend", ALL_RUNS)
def test_packed_sequences_equal_single_ones(backend) -> None:
    lengths = [1, 30, 33, 6]
    args = Case("packed", length=sum(lengths)).inputs()
    skip_if_it_cannot(backend, args)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))[None]
    y, state = backend.run(*args[:-1], seq_idx)
    start = 0
    for n, length in enumerate(lengths):
        cut = slice(start, start + length)
        part = [x[:, cut] if name in ("u", "delta", "B", "C", "z") else x for name, x in zip(NAMES, args)]
        if n:
            part[NAMES.index("state")] = None
        y_one, state_one = backend.run(*part)
        assert error(y[:, cut], y_one) < 1e-6
        start += length
    assert error(state, state_one) < 1e-6


@pytest.mark.parametrize("kind", [None, "wild"])
def test_threads_change_no_bit(kind) -> None:
    args = Case("threads", batch=2, length=300, channels=200, packing=kind).inputs()
    skip_if_it_cannot(CPU, args)
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3, 1):
            torch.set_num_threads(n_threads)
            found.append(outputs_and_gradients(cpu.run, NAMES, args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("backend", FAST_RUNS)
@pytest.mark.parametrize("packing", [None, "middle"])
def test_huge_steps_neither_overflow_nor_lose_the_input(backend, packing) -> None:
    args = list(Case("huge", length=70, softplus=False, delta_bias=False, packing=packing).inputs())
    args[1] = args[1].abs() * torch.tensor([0.0, 1e-6, 1.0, 60.0]).repeat(10)
    args[2] = args[2] * 100
    skip_if_it_cannot(backend, args)
    truth = outputs_and_gradients(reference.run, NAMES, args, torch.float64)
    for name, got in outputs_and_gradients(backend.run, NAMES, args).items():
        assert error(got, truth[name]) < 1e-5, name


def test_gates_and_steps_far_out_saturate() -> None:
    args = list(Case("far-out", length=40).inputs())
    skip_if_it_cannot(CPU, args)
    far = torch.tensor([-1e30, -3e4, -200, -87.5, -20, 0, 19.9, 20.1, 88, 3e4]).repeat(4)
    for name in ("z", "delta"):
        moved = list(args)
        moved[NAMES.index(name)] = far.expand(1, 40, 40).clone()
        truth = outputs_and_gradients(reference.run, NAMES, moved, torch.float64)
        for found, got in outputs_and_gradients(cpu.run, NAMES, moved).items():
            assert error(got, truth[found]) < 1e-5, (name, found)


def test_growing_states_are_right_too() -> None:
    args = list(Case("growing", length=40).inputs())
    args[2] = args[2].abs() * 0.05
    skip_if_it_cannot(CPU, args)
    truth = outputs_and_gradients(reference.run, NAMES, args, torch.float64)
    for name, got in outputs_and_gradients(cpu.run, NAMES, args).items():
        assert error(got, truth[name]) < 1e-5, name


@pytest.mark.parametrize("backend", ALL_RUNS)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_nan_at_a_real_token_is_not_hidden(backend, name) -> None:
    args = Case("nan", length=40, channels=20).inputs()
    skip_if_it_cannot(backend, args)
    args[NAMES.index(name)][0, 20, 3] = torch.nan
    y, _ = backend.run(*args)
    assert torch.isfinite(y[:, :20]).all()
    assert torch.isnan(y[0, 20, 3])


def test_a_step_of_length_zero_keeps_the_state_exactly() -> None:
    args = list(Case("still", softplus=False, delta_bias=False).inputs())
    args[1] = torch.zeros_like(args[1])
    for backend in BACKENDS:
        if backend.why_not(*args) is None:
            assert torch.equal(backend.run(*args)[1], args[NAMES.index("state")]), backend.name


@pytest.mark.parametrize("backend", ALL_RUNS)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_the_state_returned_is_a_new_tensor(backend, length) -> None:
    args = Case("fresh", length=length).inputs()
    skip_if_it_cannot(backend, args)
    given_state = args[NAMES.index("state")]
    before = given_state.clone()
    _, state = backend.run(*args)
    assert state.dtype == torch.float32
    state.fill_(7)
    assert torch.equal(given_state, before)


def test_a_state_replaced_in_place_is_the_new_state() -> None:
    args = list(Case("in-place", batch=2, length=5).inputs())
    y, state = selective_scan(*args)
    given = args[NAMES.index("state")]
    assert torch.equal(selective_scan_(*args), y)
    assert torch.equal(given, state)


@pytest.mark.parametrize("backend", ALL_RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_the_quantisation_of_y(backend, dtype) -> None:
    args = list(Case("int8", batch=2, length=20, dtype=dtype, packing="middle").inputs())
    skip_if_it_cannot(backend, args)
    args[0][1, 2] = torch.nan
    args[0].requires_grad_()
    y, state = selective_scan(*args, backend=backend.name)
    rows, again = selective_scan(*args, quantized=True, backend=backend.name)
    truth = quantize_rows(y, backend="reference")
    assert rows.dtype == dtype and torch.equal(rows.values, truth.values)
    assert torch.equal(rows.scale.nan_to_num(7), truth.scale.nan_to_num(7)) and rows.scale[1, 2].isnan()
    assert torch.equal(state.nan_to_num(7), again.nan_to_num(7)) and not again.requires_grad


@pytest.mark.parametrize("packing", [None, "wild"])
def test_custom_ops_keep_torchs_rules(packing) -> None:
    args = Case("rules", batch=2, length=34, channels=5, n_states=3, packing=packing).inputs()
    skip_if_it_cannot(CPU, args)
    args = [x.detach().requires_grad_() if is_float(x) else x for x in args]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for save in (True, False):
        torch.library.opcheck(cpu.selective_scan, (*args, save), test_utils=tests)


def test_traces_without_graph_breaks() -> None:
    args = Case("traced", length=12, channels=8, n_states=4).inputs()
    skip_if_it_cannot(CPU, args)
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def gated(u, *rest):
        y, state = selective_scan(u, *rest)
        return (y * 2).sum() + state.sum()

    u = args[0].detach().requires_grad_()
    value = gated(u, *args[1:])
    value.backward()
    y, state = selective_scan(*args)
    assert torch.allclose(value, (y * 2).sum() + state.sum(), rtol=1e-5)
    assert u.grad is not None and u.grad.shape == u.shape


def test_runs_on_the_meta_device() -> None:
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in Case("meta").inputs()]
    y, state = selective_scan(*args)
    assert y.shape == args[0].shape and state.shape == args[NAMES.index("state")].shape


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
    """Rows 2^26 elements apart: the 33rd lies 2^31 elements from the first. Only touched pages take memory."""
    args = list(Case("far", length=34, channels=8, layout="whole", dtype=torch.bfloat16).inputs())
    skip_if_it_cannot(CPU, args)
    u = args[0]
    try:
        far = torch.empty(33 * 2**26 + 8, dtype=torch.bfloat16).as_strided(u.shape, (1, 2**26, 1))
    except RuntimeError as refused:
        pytest.skip(f"4 GiB of address space: {refused}")
    far.copy_(u)
    near = outputs_and_gradients(cpu.run, NAMES, args)
    y, state = cpu.run(far, *args[1:])
    assert torch.equal(y, near["y"]) and torch.equal(state, near["state"])
    far.requires_grad_()
    (grad,) = torch.autograd.grad(cpu.run(far, *args[1:])[0].float().sum(), far)
    u.requires_grad_()
    assert torch.equal(grad, torch.autograd.grad(cpu.run(*args)[0].float().sum(), u)[0])


def test_wrong_shapes_name_the_tensor() -> None:
    args = list(Case("wrong").inputs())
    for name in ("delta", "A", "B", "C", "D", "z", "delta_bias", "state"):
        broken = list(args)
        place = NAMES.index(name)
        broken[place] = broken[place][..., :-1]
        with pytest.raises(LongLLaVAError, match=rf"selective_scan: (A|{name}|B) must be "):
            selective_scan(*broken)
    with pytest.raises(LongLLaVAError, match="seq_idx must be int32"):
        selective_scan(*args[:-1], torch.zeros(1, 63))


def test_a_forced_backend_runs_or_raises(monkeypatch) -> None:
    args = [x.double() if isinstance(x, torch.Tensor) else x for x in Case("forced").inputs()]
    with pytest.raises(BackendError, match="cpu: takes float32, bfloat16 or float16, got u in float64"):
        selective_scan(*args, backend="cpu")
    with pytest.raises(BackendError, match="no backend 'abacus'; allowed are .*, cpu, blocked, reference"):
        selective_scan(*args, backend="abacus")
    monkeypatch.setenv("LONGLLAVA_SELECTIVE_SCAN", "reference")
    y, _ = selective_scan(*args)
    assert torch.equal(y, reference.run(*args)[0])
