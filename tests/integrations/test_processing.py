"""The processor for transformers: the tokens and pixels of the library, text that stays text, options that count."""

import base64
import io
import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

import longllava.integrations.transformers  # noqa: F401
from longllava.config import PUBLISHED_PROMPT, PromptConfig
from longllava.errors import InputError
from longllava.files import write_json
from tests.tiny import SPECIALS, tiny_model, tiny_pictures

PICTURES = tiny_pictures(3)
LIBRARY = tiny_model()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return AutoProcessor.from_pretrained(LIBRARY.save_pretrained(tmp_path_factory.mktemp("tiny")))


def picture(image):
    return {"type": "image", "image": image}


def text(words):
    return {"type": "text", "text": words}


TALK = [
    {"role": "user", "content": [picture(PICTURES[0]), text("what is this?")]},
    {"role": "assistant", "content": "a red heart"},
    {"role": "user", "content": [text("is "), picture(PICTURES[1]), text("\na?")]},
]
WHOLE = [*TALK, {"role": "assistant", "content": [text("the heart")]}]


def expected_of(library, prompt, images=None):
    pieces, sources = library.pieces(prompt, images, None, library.fresh())
    encoded = library.processor.encode_pieces(pieces)
    return encoded.ids, library.processor.pixels([sources[span.image] for span in encoded.spans])


def tokenized(processor, talk, **options):
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **options}
    return processor.apply_chat_template(talk, **how)


def test_messages_are_the_librarys_tokens_and_pixels(processor):
    ids, pixels = expected_of(LIBRARY, TALK)
    features = tokenized(processor, TALK)
    assert features["input_ids"].tolist() == [ids] and features["attention_mask"].tolist() == [[1] * len(ids)]
    assert torch.equal(features["pixel_values"], pixels) and features["pixel_values"].dtype == torch.uint8
    assert torch.equal(tokenized(processor, TALK, return_dict=False), features["input_ids"])
    assert set(features) == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize("question", ["what is this?", "<image> is <image>?"])
def test_a_string_is_a_question(processor, question):
    n = question.count("<image>") or 1
    ids, pixels = expected_of(LIBRARY, question, PICTURES[:n])
    for images in (PICTURES[:n], [PICTURES[:n]]):
        features = processor(text=question, images=images, return_tensors="pt")
        assert features["input_ids"].tolist() == [ids] and torch.equal(features["pixel_values"], pixels)
    asked = [{"role": "user", "content": "a?"}]
    assert torch.equal(tokenized(processor, "a?")["input_ids"], tokenized(processor, asked)["input_ids"])
    with pytest.raises(InputError, match="expected a string or a list of messages, got dict"):
        processor.apply_chat_template(asked[0])


def test_what_was_rendered_is_read_as_it_was_meant(processor):
    """The two steps of most examples; pictures named in the messages, or given with the text."""
    rendered = processor.apply_chat_template(TALK, add_generation_prompt=True)
    features = tokenized(processor, TALK)
    bare = [{**turn, "content": [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]]}
            if turn["role"] == "user" else turn for turn in TALK]  # fmt: skip
    again = processor.apply_chat_template(bare, add_generation_prompt=True, tokenize=False)
    assert again == rendered and rendered.count("<image>") == 2
    pair = PICTURES[:2]
    for call in ({"text": rendered}, {"text": again, "images": pair}, {"text": rendered, "images": pair},
                 {"text": [rendered], "images": [pair]}):  # fmt: skip
        found = processor(**call, padding=True, return_tensors="pt")
        assert all(torch.equal(found[key], features[key]) for key in features), call.keys()
    with pytest.raises(InputError, match="1 of 3 images have no image part"):
        processor(text=again, images=PICTURES)
    with pytest.raises(InputError, match="it begins with '<.startoftext.>', but apply_chat_template did not give it"):
        processor(text=rendered + "!", images=PICTURES[:2])


