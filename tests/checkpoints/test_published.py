"""config.json of others is read as they read it."""

from __future__ import annotations

import pytest

from longllava.checkpoints.published import read_config
from longllava.errors import ConfigError
from tests.checkpoints.folders import edit_config


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
