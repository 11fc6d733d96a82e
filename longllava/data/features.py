"""Features of a frozen encoder, computed once per picture and kept on disk for later steps, stages and runs.

One file of equal records per (encoder, tokens an image, pooling), and a list of what each record is of:
  features.bin  record i: (M, C) bfloat16     keys.txt  line i: the picture
Both only grow. A record is flushed before its line is written, so a line always has its record; a lock lets
several runs share a cache.
Shapes: N pictures, M tokens after pooling, C width of the encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longllava.data.images import open_reference
from longllava.data.worlds.pictures import PREFIX

BATCH = 64


def cache_folder() -> Path:
    """$LONGLLAVA_CACHE, or runs/cache below the working folder."""
    return Path(os.environ.get("LONGLLAVA_CACHE") or "runs/cache")


def picture_key(reference: str) -> str:
    """What a record is known by: world references describe themselves; files by path, size and time."""
    if reference.startswith(PREFIX):
        return reference
    try:
        status = os.stat(reference)
    except OSError:
        return reference  # opening it will say what is wrong
    return f"{os.path.abspath(reference)} {status.st_size} {status.st_mtime_ns}"


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
        self.map: np.ndarray | None = None
        with self.locked():
            self.read_keys()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time. Where the system has no such lock, runs must not share a cache."""
        with (self.folder / "lock").open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            except ImportError:
                pass
            yield

    def read_keys(self) -> None:
        """Lines others have added since; a torn last line (a crash) is cut off, with its record."""
        for path in (self.data, self.keys):
            path.touch()
        text = self.keys.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.keys, len(whole))
        lines = whole.decode("utf-8").splitlines()
        self.rows = {line: row for row, line in enumerate(lines)}
        self.n_records = len(lines)

    def missing(self, references: Sequence[str]) -> list[str]:
        return [
            reference for reference in dict.fromkeys(references) if picture_key(reference) not in self.rows
        ]

    def fill(self, references: Sequence[str], show: Callable[[int, int], None] | None = None) -> int:
        """Encode the pictures that are not there yet. show(done, of). Returns how many were encoded."""
        wanted = self.missing(references)
        if wanted:
            with self.locked():
                self.read_keys()
            wanted = self.missing(wanted)
        for at in range(0, len(wanted), BATCH):
            batch = wanted[at : at + BATCH]
            self.append(batch, self.encode(batch))
            if show is not None:
                show(min(at + BATCH, len(wanted)), len(wanted))
        return len(wanted)

    def append(self, references: Sequence[str], features_NMC: Tensor) -> None:
        values = features_NMC.detach().to("cpu", torch.bfloat16).contiguous()
        assert values.shape == (len(references), *self.shape), (values.shape, self.shape)
        with self.locked():
            self.read_keys()
            with self.data.open("r+b") as file:
                file.seek(self.n_records * self.record)
                file.write(values.view(torch.int16).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            with self.keys.open("ab") as file:
                file.write("".join(picture_key(reference) + "\n" for reference in references).encode("utf-8"))
            self.read_keys()
        self.map = None

    def get(self, references: Sequence[str]) -> Tensor:
        """(N, M, C) bfloat16 of pictures that are in the cache."""
        if self.map is None and self.n_records:
            shape = (self.n_records, *self.shape)
            self.map = np.memmap(self.data, dtype=np.int16, mode="r", shape=shape)
        rows = [self.rows[picture_key(reference)] for reference in references]
        if not rows or self.map is None:
            return torch.zeros(0, *self.shape, dtype=torch.bfloat16)
        return torch.from_numpy(self.map[rows]).view(torch.bfloat16)


def encode_references(
    references: Sequence[str],
    encoder: Callable[[Tensor], Tensor],
    pixels: Callable[..., Tensor],
    pool: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Open, encode and pool pictures: (N, M, C). pixels: Processor.pixels."""
    pixels_N3SS = pixels([open_reference(reference) for reference in references])
    with torch.no_grad(), torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        return pool(encoder(pixels_N3SS.to(device)))
