"""Tensors as they lie in safetensors files: found by their headers, read one at a time.

A file is opened anew for every tensor. An open one stays mapped, and the pages that were read would count as
this process's memory until it is closed: the whole model a second time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from longllava.checkpoints.folders import INDEX, PICKLES, WEIGHTS, check_finished, listed, refusal_of_pickle
from longllava.errors import CheckpointError, ConfigError
from longllava.settings import unique_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONGEST = 255  # bytes, which no file system's names go beyond
# the format's names of dtypes, and torch's
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Stored(Protocol):
    """A tensor that can be read: shape and dtype are known before. Raises: CheckpointError on reading."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class Entry:
    """One tensor of one file. The tensor that `read` returns keeps the file mapped: copy it, and let it go."""

    file: Path
    key: str
    shape: tuple[int, ...]
    code: str
    stamp: tuple[int, ...]  # of the file whose header it is from

    @property
    def dtype(self) -> torch.dtype:
        import torch

        if self.code not in DTYPES:
            raise CheckpointError(f"{self.file}: {self.key} is stored as {self.code}; allowed: {', '.join(DTYPES)}")
        return getattr(torch, DTYPES[self.code])

    def read(self) -> Tensor:
        from safetensors import safe_open

        try:
            with safe_open(self.file, framework="pt", device="cpu") as tensors:
                tensor = tensors.get_tensor(self.key)
            check_same(self.file, self.stamp)
            return tensor
        except unreadable() as error:
            raise CheckpointError(f"{self.file}: cannot be read: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class Loaded:
    """A tensor that another library has in memory already."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor


def read_entries(path: Path) -> dict[str, Entry]:
    """All tensors of a folder, or of one .safetensors file, by name, from the headers. Raises: CheckpointError."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path.parent}: {refusal_of_pickle(path)}")
        return dict(header(path))
    index, single = path / INDEX, path / WEIGHTS
    if not index.is_file():
        if not single.is_file():
            raise CheckpointError(f"{path}: {no_weights(path)}")
        entries = dict(header(single))
        check_finished(path)  # a save may have begun since the folder was found
        return entries
    weight_map = read_index(index)
    files = {name: path / name for name in sorted(set(weight_map.values()))}
    if single.is_file() and WEIGHTS not in files:
        raise CheckpointError(f"{path}: both {WEIGHTS} and {INDEX} are there; remove the one that is not meant")
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise CheckpointError(f"{path}: missing {listed(missing)} of {len(files)} weight files; copy the folder again")
    entries = {}
    for name, file in files.items():
        found = dict(header(file))
        expected = {key for key, of_file in weight_map.items() if of_file == name}
        if expected != set(found):
            raise CheckpointError(
                f"{file}: its tensors are not those that {INDEX} lists; they differ in"
                f" {listed(sorted(expected ^ set(found)))}"
            )
        entries |= found
    check_finished(path)
    return entries


def read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys)["weight_map"]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not an index; expected JSON with a weight_map") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is not a table of tensor names to file names")
    for name in weight_map.values():
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name and ":" not in name
        plain = plain and len(name.encode("utf-8", "replace")) <= LONGEST
        if not plain or not name.isprintable() or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r:.80} is not the plain name of a .safetensors file in this folder")
    return weight_map


def stamp(path: Path) -> tuple[int, ...]:
    """Size and time: others once another file stands there. Not its inode, which some network file systems renumber."""
    try:
        found = os.stat(path)
    except OSError:  # whoever opens it says so
        return ()
    return found.st_size, found.st_mtime_ns


def check_same(path: Path, before: tuple[int, ...]) -> None:
    """Raises: CheckpointError where a file has another stamp than before: what was read is of two saves."""
    if stamp(path) != before:
        raise CheckpointError(f"{path}: was replaced while the folder was read; try again")


def header(path: Path) -> Iterator[tuple[str, Entry]]:
    from safetensors import safe_open

    try:
        opened = stamp(path)
        with safe_open(path, framework="pt", device="cpu") as tensors:
            for key in tensors.keys():
                found = tensors.get_slice(key)
                yield key, Entry(path, key, tuple(found.get_shape()), found.get_dtype(), opened)
    except unreadable() as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def unreadable() -> tuple[type[Exception], ...]:
    """What safe_open raises: it opens a file twice, and the second time torch does, which may find it gone."""
    from safetensors import SafetensorError

    return SafetensorError, OSError, RuntimeError


def no_weights(folder: Path) -> str:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    return refusal_of_pickle(pickles[0]) if pickles else f"no {WEIGHTS} or {INDEX} in it"
