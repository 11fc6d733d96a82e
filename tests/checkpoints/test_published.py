"""config.json of others is read as they read it."""

from __future__ import annotations

import json

import pytest
import torch

from longllava.checkpoints import load_model
from longllava.checkpoints.published import read_config
from longllava.errors import CheckpointError, ConfigError
from longllava.nn import Context
from tests.checkpoints import published
from tests.checkpoints.folders import change, edit_config


def test_what_a_config_leaves_out_is_transformers_default(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "jamba"}')
    backbone = read_config(tmp_path).backbone
    found = (backbone.n_experts, backbone.n_experts_per_token, backbone.width, backbone.tie_embeddings)
    assert found == (16, 2, 4096, False)
    for width, rank in ((4096, 256), (96, 6), (40, 3)):
        edit_config(tmp_path, hidden_size=width)
        assert read_config(tmp_path).backbone.dt_rank == rank
    edit_config(tmp_path, hidden_size="wide")
    with pytest.raises(ConfigError, match="backbone: width: expected int, got 'wide'"):
        read_config(tmp_path)


@pytest.mark.parametrize("part", ["whole", "text"])
def test_stock_llava_whose_output_layer_is_its_embedding(tmp_path, part):
    from transformers import LlavaForConditionalGeneration

    published.llava(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    edit_config(tmp_path, tie_word_embeddings=part == "whole",
                text_config={**text, "tie_word_embeddings": part == "text"})  # fmt: skip
    theirs, ids = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval(), torch.arange(3, 20)[None]
    model = load_model(tmp_path)
    with torch.no_grad():
        logits = model.logits(model(model.embed(ids), Context())[0])
        torch.testing.assert_close(logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["llava", "longllava"])
def test_a_tower_of_more_layers_than_its_config_says_is_refused(tmp_path, layout):
    """The feature is that of the last layer but one: of two layers it would be another than of the three stored."""
    getattr(published, layout)(tmp_path)
    load_model(tmp_path)
    folder = tmp_path / "tower" if layout == "longllava" else tmp_path
    data = json.loads((folder / "config.json").read_text())
    edit_config(folder, **({"num_hidden_layers": 2} if layout == "longllava" else
                           {"vision_config": {**data["vision_config"], "num_hidden_layers": 2}}))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"do not fit its config.json; 16 unexpected: .*layers\.2\."):
        load_model(tmp_path)
