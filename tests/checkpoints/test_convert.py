"""Pickles are opened elsewhere or not at all; layouts are written into one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longllava.checkpoints import load_model, load_weights_
from longllava.checkpoints.convert import convert_layout, convert_pickles
from longllava.checkpoints.unpickle import tensors_of
from longllava.errors import CheckpointError
from longllava.plan_report import open_config
from tests.checkpoints import published
from tests.checkpoints.folders import assert_same, weights


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


def test_a_module_beside_a_pickle_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    torch.save({"weight": torch.ones(2)}, tmp_path / "mm_projector.bin")
    monkeypatch.chdir(tmp_path)  # as who has downloaded a folder may stand in it
    assert convert_pickles("mm_projector.bin") == [Path("mm_projector.safetensors")]
    assert not (tmp_path / "ran").exists()


def test_a_home_that_is_not_known_is_a_folder_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published.jamba(tmp_path / "a", 1)
    unknown = "~nobody-of-this-name/model"
    with pytest.raises(CheckpointError, match=r"~nobody-of-this-name/model: no such file or folder"):
        convert_pickles(unknown)
    with pytest.raises(CheckpointError, match=r"~nobody-of-this-name/model: neither a folder here nor"):
        open_config(unknown)
    assert convert_layout("./a", unknown) == Path(unknown)


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
    with pytest.raises(CheckpointError, match="none.bin: no such file or folder"):
        convert_pickles(tmp_path / "none.bin")


@pytest.mark.parametrize("scheme", ["native", "longllava"])
def test_layouts_into_one_another_without_a_model(tmp_path, scheme):
    published.longllava(tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/b").mkdir()
    for name in ("generation_config.json", "tokenizer.json", "notes.txt"):  # of a model that was there before
        (tmp_path / "a/b" / name).write_text("old")
    convert_layout(tmp_path / "a", tmp_path / "a/b", scheme, shard_bytes=30_000)
    assert (tmp_path / "a/b/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "a/b/generation_config.json").exists() and (tmp_path / "a/b/notes.txt").exists()
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
    (tmp_path / "adapter").mkdir()
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / "adapter" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="adapter: it holds an adapter, not a model; longllava merge"):
        convert_layout(tmp_path / "adapter", tmp_path / "c", "native")
    with pytest.raises(CheckpointError, match="one folder"):
        convert_layout(tmp_path / "b", tmp_path / "b", "jamba")


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