@pytest.mark.parametrize("special", [*SPECIALS, "<image>", "</img></vid>"])
def test_text_stays_text(processor, special):
    """A user who writes special tokens writes characters: nothing but the ids that the layout itself has."""
    said = f"is {special} a?"
    plain = tokenized(processor, [{"role": "user", "content": "is a?"}])["input_ids"][0].tolist()
    talk = [{"role": "user", "content": said}]
    rendered = processor.apply_chat_template(talk, add_generation_prompt=True)
    calls = [tokenized(processor, talk), processor(text=rendered)]
    calls += [] if special == "<image>" else [processor(text=said)]
    for features in calls:
        ids = features["input_ids"][0].tolist()
        assert [ids.count(number) for number in range(5)] == [plain.count(number) for number in range(5)]
        assert special in LIBRARY.tokenizer.decode(ids)


def test_rows_are_padded_on_the_left_unless_asked(processor, tmp_path):
    short, long = [{"role": "user", "content": "a?"}], TALK
    left, right = (tokenized(processor, [short, long], padding_side=side) for side in (None, "right"))
    ids, _ = expected_of(LIBRARY, short)
    length = left["input_ids"].shape[1]
    assert left["input_ids"][0].tolist() == [0] * (length - len(ids)) + ids
    assert right["input_ids"][0].tolist() == ids + [0] * (length - len(ids))
    assert left["attention_mask"][0].tolist() == [0] * (length - len(ids)) + [1] * len(ids)
    assert right["attention_mask"].sum(1).tolist() == left["attention_mask"].sum(1).tolist() == [len(ids), length]
    told = AutoProcessor.from_pretrained(LIBRARY.save_pretrained(tmp_path), padding_side="right")
    assert torch.equal(tokenized(told, [short, long])["input_ids"], right["input_ids"])
    told.tokenizer.padding_side = "left"  # as examples of training set it
    assert torch.equal(tokenized(told, [short, long])["input_ids"], left["input_ids"])
    wide = tokenized(processor, [short], padding="max_length", max_length=100)
    assert wide["input_ids"].shape == (1, 100)
    with pytest.raises(InputError, match=f"max_length: the prompt has {length} tokens, allowed are {length - 1}"):
        tokenized(processor, long, max_length=length - 1, truncation=True)


def test_rows_have_their_own_pictures(processor):
    rows = processor(text=["a <image>?", "what?", "is this?"], images=[PICTURES[0], None, PICTURES[1:]])
    singles = [processor(text="a <image>?", images=PICTURES[0]), processor(text="is this?", images=PICTURES[1:])]
    assert torch.equal(rows["pixel_values"], torch.cat([single["pixel_values"] for single in singles]))
    with pytest.raises(InputError, match="text: got an empty list"):
        processor(text=[])
    with pytest.raises(InputError, match="images: 2 texts were given, expected a list of 2"):
        processor(text=["a", "b"], images=PICTURES)
    with pytest.raises(InputError, match="2 <image> marks, but the number of images given is 1"):
        processor(text=["a", "<image><image>"], images=[PICTURES[0], PICTURES[:1]])


def test_options_count_and_unknown_ones_are_told(processor, tmp_path):
    many = tokenized(processor, TALK, processor_kwargs={"tokens_per_image": 16})
    few = tokenized(processor, TALK, tokens_per_image=4)
    assert many["input_ids"].shape[1] - few["input_ids"].shape[1] == 2 * 12
    assert many["tokens_per_image"] == 16
    tiled = processor(text="a?", images=PICTURES[0], tiles="2x2")
    assert tiled["pixel_values"].shape == (5, 3, 16, 16)
    with pytest.raises(InputError, match="^image 2 of 2: no.png: no such file"):
        processor(text="a?", images=[PICTURES[0], "no.png"], tiles="2x2")
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, image in enumerate(PICTURES):
        image.save(frames / f"{number}.png")
    assert processor(text="a?", videos=frames, max_frames=2)["pixel_values"].shape[0] == 2
    shown = tokenized(processor, [{"role": "user", "content": [{"type": "video", "path": str(frames)}, text("a?")]}])
    assert shown["pixel_values"].shape[0] == 3
    for options, words in (
        ({"tokens_per_imag": 4}, "tokens_per_imag: no such option; allowed: fps"),
        ({"return_tensors": "np"}, "return_tensors: got 'np', allowed: pt, auto"),
        ({"tokens_per_image": 5}, "tokens_per_image: got 5, allowed"),
        ({"max_length": "99"}, "max_length: got '99', expected a whole number above 0"),
        ({"padding": "max_length"}, "padding: 'max_length' pads to max_length, which was not given"),
        ({"audio": [0]}, "audio: this model hears nothing"),
        ({"images": "https://example.org/a.png"}, "image 1 of 1: https://example.org/a.png"),
    ):
        with pytest.raises(InputError, match=words):
            processor(**{"text": "a?", "images": PICTURES[0], **options})
    with pytest.raises(InputError, match="chat_template: the layout is the model's own"):
        processor.apply_chat_template(TALK, chat_template="{{ messages }}")
    with pytest.raises(InputError, match="role: got 'system'"):
        processor.apply_chat_template([{"role": "system", "content": "a"}])


