"""Features of a frozen encoder, computed once per picture and kept on disk for later steps, stages and runs.

One file of equal records per (encoder, tokens an image, pooling), and a list of what each record is of:
  features.bin  record i: (M, C) bfloat16     keys.txt  line i: the picture
Both only grow. A record is flushed before its line is written, so a line always has its record; a lock lets
several runs share a cache. Where a crash of the machine left a line without its record, both are dropped.
Shapes: N pictures, M tokens after pooling, C width of the encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longllava.bridges.pool import pool_features
from longllava.data.cache import cache_folder
from longllava.data.embedded import file_of, place_in_table
from longllava.data.images import open_picture, under
from longllava.data.worlds.pictures import PREFIX
from longllava.data.worlds.sheets import STYLES
from longllava.errors import InputError
from longllava.files import naming, where_there_are_locks
from longllava.inputs.processor import Processor
from longllava.model import Model

BATCH = 64


def picture_key(reference: str) -> str:
    """What a record is known by, in one line: files by path, size and time, which world references have as well where
    they name a sheet of one's own; else they describe themselves."""
    key, picture = reference, under(reference)
    with contextlib.suppress(OSError):  # opening it will say what is wrong
        if picture.startswith(PREFIX):
            styles = {part.partition("@")[2] for part in picture.split("|")}  # of a grid several
            key = " ".join((reference, *map(marked, sorted(styles - {"", *STYLES}))))
        else:
            path = file_of(picture)
            key = f"{reference[: -len(path)]}{marked(path)}"
    return key.replace("\\", "\\\\").replace("\n", "\\n")


def marked(path: str) -> str:
    status = os.stat(path)
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"


class FeatureCache:
    """Records of one encoder.

    encode: list of references -> (N, M, C) float tensor. fingerprint: of the encoder's weights and settings.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Tensor],
        *,
        fingerprint: str,
        tokens: int,
        width: int,
        folder: Path | None = None,
    ):
        self.encode, self.shape = encode, (tokens, width)
        name = hashlib.sha256(f"{fingerprint} {tokens} {width}".encode()).hexdigest()[:16]
        self.folder = (folder or cache_folder()) / f"features-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data, self.keys = self.folder / "features.bin", self.folder / "keys.txt"
        self.record = tokens * width * 2
        self.rows: dict[str, int] = {}
        self.n_records = self.n_read = 0  # records, and bytes of their lines
        self.map: np.ndarray | None = None
        with self.locked():
            self.read_keys()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time. Where there are no such locks, runs must not share a cache."""
        with (self.folder / "lock").open("w") as file:
            with where_there_are_locks():
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read_keys(self) -> None:
        """Lines added since the last call; a torn last line, and lines without a whole record, are cut off."""
        for path in (self.data, self.keys):
            path.touch()
        n_whole = self.data.stat().st_size // self.record
        if n_whole < self.n_records or self.keys.stat().st_size < self.n_read:  # they were cut off, or begun anew
            self.rows, self.n_records, self.n_read = {}, 0, 0
        with self.keys.open("rb") as file:
            file.seek(self.n_read)
            text = file.read()
        lines = text.split(b"\n")[:-1]  # not splitlines: a path may hold other line breaks
        lines = lines[: n_whole - self.n_records]
        whole = sum(map(len, lines)) + len(lines)
        if whole < len(text):
            os.truncate(self.keys, self.n_read + whole)
        self.rows |= {os.fsdecode(line): row for row, line in enumerate(lines, self.n_records)}
        self.n_records += len(lines)
        self.n_read += whole
        self.map = None  # of the records so far: others write too, and a run may meet theirs without any of its own

    def missing(self, references: Sequence[str]) -> list[str]:
        return [reference for reference in dict.fromkeys(references) if picture_key(reference) not in self.rows]

    def fill(self, references: Sequence[str], show: Callable[[int, int], None] | None = None) -> int:
        """Encode the pictures that are not there yet. show(done, of). Returns how many were encoded."""
        wanted = self.missing(references)
        if wanted:
            with self.locked():
                self.read_keys()
            wanted = sorted(self.missing(wanted), key=lambda reference: place_in_table(under(reference)))
        for at in range(0, len(wanted), BATCH):
            batch = wanted[at : at + BATCH]
            keys = [picture_key(reference) for reference in batch]  # one may be written anew while it is encoded
            self.append(keys, self.encode(batch))
            if show is not None:
                show(min(at + BATCH, len(wanted)), len(wanted))
        return len(wanted)

    def append(self, keys: Sequence[str], features_NMC: Tensor) -> None:
        values = features_NMC.detach().to("cpu", torch.bfloat16).contiguous()
        assert values.shape == (len(keys), *self.shape), (values.shape, self.shape)
        with self.locked():
            self.read_keys()
            with naming(self.data), self.data.open("r+b") as file:
                file.seek(self.n_records * self.record)
                file.write(values.view(torch.int16).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            with naming(self.keys), self.keys.open("ab") as file:
                file.write(os.fsencode("".join(key + "\n" for key in keys)))
            self.read_keys()

    def get(self, references: Sequence[str]) -> Tensor:
        """(N, M, C) bfloat16 of pictures that are in the cache."""
        if self.map is None and self.n_records:
            shape = (self.n_records, *self.shape)
            self.map = np.memmap(self.data, dtype=np.int16, mode="r", shape=shape)
        rows = [self.rows[picture_key(reference)] for reference in references]
        if not rows or self.map is None:
            return torch.zeros(0, *self.shape, dtype=torch.bfloat16)
        return torch.from_numpy(self.map[rows]).view(torch.bfloat16)


def encoder_cache(
    model: Model,
    processor: Processor,
    *,
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> FeatureCache:
    """The cache of a model's frozen encoder, pooled to `tokens`. dtype: of matrix products, over fp32 weights.

    Equal encoders share a cache, whatever models they are part of. Raises: InputError for a model of text.
    """
    encoder, bridge = model.config.encoder, model.config.bridge
    if model.encoder is None or encoder is None or bridge is None:
        raise InputError(f"model {model.config.name!r} reads text only; it has no encoder for images")

    def encode(references: Sequence[str]) -> Tensor:
        return encode_references(references, model, processor, tokens=tokens, device=device, dtype=dtype)

    mark = f"{fingerprint(model.encoder.state_dict().items())} {encoder} {bridge.pool} {dtype}"
    return FeatureCache(encode, fingerprint=mark, tokens=tokens, width=encoder.width, folder=folder)


def encode_references(
    references: Sequence[str],
    model: Model,
    processor: Processor,
    *,
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Open, encode and pool pictures: (N, M, C)."""
    assert model.config.bridge is not None
    pixels_N3SS = processor.pixels([open_picture(reference) for reference in references])
    with torch.no_grad(), torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        return pool_features(model.encode(pixels_N3SS.to(device)), tokens, model.config.bridge.pool)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: whether frozen parts stayed as they were."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().to("cpu").contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()
