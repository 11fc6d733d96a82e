"""Prompts of any length, with pictures or without, together: each answer is the one it would get alone."""

import pytest
import torch

from longllava.errors import InputError
from longllava.nn import MambaState, join_states
from tests.generation.test_session import MODELS, PICTURES, SHORT

PROMPTS = [
    "what is this?",
    "<image>a<image>",
    "the red heart of what is this? " * 4,
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": PICTURES[3]}]},
     {"role": "assistant", "content": "red"}, {"role": "user", "content": "is this a heart?"}],
    "a",
]  # fmt: skip
IMAGES = [PICTURES[:3], PICTURES[3:5], None, None, PICTURES[5]]


@pytest.mark.parametrize("n_experts", [1, 3])
def test_a_batch_is_its_prompts(n_experts):
    model = MODELS[n_experts]
    for drawn in ({}, {"temperature": 1.0, "seed": 3, "top_k": 20}):
        single = [model.generate(prompt, own, **drawn, **SHORT) for prompt, own in zip(PROMPTS, IMAGES)]
        assert len(set(single)) == 5
        for size in (5, 2):
            assert model.generate_batch(PROMPTS, IMAGES, batch_size=size, **drawn, **SHORT) == single
    backwards = model.generate_batch(PROMPTS[::-1], IMAGES[::-1], chunk_tokens=7, **SHORT)
    assert backwards == model.generate_batch(PROMPTS, IMAGES, **SHORT)[::-1]


def test_prompts_and_pictures_may_come_one_by_one():
    model = MODELS[1]
    whole = model.generate_batch(PROMPTS, IMAGES, **SHORT)
    images = (iter(own) if isinstance(own, list) else own for own in IMAGES)
    assert model.generate_batch(iter(PROMPTS), images, **SHORT) == whole
    images = [own if own is None else model.encode(own) for own in IMAGES]
    assert model.generate_batch(PROMPTS, [*images[:4], images[4][0]], **SHORT) == whole
    assert model.generate(PROMPTS[0], torch.stack(images[0]), **SHORT) == whole[0]


def test_rows_stop_where_they_would_alone():
    model = MODELS[1]
    whole = model.generate_batch(PROMPTS, IMAGES, **SHORT)
    stop = [whole[0][3], whole[2][2]]
    expected = [
        min((text[: text.index(word)] for word in stop if word in text), key=len, default=text) for text in whole
    ]
    assert model.generate_batch(PROMPTS, IMAGES, stop=stop, **SHORT) == expected != whole


def test_joined_states_hold_each_row_and_padding_behind_it():
    model = MODELS[1]
    albums = [model.session(images=PICTURES[:n], text="a" * 1100) for n in (1, 3)]
    joined = join_states([album.state for album in albums], 5)
    for layer, *rows in zip(joined, *(album.state for album in albums)):
        if isinstance(layer, MambaState):
            assert all(torch.equal(layer.scan_BEN[i], row.scan_BEN[0]) for i, row in enumerate(rows))
            continue
        (segment,) = layer.segments()
        lengths = (segment.seq_idx_BS == 0).sum(1).tolist()
        assert lengths == [album.n_tokens for album in albums]
        for row, (state, length) in enumerate(zip(rows, lengths)):
            keys = torch.cat([part.keys_BSGK[0] for part in state.segments()])
            assert torch.equal(segment.keys_BSGK[row, :length], keys)
            assert (segment.seq_idx_BS[row, length:] == -1).all()


def test_errors_name_the_prompt():
    model = MODELS[1]
    with pytest.raises(
        InputError, match="prompt 2 of 2: the text has 1 <image> mark, but the number of images given is 0"
    ):
        model.generate_batch(["a", "<image>"])
    with pytest.raises(InputError, match=r"prompt 2 of 2: image 1 of 1: no\.png: no such file"):
        model.generate_batch(["a", "a"], [None, "no.png"], batch_size=1)
    for bad, sentence in (("", "prompt: it is empty"), ("<image>", "the text has 1 <image>"), (7, "prompt: expected")):
        with pytest.raises(InputError, match=f"^question 2 of 3: {sentence}"):
            model.session(text="a").ask_many(iter(["a", bad, "b"]))
    with pytest.raises(InputError, match="prompts: got 2, and images for 1; expected"):
        model.generate_batch(["a", "a"], [None])
    with pytest.raises(InputError, match="prompts: got one string"):
        model.generate_batch("a")
    for one, name in (("b.png", "one string"), (7, "one int")):
        with pytest.raises(InputError, match=f"images: got {name}; expected"):
            model.generate_batch(["a"], one)
    for size in (0, "2", 2.5, True):
        for answer in (model.generate_batch, model.session().ask_many):
            with pytest.raises(InputError, match="batch_size: got .*, expected a whole number above 0"):
                answer(["a"], batch_size=size)
    assert model.generate_batch([]) == []
