"""One state, many ways to reach it: in chunks, in appends, forked, saved, one question or many."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.api import LongLLaVA
from longllava.config import PromptConfig
from longllava.errors import InputError, LongLLaVAError
from longllava.generation import Sampling, Session
from longllava.generation.prefill import Reader
from longllava.inputs.chat import Answer, Message
from longllava.nn import Context, MambaState, fork_state
from tests.tiny import tiny_model, tiny_pictures

MODELS = {n: tiny_model(n) for n in (1, 3)}  # dense, and three experts
MODEL = MODELS[1]
PICTURES = tiny_pictures(6)
SHORT = {"max_new_tokens": 8}
QUESTIONS = ["what is this?", "a", "the red heart of what is this?"]


def tensors(state):
    """Everything a state says, buffers cut to what is filled."""
    result = []
    for layer in state:
        if isinstance(layer, MambaState):
            result += list(layer)
        else:
            parts = layer.segments()
            result += [
                torch.cat([p.keys_BSGK for p in parts], 1),
                torch.cat([p.values_BSGK for p in parts], 1),
            ]
    return result


def assert_same_state(a, b, tolerance=1e-5):
    for left, right in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def prompt(model, text="<image>what is<image><image>this?", n_images=3):
    pieces, sources = model.pieces(text, PICTURES[:n_images], None, model.fresh(2048))
    return model.processor.encode_pieces(pieces), sources


@settings(max_examples=20)
@given(st.integers(1, 60), st.sampled_from([1, 3]))
def test_any_chunking_is_the_whole(chunk_tokens, n_experts):
    """Cuts fall inside images too: 4 tokens each, chunks from 1."""
    model = MODELS[n_experts]
    encoded, sources = prompt(model)
    runs = []
    for chunk in (chunk_tokens, 10_000):
        reader = Reader(model.model, model.processor, chunk_tokens=chunk)
        runs.append(reader.read(encoded, sources, reader.empty_state(len(encoded.ids)), 0))
    (hidden_a, state_a), (hidden_b, state_b) = runs
    torch.testing.assert_close(hidden_a, hidden_b, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        logits = [reader.logits(hidden) for hidden in (hidden_a, hidden_b)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert_same_state(state_a, state_b)


def test_image_tokens_stand_where_their_spans_are():
    """The pipeline's input equals one made by hand: word embeddings, and each image encoded on its own."""
    encoded, sources = prompt(MODEL)
    model, reader = MODEL.model, Reader(MODEL.model, MODEL.processor)
    x_1LD = model.embed(torch.tensor([encoded.ids])).clone()
    for span in encoded.spans:
        pixels = torch.from_numpy(np.array(sources[span.image])).permute(2, 0, 1)[None]
        x_1LD[0, span.start : span.start + span.length] = model.image_tokens(model.encode(pixels))[0]
    by_hand, _ = model(x_1LD, Context())
    hidden, _ = reader.read(encoded, sources, reader.empty_state(len(encoded.ids)), 0)
    torch.testing.assert_close(hidden[0], by_hand[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_experts", [1, 3])
def test_cached_decoding_is_uncached_decoding(n_experts, monkeypatch):
    model = MODELS[n_experts]
    encoded, sources = prompt(model)
    reader = model.fresh(16).reader
    seen = []
    original = Reader.logits
    monkeypatch.setattr(Reader, "logits", lambda self, hidden: seen.append(original(self, hidden)) or seen[-1])
    session = Session(reader)
    hidden, state = reader.read(encoded, sources, reader.empty_state(len(encoded.ids)), 0)
    cached = list(session.tokens(hidden, state, len(encoded.ids), Sampling(max_new_tokens=10)))
    assert len(cached) > 4
    images = model.model.image_tokens(model.model.encode(model.processor.pixels(sources))).double()
    spans = torch.tensor([(0, span.start, span.length, span.image) for span in encoded.spans])
    judge = copy.deepcopy(model.model).double()  # in fp32 the uncached way is itself off by up to 1.4e-5
    for number, logits in enumerate(seen):
        ids = torch.tensor([encoded.ids + cached[:number]])
        with torch.inference_mode():
            hidden_1LD, _ = judge(judge.embed(ids, spans, images), Context())
            truth = judge.logits(hidden_1LD[:, -1])[:, : logits.shape[1]]
            torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-5)
        assert int(logits.argmax()) == (*cached, model.tokenizer.eos_id)[number]


def test_a_question_to_a_session_is_the_whole_prompt():
    album = MODEL.session(images=PICTURES)
    for question in QUESTIONS:
        assert album.ask(question, **SHORT) == MODEL.generate(question, PICTURES, **SHORT)


@pytest.mark.parametrize("layout", [{"image_close": ""}, {"tiles_end": "</i>"}, {"image_close": "", "video_close": ""}])
def test_it_is_the_whole_prompt_whatever_ends_a_picture(layout, tmp_path):
    model = LongLLaVA(MODEL.model, MODEL.tokenizer)
    model.processor.prompt = PromptConfig(**layout)
    for number, picture in enumerate(PICTURES[:2]):
        picture.save(tmp_path / f"{number}.png")
    for media in ({"images": PICTURES[:2]}, {"images": PICTURES[:2], "tiles": "1x2"}, {"video": str(tmp_path)}):
        asked = model.session(**media).score(QUESTIONS[0], "red")
        assert asked.log_probabilities == pytest.approx(model.score(QUESTIONS[0], "red", **media).log_probabilities)


def test_asking_leaves_the_session_as_it_was():
    album = MODEL.session(images=PICTURES)
    before, waiting, n_tokens = [t.clone() for t in tensors(album.state)], list(album.waiting), album.n_tokens
    album.ask("what is this?", images=PICTURES[:1], **SHORT)
    stream = album.ask("a", stream=True, max_new_tokens=50)
    next(stream)
    stream.close()
    album.ask_many(QUESTIONS, **SHORT)
    album.score("what is this?", "heart")
    with pytest.raises(InputError):
        album.ask("what is this?", images=["missing.png"])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(album.state), strict=True))
    assert (waiting, n_tokens) == (album.waiting, album.n_tokens)


