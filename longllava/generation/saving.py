"""A session as one safetensors file: the state's tensors, and JSON about the model and what waits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longllava.errors import CheckpointError
from longllava.files import expanded, make_folder, sync, unfinished
from longllava.generation.content import Content, compact
from longllava.generation.prefill import Reader
from longllava.inputs.chat import Markup, Piece, Plain
from longllava.model import Model
from longllava.nn import AttentionState, MambaState, State
from longllava.nn.cache import Segment
from longllava.settings import whole_number

if TYPE_CHECKING:
    from longllava.generation.session import Session

FORMAT = "longllava-session-1"
WAITING = {"markup": Markup, "plain": Plain}  # images never wait: they are read when they are appended
KEPT = ("fps", "max_frames", "tiles")  # how media are read; hosts that may be asked are said anew in each process
SAMPLES = 16  # values of each weight that enter the fingerprint


def fingerprint(model: Model) -> str:
    """Which model made a state: its settings and a few values of every weight, hashed.

    The dtype counts too. A few values are enough to tell trained weights apart, and take no time at 53 B.
    """
    settings = dataclasses.asdict(model.config)
    if settings["int8"]:
        settings["int8"]["scan_epilogue"] = False  # changes no bit, and a folder is loaded without it
        if not settings["int8"]["rotated"]:
            del settings["int8"]["rotated"]  # as in sessions of before there was the word
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].double().cpu()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save(session: Session, path: str | Path) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = expanded(path)
    if os.path.isdir(path):  # not path.is_dir, which raises where a name is too long
        raise CheckpointError(f"{path}: it is a folder; name a file to save the session in")
    state, n_tokens, n_images, pieces = session.content
    tensors = tensors_of(state)
    waiting = [piece for piece in pieces if isinstance(piece, (Markup, Plain))]
    about = {
        "format": FORMAT,
        "model": session.reader.model.config.name,
        "fingerprint": fingerprint(session.reader.model),
        "tokens_per_image": session.reader.tokens_per_image,
        "int8_cache": session.reader.int8_cache,
        "reading": {name: getattr(session.reader.options, name) for name in KEPT},
        "n_tokens": n_tokens,
        "n_images": n_images,
        "waiting": [["markup" if isinstance(piece, Markup) else "plain", piece.text] for piece in waiting],
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }  # fmt: skip
    staged = unfinished(path)
    try:
        make_folder(path.parent)
        try:
            staged.touch(exist_ok=False)
            mode = staged.stat().st_mode  # what the umask leaves; safetensors makes files that are closed to others
            save_file(tensors, staged, metadata={"session": json.dumps({**about, "checksum": checksum_of(about)})})
            os.chmod(staged, mode)
            with staged.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:  # of an interrupt too
            staged.unlink(missing_ok=True)
    except (SafetensorError, OSError) as error:  # a full disk, a name too long
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be written: {' '.join(str(reason).split())}") from None
    sync(path.parent)
    return path


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, which are not copied: against broken disks, for which it is enough and fast.

    250 MB on one core of a Zen 3: 0.10 s; sha256 0.17 (with its instructions), blake2b 0.41.
    """
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def checksum_of(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about).encode())


def tensors_of(state: State) -> dict[str, Tensor]:
    """All tensors of a batch-1 state by name; keys and values in their segments, without a copy."""
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(state):
        if isinstance(layer, MambaState):
            tensors |= {f"{number}.conv": layer.conv_BKE, f"{number}.scan": layer.scan_BEN}
        else:
            parts = [segment for segment in layer.segments() if segment.keys_BSGK.shape[1]]
            for part, segment in enumerate(parts):
                tensors |= {f"{number}.{part}.{kind}": tensor for kind, tensor in stored(segment).items()}
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def stored(segment: Segment) -> dict[str, Tensor]:
    """What a file holds of a segment; a batch of one has no padding."""
    kept = {"keys": segment.keys_BSGK, "values": segment.values_BSGK}
    if segment.key_scale_BSG is not None and segment.value_scale_BSG is not None:
        kept |= {"key_scales": segment.key_scale_BSG, "value_scales": segment.value_scale_BSG}
    return kept


