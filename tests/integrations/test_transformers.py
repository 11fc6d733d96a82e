"""Our folders through transformers' own doors: Auto classes, configs, dtypes, saving; and what is no folder of ours."""

import io
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import longllava.integrations.transformers as ours
from longllava.api import LongLLaVA
from longllava.checkpoints import load_model
from longllava.errors import CheckpointError, ConfigError, InputError
from longllava.integrations.transformers.configuration import PublishedConfig
from longllava.model import Model
from tests.checkpoints import published
from tests.integrations.talks import N_NEW, PICTURES, TALKS, answers, prepared
from tests.tiny import tiny_config, tiny_tokenizer


def test_auto_classes_know_a_folder(folder, model, processor):
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [type(x) for x in (config, model, processor, tokenizer)] == [
        ours.LongLLaVAConfig, ours.LongLLaVAForConditionalGeneration, ours.LongLLaVAProcessor, ours.LongLLaVATokenizer,
    ]  # fmt: skip
    assert config.model_config() == tiny_config(3)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.image_token_id) == (0, 1, 2, 0)
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == (tiny_tokenizer().vocab_size, 32, 5, 4)
    assert not config.tie_word_embeddings
    tied = {**asdict(tiny_config(3)), "backbone": {**config.backbone, "tie_embeddings": True}}
    assert ours.LongLLaVAConfig(**tied).tie_word_embeddings
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32} and not model.training
    assert tokenizer.padding_side == "left" and tokenizer.eos_token == "<|endoftext|>"
    assert model.state_dict().keys() == load_model(folder).state_dict().keys()


def test_a_folder_is_the_same_whoever_wrote_it(folder, tmp_path, model, processor, library):
    model.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs/config.json").read_text() == (folder / "config.json").read_text()
    expected = library.generate(TALKS[2], max_new_tokens=N_NEW)
    back = LongLLaVA.from_pretrained(tmp_path / "theirs", device="cpu", dtype="float32")
    assert back.generate(TALKS[2], max_new_tokens=N_NEW) == expected
    back.save_pretrained(tmp_path / "ours")
    for place in ("theirs", "ours"):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / place)
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
        its_processor = AutoProcessor.from_pretrained(tmp_path / place)
        assert type(its_processor) is ours.LongLLaVAProcessor
        assert type(AutoTokenizer.from_pretrained(tmp_path / place)) is ours.LongLLaVATokenizer
        assert answers(again, its_processor, prepared(its_processor, TALKS[2])) == [expected]


