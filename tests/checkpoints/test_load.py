"""What is wrong with a folder is listed in one error, and the model stays as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longllava.checkpoints import convert, find_folder, load, load_model, load_weights_, save_model, stored
from longllava.checkpoints.adapters import read_adapter
from longllava.errors import CheckpointError, ConfigError
from tests.checkpoints import published
from tests.checkpoints.folders import TINY, change, same, save
from tests.tiny import tiny_model


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_loading_runs_no_initialisation(tmp_path, monkeypatch):
    """Built on meta: peak memory is that of the weights, and no time goes into random numbers."""
    folder = save(tmp_path)
    state = torch.get_rng_state()
    model = load_model(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_parts_may_be_missing_where_allowed(tmp_path):
    folder = save(tmp_path, parts=("encoder.", "backbone."))
    with pytest.raises(CheckpointError, match=r"4 missing: bridge\.up\.weight"):
        load_model(folder)
    model = tiny_model(3, seed=7).model
    bridge = snapshot(model.bridge)
    load_weights_(model, folder, allow_missing=("bridge.",))
    assert same(model.backbone, TINY.model.backbone)
    assert all(torch.equal(bridge[key], value) for key, value in model.bridge.state_dict().items())
    assert not any(tensor.is_meta for tensor in load_model(folder, allow_missing=("bridge.",)).parameters())


@pytest.mark.parametrize("gone", ["q", "k"])
def test_a_part_of_a_joined_weight_is_missing_where_the_whole_may_be(tmp_path, gone):
    published.longllava(tmp_path)
    name = f"model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.{gone}_proj.weight"
    change(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        load_model(tmp_path, allow_missing=("encoder.",))


def test_all_faults_in_one_error_and_the_model_untouched(tmp_path):
    folder = save(tmp_path)

    def edit(tensors):
        del tensors["backbone.final_norm.weight"]
        tensors["backbone.extra"] = torch.zeros(1)
        tensors["bridge.up.bias"] = torch.zeros(3)

    change(folder, edit)
    model = tiny_model(3, seed=9).model
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights_(model, folder)
    assert "1 missing: backbone.final_norm.weight" in str(caught.value)
    assert "1 unexpected: backbone.extra" in str(caught.value)
    assert "1 of wrong shape: bridge.up.bias (3,) instead of (32,)" in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    folder = save(tmp_path)
    change(folder, lambda tensors: tensors["bridge.up.bias"].__setitem__(3, value))
    model = tiny_model(3, seed=9).model
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in bridge\.up\.bias;"):
        load_weights_(model, folder)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_missing_shards_are_listed(tmp_path):
    folder = save(tmp_path, shard_bytes=20_000)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"missing {gone.name} of"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_torn_weights(tmp_path, keep):
    path = save(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "..",
        "x.bin",
        3,
        "a\\x.safetensors",
        "c:x.safetensors",
        "x\0.safetensors",
        "x\ud800.safetensors",
        None,
    ],
)
def test_an_index_names_only_files_of_its_folder(tmp_path, name):
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is not the plain name of"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
def test_broken_indexes(tmp_path, text):
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not an index|weight_map is not"):
        load_model(tmp_path)


def test_an_index_that_lies_about_its_shards(tmp_path):
    folder = save(tmp_path, shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["backbone.ghost"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"they differ in backbone\.ghost"):
        load_model(folder)


def test_an_index_that_lists_a_tensor_twice(tmp_path):
    folder = save(tmp_path, shard_bytes=20_000)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"bridge.up.bias": "x.safetensors",', 1))
    with pytest.raises(CheckpointError, match=r"index\.json: the same key stands twice"):
        load_model(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = save(tmp_path, shard_bytes=20_000)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    change(folder, lambda tensors: tensors.update({key: tensor + 1}), second.name)
    with pytest.raises(CheckpointError, match=f"{second.name}: its tensors are not those .* they differ in {key}"):
        load_model(folder)


def test_two_sets_of_weights_in_one_folder(tmp_path):
    """transformers reads model.safetensors, others the index: nobody can know which is meant."""
    save(tmp_path, shard_bytes=20_000)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model\.safetensors\.index\.json are there"):
        load_model(tmp_path)


@pytest.mark.parametrize(("dtype", "n"), [("int64", 2), ("bool", 2), ("uint8", 2)])
def test_weights_of_whole_numbers_are_listed(tmp_path, dtype, n):
    """What quantisers write: read as numbers they would be noise."""
    folder, kind = save(tmp_path), getattr(torch, dtype)
    names = ("backbone.final_norm.weight", "bridge.up.bias")
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(kind) for name in names}))
    model = tiny_model(3, seed=9).model
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"{n} of whole numbers: .*bridge\.up\.bias torch\.{dtype}"):
        load_weights_(model, folder)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_of_eight_bits_are_refused(tmp_path):
    folder = save(tmp_path)
    change(
        folder, lambda tensors: tensors.update({"bridge.up.bias": tensors["bridge.up.bias"].to(torch.float8_e4m3fn)})
    )
    with pytest.raises(CheckpointError, match=r"bridge\.up\.bias is stored as F8_E4M3; allowed: F64, F32"):
        load_model(folder)


def test_dtypes_may_be_mixed(tmp_path):
    folder = save(tmp_path)
    kinds = (torch.bfloat16, torch.float16, torch.float64)
    change(folder, lambda tensors: tensors.update(
        {name: tensor.to(kinds[k % 3]) for k, (name, tensor) in enumerate(sorted(tensors.items())) if k % 4}
    ))  # fmt: skip
    model = load_model(folder, dtype=torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    for key, tensor in TINY.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-2, atol=1e-6)


def test_pickles_are_refused_unopened(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which may run code"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="give the folder"):
        find_folder(tmp_path / "pytorch_model.bin")


def test_unknown_models(tmp_path):
    with pytest.raises(CheckpointError, match="no such model"):
        find_folder("nothing-here")
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        find_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["", None, 5, b"nano"])
def test_what_names_no_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path)  # a model in the folder one stands in, which an empty name would be to Path
    with pytest.raises(CheckpointError, match=r"^model: got .*, expected the name of a .* those shipped: .*nano"):
        find_folder(name)


def test_a_download_needs_a_home(monkeypatch):
    def homeless(*_, **__):
        raise RuntimeError("Could not determine home directory.")  # a container's user that the system does not know

    monkeypatch.setattr("huggingface_hub.snapshot_download", homeless)
    with pytest.raises(CheckpointError, match=r"^owner/model: not a folder here, and the hub says: Could not"):
        find_folder("owner/model")


def test_config_faults_name_file_and_key(tmp_path):
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["n_layer"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json: backbone: unknown key 'n_layer'; did you mean 'n_layers'"):
        load_model(folder)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_folder_that_is_saved_over_while_it_is_read_is_no_mixture(tmp_path, monkeypatch, shard_bytes):
    """Both saves have the same names, shapes and dtypes: only the time tells them apart."""
    other = tiny_model(3, seed=5)

    def over(folder):
        save_model(other.model, other.tokenizer, folder, shard_bytes=shard_bytes)

    def saved_between(module, name, when):
        """Another model is saved before the call number `when` of a function that reads."""
        folder, original, calls = tmp_path / f"{name}{when}", getattr(module, name), []

        def call(*arguments):
            calls.append(arguments)
            if len(calls) == when:
                over(folder)
            return original(*arguments)

        save(folder, shard_bytes=shard_bytes)
        monkeypatch.setattr(module, name, call)
        return folder

    for when in (2, 40):
        with pytest.raises(CheckpointError, match=r"\.safetensors: was replaced while the folder was read; try again"):
            load_model(saved_between(stored.Entry, "read", when))
        monkeypatch.undo()
    for module, read in ((load, load_model), (convert, convert.open_source)):
        with pytest.raises(CheckpointError, match="config.json: was replaced while the folder was read; try again"):
            read(saved_between(module, "find_places", 1))
        monkeypatch.undo()
    folder, header = save(tmp_path / "killed", shard_bytes=shard_bytes), stored.header

    def after_a_killed_save(path):
        (folder / ".unfinished-0").mkdir(exist_ok=True)
        return header(path)

    monkeypatch.setattr(stored, "header", after_a_killed_save)
    with pytest.raises(CheckpointError, match="a save stopped between two files"):
        load_weights_(TINY.model, folder)


def test_a_file_that_goes_while_it_is_opened_cannot_be_read(tmp_path, monkeypatch):
    """safetensors opens it, and then torch once more: a save in between leaves nothing there for a moment."""
    original, folder = torch.UntypedStorage.from_file, save(tmp_path / "m")

    def gone(file, *rest, **options):
        Path(file).unlink(missing_ok=True)
        return original(file, *rest, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", gone)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: .*No such file"):
        load_model(folder)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read: .*No such file"):
        read_adapter(folder)
