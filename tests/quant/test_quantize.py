"""quantize_: which layers become int8, and that what they compute is what their float layers computed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from longllava.encoders.vit import Activation, LayerNorm
from longllava.errors import ConfigError, LongLLaVAError
from longllava.nn import Context
from longllava.nn.mlp import MixtureOfExperts, SwiGLU
from longllava.nn.norm import RMSNorm
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.quantized import Quantized
from longllava.quant import (
    Inputs,
    Int8Config,
    Int8Experts,
    Int8Linear,
    Int8SwiGLU,
    QuantizedActivation,
    QuantizedLayerNorm,
    QuantizedNorm,
    build_model,
    float_places,
    quantize_,
)
from tests.tiny import tiny_config, tiny_model

ALWAYS = {"dynamic_from": 1}
NEVER = {"dynamic_from": 10**6}


def tiny(n_experts: int = 1, **changes):
    return tiny_model(n_experts, **changes).model


def dequantised(model, n_experts: int = 1):
    """A model of floats that holds exactly what the int8 one stands for."""
    floats = tiny(n_experts)
    state = dict(model.state_dict())
    wanted = {}
    for key, place in float_places(model).items():
        weight, scale = state[place.weight], state[place.scale]
        values = weight.reshape(-1, weight.shape[-1]).float() * scale.reshape(-1, 1)
        wanted[key] = values[place.start : place.start + place.shape[0]]
    wanted |= {key: state[key] for key in floats.state_dict() if key not in wanted}
    floats.load_state_dict(wanted)
    return floats


def hidden(model, x_BLD, **context):
    with torch.no_grad():
        return model(x_BLD, Context(**context))[0]


@pytest.mark.parametrize("n_experts", [1, 4])
def test_what_becomes_int8_and_what_stays(n_experts):
    model = quantize_(tiny(n_experts))
    floats = {name for name, module in model.backbone.named_modules() if isinstance(module, nn.Linear)}
    mamba, attention, mixtures = (0, 2, 3), (1, 4), (1, 3) if n_experts > 1 else ()
    expected = {"lm_head", *(f"layers.{i}.mixer.{name}" for i in mamba for name in ("x_proj", "dt_proj"))}
    assert floats == expected | {f"layers.{i}.ffn.router" for i in mixtures}
    for i, block in enumerate(model.backbone.layers):
        assert isinstance(block.mixer_norm, QuantizedNorm)
        names = ("q_proj", "k_proj", "v_proj", "o_proj") if i in attention else ("in_proj", "out_proj")
        assert all(isinstance(getattr(block.mixer, name), Int8Linear) for name in names)
        if i in mixtures:
            assert isinstance(block.ffn.experts, Int8Experts) and isinstance(block.ffn_norm, RMSNorm)
        else:
            assert isinstance(block.ffn, Int8SwiGLU) and isinstance(block.ffn_norm, QuantizedNorm)
    assert all(isinstance(layer, nn.Linear) for layer in (model.bridge.up, model.bridge.down))
    dtypes = {tensor.dtype for name, tensor in model.state_dict().items() if name.endswith(("NK", "XNK"))}
    assert dtypes == {torch.int8}
    assert model.config.int8 == Int8Config()


@pytest.mark.parametrize("n_experts", [1, 4])
def test_float_places_are_the_weights_that_are_gone(n_experts):
    before = tiny(n_experts).state_dict()
    model = quantize_(tiny(n_experts), Int8Config(parts=("backbone", "bridge", "encoder"), lm_head=True))
    after, places = model.state_dict(), float_places(model)
    assert set(places) == before.keys() - after.keys()
    assert {place.weight for place in places.values()} | {place.scale for place in places.values()} == (
        after.keys() - before.keys()
    )
    for key, place in places.items():
        assert place.shape == tuple(before[key].shape)
    covered = sum(place.shape[0] * place.shape[1] for place in places.values())
    assert covered == sum(after[name].numel() for name in {place.weight for place in places.values()})
    floats = dequantised(model, n_experts).state_dict()
    for key, weight in before.items():  # half a step of a row is 1 / 254 of its largest weight
        bound = weight.abs().amax(-1, keepdim=True) / 254 if key in places else torch.zeros(())
        assert ((floats[key].float() - weight.float()).abs() <= bound * 1.001).all(), key


@pytest.mark.parametrize("n_experts", [1, 4])
def test_weights_alone_in_int8_are_the_dequantised_model(n_experts):
    model = quantize_(tiny(n_experts), Int8Config(**NEVER, parts=("backbone", "bridge", "encoder"), lm_head=True))
    floats = dequantised(model, n_experts)
    x_BLD = torch.randn(2, 19, 32)
    torch.testing.assert_close(hidden(model, x_BLD), hidden(floats, x_BLD), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(x_BLD), floats.logits(x_BLD), rtol=1e-4, atol=1e-4)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        tokens, expected = (m.image_tokens(m.encode(pixels)) for m in (model, floats))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_a_token_alone_is_decoded_with_float_inputs():
    """dynamic_from 2: one token a sequence, in any batch, is the model of dequantised weights; two are not."""
    model = quantize_(tiny(4))
    floats = dequantised(model, 4)
    x_BLD = torch.randn(9, 1, 32)
    torch.testing.assert_close(hidden(model, x_BLD), hidden(floats, x_BLD), rtol=1e-4, atol=1e-5)
    x_BLD = torch.randn(1, 2, 32)
    assert (hidden(model, x_BLD) - hidden(floats, x_BLD)).abs().max() > 1e-3


@pytest.mark.parametrize("n_experts", [1, 4])
def test_quantised_inputs_are_near_the_float_model(n_experts):
    model, floats = quantize_(tiny(n_experts)), tiny(n_experts)
    x_BLD = torch.randn(2, 64, 32)
    expected = hidden(floats, x_BLD)
    noise = (hidden(model, x_BLD) - expected).square().mean() / expected.square().mean()
    assert 1e-6 < noise < 3e-3


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


@pytest.mark.parametrize("config", [Int8Config(), Int8Config(**ALWAYS), Int8Config(two_terms=("out_proj",))], ids=str)
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
            assert in_int8 == (3 if fused else 0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_channels_of_four_million_break_nothing(dtype):
    """Jamba's residual stream reaches 4e6 (arXiv:2408.12570): fp16 would end at 65,504."""
    model, floats = tiny(4).to(dtype), tiny(4).to(dtype)
    for one in (model, floats):
        for block in one.backbone.layers:
            block.mixer.get_submodule("o_proj" if hasattr(block.mixer, "o_proj") else "out_proj").weight.data[3] *= 1e6
    quantize_(model)
    x_BLD = torch.randn(1, 40, 32).to(dtype)
    x_BLD[..., 5] *= 4e6
    got, expected = hidden(model, x_BLD).float(), hidden(floats, x_BLD).float()
    assert got.isfinite().all()
    assert (got - expected).square().mean() < 0.02 * expected.square().mean()


