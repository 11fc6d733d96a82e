"""The Triton kernels in Triton's interpreter, on small shapes. test_triton.py runs this file in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/ops/triton_interpreted.py

The interpreter rounds to bf16 by cutting bits off, which is twice as wrong as rounding, and multiplies matrices of bf16
as if they were integers: hence SLACK, and fp16 in place of bf16 in attention.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longllava.ops import attention as attention_op
from longllava.ops import causal_conv1d as conv_op
from longllava.ops import selective_scan as scan_op
from longllava.ops.attention import cases as attention_cases
from longllava.ops.attention import cudnn
from longllava.ops.attention import reference as attention_reference
from longllava.ops.attention import triton as attention
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.causal_conv1d import reference as conv_reference
from longllava.ops.causal_conv1d import triton as conv
from longllava.ops.selective_scan import cases as scan_cases
from longllava.ops.selective_scan import reference as scan_reference
from longllava.ops.selective_scan import triton as scan
from longllava.ops.selective_scan import triton_launch as launch
from tests.ops.parity import assert_matches, error, outputs_and_gradients, poison_empty, split_equals_whole

# numpy's words for what a GPU does without one
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SLACK = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 4e-3}
SPLIT = ("plain", "bare", "bf16-wild", "wild", "packed", "three-tokens")
PLAIN = scan_cases.PLAIN


def small(case: scan_cases.Case) -> scan_cases.Case:
    """Two chunks of 8 tokens, the last one cut short, and a block of channels that is not full."""
    width = 17 if case.name == "two-tiles" else min(case.channels, 9)
    batch = case.batch if case.batch == 0 or case.packing == "wild" else 1
    return replace(case, length=min(case.length, 11), channels=width, batch=batch)


@pytest.fixture
def several_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", 8)
    monkeypatch.setattr(launch, "MIN_SPAN", 4)
    monkeypatch.setattr(launch, "WARPS_WANTED", 1000)
    monkeypatch.setattr(launch, "PACK", 4)


@pytest.mark.parametrize("case", [small(case) for case in scan_cases.CASES], ids=str)
def test_scan_matches_the_reference(case, monkeypatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", 8)
    poison_empty(monkeypatch)
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, case.inputs(), SLACK[case.dtype])


@pytest.mark.parametrize("case", [small(case) for case in scan_cases.CASES if case.name in SPLIT], ids=str)
def test_scan_over_several_spans_matches_too(case, monkeypatch, several_spans) -> None:
    shape = launch.geometry(case.channels, case.n_states)
    assert launch.spans(1, case.length, shape, torch.device("cpu"))[0] == -(-case.length // 8)
    poison_empty(monkeypatch)
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, case.inputs(), SLACK[case.dtype])


@pytest.mark.long
@pytest.mark.parametrize("case", scan_cases.CASES, ids=str)
def test_scan_matches_the_reference_in_full_size(case) -> None:
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, case.inputs(), SLACK[case.dtype])


def test_scan_without_gradients_gives_the_same_bits_and_a_new_state(several_spans) -> None:
    args = small(replace(PLAIN, packing="packed")).inputs()
    given = args[scan_cases.NAMES.index("state")]
    before = given.clone()
    with torch.no_grad():
        y, state = scan.run(*args)
        again = scan.run(*args)
    assert torch.equal(y, again[0]) and torch.equal(state, again[1])
    found = outputs_and_gradients(scan.run, scan_cases.NAMES, args)
    assert torch.equal(y, found["y"]) and torch.equal(state, found["state"])
    state.fill_(7)
    assert torch.equal(given.detach(), before)


def test_scan_cut_anywhere_equals_one_call() -> None:
    args = replace(small(PLAIN), batch=1).inputs()
    with torch.no_grad():
        split_equals_whole(scan.run, scan_cases.NAMES, args, [1, 2, 6], slack=1e-6)


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_scan_hides_no_nan_of_a_real_token(name, several_spans) -> None:
    args = replace(small(PLAIN), batch=1).inputs()
    args[scan_cases.NAMES.index(name)][0, 9, 3] = torch.nan
    y, _ = scan.run(*args)
    assert torch.isfinite(y[:, :9]).all()
    assert torch.isnan(y[0, 9, 3])


@pytest.mark.parametrize("packing", [None, "middle"])
def test_scan_of_huge_steps(packing, several_spans) -> None:
    args = list(replace(small(PLAIN), softplus=False, delta_bias=False, packing=packing, channels=8).inputs())
    args[1] = args[1].abs() * torch.tensor([0.0, 1e-6, 1.0, 60.0]).repeat(2)
    args[2] = args[2] * 100
    truth = outputs_and_gradients(scan_reference.run, scan_cases.NAMES, args, torch.float64)
    for name, got in outputs_and_gradients(scan.run, scan_cases.NAMES, args).items():
        assert error(got, truth[name]) < 1e-5, name


def test_scan_of_gates_and_steps_far_out() -> None:
    args = list(replace(small(PLAIN), batch=1, channels=10).inputs())
    far = torch.tensor([-3e4, -200, -87.5, -20, -5, 0, 19.9, 20.1, 88, 3e4])
    for name in ("z", "delta"):
        moved = list(args)
        moved[scan_cases.NAMES.index(name)] = far.expand(1, 11, 10).clone()
        truth = outputs_and_gradients(scan_reference.run, scan_cases.NAMES, moved, torch.float64)
        for found, got in outputs_and_gradients(scan.run, scan_cases.NAMES, moved).items():
            assert error(got, truth[found]) < 1e-5, (name, found)


def test_scan_custom_op_keeps_torchs_rules() -> None:
    args = replace(small(PLAIN), batch=1, length=5, channels=3, n_states=3, packing="wild").inputs()
    args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for save in (True, False):
        torch.library.opcheck(scan.selective_scan, (*args, save), test_utils=tests)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "CHANNELS", 32)
    monkeypatch.setattr(conv, "TILES", 2)


def narrow(case: conv_cases.Case) -> conv_cases.Case:
    """Two blocks of channels only where the case asks for them."""
    channels = 35 if case.name == "two-taps-two-tiles" else min(case.channels, 20)
    return replace(case, channels=channels, length=min(case.length, 45))


@pytest.mark.parametrize("case", [narrow(case) for case in conv_cases.CASES], ids=str)
def test_conv_matches_the_reference(case, monkeypatch, small_blocks) -> None:
    poison_empty(monkeypatch)
    assert_matches(conv.run, conv_reference.run, conv_cases.NAMES, case.inputs(), SLACK[case.dtype])


def test_conv_cut_anywhere_equals_one_call(small_blocks) -> None:
    args = replace(conv_cases.PLAIN, n_taps=5).inputs()
    with torch.no_grad():
        split_equals_whole(conv.run, conv_cases.NAMES, args, [1, 2, 30], slack=1e-6)


def test_conv_of_sums_far_out(small_blocks) -> None:
    args = list(replace(conv_cases.PLAIN, length=10).inputs())
    args[0] = args[0] * torch.tensor([1.0, 30, 1e3, 1e9, 1e30]).repeat(8)
    truth = outputs_and_gradients(conv_reference.run, conv_cases.NAMES, args, torch.float64)
    for name, got in outputs_and_gradients(conv.run, conv_cases.NAMES, args).items():
        assert error(got, truth[name]) < 1e-5, name


@pytest.mark.parametrize("packing", [None, "middle"])
def test_conv_hides_no_nan_in_gradients(packing, small_blocks) -> None:
    args = list(replace(conv_cases.PLAIN, length=40, batch=1, packing=packing).inputs())
    args[0][0, -2 if packing is None else 30, 3] = torch.nan
    found = [outputs_and_gradients(run, conv_cases.NAMES, args) for run in (conv.run, conv_reference.run)]
    for name, truth in found[1].items():
        assert torch.equal(found[0][name].isnan(), truth.isnan()), name
    assert found[1]["grad x"].isnan().any() and found[1]["grad bias"].isnan().sum() == 1


def test_conv_custom_op_keeps_torchs_rules() -> None:
    x, weight, bias, state, seq_idx, _ = replace(conv_cases.PLAIN, length=9, channels=5, packing="wild").inputs()
    args = [t.requires_grad_() for t in (x, weight, bias, state)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(conv.causal_conv1d, (*args, seq_idx, True), test_utils=tests)


def attention_error(case: attention_cases.Case) -> tuple[list[float], list[float]]:
    """Of y and lse: relative errors of the kernel and of the reference in the same dtype. NaN stands at padding."""
    seq_idx_q, seq_idx_k = case.seq_idx()
    options = (case.head_dim**-0.5, case.causal, seq_idx_q, seq_idx_k, True)
    q, k, v = case.inputs()
    truth = attention_reference.run(q.double(), k.double(), v.double(), *options)
    floor = attention_reference.run(q, k, v, *options)
    if seq_idx_q is not None:
        for x, seq_idx in ((q, seq_idx_q), (k, seq_idx_k), (v, seq_idx_k)):
            x[seq_idx < 0] = torch.nan
    got = attention.run(q, k, v, *options)
    errors = []
    for found in (got, floor):
        assert all(torch.equal(a.isinf(), b.isinf()) for a, b in zip(found, truth))
        pairs = [(a.masked_fill(b.isinf(), 0), b.masked_fill(b.isinf(), 0)) for a, b in zip(found, truth)]
        errors.append([error(a, b) if a.numel() else 0.0 for a, b in pairs])
    return errors[0], errors[1]


@pytest.mark.parametrize("spans", [1, 1000])
@pytest.mark.parametrize("case", (*attention_cases.CASES[8:-6:7], attention_cases.CASES[-4]), ids=str)
def test_attention_matches_the_reference(case, spans, monkeypatch) -> None:
    monkeypatch.setattr(attention, "PROGRAMS_WANTED", spans)
    monkeypatch.setattr(attention, "MIN_SPAN", 64)
    poison_empty(monkeypatch)
    if case.dtype == torch.bfloat16:
        case = replace(case, dtype=torch.float16)
    for got, floor in zip(*attention_error(case)):
        assert got <= 2 * floor + 1e-5


@pytest.mark.parametrize(("head_dim", "dtype"), [(96, torch.float32), (200, torch.float32), (200, torch.float16)])
def test_attention_of_wide_heads_goes_in_smaller_blocks(head_dim, dtype) -> None:
    q, k, v = (torch.randn(1, n, heads, head_dim).to(dtype) for n, heads in ((50, 4), (90, 2), (90, 2)))
    truth = attention_reference.run(q.double(), k.double(), v.double(), 0.1, True, None, None, True)
    for got, expected in zip(attention.run(q, k, v, 0.1), truth):
        assert error(got, expected) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_attention_custom_op_keeps_torchs_rules() -> None:
    q = torch.randn(1, 3, 2, 16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention.attention, (q, q, q, 0.25, True, None, None), test_utils=tests)


def test_attention_reads_views_and_expanded_batches() -> None:
    fused_BLE = torch.randn(3, 20, 4 * 64 + 7)
    q_BLHK = fused_BLE[:, :, 7:].unflatten(2, (4, 64))
    cache_BSGK = torch.randn(1, 200, 2, 2 * 64)
    k, v = cache_BSGK[:, :90, :, :64].expand(3, -1, -1, -1), cache_BSGK[:, :90, :, 64:].expand(3, -1, -1, -1)
    truth, _ = attention.run(q_BLHK.contiguous(), k.contiguous(), v.contiguous(), 0.125)
    assert torch.equal(attention.run(q_BLHK, k, v, 0.125)[0], truth)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_before", [0, 3, 8, 64, 8 * 37 + 5])
def test_attention_in_blocks_of_keys_is_attention(n_before, causal) -> None:
    """How cuDNN is called for a chunk, with a plain kernel in its place, and what merges its results."""
    q, k, v = torch.randn(2, 8, 4, 24), torch.randn(2, n_before + 8, 2, 24), torch.randn(2, n_before + 8, 2, 24)
    sizes = []

    def square(q, k, v, scale, causal):
        sizes.append(k.shape[1])
        return attention_reference.run(q, k, v, scale, causal, None, None, True)

    parts = cudnn.pieces(q, k, v, 0.2, causal, square, cudnn.by_triton)
    assert {size & (size - 1) for size in sizes} == {0} and max(sizes) <= 16 * 8
    truth = attention_reference.run(q.double(), k.double(), v.double(), 0.2, causal, None, None, True)
    for got, expected in zip(attention.merged(parts), truth):
        assert error(got, expected) < 1e-5


def test_attention_merges_what_was_not_seen() -> None:
    parts = [(torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2)) for _ in range(3)]
    for n, (y, lse) in enumerate(parts):
        for gone in (5, 6 + n):  # query 5 saw nothing anywhere
            y[0, gone], lse[0, gone] = 0, -torch.inf
    parts[1][1][0, 9, 1] = torch.nan  # which is no -inf, then
    y, lse = attention.merged(parts)
    truth, truth_lse = attention_op.merge(parts)
    for got, expected in ((y, truth), (lse, truth_lse)):
        assert torch.allclose(got, expected, atol=1e-6, equal_nan=True) and got[0, 9, 1].isnan().all()
    assert (y[0, 5] == 0).all() and (lse[0, 5] == -torch.inf).all()


@pytest.mark.parametrize(
    ("op", "cases"), [(scan_op, scan_cases), (conv_op, conv_cases), (attention_op, attention_cases)], ids=str
)
def test_the_ops_choose_it_here(op, cases) -> None:
    """By name through the contract, as a model would."""
    name = op.__name__.rpartition(".")[2]
    case = cases.CASES[20] if name == "attention" else replace(cases.PLAIN, length=3, channels=5)
    options = {"return_lse": True} if name == "attention" else {}
    call = getattr(op, name)
    found = [call(*case.inputs(), backend=backend, **options) for backend in ("triton", "reference")]
    for got, truth in zip(*found):
        assert error(got, truth) < 1e-5


@pytest.mark.parametrize("packing", [None, "wild"])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_a_state_replaced_in_place_is_the_new_state(length, packing, several_spans) -> None:
    for op, cases in ((scan_op, scan_cases), (conv_op, conv_cases)):
        name = op.__name__.rpartition(".")[2]
        args = list(replace(cases.PLAIN, length=length, channels=5, packing=packing).inputs())
        place = cases.NAMES.index("state")
        with torch.no_grad():
            y, state = getattr(op, name)(*args, backend="triton")
        for given in (args[place].clone(), args[place].transpose(1, 2).contiguous().transpose(1, 2)):
            args[place] = given
            address = given.data_ptr()
            assert torch.equal(getattr(op, f"{name}_")(*args, backend="triton"), y)
            assert torch.equal(given, state) and given.data_ptr() == address


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x with its tokens 2^26 elements apart: the 33rd lies 2^31 from the first. Only touched pages take memory."""
    try:
        room = torch.empty(x.shape[1] * 2**26 + x[0, 0].numel(), dtype=x.dtype)
    except RuntimeError as refused:
        pytest.skip(f"4 GiB of address space: {refused}")
    return room.as_strided(x.shape, (1, 2**26, *x.stride()[2:])).copy_(x)


def test_offsets_beyond_32_bits() -> None:
    half = {"dtype": torch.bfloat16, "batch": 1, "length": 34, "channels": 8}
    for run, cases in ((scan.run, scan_cases), (conv.run, conv_cases)):
        x, *rest = replace(cases.PLAIN, **half).inputs()
        far = far_apart(x)
        near, away = (outputs_and_gradients(run, cases.NAMES, (u, *rest)) for u in (x.contiguous(), far))
        for name, value in near.items():
            assert torch.equal(value, away[name]), name
    q, k, v = torch.randn(1, 3, 2, 16), torch.randn(1, 34, 1, 16).half(), torch.randn(1, 34, 1, 16).half()
    truth, _ = attention.run(q.half(), k, v, 0.25)
    assert torch.equal(attention.run(q.half(), far_apart(k), far_apart(v), 0.25)[0], truth)
