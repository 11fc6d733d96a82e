"""Configs: strict reading, and every shipped model has the parameters it states."""

from __future__ import annotations

import pytest
import torch

from longllava.config import BackboneConfig, ModelConfig
from longllava.errors import ConfigError
from longllava.model import Model
from longllava.settings import load, read_mapping
from longllava.shipped import shipped, shipped_names


@pytest.mark.parametrize("name", [name for name in shipped_names("configs") if name.startswith("models/")])
def test_every_shipped_model_builds_with_its_stated_parameter_count(name):
    config = load(ModelConfig, shipped("configs", name))
    with torch.device("meta"):
        model = Model(config)
    assert config.n_parameters == sum(p.numel() for p in model.parameters())


def test_the_published_sizes():
    """9.29 B dense and 51.6 B with experts, from the language model's public config (with lm_head, without vision).

    The others as their model cards round them: 52 B in all for Jamba v0.1 and the Minis, 3 B for Reasoning.
    """
    for name, billions in (("jamba-v0.1", 51.57), ("jamba-1.5-mini", 51.57), ("jamba-1.7-mini", 51.57),
                           ("jamba-reasoning-3b", 3.03)):  # fmt: skip
        config = load(ModelConfig, shipped("configs", f"models/{name}"))
        assert config.n_parameters / 1e9 == pytest.approx(billions, abs=0.01)
        assert config.encoder is None and config.bridge is None
    for n_experts, billions in ((1, 9.29), (16, 51.57)):
        with torch.device("meta"):
            from longllava.backbone import Backbone

            backbone = Backbone(BackboneConfig(n_experts=n_experts))
        assert sum(p.numel() for p in backbone.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def stem(stride: int, width: int = 8, blocks: int = 1) -> str:
    return (f"encoder: {{image_size: 12, patch_size: {abs(stride)}, stem_widths: [{width}], stem_strides: [{stride}],"
            f" stem_blocks: [{blocks}]}}\nbridge: {{tokens_per_image: 1}}")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backbone: {n_layer: 3}", ["unknown key 'n_layer'", "n_layers"]),
        ("backbone: {width: wide}", ["backbone", "width", "expected int"]),
        ("backbone: {width: 0}", ["width", "above 0"]),
        ("backbone: {width: 1000000000}", ["width", "at most"]),
        ("backbone: {n_layers: 1024, n_experts: 4096}", ["n_experts", "1024 layers of 4096", "at most 16384"]),
        ("encoder: {image_size: 1000000000}", ["encoder.image_size", "at most 16384"]),
        ("bridge: {hidden: 10000000}", ["bridge.hidden", "at most"]),
        ("backbone: {head_dim: 10000}", ["backbone.head_dim", "at most 4096"]),
        ("backbone: {n_heads: 3, n_kv_heads: 2}", ["n_kv_heads", "divide"]),
        ("backbone: {norm_eps: .nan}", ["norm_eps"]),
        ("backbone: {n_experts: 3, n_experts_per_token: 4}", ["n_experts_per_token", "4 of 3 experts"]),
        ("encoder: {mean: [0.5]}", ["encoder: mean [0.5]", "3 numbers"]),
        ("encoder: {std: [0.5, 0.0, 0.5]}", ["std [0.5, 0.0, 0.5]", "above 0"]),
        ("encoder: {norm_eps: -1.0e-5}", ["norm_eps", "above 0"]),
        (stem(3), ["encoder.stem_strides: [3] make 3 tokens a side, not 4", "even"]),
        (stem(-3), ["encoder.stem_strides", "[-3]", "1 to 16384"]),
        (stem(4, width=0), ["encoder.stem_widths", "[0]", "1 to 65536"]),
        (stem(4, blocks=10**9), ["encoder.stem_blocks", "[1000000000]", "0 to 1024"]),
        ("backbone: {init_std: -0.1}", ["init_std: got -0.1, must be 0 or above"]),
        ("backbone: {embedding_std: -1}", ["embedding_std: got -1.0, must be 0 or above"]),
        ("bridge: {tokens_per_image: 100}", ["tokens_per_image", "100", "allowed"]),
        ("encoder: null", ["encoder and bridge"]),
        ("name: a\nname: b", ["'name'", "twice"]),
        ("[1, 2]", ["expected a mapping"]),
        ("a: [", ["cannot be read"]),
        ("name: 2001-13-45", ["cannot be read", "month"]),
        ("backbone: {width: " + "9" * 5000 + "}", ["cannot be read", "5000 digits"]),
        ("backbone: {norm_eps: 1" + "0" * 400 + "}", ["norm_eps", "is not a number a setting can have"]),
        ("name: !!int word", ["cannot be read", "word"]),
        ("name: !!int ''", ["cannot be read"]),
        ("name: !!bool word", ["cannot be read", "word"]),
        ("name: !!timestamp word", ["cannot be read"]),
    ],
)
def test_bad_settings_are_one_sentence_that_names_file_and_key(tmp_path, text, words):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(ModelConfig, path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


BOMB = "[" + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(6)) + "]"


