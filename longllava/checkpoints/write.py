"""A folder of safetensors, written tensor by tensor: only one of them is in memory beside the model.

The format is safetensors' own (github.com/huggingface/safetensors, "Format"): the header's length in 8 bytes,
little-endian; the header, JSON padded to a multiple of 8; the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from longllava.checkpoints.adapters import is_adapter
from longllava.checkpoints.folders import INDEX, RECORD, UNFINISHED, WEIGHTS
from longllava.checkpoints.stored import DTYPES
from longllava.errors import CheckpointError
from longllava.files import alone_in, expanded, made_folder, naming, staged_in, sync, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD_BYTES = 5_000_000_000
SHARDS = "model-*-of-*.safetensors"
STAGED = ".saving-"
CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class Output:
    """A tensor to be written: `make` is called once, when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def n_bytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


def write_folder(
    folder: str | Path,
    outputs: Mapping[str, Output],
    write_rest: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
    replaced: Sequence[str] = (),
) -> Path:
    """Write the weights into `folder` (made if need be), and whatever `write_rest(staged folder)` writes.

    Files are complete under temporary names before the first is renamed; weights of an earlier save are removed. While
    old ones and new ones stand side by side, a folder UNFINISHED* says so, and find_folder refuses the mixture. What a
    save that was killed had staged is removed.
    replaced: names of files that an earlier model may have left, and that go where the new one has none; the record
    of how that model was trained goes always, and whoever trained this one writes it after.
    """
    folder = expanded(folder)  # as find_folder reads it
    check_place(folder)
    shards = split(outputs, shard_bytes)
    with made_folder(folder), staged_in(folder, STAGED) as staged:
        names = shard_names(len(shards))
        for name, keys in zip(names, shards):
            write_tensors(staged / name, {key: outputs[key] for key in keys})
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
            total = sum(output.n_bytes() for output in outputs.values())
            write_json(staged / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_rest(staged)
        with alone_in(folder):
            exchange(folder, staged, names, replaced)
    sync(folder)
    return folder


def check_place(folder: Path) -> None:
    """Raises: CheckpointError where no model can be written. A run of hours asks before its first step."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file of that name exists; give a folder")
    if is_adapter(folder):
        raise CheckpointError(f"{folder}: it holds an adapter, which would be read instead of the model; give another")


def exchange(folder: Path, staged: Path, names: list[str], replaced: Sequence[str]) -> None:
    """Put the staged files into their places. Left undone, it is done by moving what remains, or by saving again."""
    moving = folder / (UNFINISHED + staged.name.removeprefix(STAGED))
    os.rename(staged, moving)
    sync(folder)
    for name in (RECORD, *replaced):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(moving.iterdir(), key=lambda path: path.suffix == ".json"):
        os.replace(path, folder / path.name)
    remove_stale(folder, names)
    sync(folder)
    for old in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(old)


def split(outputs: Mapping[str, Output], shard_bytes: int) -> list[list[str]]:
    """Keys of each shard, in order, each shard at most shard_bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, output in outputs.items():
        size = output.n_bytes()
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def shard_names(n: int) -> list[str]:
    return [WEIGHTS] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def write_tensors(path: Path, outputs: Mapping[str, Output]) -> None:
    # larger items first, as safetensors writes them: every tensor then begins at a multiple of its item's size
    keys = sorted(outputs, key=lambda key: -outputs[key].dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        begin, end = end, end + outputs[key].n_bytes()
        name = str(outputs[key].dtype).removeprefix("torch.")
        if name not in CODES:
            raise CheckpointError(f"{key}: cannot be stored as {name}; allowed: {', '.join(CODES)}")
        header[key] = {"dtype": CODES[name], "shape": list(outputs[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            write_tensor(file, key, outputs[key])
        file.flush()
        os.fsync(file.fileno())


def write_tensor(file: BinaryIO, key: str, output: Output) -> None:
    import torch

    made = output.make().detach()
    tensor = made.to("cpu", output.dtype).contiguous()
    assert tuple(tensor.shape) == output.shape, f"{key}: {tuple(tensor.shape)} was announced as {output.shape}"
    if tensor.dtype != made.dtype:
        from longllava.quant import all_finite

        if all_finite(made) and not all_finite(tensor):
            raise CheckpointError(f"{key}: has values beyond what {output.dtype} holds; store it as torch.bfloat16")
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def remove_stale(folder: Path, names: list[str]) -> None:
    """Weights of an earlier save in another number of shards would be read instead of the new ones."""
    if len(names) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    for path in (*folder.glob(SHARDS), folder / WEIGHTS):
        if path.name not in names:
            path.unlink(missing_ok=True)
