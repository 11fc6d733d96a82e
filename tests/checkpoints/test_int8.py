"""Int8 model folders: written and read bit for bit, of any layout; what is damaged or done twice is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from longllava import LongLLaVA
from longllava.checkpoints import load_model, quantize_folder, save_model
from longllava.checkpoints.convert import convert_layout
from longllava.checkpoints.downcycle import downcycle
from longllava.cli import app
from longllava.config import Int8Config
from longllava.errors import CheckpointError, ConfigError, InputError
from longllava.generation.saving import fingerprint
from longllava.nn import Context
from longllava.quant import quantize_
from tests.checkpoints import published
from tests.checkpoints.test_memory import MEASURE, model_of
from tests.tiny import tiny_model, tiny_pictures, tiny_tokenizer

FULL = Int8Config(parts=("backbone", "bridge", "encoder"), lm_head=True)


def same(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


def written(folder: Path, layout: str) -> Path:
    """A folder of floats."""
    if layout == "jamba":
        published.jamba(folder)
    elif layout == "llava":
        published.llava(folder)
    elif layout == "longllava":
        published.longllava(folder, dtype=torch.bfloat16)
    else:
        tiny = tiny_model(3)
        save_model(tiny.model, tiny.tokenizer, folder)
    return folder


@pytest.mark.parametrize("layout", ["native", "jamba", "llava", "longllava"])
def test_quantised_while_read_is_quantised_in_place(tmp_path, layout):
    folder = written(tmp_path / "floats", layout)
    config = Int8Config(keep=("k_proj",)) if layout == "jamba" else FULL
    reading, built = load_model(folder, int8=config), quantize_(load_model(folder), config)
    assert same(reading, built) and reading.config == built.config and str(reading) == str(built)
    quantize_folder(folder, tmp_path / "int8", config)
    again = load_model(tmp_path / "int8")
    assert same(again, reading) and again.config == reading.config
    assert same(load_model(tmp_path / "int8", int8=Int8Config()), reading)  # asked for what it is
    half = load_model(tmp_path / "int8", dtype=torch.bfloat16)
    assert same(half, load_model(folder, int8=config, dtype=torch.bfloat16))


def test_a_quantised_model_saved_in_shards_is_read_back(tmp_path):
    tiny = tiny_model(3)
    quantize_(tiny.model)
    save_model(tiny.model, tiny.tokenizer, tmp_path, shard_bytes=20_000)
    listed = json.loads((tmp_path / "int8.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert {name: row["bytes"] for name, row in listed["files"].items()} == {f.name: f.stat().st_size for f in files}
    loaded = LongLLaVA.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert same(loaded.model, tiny.model)
    pictures = tiny_pictures(2)
    assert loaded.generate("what is this", pictures, max_new_tokens=5) == tiny.generate(
        "what is this", pictures, max_new_tokens=5
    )
    convert_layout(tmp_path, tmp_path / "again")
    assert same(load_model(tmp_path / "again"), tiny.model)
    assert "bytes_before" not in json.loads((tmp_path / "again/int8.json").read_text())  # of floats: not known here


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (Int8Config(), Int8Config()),
        (Int8Config(parts=("backbone", "encoder", "bridge")), Int8Config()),
        (Int8Config(parts=("encoder",)), None),
        (
            Int8Config(parts=("encoder", "backbone"), keep=("qkv", "*.0.mixer.*"), rotated=("bridge.up", "down_proj")),
            Int8Config(keep=("*.0.mixer.*",), rotated=("down_proj",)),
        ),
    ],
)
def test_the_language_model_of_an_int8_folder(floats, tmp_path, config, left):
    whole = load_model(quantize_folder(floats, tmp_path / "int8", config))
    text = load_model(convert_layout(tmp_path / "int8", tmp_path / "text", text_only=True))
    assert text.config.int8 == (left and left.chosen()) and text.config.encoder is None
    assert same(text.backbone, whole.backbone)


def test_nano_whose_encoder_lies_elsewhere(tmp_path):
    done = CliRunner().invoke(app, ["quantize", "nano", str(tmp_path), "--keep", "o_proj", "--lm-head"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == str(tmp_path) and "11.2 MB -> " in done.output
    config = Int8Config(keep=("o_proj",), lm_head=True)
    model = LongLLaVA.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert model.model.config.int8 == config.chosen()
    assert same(model.model, LongLLaVA.from_pretrained("nano", device="cpu", dtype="float32", int8=config).model)


def test_a_model_all_of_whose_layers_are_kept_is_read_back(tmp_path):
    tiny = tiny_model(3)
    quantize_(tiny.model, keep=("*",))
    tiny.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert same(again, tiny.model) and fingerprint(again) == fingerprint(tiny.model)


def edited(folder: Path, edit, name: str = "model.safetensors") -> Path:
    (folder / "int8.json").unlink()
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    return folder


def configured(folder: Path, **values) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.fixture
def floats(tmp_path):
    return written(tmp_path / "floats", "native")


@pytest.fixture
def int8(floats, tmp_path):
    return quantize_folder(floats, tmp_path / "int8")


WEIGHT, SCALE = (f"backbone.layers.0.mixer.in_proj.{name}" for name in ("weight_NK", "scale_N"))


def test_how_the_scans_rows_become_int8_is_chosen_when_a_folder_is_loaded(floats, tmp_path):
    folder = quantize_folder(floats, tmp_path / "int8", Int8Config(scan_epilogue=True))
    assert load_model(folder).config.int8 == Int8Config().chosen()
    wanted = Int8Config(scan_epilogue=True)
    assert load_model(folder, int8=wanted).config.int8 == wanted.chosen()


def test_a_folder_of_before_there_was_a_rotation_is_read_as_it_was_written(floats, tmp_path):
    folder = quantize_folder(floats, tmp_path / "int8", Int8Config(rotated=(), lm_head=True))
    before = load_model(folder)
    words = json.loads((folder / "config.json").read_text())["int8"]
    assert words.pop("rotated") == []
    after = load_model(configured(folder, int8=words), int8=Int8Config(lm_head=True))
    assert before.config.int8.rotated == () and load_model(folder, int8=Int8Config()).config == after.config
    assert fingerprint(before) == fingerprint(after)  # sessions of either are read by the other
    ids_BL = torch.arange(3, 23)[None]
    with torch.inference_mode():
        hidden = [model(model.embed(ids_BL), Context())[0] for model in (before, after)]
    assert torch.equal(*hidden)
    with pytest.raises(ConfigError, match="unknown key 'rotate'; did you mean 'rotated'"):
        load_model(configured(folder, int8={**words, "rotate": []}))
    with pytest.raises(CheckpointError, match="quantised as .*without other settings"):
        load_model(configured(folder, int8=words), int8=Int8Config(lm_head=True, rotated=("down_proj",)))


def test_what_is_int8_already_is_not_quantised_again(int8, floats, tmp_path):
    with pytest.raises(CheckpointError, match="its weights are int8 already; quantise the floats they came from"):
        quantize_folder(int8, tmp_path / "twice")
    with pytest.raises(CheckpointError, match="its weights are int8 already, quantised as .*without other settings"):
        load_model(int8, int8=Int8Config(lm_head=True))
    with pytest.raises(CheckpointError, match="source and target are one folder"):
        quantize_folder(floats, floats)
    with pytest.raises(CheckpointError, match="keep and parts leave no layer to become int8; keep fewer"):
        quantize_folder(floats, tmp_path / "kept", Int8Config(keep=("*",)))
    with pytest.raises(CheckpointError, match="its experts are int8; take the floats they came from"):
        downcycle(int8, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="scheme longllava: int8 weights have no names in it"):
        convert_layout(int8, tmp_path / "theirs", "longllava")
    with pytest.raises(CheckpointError, match="int8 weights have no fresh values"):
        load_model(int8, allow_missing=("bridge.",))
    assert not [path for path in tmp_path.iterdir() if path.name not in ("floats", "int8")]


def test_a_config_that_does_not_fit_its_weights(int8, floats):
    with pytest.raises(CheckpointError, match="its weights are int8, but config.json does not say how"):
        load_model(configured(int8, int8=None))
    settings = {"parts": ["backbone"], "lm_head": False}
    with pytest.raises(CheckpointError, match="config.json says int8, but no weight is stored so"):
        load_model(configured(floats, int8=settings))
    with pytest.raises(ConfigError, match=r"config.json: int8: unknown key 'dynamic_form'; did you mean"):
        load_model(configured(floats, int8={**settings, "dynamic_form": 1}))
    with pytest.raises(CheckpointError, match="1 missing: backbone.lm_head.scale_N|2 missing: backbone.lm_head"):
        load_model(configured(int8, int8={**settings, "lm_head": True}))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(SCALE), f"1 missing: {SCALE}"),
        (lambda tensors: tensors.update({SCALE: tensors[SCALE][:-1].clone()}), f"1 of wrong shape: {SCALE}"),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.contiguous()}), f"1 of wrong shape: {WEIGHT}"),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].float()}), f"1 not of whole numbers: {WEIGHT}"),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].int()}), f"{WEIGHT} is torch.int32, expected"),
        (lambda tensors: tensors.update({SCALE: tensors[SCALE].int()}), f"1 of whole numbers: {SCALE}"),
        (lambda tensors: tensors[SCALE].fill_(0), f"scales of int8 weights that are not above 0 in {SCALE}"),
        (lambda tensors: tensors[SCALE][3:4].fill_(torch.nan), f"NaN or infinite weights in {SCALE}"),
    ],
)  # fmt: skip
def test_damaged_folders_are_one_sentence(int8, edit, words):
    with pytest.raises(CheckpointError, match=words):
        load_model(edited(int8, edit))


def test_one_changed_byte_is_seen(int8):
    path = int8 / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="model.safetensors is not what int8.json lists"):
        convert_layout(int8, int8.parent / "copy")  # whose own list would be of the damaged weights
    with pytest.raises(CheckpointError, match="model.safetensors is not what int8.json lists; copy the folder again"):
        load_model(int8)
    listed = json.loads((int8 / "int8.json").read_text())
    listed["files"]["model-00002-of-00002.safetensors"] = {"bytes": 1, "sha256": ""}
    (int8 / "int8.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is not what int8.json lists"):
        load_model(int8)
    (int8 / "int8.json").write_text("{}")
    with pytest.raises(CheckpointError, match="int8.json: damaged"):
        load_model(int8)


def test_floats_that_are_not_finite_are_named(floats):
    name = "backbone.layers.1.ffn.experts.2.up_proj.weight"
    tensors = load_file(floats / "model.safetensors")
    tensors[name][3, 3] = torch.inf
    save_file(tensors, floats / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {name}; the checkpoint is damaged"):
        load_model(floats, int8=Int8Config())


def test_what_int8_can_be_given(floats, int8):
    with pytest.raises(InputError, match="int8: got 'yes', expected True, False or an Int8Config"):
        LongLLaVA.from_pretrained(floats, int8="yes")
    for folder, asked in ((floats, Int8Config()), (int8, None)):
        with pytest.raises(InputError, match="dtype: float16 ends at 65504"):
            load_model(folder, int8=asked, dtype=torch.float16)


def test_a_folder_in_float16_is_read_in_a_dtype_that_holds_the_sums(tmp_path):
    tiny = tiny_model(3)
    folder = save_model(tiny.model, tiny.tokenizer, tmp_path / "floats", dtype=torch.float16)
    int8 = quantize_folder(folder, tmp_path / "int8", FULL)
    assert load_file(int8 / "model.safetensors")["backbone.embed_tokens.weight"].dtype == torch.float16
    for stored, asked in ((folder, FULL), (int8, None)):
        with pytest.raises(InputError, match="is stored in float16, which ends at 65504, .* take bfloat16 or float32"):
            load_model(stored, int8=asked)
    wide = load_model(int8, dtype=torch.float32)
    assert same(wide, load_model(folder, int8=FULL, dtype=torch.float32))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("scheme", ["llava", "native"])
def test_peak_memory_of_quantising_is_the_int8_model_and_two_of_its_largest_tensors(tmp_path, scheme):
    """The floats are 150 MB: a model of them, or one tensor of them in fp32 beside the rest, would be seen."""
    for name, size in (("small", (32, 64)), ("large", (512, 24_000))):
        save_model(model_of(*size), tiny_tokenizer(), tmp_path / name, scheme=scheme, dtype=torch.bfloat16)
    measure = MEASURE.replace("dtype=getattr(torch, dtype))", "int8=Int8Config())")
    measure = "from longllava.config import Int8Config\n" + measure
    command = [sys.executable, "-c", measure, str(tmp_path / "small"), str(tmp_path / "large"), "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 60e6 < found["model"] < 120e6 and found["largest"] > 20e6
    # the heap's own slack, modules, and 20 MB that one block of rows takes while it is quantised
    assert found["peak"] <= found["model"] + 2 * found["largest"] + 28e6, found
