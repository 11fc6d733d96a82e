"""Published layouts: read, and written again tensor for tensor; what does not fit is named in the file's own words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from longllava.api import LongLLaVA
from longllava.checkpoints import load_model, load_weights_, save_model
from longllava.checkpoints.convert import convert_layout
from longllava.checkpoints.published import read_config
from longllava.config import PUBLISHED_PROMPT, BridgeConfig, EncoderConfig, PromptConfig
from longllava.errors import CheckpointError, ConfigError, LongLLaVAError
from longllava.model import Model
from tests.checkpoints import published
from tests.checkpoints.folders import assert_same, change, edit_config, weights
from tests.tiny import tiny_config, tiny_model, tiny_pictures, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def used_of_the_tower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what select_layer -2 never runs: the third of three layers, and the norm after it."""
    return {key: tensor for key, tensor in tensors.items() if ".layers.2." not in key or "vision" not in key
            if "post_layernorm" not in key}  # fmt: skip


@pytest.mark.parametrize("n_experts", [1, 4])
def test_transformers_jamba_there_and_back(tmp_path, n_experts):
    published.jamba(tmp_path / "theirs", n_experts)
    model = load_model(tmp_path / "theirs")
    assert (model.encoder, model.bridge) == (None, None)
    assert model.config.backbone.n_experts == n_experts
    save_model(model, TOKENIZER, tmp_path / "back", scheme="jamba")
    assert_same(weights(tmp_path / "back"), weights(tmp_path / "theirs"))
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert {key: theirs[key] for key in ours} == ours


@pytest.mark.parametrize("n_experts", [1, 4])
def test_longllava_there_and_back_and_into_every_other_layout(tmp_path, n_experts):
    written = published.longllava(tmp_path / "theirs", n_experts)
    model = load_model(tmp_path / "theirs")
    config = model.config
    assert (config.bridge.pool, config.bridge.tokens_per_image, config.encoder.select_layer) == ("2d", 4, -2)
    save_model(model, TOKENIZER, tmp_path / "theirs/back", scheme="longllava")
    assert_same(weights(tmp_path / "theirs/back"), used_of_the_tower(written))
    save_model(model, TOKENIZER, tmp_path / "native")
    assert_same(load_model(tmp_path / "native").state_dict(), model.state_dict())
    (tmp_path / "theirs/back/tower").symlink_to(tmp_path / "theirs/tower")
    again = load_model(tmp_path / "theirs/back")
    assert_same(again.state_dict(), model.state_dict())
    assert (again.config.backbone, again.config.bridge) == (config.backbone, config.bridge)


def test_how_a_model_is_spoken_to_comes_with_its_layout(tmp_path):
    """A published checkpoint is asked as it was trained; a prompt that is not the layout's own is written beside."""
    published.longllava(tmp_path)
    model = load_model(tmp_path)
    assert model.config.prompt == PUBLISHED_PROMPT
    for name, prompt in (("usual", PUBLISHED_PROMPT), ("clean", PromptConfig()), ("own", PromptConfig(user="?"))):
        model.config = replace(model.config, prompt=prompt)
        save_model(model, TOKENIZER, tmp_path / name, scheme="longllava")
        (tmp_path / name / "tower").symlink_to(tmp_path / "tower")
        assert ("longllava_prompt" in json.loads((tmp_path / name / "config.json").read_text())) == (name != "usual")
        assert load_model(tmp_path / name).config.prompt == prompt
    edit_config(tmp_path / "own", longllava_prompt={"usr": "?"})
    with pytest.raises(
        ConfigError, match=r"own/config\.json: longllava_prompt: unknown key 'usr'; did you mean 'user'"
    ):
        load_model(tmp_path / "own")


