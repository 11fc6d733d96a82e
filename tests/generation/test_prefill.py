"""Flat memory: how much is decoded ahead, what is left behind, and the exact size of the cache."""

import threading

import pytest
import torch

from longllava.errors import InputError
from longllava.generation import prefill
from longllava.nn import AttentionState
from tests.tiny import tiny_model, tiny_pictures

MODEL = tiny_model()


def decoders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("longllava-decode")]


def test_decoding_runs_one_batch_ahead_at_most(monkeypatch):
    """Images decoded and not yet used: the batch in work and one more. Counted at every decode."""
    used, most = [0], [0]
    decoded = [0]
    lock = threading.Lock()
    original, encode = prefill.square_pixels, MODEL.model.encode

    def counted(*args):
        with lock:
            decoded[0] += 1
            most[0] = max(most[0], decoded[0] - used[0])
        return original(*args)

    def counting_encode(pixels):
        used[0] += len(pixels)
        return encode(pixels)

    monkeypatch.setattr(prefill, "MAX_BATCH", 8)
    monkeypatch.setattr(prefill, "square_pixels", counted)
    monkeypatch.setattr(MODEL.model, "encode", counting_encode, raising=False)
    MODEL.session(images=tiny_pictures(1) * 100)
    assert decoded[0] == used[0] == 100
    assert 8 <= most[0] <= 16


def test_no_more_threads_decode_than_the_process_has_cores(monkeypatch):
    most, original = [0], prefill.square_pixels

    def counted(*args):
        most[0] = max(most[0], len(decoders()))
        return original(*args)

    monkeypatch.setattr(prefill, "square_pixels", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 64)  # of a machine that others use too
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5, 7, 9}, raising=False)
    MODEL.session(images=tiny_pictures(1) * 40)
    assert 1 <= most[0] <= 3


def test_the_cache_has_exactly_the_room_it_needs():
    album = MODEL.session(images=tiny_pictures(5))
    for layer in album.state:
        if isinstance(layer, AttentionState):
            assert layer.buffer.keys_BSGK.shape[1] == layer.n_tokens() == album.n_tokens


def test_a_program_without_a_console_reads_pictures(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert MODEL.session(images=tiny_pictures(1)).n_images == 1


def test_a_bad_picture_is_named_and_no_thread_stays():
    with pytest.raises(InputError, match=r"^image 71 of 100: gone\.png: no such file$"):
        MODEL.generate("a", [*tiny_pictures(1) * 70, "gone.png", *tiny_pictures(1) * 29])
    assert not decoders()


def test_closing_a_stream_leaves_no_thread():
    stream = MODEL.generate("a", tiny_pictures(3), stream=True, max_new_tokens=30)
    next(stream)
    stream.close()
    assert not decoders()


def test_an_unread_stream_has_checked_its_prompt():
    with pytest.raises(InputError, match="2 <image> marks, but the number of images given is 1"):
        MODEL.generate("<image><image>", tiny_pictures(1), stream=True)
    MODEL.generate("a", ["gone.png"], stream=True).close()


def test_tokens_per_image_changes_the_length():
    model = tiny_model()
    model.tokens_per_image = 16
    few, many = MODEL.session(images=tiny_pictures(3)), model.session(images=tiny_pictures(3))
    assert many.n_tokens - few.n_tokens == 3 * 12
    assert model.generate("a", tiny_pictures(3), max_new_tokens=4) != MODEL.generate(
        "a", tiny_pictures(3), max_new_tokens=4
    )


def test_text_only_models_answer_and_refuse_pictures():
    model = tiny_model(encoder=None, bridge=None)
    assert isinstance(model.generate("a", max_new_tokens=2), str)
    with pytest.raises(InputError, match="reads text only"):
        model.generate("a", tiny_pictures(1))


def test_the_bar_appears_only_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(prefill, "BAR_AFTER", 0)
    MODEL.session(images=tiny_pictures(2))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(prefill.sys.stderr, "isatty", lambda: True, raising=False)
    MODEL.session(images=tiny_pictures(2))
    assert "reading" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_chunk_tokens_must_be_a_count(value):
    with pytest.raises(InputError, match="chunk_tokens: got"):
        MODEL.generate("a", chunk_tokens=value)


def test_results_carry_no_gradient_history():
    album = MODEL.session(images=tiny_pictures(2))
    assert not any(t.requires_grad for layer in album.state if not isinstance(layer, AttentionState) for t in layer)
    assert torch.is_grad_enabled()


def test_pixels_that_are_ready_stand_for_their_pictures(monkeypatch):
    """uint8 tensors of the encoder's size, one by one, mixed with files, or all in one."""
    pictures = tiny_pictures(3)
    pixels = [prefill.square_pixels(p, 16, MODEL.model.config.encoder.mean) for p in pictures]
    expected = MODEL.session(images=pictures)
    for images in (pixels, torch.stack(pixels), [pictures[0], pixels[1], pictures[2]]):
        found = MODEL.session(images=images)
        for layer, truth in zip(found.state, expected.state):
            if not isinstance(layer, AttentionState):
                assert torch.allclose(layer.scan_BEN, truth.scan_BEN, atol=1e-5)
    with pytest.raises(InputError, match=r"image 2: got a tensor of torch.uint8 \(3, 15, 16\)"):
        MODEL.session(images=[pixels[0], pixels[0][:, :15]])


@pytest.mark.gpu
def test_on_a_gpu_the_encoder_runs_beside_and_reads_the_same():
    gpu = tiny_model()
    gpu.model.to("cuda")
    pictures = tiny_pictures(5) * 40
    truth, found = MODEL.session(images=pictures), gpu.session(images=pictures, chunk_tokens=64)
    for layer, expected in zip(found.state, truth.state):
        if not isinstance(layer, AttentionState):
            assert torch.allclose(layer.scan_BEN.cpu(), expected.scan_BEN, atol=1e-3)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 16), torch.zeros(3, 16, 16, dtype=torch.uint8)])
def test_tensors_without_values_are_no_image(tensor):
    for without in (tensor.to("meta"), tensor.to_sparse()):
        with pytest.raises(InputError, match=r"image 2: got a tensor of .*, sparse or on meta, expected floats"):
            MODEL.generate("what", [torch.zeros(4, 16), without], max_new_tokens=1)
