"""What is saved is read back, whole in each dtype, in shards, and however a save is cut."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longllava.checkpoints import find_folder, load_model, save_model, write
from longllava.checkpoints.convert import open_source
from longllava.config import EncoderConfig
from longllava.errors import CheckpointError, ConfigError
from longllava.model import Model
from tests.checkpoints.folders import TINY, change, same, save
from tests.tiny import tiny_config, tiny_model


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
    for name in ("training.json", "generation_config.json", "processor_config.json", "tokenizer.model"):
        (tmp_path / name).write_text('{"suppress_tokens": [7]}')  # of the model that goes; transformers would heed it
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
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "new" / "model")
    assert not (tmp_path / "new").exists()


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
    change(folder, lambda tensors: tensors["backbone.lm_head.weight"][3].add_(1))
    for read in (load_model, open_source):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding.*\(tie_embeddings, or"):
            read(folder)


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


def test_what_would_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds an adapter, which would be read instead"):
        save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save("~/tiny") == find_folder("~/tiny")
    monkeypatch.chdir(tmp_path)
    save("nano")
    with pytest.warns(UserWarning, match=r"nano: the shipped model is taken; for the folder .* write \./nano"):
        assert find_folder("nano") != Path("nano")
    assert find_folder("./nano") == Path("nano")


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path):
    tiny = tiny_model()
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(ConfigError, match=f"dtype: got {dtype!r}, expected floats such as torch.bfloat16"):
            save_model(tiny.model, tiny.tokenizer, tmp_path / "out", dtype=dtype)
    tiny.model.backbone.layers[0].mixer.in_proj.weight.data[1, 2] = 1e5
    save_model(tiny.model, tiny.tokenizer, tmp_path / "wide")
    beyond = "in_proj.weight.*beyond what torch.float16 holds"
    with pytest.raises(CheckpointError, match=beyond):
        load_model(tmp_path / "wide", dtype=torch.float16)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=beyond):
        save_model(tiny.model, tiny.tokenizer, tmp_path / "out", dtype=torch.float16)
    assert not list((tmp_path / "out").iterdir())


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(CheckpointError, match="a file of that name exists"):
        save(tmp_path / "a")


def test_saved_files_can_be_read_by_others(tmp_path):
    folder = save(tmp_path)
    assert all(os.stat(path).st_mode & 0o777 == 0o644 for path in folder.iterdir())


def test_saves_into_one_folder_take_turns(tmp_path, monkeypatch):
    tiny, replace_file = tiny_model(), os.replace

    def slow(source, target):
        replace_file(source, target)
        time.sleep(0.05)

    monkeypatch.setattr(os, "replace", slow)
    with ThreadPoolExecutor(3) as pool:  # processes do the same
        done = [pool.submit(save_model, tiny.model, tiny.tokenizer, tmp_path / "out") for _ in range(6)]
    assert [one.result() for one in done] == [tmp_path / "out"] * 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"]  # fmt: skip


KILLED = """
import os, sys
from longllava.checkpoints import write
from tests.tiny import tiny_model
write.write_tensor = lambda *_: os.kill(os.getpid(), 9)
tiny_model().save_pretrained(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="a folder has no lock here")
def test_what_a_killed_save_left_goes_with_the_next_and_what_another_writes_stays(tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9 and [path.name[:8] for path in tmp_path.iterdir()] == [".saving-"]
    tiny, write_tensor = tiny_model(), write.write_tensor

    def slow(*arguments):
        monkeypatch.undo()
        save_model(tiny.model, tiny.tokenizer, tmp_path)
        write_tensor(*arguments)

    monkeypatch.setattr(write, "write_tensor", slow)
    save_model(tiny.model, tiny.tokenizer, tmp_path)
    assert not list(tmp_path.glob(".*")) and load_model(tmp_path)
