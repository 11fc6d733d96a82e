"""The convolution of pixels: by hand, against fp64 in any size, whatever the batch and the threads, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.config import EncoderConfig
from longllava.encoders.vit import VisionTransformer
from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.pixel_conv import pixel_conv
from longllava.ops.pixel_conv.cases import Case
from tests.kernels import needs_kernels


def call(seed=0, **sizes):
    *tensors, stride, padding, _ = Case(**sizes).inputs(seed)
    return tensors, {"stride": stride, "padding": padding}


def compare(seed=0, **sizes):
    """Also run in a process of its own for each form of the kernels (test_forms.py)."""
    tensors, shape = call(seed, **sizes)
    pixels, *floats = tensors
    truth = pixel_conv(pixels, *(t.double() for t in floats), **shape, backend="reference")
    direct, found = (pixel_conv(*tensors, **shape, backend=name) for name in ("reference", "cpu"))
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= 4 * (direct - truth).abs().max() + 1e-6
    assert torch.equal(pixel_conv(*tensors, **shape, relu=True, backend="cpu"), found.relu())


@needs_kernels
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_by_hand(backend):
    """Pixels of 7 + 3 (their row) + column, mean 7, std 2: a corner sees the padding as the mean, not as black."""
    pixels = (7 + 3 * torch.arange(5)[:, None] + torch.arange(6)).byte().expand(1, 2, 5, 6)
    weight = torch.zeros(16, 2, 3, 3)
    weight[4, 1] = 1
    mean, std = torch.tensor([100.0, 7.0]), torch.tensor([1.0, 2.0])
    y = pixel_conv(pixels, mean, std, weight, torch.full((16,), -4.0), stride=2, padding=1, relu=True, backend=backend)
    assert y.shape == (1, 16, 3, 3)
    assert y[0, 4, 0].tolist() == [
        (0 + 1 + 3 + 4) / 2 - 4,
        (1 + 2 + 3 + 4 + 5 + 6) / 2 - 4,
        (3 + 4 + 5 + 6 + 7 + 8) / 2 - 4,
    ]
    assert y[0, 4, 1, 1].item() == sum(range(4, 13)) / 2 - 4
    assert y[0, 5].unique().tolist() == [0.0]


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.sampled_from([16, 48]),
    st.integers(1, 9), st.integers(1, 5), st.integers(0, 4), st.integers(0, 99),
)  # fmt: skip
def test_any_size_matches_the_reference(batch, channels, height, width, outputs, kernel, stride, padding, seed):
    kernel = min(kernel, height + 2 * padding, width + 2 * padding)
    compare(seed, batch=batch, channels=channels, height=height, width=width, outputs=outputs, kernel=kernel,
            stride=stride, padding=padding)  # fmt: skip


@needs_kernels
def test_no_picture():
    tensors, shape = call(batch=0)
    assert pixel_conv(*tensors, **shape, backend="cpu").shape == (0, 32, 6, 6)


@needs_kernels
def test_batch_threads_and_strides_do_not_change_a_bit():
    (pixels, *floats), shape = call(batch=7, height=61, width=50, outputs=48)
    whole = pixel_conv(pixels, *floats, **shape, backend="cpu")
    alone = [pixel_conv(pixels[i : i + 1], *floats, **shape, backend="cpu") for i in range(7)]
    assert torch.equal(whole, torch.cat(alone)) and whole.is_contiguous(memory_format=torch.channels_last)
    laid_out = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixel_conv(laid_out, *floats, **shape, backend="cpu"), whole)
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            assert torch.equal(pixel_conv(pixels, *floats, **shape, backend="cpu"), whole)
    finally:
        torch.set_num_threads(before)


def test_gradients_are_the_references():
    (pixels, mean, std, weight, bias), shape = call()
    leaves = weight.requires_grad_(), bias.requires_grad_()
    found = torch.autograd.grad(pixel_conv(pixels, mean, std, *leaves, **shape, relu=True).square().sum(), leaves)
    x = (pixels.float() - mean[:, None, None]) / std[:, None, None]
    y = torch.nn.functional.conv2d(x, *leaves, **shape).relu()
    for a, b in zip(found, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def test_a_stem_that_reads_bytes_is_the_one_that_reads_floats():
    torch.manual_seed(0)
    config = EncoderConfig(
        image_size=32, patch_size=8, width=32, n_heads=2, n_layers=1, mlp_width=32, stem_widths=(32, 32),
        stem_strides=(4, 2), stem_blocks=(1, 0),
    )  # fmt: skip
    encoder = VisionTransformer(config).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2), module.bias.data.uniform_(-1, 1)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    normalised = (pixels.float() - encoder.mean) / encoder.std
    with torch.inference_mode():
        assert encoder.reads_bytes(pixels)
        found, truth = encoder(pixels), encoder(normalised)
        in_bf16 = encoder.bfloat16()(pixels)
    assert truth.std() > 0.1
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    assert in_bf16.dtype == torch.bfloat16 and (in_bf16 - truth).abs().mean() < 0.05


def test_what_does_not_fit_is_named():
    (pixels, mean, std, weight, bias), _ = call()
    with pytest.raises(LongLLaVAError, match=r"weight \(K, C, S, S\), got \(2, 3, 24, 24\) and \(32, 3, 8, 7\)"):
        pixel_conv(pixels, mean, std, weight[..., :7], bias)
    with pytest.raises(LongLLaVAError, match=r"std must be \(3,\), got \(1,\)"):
        pixel_conv(pixels, mean, std[:1], weight, bias)
    with pytest.raises(LongLLaVAError, match=r"bias must be \(32,\), got \(4,\)"):
        pixel_conv(pixels, mean, std, weight, bias[:4])
    with pytest.raises(LongLLaVAError, match="kernel of 8 pixels, stride 1 and padding 1 do not fit 24 x 5 pixels"):
        pixel_conv(pixels[..., :5], mean, std, weight, bias, padding=1)
    for reason, args in {
        "pixels in uint8 and the rest in float32, got uint8 and bfloat16": [
            pixels, *(t.bfloat16() for t in (mean, std, weight, bias))
        ],
        "got float32 and float32": (pixels.float(), mean, std, weight, bias),
        "multiples of 16 output channels, got 24": (pixels, mean, std, weight[:24], bias[:24]),
        "has no backward": (pixels, mean, std, weight.clone().requires_grad_(), bias),
    }.items():  # fmt: skip
        with pytest.raises(BackendError, match=reason):
            pixel_conv(*args, backend="cpu")
    assert pixel_conv(pixels, mean, std, weight[:5], bias[:5]).shape == (2, 5, 17, 17)  # torch serves there
