"""Pickles into safetensors, and one published layout into another.

Pickled weights are opened in a process of their own (longllava.checkpoints.unpickle), never in this one.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING

from longllava.checkpoints.adapters import is_adapter
from longllava.checkpoints.folders import BESIDE, CONFIG, INDEX, PICKLES, WEIGHTS, find_folder, listed
from longllava.checkpoints.int8 import int8_config, write_manifest
from longllava.checkpoints.load import Places, find_places, read, stored_dtype
from longllava.checkpoints.published import read_config, write_config
from longllava.checkpoints.save import NATIVE, config_fields, renamed
from longllava.checkpoints.stored import check_same, header, stamp
from longllava.checkpoints.write import SHARD_BYTES, Output, write_folder
from longllava.config import ModelConfig
from longllava.errors import CheckpointError
from longllava.files import expanded, whole_folder, write_json
from longllava.shipped import PACKAGE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longllava.model import Model

TRAINERS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


def convert_pickles(source: str | Path, target: str | Path | None = None) -> list[Path]:
    """Turn a pickled file, or all of a folder, into safetensors beside it or in the folder `target`.

    Tensors keep their names. pytorch_model*.bin becomes model*.safetensors (with an index for several), any other
    file keeps its name: mm_projector.bin, mm_projector.safetensors. The pickles stay where they are. What transformers'
    Trainer writes beside weights (TRAINERS) is left alone. Config and tokenizer of a folder go with it to `target`.
    Raises: CheckpointError for a file that is no pickle of plain tensors, or when weights stand there already; then
    nothing is written.
    """
    source = expanded(source)
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    folder = source if source.is_dir() else source.parent
    inside = [path for path in source.iterdir() if not path.name.startswith(TRAINERS)] if source.is_dir() else []
    pickles = [path for path in sorted(inside) or [source] if path.suffix in PICKLES and path.is_file()]
    if not pickles:
        raise CheckpointError(f"{source}: no pickled weights there ({', '.join(PICKLES)})")
    out = folder if target is None else expanded(target)
    with whole_folder(out) as temporary:
        staged = [temporary / new_name(path, [p.name for p in pickles]) for path in pickles]
        whole = any(new.name == WEIGHTS or new.name.startswith("model-") for new in staged)
        taken = [new.name for new in staged if (out / new.name).exists() or staged.count(new) > 1]
        taken += [name for name in (WEIGHTS, INDEX) if whole and (out / name).exists()]
        if taken:
            raise CheckpointError(f"{out}: {listed(dict.fromkeys(taken))} stands there already; give another folder")
        shards: dict[str, str] = {}
        for path, new in zip(pickles, staged, strict=True):
            unpickle(path, new)
            if new.name.startswith("model-"):
                found = dict.fromkeys((key for key, _ in header(new)), new.name)
                if twice := shards.keys() & found.keys():
                    raise CheckpointError(f"{path}: {listed(sorted(twice))} lies in another file of {source} too")
                shards |= found
        if shards:
            write_json(temporary / INDEX, {"metadata": {}, "weight_map": shards})
        if source.is_dir():
            copy_missing((CONFIG, *BESIDE), source, out, temporary)
        written = [out / path.name for path in sorted(temporary.iterdir())]
    return written


def copy_missing(names: Iterable[str], source: Path, out: Path, staged: Path) -> None:
    for name in names:
        if (source / name).is_file() and not (out / name).exists():
            copyfile(source / name, staged / name)


def new_name(path: Path, all_names: list[str]) -> str:
    if path.stem == "pytorch_model" and len([name for name in all_names if name.startswith("pytorch_model")]) == 1:
        return WEIGHTS
    return path.stem.replace("pytorch_model", "model") + ".safetensors"


def unpickle(source: Path, target: Path) -> None:
    # Python finds modules in the folder it is started in first: that of the pickle may hold a torch.py of its own
    command = [sys.executable, "-m", "longllava.checkpoints.unpickle", str(source.resolve()), str(target.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=PACKAGE.parent)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with code {done.returncode}"]
        raise CheckpointError(f"{source}: {last[0]}")


@dataclass(frozen=True)
class Source:
    """A folder as a model without values, and where each of its parameters lies."""

    folder: Path
    model: Model
    places: Places

    def make(self, key: str) -> Tensor:
        """One parameter as it is stored."""
        return read(self.places.sources[key], self.places.stored, key, self.places.shapes[key], "cpu", None)

    def n_bytes(self) -> int:
        """Of its parameters, as they are stored."""
        return sum(math.prod(shape) * self.dtype(key, None).itemsize for key, shape in self.places.shapes.items())

    def dtype(self, key: str, asked: torch.dtype | None) -> torch.dtype:
        return stored_dtype(key, self.places.stored[self.places.sources[key].names[0]].dtype, asked)


def open_source(source: str | Path, text_only: bool = False) -> Source:
    """Raises: CheckpointError when its weights do not fit its config."""
    folder = find_folder(source)
    if is_adapter(folder):
        raise CheckpointError(f"{folder}: it holds an adapter, not a model; longllava merge makes one of both")
    from longllava.quant import text_part

    began, config = stamp(folder / CONFIG), int8_config(read_config(folder), folder, None)
    model = on_meta(text_part(config) if text_only else config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    parts = ("backbone.",) if text_only else ()
    places = find_places(folder, model, shapes, parts)
    check_same(folder / CONFIG, began)
    places.check(folder, (), whole=not text_only)
    return Source(folder, model, places)


def on_meta(config: ModelConfig) -> Model:
    import torch

    from longllava.quant import build_model

    with torch.device("meta"):
        return build_model(config)


def convert_layout(
    source: str | Path,
    target: str | Path,
    scheme: str = NATIVE,
    *,
    text_only: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model folder again in another layout, tensor by tensor, without ever holding the model.

    text_only: only the language model of a multimodal one. Raises: CheckpointError, ConfigError.
    """
    from_folder = open_source(source, text_only)
    outputs = {key: Output(shape, from_folder.dtype(key, dtype), maker(from_folder, key))
               for key, shape in from_folder.places.shapes.items()}  # fmt: skip
    return write_layout(from_folder, from_folder.model.config, outputs, target, scheme, shard_bytes)


def maker(source: Source, key: str) -> Callable[[], Tensor]:
    return lambda: source.make(key)


def write_layout(
    source: Source, config: ModelConfig, outputs: dict[str, Output], target: str | Path, scheme: str, shard_bytes: int
) -> Path:
    target = expanded(target)
    if target.resolve() == source.folder.resolve():
        raise CheckpointError(f"{target}: source and target are one folder; give another to write into")
    fields, named = config_fields(config, scheme, outputs), renamed(outputs, scheme)

    def rest(staged: Path) -> None:
        copy_missing(BESIDE, source.folder, staged, staged)
        write_config(staged, fields, config)
        if config.int8 is not None:
            write_manifest(staged, source.n_bytes() if source.model.config.int8 is None else None)

    return write_folder(target, named, rest, shard_bytes, BESIDE)
