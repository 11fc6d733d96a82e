"""A dense model of a mixture: as the original script makes it, one expert, their mean, or the router's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from longllava.checkpoints import calibration, load_model
from longllava.checkpoints.calibration import WINDOW, windows
from longllava.checkpoints.convert import convert_layout, open_source
from longllava.checkpoints.downcycle import ORIGINAL, downcycle, router_shares
from longllava.errors import CheckpointError
from longllava.nn import Context
from tests.checkpoints import published
from tests.checkpoints.folders import weights
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    published.longllava(folder)
    convert_layout(folder, folder / "text", "longllava", text_only=True)
    return folder / "text"


def expert(tensors, layer, j, kind):
    return tensors[f"model.layers.{layer}.moe.experts.{j}.{kind}_proj.weight"]


def test_downcycling_as_the_original_script(experts, tmp_path):
    """Expert 0 of the layers with experts, its down projection times 0.045, in bfloat16; the rest copied."""
    downcycle(experts, tmp_path, **ORIGINAL, scheme="longllava", dtype=torch.bfloat16)
    before, after = weights(experts), weights(tmp_path)
    expected = {key: value for key, value in before.items() if "router" not in key and ".moe.experts.0" in key}
    expected |= {key: value for key, value in before.items() if ".moe." not in key}
    for layer in (1, 3):
        key = f"model.layers.{layer}.moe.experts.0.down_proj.weight"
        expected[key] = before[key] * 0.045
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(after[key].bfloat16(), value.bfloat16()), key
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (1, 1)
    assert load_model(tmp_path).config.backbone.n_experts == 1


def test_an_expert_and_the_mean(experts, tmp_path):
    before = weights(experts)
    downcycle(experts, tmp_path / "k", take=2, scale=0.5, scheme="longllava")
    downcycle(experts, tmp_path / "mean", scheme="longllava")
    for layer in (1, 3):
        for kind, factor in (("gate", 1.0), ("up", 1.0), ("down", 0.5)):
            chosen = expert(weights(tmp_path / "k"), layer, 0, kind)
            torch.testing.assert_close(chosen, expert(before, layer, 2, kind) * factor, rtol=0, atol=0)
            mean = torch.stack([expert(before, layer, j, kind) for j in range(4)]).mean(0)
            torch.testing.assert_close(expert(weights(tmp_path / "mean"), layer, 0, kind), mean, rtol=0, atol=1e-7)
    for layer in (0, 2, 4):  # plain layers stay
        assert torch.equal(expert(weights(tmp_path / "k"), layer, 0, "down"), expert(before, layer, 0, "down"))


def test_the_router_weighs_the_mean(experts, tmp_path):
    """A router that always prefers expert 3, then 1: with two a token these two share, by their softmax weights."""
    tensors = weights(experts)
    for layer in (1, 3):
        tensors[f"model.layers.{layer}.moe.router.weight"].zero_()
    biased = tmp_path / "biased"
    biased.mkdir()
    (biased / "config.json").write_bytes((experts / "config.json").read_bytes())
    save_file(tensors, biased / "model.safetensors")
    source = open_source(biased)
    uneven = weights(experts)
    for layer in (1, 3):
        uneven[f"model.layers.{layer}.pre_moe_layernorm.weight"] = torch.linspace(-1, 3, 32)
    save_file(uneven, experts / "model.safetensors")
    even = router_shares(source, "backbone.layers.1")
    assert sum(even) == pytest.approx(1) and sorted(even)[:2] == [0, 0]  # ties: the same two of four for every token
    shares = router_shares(open_source(experts), "backbone.layers.1")
    # against what the model's own layer does with many normal inputs
    model = load_model(experts)
    layer = model.backbone.layers[1]
    inputs = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(7)) * layer.ffn_norm.weight
    with torch.no_grad():
        chosen = torch.softmax(layer.ffn.router(inputs), -1).topk(2)
    given = torch.zeros(20_000, 4).scatter_(1, chosen.indices, chosen.values).sum(0)
    torch.testing.assert_close(torch.tensor(shares), given / given.sum(), rtol=0, atol=0.02)
    downcycle(experts, tmp_path / "out", take="router", scheme="longllava")
    merged = sum(share * expert(weights(experts), 1, j, "up") for j, share in enumerate(shares))
    torch.testing.assert_close(expert(weights(tmp_path / "out"), 1, 0, "up"), merged, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A mixture with a tokenizer, and a text of a window and a half."""
    folder = tmp_path_factory.mktemp("readers")
    published.jamba(folder, 4, vocab_size=512)
    tiny_tokenizer().save(folder)
    (folder / "text.txt").write_text("what is the red heart of this? " * 190)
    return folder


