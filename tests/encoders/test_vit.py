"""The encoder without gradients is the encoder with them; patches as rows are the convolution."""

import pytest
import torch
import torch.nn.functional as F

from longllava.bridges import pool_features
from longllava.checkpoints import load_model
from longllava.config import EncoderConfig
from longllava.encoders import build_encoder
from longllava.encoders.vit import patch_rows
from longllava.nn import linear
from longllava.ops.vision import linear_activated

STEM = {"image_size": 32, "patch_size": 8, "stem_widths": (8, 16), "stem_strides": (4, 2), "stem_blocks": (1, 2)}
SMALL = {"image_size": 28, "patch_size": 7, "width": 32, "n_layers": 3, "n_heads": 2, "mlp_width": 64}


def encoder(**changes):
    torch.manual_seed(0)
    built = build_encoder(EncoderConfig(**{**SMALL, "select_layer": -1, **changes})).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, statistic in built.named_buffers():
        if "running" in name:  # of the stem's norms
            torch.nn.init.uniform_(statistic, 0.5, 2.0)
    return built


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "changes", [{}, {"select_layer": -4}, {"pre_norm": False, "class_token": False}, STEM], ids=str
)
def test_without_gradients_it_gives_the_same(activation, changes):
    vit = encoder(activation=activation, **changes)
    side = vit.config.image_size
    pixels = torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()
    truth = vit(pixels).detach()
    with torch.no_grad():
        found = vit(pixels)
        assert vit(pixels[:0]).shape == (0, *truth.shape[1:])
    assert truth.std() > 0.1 and torch.allclose(found, truth, atol=2e-5)
    assert vit(pixels[:0]).shape == (0, *truth.shape[1:])


@pytest.mark.parametrize("gradients", [False, True])
def test_features_that_lie_channel_by_channel_are_pooled(gradients):
    """As torch's own convolutions leave those of a narrow stem without a norm behind it."""
    narrow = {"image_size": 8, "patch_size": 2, "stem_widths": (4,), "stem_strides": (2,), "stem_blocks": (2,)}
    vit = encoder(pre_norm=False, class_token=False, **narrow)
    with torch.set_grad_enabled(gradients):
        features = vit(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))
        for layout in (features.contiguous(), features.mT.contiguous().mT, features):
            pooled = pool_features(layout, 4, "2d")
            assert torch.allclose(pooled[:, 1], features[:, [2, 3, 6, 7]].mean(1), atol=1e-5)


def test_the_callers_default_dtype_changes_no_picture():
    pixels, found = torch.randint(0, 256, (1, 3, 96, 96), generator=torch.Generator().manual_seed(1)).byte(), []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            found.append(load_model("nano", dtype=torch.float32).encode(pixels))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


def test_off_a_cpu_a_product_and_its_activation_are_one_call(monkeypatch):
    vit, calls = encoder(activation="gelu_tanh").to("meta"), []
    monkeypatch.setattr(linear, "linear_activated", lambda *args: calls.append(args) or linear_activated(*args))
    pixels = torch.empty(3, 3, 28, 28, device="meta")
    vit(pixels)
    assert not calls
    with torch.no_grad():
        assert vit(pixels).shape == (3, 16, 32)
    for block, (x, weight, bias, activation) in zip(vit.layers, calls, strict=True):
        assert x.shape == (3, 17, 32) and weight is block.up.weight and bias is block.up.bias
        assert activation == "gelu_tanh"


@pytest.mark.parametrize(("side", "size"), [(28, 7), (31, 7), (16, 4)])  # 31: 3 pixels are left over, as of SigLIP's
def test_patches_as_rows_are_the_convolution(side, size):
    pixels, weight = torch.randn(2, 3, side, side), torch.randn(5, 3, size, size)
    truth = F.conv2d(pixels, weight, stride=size).flatten(2).transpose(1, 2)
    rows, width = patch_rows(pixels, size), 3 * size * size
    assert rows.shape[2] == -(-width // 8) * 8 and not rows[..., width:].any()
    assert torch.allclose(F.linear(rows[..., :width], weight.flatten(1)), truth, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    vit = encoder(width=128, activation="quick_gelu", image_size=31)
    pixels = torch.randint(0, 256, (5, 3, 31, 31), generator=torch.Generator().manual_seed(1)).byte()
    with torch.no_grad():
        truth = vit(pixels)
        found = vit.to("cuda", torch.bfloat16)(pixels.cuda())
    assert (found.float().cpu() - truth).norm() < 0.02 * truth.norm()
