"""quantize_: which layers become int8, and that what they compute is what their float layers computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longllava.errors import ConfigError, LongLLaVAError
from longllava.nn.norm import RMSNorm
from longllava.ops.int8_linear import rotate_rows
from longllava.quant import (
    Int8Config,
    Int8Experts,
    Int8Linear,
    Int8SwiGLU,
    QuantizedNorm,
    build_model,
    float_places,
    quantize_,
)
from tests.quant.quantised import dequantised, hidden, tiny

NEVER = {"dynamic_from": 10**6}


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
    assert model.config.int8 == Int8Config(rotated=("out_proj", "down_proj"))


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
    assert {key.split(".")[-2] for key, place in places.items() if place.rotated} == {"out_proj", "down_proj"}
    for key, weight in before.items():  # half a step of a row is 1 / 254 of its largest weight
        got = floats[key]
        if key in places and places[key].rotated:
            got, weight = rotate_rows(got), rotate_rows(weight)
        bound = weight.abs().amax(-1, keepdim=True) / 254 if key in places else torch.zeros(())
        assert ((got.float() - weight.float()).abs() <= bound * 1.001).all(), key


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
    for fields, words in (
        ({"dynamic_from": 2.5}, "dynamic_from: expected int, got 2.5"), ({"lm_head": "no"}, "lm_head: expected bool"),
        ({"keep": "q_proj"}, "keep: expected a list, got 'q_proj'"), ({"rotated": (5,)}, r"rotated\[0\]: expected str"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            Int8Config(**fields)
    assert Int8Config(keep=["q_proj"]) == Int8Config(keep=("q_proj",))
    with pytest.raises(ConfigError, match=r"int8.keep: expected a list, got 'q_proj'"):
        quantize_(model, keep="q_proj")
    blind = tiny(encoder=None, bridge=None)
    with pytest.raises(ConfigError, match=r"int8.parts: encoder, but this model has none"):
        quantize_(blind, Int8Config(parts=("backbone", "encoder")))
    with pytest.raises(LongLLaVAError, match="float16 ends at 65504, .* take bfloat16 or float32"):
        quantize_(tiny(4).half())
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
