"""The 3 x 3 convolution: by hand, against fp64 in any size, whatever the batch and the threads, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.encoders.vit import ResidualConv
from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.conv3x3 import conv3x3
from longllava.ops.conv3x3.cases import Case
from tests.kernels import needs_kernels


def call(batch=2, inputs=32, outputs=32, height=8, width=8, seed=0):
    return Case("", batch, (inputs, outputs), height, width).inputs(seed)[:4]


def in_fp64(x, weight, bias, residual):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()


def compare(seed=0, **sizes):
    """Also run in a process of its own for each form of the kernels (test_forms.py)."""
    args = call(**sizes, seed=seed)
    truth = in_fp64(*args)
    direct, found = conv3x3(*args, backend="reference"), conv3x3(*args, backend="cpu")
    allowed = 8 * (direct - truth).abs().max() + 1e-6  # 2.2 times as far on average
    assert (found - truth).abs().max() <= allowed
    assert torch.equal(conv3x3(*args, relu=True, backend="cpu"), found.relu())
    without = conv3x3(*args[:3], backend="cpu")
    assert (without + args[3] - truth).abs().max() <= allowed


@needs_kernels
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_by_hand(backend):
    """A corner, an edge and an inner pixel see 4, 6 and 9 ones of each input channel."""
    x, weight = torch.ones(1, 32, 5, 6), torch.zeros(32, 32, 3, 3)
    weight[3] = 1 / 32
    y = conv3x3(x, weight, torch.full((32,), -5.0), backend=backend)
    assert y[0, 3, :2, :2].flatten().tolist() == pytest.approx([-1.0, 1.0, 1.0, 4.0], abs=1e-5)
    assert y[0, 3, 4, 5].item() == pytest.approx(-1.0, abs=1e-5) and y[0, 4].unique().tolist() == [-5.0]
    weight[3, :, 0], weight[3, :, :, 2] = 0, 0  # what is left sees the pixels below and on the left
    y = conv3x3(x.cumsum(2).cumsum(3), weight, torch.zeros(32), torch.ones(1, 32, 5, 6), relu=True, backend=backend)
    assert y[0, 3, 1, 2].item() == pytest.approx(1 + 2 * 2 + 2 * 3 + 3 * 2 + 3 * 3, abs=1e-4)
    assert y[0, 3, 4, 0].item() == pytest.approx(6.0, abs=1e-5) and y[0, 4].unique().tolist() == [1.0]


@needs_kernels
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 3), st.integers(1, 14), st.integers(1, 14), st.sampled_from([32, 48]), st.sampled_from([32, 48, 80]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_size_matches_the_reference(batch, height, width, inputs, outputs, seed):
    if batch:
        compare(seed, batch=batch, height=height, width=width, inputs=inputs, outputs=outputs)
    else:
        args = call(0, inputs, outputs, height, width)
        assert conv3x3(*args, backend="cpu").shape == (0, outputs, height, width)


@needs_kernels
def test_batch_and_threads_do_not_change_a_bit():
    x, weight, bias, residual = call(batch=7, height=24, width=13, inputs=48)
    whole = conv3x3(x, weight, bias, residual, backend="cpu")
    alone = [conv3x3(x[i : i + 1], weight, bias, residual[i : i + 1], backend="cpu") for i in range(7)]
    assert torch.equal(whole, torch.cat(alone))
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            assert torch.equal(conv3x3(x, weight, bias, residual, backend="cpu"), whole)
    finally:
        torch.set_num_threads(before)
    y = conv3x3(x.contiguous(), weight, bias, residual.contiguous(), backend="cpu")
    assert torch.equal(y, whole) and y.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_a_pixel_that_is_not_finite_spoils_no_other_tile():
    x, weight, bias, residual = call(batch=1, height=12, width=12)
    clean = conv3x3(x, weight, bias, residual, backend="cpu")
    x[0, 5, 5, 5] = torch.nan
    found = conv3x3(x, weight, bias, residual, relu=True, backend="cpu")
    assert found[..., 4:7, 4:7].isnan().all()
    assert torch.equal(found[..., 8:, :], clean.relu()[..., 8:, :])


def test_gradients_are_the_references():
    leaves = [t.requires_grad_() for t in call()]
    found = torch.autograd.grad(conv3x3(*leaves, relu=True).square().sum(), leaves)
    truth = torch.autograd.grad((F.conv2d(*leaves[:3], padding=1) + leaves[3]).relu().square().sum(), leaves)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_residual_block_without_gradients_is_the_one_with():
    """Norm, residual and ReLU are folded into the convolutions, the second one's residual is the block's input."""
    torch.manual_seed(0)
    block = ResidualConv(48).eval()
    for norm in (block.first[1], block.second[1]):
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2), norm.bias.data.uniform_(-1, 1)
    x = torch.randn(3, 48, 10, 9).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with_gradients = block(x).detach()
    with torch.inference_mode():
        found = block(x)
    assert torch.equal(x, before) and (found == 0).any()
    torch.testing.assert_close(found, with_gradients, rtol=1e-5, atol=2e-5)


def test_what_does_not_fit_is_named():
    x, weight, bias, residual = call()
    with pytest.raises(LongLLaVAError, match=r"weight \(K, C, 3, 3\), got \(2, 32, 8, 8\) and \(32, 32, 3, 2\)"):
        conv3x3(x, weight[..., :2], bias)
    with pytest.raises(LongLLaVAError, match=r"bias must be \(32,\), got \(4,\)"):
        conv3x3(x, weight, bias[:4])
    with pytest.raises(LongLLaVAError, match=r"residual must be \(2, 32, 8, 8\), got \(1, 32, 8, 8\)"):
        conv3x3(x, weight, bias, residual[:1])
    for reason, args in {
        "takes float32, got bfloat16": [t.bfloat16() for t in (x, weight, bias)],
        "multiples of 16 channels from 32 on, got 16 and 32": (x[:, :16], weight[:, :16], bias),
        "multiples of 16 channels from 32 on, got 32 and 24": (x, weight[:24], bias[:24]),
        "has no backward": (x, weight.clone().requires_grad_(), bias),
        "slower than torch for 160 x 160 channels and 8 tiles": call(2, 160, 160)[:3],
    }.items():
        with pytest.raises(BackendError, match=reason):
            conv3x3(*args, backend="cpu")
    bare = torch.zeros(1, 16, 4, 4), torch.zeros(32, 16, 3, 3), torch.arange(32.0)
    assert conv3x3(*bare)[0, :, 0, 0].tolist() == list(range(32))  # torch serves where the kernel does not
