"""attention: every backend against the reference in fp64, gradients included, and what the contract promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.attention import BACKENDS, attention, cpu
from longllava.ops.attention.cases import CASES, Case
from tests.kernels import FORMS, needs_kernels, run_in_form


def results(case: Case, backend: str, dtype: torch.dtype, gradients: bool = True) -> dict[str, Tensor]:
    """y, lse and the gradients of q, k and v, from y and from lse, in float64."""
    inputs = [x.to(dtype).requires_grad_(gradients) for x in case.inputs()]
    seq_idx_q, seq_idx_k = case.seq_idx()
    y, lse = attention(
        *inputs,
        causal=case.causal,
        seq_idx_q=seq_idx_q,
        seq_idx_k=seq_idx_k,
        return_lse=True,
        backend=backend,
    )
    found = {"y": y, "lse": lse}
    if gradients:
        random = torch.Generator().manual_seed(1)
        grad_y = torch.randn(y.shape, generator=random).to(case.dtype)
        grad_lse = torch.randn(lse.shape, generator=random).masked_fill(lse.isinf(), 0)
        grads = torch.autograd.grad((y, lse), inputs, (grad_y.to(y.dtype), grad_lse.to(lse.dtype)))
        found |= dict(zip(("grad_q", "grad_k", "grad_v"), grads))
    return {name: x.detach().double() for name, x in found.items()}


def error(got: Tensor, truth: Tensor) -> float:
    """Relative error; -inf must stand in the same places."""
    assert torch.equal(got.isinf(), truth.isinf())
    got, truth = got.masked_fill(truth.isinf(), 0), truth.masked_fill(truth.isinf(), 0)
    return ((got - truth).norm() / truth.norm().clamp_min(1e-20)).item() if truth.numel() else 0.0


def compare(case: Case, backend: str) -> None:
    truth = results(case, "reference", torch.float64)
    floor = results(case, "reference", case.dtype)
    for name, got in results(case, backend, case.dtype).items():
        factor = 3 if name.startswith("grad") else 2
        bound = factor * error(floor[name], truth[name]) + 1e-5
        assert error(got, truth[name]) <= bound, f"{case}: {name}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:-1], ids=str)
def test_matches_reference_in_fp64(backend, case):
    if reason := backend.why_not(*case.inputs()):
        pytest.skip(reason)
    compare(case, backend.name)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_sdpa_without_lse_matches_too(case):
    """Without lse torch's own kernel runs, not plain products."""
    seq_idx_q, seq_idx_k = case.seq_idx()
    options = {"causal": case.causal, "seq_idx_q": seq_idx_q, "seq_idx_k": seq_idx_k}
    truth = attention(*(x.double() for x in case.inputs()), **options, backend="reference")
    floor = attention(*case.inputs(), **options, backend="reference")
    got = attention(*case.inputs(), **options, backend="sdpa")
    assert got.dtype == case.dtype
    assert error(got.double(), truth) <= 2 * error(floor.double(), truth) + 1e-5


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_kernels(form):
    """The forms this processor has, each in a process of its own; bf16 with and without AMX's tiles."""
    code = (
        "from tests.ops.test_attention import CASES, compare\n"
        "for case in CASES[::5] + CASES[-5:]:\n"
        "    compare(case, 'cpu')\n"
    )
    run_in_form(form, code)