def load_into_(session: Session, path: str | Path, asked: Collection[str]) -> Session:
    """Fill a fresh session from a file. asked: options of reading that the session has of the caller, not of the file.

    Raises: CheckpointError for a torn file or another model's.
    """
    from safetensors import SafetensorError, safe_open

    path = expanded(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such session file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get("session", "{}"))
            if isinstance(about, dict) and about.pop("checksum", None) not in (None, checksum_of(about)):
                raise ValueError("its metadata differ from when it was saved")
            check_origin(about, session.reader, path)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    try:
        for name, expected in dict(about.get("checksums", {})).items():  # none in files of earlier versions
            if name in tensors and checksum(tensors[name]) != expected:
                raise ValueError(f"the bytes of tensor {name} differ from when it was saved; read the pictures again")
        for name in ("n_tokens", "n_images"):
            if whole_number(about[name]) is None or about[name] < 0:
                raise ValueError(f"{name}: got {about[name]!r}, expected a whole number that is not negative")
        state = state_from(tensors, session.reader, about["n_tokens"])
        kept = {name: value for name, value in dict(about.get("reading", {})).items()  # none in earlier versions'
                if name in KEPT and name not in asked}  # fmt: skip
        options = dataclasses.replace(session.reader.options, **kept)
        session.reader = dataclasses.replace(session.reader, options=options)
        waiting = [waiting_piece(*row) for row in about["waiting"]]
        session.content = Content(compact(state), about["n_tokens"], about["n_images"], waiting)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged session file: {error}") from None
    return session


def check_origin(about: Any, reader: Reader, path: Path) -> None:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a session file of this version (expected format {FORMAT})")
    if about.get("fingerprint") != fingerprint(reader.model):
        raise CheckpointError(
            f"{path}: made by another model ({about.get('model')}), or in another dtype; load that model, or"
            " read the pictures again"
        )
    if about.get("int8_cache", False) != reader.int8_cache:
        kinds = {True: "int8", False: "the model's dtype"}
        raise CheckpointError(
            f"{path}: its keys and values are in {kinds[not reader.int8_cache]}, this model is asked for"
            f" {kinds[reader.int8_cache]}; load the model with the same kv_dtype"
        )
    bridge = reader.model.config.bridge
    usual = bridge.tokens_per_image if bridge else None  # what None asks for
    if (about.get("tokens_per_image") or usual) != (reader.tokens_per_image or usual):
        raise CheckpointError(
            f"{path}: made with tokens_per_image={about.get('tokens_per_image')}, this model has"
            f" {reader.tokens_per_image}; load the model with the same"
        )


def waiting_piece(kind: str, text: str) -> Piece:
    if not isinstance(text, str):
        raise TypeError(f"a waiting text is {type(text).__name__}")
    return WAITING[kind](text)


def state_from(tensors: dict[str, Tensor], reader: Reader, n_tokens: int) -> State:
    """Raises: ValueError, KeyError when tensors are missing or of the wrong shape."""
    state: State = []
    for number, layer in enumerate(reader.empty_state(0)):
        if isinstance(layer, MambaState):
            named = (tensors.pop(f"{number}.conv"), tensors.pop(f"{number}.scan"))
            for tensor, like in zip(named, layer):
                check_like(tensor, like, f"layer {number}", tuple(like.shape))
            state.append(MambaState(*(tensor.to(like.device) for tensor, like in zip(named, layer))))
            continue
        assert isinstance(layer, AttentionState)
        segments: list[Segment] = []
        while f"{number}.{len(segments)}.keys" in tensors:
            expected = stored(layer.buffer.segment(0))
            found = {kind: tensors.pop(f"{number}.{len(segments)}.{kind}") for kind in expected}
            for kind, like in expected.items():
                check_like(found[kind], like, f"layer {number}", (1, found["keys"].shape[1], *like.shape[2:]))
                found[kind] = found[kind].to(like.device)
            scales = [found.get(kind) for kind in ("key_scales", "value_scales")]
            segments.append(Segment(found["keys"], found["values"], None, *scales))
        loaded = AttentionState(tuple(segments), layer.buffer, 0)
        if loaded.n_tokens() != n_tokens:
            raise ValueError(f"layer {number} holds {loaded.n_tokens()} tokens, expected {n_tokens}")
        state.append(loaded)
    if tensors:
        raise ValueError(f"unexpected tensors {', '.join(sorted(tensors)[:4])}")
    return state


def check_like(tensor: Tensor, like: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {like.dtype} {shape}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: values that are not finite")