@pytest.mark.parametrize(
    ("keep", "n_layers"), [(("layers",), 0), (("backbone.layers.[01].*",), 3), (("in_proj", "q_proj"), 5)]
)
def test_kept_layers_stay(keep, n_layers):
    model, before = tiny(), tiny()
    quantize_(model, keep=keep)
    assert model.config.int8.keep == keep
    int8 = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len({name.split(".")[2] for name in int8}) == n_layers
    assert not any(isinstance(block.mixer_norm, QuantizedNorm) for block in model.backbone.layers[:2])
    x_BLD = torch.randn(1, 8, 32)
    noise = (hidden(model, x_BLD) - hidden(before, x_BLD)).abs().max()
    assert (noise == 0) == (n_layers == 0)


def test_layers_whose_inputs_stay_floats():
    model = quantize_(tiny(4), Int8Config(weight_only=("down_proj", "in_proj")))
    blocks = model.backbone.layers
    assert isinstance(blocks[0].mixer_norm, RMSNorm) and isinstance(blocks[1].mixer_norm, QuantizedNorm)
    x_BLD = torch.randn(1, 8, 32)
    with torch.no_grad():
        got = blocks[0].mixer.in_proj(x_BLD)
    floats = dequantised(model, 4)
    torch.testing.assert_close(got, floats.backbone.layers[0].mixer.in_proj(x_BLD), rtol=1e-4, atol=1e-5)
    everywhere = quantize_(tiny(4), Int8Config(weight_only=("layers",)))
    expected = hidden(dequantised(everywhere, 4), x_BLD)
    torch.testing.assert_close(hidden(everywhere, x_BLD), expected, rtol=1e-4, atol=1e-5)


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


def test_part_of_a_mixture_keeps_all_of_it():
    model = quantize_(tiny(4), keep=("backbone.layers.1.ffn.experts.2.up_proj",))
    kinds = [type(model.backbone.layers[i].ffn.experts).__name__ for i in (1, 3)]
    assert kinds == ["Experts", "Int8Experts"]


def test_faults_are_said_before_anything_changes():
    model = tiny()
    with pytest.raises(ConfigError, match=r"int8.keep: 'in_prj' is no linear layer of this model; .* in_proj"):
        quantize_(model, keep=("in_prj",))
    with pytest.raises(ConfigError, match=r"parts: got \['eyes'\], allowed: some of backbone, bridge, encoder"):
        Int8Config(parts=("eyes",))
    with pytest.raises(ConfigError, match="dynamic_from: got 0, must be above 0"):
        Int8Config(dynamic_from=0)
    blind = tiny(encoder=None, bridge=None)
    with pytest.raises(ConfigError, match=r"int8.parts: encoder, but this model has none"):
        quantize_(blind, Int8Config(parts=("backbone", "encoder")))
    for one in (model, blind):
        assert one.config.int8 is None and not float_places(one)
    model.backbone.layers[2].ffn.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(LongLLaVAError, match=r"NaN or infinite weights in backbone.layers.2.ffn.up_proj.weight"):
        quantize_(model)
    assert not float_places(model)
    model.backbone.layers[2].ffn.up_proj.weight.data[3, 4] = 0
    quantize_(model)
    with pytest.raises(LongLLaVAError, match="the weights are int8 already; quantise the model of floats"):
        quantize_(model)


def test_a_model_of_its_config_has_the_same_tensors():
    parts = ("backbone", "bridge", "encoder")
    config = Int8Config(parts=parts, keep=("q_proj",), lm_head=True, weight_only=("down_proj",))
    model = quantize_(tiny(4), config)
    with torch.device("meta"):
        empty = build_model(model.config)
    assert [(k, v.shape, v.dtype) for k, v in empty.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in model.state_dict().items()
    ]
    assert str(empty) == str(model)


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
