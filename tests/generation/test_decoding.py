"""Decoding in place gives what decoding with growing states gives: on a CPU step by step, on a GPU from a graph."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from longllava.errors import LongLLaVAError
from longllava.generation import Sampling, batch, decoding, session
from longllava.nn import AttentionState
from longllava.ops import triton_support
from longllava.quant import quantize_
from tests.generation.test_batch import IMAGES, PROMPTS
from tests.generation.test_session import MODELS, PICTURES, SHORT
from tests.tiny import tiny_model

DRAWN = ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 5, "top_k": 20, "top_p": 0.9})
QUESTIONS = ["what is this?", "a", "is it the red heart of this? " * 3]


@pytest.fixture(params=[2, 512])
def static(request, monkeypatch):
    """Decoding as on a GPU, with room for two tokens at first, or for all."""
    monkeypatch.setattr(decoding, "PLACES", request.param)

    def turn(on: bool) -> None:
        for module in (batch, session):
            monkeypatch.setattr(module, "is_static", lambda *_: on)

    return turn


@pytest.mark.parametrize("n_experts", [1, 3])
@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_an_answer_is_the_same(n_experts, drawn, static):
    model = MODELS[n_experts]
    answers = []
    for on in (False, True):
        static(on)
        album = model.session(images=PICTURES[:3])
        before = [layer.n_tokens() for layer in album.state if isinstance(layer, AttentionState)]
        asked = [album.ask(question, **drawn, **SHORT) for question in QUESTIONS]
        assert [layer.n_tokens() for layer in album.state if isinstance(layer, AttentionState)] == before
        answers.append([model.generate("a", PICTURES[:2], **drawn, **SHORT), *asked])
    assert answers[0] == answers[1] and len(set(answers[0])) == 4


@pytest.mark.parametrize("n_experts", [1, 3])
@pytest.mark.parametrize("drawn", DRAWN[::2], ids=str)
def test_a_batch_is_the_same(n_experts, drawn, static):
    model = MODELS[n_experts]
    answers = []
    for on in (False, True):
        static(on)
        album = model.session(images=PICTURES[:3])
        many = album.ask_many(QUESTIONS, **drawn, **SHORT)
        answers.append(many + model.generate_batch(PROMPTS, IMAGES, **drawn, **SHORT))
    assert answers[0] == answers[1] and len(set(answers[0])) > 5


@pytest.mark.parametrize("on", [False, True])
def test_under_autocast_all_ways_to_talk_still_do(on, static, tmp_path):
    model = MODELS[3]
    truth = model.session(images=PICTURES[:4]).score("a", "a red heart").log_probabilities
    static(on)
    with torch.autocast("cpu", torch.bfloat16):
        album = model.session(images=PICTURES[:3])
        album.append(images=PICTURES[3:4])
        loaded = model.load_session(album.save(tmp_path / "album"))
        asked = [loaded.ask(question, **SHORT) for question in QUESTIONS]
        many = album.ask_many(QUESTIONS, **SHORT) + model.generate_batch(PROMPTS, IMAGES, **SHORT)
        score = album.score("a", "a red heart")
        assert loaded.score("a", "a red heart") == score
    assert all(asked) and all(many) and score.log_probabilities == pytest.approx(truth, abs=0.2)


def test_no_graph_is_made_of_rows_for_which_int8_experts_ask_the_host(monkeypatch):
    """Above 64 rows, two of each answer, the ends of each expert's are read: in a CUDA graph's capture an error."""
    model = tiny_model(3)
    quantize_(model.model)
    reader = model.session().reader
    monkeypatch.setattr(type(reader), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(triton_support, "missing", lambda: None)
    assert decoding.is_static(reader) and decoding.is_static(reader, 32) and not decoding.is_static(reader, 33)
    monkeypatch.setattr(triton_support, "missing", lambda: "no C compiler")  # plain torch goes from expert to expert
    assert not decoding.is_static(reader)


def test_a_batch_tells_how_many_rows_it_has(monkeypatch):
    told = []
    monkeypatch.setattr(batch, "is_static", lambda reader, n_rows: told.append(n_rows))
    MODELS[3].session().ask_many(QUESTIONS, **SHORT)
    assert told == [3]


def test_logits_that_are_not_finite_are_an_error(static):
    static(True)
    model = tiny_model()
    with torch.no_grad():
        model.model.backbone.final_norm.weight.fill_(torch.nan)
    with pytest.raises(LongLLaVAError, match="logits are NaN or infinite"):
        model.generate("a", max_new_tokens=3)


def test_a_row_draws_as_it_would_token_by_token():
    at_once = torch.rand(40, generator=Sampling(seed=7).generator(), dtype=torch.float64)
    generator = Sampling(seed=7).generator()
    one_by_one = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for _ in range(40)])
    assert torch.equal(at_once, one_by_one)


def test_a_step_that_fails_leaves_no_capture_open(monkeypatch):
    """All later answers of the process would be captured on the same stream, which goes on capturing until then."""
    told = []

    class Stream:
        wait_stream = staticmethod(lambda other: None)

    class Graph:
        capture_begin = staticmethod(lambda **_: told.append("begin"))
        capture_end = staticmethod(lambda: told.append("end"))

    def step():
        told.append("step")
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(decoding, "capture_stream", lambda device: Stream())
    with pytest.raises(torch.OutOfMemoryError):
        decoding.captured(step, torch.device("cuda"))
    assert told == ["begin", "step", "end"]


def test_threads_capture_one_after_the_other(monkeypatch):
    """Two that answer at a time share the stream on which steps are captured; CUDA refuses to begin on it, or to let it
    wait for another, before the capture under way has ended."""
    under_way, begun, faults = [], threading.Barrier(2), []

    class Stream:
        def wait_stream(self, other):
            faults.extend(under_way if self is captures else ())

    class Graph:
        def capture_begin(self, **_):
            faults.extend(under_way)
            under_way.append(threading.get_ident())

        def capture_end(self):
            under_way.remove(threading.get_ident())

    captures = Stream()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(decoding, "capture_stream", lambda device: captures)

    def capture(_):
        begun.wait()
        decoding.captured(lambda: time.sleep(0.05), torch.device("cuda"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(capture, range(2)))
    assert not faults


@pytest.mark.gpu
@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_a_graph_gives_what_steps_give(drawn, monkeypatch):
    monkeypatch.setattr(decoding, "PLACES", 16)
    model = tiny_model()
    model.model.to("cuda")
    assert decoding.is_static(model.session().reader)
    answers = []
    for on in (False, True):
        for module in (batch, session):
            monkeypatch.setattr(module, "is_static", lambda *_, on=on: on)
        album = model.session(images=PICTURES[:3])
        options = {**drawn, "max_new_tokens": 50}
        answers.append([*album.ask_many(QUESTIONS, **options), *(album.ask(q, **options) for q in QUESTIONS)])
    assert answers[0] == answers[1]