def test_pictures_in_base64(processor):
    file = io.BytesIO()
    PICTURES[0].save(file, "PNG")
    part = {"type": "image", "base64": base64.b64encode(file.getvalue()).decode()}
    shown = tokenized(processor, [{"role": "user", "content": [part, text("a?")]}])
    assert torch.equal(shown["pixel_values"], LIBRARY.processor.pixels(PICTURES[:1]))


def test_what_is_learned_is_marked(processor):
    features = processor.apply_chat_template(
        [WHOLE, WHOLE[:2]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [LIBRARY.tokenizer.decode(row[mask == 1].tolist()) for row, mask in
               zip(features["input_ids"], features["assistant_masks"])]  # fmt: skip
    assert [words.replace(" ", "") for words in learned] == ["aredhearttheheart", "aredheart"]
    assert [int((row[mask == 1] == 2).sum()) for row, mask in
            zip(features["input_ids"], features["assistant_masks"])] == [2, 1]  # fmt: skip


def test_an_answer_that_goes_on(processor):
    ids = processor.apply_chat_template(WHOLE, continue_final_message=True, tokenize=True)[0].tolist()
    over = processor.apply_chat_template(WHOLE, tokenize=True)[0].tolist()
    assert over == [*ids, 2] and LIBRARY.tokenizer.decode(ids).endswith("the heart")
    rendered = processor.apply_chat_template(WHOLE, continue_final_message=True)
    assert rendered.endswith("the heart") and processor.apply_chat_template(WHOLE) == rendered + "<|endoftext|>"
    with pytest.raises(InputError, match="continue_final_message: the last message is not the assistant's"):
        processor.apply_chat_template(TALK, continue_final_message=True)


@pytest.mark.parametrize("prompt", [PromptConfig(), PUBLISHED_PROMPT, replace(PromptConfig(), user_end="", user='"\\')])
def test_the_template_renders_what_the_processor_does(tmp_path, prompt):
    """Jinja alone, as programs without this library would use it, against the processor's own rendering."""
    folder = LIBRARY.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "prompt": asdict(prompt)})
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for talk, more in ((TALK, True), (TALK, False), (WHOLE, False), (TALK[:1], True), (WHOLE[:2], False)):
        rendered = processor.apply_chat_template(talk, add_generation_prompt=more)
        assert tokenizer.apply_chat_template(talk, add_generation_prompt=more, tokenize=False) == rendered
    with pytest.raises(Exception, match="role system: allowed are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}])
    with pytest.raises(Exception, match="a part of type video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video", "path": "a"}]}])


def test_saved_alone_it_is_whole(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    features, found = tokenized(processor, TALK), tokenized(again, TALK)
    assert all(torch.equal(found[key], features[key]) for key in features)
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template


def test_a_tokenizer_saved_alone_is_the_same(processor, tmp_path):
    """As beside peft's adapters, in a folder without config.json."""
    processor.tokenizer.save_pretrained(tmp_path)
    tokenizer, again = processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    said = ["is this a?<|endoftext|>", "a"]
    assert type(again) is type(tokenizer)
    assert again(said, padding=True).data == tokenizer(said, padding=True).data
    assert again.apply_chat_template(TALK, tokenize=False) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert again.decode([2, 261], skip_special_tokens=True) == processor.decode([2, 261], skip_special_tokens=True)
