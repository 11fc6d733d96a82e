"""Layers with int8 weights: what they compute, and which of them make int8 rows for others."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longllava.encoders.vit import Activation, LayerNorm
from longllava.nn import Context
from longllava.nn.mlp import MixtureOfExperts, SwiGLU
from longllava.nn.norm import RMSNorm
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.quantized import Quantized
from longllava.quant import (
    Inputs,
    Int8Config,
    Int8Linear,
    QuantizedActivation,
    QuantizedLayerNorm,
    QuantizedNorm,
    build_model,
    float_places,
    quantize_,
)
from tests.quant.quantised import dequantised, hidden, tiny
from tests.tiny import tiny_config

ALWAYS = {"dynamic_from": 1}


def test_norms_quantise_as_their_layers_would():
    model = quantize_(tiny(), Int8Config(**ALWAYS))
    apart = copy.deepcopy(model)
    for block in apart.backbone.layers:
        for name in ("mixer_norm", "ffn_norm"):
            old = getattr(block, name)
            new = RMSNorm(32, old.eps)
            new.weight = old.weight
            setattr(block, name, new)
    for module in (model, apart):
        for block in module.backbone.layers:
            block.mixer_norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    x_BLD = torch.randn(2, 33, 32)
    assert torch.equal(hidden(model, x_BLD), hidden(apart, x_BLD))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_passes_quantise_as_their_readers_would(activation, dtype, monkeypatch):
    eyes = dataclasses.replace(tiny_config().encoder, n_layers=3, activation=activation)
    model = quantize_(tiny(encoder=eyes), Int8Config(parts=("encoder",))).to(dtype)
    apart = copy.deepcopy(model)
    for block in apart.encoder.layers:
        assert isinstance(block.attention_norm, QuantizedLayerNorm) and isinstance(block.mlp_norm, QuantizedLayerNorm)
        assert isinstance(block.activation, QuantizedActivation)
        block.activation = block.activation.floats
        for norm in (block.attention_norm, block.mlp_norm):
            norm.inputs = Inputs(10**6)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    found, rows, product = [], [], Inputs.product
    monkeypatch.setattr(Inputs, "product", lambda inputs, x, *rest: rows.append(x) or product(inputs, x, *rest))
    for one, in_int8 in ((model, 3 + 3 + 2), (apart, 0)):  # what up, down, and qkv but the first read
        rows.clear()
        with torch.no_grad():
            found.append(one.encode(pixels))
        assert len(rows) == 12 and sum(isinstance(x, Quantized) for x in rows) == in_int8
    assert torch.equal(*found)
    trained = model.encoder(pixels)  # where gradients are wanted, rows stay floats until the product
    assert trained.requires_grad and (trained - found[0]).norm() < 0.05 * found[0].norm()


def test_an_encoder_whose_inputs_stay_floats_has_its_own_passes():
    config = Int8Config(parts=("encoder",), weight_only=("down",), two_terms=("qkv",), keep=("encoder.layers.1.up",))
    first, second = quantize_(tiny(), config).encoder.layers
    assert isinstance(first.mlp_norm, QuantizedLayerNorm)
    assert type(first.attention_norm) is type(second.mlp_norm) is LayerNorm and type(first.activation) is Activation


@pytest.mark.parametrize(
    "config",
    [
        Int8Config(rotated=()),
        Int8Config(**ALWAYS, rotated=("down_proj",)),
        Int8Config(two_terms=("out_proj",), rotated=()),
        Int8Config(),
    ],
    ids=("plain", "always", "two terms", "rotated"),
)
def test_scans_quantise_as_their_readers_would(config, monkeypatch):
    model, rows = quantize_(tiny(), dataclasses.replace(config, scan_epilogue=True)), []
    apart = quantize_(tiny(), config)
    product = Inputs.product
    monkeypatch.setattr(Inputs, "product", lambda inputs, x, *rest: rows.append(x) or product(inputs, x, *rest))
    for length in (1, 2, 33):
        x_BLD, handed = torch.randn(2, length, 32), []
        for one in (model, apart):
            rows.clear()
            handed.append(hidden(one, x_BLD))
            in_int8 = sum(isinstance(x, Quantized) and x.values.shape[-1] == 64 for x in rows)
            fused = one is model and length >= config.dynamic_from and not config.two_terms
            assert in_int8 == (3 if fused and config.rotated is not None else 0)
        assert torch.equal(*handed)
    x_BLD = torch.randn(1, 12, 32, requires_grad=True)
    model(x_BLD, Context())[0].sum().backward()
    assert x_BLD.grad.abs().sum() > 0


@pytest.mark.parametrize("n_experts", [1, 4])
def test_sums_made_inside_norms_are_the_same(n_experts):
    """What a GPU runs: each residual sum where it is normalised, and there quantised."""
    model = quantize_(tiny(n_experts))
    for length in (1, 30):
        x_BLD = torch.randn(2, length, 32)
        with torch.no_grad():
            got, _ = model.backbone.without_gradients(x_BLD, Context(), None)
        assert torch.equal(got, hidden(model, x_BLD))


@given(rows=st.integers(0, 9), n_in=st.integers(1, 40), n_out=st.integers(1, 20), bias=st.booleans(),
       least=st.integers(1, 12))  # fmt: skip
def test_linear_of_any_shape(rows, n_in, n_out, bias, least):
    linear = nn.Linear(n_in, n_out, bias=bias)
    layer = Int8Linear(n_in, n_out, linear.bias, torch.device("cpu"), Inputs(least))
    values, scale = layer.weight_NK, layer.scale_N
    quantised = quantize_rows(linear.weight)
    values.copy_(quantised.values)
    scale.copy_(quantised.scale)
    x = torch.randn(2, rows, n_in)
    seen = quantize_rows(x).dequantized() if rows >= least else x
    expected = nn.functional.linear(seen, quantised.dequantized(), linear.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        if rows >= least:  # each row as if it were alone
            assert torch.equal(layer(x)[1:], layer(Quantized(*(part[1:] for part in quantize_rows(x)[:2]), x.dtype)))


def test_swiglu_and_experts_of_one_expert_are_one():
    torch.manual_seed(0)
    config = tiny_config(2).backbone
    mixture = MixtureOfExperts(config)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = SwiGLU(config.width, config.mlp_width)
    plain.load_state_dict(mixture.experts[1].state_dict())
    model = tiny(2)
    model.backbone.layers[1].ffn, model.backbone.layers[0].ffn = mixture, plain
    quantize_(model, Int8Config(dynamic_from=3))
    for length in (1, 3, 30):
        x_BLD = torch.randn(1, length, config.width)
        token_S = torch.arange(length)
        with torch.no_grad():
            rows = model.backbone.layers[1].ffn.experts(x_BLD, token_S, torch.tensor([0, 0, length], dtype=torch.int32))
            assert torch.equal(rows, model.backbone.layers[0].ffn(x_BLD)[0])


def test_rotated_layers_are_the_dequantised_model_whatever_their_inputs_are():
    """Few tokens and many, in a mixture and beside it; not in two terms, nor where 16 does not divide the inputs."""
    everything = Int8Config(rotated=("layers",), two_terms=("in_proj",))
    model = quantize_(tiny(4), everything)
    floats = dequantised(model, 4)
    for length, most in ((1, 1e-9), (40, 1e-3)):
        x_BLD = torch.randn(2, length, 32)
        expected = hidden(floats, x_BLD)
        noise = (hidden(model, x_BLD) - expected).square().mean() / expected.square().mean()
        assert noise < most and (length == 1 or noise > 1e-9)
    turned = {name for name, module in model.named_modules()
              if isinstance(module, Int8Linear) and module.inputs.rotated}  # fmt: skip
    assert {name.rpartition(".")[2] for name in turned} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    assert not any(isinstance(module, QuantizedNorm) for module in model.modules())
    odd = quantize_(tiny(backbone=dataclasses.replace(tiny_config().backbone, mlp_width=40)))
    places = float_places(odd)
    assert {key.split(".")[-2] for key, place in places.items() if place.rotated} == {"out_proj"}


def test_gradients_pass_through_frozen_int8_layers():
    model = quantize_(tiny(4)).requires_grad_(False)
    floats = dequantised(model, 4).requires_grad_(False)
    found = []
    for one in (model, floats):
        x_BLD = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        towards_BLD = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(2))
        (one(x_BLD, Context())[0] * towards_BLD).sum().backward()
        found.append(x_BLD.grad)
    assert torch.nn.functional.cosine_similarity(*(gradient.flatten() for gradient in found), dim=0) > 0.99


def test_inputs_in_two_terms_are_nearly_floats():
    """Rows with one value a thousand times the others: 8 bits leave nothing of the others, 15 do."""
    config = Int8Config(two_terms=("layers",), parts=("backbone", "bridge"))
    model, plain = quantize_(tiny(4), config), quantize_(tiny(4), Int8Config(parts=("backbone", "bridge")))
    floats = dequantised(model, 4)
    x_BLD = torch.randn(1, 30, 32)
    torch.testing.assert_close(hidden(model, x_BLD), hidden(floats, x_BLD), rtol=2e-2, atol=2e-3)
    assert (hidden(plain, x_BLD) - hidden(floats, x_BLD)).abs().max() > 2e-2
    assert not any(isinstance(module, QuantizedNorm) for module in model.modules())
    rows = torch.randn(4, 32) * torch.tensor([1000.0] + [1.0] * 31)
    layer = Int8Linear(32, 5, nn.Parameter(torch.randn(5)), torch.device("cpu"), Inputs(1, two_terms=True))
    layer.weight_NK.copy_(torch.randint(-127, 128, (5, 32)))
    layer.weight_NK[:, 0] = 0
    layer.scale_N.fill_(0.01)
    expected = nn.functional.linear(rows, layer.weight_NK * 0.01, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(rows), expected, rtol=1e-2, atol=0.3)
        layer.inputs = Inputs(1)
        assert (layer(rows) - expected).abs().max() > 2


def test_casting_a_model_leaves_its_scales():
    model = quantize_(tiny(4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "scale" in name}
    model.to(torch.bfloat16)
    assert model.backbone.embed_tokens.weight.dtype == torch.bfloat16
    for name, scale in before.items():
        assert torch.equal(model.get_buffer(name), scale)
    with torch.device("meta"):
        empty = build_model(model.config).to(torch.bfloat16)
    assert {empty.get_buffer(name).dtype for name in before} == {torch.float32}
