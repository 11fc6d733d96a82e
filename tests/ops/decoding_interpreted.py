"""The Triton kernels of decoding, one token a sequence, in Triton's interpreter. test_triton.py runs this file:

TRITON_INTERPRET=1 python -m pytest tests/ops/decoding_interpreted.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longllava.config import BackboneConfig
from longllava.errors import BackendError, LongLLaVAError
from longllava.nn import Context, StaticMambaState
from longllava.nn.mamba import Mamba
from longllava.ops import fused
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.causal_conv1d import triton as conv
from longllava.ops.few_rows import few_rows_linear
from longllava.ops.few_rows import triton as few_rows
from tests.ops.parity import error, outputs_and_gradients, poison_empty

# numpy's words for what a GPU does without one
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1024, 17), (1, 5, 3), (2, 300, 8), (4, 512, 9)])
def test_few_rows_match_the_reference(rows, inputs, outputs, dtype) -> None:
    x, weight = torch.randn(rows, 1, inputs).to(dtype), torch.randn(outputs, 2 * inputs).to(dtype)[:, :inputs]
    for bias in (None, torch.randn(outputs).to(dtype)):
        truth = few_rows_linear(*(None if t is None else t.double() for t in (x, weight, bias)), backend="reference")
        found = few_rows_linear(x, weight, bias, backend="triton")
        slack = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert found.dtype == dtype and found.shape == truth.shape and error(found, truth) < slack


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 256, 4), (3, 300, 9), (4, 2500, 5)])
def test_few_rows_take_every_int8_weight_exactly(rows, inputs, outputs) -> None:
    weight = torch.arange(outputs * inputs).view(outputs, inputs).to(torch.int8)  # every value
    scale = torch.rand(outputs)
    x = torch.randint(-8, 9, (rows, inputs)).float()  # products and sums of integers are exact
    truth = ((x.double() @ weight.double().T).float() * scale).double()
    assert torch.equal(few_rows.product(x, weight, scale, None).double(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "sizes"), [(1, (256, 16, 16)), (7, (5, 1, 3)), (0, (4, 4, 4))])
def test_norms_of_parts_are_the_norms_of_each(rows, sizes, dtype, monkeypatch) -> None:
    poison_empty(monkeypatch)
    x = torch.randn(rows, 2 * sum(sizes)).to(dtype)[None, :, : sum(sizes)]
    weights = tuple(torch.randn(size).to(dtype) for size in sizes)
    found = fused.rms_norm_parts(x, weights, 1e-6, backend="triton")
    for part, weight, y in zip(x.split(sizes, -1), weights, found):
        truth, _ = fused.rms_norm(part, weight, 1e-6, backend="triton")
        assert y.is_contiguous() and torch.equal(y, truth)
        wide, _ = fused.rms_norm(part.double(), weight.double(), 1e-6, backend="reference")
        assert rows == 0 or error(y, wide) < {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


def test_norms_of_parts_say_what_does_not_fit() -> None:
    x, weight = torch.randn(2, 6), torch.ones(2)
    for y, truth in zip(fused.rms_norm_parts(x, (weight, weight * 2, weight), 1e-6), (1, 2, 1)):
        assert (y.square().mean(-1) - truth**2).abs().max() < 1e-4
    with pytest.raises(LongLLaVAError, match=r"as long together as x's rows of \(6,\), got \(2,\), \(2,\)"):
        fused.rms_norm_parts(x, (weight, weight), 1e-6)
    with pytest.raises(BackendError, match="takes three parts, got 2"):
        fused.rms_norm_parts(x[:, :4], (weight, weight), 1e-6, backend="triton")
    wanted = weight.clone().requires_grad_()
    assert fused.rms_norm_parts(x, (weight, wanted, weight), 1e-6)[1].requires_grad
    with pytest.raises(BackendError, match="has no backward, and gradients are wanted"):
        fused.rms_norm_parts(x, (weight, wanted, weight), 1e-6, backend="triton")
    with pytest.raises(BackendError, match="got weight in float64"):
        fused.rms_norm_parts(x, (weight, weight.double(), weight), 1e-6, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conv_reads_taps_and_bias_in_their_own_dtype(dtype) -> None:
    x, weight, bias, *rest = replace(conv_cases.PLAIN, length=5, channels=9, batch=1).inputs()
    weight, bias = weight.to(dtype), bias.to(dtype)
    assert conv.held(weight).dtype == (torch.float32 if dtype == torch.float64 else dtype)
    narrow, wide = (
        outputs_and_gradients(conv.run, conv_cases.NAMES, (x, w, b, *rest))
        for w, b in ((weight, bias), (weight.float(), bias.float()))
    )
    for name, value in narrow.items():
        assert torch.equal(value, wide[name].to(value.dtype)), name


@pytest.mark.parametrize("n_splits", [2, 32, 71])
def test_spans_of_keys_are_merged_also_where_some_saw_nothing(n_splits) -> None:
    from longllava.ops.attention.triton_kernels import merge

    parts, part_lse = torch.randn(n_splits, 5, 24), 3 * torch.randn(n_splits, 5)
    part_lse[:, 1] = -torch.inf
    part_lse[::2, 2], part_lse[0, 3] = -torch.inf, torch.nan
    parts[part_lse == -torch.inf] = 0
    y, lse = torch.empty(5, 24), torch.empty(5)
    merge[(5,)](parts, part_lse, y, lse, 5, n_splits, DIM=24, PADDED=32, SPLITS=32)
    weight = part_lse.double().softmax(0).masked_fill(part_lse == -torch.inf, 0)
    truth = torch.einsum("sr,srd->rd", weight, parts.double())
    assert y[3].isnan().all() and lse[3].isnan() and (y[1] == 0).all() and lse[1] == -torch.inf
    for row in (0, 2, 4):
        assert error(y[row], truth[row]) < 1e-6
        assert abs(lse[row] - part_lse[:, row].double().logsumexp(0)) < 1e-5


class Casts(TorchDispatchMode):
    """Notes the dtypes of what is cast; copies by the interpreter itself, of bytes, are none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.seen = [*getattr(self, "seen", []), args[0].dtype]
        return function(*args, **(kwargs or {}))


def test_a_mixer_that_decodes_copies_nothing() -> None:
    mixer = Mamba(BackboneConfig(width=32, dt_rank=8))
    mixer.initialise_()
    for name, parameter in mixer.named_parameters():
        if name not in ("A_log_EN", "D_E", "dt_bias_E"):  # as a model keeps them
            parameter.data = parameter.data.bfloat16()
    state = StaticMambaState(*mixer.empty_state(1, 1, torch.device("cpu"), torch.bfloat16))
    x = torch.randn(1, 1, 32).bfloat16()
    with torch.no_grad():
        mixer(x, Context(), state)  # A is made once
        with Casts() as casts:
            mixer(x, Context(), state)
    assert getattr(casts, "seen", []) == []
