"""What is written is read back; what is wrong is listed in one error, and the model stays as it was."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from longllava.checkpoints import find_folder, load_model, load_weights_, save_model
from longllava.config import EncoderConfig
from longllava.errors import CheckpointError, ConfigError
from longllava.model import Model
from tests.tiny import tiny_config, tiny_model

TINY = tiny_model(3)


def save(folder, **options):
    return save_model(TINY.model, TINY.tokenizer, folder, **options)


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def change(folder, edit, name="model.safetensors"):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def test_round_trip(tmp_path):
    folder = save(tmp_path / "a")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    model = load_model(folder)
    assert same(model, TINY.model) and model.config == TINY.model.config and not model.training


def test_whole_numbers_that_the_model_counts_with(tmp_path):
    """The batch norms of a convolution stem count their batches."""
    encoder = EncoderConfig(image_size=16, patch_size=4, width=16, n_layers=1, n_heads=2, mlp_width=32, select_layer=-1,
                            class_token=False, stem_widths=(8,), stem_strides=(4,), stem_blocks=(1,))  # fmt: skip
    made = Model(tiny_config(encoder=encoder)).eval()
    made.initialise_(0)
    counts = [key for key, tensor in made.state_dict().items() if not tensor.is_floating_point()]
    assert counts and all(key.endswith("num_batches_tracked") for key in counts)
    made.state_dict()[counts[0]].fill_(7)
    folder = save_model(made, TINY.tokenizer, tmp_path / "a", dtype=torch.bfloat16)
    assert load_model(folder).state_dict()[counts[0]] == 7

    def count_in_words(tensors):
        tensors[counts[0]] = tensors[counts[0]].float()

    change(folder, count_in_words)
    with pytest.raises(CheckpointError, match=r"1 not of whole numbers: .*num_batches_tracked torch\.float32"):
        load_model(folder)


def test_round_trip_in_shards(tmp_path):
    folder = save(tmp_path, shard_bytes=20_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < 80_000
    assert same(load_model(folder), TINY.model)


def test_saving_again_leaves_nothing_of_the_old(tmp_path):
    save(tmp_path, shard_bytes=20_000)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "notes.txt", "tokenizer.json",
    ]  # fmt: skip
    save(tmp_path, shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists() and same(load_model(tmp_path), TINY.model)


def test_a_save_that_fails_leaves_the_old(tmp_path, monkeypatch):
    save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(type(TINY.tokenizer), "save", lambda self, folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dtypes_but_recurrences_stay_fp32(tmp_path):
    folder = save(tmp_path, dtype=torch.bfloat16)
    exact = ("A_log_EN", "D_E", "dt_bias_E", "log_length_H")
    for state in (
        load_file(folder / "model.safetensors"),
        load_model(save(tmp_path / "b"), dtype=torch.bfloat16).state_dict(),
    ):
        for key, tensor in state.items():
            assert tensor.dtype == (torch.float32 if key.endswith(exact) else torch.bfloat16), key
    mixed = load_model(folder, dtype=torch.float32).state_dict()
    weight = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(mixed[weight], TINY.model.state_dict()[weight].bfloat16().float())


def test_every_tensor_begins_at_a_multiple_of_its_items_size(tmp_path):
    """As safetensors writes them; others map the file and read it in place."""
    from longllava.checkpoints.write import Output, write_tensors

    kinds = {"a": torch.uint8, "b": torch.float32, "c": torch.float16, "d": torch.float64, "e": torch.bool}
    tensors = {name: torch.arange(3).to(kind) for name, kind in kinds.items()} | {"empty": torch.zeros(0, 2)}
    outputs = {name: Output(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    write_tensors(tmp_path / "a.safetensors", outputs)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    data = (tmp_path / "a.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    assert end % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_loading_runs_no_initialisation(tmp_path, monkeypatch):
    """Built on meta: peak memory is that of the weights, and no time goes into random numbers."""
    folder = save(tmp_path)
    state = torch.get_rng_state()
    model = load_model(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_encoder_may_live_elsewhere(tmp_path):
    config = tiny_config(encoder=EncoderConfig(**{**vars(TINY.model.config.encoder), "weights": "../whole"}))
    borrower = tiny_model(encoder=config.encoder, seed=5)
    save(tmp_path / "whole")
    folder = save_model(borrower.model, borrower.tokenizer, tmp_path / "part", include_encoder=False)
    assert not any(key.startswith("encoder.") for key in load_file(folder / "model.safetensors"))
    model = load_model(folder)
    assert same(model.encoder, TINY.model.encoder) and same(model.backbone, borrower.model.backbone)
    with pytest.raises(CheckpointError, match=r"encoder\.weights names no model"):
        save(tmp_path / "c", include_encoder=False)


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


def test_tied_embeddings_may_be_stored_beside_themselves(tmp_path):
    backbone = replace(tiny_config().backbone, tie_embeddings=True)
    tied = Model(tiny_config(backbone=backbone))
    tied.initialise_()
    folder = save_model(tied, TINY.tokenizer, tmp_path)
    assert "backbone.lm_head.weight" not in load_file(folder / "model.safetensors")
    change(
        folder, lambda tensors: tensors.update({"backbone.lm_head.weight": tensors["backbone.embed_tokens.weight"] + 0})
    )
    assert same(load_model(folder), tied)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_save_cut_between_two_files_is_told_and_can_be_finished(tmp_path, monkeypatch, shard_bytes):
    """Old shards among new ones fit each other in every name and shape. Cut before each of the renames in turn."""
    from longllava.checkpoints import write

    def old_and_new(folder):
        save(folder, shard_bytes=shard_bytes)
        return tiny_model(3, seed=5)

    replaced, limit = [], [10**6]
    original = os.replace

    def cut(source, target):
        if ".unfinished-" not in str(source):
            return original(source, target)
        if len(replaced) == limit[0]:
            raise KeyboardInterrupt
        replaced.append(target)
        return original(source, target)

    monkeypatch.setattr(write.os, "replace", cut)
    new = old_and_new(tmp_path / "whole")
    n_files = len(replaced)
    assert n_files == len(list((tmp_path / "whole").iterdir())) >= 3
    for k in range(n_files):
        folder = tmp_path / str(k)
        limit[0] = 10**6
        old_and_new(folder)
        replaced.clear()
        limit[0] = k
        with pytest.raises(KeyboardInterrupt):
            save_model(new.model, new.tokenizer, folder, shard_bytes=shard_bytes)
        with pytest.raises(CheckpointError, match="a save stopped between two files"):
            load_model(folder)
        if k % 2:  # saved again
            limit[0] = 10**6
            save_model(new.model, new.tokenizer, folder, shard_bytes=shard_bytes)
        else:  # moved by hand
            (left,) = folder.glob(".unfinished-*")
            for path in left.iterdir():
                original(path, folder / path.name)
            left.rmdir()
        assert same(load_model(folder), new.model)
        assert not list(folder.glob(".*"))


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


def test_config_faults_name_file_and_key(tmp_path):
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["n_layer"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json: backbone: unknown key 'n_layer'; did you mean 'n_layers'"):
        load_model(folder)


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(CheckpointError, match="a file of that name exists"):
        save(tmp_path / "a")


def test_saved_files_can_be_read_by_others(tmp_path):
    folder = save(tmp_path)
    assert all(os.stat(path).st_mode & 0o777 == 0o644 for path in folder.iterdir())
