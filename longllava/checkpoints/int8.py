"""Int8 in model folders: weights quantised while they are read, folders that hold them, and the list of what they hold.

A folder of int8 weights is in our own layout. config.json says so under "int8"; int8.json lists the size and the
SHA-256 of each file of weights, because damage in int8 weights makes no NaN that would give it away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.folders import CONFIG, listed
from longllava.checkpoints.names import Source
from longllava.checkpoints.stored import Stored, read_entries
from longllava.config import Int8Config, ModelConfig
from longllava.errors import CheckpointError
from longllava.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longllava.model import Model
    from longllava.quant import Place

MANIFEST = "int8.json"
PIECE = 1 << 24


def int8_config(config: ModelConfig, folder: Path, asked: Int8Config | None) -> ModelConfig:
    """What a folder is loaded as. Raises: CheckpointError where config.json, the weights and the wish disagree."""
    import torch

    stored = any(entry.dtype == torch.int8 for entry in read_entries(folder).values())
    if config.int8 is None:
        if stored:
            raise CheckpointError(f"{folder}: its weights are int8, but {CONFIG} does not say how; copy it again")
        return config if asked is None else dataclasses.replace(config, int8=asked.chosen())
    if not stored and holds_int8(config):
        raise CheckpointError(
            f"{folder}: {CONFIG} says int8, but no weight is stored so; take int8 out of it and load with int8=True"
        )
    # how the scan's rows become int8 is no property of the weights, and changes no bit
    epilogue = (asked or Int8Config()).scan_epilogue
    config = dataclasses.replace(config, int8=dataclasses.replace(config.int8, scan_epilogue=epilogue))
    usual = Int8Config(scan_epilogue=epilogue)
    if asked is not None and asked not in (config.int8, usual) and asked.chosen() != config.int8:
        raise CheckpointError(
            f"{folder}: its weights are int8 already, quantised as {config.int8}; load it without other settings"
        )
    check_manifest(folder)
    return config


def holds_int8(config: ModelConfig) -> bool:
    """Whether a model of this config has int8 weights: keep may leave none."""
    import torch

    from longllava.quant import build_model, float_places

    with torch.device("meta"):
        return bool(float_places(build_model(config)))


class Quantiser:
    """Receives float weights one by one and keeps their int8 form: never a model of floats, never one twice."""

    def __init__(self, model: Model, device_of: Callable[[str], str | torch.device]):
        from longllava.quant import float_places

        self.model, self.device_of = model, device_of
        self.places: dict[str, Place] = float_places(model)
        self.state: dict[str, Tensor] = {}

    def shapes(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the model in floats, from those of the int8 one."""
        gone = {name for place in self.places.values() for name in (place.weight, place.scale)}
        kept = {key: shape for key, shape in wanted.items() if key not in gone}
        return {**kept, **{key: place.shape for key, place in self.places.items()}}

    def take(self, key: str, source: Source, stored: Mapping[str, Stored]) -> list[str]:
        """Read and quantise one weight. Returns the stored names whose values are not finite."""
        import torch

        from longllava.quant import all_finite, fill_

        place = self.places[key]
        for name in (place.weight, place.scale):
            if name not in self.state:
                self.state[name] = torch.empty_like(self.model.get_buffer(name), device=self.device_of(name))
        start = place.start
        for name in source.names:
            weight_NK = stored[name].read().reshape(-1, place.shape[1])
            if not all_finite(weight_NK):
                return [name]
            fill_(self.state[place.weight], self.state[place.scale], start, weight_NK, place.rotated)
            start += len(weight_NK)
        return []


def damaged_scales(state: Mapping[str, Tensor]) -> list[str]:
    """Scales are above zero; what is not finite is told elsewhere."""
    return [key for key, tensor in state.items()
            if key.endswith(("scale_N", "scale_XN")) and tensor.numel() and tensor.min() <= 0]  # fmt: skip


def write_manifest(staged: Path, before: int | None = None) -> None:
    """int8.json of the weight files that lie in a folder. before: bytes of the floats they were made from."""
    files = sorted(staged.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:  # hashing frees the interpreter
        rows = {path.name: {"bytes": path.stat().st_size, "sha256": digest}
                for path, digest in zip(files, pool.map(sha256, files), strict=True)}  # fmt: skip
    total: dict[str, Any] = {"bytes": sum(row["bytes"] for row in rows.values())}
    if before is not None:
        total["bytes_before"] = before
    write_json(staged / MANIFEST, {**total, "files": rows})


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the floats that a folder was quantised from, and of its own weights."""
    found = json.loads((folder / MANIFEST).read_text("utf-8"))
    return found["bytes_before"], found["bytes"]


def check_manifest(folder: Path) -> None:
    """Raises: CheckpointError for files that are not those of int8.json; without one nothing can be said."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        rows = json.loads(path.read_text("utf-8"))["files"]
        expected = {Path(name).name: (int(row["bytes"]), str(row["sha256"])) for name, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: damaged; expected files with bytes and sha256; quantise again") from None
    files = [folder / name for name in sorted(expected)]
    wrong = [file.name for file in files if not file.is_file() or file.stat().st_size != expected[file.name][0]]
    if not wrong:
        with ThreadPoolExecutor() as pool:
            wrong = [file.name for file, digest in zip(files, pool.map(sha256, files), strict=True)
                     if digest != expected[file.name][1]]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{folder}: {listed(wrong)} is not what {MANIFEST} lists; copy the folder again")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
