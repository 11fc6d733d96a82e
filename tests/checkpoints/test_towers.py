"""open_clip's models by name: random weights, in a file of weights as its tags are. Everywhere with what stands for the
package, and with the package itself where it is installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longllava.checkpoints.load import load_weights_
from longllava.checkpoints.towers import split_name, tower_config
from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig
from longllava.errors import CheckpointError
from longllava.model import Model
from tests.checkpoints.open_clip_package import (
    ARCHITECTURE,
    NAMES,
    PRETRAINED,
    SETTINGS,
    STAND_IN,
    create_model,
)


class AnyName(type):
    """A class with whatever attributes are asked of it: InterpolationMode.BICUBIC."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class Module(types.ModuleType):
    """Stands for torchvision, whose picture transforms open_clip imports and these tests do not use. Its wheel from
    the package index does not work beside a CPU build of torch."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


@pytest.fixture(scope="module")
def real():
    """The package, imported without torchvision; both torchvision and what was there before are put back."""
    import transformers  # noqa: F401  (it looks for torchvision once, and must not find this one)

    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops",
             "torchvision.ops.misc")  # fmt: skip
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = Module(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        return pytest.importorskip("open_clip")
    finally:
        for name in names:
            if before[name] is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before[name]


@pytest.fixture(scope="module", params=["stand-in", "package"])
def open_clip(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "package":
            yield request.getfixturevalue("real")
        else:
            patch.setitem(sys.modules, "open_clip", STAND_IN)
            yield STAND_IN


@pytest.fixture(scope="module")
def tower(open_clip, tmp_path_factory):
    """(open_clip's model, the name of the same weights)."""
    import logging

    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # it warns that the weights are random
    try:
        model = open_clip.create_model(ARCHITECTURE)
    finally:
        logging.disable(logging.NOTSET)
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}, file)
    return model.eval(), f"open_clip:{ARCHITECTURE}/{file}"


def test_what_stands_for_the_package_is_like_it(real):
    theirs, ours = real.create_model(ARCHITECTURE).visual.eval(), create_model(ARCHITECTURE).visual.eval()
    assert {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()} == NAMES
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels), rtol=0, atol=2e-5)
    for name, settings in SETTINGS.items():
        assert real.get_model_config(name)["vision_cfg"] == settings
    for (name, tag), golden in PRETRAINED.items():
        found = real.get_pretrained_cfg(name, tag)
        assert {key: found[key] for key in ("mean", "std", "quick_gelu") if key in found} == golden
    assert real.get_model_config("ViT-Q-99") is None


def test_every_name_of_the_package_is_read_or_known_to_be_useless(tower):
    theirs, _ = tower
    assert {name: tuple(tensor.shape) for name, tensor in theirs.visual.state_dict().items()} == NAMES


def model_with(name: str, folder: Path) -> Model:
    """A language model saved without its tower, which names open_clip's: as published checkpoints do."""
    encoder = tower_config(name)
    backbone = BackboneConfig(vocab_size=8, width=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, mlp_width=8,
                              dt_rank=2)  # fmt: skip
    bridge = BridgeConfig(tokens_per_image=encoder.grid() ** 2, pool="none", hidden=8)
    model = Model(ModelConfig(encoder=encoder, bridge=bridge, backbone=backbone))
    model.initialise_()
    save_file({key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")},
              folder / "model.safetensors")  # fmt: skip
    load_weights_(model, folder / "model.safetensors")
    return model


def test_features_equal_those_of_the_package(tower, tmp_path):
    theirs, name = tower
    ours = model_with(name, tmp_path)
    size = ours.config.encoder.image_size
    pixels = torch.randn(2, 3, size, size)
    layers = theirs.visual.transformer.resblocks
    kept = {}
    # hidden_states[-2] is what the last but one block gives
    hook = layers[len(layers) - 2].register_forward_hook(lambda module, inputs, output: kept.update(features=output))
    with torch.no_grad():
        theirs.encode_image(pixels)
        features = ours.encode(pixels)
    hook.remove()
    torch.testing.assert_close(features, kept["features"][:, 1:], rtol=0, atol=2e-5)


def test_the_config_of_the_published_tower(open_clip):
    """The tag decides: OpenAI's weights were trained with quick GELU, also where the architecture does not say so."""
    found = tower_config("open_clip:ViT-L-14-336/openai")
    assert found == EncoderConfig(weights="open_clip:ViT-L-14-336/openai")
    assert tower_config("open_clip:ViT-L-14/laion2b_s32b_b82k").activation == "gelu"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("open_clip:ViT-Q-99/openai", "open_clip has no model 'ViT-Q-99'"),
        ("open_clip:RN50/openai", "only open_clip's plain vision transformers"),
        ("open_clip:ViT-SO400M-14-SigLIP-384/webli", "only open_clip's plain vision transformers"),
    ],
)
def test_other_architectures_are_refused(open_clip, name, words):
    with pytest.raises(CheckpointError, match=words):
        tower_config(name)


def test_weights_must_be_named(tower, tmp_path):
    name = f"open_clip:{ARCHITECTURE}"
    assert split_name(name) == (ARCHITECTURE, None)
    with pytest.raises(CheckpointError, match="name the weights too"):
        model_with(name, tmp_path)
    with pytest.raises(CheckpointError, match="open_clip says: .*no-such-tag"):
        model_with(name + "/no-such-tag", tmp_path)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(CheckpointError, match=r"pip install 'longllava\[openclip\]'"):
        tower_config("open_clip:ViT-L-14-336/openai")
