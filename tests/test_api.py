"""LongLLaVA from outside: load, ask, save, and what it says when something is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longllava import LongLLaVA, LongLLaVAError
from longllava.errors import InputError
from tests.tiny import tiny_model, tiny_pictures, tiny_tokenizer

MODEL = tiny_model()
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def files(tmp_path):
    paths = []
    for number, picture in enumerate(tiny_pictures(3)):
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    return paths


def test_a_saved_model_answers_the_same(tmp_path, files):
    MODEL.save_pretrained(tmp_path / "model")
    again = LongLLaVA.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert again.generate("what is this?", files, **SHORT) == MODEL.generate("what is this?", files, **SHORT)
    assert again.model.config == MODEL.model.config


def test_dtypes(tmp_path, files):
    MODEL.save_pretrained(tmp_path / "model", dtype="bfloat16")
    for dtype in ("bfloat16", torch.bfloat16, None):
        model = LongLLaVA.from_pretrained(tmp_path / "model", device="cpu", dtype=dtype)
        assert isinstance(model.generate("a", files, **SHORT), str)
    with pytest.raises(InputError, match="dtype: got 'int8', allowed: float32, bfloat16"):
        LongLLaVA.from_pretrained(tmp_path / "model", dtype="int8")


@pytest.mark.parametrize("device", ["tpu", "meta", "cpu:x", "cuda"])
def test_devices_that_are_not_there(device, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    MODEL.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"device: got '{device}'"):
        LongLLaVA.from_pretrained(tmp_path, device=device)


@pytest.mark.parametrize("argument", [{"device": 0.5}, {"device": ["cpu"]}, {"device_map": ["cpu"]}, {"device_map": 0}])
def test_devices_of_a_wrong_type(argument):
    (name,) = argument
    with pytest.raises(InputError, match=f"^{name}: got .*, allowed: "):
        LongLLaVA.from_pretrained("nano", **argument)


def test_features_of_one_picture_keep_no_others(files):
    for features in (MODEL.encode(files), MODEL.encode(MODEL.encode(files))):
        assert [one.untyped_storage().nbytes() for one in features] == [features[0].nbytes] * 3


def test_every_kind_of_image_source_is_the_same_picture(files):
    picture = tiny_pictures(1)[0]
    kinds = [files[0], Path(files[0]), Path(files[0]).read_bytes(), picture, np.asarray(picture)]
    assert (
        len({MODEL.generate("a", source, **SHORT) for source in kinds} | {MODEL.generate("a", [files[0]], **SHORT)})
        == 1
    )
    assert MODEL.generate("a", files[1], **SHORT) != MODEL.generate("a", files[0], **SHORT)


def test_pictures_of_the_world():
    from longllava.data.worlds.pictures import reference
    from longllava.data.worlds.render import PictureSpec, render

    spec = PictureSpec(thing=3, style="noto", digit=4, colour=1, seed=9)
    assert MODEL.generate("a", reference(spec), **SHORT) == MODEL.generate("a", render(spec), **SHORT)
    with pytest.raises(InputError, match="image 1 of 1: world:nothing: "):
        MODEL.generate("a", "world:nothing")


def test_places_of_images_matter(files):
    def score(prompt, images):
        return MODEL.score(prompt, "a red heart", images).log_probability

    first = score("<image><image>\nwhat is", files[:2])
    assert first == score("what is", files[:2])
    for prompt, images in (
        ("what <image>is<image>", files[:2]),
        ("what is", files[1::-1]),
        ("what is", files),
    ):
        assert abs(score(prompt, images) - first) > 1e-3


def test_messages_are_the_string_prompt(files):
    parts = [{"type": "image", "path": files[0]}, {"type": "text", "text": "what is"}]
    assert MODEL.generate([{"role": "user", "content": parts}], **SHORT) == MODEL.generate(
        "what is", files[:1], **SHORT
    )


def test_marks_in_messages_are_text(files):
    text = {"type": "text", "text": "<image>"}
    assert MODEL.generate([{"role": "user", "content": [text]}], **SHORT)
    with pytest.raises(InputError, match="1 <image> mark, but the number of images given is 0"):
        MODEL.generate("<image>")


def test_typed_specials_change_nothing_but_the_text():
    """Text that spells eos is read as its letters: the ids hold one bos per turn, as always, and no eos."""
    pieces, _ = MODEL.pieces("a<|endoftext|><|startoftext|><img>", None, None, MODEL.fresh(8))
    ids = MODEL.processor.encode_pieces(pieces).ids
    special = MODEL.tokenizer.special_ids
    assert ids.count(special["<|startoftext|>"]) == 2
    assert special["<|endoftext|>"] not in ids and special["<img>"] not in ids


def test_videos(tmp_path):
    frames = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    whole = MODEL.generate("a", video=tmp_path / "a.gif", fps=2, **SHORT)
    part = {"type": "video", "path": str(tmp_path / "a.gif")}
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]
    assert MODEL.generate(talk, fps=2, **SHORT) == whole
    assert MODEL.session(video=tmp_path / "a.gif", fps=2).ask("a", **SHORT) == whole
    assert MODEL.session(video=tmp_path / "a.gif", fps=2).n_images == 4
    with pytest.raises(InputError, match="give the video as a part"):
        MODEL.generate(talk, video=tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: MODEL.generate(""), "prompt: it is empty"),
        (lambda: MODEL.generate(" \n"), "prompt: it is empty"),
        (lambda: MODEL.generate("a\ud800"), "lone surrogate"),
        (lambda: MODEL.generate(3), "prompt: expected a string or a list of messages, got int"),
        (lambda: MODEL.generate(["a", "b"]), "message 1: expected a dictionary"),
        (lambda: MODEL.generate("a", temperature=-1), "temperature: got -1"),
        (lambda: MODEL.generate("a", top_p=0), "top_p: got 0"),
        (lambda: MODEL.generate("a", max_new_tokens=0), "max_new_tokens: got 0"),
        (lambda: MODEL.generate("a", images=[b"x"]), "image 1 of 1: not a picture"),
        (lambda: MODEL.generate("a", images=["no.png"]), r"image 1 of 1: no\.png: no such file"),
        (lambda: MODEL.generate("a", images="A" * 10**6), r"image 1 of 1: A{80}\.\.\.: no such file"),
        (lambda: MODEL.generate("a", images="A" * 10**6, tiles="fit"), r"image 1 of 1: A{80}\.\.\.: no such file"),
        (lambda: MODEL.generate("a", video="no.mp4"), r"no\.mp4: no such video"),
        (lambda: MODEL.generate("a", video="A" * 10**6), r"^A{80}\.\.\.: no such video"),
        (lambda: MODEL.score("a", ""), "answer: it is empty"),
        (lambda: MODEL.session().ask(""), "prompt: it is empty"),
        (lambda: MODEL.session().append(), "append: nothing to read"),
        (lambda: MODEL.session().ask_many("abc"), "expected a list of strings"),
        (lambda: MODEL.session().ask_many([""]), "prompt: it is empty"),
        (lambda: MODEL.session().ask_many({"a": "b"}), "questions: expected a list of strings, got {'a': 'b'}"),
        (lambda: MODEL.generate_batch({"a": "b"}), "prompts: got one dict; expected a list"),
        (lambda: MODEL.generate_batch(["a"], {"a": "b"}), "images: got one dict; expected a list"),
        (lambda: MODEL.generate("a", {"bytes": b""}), "images: got a dictionary of .'bytes'.; expected one image"),
        (lambda: MODEL.generate("a", {"a.png", "b.png"}), "images: got set; expected one image or a list"),
        (lambda: MODEL.session(frozenset()), "images: got frozenset; expected one image or a list"),
        (lambda: MODEL.session({"bytes": b""}), "images: got a dictionary of .'bytes'.; expected one image"),
        (lambda: LongLLaVA(MODEL.model, tiny_tokenizer(), tokens_per_image=7), "tokens_per_image: got 7"),
    ],
)
def test_one_sentence_each(call, sentence):
    with pytest.raises(LongLLaVAError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "arguments", "wrong", "hint", "allowed"),
    [
        (MODEL.generate, ("a",), "image", "did you mean 'images'?", "prompt, images, video, max_new_tokens"),
        (MODEL.generate, ("a",), "max_tokens", "did you mean 'max_new_tokens'?", "seed, stop, stream, fps, max_frames"),
        (MODEL.generate_batch, (["a"],), "image", "did you mean 'images'?", "prompts, images, batch_size, "),
        (MODEL.score, ("a", "b"), "vidio", "did you mean 'video'?", "prompt, answer, images, video, fps"),
        (MODEL.session, (), "temperature", "it has no such keyword.", "images, text, video, fps"),
        (MODEL.load_session, ("a",), "tile", "did you mean 'tiles'?", "path, fps"),
        (MODEL.session().ask, ("a",), "image", "did you mean 'images'?", "question, stream, images, video, keep, max"),
        (MODEL.session().ask_many, (["a"],), "temprature", "did you mean 'temperature'?", "questions, batch_size, max"),
    ],
)
def test_a_wrong_keyword_is_told_by_the_method_that_was_called(method, arguments, wrong, hint, allowed):
    with pytest.raises(TypeError) as caught:
        method(*arguments, **{wrong: None})
    told, _, listed = str(caught.value).partition(" Allowed: ")
    assert told == f"{method.__qualname__}() got an unexpected keyword argument {wrong!r}; {hint}" and allowed in listed


def test_no_questions_have_no_answers():
    assert MODEL.session().ask_many([]) == []


@pytest.mark.parametrize("name", ["", None])
def test_what_names_no_file_or_folder_is_not_written_to(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = MODEL.session(text="a")
    for use in (MODEL.save_pretrained, session.save, MODEL.load_session):
        with pytest.raises(InputError, match=f"^got {name!r}, expected the name of a file or folder$"):
            use(name)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers(files, tmp_path):
    model = LongLLaVA(MODEL.model, MODEL.tokenizer, tokens_per_image=np.int64(4))
    drawn = {"max_new_tokens": np.int8(100), "top_k": np.int32(9), "seed": np.int64(3), "top_p": np.float32(0.5),
             "temperature": np.float16(1), "chunk_tokens": np.int8(100)}  # fmt: skip
    same = {name: value.item() for name, value in drawn.items()}
    assert model.generate("a", files, **drawn) == MODEL.generate("a", files, **same)
    assert model.generate_batch(["a"], [files], batch_size=np.int8(2), **drawn) == [model.generate("a", files, **same)]
    frames = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    film = model.session(video=tmp_path / "a.gif", fps=np.float32(2), max_frames=np.int8(3))
    assert film.n_images == 2 and film.ask_many(["a"], batch_size=np.int8(1), max_new_tokens=np.int64(1))
    assert model.load_session(film.save(tmp_path / "film")).n_tokens == film.n_tokens
    with pytest.raises(InputError, match="max_new_tokens: got True, expected a whole number"):
        MODEL.generate("a", max_new_tokens=True)
    with pytest.raises(InputError, match=r"seed: got np.float64\(3.0\), expected a whole number"):
        MODEL.generate("a", seed=np.float64(3))


@pytest.mark.parametrize("none", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_no_images_are_none_in_sessions_as_in_prompts(none, files):
    empty, album = MODEL.session(images=none), MODEL.session(images=files)
    assert (empty.n_tokens, empty.waiting) == (0, MODEL.session().waiting)
    assert empty.ask("a", images=none, **SHORT) == MODEL.generate("a", images=none, **SHORT)
    before = album.content
    album.append(images=none)
    assert (album.n_tokens, album.n_images, album.waiting) == before[1:]


def test_a_model_that_moved_has_not_read_the_session(tmp_path):
    model = tiny_model()
    album = model.session(images=tiny_pictures(1))
    model.model.to(torch.bfloat16)
    calls = [lambda: album.ask("a"), lambda: album.ask_many(["a"]), lambda: album.score("a", "b"),
             lambda: album.append(text="a"), lambda: album.save(tmp_path / "album")]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=r"on cpu in torch\.float32, which is on cpu in torch\.bfloat16 now"):
            call()
    assert model.session(images=tiny_pictures(1)).ask("a", **SHORT) is not None


def test_paths_of_every_kind(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first, both = MODEL.generate("a", files[0], **SHORT), MODEL.generate("a", files[:2], **SHORT)
    in_bytes = [entry for entry in os.scandir(os.fsencode(tmp_path)) if entry.name == b"0.png"]
    for source in ("~/0.png", Path("~/0.png"), np.str_(files[0]), np.array(files[:1]), in_bytes):
        assert MODEL.generate("a", source, **SHORT) == first
    assert MODEL.generate("a", "~/0.png", tiles="1x1", **SHORT) == MODEL.generate("a", files[0], tiles="1x1", **SHORT)
    assert MODEL.generate("a", video="~", **SHORT) == MODEL.generate("a", video=tmp_path, **SHORT)
    for sources in (np.array(files[:2]), np.array(files[:2], object), np.array([Path(file) for file in files[:2]])):
        assert MODEL.generate("a", sources, **SHORT) == both
    assert MODEL.generate_batch(np.array(["a"]), np.array(files[:1]), **SHORT) == [first]
    with pytest.raises(InputError, match=r"image 1 of 1: ~/9\.png: no such file"):
        MODEL.generate("a", "~/9.png")
    with pytest.raises(InputError, match="image 1 of 1: .*got '', expected the name of a file"):
        MODEL.generate("a", "")