def test_the_router_weighs_the_mean_by_what_it_gives_to_a_text(readers, tmp_path):
    """Against hooks on the routers of the whole model, which reads the same two windows."""
    model, tokenizer = load_model(readers), tiny_tokenizer()
    ids = tokenizer.encode((readers / "text.txt").read_text())
    assert WINDOW < len(ids) < 2 * WINDOW
    expected = {}
    for number in (1, 3):
        rows: list[torch.Tensor] = []
        hook = model.backbone.layers[number].ffn.router.register_forward_hook(lambda m, x, y, rows=rows: rows.append(y))
        with torch.no_grad():
            for part in (ids[: WINDOW - 1], ids[WINDOW - 1 :]):
                model(model.embed(torch.tensor([[tokenizer.bos_id, *part]])), Context())
        hook.remove()
        probabilities = torch.softmax(torch.cat(rows), -1)
        chosen = probabilities >= probabilities.topk(2).values[:, -1:]
        total = (probabilities * chosen).sum(0)
        expected[number] = total / total.sum()
    downcycle(readers, tmp_path, take="router", calibrate=readers / "text.txt", scheme="jamba")
    before, after = weights(readers), weights(tmp_path)
    random = open_source(readers)
    for number, shares in expected.items():
        assert (shares - torch.tensor(router_shares(random, f"backbone.layers.{number}"))).abs().max() > 0.02
        for kind in ("gate", "up", "down"):
            name = f"model.layers.{number}.feed_forward{{}}.{kind}_proj.weight"
            merged = sum(share * before[name.format(f".experts.{j}")] for j, share in enumerate(shares))
            torch.testing.assert_close(after[name.format("")], merged, rtol=0, atol=1e-5)


def test_of_a_long_text_the_beginning_alone_is_read(readers, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CHARACTERS", 5000)
    (tmp_path / "long").write_bytes(b"what " * 20_000 + b"\xff")
    (tmp_path / "short").write_bytes(b"what " * 1000)
    assert windows(open_source(readers), tmp_path / "long") == windows(open_source(readers), tmp_path / "short")


def test_what_cannot_be_read_for_calibration(readers, tmp_path):
    for name, data, words in (
        ("a", None, "a: cannot be read"), ("b", b"", "no text in it"), ("c", b"\xff\xfe", "cannot be read: .*utf-8"),
    ):  # fmt: skip
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            downcycle(readers, tmp_path / "out", take="router", calibrate=tmp_path / name)
    with pytest.raises(CheckpointError, match="with take router only, not with 'mean'"):
        downcycle(readers, tmp_path / "out", calibrate=readers / "text.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("take", "words"),
    [(4, "expert 4 of 4; give 0 to 3"), ("best", "got 'best'; give the number of an expert, mean or router")],
)
def test_what_cannot_be_taken(experts, tmp_path, take, words):
    with pytest.raises(CheckpointError, match=words):
        downcycle(experts, tmp_path / "out", take=take)
    with pytest.raises(CheckpointError, match="scale: got nan; give a finite number"):
        downcycle(experts, tmp_path / "out", scale=float("nan"))


def test_a_dense_model_cannot_become_denser(tmp_path):
    published.jamba(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match="it is dense already"):
        downcycle(tmp_path / "a", tmp_path / "b")
