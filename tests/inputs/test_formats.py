"""LongLLaVA's strings, written out by hand from its code, and the clean form; as text, as ids and as labels."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from longllava.config import PUBLISHED_PROMPT, BridgeConfig, ModelConfig, PromptConfig
from longllava.data.packing import build_batch, encode_sample
from longllava.data.samples import Sample, Turn
from longllava.inputs.chat import Message, string_pieces
from longllava.inputs.processor import Processor
from longllava.inputs.tiles import Split, expand
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import load
from longllava.shipped import shipped
from tests.tiny import tiny_config

SPECIALS = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>")
MERGED = ("▁what", "▁is", "▁this", "im", "img", "User", "Assistant", "<|", "|>", "</", "▁<", "▁</")
USER, ASSISTANT = "<|startoftext|><|User|>\n", "<|startoftext|><|Assistant|>\n"


def published_tokenizer(prompt: PromptConfig) -> Tokenizer:
    """As LongLLaVA's: sub-words with byte fallback, "▁" before every text; its tags are plain text."""
    letters = dict.fromkeys("▁abcdefghijklmnopqrstuvwxyzUA<>|/?")
    names = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in MERGED:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                names.append("".join(pair))
    ids = {name: number for number, name in enumerate(names)}
    backend = Backend(models.BPE(ids, merges, unk_token="<|unk|>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPECIALS))
    return Tokenizer(backend.to_str(), prompt)


CLEAN, PUBLISHED = (
    Processor(tiny_config(prompt=p), published_tokenizer(p)) for p in (PromptConfig(), PUBLISHED_PROMPT)
)


def reference_ids(processor: Processor, text: str) -> list[int]:
    """LongLLaVA's tokenizer_image_token: each text between two <image> by itself, specials read as such."""
    backend = Backend.from_str(processor.tokenizer.backend.to_str())
    backend.encode_special_tokens = False
    ids: list[int] = []
    for number, chunk in enumerate(text.split("<image>")):
        ids += [0] * 4 if number else []
        ids += backend.encode(chunk, add_special_tokens=False).ids
    return ids


def asked(processor: Processor, prompt: str, n_images: int = 0, n_frames: int = 0, split: Split | None = None):
    """Ids of one question, as generate makes them."""
    pieces = string_pieces(prompt, n_images, n_frames, processor.prompt)
    pieces, _ = expand(pieces, [split] * n_images if split else [None] * (n_images + n_frames), processor.prompt)
    return processor.encode_messages([Message("user", tuple(pieces))], add_generation_prompt=True)


PICTURE = "<img><image></img>"
ROWS = f"{PICTURE}{PICTURE}{PICTURE}\n{PICTURE}{PICTURE}{PICTURE}"
CASES = {  # prompt, images, frames, tiles: the clean string, the published one
    "text": (("what is this?", 0, 0, None), "what is this?", None),
    "single": (("<image>\nwhat is this?", 1, 0, None), f"{PICTURE}\nwhat is this?", None),
    "several": (("<image><image>is <image> a?", 3, 0, None), f"{PICTURE}{PICTURE}is {PICTURE} a?", None),
    "no mark": (("what is this?", 2, 0, None), f"{PICTURE}{PICTURE}\nwhat is this?", None),
    "video": (
        ("what is this?", 0, 3, None),
        f"<vid>{PICTURE}<t>{PICTURE}<t>{PICTURE}</vid>what is this?",
        f"<vid>{PICTURE}<t>{PICTURE}<t><img><image></img</vid>what is this?",
    ),
    "tiles": (
        ("<image>what is this?", 1, 0, Split("a", 2, 3, 16)),
        f"{PICTURE}\n{ROWS}what is this?",
        f"<img><image>\n{ROWS}</img>what is this?",
    ),
    "two pictures in tiles": (  # the original put the second one's tiles into the first
        ("<image><image>is", 2, 0, Split("a", 1, 2, 16)),
        f"{PICTURE}\n{PICTURE}{PICTURE}" * 2 + "is",
        f"<img><image>\n{PICTURE}{PICTURE}</img>" * 2 + "is",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_question(name):
    arguments, clean, published = CASES[name]
    for processor, text in ((CLEAN, clean), (PUBLISHED, published or clean)):
        encoded = asked(processor, *arguments)
        assert encoded.ids == reference_ids(processor, f"{USER}{text}\n{ASSISTANT}")
        assert len(encoded.spans) == text.count("<image>")
        assert not any(encoded.trainable)


TURNS = [
    Turn("user", "<image>\nwhat is this?"), Turn("assistant", "a red heart"),
    Turn("user", "is <image> this a?"), Turn("assistant", "what"),
]  # fmt: skip
FIRST = f"{USER}{PICTURE}\nwhat is this?\n{ASSISTANT}a red heart"
SECOND = f"{USER}is {PICTURE} this a?\n{ASSISTANT}what<|endoftext|>"


@pytest.mark.parametrize(
    ("processor", "between"), [(CLEAN, "<|endoftext|>"), (PUBLISHED, "\n")], ids=["clean", "published"]
)
def test_several_turns_and_what_is_learned(processor, between):
    """The original reads "\\n" between turns and learns <|endoftext|> there; both forms learn the same ids."""
    item = encode_sample(Sample("a", TURNS, ("x", "y")), processor, None)
    assert item.ids == reference_ids(processor, FIRST + between + SECOND)
    labels = build_batch([[item]], len(item), 0).labels_BL[0]
    eos = processor.tokenizer.eos_id
    learned = [*processor.tokenizer.encode(f"{'<|Assistant|>'}\na red heart"), eos,
               *processor.tokenizer.encode("<|Assistant|>\nwhat"), eos]  # fmt: skip
    header = len(processor.tokenizer.encode("<|Assistant|>\n"))
    second = learned.index(eos) + 1
    assert labels[labels != -100].tolist() == learned[header:second] + learned[second + header :]
    assert labels[-1] == -100 and item.ids[-1] == eos


def test_the_conversation_before_a_question_is_the_trained_one():
    """What a follow-up is asked after: the same ids as in training, up to where its answer begins."""
    for processor in (CLEAN, PUBLISHED):
        trained = processor.encode_chat(TURNS, 2).ids
        before = processor.encode_chat(TURNS[:3], 2, add_generation_prompt=True).ids
        assert trained[: len(before)] == before


def test_the_published_models_are_spoken_to_as_published():
    for name in ("longllava-9b", "longllava-53b-a13b"):
        assert load(ModelConfig, shipped("configs", f"models/{name}")).prompt == PUBLISHED_PROMPT
    assert ModelConfig().prompt == PromptConfig() != PUBLISHED_PROMPT


def test_one_dimensional_pooling_of_stage_1():
    """576 -> 144 in a row is the mean of tokens 4i + 1 and 4i + 2, whatever stands around them in the picture."""
    from longllava.bridges import pool_features

    features_NTC = torch.randn(1, 576, 3)
    pooled_NMC = pool_features(features_NTC, 144, BridgeConfig(pool="1d").pool)
    expected_NMC = (features_NTC[:, 1::4] + features_NTC[:, 2::4]) / 2
    torch.testing.assert_close(pooled_NMC, expected_NMC)
    assert (pool_features(features_NTC, 144, "2d") - expected_NMC).abs().max() > 0.1