@pytest.mark.parametrize("start", [{}, {"images": PICTURES}], ids=["empty", "pictures"])
def test_a_stream_that_is_begun_late_answers_what_was_asked(start):
    album = MODEL.session(**start)
    expected = album.ask("what is this?", **SHORT)
    late = album.ask("what is this?", stream=True, **SHORT)
    album.append(images=PICTURES[3:], text="a red heart")
    assert album.ask("what is this?", **SHORT) != expected  # or what was appended would not show
    assert "".join(late) == expected


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_appending_is_reading_at_once(sizes):
    """Whatever the cuts: pictures in several appends, text between them."""
    album, first, text = MODEL.session(), 0, ""
    for size in sizes:
        album.append(images=PICTURES[:size] or None, text="a red ")
        text += "<image>" * size + "\n" * (size > 0) + "a red "  # a line parts pictures from the text they precede
        first += size
    pictures = [picture for size in sizes for picture in PICTURES[:size]]
    whole = MODEL.session(images=pictures, text=text) if pictures else MODEL.session(text=text)
    assert album.n_tokens == whole.n_tokens and album.n_images == whole.n_images == first
    assert_same_state(album.state, whole.state)
    assert album.ask("heart?", **SHORT) == whole.ask("heart?", **SHORT)


def test_many_appends_do_not_pile_up_segments():
    album = MODEL.session()
    for number in range(30):
        album.append(images=PICTURES[number % 6])
    assert max(len(layer.segments()) for layer in album.state if not isinstance(layer, MambaState)) <= 11
    whole = MODEL.session(images=PICTURES * 5)
    assert album.n_tokens == whole.n_tokens
    assert_same_state(album.state, whole.state)
    assert album.ask("a", **SHORT) == whole.ask("a", **SHORT)


def test_long_text_is_read_when_it_comes():
    album = MODEL.session(text="a red heart " * 200)
    assert album.n_tokens > 300 and not album.waiting


def test_a_failed_append_changes_nothing():
    album = MODEL.session(images=PICTURES[:2])
    answer = album.ask("a", **SHORT)
    with pytest.raises(InputError, match=r"image 2 of 2: nothing\.png: no such file"):
        album.append(images=[PICTURES[0], "nothing.png"])
    with pytest.raises(InputError, match="expected a string, got bytes"):
        album.append(text=b"a")
    assert album.ask("a", **SHORT) == answer


def test_forks_go_their_own_ways():
    album = MODEL.session(images=PICTURES[:3])
    fork = album.fork()
    assert fork.ask("a", **SHORT) == album.ask("a", **SHORT)
    fork.append(images=PICTURES[3:])
    album.append(images=PICTURES[:1])
    assert_same_state(fork.state, MODEL.session(images=PICTURES).state)
    assert_same_state(album.state, MODEL.session(images=[*PICTURES[:3], PICTURES[0]]).state)