def test_one_file_saved_over_shards_and_shards_over_it_can_be_read(folder, tmp_path):
    """transformers removes old shards, but neither their index nor the one file."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for largest in ("50KB", "5GB", "50KB"):
        with torch.no_grad():
            model.backbone.final_norm.weight.add_(1)
        model.save_pretrained(tmp_path, max_shard_size=largest)
        assert torch.equal(load_model(tmp_path).backbone.final_norm.weight, model.backbone.final_norm.weight)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()


def test_dtypes_and_devices(folder, tmp_path):
    exact = ("A_log_EN", "D_E", "dt_bias_E", "log_length_H")
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    for key, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.float32 if key.endswith(exact) else torch.bfloat16), key
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    weights = load_file(mixed / "model.safetensors")
    few = {key: weights[key].half() for key in weights if key.startswith("bridge.") or "layers.1.mixer.q" in key}
    save_file(weights | few, mixed / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(mixed)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    for arguments, words in (
        ({"device_map": {"encoder": "cpu", "backbone": "meta"}}, "device_map: got 2 places"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: attention chooses its backend"),
        ({"quantization_config": {"load_in_8bit": True}}, "from_pretrained: quantization_config cannot be used"),
    ):
        with pytest.raises(InputError, match=words):
            ours.LongLLaVAForConditionalGeneration.from_pretrained(folder, **arguments)


def test_a_name_of_the_hub_is_downloaded_as_the_caller_says(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)) or folder)
    how = {"revision": "v2", "token": "secret", "cache_dir": "there", "local_files_only": True}
    for made in (ours.LongLLaVAForConditionalGeneration, ours.LongLLaVAProcessor, ours.LongLLaVATokenizer):
        made.from_pretrained("owner/model", **how)
    assert [name for name, _ in asked] == 3 * ["owner/model"]
    assert all(found.items() >= how.items() for _, found in asked)


def test_the_published_layout(tmp_path):
    published.longllava(tmp_path, 4)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ours.LongLLaVAConfig and config.prompt["between_turns"] == "\n"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    expected = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    direct = ours.LongLLaVAForConditionalGeneration.from_pretrained(tmp_path)
    assert direct.config.model_config() == config.model_config()
    model.save_pretrained(tmp_path / "native")
    assert load_model(tmp_path / "native").config == config.model_config()


def test_the_config_of_a_name_of_the_hub_is_the_one_that_was_asked_for(monkeypatch):
    """transformers reads config.json of the caller's revision; another one may lie at the name itself."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: pytest.fail("downloaded"))
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "resamplePooling": "1d"}
    values = {"model_type": "llava_jamba", **published.JAMBA, "num_experts": 4, **tower}
    config = PublishedConfig.from_dict(values, name_or_path="owner/model")
    assert type(config) is ours.LongLLaVAConfig and config.bridge["pool"] == "1d" and config.backbone["n_experts"] == 4
    assert config.name == "model" and PublishedConfig.from_dict(values).bridge == config.bridge


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_a_folder_of_peft_alone_is_its_base_with_the_adapter(folder, tmp_path, model):
    """peft's folder names its base, which the Auto classes and pipelines then ask for; a folder of both is merged."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    ids = torch.arange(4, 20)[None]
    before = model(ids).logits.detach()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    expected = adapted(ids).logits.detach()
    assert not torch.allclose(expected, before, atol=0.1)
    torch.testing.assert_close(AutoModelForImageTextToText.from_pretrained(tmp_path)(ids).logits, expected)
    pipe = pipeline("image-text-to-text", model=str(tmp_path), processor=AutoProcessor.from_pretrained(folder))
    torch.testing.assert_close(pipe.model(ids).logits, expected)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)  # as Trainer does: config.json is then there too
    both = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(both(ids).logits, expected, rtol=0, atol=1e-4)


def test_other_folders_stay_transformers_own(tmp_path):
    published.jamba(tmp_path, 1)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "JambaForCausalLM"


def test_no_code_of_a_folder_is_run(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "theirs.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass A: pass\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.A", "AutoModelForImageTextToText": "theirs.A"}
    (copy / "config.json").write_text(json.dumps(config))
    for trust in (False, True):
        with pytest.raises(ConfigError, match="unknown key 'auto_map'"):
            AutoModelForImageTextToText.from_pretrained(copy, trust_remote_code=trust)
    assert not (tmp_path / "marker").exists()


def test_a_model_from_its_config(folder):
    config = AutoConfig.from_pretrained(folder)
    models = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        models.append(AutoModelForImageTextToText.from_config(config).state_dict())
    key = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(models[0][key], models[2][key]) and not torch.equal(models[0][key], models[1][key])
    assert models[0].keys() == Model(tiny_config(3)).state_dict().keys()


def test_generation_settings_of_the_folder(folder, tmp_path, library):
    """The folder's own, with its eos; ids that no tokenizer knows are never said."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true, "eos_token_id": 7}')
    settings = AutoModelForImageTextToText.from_pretrained(copy).generation_config
    assert (settings.temperature, settings.do_sample, settings.eos_token_id, settings.pad_token_id) == (0.3, True, 2, 2)
    more = tiny_config(backbone=type(library.model.config.backbone)(**{
        **asdict(library.model.config.backbone), "vocab_size": library.tokenizer.vocab_size + 2}))  # fmt: skip
    spare = LongLLaVA(Model(more), library.tokenizer)
    spare.model.initialise_()
    spare.save_pretrained(tmp_path / "spare")
    settings = AutoModelForImageTextToText.from_pretrained(tmp_path / "spare").generation_config
    assert settings.suppress_tokens == [library.tokenizer.vocab_size, library.tokenizer.vocab_size + 1]


def test_a_damaged_folder_is_told(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        AutoModelForImageTextToText.from_pretrained(copy)
    buffer = io.BytesIO()
    PICTURES[0].save(buffer, "PNG")
    (copy / "tokenizer.json").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="tokenizer.json: cannot be read"):
        AutoProcessor.from_pretrained(copy)