def test_the_norms_of_B_and_C_are_not_exchanged(tmp_path):
    """Answers would not tell: only the product of their weights enters the output, state by state."""
    published.jamba(tmp_path / "jamba")
    published.longllava(tmp_path / "longllava")
    for name, B in (("jamba", "b"), ("longllava", "B")):
        theirs, ours = weights(tmp_path / name), load_model(tmp_path / name).state_dict()
        B_norm = theirs[f"model.layers.0.mamba.{B}_layernorm.weight"]
        assert torch.equal(ours["backbone.layers.0.mixer.B_norm.weight"], B_norm)
        assert not torch.equal(ours["backbone.layers.0.mixer.C_norm.weight"], B_norm)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_stock_llava_there_and_back(tmp_path, tower):
    published.llava(tmp_path / "theirs", tower=tower)
    model = load_model(tmp_path / "theirs")
    assert model.config.bridge.tokens_per_image == 16
    save_model(model, TOKENIZER, tmp_path / "back", scheme="llava")
    # written as every transformers since 4.36 reads it; transformers 5 writes the tower without "vision_model."
    back = {key.replace("tower.vision_model.", "tower."): value for key, value in weights(tmp_path / "back").items()}
    theirs = used_of_the_tower(weights(tmp_path / "theirs"))
    assert_same(back, {key: value for key, value in theirs.items() if "tower.head" not in key})
    usual = model.config
    assert load_model(tmp_path / "back").config.backbone == usual.backbone
    # what pictures are normalised by stands in a file beside config.json, which goes where it is the usual again
    model.config = replace(usual, encoder=replace(usual.encoder, mean=(0.4, 0.5, 0.6)))
    save_model(model, TOKENIZER, tmp_path / "native")
    convert_layout(tmp_path / "native", tmp_path / "converted", "llava")
    save_model(model, TOKENIZER, tmp_path / "back", scheme="llava")
    assert read_config(tmp_path / "back").encoder == read_config(tmp_path / "converted").encoder == model.config.encoder
    model.config = usual
    save_model(model, TOKENIZER, tmp_path / "back", scheme="llava")
    assert read_config(tmp_path / "back").encoder == usual.encoder


def test_the_names_of_transformers_modules_are_read_too(tmp_path):
    """state_dict() of a LlavaForConditionalGeneration in memory: model.language_model.*, model.vision_tower.*"""
    published.llava(tmp_path, 1)
    before = load_model(tmp_path).state_dict()
    tensors = {}
    for name, tensor in weights(tmp_path).items():
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
        name = name.replace("vision_tower.", "model.vision_tower.vision_model.")
        name = name.replace("multi_modal", "model.multi_modal")
        tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path).state_dict(), before)


def test_a_longllava_checkpoint_without_its_tower_takes_the_one_it_names(tmp_path):
    published.longllava(tmp_path, 1)
    before = load_model(tmp_path).state_dict()
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
    assert_same(load_model(tmp_path).state_dict(), before)


@pytest.mark.parametrize(("family", "size"), [("clip", 16), ("siglip", 18)])
def test_towers_of_transformers(tmp_path, family, size):
    """SigLIP's 18 pixels of patches of 4: a remainder that the patches do not see, as 384 / 14."""
    tower = {"clip": published.clip_tower, "siglip": published.siglip_tower}[family](tmp_path, image_size=size)
    config = tiny_config(encoder=published_encoder(tmp_path))
    model = Model(config)
    model.initialise_()
    load_weights_(model, tmp_path / "model.safetensors", parts=("encoder.",))
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        theirs = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        ours = model.encode(pixels)
    torch.testing.assert_close(ours, theirs[:, 1:] if family == "clip" else theirs, rtol=0, atol=2e-5)


def published_encoder(folder) -> EncoderConfig:
    from longllava.checkpoints.towers import tower_config

    return tower_config(str(folder))


def test_known_towers_need_no_download():
    for name in ("openai/clip-vit-large-patch14-336", "./models/clip_vit_large_patch14_336"):
        assert published_encoder(name) == EncoderConfig(weights="openai/clip-vit-large-patch14-336")


def test_the_projector_file_of_stage_1(tmp_path):
    written = published.longllava(tmp_path, 1)
    model = load_model(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for prefix in ("model.mm_projector", "mm_projector"):
        file = tmp_path / "mm_projector.safetensors"
        tensors = {name.replace("model.mm_projector", prefix): tensor + 1
                   for name, tensor in written.items() if "mm_projector" in name}  # fmt: skip
        save_file(tensors, file)
        load_weights_(model, file, parts=("bridge.",))
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key] + 1 if key.startswith("bridge.") else before[key]), key
    with pytest.raises(CheckpointError, match=r"16 missing|missing: .*embed_tokens"):
        load_weights_(model, file)