def test_what_is_appended_while_it_forks_is_in_the_fork_or_not(monkeypatch):
    album = MODEL.session(images=PICTURES[:3])

    def slow(*args):
        forked = fork_state(*args)
        monkeypatch.undo()
        album.append(images=PICTURES[3:])  # as another thread may
        return forked

    monkeypatch.setattr("longllava.generation.session.fork_state", slow)
    fork, whole = album.fork(), MODEL.session(images=PICTURES[:3])
    assert (fork.n_tokens, fork.n_images) == (whole.n_tokens, 3) and album.n_images == 6
    assert_same_state(fork.state, whole.state)


def test_kept_turns_are_the_conversation(monkeypatch):
    album = MODEL.session(images=PICTURES[:2])
    first = album.ask("what is this?", keep=True, **SHORT)
    n_read, read = [], album.reader.read
    monkeypatch.setattr(album.reader, "read", lambda *args: n_read.append(len(args[1])) or read(*args))
    second = album.ask("a red heart?", keep=True, images=PICTURES[2:3], **SHORT)
    assert sum(n_read) == 1 and album.n_images == 3
    third = "".join(album.ask("the?", stream=True, **SHORT))
    images = [{"type": "image", "image": picture} for picture in PICTURES[:3]]
    talk = [
        {"role": "user", "content": [*images[:2], {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [images[2], {"type": "text", "text": "a red heart?"}]},
    ]
    assert second == MODEL.generate(talk, **SHORT)
    talk += [{"role": "assistant", "content": second}, {"role": "user", "content": "the?"}]
    assert third == MODEL.generate(talk, **SHORT)


def test_a_kept_turn_follows_what_was_appended_while_it_was_answered():
    album, other = (MODEL.session(images=PICTURES[:2]) for _ in range(2))
    stream = album.ask("what is this?", images=PICTURES[2:4], stream=True, keep=True, **SHORT)
    text = next(stream)
    for session in (album, other):
        session.append(images=PICTURES[4:5], text="a red ")
    text += "".join(stream)
    assert text == MODEL.session(images=PICTURES[:2]).ask("what is this?", images=PICTURES[2:4], **SHORT)
    pieces, sources = MODEL.session(images=PICTURES[:2]).question_pieces("what is this?", PICTURES[2:4], None)
    answered = [*MODEL.processor.turn(Message("assistant", (Answer(text),))), MODEL.processor.user_open()]
    other.take([*pieces, *answered], sources)
    assert (album.n_tokens, album.n_images, album.waiting) == (other.n_tokens, 5, other.waiting)
    assert_same_state(album.state, other.state)


@pytest.mark.parametrize("start", [{}, {"images": PICTURES}], ids=["empty", "pictures"])
@pytest.mark.parametrize("n_experts", [1, 3])
def test_many_questions_are_single_questions(start, n_experts):
    album = MODELS[n_experts].session(**start)
    single = [album.ask(question, **SHORT) for question in QUESTIONS]
    assert len(set(single)) == 3
    assert album.ask_many(QUESTIONS, **SHORT) == single
    assert album.ask_many(QUESTIONS, batch_size=2, **SHORT) == single
    album.reader.chunk_tokens = 5
    assert album.ask_many(QUESTIONS, **SHORT) == single
    drawn = {"temperature": 1.0, "seed": 3, "top_k": 20, **SHORT}
    assert album.ask_many(QUESTIONS, **drawn) == [album.ask(question, **drawn) for question in QUESTIONS]


def test_damaged_models_say_so():
    model = tiny_model()
    with torch.no_grad():
        model.model.backbone.final_norm.weight.fill_(torch.nan)
    for call in (lambda: model.generate("a"), lambda: model.score("a", "b")):
        with pytest.raises(LongLLaVAError, match="logits are NaN"):
            call()


def test_gradients_stay_on_for_the_caller():
    stream = MODEL.generate("a", stream=True, max_new_tokens=20)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    stream.close()
    assert isinstance(MODEL.session(), Session)


@pytest.mark.parametrize("keep", [False, True])
def test_what_two_threads_append_is_not_lost_in_silence(monkeypatch, keep):
    album, whole = MODEL.session(images=PICTURES[:2]), MODEL.session(images=PICTURES[:3])
    read, reads = album.reader.read, []

    def slow(*args):
        reads.append(args)
        if len(reads) == (3 if keep else 1):  # question, then where its answer begins, then the answer
            album.append(images=PICTURES[2:3])  # as another thread may
        return read(*args)

    monkeypatch.setattr(album.reader, "read", slow)
    with pytest.raises(InputError, match="another thread made it longer meanwhile, and so it stays"):
        album.ask("a", keep=True, images=PICTURES[3:4], **SHORT) if keep else album.append(images=PICTURES[3:5])
    assert (album.n_tokens, album.n_images, album.waiting) == (whole.n_tokens, 3, whole.waiting)
    assert_same_state(album.state, whole.state)
