"""Pickles are opened elsewhere or not at all; layouts are written into one another; mixtures become dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longllava.checkpoints import load_model, load_weights_
from longllava.checkpoints.calibration import WINDOW
from longllava.checkpoints.convert import convert_layout, convert_pickles, open_source
from longllava.checkpoints.downcycle import ORIGINAL, downcycle, router_shares
from longllava.checkpoints.unpickle import tensors_of
from longllava.errors import CheckpointError
from longllava.nn import Context
from tests.checkpoints import published
from tests.tiny import tiny_tokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def pickled(folder: Path, n_files: int) -> dict[str, torch.Tensor]:
    """A Jamba folder whose weights are pickles, as older releases are."""
    published.jamba(folder, 1)
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for k in range(n_files):
        name = "pytorch_model.bin" if n_files == 1 else f"pytorch_model-{k + 1:05d}-of-{n_files:05d}.bin"
        torch.save({key: tensors[key] for key in names[k::n_files]}, folder / name)
    return tensors


@pytest.mark.parametrize("n_files", [1, 2])
def test_pickled_folders_become_safetensors_that_load(tmp_path, n_files):
    tensors = pickled(tmp_path, n_files)
    with pytest.raises(CheckpointError, match=r"is a pickle.*`longllava convert .*`"):
        load_model(tmp_path)
    written = convert_pickles(tmp_path)
    names = {1: ["model.safetensors"], 2: ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                                           "model.safetensors.index.json"]}[n_files]  # fmt: skip
    assert [path.name for path in written] == names
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
    assert_same(found, tensors)
    assert load_model(tmp_path).backbone.config.width == 32


def test_the_projector_file_is_converted_beside_itself_or_elsewhere(tmp_path):
    published.longllava(tmp_path, 1)
    tensors = {key: value for key, value in weights(tmp_path).items() if "mm_projector" in key}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin is a pickle.*longllava convert"):
        load_weights_(load_model(tmp_path), tmp_path / "mm_projector.bin", parts=("bridge.",))
    assert convert_pickles(tmp_path / "mm_projector.bin") == [tmp_path / "mm_projector.safetensors"]
    assert_same(load_file(tmp_path / "mm_projector.safetensors"), tensors)
    assert [path.parent.name for path in convert_pickles(tmp_path / "mm_projector.bin", tmp_path / "b")] == ["b"]


class Marker:
    """What a hostile file does: a call of its choice while it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["code", "torn", "text", "no tensors"])
def test_what_is_not_plain_tensors_is_refused_and_nothing_is_written(tmp_path, kind):
    file, marker = tmp_path / "pytorch_model.bin", tmp_path / "marker"
    if kind == "code":
        torch.save({"a": torch.ones(2), "b": Marker(marker)}, file)
    elif kind == "torn":
        torch.save({"a": torch.ones(2000)}, file)
        file.write_bytes(file.read_bytes()[:3000])
    elif kind == "text":
        file.write_text("not a pickle")
    else:
        torch.save({"a": 3}, file)
    with pytest.raises(CheckpointError, match=r"_model\.bin: (it is not a pickle of plain|there are no) tensors"):
        convert_pickles(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]
    if kind == "code":  # the same file does act in a reader that trusts it
        torch.load(file, weights_only=False)
        assert marker.exists()


def test_state_dicts_may_lie_deeper():
    inner = {"a": torch.ones(2), "step": 3}
    for data in (inner, {"state_dict": inner}, {"model": inner, "optimizer": {}}):
        assert list(tensors_of(data)) == ["a"]
    assert tensors_of([1, 2]) == {}


def test_what_trainer_writes_beside_weights_is_left_alone(tmp_path):
    tensors = pickled(tmp_path / "a", 1)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / "a" / name).write_bytes(b"never opened")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    written = convert_pickles(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in written] == ["config.json", "generation_config.json", "model.safetensors",
                                               "tokenizer.json"]  # fmt: skip
    assert_same(weights(tmp_path / "b"), tensors)
    assert load_model(tmp_path / "b").backbone.config.width == 32


def test_a_tensor_in_two_pickles(tmp_path):
    for k in (1, 2):
        torch.save({"a": torch.full((2,), float(k)), f"b{k}": torch.ones(1)}, tmp_path / f"pytorch_model-{k}-of-2.bin")
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.bin: a lies in another file of .* too"):
        convert_pickles(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("pickles", "there", "words"),
    [
        (["pytorch_model.bin"], "model.safetensors", "model.safetensors stands"),
        (["pytorch_model.bin"], "model.safetensors.index.json", "index.json stands"),
        (["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"], "model.safetensors", "model.safetensors stands"),
        (["mm_projector.bin"], "mm_projector.safetensors", "mm_projector.safetensors stands"),
        (["a.bin", "a.pt"], "notes", "a.safetensors stands"),
    ],
)
def test_nothing_is_written_over(tmp_path, pickles, there, words):
    for name in pickles:
        torch.save({name: torch.ones(1)}, tmp_path / name)
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=words):
        convert_pickles(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*pickles, there])
    assert (tmp_path / there).read_bytes() == b"mine"


def test_nothing_to_convert(tmp_path):
    with pytest.raises(CheckpointError, match="no pickled weights there"):
        convert_pickles(tmp_path)


@pytest.mark.parametrize("scheme", ["native", "longllava"])
def test_layouts_into_one_another_without_a_model(tmp_path, scheme):
    published.longllava(tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    convert_layout(tmp_path / "a", tmp_path / "a/b", scheme, shard_bytes=30_000)
    assert (tmp_path / "a/b/tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "a/b").glob("*.safetensors"))) > 3
    if scheme == "longllava":
        (tmp_path / "a/b/tower").symlink_to(tmp_path / "a/tower")
    assert_same(load_model(tmp_path / "a/b").state_dict(), load_model(tmp_path / "a").state_dict())


def test_the_language_model_of_longllava_in_the_names_of_transformers(tmp_path):
    from transformers import JambaForCausalLM

    published.longllava(tmp_path / "a")
    convert_layout(tmp_path / "a", tmp_path / "b", "jamba", text_only=True)
    expected = load_file(tmp_path / "a/stock/model.safetensors")
    found = JambaForCausalLM.from_pretrained(tmp_path / "b")  # raises nothing and reports nothing missing
    assert torch.equal(found.lm_head.weight, expected["language_model.lm_head.weight"])
    assert torch.equal(found.model.layers[3].feed_forward.experts.down_proj[2],
                       expected["language_model.model.layers.3.feed_forward.experts.2.down_proj.weight"])  # fmt: skip
    with pytest.raises(CheckpointError, match="one folder"):
        convert_layout(tmp_path / "b", tmp_path / "b", "jamba")


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


def test_a_dense_model_cannot_become_denser(tmp_path):
    published.jamba(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match="it is dense already"):
        downcycle(tmp_path / "a", tmp_path / "b")


def test_on_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from longllava.cli import app

    pickled(tmp_path / "a", 1)
    run = CliRunner().invoke
    assert run(app, ["convert", str(tmp_path / "a")]).output.endswith("model.safetensors\n")
    layout = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "native", "--dtype", "bfloat16"]
    assert run(app, layout).exit_code == 0
    assert weights(tmp_path / "b")["backbone.lm_head.weight"].dtype == torch.bfloat16
    assert "give the folder" in str(run(app, ["convert", str(tmp_path / "a"), "--to", "native"]).exception)
    assert "dense already" in str(run(app, ["downcycle", str(tmp_path / "a"), str(tmp_path / "c")]).exception)