def test_faults_are_named_in_the_words_of_the_file(tmp_path):
    published.longllava(tmp_path)

    def faults(tensors):
        del tensors["model.layers.0.mamba.B_layernorm.weight"], tensors["model.layers.1.moe.experts.2.up_proj.weight"]
        tensors["model.layers.0.mamba.conv1d.weight"] = torch.zeros(64, 4)
        tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(32)

    change(tmp_path, faults)
    with pytest.raises(LongLLaVAError) as caught:
        load_model(tmp_path)
    words = str(caught.value)
    assert "2 missing: model.layers.0.mamba.B_layernorm.weight, model.layers.1.moe.experts.2.up_proj.weight" in words
    assert "1 unexpected: model.layers.9.input_layernorm.weight" in words
    assert "1 of wrong shape: model.layers.0.mamba.conv1d.weight (64, 4) instead of (64, 1, 4)" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba2"}, "model_type 'mamba2'; this library reads jamba, llava_jamba, llava"),
        ({"model_type": ["mamba2"]}, "model_type .'mamba2'.; this library reads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not supported, only False"),
        ({"mamba_inner_layernorms": False}, "mamba_inner_layernorms False"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"hidden_size": "wide"}, "width: expected int"),
        ({"num_hidden_layers": 10**9}, "n_layers: got 1000000000, at most 1024"),
        ({"mm_vision_tower": 3}, "mm_vision_tower 3"),
        ({"mm_hidden_size": 8}, "mm_hidden_size 8, but tower has width 16"),
        ({"mm_vision_select_layer": "x"}, "select_layer"),
    ],
)
def test_configs_that_cannot_be_meant(tmp_path, changes, words):
    published.longllava(tmp_path, 1)
    edit_config(tmp_path, **changes)
    with pytest.raises(LongLLaVAError, match=words) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


ODD = (None, True, -1, 10**30, 1.5, "x", [1], {"a": 1})


@pytest.mark.parametrize("layout", ["longllava", "llava", "jamba"])
def test_any_odd_value_is_a_config_or_one_error(tmp_path, layout):
    """Every key of every part, each with every value: never another exception than the library's own."""
    getattr(published, layout)(tmp_path)
    base = json.loads((tmp_path / "config.json").read_text()) | {"longllava_prompt": {}, "quantization_config": None}
    parts = [(), *((key,) for key, value in base.items() if isinstance(value, dict))]
    n_refused = 0
    for part in parts:
        inside = base[part[0]] if part else base
        for key in inside:
            for value in ODD:
                edit_config(tmp_path, **({part[0]: {**inside, key: value}} if part else {**base, key: value}))
                try:
                    read_config(tmp_path)
                except LongLLaVAError as error:
                    n_refused += 1
                    assert "\n" not in str(error)
        edit_config(tmp_path, **base)
    assert n_refused > 100


def test_a_folder_of_any_layout_answers_as_the_model_did(tmp_path):
    """from_pretrained on stock Llava's layout, with pictures, and on plain Jamba's, without."""
    tiny = tiny_model(bridge=BridgeConfig(pool="none", tokens_per_image=16, hidden=32))
    save_model(tiny.model, tiny.tokenizer, tmp_path / "llava", scheme="llava")
    save_model(tiny.model, tiny.tokenizer, tmp_path / "jamba", scheme="jamba", parts=("backbone.",))
    asked = {"prompt": "what is this?", "max_new_tokens": 8}
    again = LongLLaVA.from_pretrained(tmp_path / "llava", device="cpu", dtype="float32")
    pictures = tiny_pictures(2)
    assert again.generate(**asked, images=pictures) == tiny.generate(**asked, images=pictures) != ""
    text_only = LongLLaVA.from_pretrained(tmp_path / "jamba", device="cpu", dtype="float32")
    assert text_only.generate(**asked) == tiny.generate(**asked) != ""
    with pytest.raises(LongLLaVAError, match="no encoder"):
        text_only.generate(**asked, images=pictures)


def test_pooling_as_the_original_reads_it(tmp_path):
    published.longllava(tmp_path, 1)
    for value, pool, n_tokens in ((None, "none", 16), ("1d", "1d", 4), ("2d", "2d", 4)):
        edit_config(tmp_path, resamplePooling=value)
        bridge = load_model(tmp_path).config.bridge
        assert (bridge.pool, bridge.tokens_per_image) == (pool, n_tokens)


@pytest.mark.parametrize(
    ("changes", "scheme", "words"),
    [
        ({}, "llava", "tokens_per_image: 4 of 16: stock Llava does not pool"),
        ({}, "jamba", "encoder: the layout jamba has none; write longllava or llava, or the text part only"),
        ({}, "longllava", "encoder.weights"),
        (
            {"encoder": replace(tiny_config().encoder, weights="openai/clip-vit-large-patch14-336")}, "longllava",
            r"encoder.image_size: 16; there the named tower says it, and openai/clip-\S* has 336",
        ),
        ({"n_experts": 3}, "longllava", "backbone.qk_norm: Jamba has no such setting"),
        ({}, "hf", "scheme 'hf'; allowed: native, longllava, jamba, llava"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(tmp_path, changes, scheme, words):
    tiny = tiny_model(**changes)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        save_model(tiny.model, tiny.tokenizer, tmp_path / "a", scheme=scheme)
    assert not list(tmp_path.glob("a/*.json"))
