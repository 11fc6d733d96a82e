"""Keys and values in int8: what is stored is half a step from the floats, whatever cut, forked, joined or saved it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from longllava import LongLLaVA
from longllava.errors import CheckpointError, InputError
from longllava.nn import attention as attention_module
from longllava.nn.attention import attend_segments
from longllava.nn.cache import AttentionState, Segment
from longllava.ops.attention import attention
from longllava.ops.int8_linear import quantize_rows
from tests.tiny import tiny_model, tiny_pictures

TINY = tiny_model(3)
INT8 = LongLLaVA(TINY.model, TINY.tokenizer, kv_dtype="int8")
DEVICE = torch.device("cpu")


def rounded(x: torch.Tensor) -> torch.Tensor:
    return quantize_rows(x).dequantized()


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), fork_at=st.integers(0, 4), block=st.integers(1, 9),
    batch=st.sampled_from([1, 3]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_attention_is_that_of_the_rounded_keys_and_values(lengths, fork_at, block, batch, dtype):
    torch.manual_seed(sum(lengths))
    total = sum(lengths)
    q, k, v = (torch.randn(batch, total, heads, 8).to(dtype) for heads in (4, 2, 2))
    expected = attention(q, rounded(k), rounded(v)).float()
    empty = AttentionState.empty(batch, 4, 2, 8, DEVICE, torch.int8)
    state, at, got = empty, 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "INT8_BLOCK", block)
        for number, length in enumerate(lengths):
            if number == fork_at:
                state = state.fork(2)
            here = slice(at, at + length)
            state = state.append(k[:, here], v[:, here], None)
            got.append(attend_segments(q[:, here], state, None))
            at += length
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.cat(got, 1).float(), expected, rtol=tolerance, atol=tolerance)
    assert state.n_tokens() == total
    assert all(segment.keys_BSGK.dtype == torch.int8 for segment in state.segments())


@pytest.mark.parametrize("block", [2, 8192])
def test_rows_with_padding_see_their_own_tokens(block, monkeypatch):
    """With blocks of 2 a query of padding sees nothing in one block after the other."""
    monkeypatch.setattr(attention_module, "INT8_BLOCK", block)
    k, v, q = (torch.randn(2, 9, heads, 8) for heads in (2, 2, 4))
    index = torch.tensor([[0] * 9, [0] * 5 + [-1] * 4], dtype=torch.int32)
    state = AttentionState.empty(2, 9, 2, 8, DEVICE, torch.int8).append(k[:, :6], v[:, :6], index[:, :6])
    state = state.append(k[:, 6:], v[:, 6:], index[:, 6:])
    got = attend_segments(q[:, 6:], state, index[:, 6:])
    expected = attention(q, rounded(k), rounded(v), seq_idx_q=index, seq_idx_k=index)[:, 6:]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got[1] == 0).all()


def test_joined_and_expanded_states_hold_the_same_numbers():
    parts = [torch.randn(2, 1, n, 2, 8) for n in (3, 5)]
    states = [AttentionState.empty(1, 2, 2, 8, DEVICE, torch.int8).append(k, v, None).fork(1) for k, v in parts]
    joined = AttentionState.join(states, capacity=4)
    (segment,) = joined.segments()
    floats = segment.dequantized(torch.float32)
    for row, (k, v) in enumerate(parts):
        assert torch.equal(floats.keys_BSGK[row, : k.shape[1]], rounded(k)[0])
        assert torch.equal(floats.values_BSGK[row, : k.shape[1]], rounded(v)[0])
    assert segment.seq_idx_BS.tolist() == [[0, 0, 0, -1, -1], [0] * 5]
    assert not floats.keys_BSGK[0, 3:].any()
    expanded = states[1].fork(2, batch=3).segments()[0]
    assert expanded.key_scale_BSG.shape == (3, 5, 2) and expanded.key_scale_BSG.stride(0) == 0
    again = expanded.quantized()
    assert again.keys_BSGK is expanded.keys_BSGK  # not quantised a second time
    assert Segment(*parts[0][:, :], None).dequantized(torch.float32).keys_BSGK is not None


def test_reading_in_chunks_is_reading_at_once():
    pictures = tiny_pictures(5)
    hidden = []
    for chunk in (1, 7, 10**6):
        session = INT8.session(images=pictures, text="what is this red heart?" * 3, chunk_tokens=chunk)
        hidden.append((session.score("what is this", "a red heart").log_probabilities, session))
    for scores, _ in hidden[1:]:
        assert scores == pytest.approx(hidden[0][0], abs=2e-3)
    state = hidden[0][1].state[1]
    assert isinstance(state, AttentionState) and state.buffer.keys_BSGK.dtype == torch.int8
    floats = TINY.session(images=pictures, text="what is this red heart?" * 3).score("what is this", "a red heart")
    assert floats.log_probabilities == pytest.approx(hidden[0][0], abs=0.1)
    assert floats.log_probabilities != hidden[0][0]


def test_many_questions_are_each_alone():
    session = INT8.session(images=tiny_pictures(3))
    questions = ["what is this?", "a red heart", "of the", "is this the red heart of the red heart?"]
    assert session.ask_many(questions, max_new_tokens=6) == [session.ask(q, max_new_tokens=6) for q in questions]
    prompts = ["what is this?", "is this the red heart of"]
    assert INT8.generate_batch(prompts, max_new_tokens=6) == [INT8.generate(p, max_new_tokens=6) for p in prompts]


def test_sessions_are_forked_saved_and_read_again(tmp_path):
    session = INT8.session(images=tiny_pictures(2))
    fork = session.fork()
    fork.append(images=tiny_pictures(1, seed=5))
    for _ in range(10):  # more segments than are kept apart
        fork.append(images=tiny_pictures(1, seed=6))
    fork.ask("a red heart?", keep=True, max_new_tokens=3)
    for number, one in enumerate((session, fork)):
        path = one.save(tmp_path / f"{number}.session")
        again = INT8.load_session(path)
        assert again.score("what is this?", "a heart") == one.score("what is this?", "a heart")
        kinds = {name.split(".")[-1]: tensor.dtype for name, tensor in load_file(path).items()}
        assert kinds["keys"] == kinds["values"] == torch.int8
        assert kinds["key_scales"] == kinds["value_scales"] == torch.float32


def test_a_session_of_the_other_kind_is_refused(tmp_path):
    path = INT8.session(images=tiny_pictures(1)).save(tmp_path / "a.session")
    with pytest.raises(CheckpointError, match="keys and values are in int8, this model is asked for the model's dtype"):
        TINY.load_session(path)
    path = TINY.session(images=tiny_pictures(1)).save(tmp_path / "b.session")
    with pytest.raises(CheckpointError, match="in the model's dtype, this model is asked for int8; load the model"):
        INT8.load_session(path)
    with pytest.raises(InputError, match="kv_dtype: got 'int4', allowed: int8, or None"):
        LongLLaVA(TINY.model, TINY.tokenizer, kv_dtype="int4")


def test_an_answer_on_static_states_reads_an_int8_prefix():
    from longllava.generation.decoding import static_tokens
    from longllava.generation.sampling import Sampling
    from longllava.inputs.processor import Encoded

    reader = INT8.session().reader
    hidden_1D, state = reader.read(Encoded(list(range(300, 320))), (), reader.empty_state(20), 0)
    steps = static_tokens(reader, hidden_1D, state, torch.tensor([20]), Sampling(max_new_tokens=5), [])
    session = dataclasses.replace(reader, int8_cache=False)
    hidden_float, state_float = session.read(Encoded(list(range(300, 320))), (), session.empty_state(20), 0)
    floats = static_tokens(session, hidden_float, state_float, torch.tensor([20]), Sampling(max_new_tokens=5), [])
    assert list(steps) == list(floats)
