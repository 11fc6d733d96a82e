"""Many questions on one prefix, as one batch: the prefix is read by all rows and copied by none. Or many prompts, each
read by itself, that are answered together.

Shapes: B rows, L tokens of the longest question, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longllava.errors import InputError
from longllava.generation.decoding import is_static, static_tokens
from longllava.generation.prefill import Reader
from longllava.generation.sampling import Sampling, next_tokens
from longllava.generation.streaming import TextStream
from longllava.inputs.processor import Encoded
from longllava.nn import Context, State, fork_state, join_states

PADDING = -1  # seq_idx of tokens that no layer may see


@contextlib.contextmanager
def numbered(kind: str, number: int, total: int) -> Iterator[None]:
    """Errors inside name which of several it is: "prompt 3 of 8: image 1 of 2: no such file"."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{kind} {number} of {total}: {error}") from None


def answer_prompts(
    reader: Reader, rows: Sequence[tuple[Encoded, Sequence[Any]]], sampling: Sampling, batch_size: int
) -> list[str]:
    """Answers to prompts (tokens and their image sources), each row as if it were alone."""
    answers: list[str] = []
    for first in range(0, len(rows), batch_size):
        states: list[State] = []
        last_1D: list[Tensor] = []
        for number, (encoded, sources) in enumerate(rows[first : first + batch_size], first + 1):
            with numbered("prompt", number, len(rows)):
                hidden_1D, state = reader.read(encoded, sources, reader.empty_state(len(encoded.ids)), 0)
            states.append(state)
            last_1D.append(hidden_1D)
        length_B = torch.tensor(
            [len(encoded.ids) for encoded, _ in rows[first : first + batch_size]], device=reader.device
        )
        reader.check_room(int(length_B.max()) + sampling.max_new_tokens, len(states))
        with torch.inference_mode():
            state = join_states(states, sampling.max_new_tokens)
            answers += decode_many(reader, torch.cat(last_1D), state, length_B, sampling)
    return answers


@torch.inference_mode()
def answer_many(reader: Reader, prefix: State, start: int, rows: list[list[int]], sampling: Sampling) -> list[str]:
    """Answers to questions as token ids, each row as if it were alone. start: tokens in the prefix."""
    model, tokenizer, device = reader.model, reader.processor.tokenizer, reader.device
    n_rows, longest = len(rows), max(map(len, rows))
    length_B = torch.tensor([len(row) for row in rows], device=device)
    if start:
        reader.check_room(longest + sampling.max_new_tokens, n_rows)
        state = fork_state(prefix, longest + sampling.max_new_tokens, n_rows)
    else:
        state = reader.empty_state(longest + sampling.max_new_tokens, n_rows)
    ids_BL = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows], device=device)
    at_L = torch.arange(longest, device=device)
    last_BD = torch.zeros(n_rows, model.config.backbone.width, device=device, dtype=reader.dtype)
    for begin in range(0, longest, reader.chunk):
        place_L = at_L[begin : begin + reader.chunk]
        seq_idx_BL = torch.where(place_L < length_B[:, None], 0, PADDING).int()
        ctx = Context(seq_idx_BL, (start + place_L).expand(n_rows, -1))
        hidden_BLD, state = model(model.embed(ids_BL[:, place_L]), ctx, state)
        ends_B = (length_B > begin) & (length_B <= begin + len(place_L))
        last_BD[ends_B] = hidden_BLD[ends_B, length_B[ends_B] - 1 - begin].to(last_BD.dtype)
    return decode_many(reader, last_BD, state, start + length_B, sampling)


def decode_many(reader: Reader, last_BD: Tensor, state: State, next_B: Tensor, sampling: Sampling) -> list[str]:
    """next_B: the position of each row's next token. Rows that are done go on as padding."""
    model, tokenizer, device = reader.model, reader.processor.tokenizer, reader.device
    n_rows = len(last_BD)
    texts = [TextStream(tokenizer, sampling.stop_strings()) for _ in range(n_rows)]
    generators = [sampling.generator() for _ in range(n_rows)]
    answers = [""] * n_rows
    going = [True] * n_rows

    def take(tokens: list[int]) -> bool:
        """Add each row's token to its answer; whether any row goes on."""
        for row, token in enumerate(tokens):
            if going[row] and token != tokenizer.eos_id:
                answers[row] += texts[row].push(token)
            going[row] = going[row] and token != tokenizer.eos_id and not texts[row].done
        return any(going)

    if is_static(reader, n_rows):
        for tokens in static_tokens(reader, last_BD, state, next_B, sampling, generators):
            if not take(tokens):
                break
        return [answer + text.finish() for answer, text in zip(answers, texts)]
    for number in range(sampling.max_new_tokens):
        tokens = next_tokens(reader.logits(last_BD), sampling, generators).tolist()
        if not take(tokens) or number + 1 == sampling.max_new_tokens:
            break
        seq_idx_B1 = torch.tensor([[0 if row else PADDING] for row in going], dtype=torch.int32, device=device)
        ctx = Context(seq_idx_B1, (next_B + number)[:, None])
        hidden_B1D, state = model(model.embed(torch.tensor(tokens, device=device)[:, None]), ctx, state)
        last_BD = hidden_B1D[:, 0]
    return [answer + text.finish() for answer, text in zip(answers, texts)]
