"""The encoder without gradients is the encoder with them; patches as rows are the convolution."""

import pytest
import torch
import torch.nn.functional as F

from longllava.config import EncoderConfig
from longllava.encoders import build_encoder
from longllava.encoders.vit import patch_rows

SMALL = {"image_size": 28, "patch_size": 7, "width": 32, "n_layers": 3, "n_heads": 2, "mlp_width": 64}


def encoder(**changes):
    torch.manual_seed(0)
    built = build_encoder(EncoderConfig(**{**SMALL, "select_layer": -1, **changes})).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("changes", [{}, {"select_layer": -4}, {"pre_norm": False, "class_token": False}], ids=str)
def test_without_gradients_it_gives_the_same(activation, changes):
    vit = encoder(activation=activation, **changes)
    pixels = torch.randint(0, 256, (3, 3, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
    truth = vit(pixels).detach()
    with torch.no_grad():
        found = vit(pixels)
    assert truth.std() > 0.1 and torch.allclose(found, truth, atol=2e-5)


def test_patches_as_rows_are_the_convolution():
    pixels, weight = torch.randn(2, 3, 28, 28), torch.randn(5, 3, 7, 7)
    truth = F.conv2d(pixels, weight, stride=7).flatten(2).transpose(1, 2)
    assert torch.allclose(F.linear(patch_rows(pixels, 7), weight.flatten(1)), truth, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    vit = encoder(width=128, activation="quick_gelu")
    pixels = torch.randint(0, 256, (5, 3, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
    with torch.no_grad():
        truth = vit(pixels)
        found = vit.to("cuda", torch.bfloat16)(pixels.cuda())
    assert (found.float().cpu() - truth).norm() < 0.02 * truth.norm()
