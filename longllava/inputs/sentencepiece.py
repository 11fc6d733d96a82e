"""A SentencePiece model (tokenizer.model) as a tokenizer.json: what folders of LongLLaVA and Jamba may carry instead.

The file is a protocol buffer of a few fields, read here, so that neither protobuf nor sentencepiece is needed.
Sources: github.com/google/sentencepiece, src/sentencepiece_model.proto (fields) and src/bpe_model.cc (a pair is
merged when their joined text is a piece, the highest score first); protobuf.dev, "Encoding" (the wire format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

BPE = 2  # trainer_spec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces
SPACE = "▁"


def tokenizer_json(data: bytes) -> str:
    """The text of a tokenizer.json that encodes as the model does, each text with its space in front.

    Raises: ValueError for what is no such model, or one of a kind that is not BPE.
    """
    import tokenizers
    from tokenizers import decoders, models

    pieces, trainer, normal = parts(data)
    alone = [text for text, _, kind in pieces if kind == USER_DEFINED]  # no merge takes them
    other = any(kind == UNUSED for _, _, kind in pieces) or any(len(text) > 1 for text in alone)
    if trainer.get(3, 1) != BPE or trainer.get(24) or other:
        raise ValueError("it is not a plain BPE model with spaces in front of words, the only kind that is converted")
    names = [text for text, _, _ in pieces]
    ids = {text: number for number, text in enumerate(names)}
    if len(ids) != len(names):
        raise ValueError("a piece stands in it twice")
    unknown = [text for text, _, kind in pieces if kind == UNKNOWN]
    backend = tokenizers.Tokenizer(
        models.BPE(ids, merges(pieces), unk_token=unknown[0] if unknown else None, fuse_unk=True,
                   byte_fallback=bool(trainer.get(35, 0)))
    )  # fmt: skip
    backend.normalizer = normalizer(normal)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if normal.get(3, 1) else [])])
    backend.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    return backend.to_str()


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best third first."""
    known = {text: score for text, score, kind in pieces if kind == NORMAL}
    best_first = sorted(known, key=lambda text: -known[text])
    return [(text[:cut], text[cut:]) for text in best_first
            for cut in range(1, len(text)) if text[:cut] in known and text[cut:] in known]  # fmt: skip


def normalizer(spec: dict[int, Any]) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec[2])] if spec.get(2) else []
    if spec.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.get(3, 1):  # add_dummy_prefix
        steps += [normalizers.Prepend(SPACE)]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def parts(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Pieces (text, score, type), and the fields of trainer_spec and normalizer_spec by number."""
    pieces: list[tuple[str, float, int]] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in fields(data):
        if number == 1:
            piece = dict(fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece.get(1, b"").decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number in specs:
            specs[number] = dict(fields(value))
    if not pieces:
        raise ValueError("there are no pieces in it")
    return pieces, specs[2], specs[3]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: whole numbers as int, all else as bytes."""
    if not isinstance(message, bytes):
        raise ValueError("a number stands where a message should")
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 0:
            value, at = varint(message, at)
            yield key >> 3, value
            continue
        size, at = varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}.get(key & 7, len(message)), at)
        if at + size > len(message):
            raise ValueError("it is torn")
        yield key >> 3, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            raise ValueError("it is torn")
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    raise ValueError("a number in it has no end")
