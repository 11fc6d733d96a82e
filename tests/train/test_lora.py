"""LoRA: what learns, what is kept, that a run goes on, and that merged weights answer as the adapters did."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longllava.api import LongLLaVA
from longllava.checkpoints import load_model, save_model
from longllava.checkpoints.adapters import merge, merge_, read_adapter
from longllava.cli.folders import merge as command
from longllava.config import EncoderConfig
from longllava.errors import CheckpointError, ConfigError, TrainingError
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.settings import build
from longllava.train import stage as stage_module
from longllava.train.config import load_stage
from longllava.train.lora import LoraConfig, add_adapters_
from longllava.train.optimizer import select_parts
from longllava.train.parts import read_part
from longllava.train.stage import run_stage
from tests.tiny_world import TOKENIZER, world_config, world_model, world_samples, write_foundation, write_stage
from tests.train.runs import stopped_at

RATE = {"phases": [{"steps": 4, "row_length": 192, "rows": 1, "learning_rate": 2e-2}]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """runs/base/model is the model that adapters are trained on."""
    runs = write_foundation(tmp_path / "runs")
    (runs / "foundation-text").rename(runs / "base")
    (runs / "base/model/training.json").write_text('{"stage": "base"}')
    return runs


def lora_stage(runs: Path, **changes: Any) -> Path:
    keys = {"stage": "own", "start_from": {"all": "base"}, "lora": {"rank": 4, "alpha": 8}, **RATE, **changes}
    return write_stage(runs, **keys)


def trained_model(runs: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[LongLLaVA, Path]:
    """The model with its adapters as training left it, and the folder that was written."""
    kept = {}
    real = stage_module.save_adapter
    monkeypatch.setattr(stage_module, "save_adapter", lambda model, *rest: real(kept.setdefault("model", model), *rest))
    folder = run_stage(load_stage(lora_stage(runs, **changes)))
    model = kept["model"].eval()
    return LongLLaVA(model, Tokenizer.from_folder(TOKENIZER, model.config.prompt)), folder


def answers(talker: LongLLaVA, n: int = 5) -> list[tuple[str, float]]:
    """A few answers, and how likely each of their first words is."""
    found = []
    for sample in world_samples("nano/stage2", n):
        question, images = sample.turns[0].text, list(sample.images)
        likely = talker.score(question, sample.turns[1].text, images=images).log_probabilities[0]
        found.append((talker.generate(question, images=images, max_new_tokens=6), likely))
    return found


@pytest.mark.parametrize("parts", [["backbone"], ["encoder"], ["encoder", "backbone"]])
def test_merged_and_reloaded_it_answers_as_with_its_adapters(runs, monkeypatch, parts: list[str]) -> None:
    before = answers(LongLLaVA.from_pretrained(runs / "base/model", dtype="float32"))
    train_only = [*parts, "bridge"]
    talker, folder = trained_model(runs, monkeypatch, train_only=train_only, lora={"rank": 4, "parts": parts})
    learned = answers(talker)
    assert [likely for _, likely in learned] != pytest.approx([likely for _, likely in before], abs=1e-3)
    command(str(runs / "base/model"), str(folder), str(merged := runs / "merged"), None)
    for where in (merged, folder):  # a whole model; and the adapters' folder itself, merged as it is read
        again = answers(LongLLaVA.from_pretrained(where, dtype="float32"))
        assert [text for text, _ in again] == [text for text, _ in learned]
        assert [likely for _, likely in again] == pytest.approx([likely for _, likely in learned], abs=1e-4)
    assert json.loads((merged / "training.json").read_text())["stage"] == "own"  # a next stage may start from it
    with pytest.raises(TrainingError, match="own/model: holds adapters; make a whole model of them first"):
        read_part(folder, parts[0])
    base, whole = load_model(runs / "base/model").state_dict(), load_model(merged).state_dict()
    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], whole[name])}
    assert changed == set(train_only)


def test_the_folder_is_one_of_peft(runs, monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    talker, folder = trained_model(runs, monkeypatch)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("LORA", 4, ["bridge"])
    names = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    base = load_model(runs / "base/model")
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    sample = world_samples("nano/stage2", 1)[0]
    mine = answers(talker, 1)
    inside = LongLLaVA(base, talker.tokenizer)  # peft changes the model it is given in place
    score = inside.score(sample.turns[0].text, sample.turns[1].text, images=list(sample.images))
    assert score.log_probabilities[0] == pytest.approx(mine[0][1], abs=1e-5)
    assert theirs is not None


def test_only_adapters_and_the_bridge_are_kept_and_changed(runs, monkeypatch) -> None:
    talker, folder = trained_model(runs, monkeypatch, lora={"rank": 4, "targets": ["in_proj", "q_proj"]})
    kept = load_file(folder.parent / "checkpoints/step-00000004/model.safetensors")
    assert {name.split(".")[0] for name in kept} == {"bridge", "backbone"}
    inside = [name for name in kept if name.startswith("backbone")]
    assert all(".lora_" in name and name.split(".lora_")[0].endswith(("in_proj", "q_proj")) for name in inside)
    start = load_file(runs / "base/model/model.safetensors")
    for name, tensor in talker.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if ".lora_" not in name and not name.startswith("bridge"):
            assert torch.equal(tensor, start[plain]), name
    record = json.loads((folder / "training.json").read_text())
    assert record["base"] == str(runs / "base/model") and record["lora"]["rank"] == 4


def test_layers_of_both_parts_may_be_named(runs) -> None:
    lora = {"rank": 4, "parts": ["encoder", "backbone"], "targets": ["in_proj", "qkv"]}  # each is a layer of one part
    folder = run_stage(load_stage(lora_stage(runs, train_only=["encoder", "bridge", "backbone"], lora=lora)))
    modules = {name.split(".lora_")[0] for name in load_file(folder / "adapter_model.safetensors") if ".lora_" in name}
    assert {tuple(name.split(".")[index] for index in (2, -1)) for name in modules} == {
        ("encoder", "qkv"), ("backbone", "in_proj")}  # fmt: skip


def test_a_run_with_adapters_goes_on_bit_for_bit(runs, monkeypatch) -> None:
    lora = {"rank": 4, "dropout": 0.2}
    whole = run_stage(load_stage(lora_stage(runs, stage="whole", lora=lora, save_every=1)))
    path = lora_stage(runs, stage="cut", lora=lora, save_every=1)
    stopped_at(path, 3, monkeypatch)
    cut = run_stage(load_stage(path))
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    for settings, message in (({"rank": 8}, "lora.rank: 4 then, 8 now"),
                              ({"rank": 4, "dropout": 0.2, "targets": ["in_proj"]}, "lora.targets: ")):
        path = lora_stage(runs, stage="cut", lora=settings, save_every=1)
        (cut / "training.json").unlink(missing_ok=True)
        with pytest.raises(TrainingError, match=message):
            run_stage(load_stage(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"parts": ["bridge"]}}, "lora.parts: got 'bridge', allowed: encoder, backbone; the bridge is"),
        ({"lora": {"parts": []}}, "lora.parts: the list is empty"),
        ({"lora": {"parts": ["encoder"]}}, "lora.parts: 'encoder' is not in train_only"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: got 1.0"),
        ({"lora": {"rank": 0}}, "rank: got 0, must be above 0"),
        ({"lora": {"ranks": 2}}, "unknown key 'ranks'; did you mean 'rank'"),
        ({"average_phases": [0]}, "a mean of adapters is not the mean"),
        ({"lora": {"targets": ["q_porj"]}}, "lora.targets: no layer is called 'q_porj'; have down_proj, dt_proj"),
        ({"lora": {"parts": ["encoder", "backbone"], "targets": ["in_proj"]}, "train_only": ["encoder", "backbone"]},
         "lora.targets: none is a layer of the encoder, which would learn whole; name some of down, out, qkv, up, or"),
        ({"start_from": {"backbone": "base"}}, "lora: adapters belong to one model.* got backbone from"),
        ({"frozen_dtype": "int8"}, "frozen_dtype: int8 is for a frozen language model"),
    ],
)
def test_what_cannot_be_trained_so_is_one_sentence(runs, changes: dict, message: str) -> None:
    with pytest.raises((ConfigError, TrainingError), match=message) as raised:
        run_stage(load_stage(lora_stage(runs, **changes)))
    assert "\n" not in str(raised.value) and not (runs / "own").exists()


def test_a_whole_model_does_not_take_the_place_of_adapters(runs, monkeypatch) -> None:
    (runs / "own/model").mkdir(parents=True)
    (runs / "own/model/adapter_config.json").write_text("{}")  # of a run whose record and checkpoints are gone
    monkeypatch.setattr(stage_module, "build_start", lambda *_: pytest.fail("it went to work"))
    with pytest.raises(CheckpointError, match="own/model: it holds an adapter, which would be read instead"):
        run_stage(load_stage(lora_stage(runs, lora=None)))


def test_adapters_that_do_not_fit_change_nothing(runs, monkeypatch, tmp_path: Path) -> None:
    _, folder = trained_model(runs, monkeypatch)
    base = load_model(runs / "base/model")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())

    def spoiled(name: str, tensors: dict | None, **keys: Any) -> Path:
        other = tmp_path / name
        other.mkdir()
        (other / "adapter_config.json").write_text(json.dumps({**config, **keys}))
        if tensors is not None:
            save_file(tensors, other / "adapter_model.safetensors")
        return other

    first = next(iter(name for name in tensors if ".lora_A." in name))
    wide = {**tensors, first: torch.zeros(4, 999)}
    unknown = {name.replace("layers.0.", "layers.9."): tensor for name, tensor in tensors.items()}
    spoilt = {**tensors, first: tensors[first].clone().fill_diagonal_(torch.nan)}
    whole = {**tensors, first: tensors[first].to(torch.int8)}
    half = {name: tensor for name, tensor in tensors.items() if name != first}
    for other, message in (
        (spoiled("wide", wide), "the adapter is of another model: backbone.*; it was trained on"),
        (spoiled("unknown", unknown), "of another model: backbone.layers.9."),
        (spoiled("half", half), "adapters without a fitting other half: base_model.model.backbone"),
        (spoiled("nan", spoilt), f"NaN, infinite or whole numbers in {first}; it is damaged"),
        (spoiled("whole", whole), f"NaN, infinite or whole numbers in {first}; it is damaged"),
        (spoiled("alpha", tensors, lora_alpha=float("nan")), "lora_alpha nan, expected numbers"),
        (spoiled("dora", tensors, use_dora=True), "use_dora is True; merge it with peft itself"),
        (spoiled("ia3", tensors, peft_type="IA3"), "peft_type is 'IA3'; LORA alone is read"),
        (spoiled("empty", None), "adapter_model.safetensors: no such file"),
        (spoiled("rank", tensors, r="four"), "r is 'four'"),
        (tmp_path, "no adapter_config.json in it; give the folder `model`"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_(base, read_adapter(other), other, runs / "base/model")
        with pytest.raises(CheckpointError, match=message):
            merge(runs / "base/model", other, tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HOME", str(runs))
    for target in (folder, runs / "base/model", "~/base/model"):
        with pytest.raises(CheckpointError, match="would be written over what it is made of"):
            merge(runs / "base/model", f"~/{folder.relative_to(runs)}", target)


# --- the base that adapters were trained on


def other_base(runs: Path, part: str) -> Path:
    """A model that differs from the base in one part."""
    model, other = load_model(runs / "base/model"), Model(world_config())
    torch.manual_seed(1)
    other.initialise_(1)
    getattr(model, part).load_state_dict(getattr(other, part).state_dict())
    return save_model(model, Tokenizer.from_folder(TOKENIZER, model.config.prompt), runs / f"other-{part}")


@pytest.mark.parametrize("lora", [{"rank": 4}, {"rank": 4, "parts": ["encoder"]}])
def test_adapters_go_into_the_weights_they_were_trained_on_alone(runs, lora: dict) -> None:
    changes: dict[str, Any] = {"lora": lora}
    if "parts" in lora:  # held in 8 bits while it trained, the language model is the one of floats
        changes |= {"train_only": ["bridge", "encoder"], "frozen_dtype": "int8"}
    folder = run_stage(load_stage(lora_stage(runs, **changes)))
    other = other_base(runs, "backbone")  # an encoder's adapters: what they are put into is the same in both
    with pytest.raises(CheckpointError) as raised:
        command(str(other), str(folder), str(runs / "merged"), None)
    said = f"{folder}: the adapter was trained on other weights than those of {other}, on '{runs / 'base/model'}' as it"
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value) and not (runs / "merged").exists()
    for dtype in (None, "float32", "bfloat16", "float16"):
        command(str(runs / "base/model"), str(folder), str(runs / f"merged-{dtype}"), dtype)
    command(str(other_base(runs, "bridge")), str(folder), str(runs / "merged"), None)  # the adapter brings its own
    # of its own base that was trained anew since
    (runs / "base").rename(runs / "gone")
    other.rename(runs / "base")
    (runs / "base/model").symlink_to(runs / "base")
    with pytest.raises(CheckpointError, match="other weights than those of"):
        load_model(folder)
    (folder / "base.json").write_text("[]")
    with pytest.raises(CheckpointError, match="base.json: cannot be read: .* delete it"):
        load_model(folder)
    (folder / "base.json").unlink()  # as older folders are, and peft's own
    load_model(folder)


# --- a frozen language model in 8 bits


def test_the_bridge_learns_through_a_language_model_in_8_bits(runs) -> None:
    keys = {"stage": "first", "start_from": {"all": "base"}, "train_only": ["bridge"], **RATE}
    floats = run_stage(load_stage(write_stage(runs, **keys, output=str(runs / "floats"))))
    small = run_stage(load_stage(write_stage(runs, **keys, output=str(runs / "small"), frozen_dtype="int8")))
    start, plain, eight = (load_file(one / "model.safetensors") for one in (runs / "base/model", floats, small))
    assert eight.keys() == start.keys()  # a whole model of floats, as it was but for its bridge
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], eight[name])}
    assert changed == {"bridge"}
    steps = [torch.cat([(one[name] - start[name]).flatten() for name in start if name.startswith("bridge")])
             for one in (plain, eight)]  # fmt: skip
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.9
    logs = [[json.loads(line)["loss"] for line in (runs / name / "log.jsonl").read_text().splitlines()]
            for name in ("floats", "small")]  # fmt: skip
    assert logs[0] == pytest.approx(logs[1], rel=0.01) and logs[0] != logs[1]


def test_batch_norm_beside_adapters_stands_still() -> None:
    """Its means are in no adapter: moved, the merged model would be another one."""
    stem = {"image_size": 32, "patch_size": 8, "width": 16, "n_layers": 1, "n_heads": 2, "mlp_width": 32,
            "select_layer": -1, "stem_widths": [8, 16], "stem_strides": [4, 2], "stem_blocks": [1, 1]}  # fmt: skip
    model = Model(dataclasses.replace(world_config(), encoder=build(EncoderConfig, stem, "encoder")))
    lora = LoraConfig(rank=2, parts=["encoder"])
    add_adapters_(model, lora, seed=0)
    names = {name for name, _ in select_parts(model, ["encoder", "bridge"])}
    assert all(".lora_" in name for name in names if name.startswith("encoder")) and any("bridge" in n for n in names)
    assert model.encoder is not None and model.encoder.training
    before = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    model.encoder(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.encoder.named_buffers())


@pytest.mark.parametrize("raised", ["ImportError", "RuntimeError"])  # transformers makes the second of the first
def test_why_peft_cannot_be_imported_is_told(tmp_path, monkeypatch, raised: str) -> None:
    (tmp_path / "peft.py").write_text(f"raise {raised}('no BloomPreTrainedModel')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with pytest.raises(TrainingError, match="lora needs peft .no BloomPreTrainedModel.; pip install"):
        add_adapters_(world_model()[0], LoraConfig(), seed=0)