@pytest.mark.parametrize("text", [
    "backbone: {width: " + BOMB + "}", "encoder: {stem_widths: " + "x" * 10**5 + "}", "{? " + "x" * 10**5 + " : 1}",
    "backbone: {width: 0x1" + "0" * 5000 + "}", "backbone: {width: [0x1" + "0" * 5000 + "]}",
    "bridge: {pool: " + "x" * 10**5 + "}",
])  # fmt: skip
def test_a_value_of_any_size_is_told_in_a_line(tmp_path, text):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(ModelConfig, path)
    assert len(str(caught.value)) - len(str(path)) < 400


def test_parts_of_a_file_may_be_merged_into_others(tmp_path):
    """YAML's <<: what is written beside it stands in its stead, and is no key given twice; also merged again."""
    path = tmp_path / "model.yaml"
    text = """
        backbone: &base {width: 64, n_layers: 3}
        encoder: &next {<<: *base, n_layers: 2, n_heads: 2}
        bridge: {tokens_per_image: 144}
        """
    path.write_text(text)
    found = load(ModelConfig, path)
    assert (found.encoder.width, found.encoder.n_layers, found.backbone.n_layers) == (64, 2, 3)
    path.write_text("a:\n  b: &b {x: 1}\n  c: &c {<<: *b, x: 2}\nd: {<<: *c, y: 3}\n")
    assert read_mapping(path) == {"a": {"b": {"x": 1}, "c": {"x": 2}}, "d": {"x": 2, "y": 3}}
    for twice in ("{<<: *b, <<: *b}", "{<<: *b, y: 1, y: 2}", "{1: 1, 0x1: 2}", "{*n : 1, width: 2}"):
        path.write_text(f"a: &b {{x: 1}}\nb: &n width\nc: {twice}\n")
        with pytest.raises(ConfigError, match=r"stands twice \(line 3\)"):
            read_mapping(path)


def test_overrides_reach_into_parts_and_numbers_are_numbers(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("name: x\nbackbone: {norm_eps: 1e-5}\n")
    config = load(ModelConfig, path, ["backbone.width=64", "backbone.init_std=1e-2"])
    assert (config.backbone.width, config.backbone.init_std, config.backbone.norm_eps) == (64, 0.01, 1e-5)
    with pytest.raises(ConfigError, match="key=value"):
        load(ModelConfig, path, ["backbone.width"])
    for value in ("[1", "2001-13-45", "*one", "{a: 1, a: 2}"):
        with pytest.raises(ConfigError, match="override 'name=.*': cannot be read") as caught:
            load(ModelConfig, path, [f"name={value}"])
        assert "\n" not in str(caught.value)


def test_json_refuses_nan_and_repeated_keys(tmp_path):
    path = tmp_path / "config.json"
    for text in ('{"name": NaN}', '{"name": "a", "name": "b"}', "[" * 5000, f'{{"name": {"9" * 5000}}}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            load(ModelConfig, path)
