"""tokenizer.model without a tokenizer.json: the ids of the sentencepiece package itself."""

from __future__ import annotations

import json
import struct

import pytest

from longllava.config import PromptConfig
from longllava.errors import CheckpointError
from longllava.inputs.sentencepiece import tokenizer_json
from longllava.inputs.tokenizer import Tokenizer

NAMES = ("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>", "<|mask|>")
WORDS = ("▁a", "he", "hea", "rt", "heart", "▁red", "re", "ed", "red", "▁r", "</", "img", "im", "▁▁", "12", "21", "mg")
LETTERS = ",▁abcdefghilmrst<>/|?1246789"


def field(number: int, value: int | float | bytes | str) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def sentencepiece_model(dummy_prefix: int = 0, extra_spaces: int = 0, model_type: int = 2) -> bytes:
    """As Jamba's: control names, bytes, pieces by falling score, a comma that stands alone."""
    pieces = [(name, 0.0, 2 if name == "<|unk|>" else 3) for name in NAMES]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(rank), 1) for rank, text in enumerate((*WORDS, *LETTERS[1:]))]
    pieces += [(",", 0.0, 4)]
    spec = field(3, model_type) + field(35, 1) + field(40, 3) + field(45, "<|unk|>")
    normal = field(1, "identity") + field(3, dummy_prefix) + field(4, extra_spaces)
    return (b"".join(field(1, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in pieces)
            + field(2, spec) + field(3, normal))  # fmt: skip


# what sentencepiece 0.2.3 makes of that model: SentencePieceProcessor(model_proto=...).encode_as_pieces
TEXTS = (
    "a red heart",
    " red",
    "<img></img>",
    "1212",
    "  a   b ",
    "heart,heart, a",
    "zé\n",
    "<|endoftext|>",
    "<0x41>",
    "",
)
GOLDEN = {  # dummy_prefix, extra_spaces removed: pieces of each text, parted by spaces
    (0, 0): ("a ▁red ▁ heart", "▁red", "< img > </ img >", "12 12", "▁ ▁a ▁▁ ▁ b ▁", "heart , heart , ▁a",
             "<0x7A> <0xC3> <0xA9> <0x0A>", "< | e <0x6E> d <0x6F> f t e <0x78> t | >", "< <0x30> <0x78> 4 1 >", ""),
    (1, 0): ("▁a ▁red ▁ heart", "▁ ▁red", "▁ < img > </ img >", "▁ 12 12", "▁▁ ▁a ▁▁ ▁ b ▁", "▁ heart , heart , ▁a",
             "▁ <0x7A> <0xC3> <0xA9> <0x0A>", "▁ < | e <0x6E> d <0x6F> f t e <0x78> t | >",
             "▁ < <0x30> <0x78> 4 1 >", ""),
    (1, 1): ("▁a ▁red ▁ heart", "▁red", "▁ < img > </ img >", "▁ 12 12", "▁a ▁ b", "▁ heart , heart , ▁a",
             "▁ <0x7A> <0xC3> <0xA9> <0x0A>", "▁ < | e <0x6E> d <0x6F> f t e <0x78> t | >",
             "▁ < <0x30> <0x78> 4 1 >", ""),
}  # fmt: skip


@pytest.mark.parametrize(("dummy_prefix", "extra_spaces"), GOLDEN)
def test_pieces_are_those_of_sentencepiece(tmp_path, dummy_prefix, extra_spaces):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix, extra_spaces))
    tokenizer = Tokenizer.from_folder(tmp_path, PromptConfig())
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    for text, pieces in zip(TEXTS, GOLDEN[dummy_prefix, extra_spaces], strict=True):
        ids = tokenizer.encode(text)
        assert " ".join(tokenizer.backend.id_to_token(number) for number in ids) == pieces
        if not extra_spaces:
            assert tokenizer.decode(ids) == text


def test_special_names_are_ids_in_templates_only(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = Tokenizer.from_folder(tmp_path, PromptConfig())
    assert tokenizer.split_specials("<|startoftext|>a") == [1, "a"]
    assert tokenizer.decode([1, *tokenizer.encode("a red"), 2, 3]) == "a red"


def test_saved_it_is_a_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = Tokenizer.from_folder(tmp_path, PromptConfig())
    tokenizer.save(tmp_path / "b")
    again = Tokenizer.from_folder(tmp_path / "b", PromptConfig())
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    (tmp_path / "tokenizer.json").write_text((tmp_path / "b/tokenizer.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(b"never read beside a tokenizer.json")
    assert Tokenizer.from_folder(tmp_path, PromptConfig()).vocab_size == tokenizer.vocab_size


def test_every_cut_is_one_sentence(tmp_path):
    data = sentencepiece_model()
    whole = len(data) - len(field(3, field(1, "identity") + field(3, 0) + field(4, 0)))  # what follows may be left out
    for length in (*range(0, len(data), 37), whole - 1, len(data) - 1):
        (tmp_path / "tokenizer.model").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"tokenizer\.model: cannot be read: "):
            Tokenizer.from_folder(tmp_path, PromptConfig())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sentencepiece_model(model_type=1), "not a plain BPE model"),
        (sentencepiece_model() + field(1, field(1, "a") + field(3, 5)), "not a plain BPE model"),
        (sentencepiece_model() + field(1, field(1, "ab") + field(3, 4)), "not a plain BPE model"),
        (sentencepiece_model() + field(1, field(1, "he")), "a piece stands in it twice"),
        (sentencepiece_model() + field(1, 3), "a number stands where a message should"),
        (sentencepiece_model() + b"\xff" * 12, "a number in it has no end"),
        (b"a text file, not a model", "it is torn"),
        (field(1, field(1, b"\xff\xfe")), "can't decode byte"),
    ],
)
def test_what_is_no_such_model_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        tokenizer_json(data)


def test_tokens_added_beside_the_model_must_be_in_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"added_tokens_decoder": {"0": {"content": "<|pad|>"}}}))
    Tokenizer.from_folder(tmp_path, PromptConfig())
    settings.write_text(json.dumps({"added_tokens_decoder": {"400": {"content": "<img>"}}}))
    with pytest.raises(CheckpointError, match=r"'<img>' was added to tokenizer\.model as 400; write a tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, PromptConfig())


def test_a_published_folder_with_the_model_alone_answers(tmp_path):
    """LongLLaVA's and Jamba's folders carry tokenizer.model; a converted folder keeps it."""
    from longllava.api import LongLLaVA
    from longllava.checkpoints.convert import convert_layout
    from tests.checkpoints import published

    data = sentencepiece_model()
    published.jamba(tmp_path / "a", 1, vocab_size=512)
    (tmp_path / "a/tokenizer.model").write_bytes(data)
    convert_layout(tmp_path / "a", tmp_path / "b")
    models = [LongLLaVA.from_pretrained(tmp_path / name, device="cpu", dtype="float32") for name in "ab"]
    answers = {model.generate("a red heart", max_new_tokens=5) for model in models}
    assert len(answers) == 1 and "" not in answers