@needs_kernels
@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
@pytest.mark.parametrize("head_dim", [33, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_scale_and_scores_that_grow_from_block_to_block(dtype, head_dim, scale):
    """The running softmax begins anew again and again, or hardly ever: scores rise with the keys, or are all 0."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=random) for n in (40, 330, 330))
    k *= torch.linspace(0, 6, 330)[None, :, None, None]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    truth, truth_lse = attention(*(x.double() for x in (q, k, v)), scale=scale, return_lse=True, backend="reference")
    floor, floor_lse = attention(q, k, v, scale=scale, return_lse=True, backend="reference")
    y, lse = attention(q, k, v, scale=scale, return_lse=True, backend="cpu")
    assert error(y.double(), truth) <= 2 * error(floor.double(), truth) + 1e-5
    assert error(lse.double(), truth_lse) <= 2 * error(floor_lse.double(), truth_lse) + 1e-6


@needs_kernels
@pytest.mark.parametrize("case", CASES[-9:], ids=str)
def test_number_of_threads_does_not_change_a_bit(case):
    before = torch.get_num_threads()
    try:
        found = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(results(case, "cpu", case.dtype))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, first in found[0].items():
            assert torch.equal(first, other[name]), name


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_and_expanded_inputs_are_read_in_place(dtype):
    """Views of a fused projection, and one prefix shared by all rows of a batch (stride 0)."""
    fused_BLE = torch.randn(3, 50, 4 * 64 + 7, dtype=torch.float32).to(dtype)
    q_BLHK = fused_BLE[:, :, 7:].unflatten(2, (4, 64))
    cache_BSGK = torch.randn(1, 200, 2, 2 * 64).to(dtype)
    k, v = cache_BSGK[:, :90, :, :64].expand(3, -1, -1, -1), cache_BSGK[:, :90, :, 64:].expand(3, -1, -1, -1)
    assert k.stride(0) == 0
    for n_queries in (50, 2):
        q = q_BLHK[:, :n_queries]
        truth = attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="cpu")
        assert torch.equal(attention(q, k, v, backend="cpu"), truth)
    inner = torch.randn(3, 64, 50, 4).to(dtype).permute(0, 2, 3, 1)  # last axis not contiguous
    assert torch.equal(attention(inner, k, v, backend="cpu"), attention(inner.contiguous(), k, v, backend="cpu"))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_queries", [1, 2, 40, 130])
def test_what_a_query_does_not_see_may_be_nan(dtype, n_queries):
    """A NaN in a key reaches the queries that see it and no other; gradients alike."""
    case = Case(
        name="nan", batch=2, n_queries=n_queries, n_keys=140, n_heads=4, n_groups=2, head_dim=64, dtype=dtype,
        packing="packed",
    )  # fmt: skip
    seq_idx_q, seq_idx_k = case.seq_idx()
    seq_idx_k[0, :5] = seq_idx_k[1, -5:] = seq_idx_k[:, 60:67] = -1  # seq_idx_q is a view of it
    clean = [x.detach().requires_grad_() for x in case.inputs()]
    spoiled = [x.detach().clone() for x in clean]
    padding_BS, padding_BL = seq_idx_k < 0, seq_idx_q < 0
    spoiled[0][padding_BL] = torch.nan
    for x in spoiled[1:]:
        x[padding_BS] = torch.nan
        x[0, 139] = torch.inf  # a real key: only the last query sees it
    spoiled = [x.requires_grad_() for x in spoiled]
    found = []
    for inputs in (clean, spoiled):
        y, lse = attention(*inputs, seq_idx_q=seq_idx_q, seq_idx_k=seq_idx_k, return_lse=True, backend="cpu")
        grads = torch.autograd.grad(y[:, :-1].sum(), inputs)
        found.append((y.detach(), lse.detach(), *grads))
    for truth, got in zip(*found):
        is_key = truth.shape[1] == 140 and truth.shape[2] == 2
        shown = slice(None, 138) if is_key else slice(None, n_queries - 1)  # the last query sees 138 and 139
        assert torch.equal(truth[0, shown], got[0, shown])
        assert torch.equal(truth[1], got[1])
    assert not found[1][0][0, -1].isfinite().all()
    assert (found[0][0][padding_BL] == 0).all() and (found[0][1][padding_BL] == -torch.inf).all()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_padding_may_be_nan_in_every_backend(backend, return_lse):
    case = Case(name="nan", batch=3, n_queries=20, n_keys=90, n_heads=4, n_groups=2, head_dim=8, packing="wild")
    seq_idx_q, seq_idx_k = case.seq_idx()
    clean, spoiled = (case.inputs() for _ in range(2))
    for x, seq_idx in zip(spoiled, (seq_idx_q, seq_idx_k, seq_idx_k)):
        x[seq_idx < 0] = torch.nan
    if reason := backend.why_not(*clean):
        pytest.skip(reason)
    found = []
    for inputs in (clean, spoiled):
        inputs = [x.requires_grad_() for x in inputs]
        options = {"seq_idx_q": seq_idx_q, "seq_idx_k": seq_idx_k, "return_lse": return_lse}
        y = attention(*inputs, **options, backend=backend.name)
        y = y[0] if return_lse else y
        found.append((y.detach(), *torch.autograd.grad(y.sum(), inputs)))
    for truth, got in zip(*found):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("n_queries", [3, 40])
def test_every_value_below_0_is_padding(backend, n_queries):
    q, (k, v) = torch.randn(2, n_queries, 2, 8), torch.randn(2, 2, 80, 1, 8)
    if reason := backend.why_not(q, k, v):
        pytest.skip(reason)
    keys = torch.randint(-3, 2, (2, 80), dtype=torch.int32)
    found = []
    for seq_idx in (keys, keys.clamp(min=-1)):
        own = {"seq_idx_q": seq_idx[:, :n_queries], "seq_idx_k": seq_idx}
        found.append(attention(q, k, v, **own, return_lse=True, backend=backend.name))
    (y, lse), truth = found
    assert torch.equal(y, truth[0]) and torch.equal(lse, truth[1])
    assert (y[keys[:, :n_queries] < 0] == 0).all()


@needs_kernels
def test_a_value_that_is_not_finite_reaches_those_who_see_it():
    q, k, v = torch.randn(1, 100, 2, 8), torch.randn(1, 100, 1, 8), torch.randn(1, 100, 1, 8)
    v[0, 70] = torch.nan
    y = attention(q, k, v, backend="cpu")
    assert y[:, :70].isfinite().all() and y[:, 70:].isnan().all()


@needs_kernels
@pytest.mark.parametrize("case", [CASES[i] for i in (16, 19, 33)], ids=str)
def test_custom_op_is_sound(case):
    """Schema, fake kernel, autograd registration and tracing, for both ops."""
    seq_idx_q, seq_idx_k = case.seq_idx()
    inputs = [x.requires_grad_() for x in case.inputs()]
    torch.library.opcheck(cpu.attention, (*inputs, 0.3, case.causal, seq_idx_q, seq_idx_k, True))
    y, lse = cpu.attention(*inputs, 0.3, case.causal, seq_idx_q, seq_idx_k, True)
    detached = [x.detach() for x in (y, lse, *inputs, y, lse)]
    torch.library.opcheck(cpu.attention_backward, (*detached, 0.3, case.causal, seq_idx_q, seq_idx_k))


@needs_kernels
def test_gradient_of_lse_alone_and_of_half_precision():
    q, k, v = (x.half().requires_grad_() for x in CASES[40].inputs())
    y, lse = attention(q, k, v, return_lse=True, backend="cpu")
    assert y.dtype == torch.float16 and lse.dtype == torch.float32
    grads = torch.autograd.grad(lse.sum(), (q, k))
    truth = torch.autograd.grad(attention(q, k, v, return_lse=True, backend="reference")[1].sum(), (q, k))
    for got, wanted in zip(grads, truth):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_no_keys_at_all(backend):
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 0, 2, 8)
    if reason := backend.why_not(q, k, k):
        pytest.skip(reason)
    y, lse = attention(q, k, k, causal=False, return_lse=True, backend=backend.name)
    assert (y == 0).all() and (lse == -torch.inf).all()


def test_errors_name_what_is_wrong():
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 6, 2, 8)
    seq_idx = torch.zeros(1, 4, dtype=torch.int32)
    for wrong, words in (
        (lambda: attention(q[0], k, k), r"q must be \(B, L, H, K\).*\(4, 4, 8\)"),
        (lambda: attention(q, k, k[:, :5]), r"\(1, 5, 2, 8\)"),
        (lambda: attention(q, k[..., :4], k[..., :4]), "agree in batch and head size"),
        (lambda: attention(q[:, :, :3], k, k), "multiple of k's, got 3 and 2"),
        (lambda: attention(q[:, :, :0], k, k), "multiple of k's, got 0 and 2"),
        (lambda: attention(q, k[:, :3], k[:, :3]), "4 queries and 3 keys"),
        (lambda: attention(q, k.bfloat16(), k), "one float dtype"),
        (lambda: attention(q, k, k, seq_idx_q=seq_idx), "go together"),
        (
            lambda: attention(q, k, k, seq_idx_q=seq_idx, seq_idx_k=seq_idx),
            r"seq_idx_k must be int32 of shape \(1, 6\)",
        ),
    ):
        with pytest.raises(LongLLaVAError, match=words):
            wrong()
    with pytest.raises(BackendError, match="no backend 'quick'"):
        attention(q, k, k, backend="quick")
    with pytest.raises(BackendError, match="float64"):
        attention(q.double(), k.double(), k.double(), backend="cpu")
