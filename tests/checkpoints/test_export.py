"""Exported folders, loaded by stock transformers in a process that has none of our code, answer as the library does."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from longllava.api import LongLLaVA
from longllava.checkpoints import load_model
from longllava.checkpoints.export import export
from longllava.cli import app
from longllava.config import PUBLISHED_PROMPT, BackboneConfig, BridgeConfig, EncoderConfig
from longllava.errors import CheckpointError, ConfigError
from longllava.model import Model
from longllava.nn import Context
from tests.tiny import SPECIALS, tiny_config, tiny_model, tiny_pictures, tiny_tokenizer, vocabulary

STOCK = """
import json, sys
import torch
from PIL import Image
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
transformers.utils.logging.set_verbosity_error()
found = {}
for name, (folder, talk, pictures) in json.loads(sys.argv[1]).items():
    kinds = (AutoModelForImageTextToText, AutoProcessor) if pictures else (AutoModelForCausalLM, AutoTokenizer)
    model, processor = (kind.from_pretrained(folder) for kind in kinds)
    for part in talk[0]["content"]:
        if part["type"] == "image":
            part["image"] = Image.open(pictures.pop(0))
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(talk, **how)
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    answer = tokenizer.decode(ids[0, logits.shape[1]:], skip_special_tokens=True)
    pair = [talk, [{"role": "user", "content": talk[0]["content"][:2]}]]
    rows = [processor.apply_chat_template(one, **how) for one in pair]
    padded = processor.apply_chat_template(pair, padding=True, **how)
    with torch.no_grad():
        alone, together = torch.cat([model(**row).logits[:, -1] for row in rows]), model(**padded).logits[:, -1]
    found[name] = {**inputs, "logits": logits, "answer": answer, "class": type(model).__name__,
                   "padding": (alone - together).abs().max().item()}
