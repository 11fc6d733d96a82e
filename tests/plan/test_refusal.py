"""generate and sessions refuse what cannot fit before they allocate it, and before a picture is read."""

import pytest
import torch

from longllava.errors import InputError
from longllava.generation import prefill
from longllava.nn import cache
from longllava.ops import native
from longllava.plan import memory, prompt_need
from longllava.plan.need import HEAP_KEPT
from tests.tiny import tiny_model, tiny_pictures


@pytest.fixture
def album():
    return tiny_model().session(images=tiny_pictures(2))


def nothing(*args, **options):
    raise AssertionError("it was allocated or read")


REFUSED = (
    r"^(prompt 1 of 1: )?[0-9,]+ tokens \(prompt and answer\)%s need .* of memory on cpu \(keys and values .*,"
    r" 100.0 KB are free;"
)


def little_memory(monkeypatch):
    """From here on 100 KB are free, and nothing may be made or read."""
    monkeypatch.setenv(memory.VARIABLE, "100KB")
    made = cache.Buffer.__init__
    monkeypatch.setattr(cache.Buffer, "__init__", lambda self, b, n, *a: nothing() if n else made(self, b, n, *a))
    monkeypatch.setattr(prefill, "square_pixels", nothing)


def test_generate(monkeypatch):
    model = tiny_model()
    little_memory(monkeypatch)
    for call in (
        lambda: model.generate("what is this", tiny_pictures(1), max_new_tokens=10**6),
        lambda: model.generate("what is this", max_new_tokens=10**6, stream=True).__next__(),
        lambda: model.generate_batch(["what is this"], [tiny_pictures(9)]),
        lambda: model.score("what is this", "a" * 5000),
        lambda: model.session(images=tiny_pictures(500)),
    ):
        with pytest.raises(InputError, match=REFUSED % ""):
            call()


def test_a_session_stays_as_it_was(album, monkeypatch):
    before = [tuple(layer) if isinstance(layer, tuple) else layer for layer in album.state]
    answer, n_tokens = album.ask("what is this", max_new_tokens=3), album.n_tokens
    with monkeypatch.context() as small:
        little_memory(small)
        for call, rows in (
            (lambda: album.append(images=tiny_pictures(500)), ""),
            (lambda: album.ask("what", max_new_tokens=10**6), ""),
            (lambda: album.ask("what", keep=True, max_new_tokens=10**6), ""),
            (lambda: album.ask_many(["what", "a"], max_new_tokens=10**6), " in 2 rows"),
        ):
            with pytest.raises(InputError, match=REFUSED % rows):
                call()
    assert album.n_tokens == n_tokens and album.ask("what is this", max_new_tokens=3) == answer
    assert all(a is b or all(map(torch.equal, a, b)) for a, b in zip(album.state, before, strict=True))


def test_a_batch_of_prompts(monkeypatch):
    """Each prompt alone fits; joined, with room for their answers, they do not."""
    model = tiny_model()
    alone = prompt_need(model.model.config, 8034, value_bytes=4, chunk_tokens=prefill.CHUNK_TOKENS, on_host=True,
                        plain=native.why_not() is not None)  # fmt: skip
    monkeypatch.setenv(memory.VARIABLE, str(2 * alone.total() - HEAP_KEPT))  # which both keep together
    with pytest.raises(InputError, match=r"^8,0.. tokens \(prompt and answer\) in 3 rows need "):
        model.generate_batch(["what is this", "a", "what"], max_new_tokens=8000)


def test_what_fits_is_read(album, monkeypatch):
    """The same calls with memory enough; and where the system says nothing, nothing is refused."""
    monkeypatch.setenv(memory.VARIABLE, "1GB")
    assert isinstance(album.ask("what", max_new_tokens=2), str)
    monkeypatch.setenv(memory.VARIABLE, "")  # as if it were not set
    monkeypatch.setattr(memory, "free_on_host", lambda: None)
    assert isinstance(album.ask("what", max_new_tokens=2), str)