assert not [name for name in sys.modules if name.startswith("longllava")], "stock was promised"
torch.save(found, sys.argv[2])
"""
UNPOOLED = {"bridge": BridgeConfig(pool="none", tokens_per_image=16, hidden=32)}
TALK = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}]}]
SHOWN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is this a"}, {"type": "image"},
                                      {"type": "text", "text": "\\nheart?"}]}]  # fmt: skip


def plain(n_experts=1, prompt=None, backbone=None, **changes):
    """A tiny random model without what Jamba lacks. backbone: other values of its settings."""
    usual = {**vars(tiny_config(n_experts).backbone), "qk_norm": False, "log_length_scale": False}
    config = tiny_config(n_experts, backbone=BackboneConfig(**{**usual, **(backbone or {})}), **changes)
    model = Model(replace(config, prompt=prompt or config.prompt))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    model.initialise_()
    words_VD = (model.backbone.lm_head or model.backbone.embed_tokens).weight
    with torch.no_grad():  # answers in words and letters, as tiny_model's
        words_VD[len(SPECIALS) : len(SPECIALS) + 256] = 0
        spare_ID = words_VD[len(vocabulary()) :]  # rows that no token has would often be the likeliest
        spare_ID.copy_(4 * words_VD[len(vocabulary()) - 1 - len(spare_ID) : len(vocabulary()) - 1])
    return LongLLaVA(model, tiny_tokenizer(prompt))


def logits_of(library, talk, pictures, n_tokens=None):
    images = iter(pictures)
    filled = [{**turn, "content": [{"type": "image", "image": next(images)} if part["type"] == "image" else part
                                   for part in turn["content"]]} for turn in talk]  # fmt: skip
    pieces, sources = library.pieces(filled, None, None, library.fresh())
    encoded = library.processor.encode_pieces(pieces, n_tokens)
    tokens = None
    if sources:
        tokens = library.model.image_tokens(library.model.encode(library.processor.pixels(sources)), n_tokens)
    spans = torch.tensor([(0, span.start, span.length, span.image) for span in encoded.spans]).reshape(-1, 4)
    with torch.no_grad():
        x_1LD = library.model.embed(torch.tensor([encoded.ids]), spans, tokens)
        hidden, _ = library.model(x_1LD, Context())
        return encoded.ids, library.model.logits(hidden), filled


VOCABULARY = tiny_config().backbone.vocab_size + 3  # rows that no token has
LIBRARIES = {
    "llava": lambda: plain(3, None, {"vocab_size": VOCABULARY}, **UNPOOLED),
    "tied": lambda: plain(1, PUBLISHED_PROMPT, {"vocab_size": VOCABULARY, "tie_embeddings": True}, **UNPOOLED),
    "jamba": lambda: plain(3),
}


@pytest.fixture(scope="module")
def libraries():
    return {name: make() for name, make in LIBRARIES.items()}


@pytest.fixture(scope="module")
def found(libraries, tmp_path_factory):
    """What stock transformers makes of each folder: one process for all."""
    place = tmp_path_factory.mktemp("stock")
    shapes = {"square": (16, 16), "wide": (64, 20), "tall": (20, 48)}
    for name, size in shapes.items():
        tiny_pictures(1)[0].resize(size).save(place / f"{name}.png")
    jobs = {}
    for name, library in libraries.items():
        source = library.save_pretrained(place / f"{name}-ours")
        folder = export(source, place / name, "jamba" if name == "jamba" else "hf-llava")
        pictures = [] if name == "jamba" else ["square.png", "square.png"]
        jobs[name] = [str(folder), TALK if name == "jamba" else SHOWN, [str(place / picture) for picture in pictures]]
    jobs["shapes"] = [jobs["llava"][0], SHOWN, [str(place / "wide.png"), str(place / "tall.png")]]
    command = [sys.executable, "-c", STOCK, json.dumps(jobs), str(place / "found.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "tied/config.json").read_text())["tie_word_embeddings"]
    return torch.load(place / "found.pt", weights_only=False)


@pytest.mark.parametrize("name", LIBRARIES)
def test_stock_transformers_answers_the_same(libraries, found, name):
    """Ids from its own processor and our template, pixels as it makes them, logits, greedy tokens."""
    library, theirs = libraries[name], found[name]
    talk, pictures = (TALK, []) if name == "jamba" else (SHOWN, tiny_pictures(1) * 2)
    ids, logits, filled = logits_of(library, talk, pictures)
    assert theirs["class"] == ("JambaForCausalLM" if name == "jamba" else "LlavaForConditionalGeneration")
    assert theirs["input_ids"].tolist() == [ids]
    torch.testing.assert_close(theirs["logits"], logits, rtol=0, atol=1e-4)
    assert theirs["padding"] < 1e-4  # a padded row is what it is alone: padding is no picture
    assert theirs["answer"] == library.generate(filled, max_new_tokens=12) != ""


def test_pictures_of_other_shapes_are_padded_as_here(libraries, found):
    processor, encoder = libraries["llava"].processor, libraries["llava"].model.config.encoder
    pictures = [tiny_pictures(1)[0].resize(size) for size in ((64, 20), (20, 48))]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    expected = (processor.pixels(pictures) / 255 - mean) / std
    assert (found["shapes"]["pixel_values"] - expected).abs().max() < 3 / 255 / std.min()  # its rounding, and ours


def test_a_model_that_pools_is_refused_unless_unpooled(tmp_path):
    from transformers import LlavaForConditionalGeneration

    library = plain()
    library.save_pretrained(tmp_path / "ours")
    words = (
        "bridge.pool: 2d, to tokens_per_image: 4 of 16: stock Llava does not pool; --allow-unpooled writes it with all"
    )
    with pytest.raises(ConfigError, match=words):
        export(tmp_path / "ours", tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
    folder = export(tmp_path / "ours", tmp_path / "stock", allow_unpooled=True)
    ids, logits, _ = logits_of(library, SHOWN, tiny_pictures(2), 16)
    pixels = library.processor.pixels(tiny_pictures(2))
    encoder = library.model.encoder
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": (pixels - encoder.mean) / encoder.std}
    with torch.no_grad():
        found = LlavaForConditionalGeneration.from_pretrained(folder)(**inputs).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_all_that_cannot_be_expressed_is_named_at_once(tmp_path):
    faults = ("backbone.qk_norm", "backbone.log_length_scale", "bridge.hidden: 1024; there it is .* 192",
              "bridge.output_rms: 0.1", "encoder.stem_widths", "bridge.pool: 2d, to .* 36 of 144")  # fmt: skip
    result = CliRunner().invoke(app, ["export", "nano", str(tmp_path / "a")])
    assert isinstance(result.exception, ConfigError)
    assert_named(str(result.exception), faults)
    assert "\n" not in str(result.exception)
    with pytest.raises(ConfigError) as caught:
        export("nano", tmp_path / "a", "jamba")
    assert_named(str(caught.value), faults[:2])
    tiny = tiny_model(encoder=EncoderConfig(
        image_size=16, patch_size=4, width=16, n_layers=1, n_heads=2, mlp_width=32, select_layer=-1, pre_norm=False,
        patch_bias=True), **UNPOOLED)  # fmt: skip
    with pytest.raises(ConfigError, match="encoder.pre_norm: .*encoder.patch_bias"):
        export(tiny.save_pretrained(tmp_path / "tiny"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def assert_named(text, faults):
    for fault in faults:
        assert re.search(fault, text), (fault, text)


def test_the_command(tmp_path):
    folder = plain().save_pretrained(tmp_path / "ours")
    run = CliRunner().invoke
    done = run(app, ["export", str(folder), str(tmp_path / "a"), "--allow-unpooled", "--dtype", "bfloat16"])
    assert (done.exit_code, done.output.split()) == (0, [str(tmp_path / "a")])
    assert load_model(tmp_path / "a").config.bridge.tokens_per_image == 16
    assert run(app, ["export", str(folder), str(tmp_path / "b"), "--format", "jamba"]).exit_code == 0
    assert load_model(tmp_path / "b").config.encoder is None
    for arguments, words in (
        ([str(folder), str(folder), "--allow-unpooled"], "source and target are one folder"),
        ([str(folder), str(tmp_path / "c"), "--format", "gguf"], "format: got 'gguf', allowed: hf-llava, jamba"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(app, ["export", *arguments], catch_exceptions=False)
